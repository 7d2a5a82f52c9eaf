"""The chat interface, with an engine and an ensemble that do as they are told."""

import asyncio
import contextlib
import gc
import hashlib
import json
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

from actors.chat_engine import Piece, Sampling, TokenLogprob
from models.chat import ChatTokenizer
from rlhf.config import ServeConfig, parse_config
from rlhf.errors import ConfigError
from rlhf.records import Message
from serving.chat import chat_app
from serving.ensemble import Verdict
from serving.strict_json import BODY_LIMIT_BYTES

ASK = {"messages": [{"role": "user", "content": "What is a cat?"}]}


class Engine:
    """Candidate i says ``answer i`` in two pieces."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], Sampling]] = []
        self.stopped = 0
        self.error: Exception | None = None
        self.wait = asyncio.Event()
        self.wait.set()

    async def write(
        self, prompt_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Piece, None]:
        self.asked.append((tuple(prompt_ids), sampling))
        try:
            await self.wait.wait()
            if self.error:
                raise self.error
            for at in range(sampling.candidates):
                told = () if sampling.logprobs is None else (TokenLogprob("answer", -0.5),)
                others = () if sampling.logprobs is None else (told[: sampling.logprobs],)
                yield Piece(at, "answer ", 1, "weights-1", None, told, others)
            for at in reversed(range(sampling.candidates)):
                yield Piece(at, str(at), 1, "weights-1", "length" if at == 1 else "stop")
        finally:
            self.stopped += 1

    async def version(self) -> str:
        # Of a replica that wrote none of the answers.
        return "weights-2"


class Scorer:
    """Knows the rewards of answers by their number."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts = verdicts
        self.asked: list[tuple[str, bool]] = []

    async def judge(self, messages: Sequence[Message], text: str, finished: bool) -> Verdict:
        self.asked.append((text, finished))
        return self.verdicts[int(text.rsplit(" ", 1)[1])]

    async def version(self) -> str:
        return "reward-1"


def verdict(reward: float, disagreement: float = 0.0, shift: bool = False) -> Verdict:
    return Verdict(reward, (reward - 0.1, reward + 0.1), disagreement, shift, "reward-1")


FOUR = (verdict(0.1), verdict(2.0, 3.0), verdict(1.0, 0.2), verdict(0.5))
"""By mean the second is best, by the lower bound the third."""


