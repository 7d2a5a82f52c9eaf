"""The rollout buffer: admission order and an exact staleness bound.

::

    admit ─► [slot 0][slot 1] … [slot capacity-1] ─► take (oldest groups_per_step) ─► release
                 ▲ filled or failed, in any order            after the new weights are published

Why the bound is exact: group i is admitted only after group ``i - capacity`` was released, which
happens after the publish that ended its step. With ``capacity = (S + 1) * groups_per_step`` that
publish made version ``i // groups_per_step - S`` or newer, and group i is trained on at version
``i // groups_per_step``. So staleness is at most S, whatever the latencies. Handing groups out in
completion order would break it, however small the buffer.

| coroutine | waits for              | unblocked by |
|-----------|------------------------|--------------|
| admit     | enough free slots      | release      |
| take      | the oldest slots full  | fill         |
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(slots=True)
class _Slot(Generic[Item]):
    ticket: int
    admitted_at: float = field(default_factory=time.monotonic)
    item: Item | None = None


class RolloutBuffer(Generic[Item]):
    """Slots in admission order. An item is a scored group or a recorded failure alike."""

    def __init__(self, groups_per_step: int, max_staleness: int) -> None:
        if groups_per_step < 1 or max_staleness < 0:
            raise ValueError(
                f"need groups_per_step >= 1 and max_staleness >= 0, "
                f"got {groups_per_step} and {max_staleness}"
            )
        self.groups_per_step = groups_per_step
        self.capacity = (max_staleness + 1) * groups_per_step
        self._slots: deque[_Slot[Item]] = deque()
        self._next_ticket = 0
        self._taken = 0
        self._changed = asyncio.Condition()

    @property
    def depth(self) -> int:
        """Slots in use: being generated, waiting, or being trained on."""
        return len(self._slots)

    @property
    def ready(self) -> int:
        """Groups filled or failed that the learner has not taken."""
        return sum(slot.item is not None for slot in self._slots) - self._taken

    async def admit(self, count: int, *, timeout_s: float) -> list[int]:
        """Tickets for `count` new groups, once that many slots are free.

        Raises:
            TimeoutError: nothing was released in time; the message says what was waited for.
        """
        if not 0 < count <= self.capacity:
            raise ValueError(f"cannot admit {count} groups into {self.capacity} slots")
        await self._wait(
            lambda: self.depth + count <= self.capacity,
            timeout_s,
            lambda: f"{count} free slots of {self.capacity} ({self.depth} in use)",
        )
        tickets = list(range(self._next_ticket, self._next_ticket + count))
        self._slots.extend(_Slot(ticket) for ticket in tickets)
        self._next_ticket += count
        return tickets

    async def fill(self, ticket: int, item: Item) -> None:
        """Put a scored group or a failure into its slot, exactly once."""
        async with self._changed:
            slot = next((slot for slot in self._slots if slot.ticket == ticket), None)
            if slot is None or slot.item is not None:
                raise ValueError(f"slot {ticket} is not waiting for a group")
            slot.item = item
            self._changed.notify_all()

    async def take(self, *, timeout_s: float) -> list[Item]:
        """The oldest `groups_per_step` groups, in admission order, once all of them are there.

        Raises:
            TimeoutError: the message names the oldest missing group and its age.
        """
        if self._taken:
            raise ValueError("the groups taken before were not released")
        head = self.groups_per_step
        await self._wait(
            lambda: (
                not self._taken
                and self.ready >= head
                and all(slot.item is not None for slot in self._head(head))
            ),
            timeout_s,
            self._describe_missing,
        )
        self._taken = head
        return [slot.item for slot in self._head(head) if slot.item is not None]

    async def release(self) -> None:
        """Free the slots taken last. Call it only after the new weights are published."""
        async with self._changed:
            if not self._taken:
                raise ValueError("there is nothing to release")
            for _ in range(self._taken):
                self._slots.popleft()
            self._taken = 0
            self._changed.notify_all()

    def _head(self, count: int) -> list[_Slot[Item]]:
        return [self._slots[index] for index in range(min(count, len(self._slots)))]

    def _describe_missing(self) -> str:
        if self._taken:
            return "the release of the groups taken before"
        missing = [slot for slot in self._head(self.groups_per_step) if slot.item is None]
        if not missing:
            return f"{self.groups_per_step} groups ({self.depth} admitted)"
        age_s = time.monotonic() - missing[0].admitted_at
        return (
            f"{len(missing)} of {self.groups_per_step} groups; the oldest is group "
            f"{missing[0].ticket}, admitted {age_s:.0f} s ago"
        )

    async def _wait(
        self, condition: Callable[[], bool], timeout_s: float, describe: Callable[[], str]
    ) -> None:
        async with self._changed:
            try:
                # Not `asyncio.wait_for`: in Python 3.11 it swallows a cancellation that comes in
                # the moment in which the wait ends.
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(condition)
            except TimeoutError:
                raise TimeoutError(f"waited {timeout_s:.0f} s for {describe()}") from None
