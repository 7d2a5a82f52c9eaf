from __future__ import annotations

import asyncio
import random
import selectors
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.buffer import RolloutBuffer

pytestmark = pytest.mark.timeout(60)
Result = TypeVar("Result")


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """Time passes only when everybody waits, and then at once."""

    def __init__(self) -> None:
        super().__init__(_SkippingSelector(self))
        self.now_s = 0.0

    def time(self) -> float:
        return self.now_s


class _SkippingSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualClockLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits and nobody will ever wake them"
        self._loop.now_s += timeout
        return super().select(0)


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(coroutine)


async def start(awaitable: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
    """A task that has gone as far as it can."""
    task = asyncio.ensure_future(awaitable)
    await asyncio.sleep(1)
    return task


@pytest.mark.parametrize(("groups", "staleness", "capacity"), [(1, 0, 1), (4, 0, 4), (3, 2, 9)])
def test_capacity_is_what_the_staleness_bound_needs(groups, staleness, capacity):
    assert RolloutBuffer(groups, staleness).capacity == capacity


@pytest.mark.parametrize(("groups", "staleness"), [(0, 0), (-1, 2), (1, -1)])
def test_a_buffer_without_room_is_refused(groups, staleness):
    with pytest.raises(ValueError, match=f"got {groups} and {staleness}"):
        RolloutBuffer(groups, staleness)


def test_groups_come_out_in_admission_order_whatever_order_they_finish_in():
    async def scenario():
        buffer = RolloutBuffer(2, 1)
        tickets = await buffer.admit(4, timeout_s=5)
        for ticket in reversed(tickets):
            await buffer.fill(ticket, f"group {ticket}")
        first = await buffer.take(timeout_s=5)
        await buffer.release()
        return first, await buffer.take(timeout_s=5)

    assert run(scenario()) == (["group 0", "group 1"], ["group 2", "group 3"])


def test_take_waits_for_the_oldest_group_though_younger_ones_are_ready():
    async def scenario():
        buffer = RolloutBuffer(1, 2)
        tickets = await buffer.admit(3, timeout_s=5)
        taking = await start(buffer.take(timeout_s=50))
        await buffer.fill(tickets[2], "c")
        await buffer.fill(tickets[1], "b")
        await asyncio.sleep(1)
        assert not taking.done()
        await buffer.fill(tickets[0], "a")
        return await taking

    assert run(scenario()) == ["a"]


def test_take_waits_for_a_whole_step():
    async def scenario():
        buffer = RolloutBuffer(2, 0)
        (first,) = await buffer.admit(1, timeout_s=5)
        await buffer.fill(first, "a")
        taking = await start(buffer.take(timeout_s=50))
        assert not taking.done()
        (second,) = await buffer.admit(1, timeout_s=5)
        await buffer.fill(second, "b")
        return await taking

    assert run(scenario()) == ["a", "b"]


def test_slots_are_freed_by_release_and_by_nothing_before_it():
    async def scenario():
        buffer = RolloutBuffer(2, 0)
        tickets = await buffer.admit(2, timeout_s=5)
        admitting = await start(buffer.admit(2, timeout_s=50))
        for ticket in tickets:
            await buffer.fill(ticket, "x")
        await buffer.take(timeout_s=5)
        await asyncio.sleep(1)
        assert not admitting.done()
        await buffer.release()
        return await admitting

    assert run(scenario()) == [2, 3]


def test_groups_are_admitted_together_or_not_at_all():
    async def scenario():
        buffer = RolloutBuffer(2, 1)
        await buffer.admit(3, timeout_s=5)
        with pytest.raises(TimeoutError):
            await buffer.admit(2, timeout_s=5)
        assert buffer.depth == 3
        assert await buffer.admit(1, timeout_s=5) == [3]

    run(scenario())


@pytest.mark.parametrize("count", [0, -1, 3])
def test_more_groups_than_slots_or_none_are_refused(count):
    with pytest.raises(ValueError, match=f"cannot admit {count} groups into 2 slots"):
        run(RolloutBuffer(2, 0).admit(count, timeout_s=5))


def test_a_slot_is_filled_exactly_once():
    async def scenario():
        buffer = RolloutBuffer(1, 0)
        (ticket,) = await buffer.admit(1, timeout_s=5)
        await buffer.fill(ticket, "a")
        with pytest.raises(ValueError, match=f"slot {ticket} is not waiting"):
            await buffer.fill(ticket, "b")
        with pytest.raises(ValueError, match="slot 7 is not waiting"):
            await buffer.fill(7, "b")
        assert await buffer.take(timeout_s=5) == ["a"]
        await buffer.release()
        with pytest.raises(ValueError, match=f"slot {ticket} is not waiting"):
            await buffer.fill(ticket, "late")

    run(scenario())


def test_take_and_release_alternate():
    async def scenario():
        buffer = RolloutBuffer(1, 1)
        with pytest.raises(ValueError, match="nothing to release"):
            await buffer.release()
        for ticket in await buffer.admit(2, timeout_s=5):
            await buffer.fill(ticket, ticket)
        assert await buffer.take(timeout_s=5) == [0]
        with pytest.raises(ValueError, match="not released"):
            await buffer.take(timeout_s=5)
        await buffer.release()
        assert await buffer.take(timeout_s=5) == [1]

    run(scenario())


def test_two_takers_never_get_the_same_groups():
    async def scenario():
        buffer = RolloutBuffer(1, 1)
        takers = [await start(buffer.take(timeout_s=50)) for _ in range(2)]
        for ticket in await buffer.admit(2, timeout_s=5):
            await buffer.fill(ticket, ticket)
        return await asyncio.gather(*takers, return_exceptions=True)

    assert run(scenario()) != [[0], [0]]


@pytest.mark.parametrize("turns", range(8))
def test_who_is_cancelled_while_waiting_stops_even_if_the_wait_ends_in_that_moment(turns):
    """A taker that went on would learn from a run that is over, and wait for groups in vain."""

    async def scenario():
        buffer = RolloutBuffer(1, 0)
        (ticket,) = await buffer.admit(1, timeout_s=5)
        taker = await start(buffer.take(timeout_s=50))
        await buffer.fill(ticket, "x")
        for _ in range(turns):
            await asyncio.sleep(0)
        if taker.cancel():
            with pytest.raises(asyncio.CancelledError):
                await taker

    run(scenario())


def test_depth_counts_slots_and_ready_counts_groups_that_wait_for_the_learner():
    async def scenario():
        buffer = RolloutBuffer(1, 2)
        seen = [(buffer.depth, buffer.ready)]
        tickets = await buffer.admit(3, timeout_s=5)
        seen.append((buffer.depth, buffer.ready))
        for ticket in tickets[:2]:
            await buffer.fill(ticket, "x")
        seen.append((buffer.depth, buffer.ready))
        await buffer.take(timeout_s=5)
        seen.append((buffer.depth, buffer.ready))
        await buffer.release()
        seen.append((buffer.depth, buffer.ready))
        return seen

    assert run(scenario()) == [(0, 0), (3, 0), (3, 2), (3, 1), (2, 1)]


def test_a_take_that_times_out_names_the_oldest_missing_group_and_its_age(monkeypatch):
    async def scenario():
        buffer = RolloutBuffer(3, 0)
        tickets = await buffer.admit(3, timeout_s=5)
        await buffer.fill(tickets[0], "a")
        later = SimpleNamespace(monotonic=lambda: time.monotonic() + 30)
        monkeypatch.setattr("rlhf.buffer.time", later)
        await buffer.take(timeout_s=20)

    message = "waited 20 s for 2 of 3 groups; the oldest is group 1, admitted 30 s ago"
    with pytest.raises(TimeoutError, match=f"^{message}$"):
        run(scenario())


def test_a_take_that_times_out_says_when_too_few_were_admitted():
    async def scenario():
        buffer = RolloutBuffer(3, 0)
        (ticket,) = await buffer.admit(1, timeout_s=5)
        await buffer.fill(ticket, "a")
        await buffer.take(timeout_s=20)

    with pytest.raises(TimeoutError, match=r"^waited 20 s for 3 groups \(1 admitted\)$"):
        run(scenario())


def test_an_admission_that_times_out_says_how_many_slots_are_in_use():
    async def scenario():
        buffer = RolloutBuffer(2, 1)
        await buffer.admit(3, timeout_s=5)
        await buffer.admit(2, timeout_s=20)

    with pytest.raises(TimeoutError, match=r"^waited 20 s for 2 free slots of 4 \(3 in use\)$"):
        run(scenario())


def test_the_buffer_works_on_after_a_timeout():
    async def scenario():
        buffer = RolloutBuffer(1, 0)
        with pytest.raises(TimeoutError):
            await buffer.take(timeout_s=5)
        (ticket,) = await buffer.admit(1, timeout_s=5)
        await buffer.fill(ticket, "a")
        return await buffer.take(timeout_s=5)

    assert run(scenario()) == ["a"]


@dataclass
class History:
    """What a simulated run did: per ticket the version at admission, per step what was taken."""

    admitted_at: list[int] = field(default_factory=list)
    steps: list[list[tuple[str, int]]] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)

    @property
    def worst_staleness(self) -> int:
        """The version of step s is s: one publish a step."""
        return max(
            step - self.admitted_at[ticket]
            for step, groups in enumerate(self.steps)
            for _, ticket in groups
        )


