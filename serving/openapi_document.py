"""The OpenAPI document of the chat interface: what is accepted here, with this configuration."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from rlhf.config.serve import ServeSection
from serving.openai_answers import ChatChunk, ErrorAnswer
from serving.openai_form import SEEDS

_REF = "#/components/schemas/{model}"
_MEANS = {
    400: "The request is not as it must be",
    401: "No such API key",
    403: "Not taken from who asks",
    404: "No such model",
    409: "It contradicts what stays",
    413: "The body is too large",
    429: "Too many requests, or no room",
    503: "The assistant is away for a moment",
    504: "No answer within the time there is",
}
_ABOUT = (
    "OpenAI's chat interface. An unknown path is answered with 404, another method of a known path "
    "with 405 and `Allow`, both as `ErrorAnswer`."
)
_RULES = (
    "\n\nNot told by the types: an integer is written without a fraction; `best_of` is at least "
    "`n`, and without a reward model equal to it; `top_logprobs` needs `logprobs`; the "
    "conversation has a limit in tokens, and the chat template must take it."
)
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {
            "anyOf": [
                {"const": "[DONE]"},
                {
                    "type": "string",
                    "contentMediaType": "application/json",
                    "contentSchema": {
                        "anyOf": [
                            {"$ref": _REF.format(model="ChatChunk")},
                            {"$ref": _REF.format(model="ErrorAnswer")},
                        ]
                    },
                },
            ]
        }
    },
}
STREAM = {"content": {"text/event-stream": {"itemSchema": _EVENT}}}
"""The streamed form of an answer, for a route's `responses`."""


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route answers when it does not, for its `responses`."""
    return {status: {"model": ErrorAnswer, **_error(status)} for status in statuses}


def _error(status: int) -> dict[str, Any]:
    error: dict[str, Any] = {"description": _MEANS[status]}
    if status in (429, 503):
        wait = {"description": "Seconds to wait", "required": True, "schema": {"type": "integer"}}
        error["headers"] = {"Retry-After": wait}
    return error


def document(app: FastAPI, settings: ServeSection, scored: bool) -> dict[str, Any]:
    """The document, made once.

    Args:
        scored: whether there is a reward model.
    """
    if app.openapi_schema is None:
        made = get_openapi(title="Pavlov", version="1", description=_ABOUT, routes=app.routes)
        schemas = made["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        _add(schemas, ChatChunk)
        _add(schemas, ErrorAnswer)
        _narrow(schemas["ChatRequest"], settings, scored)
        [model] = made["paths"]["/v1/models/{model}"]["get"]["parameters"]
        model["schema"]["enum"] = [settings.name]
        for path, methods in made["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if path.startswith("/v1/"):
                    _guarded(operation, bool(settings.keys))
        if settings.keys:
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = made
    return app.openapi_schema


def _add(schemas: dict[str, Any], answer: Any) -> None:
    schema = TypeAdapter(answer).json_schema(ref_template=_REF, mode="serialization")
    schemas.update(schema.pop("$defs", {}))
    schemas[answer.__name__] = schema


def _guarded(operation: dict[str, Any], keys: bool) -> None:
    """Add what is answered before a request is looked at."""
    schema = {"$ref": _REF.format(model="ErrorAnswer")}
    for status in (401, 429) if keys else (403, 429):
        content = {"application/json": {"schema": schema}}
        operation["responses"][str(status)] = {**_error(status), "content": content}
    if keys:
        operation["security"] = [{"key": []}]


def _narrow(request: dict[str, Any], settings: ServeSection, scored: bool) -> None:
    """Write in the limits that a configuration sets."""
    request["description"] += _RULES
    fields = request["properties"]
    fields["model"]["enum"] = ["", settings.name]
    for name in ("n", "best_of"):
        fields[name]["anyOf"][0]["maximum"] = settings.best_of_limit
    for name in ("max_tokens", "max_completion_tokens"):
        fields[name]["anyOf"][0]["maximum"] = settings.max_tokens
    # Written as a float by FastAPI, which is rounded upwards.
    fields["seed"]["anyOf"][0] |= {"minimum": -SEEDS, "exclusiveMaximum": SEEDS}
    if not scored:
        fields["score"]["anyOf"][0]["const"] = False
