"""Feedback on answers over HTTP, with the fakes of the chat interface."""

import base64
import hashlib
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from rich.console import Console
from sqlalchemy import func, select

from actors.chat_engine import Piece, Sampling
from labelling.database import Database
from labelling.evidence import direct_evidence
from labelling.feedback import CONSENT
from labelling.store import Store
from labelling.tables import metadata, showing
from models.chat import ChatTokenizer
from models.preferences import read_pairs
from rlhf.config import LabelConfig, ServeConfig, parse_config
from rlhf.config.label import database_url
from rlhf.errors import ConfigError, DataError, ResourceError
from serving.chat import chat_app
from serving.chat_server import from_arguments
from serving.feedback import GOOD_FOR_S, Feedback
from serving.label_commands import as_lines, export, show_report
from tests.serving.test_chat import ASK, FOUR, Engine, Scorer, verdict

KEY = b"k" * 32


class VersionedEngine(Engine):
    """The same, by weights that can be changed."""

    version_now = "weights-1"

    async def write(
        self, prompt_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Piece, None]:
        async for piece in super().write(prompt_ids, sampling):
            yield replace(piece, version=self.version_now)


class Chat:
    """One ingress replica."""

    def __init__(
        self,
        tiny: Path,
        url: str,
        scorer: Scorer | None = None,
        key: bytes = KEY,
        address: str = "127.0.0.7",
        **serve: Any,
    ) -> None:
        reward = {} if scorer is None else {"reward": "somewhere"}
        values = {"serve": {"feedback": url, **serve}, **reward}
        settings = parse_config(ServeConfig, values, "test")
        self.now = 1e9
        self.feedback = Feedback(settings.serve, key, lambda: self.now)
        self.engine = VersionedEngine()
        app = chat_app(settings, ChatTokenizer(tiny), self.engine, scorer, self.feedback)
        self.client = TestClient(
            app, "http://127.0.0.1", raise_server_exceptions=False, client=(address, 1)
        )
        self.store = Store(Database(database_url(url)))
        self.project = self.store.project(settings.serve.feedback_project)

    def ask(self, **more: Any) -> Any:
        answer = self.client.post("/v1/chat/completions", json={**ASK, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def shown(self, **more: Any) -> list[dict[str, str]]:
        """Answers as a client sends them back."""
        answer = self.ask(**more)
        return [
            {"text": choice["message"]["content"], "receipt": own["receipt"]}
            for choice, own in zip(answer["choices"], answer["pavlov"]["choices"], strict=True)
        ]

    def say(self, verdict: str, answers: list[dict[str, str]], **more: Any) -> Any:
        body = {**ASK, "answers": answers, "verdict": verdict, "consent": True, **more}
        return self.client.post("/v1/feedback", json=body)

    def rows(self) -> dict[str, int]:
        with self.store.database.reading() as db:
            return {
                name: db.execute(select(func.count()).select_from(table)).scalar_one()
                for name, table in metadata.tables.items()
            }

    def close(self) -> None:
        self.feedback.close()
        self.store.database.close()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/labels.db"


@pytest.fixture
def chat(tiny_model: Path, url: str) -> Iterator[Chat]:
    found = Chat(tiny_model, url)
    yield found
    found.close()


def test_without_a_database_there_are_no_receipts_and_no_such_path(tiny_model):
    config = parse_config(ServeConfig, {}, "test")
    client = TestClient(
        chat_app(config, ChatTokenizer(tiny_model), Engine(), None),
        "http://127.0.0.1",
        client=("127.0.0.1", 1),
    )
    answer = client.post("/v1/chat/completions", json={**ASK, "candidates": True}).json()
    assert answer["pavlov"]["choices"][0]["receipt"] is None
    refused = client.post("/v1/feedback", json={})
    assert refused.status_code == 404 and refused.json()["error"]["message"] == "Not Found"


def test_a_thumb_is_kept_with_what_made_the_answer(tiny_model, labels_url):
    chat = Chat(tiny_model, labels_url, Scorer(*FOUR), system="Be brief.")
    answers = chat.shown(best_of=4, temperature=0.5, top_p=0.9, seed=3, max_tokens=7, stop="x")
    answer = chat.say("up", answers, comment="Good.")
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"object": "feedback", "id": answer.json()["id"], "project": "feedback"}
    with chat.store.database.reading() as db:
        row = db.execute(select(showing)).one()
        prompts = db.execute(select(metadata.tables["prompt"].c.messages)).scalars().all()
        text = db.execute(select(metadata.tables["answer"])).one()
    assert (row.id, row.thumb, row.comment) == (answer.json()["id"], "up", "Good.")
    assert row.sampling == {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "seed": 3,
        "best_of": 4,
        "n": 1,
        "stop": ["x"],
    }
    assert row.verdict == {
        "reward_version": "reward-1",
        "reward": 1.0,
        "disagreement": 0.2,
        "domain_shift": False,
    }
    assert row.completion.startswith("chatcmpl-") and row.answered == row.at == 1e9
    assert row.consent == {"version": "1", "wording": CONSENT}
    assert (text.text, text.model, text.checkpoint) == ("answer 2", "pavlov", "weights-1")
    # What the model read, and so the turn of the server's own.
    [messages] = prompts
    assert messages == [{"role": "system", "content": "Be brief."}, *ASK["messages"]]

    again = chat.say("down", answers).json()
    assert again["id"] == row.id
    labels = parse_config(LabelConfig, {"label": {"database": labels_url}}, "test")
    figures = show_report(labels, "feedback", "person")
    assert figures["reactions"] == {"weights-1": {"up": 0, "down": 1}}
    assert "thumbs         weights-1: 0 up, 1 down" in as_lines(figures)
    chat.close()


@pytest.mark.parametrize("turned", [False, True])
def test_a_choice_between_versions_is_evidence_and_a_label(
    tiny_model, labels_url, tmp_path, turned
):
    chat = Chat(tiny_model, labels_url)
    [old] = chat.shown()
    chat.engine.version_now = "weights-2"
    new = chat.shown(n=2)[1]
    order = [new, old] if turned else [old, new]
    said = chat.say("first" if turned else "second", order)
    assert said.status_code == 200, said.text

    labels = parse_config(LabelConfig, {"label": {"database": labels_url}}, "test")
    [found] = chat.store.judgements(chat.project, with_work=True)
    answers = {"a": found.work.a, "b": found.work.b}
    assert found.id == said.json()["id"] and found.kind == "person"
    assert answers[found.first].text == order[0]["text"]
    assert answers[found.verdicts["overall"]].text == new["text"]
    # The second was cut off.
    assert [each.finished for each in answers.values() if each.checkpoint == "weights-2"] == [False]
    record = direct_evidence([found], "weights-2", "weights-1", "person").record
    assert (record.wins, record.losses) == (1, 0)
    export(labels, "feedback", tmp_path / "labels.parquet", Console(quiet=True))
    [pair], _ = read_pairs([tmp_path / "labels.parquet"])
    assert pair.chosen == new["text"] and pair.rejected == old["text"]
    figures = show_report(labels, "feedback", "person")
    assert figures["judgements"] == 1 and figures["reactions"] == {}
    assert not any(line.startswith("thumbs") for line in as_lines(figures))
    chat.close()


def test_a_choice_is_made_once(chat):
    answers = chat.shown(n=2)
    first = chat.say("first", answers)
    assert chat.say("first", answers).json() == first.json()
    other = chat.say("second", answers)
    assert other.status_code == 409 and "that verdict stays" in other.json()["error"]["message"]
    [found] = chat.store.judgements(chat.project)
    assert found.verdicts["overall"] == found.first


def test_every_candidate_and_every_stream_has_receipts_of_what_it_shows(tiny_model, url):
    scorer = Scorer(verdict(1.0, 0.1, True), verdict(0.5))
    chat = Chat(tiny_model, url, scorer, domain_shift="notice", notice_text="Unsure.")
    answer = chat.ask(best_of=2, candidates=True)
    drawn = [
        {name: each[name] for name in ("text", "receipt")}
        for each in answer["pavlov"]["candidates"]
    ]
    assert [each["text"] for each in drawn] == ["answer 0\n\nUnsure.", "answer 1"]
    assert chat.say("first", drawn).status_code == 200
    # The chosen one and the candidate that it is are one answer.
    chosen = {"text": drawn[0]["text"], "receipt": answer["pavlov"]["choices"][0]["receipt"]}
    assert chat.say("up", [chosen]).status_code == 200
    twice = chat.say("tie", [chosen, drawn[0]]).json()["error"]
    assert twice["param"] == "answers" and "one and the same" in twice["message"]

    for more in ({"best_of": 2}, {"score": True}):
        lines = chat.client.post("/v1/chat/completions", json={**ASK, "stream": True, **more})
        events = [
            json.loads(line.removeprefix("data: "))
            for line in lines.text.split("\n")
            if line and "[DONE]" not in line
        ]
        text = "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
        [own] = events[-1]["pavlov"]["choices"]
        assert chat.say("up", [{"text": text, "receipt": own["receipt"]}]).status_code == 200
    chat.close()


def test_nothing_is_kept_without_consent(chat):
    before = chat.rows()
    answers = chat.shown(n=2)
    for consent in ({"consent": False}, {"consent": None}, {"consent": 1}, {"consent": "true"}):
        refused = chat.say("first", answers, **consent)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "consent"
    body = {**ASK, "answers": answers[:1], "verdict": "up"}
    assert chat.client.post("/v1/feedback", json=body).status_code == 400
    assert chat.rows() == before
    assert chat.say("first", answers).status_code == 200
    assert chat.rows() != before


def changed(receipt: str, **values: Any) -> str:
    """A receipt that says something else, with the old signature."""
    content, _, signature = receipt.partition(".")
    told = json.loads(base64.urlsafe_b64decode(content)) | values
    return f"{base64.urlsafe_b64encode(json.dumps(told).encode()).decode()}.{signature}"


OTHER = [{"role": "user", "content": "What is a dog?"}]


@pytest.mark.parametrize(
    ("make", "status", "param", "says"),
    [
        (lambda a: {"answers": [a[0] | {"text": "no"}]}, 400, "answers.0.text", "another text"),
        (lambda a: {"messages": OTHER}, 400, "messages", "another conversation"),
        (
            lambda a: {"answers": [a[0] | {"receipt": changed(a[0]["receipt"], candidate=5)}]},
            *(400, "answers.0.receipt", "since its last start"),
        ),
        (lambda a: {"answers": [a[0] | {"receipt": ""}]}, 400, "answers.0.receipt", "not by this"),
        (lambda a: {"answers": [a[0] | {"receipt": "é.é"}]}, 400, "answers.0.receipt", "not by"),
        (lambda a: {"answers": [a[0] | {"receipt": "."}]}, 400, "answers.0.receipt", "not by this"),
        (lambda a: {"answers": [a[0], a[0]], "verdict": "tie"}, 400, "answers", "one and the same"),
        (lambda a: {"answers": [], "verdict": "up"}, 400, "answers", "at least 1"),
        (lambda a: {"answers": [a[0]] * 3, "verdict": "tie"}, 400, "answers", "at most 2"),
        (lambda a: {"verdict": "first"}, 400, "verdict", "up or down of one"),
        (lambda a: {"answers": a, "verdict": "up"}, 400, "verdict", "tie or bad of two"),
        (lambda a: {"verdict": "best"}, 400, "verdict", "'up'"),
        (lambda a: {"comment": "x" * 2001}, 400, "comment", "2000"),
        (lambda a: {"comment": "\x00"}, 400, "comment", "NUL"),
        (lambda a: {"comment": "\ud800"}, 400, None, "not JSON"),
        (lambda a: {"rating": 5}, 400, "rating", "not supported"),
        (lambda a: {"messages": []}, 400, "messages", "at least 1"),
    ],
)
def test_what_is_not_proven_is_refused_and_nothing_of_it_kept(chat, make, status, param, says):
    answers = chat.shown(n=2)
    before = chat.rows()
    body = {**ASK, "answers": answers[:1], "verdict": "up", "consent": True, **make(answers)}
    answer = chat.client.post(
        "/v1/feedback",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    error = answer.json()["error"]
    assert answer.status_code == status and error["type"] == "invalid_request_error"
    assert error["param"] == param and says in error["message"], error
    assert chat.rows() == before
    assert chat.say("up", answers[:1]).status_code == 200


def test_answers_to_different_conversations_and_equal_ones_are_not_compared(chat):
    [one] = chat.shown()
    [elsewhere] = chat.shown(messages=OTHER)
    [equal] = chat.shown()
    for other, says in ((elsewhere, "different conversations"), (equal, "equal replies")):
        error = chat.say("first", [one, other]).json()["error"]
        assert error["param"] == "answers" and says in error["message"]
    assert chat.store.judgements(chat.project) == []


def test_a_receipt_is_good_for_a_day(chat):
    answers = chat.shown()
    chat.now += GOOD_FOR_S
    assert chat.say("up", answers).status_code == 200
    chat.now += 1
    refused = chat.say("down", answers)
    assert refused.status_code == 400 and "older than a day" in refused.json()["error"]["message"]


def test_any_replica_takes_it_and_no_server_started_since(tiny_model, url):
    one, other = Chat(tiny_model, url), Chat(tiny_model, url)
    later = Chat(tiny_model, url, key=b"x" * 32)
    answers = one.shown()
    assert later.say("up", answers).status_code == 400
    assert other.say("up", answers).status_code == 200
    for each in (one, other, later):
        each.close()


def test_who_says_it_is_a_key_or_a_user_or_an_address_and_none_is_kept_as_it_is(
    tiny_model, url, tmp_path
):
    chat = Chat(tiny_model, url)
    answers = chat.shown()
    for user in (None, "ann@example.org", "ben"):
        assert chat.say("up", answers, user=user).status_code == 200
    elsewhere = Chat(tiny_model, url, address="127.0.0.8")
    assert elsewhere.say("down", answers).status_code == 200
    hashed = hashlib.sha256(b"mine").hexdigest()
    keyed = Chat(tiny_model, url, keys=[hashed])
    assert keyed.say("up", answers).status_code == 401
    keyed.client.headers["Authorization"] = "Bearer mine"
    assert keyed.say("up", answers, user="ann@example.org").status_code == 200

    names = [each.name for each in chat.store.assessors(chat.project)]
    assert [name.split()[0] for name in names] == ["visitor", "user", "user", "visitor", "key"]
    assert len(set(names)) == 5 and names[-1] == f"key {hashed[:16]}"
    for each in (chat, elsewhere, keyed):
        each.close()
    kept = b"".join(file.read_bytes() for file in tmp_path.glob("labels.db*"))
    assert b"visitor" in kept
    for secret in (b"192.0.2", b"ann@", b"mine", KEY):
        assert secret not in kept


def test_the_limits_of_the_server_hold_for_feedback(tiny_model, url):
    chat = Chat(tiny_model, url, requests_per_minute=3)
    answers = chat.shown()
    large = chat.client.post("/v1/feedback", content=b" " * (2 << 20))
    assert large.status_code == 413
    assert [chat.say("up", answers).status_code for _ in range(2)] == [200, 429]
    chat.close()


def test_who_always_takes_the_first_is_paused_while_the_server_runs(tiny_model, url):
    chat = Chat(tiny_model, url)
    for number in range(40):
        messages = [{"role": "user", "content": f"question {number}"}]
        answers = chat.shown(messages=messages, n=2)
        # The others take either.
        others = "first" if number % 2 else "second"
        for user, choice in (("reader", others), ("other", others), ("hasty", "first")):
            chat.now += 5
            said = chat.say(choice, answers, messages=messages, user=user)
            assert said.status_code == 200, said.text
    states = [each.state for each in chat.store.assessors(chat.project)]
    assert states == ["active", "active", "paused"]
    chat.close()


def test_feedback_is_answered_where_its_review_fails(chat, monkeypatch):
    monkeypatch.setattr(Store, "review_due", lambda *_: 1 / 0)
    assert chat.say("first", chat.shown(n=2)).status_code == 200


@pytest.mark.parametrize(
    ("serve", "error", "message"),
    [
        ({"feedback": "mysql://host/labels"}, DataError, r"serve\.feedback = .* is no URL"),
        ({"feedback": "sqlite://"}, DataError, r"serve\.feedback = .* gone with the process"),
        ({"feedback": "postgresql://ann@127.0.0.1:9/x"}, ResourceError, "no answer from"),
        (
            {"feedback": "sqlite:///x.db", "ingress": {"most": 2}},
            *(ConfigError, r"serve\.ingress\.most = 2 .* SQLite has one server"),
        ),
    ],
)
def test_where_feedback_cannot_go_is_said_at_the_start(tiny_model, serve, error, message):
    with pytest.raises(error, match=message):
        from_arguments({"policy": {"model": str(tiny_model)}, "serve": {"keys": [], **serve}})


def test_what_is_deployed_has_its_project_before_the_first_request(tiny_model, url):
    serve = {"keys": [], "feedback": url, "max_prompt_tokens": 500}
    arguments = {"policy": {"model": str(tiny_model)}, "serve": serve}
    assert from_arguments(arguments) is not None
    assert Store(Database(url)).project("feedback").criteria == ()


def test_a_relative_file_stands_below_the_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PAVLOV_RUNS", str(tmp_path))
    config = parse_config(ServeConfig, {"serve": {"feedback": "sqlite:///labels.db"}}, "test")
    assert config.serve.feedback_url == f"sqlite:///{tmp_path}/labels.db"
    assert ServeConfig().serve.feedback_url is None
