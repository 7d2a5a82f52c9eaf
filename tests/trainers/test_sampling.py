"""Sampling outside of training, by an engine in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from actors.rollout import GroupRequest
from rlhf.errors import GenerationError, RunError
from rlhf.records import Completion, Message, Prompt, RolloutGroup
from trainers.sampling import sample

REQUESTS = [
    GroupRequest(Prompt(f"p{n}", (Message("user", "Why?"),)), 0, (n,), 4, 1.0) for n in range(50)
]


class Engine:
    """Takes longer for some requests than for others."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.asking = 0

    async def generate(self, requests: Sequence[GroupRequest]) -> list[RolloutGroup]:
        self.asking += 1
        self.asked.append(self.asking)
        [request] = requests
        for _ in range(1 + request.seeds[0] % 7):
            await asyncio.sleep(0)
        self.asking -= 1
        completion = Completion((3,), request.prompt.id, (-0.5,), "stop", 0, 0, request.seeds[0])
        return [RolloutGroup(request.prompt, 0, (1,), (completion,))]


def test_prompts_wait_for_their_turn_before_they_are_asked_and_not_while_a_timeout_runs() -> None:
    engine, told = Engine(), list[int]()
    drawn = asyncio.run(sample(engine.generate, REQUESTS, told.append, max_sequences=4))
    assert max(engine.asked) == 8
    assert [completion.text for (completion,) in drawn] == [r.prompt.id for r in REQUESTS]
    assert sum(told) == len(REQUESTS)


def test_a_prompt_that_cannot_be_answered_is_named() -> None:
    async def generate(requests: Sequence[GroupRequest]) -> list[GenerationError]:
        return [GenerationError("too long")]

    with pytest.raises(RunError, match="no answer to p0: too long"):
        asyncio.run(sample(generate, REQUESTS[:1], lambda count: None, max_sequences=4))
