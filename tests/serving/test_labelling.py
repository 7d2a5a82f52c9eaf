"""The labelling service over HTTP, without a server around it."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from labelling.database import Database
from labelling.records import Answer, Honeypot, Work
from labelling.store import Project, Store
from rlhf.config import LabelConfig, parse_config
from rlhf.records import Message
from serving.labelling import BODY_LIMIT_BYTES, labelling_app
from serving.safe_markdown import safe_markdown

HOSTILE = (
    '<script>document.title="run"</script> <img src=x onerror="document.title=\'run\'"> '
    "[a link](javascript:alert(1)) ![an image](https://elsewhere.example/x.png) "
    "[fine](https://example.org) " + "x" * 20_000 + "\n\n\u0645\u0631\u062d\u0628\u0627"
)


def work(number: int, honeypot: bool = False, text: str = "") -> Work:
    return Work(
        (Message("user", f"question {number}"),),
        Answer(text or f"yes {number}", "tuned"),
        Answer(f"no, for a reason {number}", "base"),
        honeypot=Honeypot("a", "It answers.") if honeypot else None,
    )


class Served:
    """The service on a database of its own, and its store."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        label = {"database": f"sqlite:///{folder}/labels.db", "criteria": ["helpful"], **settings}
        self.config = parse_config(LabelConfig, {"label": label}, "test")
        self.store = Store(Database(self.config.label.url))
        self.project: Project = self.store.make_project("assistant", ["helpful"])

    def client(self, name: str = "ann", **what: str) -> TestClient:
        token = self.store.invite(self.project, name, **what)
        return TestClient(labelling_app(self.config), headers={"Authorization": f"Bearer {token}"})

    def browser(self, name: str = "ann", **what: str) -> TestClient:
        token = self.store.invite(self.project, name, **what)
        browser = TestClient(labelling_app(self.config), headers={"Accept": "text/html"})
        assert browser.post("/signin", data={"token": token}).status_code == 200
        return browser


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    found = Served(tmp_path, attention={"honeypot_share": 0.0, "repeat_share": 0.0})
    found.store.add_work(found.project, [work(n) for n in range(3)], 1)
    yield found
    found.store.database.close()


def task_of(page: str) -> str:
    return page.partition("/task/")[2].partition("/judge")[0]


def test_a_program_judges_until_nothing_is_left(served):
    client = served.client()
    for _ in range(3):
        task = client.post("/api/next").json()["task"]
        assert task["criteria"] == ["helpful", "overall"]
        assert {"id", "prompt", "first", "second", "criteria", "verdicts"} == task.keys()
        body = {"task": task["id"], "verdicts": dict.fromkeys(task["criteria"], "tie")}
        answer = client.post("/api/judgements", json=body)
        assert answer.json() == {"stored": True, "repeated": False, "missed": None}
        assert client.post("/api/judgements", json=body).json()["repeated"]
    assert client.post("/api/next").json() == {"task": None}
    assert len(served.store.judgements(served.project)) == 3


