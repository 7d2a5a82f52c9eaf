"""What the pages of both servers share: templates, static files, and what browsers are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.safe_markdown import safe_markdown

STATIC = "/static/"
_HERE = Path(__file__).parent
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}
_TEMPLATES = Environment(
    loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined
)
_TEMPLATES.filters["markdown"] = safe_markdown


def add_pages(app: FastAPI) -> None:
    """Serve static files, and have every answer carry what the browser needs to know."""
    app.mount(STATIC.rstrip("/"), StaticFiles(directory=_HERE / "static"))
    app.add_middleware(_Protected)


def page(
    request: Request,
    template: str,
    *,
    status: int = 200,
    headers: dict[str, str] | None = None,
    **values: Any,
) -> HTMLResponse:
    """A page; its template knows `base`, the path that the application stands below."""
    base = f"{request.scope.get('root_path', '').rstrip('/')}/"
    html = _TEMPLATES.get_template(template).render({"base": base} | values)
    return HTMLResponse(html, status, headers)


def path_of(scope: Scope) -> str:
    """A request's path below that of the application."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


class _Protected:
    """Adds the headers; bodies and disconnects pass through untouched."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A new version's page must not meet the scripts of an old one.
        caching = "no-cache" if path_of(scope).startswith(STATIC) else "no-store"

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in (*_HEADERS.items(), ("Cache-Control", caching)):
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, protected)
