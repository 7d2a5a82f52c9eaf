"""The chat server keeps what its OpenAPI document promises, and refuses by name what is wrong."""

import asyncio
import collections
import hashlib
import json
import math
import threading
from typing import Any

import httpx
import pytest
import schemathesis
from pydantic import TypeAdapter
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from actors.chat_engine import Piece, TokenLogprob
from models.chat import ChatTokenizer
from rlhf.config import ServeConfig, parse_config
from serving.chat import chat_app
from serving.openai_answers import ChatChunk, ErrorAnswer
from serving.strict_json import BODY_LIMIT_BYTES
from tests.conftest import build_tiny_model
from tests.serving.test_chat import ASK, Chat, Engine, Scorer, verdict

PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
KEY = "mine"
# What JSON Schema cannot say, and the document says in words.
IN_WORDS = ("less than n", "no reward model", "without logprobs", "valid integer")


class Fair(Scorer):
    """Likes every answer the same."""

    async def judge(self, *asked: object) -> Any:
        return verdict(1.0, 0.1)


@schemathesis.check
def valid_bodies_are_taken(ctx: Any, response: Any, case: Any) -> None:
    if case.meta.generation.mode.is_positive and response.status_code == 400:
        told = response.json()["error"]["message"]
        assert any(words in told for words in IN_WORDS), told


@pytest.mark.parametrize(("keyed", "scored", "examples"), [(True, True, 100), (False, False, 40)])
def test_no_answer_lies_outside_the_document(tiny_model, keyed, scored, examples):
    limits = {"requests_per_minute": 10**9, "max_prompt_tokens": 10**6}
    if keyed:
        limits["keys"] = [hashlib.sha256(KEY.encode()).hexdigest()]
    app = Chat(tiny_model, Fair() if scored else None, **limits).client.app
    headers = {"Host": "127.0.0.1"} | ({"Authorization": f"Bearer {KEY}"} if keyed else {})
    config = SchemathesisConfig.from_dict(
        {
            "seed": 1,
            "headers": headers,
            "generation": {
                "max-examples": examples,
                "deterministic": True,
                "database": "none",
                "no-shrink": True,
            },
            # In its place stands `valid_bodies_are_taken`.
            "checks": {"positive_data_acceptance": {"enabled": False}},
            "phases": {"stateful": {"enabled": False}},
        }
    )
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=config, headers=headers)
    wrong, statuses, forms = [], collections.Counter(), set()
    for event in from_schema(schema).execute():
        assert not isinstance(event, events.NonFatalError | events.FatalError), event
        if not isinstance(event, events.ScenarioFinished):
            continue
        for interaction in event.recorder.interactions.values():
            response = interaction.response
            statuses[event.recorder.label, response.status_code] += 1
            if response.status_code == 200:
                forms |= {(event.recorder.label, *response.headers["content-type"])}
        for checks in event.recorder.checks.values():
            found = [check.failure_info for check in checks if check.failure_info]
            wrong += [f"{each.failure.message}\n{each.code_sample}" for each in found]
    assert not wrong, "\n\n".join(wrong)
    post = f"POST {PATH}"
    # It asked for everything, and was now taken and now refused.
    assert {form for label, form in forms if label == post} == {
        "application/json",
        "text/event-stream; charset=utf-8",
    }
    assert {label for label, _ in forms} == {post, "GET /v1/models", "GET /health", "GET /metrics"}
    assert statuses[post, 200] >= 20 and statuses[post, 400] >= 100
    assert bool(statuses["GET /v1/models", 401]) == keyed