class Chat:
    def __init__(self, tiny: Any, scorer: Scorer | None = None, **serve: Any) -> None:
        reward = {} if scorer is None else {"reward": "somewhere"}
        config = parse_config(ServeConfig, {"serve": serve, **reward}, "test")
        self.engine, self.scorer = Engine(), scorer
        app = chat_app(config, ChatTokenizer(tiny), self.engine, scorer)
        self.client = TestClient(
            app, "http://127.0.0.1", raise_server_exceptions=False, client=("127.0.0.1", 1)
        )

    def ask(self, **more: Any) -> Any:
        return self.client.post("/v1/chat/completions", json={**ASK, **more})

    def events(self, **more: Any) -> list[Any]:
        lines = [line for line in self.ask(stream=True, **more).text.split("\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_an_answer_has_the_form_that_clients_expect(tiny_model):
    chat = Chat(tiny_model)
    answer = chat.ask().json()
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "answer 0", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["index"] == 0
    prompt = len(ChatTokenizer(tiny_model).prompt_ids([Message("user", "What is a cat?")]))
    usage = {"prompt_tokens": prompt, "completion_tokens": 2, "total_tokens": prompt + 2}
    assert answer["usage"] == usage
    assert answer["object"] == "chat.completion" and answer["model"] == "pavlov"
    assert answer["pavlov"]["weight_version"] == "weights-1"
    assert answer["pavlov"]["reward"] is None


def test_a_stream_says_what_the_whole_answer_says(tiny_model):
    chat = Chat(tiny_model)
    events = chat.events(n=2, stream_options={"include_usage": True})
    said = ["", ""]
    ended = [None, None]
    for event in events:
        assert event["object"] == "chat.completion.chunk"
        for choice in event["choices"]:
            said[choice["index"]] += choice["delta"].get("content", "")
            ended[choice["index"]] = choice["finish_reason"] or ended[choice["index"]]
    assert said == ["answer 0", "answer 1"] and ended == ["stop", "length"]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 4
    assert events[-1]["pavlov"]["weight_version"] == "weights-1"
    assert len({event["id"] for event in events}) == 1


@pytest.mark.parametrize("ask", [{}, {"n": 2}, {"best_of": 4, "n": 2}, {"score": True}])
def test_every_chunk_has_a_choice_where_no_usage_was_asked_for(tiny_model, ask):
    chat = Chat(tiny_model, Scorer(*FOUR))
    for options in ({}, {"stream_options": {"include_usage": False}}):
        events = chat.events(**ask, **options)
        assert all(len(event["choices"]) == 1 for event in events)
        assert not any("usage" in event for event in events)
        assert events[-1]["choices"][0]["finish_reason"]
        assert [event for event in events if "pavlov" in event] == [events[-1]]
        assert events[-1]["pavlov"]["weight_version"] == "weights-1"
    *before, last = chat.events(**ask, stream_options={"include_usage": True})
    assert all(len(event["choices"]) == 1 for event in before) and before[-1]["choices"]
    assert last["choices"] == [] and last["usage"]["total_tokens"] > 0 and last["pavlov"]


def test_a_stream_is_read_as_in_the_clients_own_example(tiny_model):
    chat = Chat(tiny_model, Scorer(*FOUR))

    async def said(**more: Any) -> tuple[str, Any]:
        transport = httpx.ASGITransport(app=chat.client.app)
        async with openai.AsyncOpenAI(
            base_url="http://127.0.0.1/v1",
            api_key="none",
            http_client=httpx.AsyncClient(transport=transport),
        ) as client:
            text = ""
            stream = await client.chat.completions.create(
                model="pavlov", messages=ASK["messages"], stream=True, **more
            )
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
            return text, chunk.model_extra["pavlov"]

    text, own = asyncio.run(said())
    assert text == "answer 0" and own["weight_version"] == "weights-1"
    text, own = asyncio.run(said(extra_body={"best_of": 4}))
    assert text == "answer 2" and own["reward"] == 1.0


def test_the_one_model_is_found_by_its_name(tiny_model):
    for name in ("pavlov", "our/assistant 2"):
        chat = Chat(tiny_model, name=name)
        found = chat.client.get(f"/v1/models/{quote(name, safe='')}")
        assert found.status_code == 200
        assert [found.json()] == chat.client.get("/v1/models").json()["data"]
        for other in ("gpt-9", "Pavlov", f"{name}/", ""):
            refused = chat.client.get(f"/v1/models/{other}")
            assert refused.status_code == 404
            assert refused.json()["error"]["code"] == "model_not_found"
            assert refused.json()["error"]["type"] == "invalid_request_error"
    keyed = Chat(tiny_model, keys=["0" * 64])
    assert keyed.client.get("/v1/models/pavlov").status_code == 401


def test_the_best_of_many_has_the_highest_lower_bound_not_the_highest_mean(tiny_model):
    chat = Chat(tiny_model, Scorer(*FOUR))
    answer = chat.ask(best_of=4, n=2, candidates=True).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == [
        "answer 2",
        "answer 3",
    ]
    own = answer["pavlov"]
    assert own["reward"] == 1.0 and own["disagreement"] == 0.2 and own["domain_shift"] is False
    assert [each["text"] for each in own["candidates"]] == [f"answer {n}" for n in range(4)]
    assert own["candidates"][1]["rewards"] == [1.9, 2.1]
    assert own["reward_version"] == "reward-1"
    # A cut-off candidate is scored as one that is not finished.
    assert ("answer 1", False) in chat.scorer.asked and ("answer 0", True) in chat.scorer.asked


def test_a_mean_wins_where_disagreement_costs_nothing(tiny_model):
    chat = Chat(tiny_model, Scorer(*FOUR), disagreement_penalty=0.0)
    answer = chat.ask(best_of=4).json()
    assert answer["choices"][0]["message"]["content"] == "answer 1"


def test_a_streamed_winner_is_sent_after_the_choice(tiny_model):
    chat = Chat(tiny_model, Scorer(*FOUR))
    events = chat.events(best_of=4)
    said = "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
    assert said == "answer 2"
    assert events[-1]["pavlov"]["reward"] == 1.0


def test_a_single_answer_is_scored_only_if_asked(tiny_model):
    chat = Chat(tiny_model, Scorer(*FOUR))
    assert chat.ask().json()["pavlov"]["reward"] is None
    assert chat.scorer.asked == []
    assert chat.ask(score=True).json()["pavlov"]["reward"] == 0.1
    assert chat.events(score=True)[-1]["pavlov"]["reward"] == 0.1


@pytest.mark.parametrize(
    ("response", "said"),
    [("answer", "answer 0"), ("notice", "answer 0\n\nUnsure."), ("decline", "No.")],
)
def test_what_follows_on_domain_shift_is_configured(tiny_model, response, said):
    chat = Chat(
        tiny_model,
        Scorer(verdict(1.0, 0.1, True)),
        domain_shift=response,
        notice_text="Unsure.",
        decline_text="No.",
    )
    whole = chat.ask(score=True).json()
    assert whole["choices"][0]["message"]["content"] == said
    assert whole["pavlov"]["domain_shift"] is True
    events = chat.events(score=True)
    streamed = "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
    assert streamed == said


def test_what_is_declined_is_told_nowhere(tiny_model):
    verdicts = (verdict(1.0, shift=True), verdict(0.5))
    chat = Chat(tiny_model, Scorer(*verdicts), domain_shift="decline", decline_text="No.")
    ask = {"best_of": 2, "candidates": True, "logprobs": True}
    whole = chat.ask(**ask)
    assert [each["text"] for each in whole.json()["pavlov"]["candidates"]] == ["No.", "answer 1"]
    assert whole.json()["choices"][0]["logprobs"] is None
    for text in (whole.text, chat.ask(stream=True, **ask).text):
        assert "No." in text and "answer 0" not in text and '"token"' not in text


def test_the_page_is_open_and_tells_the_browser_to_fetch_nothing_elsewhere(tiny_model):
    chat = Chat(tiny_model, keys=[hashlib.sha256(b"mine").hexdigest()])
    client = chat.client
    page = client.get("/")
    assert page.status_code == 200 and 'id="key"' in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'; ")
    assert client.get("/static/chat.js").status_code == 200
    assert client.get("/static/../chat.py").status_code == 401
    ask = {"texts": ["**a** <b>", "[x](javascript:y)"]}
    assert client.post("/markdown", json=ask).status_code == 401
    client.headers["Authorization"] = "Bearer mine"
    first, second = client.post("/markdown", json=ask).json()["html"]
    assert "<strong>a</strong> &lt;b&gt;" in first and "<a" not in second
    large = client.post("/markdown", json={"texts": ["a" * BODY_LIMIT_BYTES]})
    assert large.status_code == 413


def test_settings_reach_the_engine(tiny_model):
    chat = Chat(tiny_model, system="Be brief.")
    chat.ask(temperature=0.5, top_p=0.9, stop="x", max_tokens=7, seed=-1, n=3)
    prompt_ids, sampling = chat.engine.asked[0]
    assert sampling == Sampling(3, 7, 0.5, 0.9, ("x",), 2**63 - 1, None)
    told = ChatTokenizer(tiny_model).decode(prompt_ids)
    assert "Be brief." in told
    chat.ask(messages=[{"role": "developer", "content": "Mine."}, ASK["messages"][0]])
    assert "Be brief." not in ChatTokenizer(tiny_model).decode(chat.engine.asked[1][0])


def test_logprobs_have_their_form(tiny_model):
    chat = Chat(tiny_model)
    [choice] = chat.ask(logprobs=True, top_logprobs=1).json()["choices"]
    [token] = choice["logprobs"]["content"]
    assert token["token"] == "answer" and token["bytes"] == list(b"answer")
    assert math.isclose(token["logprob"], -0.5) and len(token["top_logprobs"]) == 1
    events = chat.events(logprobs=True)
    told = [c["logprobs"] for e in events for c in e["choices"] if c["logprobs"]]
    assert told[0]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize(
    ("change", "status", "param", "says"),
    [
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": "hello"}, 400, "messages", "list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "system"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": "long " * 3000}]}, 400, "messages", "at most"),
        ({"temperature": 3}, 400, "temperature", "2"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"n": 0}, 400, "n", "1"),
        ({"n": 99}, 400, "n", "more than 8"),
        ({"best_of": 2, "n": 3}, 400, "best_of", "less than n"),
        ({"best_of": 2}, 400, "best_of", "no reward model"),
        ({"score": True}, 400, "score", "no reward model"),
        ({"max_tokens": 10**6}, 400, "max_tokens", "more than 512"),
        ({"model": "gpt-9"}, 404, "model", "no model 'gpt-9'"),
        ({"tools": [{}]}, 400, "tools", "tools is not supported"),
        ({"logit_bias": {"7": 1}}, 400, "logit_bias", "logit_bias is not supported"),
        ({"tool_choice": "auto"}, 400, "tool_choice", "none"),
        ({"parallel_tool_calls": False}, 400, "parallel_tool_calls", "not supported"),
        ({"modalities": ["text", "audio"]}, 400, "modalities", "text"),
        ({"service_tier": "flex"}, 400, "service_tier", "auto"),
        ({"presence_penalty": 1}, 400, "presence_penalty", "0"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "text"),
        ({"stop": ["a"] * 5}, 400, "stop", "4"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "without logprobs"),
        ({"seed": 2**70}, 400, "seed", "less than"),
    ],
)
def test_a_bad_request_is_told_so_in_openais_form(tiny_model, change, status, param, says):
    chat = Chat(tiny_model)
    answer = chat.ask(**change)
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert (error["param"] or "").startswith(param) and says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert chat.engine.asked == []


def test_what_is_no_json_or_too_large_is_refused(tiny_model):
    client = Chat(tiny_model).client
    for content, says in ((b"{", "the body is not JSON"), (b"[1]", "the body is no JSON object")):
        headers = {"content-type": "application/json"}
        answer = client.post("/v1/chat/completions", content=content, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(says)
    large = client.post("/v1/chat/completions", content=b" " * (BODY_LIMIT_BYTES + 1))
    assert large.status_code == 413
    assert client.get("/v1/nothing").json()["error"]["message"] == "Not Found"
    assert client.get("/v1/chat/completions").status_code == 405


def test_a_failing_engine_is_a_503_that_tells_nothing_of_the_inside(tiny_model):
    chat = Chat(tiny_model)
    chat.engine.error = RuntimeError("secret path /a/b")
    answer = chat.ask()
    assert answer.status_code == 503 and "secret" not in answer.text
    assert answer.headers["retry-after"]
    streamed = chat.ask(stream=True).text
    assert "unavailable" in streamed and "secret" not in streamed
    chat.engine.error = None
    assert chat.ask().status_code == 200


def test_keys_are_asked_for_where_there_are_some(tiny_model):
    chat = Chat(tiny_model, keys=[hashlib.sha256(b"mine").hexdigest()])
    assert chat.ask().status_code == 401
    assert chat.ask().json()["error"]["type"] == "authentication_error"
    chat.client.headers["Authorization"] = "Bearer mine"
    assert chat.ask().status_code == 200
    assert chat.client.get("/v1/models").json()["data"][0]["id"] == "pavlov"


def test_rates_are_limited_by_key(tiny_model):
    chat = Chat(tiny_model, requests_per_minute=2)
    assert [chat.ask().status_code for _ in range(3)] == [200, 200, 429]
    assert chat.client.get("/health").status_code == 200


def test_no_place_is_a_429_and_places_are_given_back(tiny_model):
    chat = Chat(tiny_model, at_once=1, waiting=1)

    async def crowd() -> list[int]:
        chat.engine.wait.clear()
        transport = httpx.ASGITransport(app=chat.client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            tasks = [
                asyncio.create_task(client.post("/v1/chat/completions", json=ASK)) for _ in range(4)
            ]
            async with asyncio.timeout(30):
                while sum(task.done() for task in tasks) < 2:
                    await asyncio.sleep(0.01)
            chat.engine.wait.set()
            answers = await asyncio.gather(*tasks)
            assert all("retry-after" in a.headers for a in answers if a.status_code == 429)
            again = await client.post("/v1/chat/completions", json=ASK)
            return [*(a.status_code for a in answers), again.status_code]

    *codes, again = asyncio.run(crowd())
    assert sorted(codes) == [200, 200, 429, 429] and again == 200
    assert "pavlov_chat_refused_total 2.0" in chat.client.get("/metrics").text


def test_too_slow_an_answer_is_given_up_and_its_writing_stopped(tiny_model):
    chat = Chat(tiny_model, timeout_s=0.2)
    chat.engine.wait.clear()
    answer = chat.ask()
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    assert chat.engine.stopped == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"serve": {"best_of": 9}, "reward": "x"}, "best_of_limit"),
        ({"serve": {"best_of": 2}}, "without reward"),
        ({"serve": {"domain_shift": "decline"}}, "without reward"),
        ({"serve": {"host": "0.0.0.0"}}, "without serve.keys"),
        ({"serve": {"engine": {"least": 2}}}, "more than most"),
        ({"engine": {"keep_cache": True}}, "engine.keep_cache = true: "),
        ({"engine": {"keep_cache": True}, "reward": "x"}, "engine.keep_cache = true: "),
        ({"serve": {"reject_after": 9}}, "serve.reject_after = 9 without reward"),
        ({"serve": {"reject_margin": 1.0}}, "serve.reject_margin = 1 without reward"),
        ({"serve": {"patience_s": 1.0}}, "serve.patience_s = 1 without reward"),
        (
            {"serve": {"disagreement_penalty": 0.0}},
            "serve.disagreement_penalty = 0 without reward",
        ),
        ({"serve": {"reject_margin": 1.0}, "reward": "x"}, "with serve.reject_after = 0"),
    ],
)
def test_settings_that_clash_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(ServeConfig, values, "test")


