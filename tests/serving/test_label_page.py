"""The assessor's page in a real browser, served by Ray Serve as users start it."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from labelling.database import Database
from labelling.store import Store
from rlhf.config import LabelSection
from tests.browser import WIDTHS, chromium, new_page
from tests.label_service import judge, sign_in, start, works
from tests.servers import Server

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(chromium() is None, reason="Chromium is not installed"),
]
CRITERIA = LabelSection().criteria


class Site:
    """The service on a database of its own; every second task is a honeypot where there is one."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._database = folder, f"sqlite:///{folder}/labels.db"
        self.store = Store(Database(self._database))
        self._server: Server | None = None

    @property
    def address(self) -> str:
        """Where it answers; it is started where it does not run."""
        if self._server is None:
            shares = ("label.attention.honeypot_share=0.5", "label.attention.repeat_share=0")
            self._server = start(self._database, *shares, runs=self._folder)
        return self._server.address

    def stop(self) -> int:
        """Its exit code; 0 where it did not run."""
        server, self._server = self._server, None
        return server.stop(signal.SIGTERM) if server else 0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("labels"))
    yield site
    assert site.stop() == 0


def test_ten_pairs_by_keyboard_a_missed_honeypot_and_a_restart(site):
    store = site.store
    project = store.make_project("assistant", CRITERIA)
    store.add_work(project, works(30, honeypots=range(20, 30)), 1)
    token = store.invite(project, "ann")

    with new_page() as page:
        sign_in(page, site.address, token)
        for number in range(5):
            # "Both bad" misses every honeypot: their known answer is another.
            judge(page, "4444")
            if "A second look" in page.content():
                assert "It says what to do." in page.content()
                with page.expect_navigation():
                    page.keyboard.press("Enter")
            assert len(store.judgements(project)) == number + 1
        open_task = page.locator("form.verdicts").get_attribute("action")
        assert site.stop() == 0

        # The port is another one; the cookie goes with the host, and the task is still theirs.
        page.goto(f"{site.address}/task")
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


def test_a_hostile_answer_is_shown_and_does_nothing_at_any_width(site):
    project = site.store.make_project("hostile", CRITERIA)
    site.store.add_work(project, works(1), 1)
    token = site.store.invite(project, "ann")
    for width in WIDTHS:
        with new_page(width) as page:
            sign_in(page, site.address, token)
            text = page.locator(".answers").inner_text()
            assert "<script>" in text and "<img" in text and text.count("long") >= 4000
            for link in page.locator(".answers a").all():
                assert (link.get_attribute("href") or "").startswith("https://")
            assert page.title() != "run"
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            assert page.errors == [] and page.elsewhere == []