def test_the_document_tells_the_limits_and_the_keys(tiny_model):
    chat = Chat(tiny_model, best_of_limit=3, max_tokens=7, name="assistant")
    document = chat.client.get("/openapi.json").json()
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["n"]["anyOf"][0]["maximum"] == fields["best_of"]["anyOf"][0]["maximum"] == 3
    assert fields["max_tokens"]["anyOf"][0]["maximum"] == 7
    assert fields["model"]["enum"] == ["", "assistant"]
    assert fields["score"]["anyOf"][0]["const"] is False
    assert "securitySchemes" not in document["components"]
    answers = {
        path: {status for each in methods.values() for status in each["responses"]}
        for path, methods in document["paths"].items()
    }
    assert answers[PATH] == {"200", "400", "403", "404", "413", "429", "503", "504"}
    assert all("422" not in statuses for statuses in answers.values())
    keyed = Chat(tiny_model, keys=["0" * 64]).client.app.openapi()
    assert keyed["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in keyed["paths"].items():
        for operation in methods.values():
            assert ("security" in operation) == path.startswith("/v1/")
            assert ("401" in operation["responses"]) == path.startswith("/v1/")


# Bad bodies, by hand. `ASK` is taken, so each is refused for the one thing that it changes.

TEXT = [1, 1.5, True, [], {}, ["pavlov"], {"text": "x"}]
FLAG = ["yes", "true", "", 0, 1, 1.0, [], {}, [True]]
COUNT = ["2", "", True, False, 1.0, 2.5, 0, -1, 10**30, [], {}, [1]]
VALUES: dict[str, list[Any]] = {
    "model": [*TEXT, None],
    "temperature": ["1", "", True, -0.1, 2.1, 3, -(10**400), 10**400, [], {}, [1.0]],
    "top_p": ["0.5", True, 0, 0.0, -1, 1.0001, 2, 10**400, [], {}],
    "n": COUNT,
    "best_of": COUNT,
    "max_tokens": [*COUNT, 513],
    "max_completion_tokens": [*COUNT, 513],
    "stream": FLAG,
    "logprobs": [*FLAG, 5],
    "score": FLAG,
    "candidates": FLAG,
    "top_logprobs": ["2", True, 1.0, 0.5, -1, 21, 10**30, [], {}],
    "stream_options": [True, 1, "include_usage", [], [True]],
    "stop": [1, True, 0.5, {}, ["a"] * 5, "x" * 257],
    "seed": ["7", "", True, 1.0, 0.5, 2**63, -(2**63) - 1, 10**400, [], {}],
    "user": [1, True, [], {}, "x" * 257],
    "presence_penalty": [1, -1, 0.1, "0", False, True, [], {}],
    "frequency_penalty": [1, -1, 0.1, "0", False, True, [], {}],
    "response_format": ["text", 1, True, []],
    "metadata": ["x", 1, True, [], [["a", "b"]]],
    "store": [True, 0, 1, "false", "", [], {}],
    "messages": [None, "hello", 1, True, {}, [], ASK["messages"][0], [ASK["messages"][0]] * 1001],
}
DEEPER: list[tuple[dict[str, Any], str]] = [
    ({"stop": [1]}, "stop.0"),
    ({"stop": ["a", None]}, "stop.1"),
    ({"stop": ["a", ["b"]]}, "stop.1"),
    ({"stop": ["a", "x" * 257]}, "stop.1"),
    ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream_options": {"include_usage": None}}, "stream_options.include_usage"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.type"),
    ({"response_format": {"type": None}}, "response_format.type"),
    ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {"a": None}}, "metadata.a"),
    ({"metadata": {"a": {"b": "c"}}}, "metadata.a"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"top_logprobs": 0}, "top_logprobs"),
    ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
    ({"max_tokens": 513, "max_completion_tokens": 1}, "max_tokens"),
    ({"model": "gpt-9"}, "model"),
    ({"model": "Pavlov"}, "model"),
    ({"model": "pavlov "}, "model"),
    ({"model": "x" * 10**5}, "model"),
    ({"model": "\0"}, "model"),
]
NOT_SUPPORTED = [
    *("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "logit_bias"),
    *(
        "audio",
        "modalities",
        "prediction",
        "reasoning_effort",
        "service_tier",
        "web_search_options",
    ),
    *("prompt", "N", "messages ", "", "body", "pavlov", "__class__", "x" * 200),
]
TURNS: list[tuple[Any, str]] = [
    (None, ""),
    ("hello", ""),
    (1, ""),
    ([], ""),
    ({}, ".role"),
    ({"role": "user"}, ".content"),
    ({"content": "x"}, ".role"),
    ({"role": "robot", "content": "x"}, ".role"),
    ({"role": "User", "content": "x"}, ".role"),
    ({"role": "tool", "content": "x"}, ".role"),
    ({"role": "function", "content": "x"}, ".role"),
    ({"role": None, "content": "x"}, ".role"),
    ({"role": 1, "content": "x"}, ".role"),
    ({"role": ["user"], "content": "x"}, ".role"),
    ({"role": "user", "content": None}, ".content"),
    ({"role": "assistant", "content": None}, ".content"),
    ({"role": "user", "content": 1}, ".content"),
    ({"role": "user", "content": True}, ".content"),
    ({"role": "user", "content": {}}, ".content"),
    ({"role": "user", "content": {"type": "text", "text": "x"}}, ".content"),
    ({"role": "user", "content": ["x"]}, ".content.0"),
    ({"role": "user", "content": [None]}, ".content.0"),
    ({"role": "user", "content": [[]]}, ".content.0"),
    ({"role": "user", "content": [{}]}, ".content.0.type"),
    ({"role": "user", "content": [{"type": "text"}]}, ".content.0.text"),
    ({"role": "user", "content": [{"text": "x"}]}, ".content.0.type"),
    ({"role": "user", "content": [{"type": "text", "text": 1}]}, ".content.0.text"),
    ({"role": "user", "content": [{"type": "text", "text": None}]}, ".content.0.text"),
    ({"role": "user", "content": [{"type": "image_url", "text": "x"}]}, ".content.0.type"),
    ({"role": "user", "content": [{"type": "text", "text": "x", "a": 1}]}, ".content.0.a"),
    (
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_audio"}]},
        ".content.1.type",
    ),
]
LONG = [
    [{"role": "user", "content": "long " * 3000}],
    [{"role": "user", "content": "a" * 10**6}],
    [{"role": "user", "content": "\0" * 5000}],
    [{"role": "user", "content": "\N{GRINNING FACE}" * 5000}],
    [{"role": "user", "content": [{"type": "text", "text": "long " * 1000}] * 3}],
    [{"role": "assistant", "content": "long"}] * 1000,
]
TURN = b'{"role":"user","content":"x"}'
# The whole body as it is sent, and what the refusal says of it.
RAW: dict[bytes, str] = {
    b"": "not JSON",
    b" ": "not JSON",
    b"\0": "not JSON",
    b"{": "not JSON",
    b"}": "not JSON",
    b"{}{}": "not JSON",
    b"nothing": "not JSON",
    b"None": "not JSON",
    b"NaN": "not JSON",
    b"Infinity": "not JSON",
    b"{'messages':[]}": "not JSON",
    b'{messages:["x"]}': "not JSON",
    b'{"messages":[' + TURN + b",]}": "not JSON",
    b'{"messages":[' + TURN + b"],}": "not JSON",
    b'{"messages":[' + TURN + b"]": "not JSON",
    b'{"messages":[' + TURN + b"]} x": "not JSON",
    b'{"messages":[' + TURN + b"]}\0": "not JSON",
    b'{"messages":[' + TURN + b"]/**/}": "not JSON",
    b'\xef\xbb\xbf{"messages":[' + TURN + b"]}": "not JSON",
    b'{"messages":[{"role":"user","content":"\xff"}]}': "not JSON",
    b'{"messages":[{"role":"user","content":"\xc3"}]}': "not JSON",
    b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}': "not JSON",
    b'{"messages":[{"role":"user","content":"\xc0\x80"}]}': "not JSON",
    json.dumps(ASK).encode("utf-16"): "not JSON",
    json.dumps(ASK).encode("utf-16-le"): "not JSON",
    json.dumps(ASK).encode("utf-32"): "not JSON",
    b'{"messages":[{"role":"user","content":"\\ud800"}]}': "hex escape",
    b'{"messages":[{"role":"user","content":"\\udc00"}]}': "not JSON",
    b'{"messages":[{"role":"user","content":"\\ud800\\ud800"}]}': "not JSON",
    b'{"messages":[' + TURN + b'],"stop":"\\udfff"}': "not JSON",
    b'{"messages":[' + TURN + b'],"user":"\\udfff"}': "not JSON",
    b'{"messages":[' + TURN + b'],"model":"\\ud83d"}': "not JSON",
    b'{"messages":[' + TURN + b'],"\\ud800":1}': "not JSON",
    b'{"messages":[' + TURN + b'],"metadata":{"\\ud800":"x"}}': "not JSON",
    b'{"messages":[{"role":"user","content":"\\x"}]}': "not JSON",
    b'{"messages":[{"role":"user","content":"\\u12"}]}': "not JSON",
    b'{"messages":[{"role":"user","content":"\n"}]}': "not JSON",
    b'{"messages":[{"role":"user","content":"\0"}]}': "not JSON",
    b'{"messages":[' + TURN + b'],"temperature":NaN}': "not JSON",
    b'{"messages":[' + TURN + b'],"temperature":Infinity}': "not JSON",
    b'{"messages":[' + TURN + b'],"temperature":-Infinity}': "not JSON",
    b'{"messages":[' + TURN + b'],"temperature":1e999}': "temperature",
    b'{"messages":[' + TURN + b'],"temperature":.5}': "not JSON",
    b'{"messages":[' + TURN + b'],"temperature":1.}': "not JSON",
    b'{"messages":[' + TURN + b'],"n":01}': "not JSON",
    b'{"messages":[' + TURN + b'],"n":+1}': "not JSON",
    b'{"messages":[' + TURN + b'],"n":0x1}': "not JSON",
    b'{"messages":[' + TURN + b'],"n":1e0}': "n: ",
    b'{"messages":[' + TURN + b'],"seed":' + b"9" * 5000 + b"}": "not JSON",
    b'{"messages":[' + TURN + b'],"stream":True}': "not JSON",
    b'{"messages":[' + TURN + b'],"n":1,"n":2}': "'n' stands twice",
    b'{"messages":[' + TURN + b'],"n":1,"\\u006e":1}': "'n' stands twice",
    b'{"messages":[' + TURN + b'],"messages":[' + TURN + b"]}": "'messages' stands twice",
    b'{"messages":[{"role":"user","role":"user","content":"x"}]}': "'role' stands twice",
    b'{"messages":' + b"[" * 10**5: "not JSON",
    b'{"messages":' + b"[" * 10**5 + b"]" * 10**5 + b"}": "not JSON",
    b'{"metadata":' + b'{"a":' * 10**5: "not JSON",
    b'{"messages":' + b"[" * 150 + b"]" * 150 + b"}": "messages.0",
    b"null": "no JSON object",
    b"true": "no JSON object",
    b"0": "no JSON object",
    b'"messages"': "no JSON object",
    b"[]": "no JSON object",
    b"[" + json.dumps(ASK).encode() + b"]": "no JSON object",
    b"{}": "messages",
    b'{"model":"pavlov"}': "messages",
}


