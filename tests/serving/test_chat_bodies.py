"""What is sent wrong is refused by name, and what is merely odd is taken."""

import asyncio
import hashlib
import json
import threading
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from models.chat import ChatTokenizer
from rlhf.config import ServeConfig, parse_config
from serving.chat import chat_app
from serving.openai_answers import ErrorAnswer
from serving.strict_json import BODY_LIMIT_BYTES
from tests.chat_bodies import BAD, GOOD, GOOD_TURNS, RAW
from tests.conftest import build_tiny_model
from tests.serving.test_chat import ASK, Chat, Engine
from tests.serving.test_chat_contract import KEY, PATH, Fair

JSON = {"content-type": "application/json"}


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
        ("POST", "/v1/models/pavlov", "GET"),
        ("DELETE", "/v1/models/pavlov", "GET"),
        ("GET", "/v1/models/gpt-9", None),
        ("GET", "/v1/models/", None),
        ("GET", "/v1/models/pavlov/", None),
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
