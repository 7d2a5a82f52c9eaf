"""The OpenAI chat interface: requests, and errors in its form.

What is not supported is refused by name, not ignored: a client that asks for tools must not take
plain text for an answer to that.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.exceptions import HTTPException

from rlhf.errors import ModelError
from rlhf.records import Message

MAX_STOPS = 4
MAX_LOGPROBS = 20
_log = logging.getLogger(__name__)


class TextPart(BaseModel):
    """Text within a message that is a list of parts."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A turn. ``developer`` is what newer clients call ``system``."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def message(self) -> Message:
        """The turn as the models take it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(BaseModel):
    """What a stream carries beside text."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of /v1/chat/completions.

    Beyond OpenAI's: `best_of` candidates are drawn and the `n` with the highest lower bound by
    the ensemble returned; `score` asks for the ensemble's word where there is nothing to choose;
    `candidates` asks for all of them.
    """

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    # Taken where they ask for what is done anyway.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    response_format: Annotated[dict[str, Any], Field(max_length=1)] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    score: bool | None = None
    candidates: bool | None = None

    @field_validator("stop")
    @classmethod
    def _few(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} texts")
        return value

    @field_validator("response_format")
    @classmethod
    def _text_alone(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value not in (None, {"type": "text"}):
            raise ValueError('only {"type": "text"} is supported')
        return value

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return 0 if value == 0 and not isinstance(value, bool) else value

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
        return JSONResponse(
            {
                "error": {
                    "message": self.message,
                    "type": _TYPES.get(
                        self.status,
                        "server_error" if self.status >= 500 else "invalid_request_error",
                    ),
                    "param": self.param,
                    "code": self.code,
                }
            },
            self.status,
            headers,
        )


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
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "extra_forbidden":
        message = f"{place} is not supported"
    elif first["type"] == "json_invalid":
        message, place = "the body is not JSON", ""
    elif not place:
        message = "the body is no JSON object"
    else:
        message = f"{place}: {first['msg']}"
    return RefusedError(400, message, param=place or None).response()
