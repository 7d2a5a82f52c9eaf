"""Room for requests: who is let in, who waits for a turn, and until when.

A request has one deadline, from the moment at which it is let in: reading, waiting and writing
together take at most `timeout_s`. So a server that takes no more has finished by then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rlhf.config.serve import ServeSection


class Metrics:
    """A replica's counters."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.inside = Gauge("pavlov_chat_requests_inside", "answered or waiting", registry=own)
        self.refused = Counter("pavlov_chat_refused", "for lack of room", registry=own)
        self.tokens = Counter("pavlov_chat_tokens", "written, of all candidates", registry=own)
        self.seconds = Histogram("pavlov_chat_seconds", "admission to end", registry=own)


class Places:
    """`at_once` requests have a turn, `waiting` more wait for one."""

    def __init__(self, settings: ServeSection, metrics: Metrics) -> None:
        self._room = settings.at_once + settings.waiting
        self._timeout_s = settings.timeout_s
        self._turns = asyncio.Semaphore(settings.at_once)
        self._metrics = metrics
        self._inside = 0

    def take(self) -> Place | None:
        """Room for one more, if there is some, at once."""
        if self._inside >= self._room:
            self._metrics.refused.inc()
            return None
        self._count(1)
        return Place(self, self._turns, asyncio.get_running_loop().time() + self._timeout_s)

    def give_back(self, seconds: float) -> None:
        """One is free again, after so long."""
        self._count(-1)
        self._metrics.seconds.observe(seconds)

    def _count(self, more: int) -> None:
        self._inside += more
        self._metrics.inside.set(self._inside)


class Place:
    """Room for one request, until `until` (of the event loop's clock)."""

    def __init__(self, places: Places, turns: asyncio.Semaphore, until: float) -> None:
        self.until = until
        self._places, self._turns = places, turns
        self._began = time.monotonic()
        self._free = False

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A turn to be answered, waited for if need be. The place is free at its end.

        Raises:
            TimeoutError: it did not come, or was not over, in time.
        """
        try:
            async with asyncio.timeout_at(self.until), self._turns:
                yield
        finally:
            self.free()

    def free(self) -> None:
        """Give it back, if it was not."""
        if not self._free:
            self._free = True
            self._places.give_back(time.monotonic() - self._began)
