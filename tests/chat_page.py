"""The chat page in a browser, before a server whose engine and ensemble do as they are told."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from actors.chat_engine import Piece, Sampling
from models.chat import ChatTokenizer
from rlhf.config import ServeConfig, parse_config
from rlhf.config.serve import ServeSection
from rlhf.records import Message
from serving.chat import chat_app
from serving.ensemble import Verdict
from serving.feedback import Feedback, FeedbackRequest
from serving.openai_answers import FeedbackAnswer
from tests.browser import new_page


class Engine:
    """Candidate i writes the i-th text in pieces; with `go` cleared it waits after the first."""

    def __init__(self, *texts: str, piece: int = 7, ended: str = "stop") -> None:
        self.texts, self.piece, self.ended = texts, piece, ended
        self.asked: list[Sampling] = []
        self.read: list[tuple[int, ...]] = []
        self.left = 0
        self.go = threading.Event()
        self.go.set()

    async def write(
        self, prompt_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Piece, None]:
        self.asked.append(sampling)
        self.read.append(tuple(prompt_ids))
        whole = False
        try:
            for at in range(sampling.candidates):
                text = self.texts[at]
                for cut in range(0, len(text), self.piece):
                    yield Piece(at, text[cut : cut + self.piece], 1, "3f9a52c07be1", None)
                    while not self.go.is_set():
                        await asyncio.sleep(0.01)
                yield Piece(at, "", 0, "3f9a52c07be1", self.ended)
            whole = True
        finally:
            self.left += not whole

    async def version(self) -> str:
        return "3f9a52c07be1"


class Scorer:
    """Says of each text what it was told to."""

    def __init__(self, verdicts: dict[str, Verdict]) -> None:
        self.verdicts = verdicts

    async def judge(self, messages: Sequence[Message], text: str, finished: bool) -> Verdict:
        return self.verdicts[text]

    async def version(self) -> str:
        return "reward-1"


class Noted(Feedback):
    """Notes what it is given."""

    def __init__(self, settings: ServeSection, key: bytes) -> None:
        super().__init__(settings, key)
        self.given: list[dict[str, Any]] = []

    def take(self, body: FeedbackRequest, whose: str) -> FeedbackAnswer:
        self.given.append(body.model_dump(exclude_defaults=True))
        return super().take(body, whose)


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """An application on a port that the system hands out; yields its address."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def chat_page(
    model: Path, engine: Engine, scorer: Scorer | None = None, width: int = 1280, **serve: Any
) -> Iterator[Any]:
    """The page, opened. What it sends to /v1/feedback is noted in `page.feedback`, and kept where
    `feedback` names a database."""
    reward = {} if scorer is None else {"reward": "somewhere"}
    config = parse_config(ServeConfig, {"serve": serve, **reward}, "test")
    feedback = None if config.serve.feedback is None else Noted(config.serve, b"a key of the test")
    app = chat_app(config, ChatTokenizer(model), engine, scorer, feedback)
    with served(app) as address, new_page(width) as page:
        page.feedback = [] if feedback is None else feedback.given
        page.set_default_timeout(10_000)
        page.goto(f"{address}/")
        page.locator("#composer :focus").wait_for()
        yield page


def ask(page: Any, text: str) -> None:
    """Ask by keyboard and wait for the end of the answer."""
    page.locator("#question").focus()
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    page.locator("#stop").wait_for(state="hidden")
    page.locator("#log[aria-busy=false]").wait_for()