def test_the_page_judges_without_any_script(served):
    browser = served.browser()
    page = browser.get("/task").text
    form = {"verdict-helpful": "first", "verdict-overall": "second", "seconds": "0.01"}
    answer = browser.post(f"/task/{task_of(page)}/judge", data=form, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/task")
    [found] = served.store.judgements(served.project)
    assert found.verdicts["helpful"] == found.first != found.verdicts["overall"]
    assert found.seconds <= 0.02


def test_a_verdict_that_is_missing_is_asked_for_and_nothing_is_lost(served):
    browser = served.browser()
    task = task_of(browser.get("/task").text)
    answer = browser.post(f"/task/{task}/judge", data={"verdict-overall": "tie"})
    assert answer.status_code == 400
    assert "no verdict on helpful" in answer.text and task_of(answer.text) == task
    # What was chosen stays chosen.
    assert answer.text.count("required checked") == 1
    assert served.store.judgements(served.project) == []


def test_models_are_not_named_to_assessors(served):
    page = served.browser().get("/task").text
    assert "tuned" not in page and "base" not in page.replace("base-uri", "")
    client = served.client("bob")
    assert "tuned" not in client.post("/api/next").text


def test_what_an_answer_says_never_runs_and_fetches_nothing(tmp_path):
    served = Served(tmp_path, attention={"honeypot_share": 0.0, "repeat_share": 0.0})
    served.store.add_work(served.project, [work(0, text=HOSTILE)], 1)
    answer = served.browser().get("/task")
    page = answer.text
    assert "<script>document" not in page and "&lt;script&gt;" in page
    assert "<img" not in page
    assert 'href="javascript' not in page
    assert 'href="https://example.org" target="_blank" rel="noopener noreferrer nofollow"' in page
    assert "x" * 20_000 in page and 'dir="auto"' in page
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy


def test_a_missed_honeypot_is_explained_at_once(tmp_path):
    served = Served(tmp_path, attention={"honeypot_share": 1 - 1e-9, "repeat_share": 0.0})
    served.store.add_work(served.project, [work(n, honeypot=n < 4) for n in range(5)], 1)
    browser = served.browser()
    task = task_of(browser.get("/task").text)
    form = {"verdict-helpful": "bad", "verdict-overall": "bad"}
    page = browser.post(f"/task/{task}/judge", data=form).text
    assert "A second look" in page and "It answers." in page and "An expert found the" in page


def test_nobody_without_a_token_sees_anything(served):
    app = labelling_app(served.config)
    stranger = TestClient(app)
    for method, path in (("GET", "/task"), ("POST", "/api/next"), ("GET", "/api/report")):
        assert stranger.request(method, path).status_code == 401
    said = stranger.post("/signin", data={"token": "guess"})
    assert said.status_code == 403 and "No assessor has this token" in said.text
    assert stranger.get("/health").json() == {"status": "ok"}
    assert stranger.get("/docs").status_code == 404


def test_a_revoked_token_no_longer_signs_in(served):
    client = served.client("ann")
    assert client.post("/api/next").status_code == 200
    [ann] = served.store.assessors(served.project)
    served.store.set_state(ann, "revoked", "left", "owner")
    assert client.post("/api/next").status_code == 401


def test_tokens_are_kept_hashed(served, tmp_path):
    token = served.store.invite(served.project, "ann")
    served.store.database.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("labels.db*"))
    assert token.encode() not in stored and b"ann" in stored


def test_the_report_is_the_owners(served):
    assert served.client("ann").get("/api/report").status_code == 403
    owner = served.client("olga", role="owner")
    assert owner.get("/api/report").json()["judgements"] == 0


def test_an_owner_pauses_and_lets_go_on(served):
    ann = served.client("ann")
    olga = served.browser("olga", role="owner")
    assert "ann" in olga.get("/project").text
    keys = {each.name: each.id for each in served.store.assessors(served.project)}
    assert olga.post(f"/project/assessors/{keys['ann']}/pause").status_code == 200
    refused = ann.post("/api/next")
    assert refused.status_code == 403 and "paused" in refused.json()["error"]
    olga.post(f"/project/assessors/{keys['ann']}/resume")
    assert ann.post("/api/next").status_code == 200
    assert olga.post(f"/project/assessors/{keys['olga']}/pause").status_code == 400
    assert olga.post("/project/assessors/999/pause").status_code == 404


def judged(client: TestClient) -> None:
    task = client.post("/api/next").json()["task"]
    verdicts = dict.fromkeys(task["criteria"], "first")
    client.post("/api/judgements", json={"task": task["id"], "verdicts": verdicts})