def _named(change: dict[str, Any], param: str) -> Any:
    return pytest.param({**ASK, **change}, param, id=f"{param[:30]}={str(change)[:40]!r}")


BAD = [
    *(_named({field: value}, field) for field, values in VALUES.items() for value in values),
    *(_named(change, param) for change, param in DEEPER),
    *(_named({field: 1}, field[:100]) for field in NOT_SUPPORTED),
    *(_named({"messages": [turn]}, f"messages.0{place}") for turn, place in TURNS),
    *(
        _named({"messages": [*ASK["messages"], turn]}, f"messages.1{place}")
        for turn, place in TURNS[:8]
    ),
    *(_named({"messages": turns}, "messages") for turns in LONG),
]


@pytest.fixture(scope="module")
def chat(tiny_model):
    made = Chat(tiny_model, Fair(), requests_per_minute=10**9, max_prompt_tokens=100)
    with made.client:  # one event loop for all requests
        yield made


def refused(answer: httpx.Response) -> dict[str, Any]:
    """The fault, after a look at its form."""
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "application/json"
    fault = TypeAdapter(ErrorAnswer).validate_json(answer.content, strict=True)["error"]
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    assert fault["type"] == kinds.get(answer.status_code, "invalid_request_error")
    assert 0 < len(fault["message"]) < 400
    return fault