async def simulate(
    groups_per_step: int,
    max_staleness: int,
    num_steps: int,
    chance: random.Random,
    *,
    eager: bool,
    whole_steps: bool,
) -> History:
    """The training loop with random latencies and failures; `eager` admits without delay."""
    buffer: RolloutBuffer[tuple[str, int]] = RolloutBuffer(groups_per_step, max_staleness)
    history, version = History(), 0
    failure_rate = chance.choice([0.0, 0.2, 1.0])
    slowest_s = {who: chance.choice([1, 3, 20]) for who in ("admit", "generate", "learn")}

    async def work(who: str) -> None:
        await asyncio.sleep(chance.randint(1, slowest_s[who]))

    async def generate(ticket: int) -> None:
        await work("generate")
        await buffer.fill(ticket, (history.outcomes[ticket], ticket))

    async def roll_out(tasks: asyncio.TaskGroup) -> None:
        count = groups_per_step if whole_steps else 1
        for _ in range(0, num_steps * groups_per_step, count):
            if not eager:
                await work("admit")
            for ticket in await buffer.admit(count, timeout_s=10_000):
                assert ticket == len(history.admitted_at)
                history.admitted_at.append(version)
                history.outcomes.append("failed" if chance.random() < failure_rate else "scored")
                tasks.create_task(generate(ticket))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(roll_out(tasks))
        for _ in range(num_steps):
            history.steps.append(await buffer.take(timeout_s=10_000))
            await work("learn")
            version += 1
            await buffer.release()
    assert buffer.depth == 0
    return history