def test_settings_of_the_ensemble_are_taken_beside_one_and_their_defaults_anywhere():
    judged = {"reject_after": 9, "reject_margin": 1.0, "patience_s": 1.0}
    values = {"serve": {**judged, "disagreement_penalty": 0.0}, "reward": "x"}
    assert parse_config(ServeConfig, values, "test").serve.patience_s == 1.0
    for plain in (ServeConfig(), ServeConfig(reward="x")):
        assert parse_config(ServeConfig, plain.model_dump(), "test") == plain


def test_who_leaves_a_stream_gives_up_the_place_at_once(tiny_model):
    chat = Chat(tiny_model)
    body = json.dumps({**ASK, "stream": True}).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.1"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
    }

    async def leave() -> None:
        asked = [{"type": "http.request", "body": body}]
        begun = asyncio.Event()

        async def receive() -> dict[str, Any]:
            return asked.pop() if asked else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                begun.set()
                # Nobody takes what is sent any more.
                await asyncio.Event().wait()

        # As Ray Serve does when a client has left.
        answering = asyncio.create_task(chat.client.app(scope, receive, send))
        await begun.wait()
        answering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answering
        assert "pavlov_chat_requests_inside 0.0" in chat.client.get("/metrics").text

    gc.disable()
    try:
        asyncio.run(leave())
    finally:
        gc.enable()