@pytest.mark.parametrize(
    ("actions", "state", "counts"),
    [
        (["pause"], "paused", False),
        (["pause", "resume"], "active", True),
        (["revoke"], "revoked", True),
        (["discard"], "revoked", False),
        (["revoke", "discard"], "revoked", False),
        (["pause", "revoke"], "revoked", False),
        (["discard", "resume"], "active", True),
    ],
)
def test_what_somebody_said_counts_as_the_owner_decides(served, actions, state, counts):
    ann, olga = served.client("ann"), served.browser("olga", role="owner")
    judged(ann)
    [key] = [each.id for each in served.store.assessors(served.project) if each.name == "ann"]
    for action in actions:
        assert f"assessors/{key}/{action}" in olga.get("/project").text
        assert olga.post(f"/project/assessors/{key}/{action}").status_code == 200
    [found] = served.store.judgements(served.project)
    assert (found.doubt == "") is counts
    # Besides the task that the owner was given at sign-in.
    assert served.store.counts(served.project)["taken"] == 1 + counts
    assert served.store.assessors(served.project)[0].state == state
    # What would change nothing is not offered.
    last = olga.get("/project").text
    assert ("/discard" in last) is counts and ("/resume" in last) is (state != "active")


def test_an_owner_sees_which_known_answers_are_missed_and_retires_them(tmp_path):
    served = Served(tmp_path, attention={"honeypot_share": 1 - 1e-9, "repeat_share": 0.0})
    served.store.add_work(served.project, [work(0, honeypot=True), work(1)], 1)
    ann, olga = served.client("ann"), served.browser("olga", role="owner")
    task = ann.post("/api/next").json()["task"]
    verdicts = dict.fromkeys(task["criteria"], "bad")
    assert ann.post("/api/judgements", json={"task": task["id"], "verdicts": verdicts}).json()[
        "missed"
    ]
    page = olga.get("/project").text
    assert "<td>1 of 1</td>" in page and "question 0" in page and "It answers." in page
    [retire] = re.findall(r"/project/honeypots/\d+/retire", page)
    assert ann.post(retire).status_code == 403
    assert "honeypots/" not in olga.post(retire).text
    assert [each.truth for each in served.store.judgements(served.project)] == [None]
    assert olga.post(retire).status_code == 400


def test_an_expert_makes_a_honeypot_of_a_task(served):
    browser = served.browser("eva", role="expert")
    page = browser.get("/task").text
    form = {"verdict-helpful": "first", "verdict-overall": "first", "explanation": "Right."}
    browser.post(f"/task/{task_of(page)}/judge", data=form)
    assert served.store.counts(served.project)["pairs"] == 2
    assert "honeypot" not in served.browser("ann").get("/task").text


def test_too_many_requests_are_told_when_to_come_back(tmp_path):
    served = Served(tmp_path, requests_per_minute=5)
    client = served.client()
    codes = [client.post("/api/next").status_code for _ in range(7)]
    assert codes == [200] * 5 + [429] * 2
    assert 1 <= int(client.post("/api/next").headers["retry-after"]) <= 60
    stranger = TestClient(client.app, headers={"Authorization": "Bearer guess"})
    tried = [stranger.post("/api/next").status_code for _ in range(6)]
    assert tried == [401] * 5 + [429]
    guesses = [client.post("/signin", data={"token": "guess"}).status_code for _ in range(6)]
    assert guesses == [429] * 6


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"task": "none", "verdicts": {"helpful": "tie", "overall": "tie"}}, 400),
        ({"task": "none", "verdicts": {"helpful": "tie"}}, 400),
        ({"task": "none", "verdicts": {"helpful": "best"}}, 422),
        ({"task": "none"}, 422),
        ({"task": "none", "verdicts": {}, "extra": 1}, 422),
    ],
)
def test_a_bad_body_is_refused(served, body, code):
    answer = served.client().post("/api/judgements", json=body)
    assert answer.status_code == code
    assert answer.json().keys() == {"error"}
    assert served.store.judgements(served.project) == []


def test_large_bodies_and_forms_of_other_sites_are_refused(served):
    client = served.client()
    assert client.post("/api/next", content=b"x" * (BODY_LIMIT_BYTES + 1)).status_code == 413
    assert (
        client.get("/health", headers={"Content-Length": "²".encode("latin-1")}).status_code == 411
    )
    for coding in ("chunked", "Chunked", "gzip, CHUNKED"):
        unsaid = {"Transfer-Encoding": coding}
        assert client.post("/api/next", content=b"x", headers=unsaid).status_code == 411
    other = client.post("/signout", headers={"Origin": "https://elsewhere.example"})
    assert other.status_code == 403
    own = client.post("/signout", headers={"Origin": "http://testserver"}, follow_redirects=False)
    assert own.status_code == 303


