"""Bodies that are JSON and nothing that merely looks like it."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from serving.openai_form import RefusedError

BODY_LIMIT_BYTES = 1 << 20


class StrictRoute(APIRoute):
    """A route whose body, where it has one, is at most `BODY_LIMIT_BYTES` of JSON by the letter:
    UTF-8, finite numbers, no lone surrogates, no name twice in an object, nested some 200 deep."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See `APIRoute`."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_first(request: Request) -> Response:
            strict = _StrictRequest(request.scope, request.receive)
            await strict.json()
            return await handle(strict)

        return read_first


class _StrictRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            # What the length is said to be binds nobody, and a chunked body does not say it.
            read = bytearray()
            try:
                async for chunk in self.stream():
                    read += chunk
                    if len(read) > BODY_LIMIT_BYTES:
                        raise RefusedError(413, f"a request has at most {BODY_LIMIT_BYTES} bytes")
            except ClientDisconnect:
                raise RefusedError(400, "the body ended early") from None
            self._body = bytes(read)
        return self._body

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise RefusedError(400, "the content type must be application/json")
            try:
                from_json(body, allow_inf_nan=False)
                self._json = json.loads(body, object_pairs_hook=_once)
            except ValueError as error:
                raise RefusedError(400, f"the body is not JSON: {error}") from None
        return self._json


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            shown = name[:100]
            raise RefusedError(400, f"{shown!r} stands twice in an object", param=shown)
        members[name] = value
    return members