def test_without_keys_a_page_of_another_site_is_not_let_in(tiny_model):
    chat = Chat(tiny_model)
    for host in ("rebound.example:8000", "127.0.0.1.example", "[bad", "[::2]:80", b"\xff"):
        refused = chat.client.post("/v1/chat/completions", json=ASK, headers={"Host": host})
        assert refused.status_code == 403
        assert chat.client.get("/", headers={"Host": host}).status_code == 403
        assert chat.client.get("/health", headers={"Host": host}).status_code == 200
    for host in ("localhost:8000", "[::1]:8000", "127.0.0.1"):
        headers = {"Host": host}
        assert chat.client.post("/v1/chat/completions", json=ASK, headers=headers).is_success
    keyed = Chat(tiny_model, keys=[hashlib.sha256(b"mine").hexdigest()])
    headers = {"Host": "chat.example", "Authorization": "Bearer mine"}
    assert keyed.client.post("/v1/chat/completions", json=ASK, headers=headers).is_success


@pytest.mark.parametrize("asker", ["203.0.113.9", "10.0.0.7", "::ffff:10.0.0.7", "fe80::1", "me"])
def test_without_keys_only_this_machine_is_let_in_whatever_it_says_to_be_called(tiny_model, asker):
    chat = Chat(tiny_model)
    away = TestClient(chat.client.app, "http://127.0.0.1", client=(asker, 1))
    refused = away.post("/v1/chat/completions", json=ASK)
    assert refused.status_code == 403
    assert "only programs of this machine" in refused.json()["error"]["message"]
    assert away.get("/").status_code == away.get("/v1/models").status_code == 403
    assert away.get("/health").status_code == 200
    keyed = Chat(tiny_model, keys=[hashlib.sha256(b"mine").hexdigest()])
    away = TestClient(keyed.client.app, "http://127.0.0.1", client=(asker, 1))
    headers = {"Authorization": "Bearer mine", "X-Forwarded-For": "203.0.113.9"}
    assert away.post("/v1/chat/completions", json=ASK, headers=headers).is_success


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_without_keys_what_a_proxy_on_this_machine_forwards_is_refused(tiny_model, address):
    chat = Chat(tiny_model)
    here = TestClient(chat.client.app, "http://127.0.0.1", client=(address, 1))
    assert here.post("/v1/chat/completions", json=ASK).is_success
    # A proxy that is trusted has put what it says into the address already.
    for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "X-Forwarded-Host"):
        refused = here.post("/v1/chat/completions", json=ASK, headers={name: "127.0.0.1"})
        assert refused.status_code == 403


