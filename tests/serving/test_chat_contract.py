"""The chat server keeps what its OpenAPI document promises."""

import collections
import hashlib
import math
from typing import Any

import pytest
import schemathesis
from pydantic import TypeAdapter
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from actors.chat_engine import Piece, TokenLogprob
from serving.openai_answers import ChatChunk, ErrorAnswer
from tests.serving.test_chat import Chat, Scorer, verdict

PATH = "/v1/chat/completions"
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


def here(app: Any) -> Any:
    """Asked by this machine: Schemathesis has no address."""

    async def asked(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "client": ("127.0.0.1", 1)}, receive, send)

    return asked


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
    schema = schemathesis.openapi.from_asgi(
        "/openapi.json", here(app), config=config, headers=headers
    )
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
    assert {label for label, _ in forms} == {
        post,
        "GET /v1/models",
        "GET /v1/models/{model}",
        "GET /health",
        "GET /metrics",
    }
    assert statuses[post, 200] >= 20 and statuses[post, 400] >= 100
    assert bool(statuses["GET /v1/models", 401]) == keyed


def test_the_document_tells_the_limits_and_the_keys(tiny_model):
    chat = Chat(tiny_model, best_of_limit=3, max_tokens=7, name="assistant")
    document = chat.client.get("/openapi.json").json()
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["n"]["anyOf"][0]["maximum"] == fields["best_of"]["anyOf"][0]["maximum"] == 3
    assert fields["max_tokens"]["anyOf"][0]["maximum"] == 7
    assert fields["model"]["enum"] == ["", "assistant"]
    [model] = document["paths"]["/v1/models/{model}"]["get"]["parameters"]
    assert model["schema"]["enum"] == ["assistant"]
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
