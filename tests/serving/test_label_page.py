"""The assessor's page in a real browser, served by Ray Serve as users start it."""

import signal

import pytest

from labelling.database import Database
from labelling.store import Store
from rlhf.config import LabelSection
from tests.browser import WIDTHS, chromium, new_page
from tests.label_service import judge, service, sign_in, start, works

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(chromium() is None, reason="Chromium is not installed"),
]
CRITERIA = LabelSection().criteria


def test_ten_pairs_by_keyboard_a_missed_honeypot_and_a_restart(tmp_path):
    database = f"sqlite:///{tmp_path}/labels.db"
    store = Store(Database(database))
    project = store.make_project("assistant", CRITERIA)
    store.add_work(project, works(30, honeypots=range(20, 30)), 1)
    token = store.invite(project, "ann")
    shares = ("label.attention.honeypot_share=0.5", "label.attention.repeat_share=0")

    with new_page() as page:
        first = start(database, *shares, runs=tmp_path)
        sign_in(page, first.address, token)
        for number in range(5):
            # "Both bad" misses every honeypot: their known answer is another.
            judge(page, "4444")
            if "A second look" in page.content():
                assert "It says what to do." in page.content()
                with page.expect_navigation():
                    page.keyboard.press("Enter")
            assert len(store.judgements(project)) == number + 1
        open_task = page.locator("form.verdicts").get_attribute("action")
        assert first.stop(signal.SIGTERM) == 0

        # The port is another one; the cookie goes with the host, and the task is still theirs.
        with service(database, *shares, runs=tmp_path) as again:
            page.goto(f"{again.address}/task")
            assert page.locator("form.verdicts").get_attribute("action") == open_task
            for number in range(5, 10):
                judge(page, "1222")
                if "A second look" in page.content():
                    with page.expect_navigation():
                        page.keyboard.press("Enter")
                assert len(store.judgements(project)) == number + 1
        assert page.errors == [] and page.elsewhere == []
    found = store.judgements(project)
    missed = [each for each in found if each.truth and each.verdicts["overall"] != each.truth]
    assert missed
    assert all(set(each.verdicts.values()) == {"bad"} for each in found[:5])


def test_a_hostile_answer_is_shown_and_does_nothing_at_any_width(tmp_path):
    database = f"sqlite:///{tmp_path}/labels.db"
    store = Store(Database(database))
    project = store.make_project("assistant", CRITERIA)
    store.add_work(project, works(1), 1)
    token = store.invite(project, "ann")
    with service(database, runs=tmp_path) as running:
        for width in WIDTHS:
            with new_page(width) as page:
                sign_in(page, running.address, token)
                text = page.locator(".answers").inner_text()
                assert "<script>" in text and "<img" in text and text.count("long") >= 4000
                for link in page.locator(".answers a").all():
                    assert (link.get_attribute("href") or "").startswith("https://")
                assert page.title() != "run"
                assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
                assert page.errors == [] and page.elsewhere == []