def test_who_meets_a_lost_connection_is_asked_to_send_it_again(postgres_url):
    """A request that waits for a pair, and whose connection PostgreSQL ends."""
    label = {"database": postgres_url, "criteria": ["helpful"]}
    config = parse_config(LabelConfig, {"label": label}, "test")
    store = Store(Database(config.label.url))
    try:
        project = store.make_project("assistant", ["helpful"])
        store.add_work(project, [work(0)], 1)
        token = store.invite(project, "ann")
        client = TestClient(labelling_app(config), headers={"Authorization": f"Bearer {token}"})
        with ThreadPoolExecutor() as pool, store.database.writing() as db:
            db.exec_driver_sql("SELECT * FROM demand FOR UPDATE")
            asked = pool.submit(client.post, "/api/next")
            waiting = "FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            while not db.exec_driver_sql(f"SELECT count(*) {waiting}").scalar():
                assert not asked.done()
                db.exec_driver_sql("SELECT pg_stat_clear_snapshot(), pg_sleep(0.01)")
            db.exec_driver_sql(f"SELECT pg_terminate_backend(pid) {waiting}")
            answer = asked.result(30)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert answer.json() == {"error": "the database is busy; send it again"}
        assert client.post("/api/next").json()["task"]
    finally:
        with store.database.writing() as db:
            db.exec_driver_sql("DROP SCHEMA public CASCADE")
            db.exec_driver_sql("CREATE SCHEMA public")
        store.database.close()


def test_one_project_alone_can_be_served(served):
    token = served.store.invite(served.project, "ann")
    app = labelling_app(served.config, project="another")
    client = TestClient(app, headers={"Authorization": f"Bearer {token}"})
    assert client.post("/api/next").status_code == 401


def test_nothing_on_the_page_tells_a_honeypot_from_work(tmp_path):
    served = Served(tmp_path, attention={"honeypot_share": 0.5, "repeat_share": 0.0})
    served.store.add_work(served.project, [work(n) for n in range(12)], 3)
    served.store.add_work(served.project, [work(n, honeypot=True) for n in range(20, 32)], 3)
    browser = served.browser()
    pages = {True: set(), False: set()}
    for _ in range(16):
        page = browser.get("/task").text
        name = task_of(page)
        with served.store.database.reading() as db:
            query = f"SELECT task FROM assignment WHERE id = '{name}'"
            kind = db.exec_driver_sql(query).scalar()
        # All but the texts, the task's name, and how many one has judged.
        frame = re.sub(
            r"\d+ judged by you|/task/[\w-]+/|<article.*?</article>", "", page, flags=re.S
        )
        frame = re.sub(r"<section.*?</section>|<aside.*?</aside>", "", frame, flags=re.S)
        pages[kind == "honeypot"].add(frame)
        form = {"verdict-helpful": "first", "verdict-overall": "first"}
        browser.post(f"/task/{name}/judge", data=form)
    assert pages[True] and pages[True] <= pages[False]


def test_ones_own_figures_move_in_tens(served):
    client = served.client()
    for _ in range(3):
        task = client.post("/api/next").json()["task"]
        verdicts = dict.fromkeys(task["criteria"], "tie")
        client.post("/api/judgements", json={"task": task["id"], "verdicts": verdicts})
    assert client.get("/api/me").json()["judgements"] == 0


def test_an_answer_cannot_hide_in_a_definition():
    assert "the whole answer" in safe_markdown("[x]: http://a.b 'the whole answer'")


def test_a_database_that_does_not_answer_is_a_503_that_tells_nothing_of_the_inside(served):
    client = served.client()
    with served.store.database.writing() as db:
        db.exec_driver_sql("ALTER TABLE assessor RENAME TO gone")
    answer = client.post("/api/next")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert "busy" in answer.text and "assessor" not in answer.text
