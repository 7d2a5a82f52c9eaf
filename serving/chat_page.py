"""The page of `pavlov serve`: a chat in the browser.

| path      | does                                                |
|-----------|-----------------------------------------------------|
| /         | the page; it asks /v1/chat/completions as all do    |
| /static/… | its scripts and styles                              |
| /markdown | what a model wrote, as HTML in which nothing runs   |

The first two need no API key: the page is where one is typed.
"""

from __future__ import annotations

from typing import Annotated

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field

from labelling.feedback import CONSENT
from rlhf.config.serve import ServeSection
from serving.openai_form import RefusedError
from serving.pages import STATIC, add_pages, page
from serving.safe_markdown import LIMIT, safe_markdown


class Texts(BaseModel):
    """The body of /markdown."""

    model_config = ConfigDict(extra="forbid", strict=True)
    texts: Annotated[list[str], Field(max_length=256)]


def is_open(path: str) -> bool:
    """Whether a path is the page itself, which everybody may read."""
    return path == "/" or path.startswith(STATIC)


def add_chat_page(app: FastAPI, settings: ServeSection, scored: bool) -> None:
    """Add the page's routes; `scored` where an ensemble chooses."""
    add_pages(app)

    @app.get("/", include_in_schema=False)
    def home(request: Request) -> HTMLResponse:
        return page(request, "chat.html", serve=settings, scored=scored, consent=CONSENT)

    one_at_once = CapacityLimiter(1)

    @app.post("/markdown", include_in_schema=False)
    async def markdown(body: Texts) -> dict[str, list[str]]:
        if sum(map(len, body.texts)) > LIMIT:
            raise RefusedError(413, f"at most {LIMIT} characters are rendered", param="texts")
        html: list[str] = [
            await run_sync(safe_markdown, text, limiter=one_at_once, abandon_on_cancel=True)
            for text in body.texts
        ]
        return {"html": html}