def test_below_another_path_the_same_paths_are_open(tiny_model):
    chat = Chat(tiny_model, keys=[hashlib.sha256(b"mine").hexdigest()])
    below = TestClient(chat.client.app, "http://127.0.0.1", root_path="/static")
    assert below.get("/static/").status_code == 200
    assert below.get("/static/static/chat.js").status_code == 200
    assert below.get("/static/health").status_code == 200
    assert below.get("/static/v1/models").status_code == 401


def test_what_is_shown_as_markdown_is_bounded(tiny_model):
    client = Chat(tiny_model).client
    row = "|".join("a" * 100)
    table = f"{row}\n{'|'.join(['-'] * 100)}\n" + "|\n" * 700
    [html] = client.post("/markdown", json={"texts": [table]}).json()["html"]
    assert "<table>" not in html
    [html] = client.post("/markdown", json={"texts": ["a|b\n-|-\n1|2"]}).json()["html"]
    assert "<table>" in html
    assert client.post("/markdown", json={"texts": ["a" * 150_000] * 2}).status_code == 413


def test_candidates_that_not_the_same_members_judged_are_judged_again(tiny_model):
    class Halting(Scorer):
        """Half of its members are away for the first candidate alone."""

        async def judge(self, messages: Sequence[Message], text: str, finished: bool) -> Verdict:
            found = await super().judge(messages, text, finished)
            alone = self.asked.count((text, finished)) == 1 and text == "answer 0"
            return replace(found, reward=9.0, members_missing=1) if alone else found

    chat = Chat(tiny_model, Halting(verdict(0.1), verdict(0.5)))
    answer = chat.ask(best_of=2).json()
    assert answer["choices"][0]["message"]["content"] == "answer 1"
    assert answer["pavlov"]["choices"][0]["members_missing"] == 0
