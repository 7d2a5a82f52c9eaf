"""The loop: one page, the same for synchronous and asynchronous training.

::

    admit ─► generate ─► score by ensemble and reference ─► fill slot
    take oldest groups ─► advantages ─► learner step ─► publish ─► release slots ─► record

| coroutine | waits for                         | unblocked by           |
|-----------|-----------------------------------|------------------------|
| `admit`   | a step's worth of free slots      | `learn`, on release    |
| `produce` | an engine, the ensemble           | nobody: it runs freely |
| `learn`   | the oldest step's groups, all in  | `produce`, on fill     |

With ``max_staleness = 0`` there are slots for one step only, so `admit` waits for every publish:
that is the synchronous algorithm. Nothing else depends on the dial.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.rollout import GroupRequest
from rlhf.buffer import RolloutBuffer
from rlhf.config import RLConfig
from rlhf.errors import GenerationError
from rlhf.prompts import PromptCursor
from rlhf.records import (
    FailedGroup,
    Prompt,
    RolloutGroup,
    ScoredGroup,
    StepReport,
    TrainingBatch,
)
from rlhf.seeding import derive_seed
from rlhf.steering import steered
from rlhf.steps import rewards_ask_the_learner, step_metrics, training_batch

Group = ScoredGroup | FailedGroup

Work = tuple[int, Prompt, int]
"""A ticket of the buffer, the prompt and its epoch."""


class Actors(Protocol):
    """What the loop asks of the actors; `trainers.fleet.Fleet` in a run."""

    async def generate(
        self, requests: Sequence[GroupRequest], version: int, *, together: bool
    ) -> list[RolloutGroup | GenerationError]: ...

    async def score(
        self, groups: Sequence[RolloutGroup]
    ) -> list[ScoredGroup | GenerationError]: ...

    async def evaluated(self, groups: Sequence[Group]) -> list[Group]: ...

    async def learn(self, batch: TrainingBatch, step: int) -> StepReport: ...

    async def publish(self, version: int) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Produced:
    """What fills a slot, and how long it took."""

    group: Group
    rollout_s: float
    score_s: float


class Loop:
    """One run. A weight version is a publish: version v has seen v steps of the loop.

    Args:
        record: called after every step with its metrics and groups, before the next one's publish.
        last: metrics of the step before the first, where a run is resumed.
    """

    def __init__(
        self,
        config: RLConfig,
        cursor: PromptCursor,
        actors: Actors,
        record: Callable[[int, dict[str, Any], Sequence[Group]], Any],
        first_step: int = 0,
        last: Mapping[str, Any] | None = None,
    ) -> None:
        self._config = config
        self._rl = config.rl if last is None else steered(config.rl, last)
        self._cursor = cursor
        self._actors = actors
        self._record = record
        self._steps = range(first_step, config.rl.num_steps)
        self._version = first_step
        self._patience_s = config.patience_s
        self.begun = first_step
        """Steps that the learner has begun; as many are recorded, but for the one under way."""
        self._stepping: asyncio.Task[None] | None = None
        self._buffer: RolloutBuffer[Produced] = RolloutBuffer(
            config.rl.prompts_per_step, config.rl.max_staleness
        )

    async def run(self) -> None:
        """Publish the start weights, then train until `rl.num_steps`."""
        await self._actors.publish(self._version)
        async with asyncio.TaskGroup() as tasks:
            admission = tasks.create_task(self._admit(tasks))
            await self._learn()
            await admission

    async def settle(self, timeout_s: float) -> None:
        """After `run` has failed: let the step that the learner has begun come to its end and be
        recorded; what is not over by then is dropped."""
        if self._stepping is not None:
            try:
                await asyncio.wait([self._stepping], timeout=timeout_s)
            finally:
                self._stepping.cancel()

    async def _admit(self, tasks: asyncio.TaskGroup) -> None:
        """Waits for a step's worth of free slots; unblocked by a release in `_learn`."""
        size = self._config.rl.prompts_per_step
        for _ in self._steps:
            tickets = await self._buffer.admit(size, timeout_s=self._patience_s)
            work = [(ticket, *self._cursor.next()) for ticket in tickets]
            # Deterministic: the whole step goes to the engine at once, in one order.
            share = size if self._config.deterministic else 1
            for begin in range(0, size, share):
                tasks.create_task(self._produce(work[begin : begin + share]))

    async def _produce(self, work: Sequence[Work]) -> None:
        """Fills the slots of `work`, by a scored group each or by a failure after all attempts."""
        reasons = dict.fromkeys((ticket for ticket, _, _ in work), "")
        for _ in range(self._config.rl.max_attempts):
            todo = [item for item in work if item[0] in reasons]
            started = time.monotonic()
            drawn = await self._actors.generate(
                [self._request(prompt, epoch) for _, prompt, epoch in todo],
                self._version,
                together=self._config.deterministic,
            )
            rollout_s = time.monotonic() - started
            groups = [group for group in drawn if isinstance(group, RolloutGroup)]
            scored = iter(await self._actors.score(groups) if groups else [])
            score_s = time.monotonic() - started - rollout_s
            for (ticket, _, _), group in zip(todo, drawn, strict=True):
                result = next(scored) if isinstance(group, RolloutGroup) else group
                if isinstance(result, ScoredGroup):
                    del reasons[ticket]
                    await self._buffer.fill(ticket, Produced(result, rollout_s, score_s))
                else:
                    reasons[ticket] = str(result)
            if not reasons:
                return
        for ticket, prompt, epoch in work:
            if ticket in reasons:
                failed = FailedGroup(prompt, epoch, reasons[ticket], self._config.rl.max_attempts)
                await self._buffer.fill(ticket, Produced(failed, 0.0, 0.0))

    async def _learn(self) -> None:
        """Waits for the oldest step's groups; unblocked by fills in `_produce`."""
        masked = self._config.reward.domain_shift.response == "mask"
        for step in self._steps:
            started, settings = time.monotonic(), self._rl
            taken = await self._buffer.take(timeout_s=self._patience_s)
            groups = [produced.group for produced in taken]
            if rewards_ask_the_learner(settings):
                groups = await self._actors.evaluated(groups)
            batch = training_batch(groups, settings, mask_shifted=masked)
            # What ends the run meanwhile leaves the learner between two steps: see `settle`.
            self._stepping = asyncio.create_task(self._step(step, started, taken, groups, batch))
            await asyncio.shield(self._stepping)
            await self._buffer.release()

    async def _step(
        self,
        step: int,
        started: float,
        taken: Sequence[Produced],
        groups: Sequence[Group],
        batch: TrainingBatch,
    ) -> None:
        settings, learning = self._rl, time.monotonic()
        self.begun = step + 1
        report = await self._actors.learn(batch, step)
        publishing = time.monotonic()
        gap = await self._actors.publish(self._version + 1)
        published = time.monotonic()
        times_s = {
            "rollout": max(produced.rollout_s for produced in taken),
            "score": max(produced.score_s for produced in taken),
            "learn": publishing - learning,
            "weights": published - publishing,
            "step": published - started,
        }
        metrics = step_metrics(step, self._version, groups, batch, report, settings, times_s)
        metrics |= {"weights/probe_gap": gap, "buffer/depth": self._buffer.depth}
        self._version += 1
        self._rl = steered(settings, metrics)
        # Recorded before the slots are free: what follows in a step sees this one on disk.
        await self._record(step, metrics, groups)

    def _request(self, prompt: Prompt, epoch: int) -> GroupRequest:
        rl = self._config.rl
        seeds = tuple(
            derive_seed(self._config.seed, prompt.id, epoch, sibling)
            for sibling in range(rl.completions_per_prompt)
        )
        return GroupRequest(prompt, epoch, seeds, rl.max_tokens, rl.temperature, rl.top_p)