@pytest.mark.parametrize(("body", "param"), BAD)
def test_a_bad_body_is_refused_and_the_field_named(chat, body, param):
    chat.engine.asked.clear()
    fault = refused(chat.client.post(PATH, content=json.dumps(body), headers=JSON))
    assert (fault["param"] or "") == param, fault
    assert chat.engine.asked == []


@pytest.mark.parametrize(
    ("body", "says"), RAW.items(), ids=[str(body[:80]) + f"-{len(body)}" for body in RAW]
)
def test_what_is_no_json_by_the_letter_is_refused(chat, body, says):
    chat.engine.asked.clear()
    answer = chat.client.post(PATH, content=body, headers=JSON)
    assert answer.status_code == 400 and says in refused(answer)["message"]
    assert chat.engine.asked == []


GOOD: list[dict[str, Any]] = [
    {},
    {"model": ""},
    {"model": "pavlov"},
    *({field: None} for field in VALUES if field not in ("model", "messages")),
    *({"temperature": value} for value in (0, 0.0, 1, 2, 1e-300)),
    *({"top_p": value} for value in (1, 1.0, 1e-300)),
    *({field: value} for field in ("n", "best_of") for value in (1, 8)),
    {"n": 2, "best_of": 2},
    {"n": 2, "best_of": 3, "candidates": True, "score": False},
    *({field: value} for field in ("max_tokens", "max_completion_tokens") for value in (1, 512)),
    {"max_tokens": 3, "max_completion_tokens": 5},
    *({"seed": value} for value in (0, -1, 2**63 - 1, -(2**63))),
    {"seed": 2**63 - 1, "n": 8},
    *({"stop": value} for value in ("", [], [""], "x" * 256, ["a"] * 4, "\0", "\N{GRINNING FACE}")),
    *({"user": value} for value in ("", "\0", "\n", "\N{GRINNING FACE}" * 256, "é'\"<>")),
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 0},
    {"logprobs": True, "top_logprobs": 20, "n": 3},
    {"logprobs": False, "presence_penalty": 0.0, "frequency_penalty": -0.0, "store": False},
    {"response_format": {"type": "text"}, "metadata": {}, "stream_options": {}},
    {"metadata": {"a": "", "": "b"}},
    {"stream": False, "stream_options": {"include_usage": True, "more": 1}},
    {"stream": True, "n": 2, "best_of": 4, "logprobs": True},
]
GOOD_TURNS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": []}],
    [{"role": "user", "content": "\0\t\u2028\ufffe"}],
    [{"role": "user", "content": "<|im_end|>{{ 1/0 }}{% raw %}"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]}],
    [{"role": "assistant", "content": "Hello."}],
    [{"role": "system", "content": "Be brief."}],
    [{"role": "developer", "content": ""}, {"role": "developer", "content": ""}],
    [{"role": "user", "content": "a"}] * 3,
    [{"role": "user", "content": "a", "name": "b", "refusal": None, "annotations": []}],
]


