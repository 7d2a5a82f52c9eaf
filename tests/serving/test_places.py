"""Room in the chat endpoint: who is let in, for how long, and that every place is given back."""

import asyncio
import contextlib
import gc
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from models.chat import ChatTokenizer
from rlhf.config import ServeConfig, parse_config
from serving.chat import chat_app
from tests.serving.test_chat import ASK, Chat, Engine

PATH = "/v1/chat/completions"
LONG = [{"role": "user", "content": "long " * 3000}]
Sent = list[dict[str, Any]]


class Slow(ChatTokenizer):
    """Reads when it is told to, and counts what it reads."""

    def __init__(self, tiny: Any) -> None:
        super().__init__(tiny)
        self.go = threading.Event()
        self.read = 0
        self.error: Exception | None = None

    def prompt_ids(self, messages: Any) -> tuple[int, ...]:
        self.read += 1
        assert self.go.wait(20)
        if self.error:
            raise self.error
        return super().prompt_ids(messages)


class Served:
    """The application with one place to be answered in, asked as a server asks it."""

    def __init__(self, tiny: Any, **serve: Any) -> None:
        self.engine, self.tokenizer = Engine(), Slow(tiny)
        self.tokenizer.go.set()
        values = {"serve": {"at_once": 1, "waiting": 1, "requests_per_minute": 10**6, **serve}}
        config = parse_config(ServeConfig, values, "test")
        self.app = chat_app(config, self.tokenizer, self.engine, None)

    async def metrics(self) -> str:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.get("/metrics")).text

    async def ask(
        self,
        body: dict[str, Any],
        sent: Sent | None = None,
        *,
        left: asyncio.Event | None = None,
        spec: str = "2.4",
        taken: Callable[[dict[str, Any]], Awaitable[None]] | None = None,
    ) -> Sent:
        """What is sent; the client leaves when `left` is set."""
        sent = [] if sent is None else sent
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec},
            "http_version": "1.1",
            "method": "POST",
            "path": PATH,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
        }
        asked = [{"type": "http.request", "body": json.dumps({**ASK, **body}).encode()}]

        async def receive() -> dict[str, Any]:
            if asked:
                return asked.pop()
            await (left or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if taken is not None:
                await taken(message)
            sent.append(message)

        await self.app(scope, receive, send)
        return sent


def statuses(*answers: Sent) -> list[int]:
    return [answer[0]["status"] for answer in answers if answer]


def text(answer: Sent) -> str:
    return b"".join(message.get("body", b"") for message in answer).decode()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


async def ended(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("stream", [False, True])
def test_of_a_crowd_that_comes_at_once_no_more_are_let_in_than_there_are_places(tiny_model, stream):
    served = Served(tiny_model)
    served.engine.wait.clear()

    async def crowd() -> list[int]:
        answers: list[Sent] = [[] for _ in range(60)]
        tasks = [asyncio.create_task(served.ask({"stream": stream}, sent)) for sent in answers]
        await until(lambda: sum(task.done() for task in tasks) >= 58)
        assert "requests_inside 2.0" in await served.metrics()
        served.engine.wait.set()
        await asyncio.gather(*tasks)
        assert "requests_inside 0.0" in await served.metrics()
        return statuses(*answers)

    assert sorted(asyncio.run(crowd())) == [200, 200, *[429] * 58]


def test_who_finds_no_place_is_refused_at_once_and_not_read(tiny_model):
    served = Served(tiny_model, waiting=0)
    served.tokenizer.go.clear()

    async def crowd() -> None:
        first = asyncio.create_task(served.ask({}))
        await until(lambda: served.tokenizer.read == 1)
        answers = await asyncio.wait_for(
            asyncio.gather(*(served.ask({"stream": bool(at % 2)}) for at in range(20))), 5
        )
        assert statuses(*answers) == [429] * 20
        assert (b"retry-after", b"2") in answers[0][0]["headers"]
        assert served.tokenizer.read == 1
        served.tokenizer.go.set()
        assert statuses(await first) == [200]

    asyncio.run(crowd())


def test_no_more_than_two_conversations_are_read_at_once(tiny_model):
    served = Served(tiny_model, at_once=8)
    served.tokenizer.go.clear()

    async def crowd() -> None:
        tasks = [asyncio.create_task(served.ask({})) for _ in range(6)]
        await until(lambda: served.tokenizer.read == 2)
        await asyncio.sleep(0.2)
        assert served.tokenizer.read == 2
        served.tokenizer.go.set()
        assert statuses(*await asyncio.gather(*tasks)) == [200] * 6

    asyncio.run(crowd())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "status"), [({"messages": LONG}, 400), ({"model": "x"}, 404), ({"best_of": 2}, 400)]
)
def test_what_is_refused_when_it_was_read_gives_its_place_back(tiny_model, stream, body, status):
    served = Served(tiny_model, waiting=0)

    async def again_and_again() -> None:
        for _ in range(3):
            assert statuses(await served.ask({"stream": stream, **body})) == [status]
        assert statuses(await served.ask({"stream": stream})) == [200]
        assert "requests_inside 0.0" in await served.metrics()
        # It was there, and its time is counted with the others'.
        assert "pavlov_chat_seconds_count 4.0" in await served.metrics()

    asyncio.run(again_and_again())