SIMULATIONS = {
    "groups_per_step": st.integers(1, 4),
    "max_staleness": st.integers(0, 4),
    "num_steps": st.integers(1, 12),
    "seed": st.integers(0, 2**32),
    "whole_steps": st.booleans(),
}
RANDOM_RUNS = settings(max_examples=150, deadline=None, database=None, derandomize=True)


@RANDOM_RUNS
@given(**SIMULATIONS, eager=st.booleans())
def test_staleness_is_bounded_and_no_group_lost_doubled_reordered_or_blocking(
    groups_per_step, max_staleness, num_steps, seed, whole_steps, eager
):
    history = run(
        simulate(
            groups_per_step,
            max_staleness,
            num_steps,
            random.Random(seed),
            eager=eager,
            whole_steps=whole_steps,
        )
    )
    assert history.worst_staleness <= max_staleness
    taken = [group for groups in history.steps for group in groups]
    assert taken == [(outcome, ticket) for ticket, outcome in enumerate(history.outcomes)]
    assert [len(groups) for groups in history.steps] == [groups_per_step] * num_steps


@RANDOM_RUNS
@given(**SIMULATIONS)
def test_the_staleness_bound_is_reached_when_prompts_are_admitted_at_once(
    groups_per_step, max_staleness, num_steps, seed, whole_steps
):
    history = run(
        simulate(
            groups_per_step,
            max_staleness,
            max_staleness + num_steps,
            random.Random(seed),
            eager=True,
            whole_steps=whole_steps,
        )
    )
    assert history.worst_staleness == max_staleness