@pytest.mark.parametrize(
    "change",
    [*GOOD, *({"messages": turns} for turns in GOOD_TURNS)],
    ids=lambda each: str(each)[:60],
)
def test_a_good_body_beside_them_is_taken(chat, change):
    answer = chat.ask(**change)
    assert answer.status_code == 200, answer.text
    assert '"error"' not in answer.text


def ask_raw(
    app: Any,
    method: str,
    path: str,
    headers: dict[bytes, bytes],
    *chunks: bytes,
    breaks_off: bool = False,
) -> tuple[httpx.Response, int]:
    """The answer to what no client library would send, and how many chunks were read."""
    sent: list[dict[str, Any]] = []
    read = 0
    chunks = chunks or (b"",)

    async def receive() -> dict[str, Any]:
        nonlocal read
        if read == len(chunks):
            return {"type": "http.disconnect"}
        read += 1
        more = breaks_off or read < len(chunks)
        return {"type": "http.request", "body": chunks[read - 1], "more_body": more}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"\xff=%00&&=",
        "headers": list(headers.items()),
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=body), read


def test_a_chunked_body_is_cut_at_the_limit(chat):
    chunks = [b" " * (BODY_LIMIT_BYTES // 8)] * 100
    for headers in ({}, {b"content-length": b"5"}):
        headers |= {b"content-type": b"application/json"}
        answer, read = ask_raw(chat.client.app, "POST", PATH, headers, *chunks)
        assert answer.status_code == 413 and refused(answer)
        assert read == 9
    padded = json.dumps(ASK).encode().ljust(BODY_LIMIT_BYTES)
    assert chat.client.post(PATH, content=padded, headers=JSON).status_code == 200
    assert chat.client.post(PATH, content=padded + b" ", headers=JSON).status_code == 413


@pytest.mark.parametrize(
    "kind",
    [
        None,
        b"",
        b"text/plain",
        b"text/json",
        b"application/jsonl",
        b"application/x-www-form-urlencoded",
        b"multipart/form-data; boundary=x",
        b"application/octet-stream",
        b"application",
        b"json",
        b"\xff\xfe",
        "application/json\N{LATIN SMALL LETTER E WITH ACUTE}".encode(),
    ],
)
def test_another_content_type_is_refused(chat, kind):
    headers = {} if kind is None else {b"content-type": kind}
    answer, _ = ask_raw(chat.client.app, "POST", PATH, headers, json.dumps(ASK).encode())
    assert answer.status_code == 400 and "application/json" in refused(answer)["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {b"content-type": b"Application/JSON; charset=utf-8"},
        {b"content-type": b"application/json;\xff"},
        {b"content-type": b"application/json", b"authorization": b"\xff\xfe"},
        {b"content-type": b"application/json", b"content-length": b"\xb2"},
        {b"content-type": b"application/json", b"content-length": b"9" * 5000},
        {b"content-type": b"application/json", b"content-length": b"-1"},
        {b"content-type": b"application/json", b"cookie": b"\xff=\0"},
    ],
)
def test_odd_headers_harm_nobody(chat, headers):
    answer, _ = ask_raw(chat.client.app, "POST", PATH, headers, json.dumps(ASK).encode())
    assert answer.status_code == 200, answer.text


def test_a_key_that_is_not_ascii_is_no_key(tiny_model):
    app = Chat(tiny_model, keys=[hashlib.sha256(KEY.encode()).hexdigest()]).client.app
    for key in (
        b"",
        b"\xff",
        b"Bearer",
        b"Bearer \xff\xfe",
        b"Basic mine",
        b"mine",
        b"Bearer mine2",
    ):
        answer, _ = ask_raw(app, "GET", "/v1/models", {b"authorization": key})
        assert answer.status_code == 401 and refused(answer)["code"] == "invalid_api_key"
    assert ask_raw(app, "GET", "/v1/models", {b"authorization": b"bearer  mine"})[0].is_success


def test_a_body_that_breaks_off_is_refused(chat):
    headers = {b"content-type": b"application/json"}
    answer, _ = ask_raw(chat.client.app, "POST", PATH, headers, b'{"messages":', breaks_off=True)
    assert answer.status_code == 400 and "ended early" in refused(answer)["message"]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", PATH, "POST"),
        ("HEAD", PATH, "POST"),
        ("OPTIONS", PATH, "POST"),
        ("PUT", PATH, "POST"),
        ("BREW", PATH, "POST"),
        ("post", PATH, "POST"),
        ("POST", "/v1/models", "GET"),
        ("HEAD", "/v1/models", "GET"),
        ("DELETE", "/v1/models", "GET"),
        ("TRACE", "/health", "GET"),
        ("OPTIONS", "/health", "GET"),
        ("PATCH", "/metrics", "GET"),
        ("GET", "/v1", None),
        ("GET", "/v1/models/pavlov", None),
        ("POST", f"{PATH}/", None),
        ("POST", f"/{PATH}", None),
        ("POST", "/v1/completions", None),
        ("OPTIONS", "/nothing", None),
        ("GET", "/v1/models\0", None),
        ("GET", "/../etc/passwd", None),
        ("GET", "/%ff", None),
    ],
)
def test_another_method_or_path_is_told_so(chat, method, path, allow):
    answer, _ = ask_raw(chat.client.app, method, path, {})
    assert answer.status_code == (405 if allow else 404) and refused(answer)
    assert answer.headers.get("allow") == allow