@pytest.mark.parametrize("stream", [False, True])
def test_a_reader_that_fails_gives_its_place_back(tiny_model, stream):
    served = Served(tiny_model, waiting=0)
    served.tokenizer.error = RuntimeError("secret")

    async def again() -> None:
        for _ in range(3):
            sent: Sent = []
            with contextlib.suppress(RuntimeError):
                await served.ask({"stream": stream}, sent)
            assert statuses(sent) == [503] and "secret" not in text(sent)
        served.tokenizer.error = None
        assert statuses(await served.ask({"stream": stream})) == [200]

    asyncio.run(again())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("where", "before"),
    [("read", 0), ("queued to be read", 2), ("waiting", 1), ("waiting", 2), ("written", 0)],
)
def test_who_is_cut_off_gives_the_place_back_wherever_it_is(tiny_model, stream, where, before):
    """As Ray Serve does when a client has left."""
    served = Served(tiny_model, waiting=3)
    served.engine.wait.clear()

    async def leave() -> None:
        if "read" in where:
            served.tokenizer.go.clear()
        others = [asyncio.create_task(served.ask({})) for _ in range(before)]
        await until(lambda: served.tokenizer.read == before)
        task = asyncio.create_task(served.ask({"stream": stream}))
        await until(lambda: served.tokenizer.read == before + ("queued" not in where))
        await asyncio.sleep(0.1)
        assert f"requests_inside {before + 1}.0" in await served.metrics()
        await ended(task)
        assert f"requests_inside {before}.0" in await served.metrics()
        await ended(*others)
        assert "requests_inside 0.0" in await served.metrics()
        served.tokenizer.go.set()
        served.engine.wait.set()
        assert statuses(*[await served.ask({"stream": stream}) for _ in range(3)]) == [200] * 3

    gc.disable()
    try:
        asyncio.run(leave())
    finally:
        gc.enable()


@pytest.mark.parametrize("spec", ["2.1", "2.4"])
@pytest.mark.parametrize("how", ["cut off", "broken", "left"])
@pytest.mark.parametrize("guarded", [False, True])
def test_who_leaves_before_the_stream_begins_gives_the_place_back(tiny_model, how, spec, guarded):
    served = Served(tiny_model, waiting=0)
    if not guarded:
        # Its buffer takes the headers, so that events begin whether they are taken or not.
        served.app.user_middleware.clear()

    async def leave() -> None:
        left, begun = asyncio.Event(), asyncio.Event()

        async def taken(message: dict[str, Any]) -> None:
            begun.set()
            if how == "broken":
                raise OSError("the client has gone")
            if how == "cut off" or spec == "2.4":
                await asyncio.Event().wait()

        if how == "left":
            # While its conversation is read.
            served.tokenizer.go.clear()
        task = asyncio.create_task(served.ask({"stream": True}, left=left, spec=spec, taken=taken))
        if how == "left":
            await until(lambda: served.tokenizer.read == 1)
            left.set()
            served.tokenizer.go.set()
            if spec == "2.4":
                await begun.wait()
                task.cancel()
        else:
            await begun.wait()
            if how == "cut off":
                task.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.done()
        if not task.cancelled():
            task.exception()
        assert "requests_inside 0.0" in await served.metrics()
        assert statuses(await served.ask({"stream": True})) == [200]

    gc.disable()
    try:
        asyncio.run(leave())
    finally:
        gc.enable()


def test_who_does_not_take_the_end_of_a_stream_keeps_no_place(tiny_model):
    served = Served(tiny_model, waiting=0)

    async def slow() -> None:
        at_end = asyncio.Event()

        async def taken(message: dict[str, Any]) -> None:
            if b"[DONE]" in message.get("body", b""):
                at_end.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(served.ask({"stream": True}, taken=taken))
        await at_end.wait()
        assert statuses(await served.ask({"stream": True})) == [200]
        await ended(task)
        assert "requests_inside 0.0" in await served.metrics()

    asyncio.run(slow())


def test_who_waits_is_told_within_the_time_there_is_from_the_door(tiny_model):
    served = Served(tiny_model, waiting=5, timeout_s=0.5)
    served.engine.wait.clear()

    async def crowd() -> None:
        began = asyncio.get_running_loop().time()
        answers: list[Sent] = [[] for _ in range(6)]
        await asyncio.gather(
            *(served.ask({"stream": bool(at % 2)}, sent) for at, sent in enumerate(answers)),
            return_exceptions=True,
        )
        # One after the other they would take 3 s.
        assert asyncio.get_running_loop().time() - began < 1.5
        assert statuses(*answers) == [504, 200] * 3
        for answer in answers:
            told = json.loads(text(answer).split("data: ")[-1])
            assert told["error"]["code"] == "timeout"
        assert "requests_inside 0.0" in await served.metrics()
        served.engine.wait.set()
        assert statuses(await served.ask({})) == [200]

    asyncio.run(crowd())


@pytest.mark.parametrize("stream", [False, True])
def test_reading_takes_of_the_time_there_is(tiny_model, stream):
    served = Served(tiny_model, waiting=0, timeout_s=0.3)
    served.tokenizer.go.clear()

    async def slow() -> None:
        sent: Sent = []
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(served.ask({"stream": stream}, sent), 5)
        assert statuses(sent) == [504]
        assert "requests_inside 0.0" in await served.metrics()
        served.tokenizer.go.set()
        assert statuses(await served.ask({"stream": stream})) == [200]

    asyncio.run(slow())


def test_a_place_is_given_back_once(tiny_model):
    chat = Chat(tiny_model, at_once=1, waiting=0)
    for _ in range(3):
        assert chat.ask(stream=True).status_code == chat.ask().status_code == 200
    assert "pavlov_chat_requests_inside 0.0" in chat.client.get("/metrics").text
    assert "pavlov_chat_seconds_count 6.0" in chat.client.get("/metrics").text
