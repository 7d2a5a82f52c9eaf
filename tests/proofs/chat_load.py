"""Clients of a chat server that know what their answers must be, and a look at its processes."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tests.servers import Server

_WORDS = ("water", "rice", "bread", "pasta", "nets", "river", "town", "cat")


@dataclass(slots=True)
class Asked:
    """A request and what came of it; `read` are the tokens of the conversation,
    `missing` the members of the ensemble that did not judge."""

    client: int
    began: float
    seconds: float = 0.0
    status: int = 0
    text: str = ""
    read: int = 0
    whole: bool = False
    missing: int = 0
    version: str = ""
    retry_after: str = ""
    error: str = field(default="", repr=False)

    @property
    def broke_off(self) -> bool:
        """Whether it was a stream that ended before its end."""
        return bool(self.client % 2) and self.error == httpx.RemoteProtocolError.__name__


def ask_server(address: str, client: int, best_of: int = 1) -> Asked:
    """A question that only this client asks, with its own seed; every second client streams."""
    words = " ".join(_WORDS[(client + n) % len(_WORDS)] for n in range(1 + client))
    longest = 16 + client
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"Question {client}: {words}?"}],
        "max_tokens": longest,
        "temperature": 1,
        "seed": client,
        "best_of": best_of,
        "stream": bool(client % 2),
        "stream_options": {"include_usage": True},
    }
    asked = Asked(client, time.monotonic())
    try:
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300)
    except httpx.TransportError as error:
        asked.error = type(error).__name__
        return asked
    asked.seconds, asked.status = time.monotonic() - asked.began, answer.status_code
    asked.retry_after = answer.headers.get("retry-after", "")
    if answer.status_code != 200:
        asked.error = answer.text[:120]
        return asked
    ended = ""
    if body["stream"]:
        events = re.findall(r"^data: (.*)$", answer.text, re.MULTILINE)
        chunks = [json.loads(event) for event in events if event != "[DONE]"]
        if any("error" in chunk for chunk in chunks):
            asked.status, asked.error = 503, "in the stream"
            return asked
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            asked.text += choice["delta"].get("content") or ""
            ended = choice["finish_reason"] or ended
        usage, own = chunks[-1]["usage"], chunks[-1]["pavlov"]
        last = events[-1] == "[DONE]"
    else:
        found = answer.json()
        asked.text, ended = (
            found["choices"][0]["message"]["content"],
            found["choices"][0]["finish_reason"],
        )
        usage, own, last = found["usage"], found["pavlov"], True
    asked.read = usage["prompt_tokens"]
    asked.missing = own["choices"][0]["members_missing"] or 0
    asked.version = own["weight_version"]
    full = usage["completion_tokens"] == longest * best_of
    asked.whole = last and (ended == "stop" or full or best_of > 1)
    return asked


@contextmanager
def under_load(server: Server) -> Iterator[list[Asked]]:
    """Eight clients who ask without a pause; yields what was asked, as it grows."""
    done: list[Asked] = []
    over = threading.Event()

    def one(client: int) -> None:
        while not over.is_set():
            done.append(ask_server(server.address, client, best_of=2))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        over.set()
        for thread in threads:
            thread.join()


def at_once(what: list[Callable[[], Any]]) -> None:
    """Do all of it, each in a thread of its own."""
    threads = [threading.Thread(target=each) for each in what]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def metric(server: Server, name: str) -> float:
    """A counter of the ingress replica that answers."""
    text = httpx.get(f"{server.address}/metrics", timeout=30).text
    line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
    return float(line.split()[1])


def processes(server: Server) -> list[psutil.Process]:
    """Everything below the server."""
    return psutil.Process(server.process.pid).children(recursive=True)


def memory_gib(server: Server) -> float:
    """What the engine, the ensemble and the ingress hold."""
    total = 0
    for process in processes(server):
        try:
            if re.search("ServeReplica|VLLM", process.name() + " ".join(process.cmdline())):
                total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**30


def engine_seconds(server: Server) -> float:
    """CPU seconds of the engine's process so far."""
    return sum(
        sum(process.cpu_times()[:2])
        for process in processes(server)
        if "VLLM::EngineCore" in " ".join(process.cmdline())
    )


def replicas(server: Server, part: str) -> list[psutil.Process]:
    """Those of a deployment."""
    found = []
    for process in processes(server):
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if re.search(rf"ray::ServeReplica:[\w-]+:{part}\b", title):
            found.append(process)
    return found