def test_a_conversation_that_the_template_refuses_is_a_bad_request(tmp_path):
    template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "{% if messages|length > 1 %}{{ messages[0].content + 1 }}{% endif %}"
        "{{ messages[0].content }}"
    )
    chat = Chat(build_tiny_model(tmp_path / "model", chat_template=template))
    assert chat.ask().status_code == 200
    for turns in (
        [{"role": "assistant", "content": "Hello."}],
        [{"role": "system", "content": "Be brief."}],
        ASK["messages"] * 2,
    ):
        answer = chat.ask(messages=turns)
        assert answer.status_code == 400 and refused(answer)["param"] == "messages"
        assert chat.ask(messages=turns, stream=True).status_code == 400


def test_a_long_conversation_holds_up_nobody(tiny_model):
    read = threading.Event()

    class Slow(ChatTokenizer):
        def prompt_ids(self, messages: Any) -> tuple[int, ...]:
            assert read.wait(20)
            return super().prompt_ids(messages)

    config = parse_config(ServeConfig, {}, "test")
    app = chat_app(config, Slow(tiny_model), Engine(), None)

    async def both() -> tuple[int, int]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            long = asyncio.create_task(client.post(PATH, json=ASK))
            await asyncio.sleep(0.2)
            other = await asyncio.wait_for(client.get("/v1/models"), 10)
            assert not long.done()
            read.set()
            return (await long).status_code, other.status_code

    assert asyncio.run(both()) == (200, 200)


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("x"), 503), (TimeoutError(), 504)])
def test_failures_have_the_documents_form(tiny_model, error, status):
    chat = Chat(tiny_model)
    chat.engine.error = error
    answer = chat.ask()
    assert answer.status_code == status
    assert TypeAdapter(ErrorAnswer).validate_json(answer.content, strict=True)
    assert answer.headers.get("retry-after", "").isdigit() == (status == 503)
    *chunks, last = chat.ask(stream=True).text.strip().split("\n\n")
    for chunk in chunks:
        TypeAdapter(ChatChunk).validate_json(chunk.removeprefix("data: "), strict=True)
    TypeAdapter(ErrorAnswer).validate_json(last.removeprefix("data: "), strict=True)


def test_an_impossible_token_has_a_number_that_json_knows(tiny_model):
    chat = Chat(tiny_model)

    async def write(*asked: object) -> Any:
        told = (TokenLogprob("answer", -math.inf),)
        yield Piece(0, "answer", 1, "weights-1", "stop", told, (told,))

    chat.engine.write = write
    [choice] = chat.ask(logprobs=True).json()["choices"]
    assert choice["logprobs"]["content"][0]["logprob"] == -9999.0
    streamed = [c["logprobs"] for e in chat.events(logprobs=True) for c in e["choices"]]
    assert {"-9999.0"} == {str(told["content"][0]["logprob"]) for told in streamed if told}
