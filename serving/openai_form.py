"""The OpenAI chat interface: requests, and errors in its form.

What is not supported is refused by name, not ignored: a client that asks for tools must not take
plain text for an answer to that. What asks for nothing (`"tools": []`, whatever is null) is taken:
clients fill in their defaults.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from rlhf.errors import ModelError
from rlhf.records import Message
from serving.openai_answers import ErrorAnswer

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
SEEDS = 2**63
"""Seeds lie below it, and not below its negative."""
_MAX_SHOWN = 100
_log = logging.getLogger(__name__)


def _one_or_many(value: object) -> str | None:
    return "(text)" if isinstance(value, str) else "(list)" if isinstance(value, list) else None


def _off(value: bool) -> bool:
    if value:
        raise ValueError("only false is supported")
    return value


def _empty(value: Any) -> Any:
    if value:
        raise PydanticCustomError("not_empty", "only an empty one is supported")
    return value


_Text = Annotated[str, Tag("(text)")]
# Without it the error of a list would be that it is no string.
_OneOrMany = Discriminator(
    _one_or_many, custom_error_type="one_or_many", custom_error_message="a text or a list"
)
_Zero = Annotated[float, Field(ge=0, le=0)]
# Literal[False] takes 0 as well.
_False = Annotated[bool, AfterValidator(_off), WithJsonSchema({"type": "boolean", "const": False})]
_NoItems = Annotated[
    list[Any], AfterValidator(_empty), WithJsonSchema({"type": "array", "maxItems": 0})
]
_NoMembers = Annotated[
    dict[str, Any], AfterValidator(_empty), WithJsonSchema({"type": "object", "maxProperties": 0})
]


class _Known(BaseModel):
    """What has the members that are named here, and others only as null."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, None] = Field(init=False)


class TextPart(_Known):
    """Text within a message that is a list of parts."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A turn. ``developer`` is what newer clients call ``system``."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[_Text | Annotated[list[TextPart], Tag("(list)")], _OneOrMany]

    def message(self) -> Message:
        """The turn as the models take it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(BaseModel):
    """What a stream carries beside text."""

    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False


class ResponseFormat(_Known):
    """The one form an answer has."""

    type: Literal["text"]


class ChatRequest(_Known):
    """The body of /v1/chat/completions.

    Beyond OpenAI's: `best_of` candidates are drawn and the `n` with the highest lower bound by
    the ensemble returned; `score` asks for the ensemble's word where there is nothing to choose;
    `candidates` asks for all of them.
    """

    model: str = ""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: (
        Annotated[
            Annotated[_Text, Field(max_length=MAX_STOP_CHARS)]
            | Annotated[
                list[Annotated[str, Field(max_length=MAX_STOP_CHARS)]],
                Field(max_length=MAX_STOPS),
                Tag("(list)"),
            ],
            _OneOrMany,
        ]
        | None
    ) = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    logprobs: Annotated[bool | None, Field(examples=[True])] = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    # Taken where they ask for what is done anyway.
    presence_penalty: _Zero | None = None
    frequency_penalty: _Zero | None = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, str] | None = None
    store: _False | None = None
    tools: _NoItems | None = None
    tool_choice: Literal["none"] | None = None
    functions: _NoItems | None = None
    function_call: Literal["none"] | None = None
    logit_bias: _NoMembers | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    score: bool | None = None
    candidates: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)

    def conversation(self, system: str | None) -> tuple[Message, ...]:
        """The turns, with the system turn where they have none."""
        turns = tuple(message.message() for message in self.messages)
        if system is not None and turns[0].role != "system":
            turns = (Message("system", system), *turns)
        return turns


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """The error in OpenAI's form."""
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        answer: ErrorAnswer = {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, other),
                "param": self.param,
                "code": self.code,
            }
        }
        return JSONResponse(answer, self.status, headers)


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def install_errors(app: FastAPI) -> None:
    """Whatever goes wrong in a request is answered in OpenAI's form."""
    app.exception_handler(RefusedError)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_other)
    app.exception_handler(Exception)(_failed)


def as_refused(error: BaseException) -> RefusedError:
    """What a client is told of a failure: never more than its kind."""
    if isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, TimeoutError):
        return RefusedError(504, "no answer within the time there is", code="timeout")
    if isinstance(error, ModelError):
        return RefusedError(400, str(error), param="messages")
    _log.error("a request failed", exc_info=error)
    return RefusedError(503, "the assistant is away for a moment; ask again", code="unavailable")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return error.response()


async def _failed(request: Request, error: Exception) -> Response:
    refused = as_refused(error)
    return refused.response({"Retry-After": "2"} if refused.status == 503 else None)


async def _other(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return RefusedError(error.status_code, str(error.detail)).response(
        dict(error.headers) if error.headers else None
    )


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    parts = (str(part) for part in first["loc"][1:])
    place = ".".join(part for part in parts if part not in ("(text)", "(list)"))[:_MAX_SHOWN]
    if first["type"] in ("extra_forbidden", "none_required", "not_empty"):
        message = f"{place} is not supported"
    elif not place:
        message = "the body is no JSON object"
    else:
        message = f"{place}: {first['msg']}"
    return RefusedError(400, message, param=place or None).response()
