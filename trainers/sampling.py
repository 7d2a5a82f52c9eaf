"""Sampling answers outside of training: one engine, no learner."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from actors.rollout import GroupRequest, RolloutActor
from cluster.layout import choose_layout
from cluster.session import shared_memory_folder
from cluster.spawn import Role, call, spawn_in_thread
from rlhf.config import ClusterSection, RLSection, RolloutSection
from rlhf.errors import PavlovError, RunError
from rlhf.records import Completion, Prompt, RolloutGroup
from rlhf.seeding import derive_seed

Generate = Callable[[Sequence[GroupRequest]], Any]

_CLOSE_S = 8.0


def requests_for(
    prompts: Sequence[Prompt], count: int, settings: RLSection, seed: int
) -> list[GroupRequest]:
    """A request for `count` answers to every prompt, sampled as the loop samples."""
    return [
        GroupRequest(
            prompt,
            0,
            tuple(derive_seed(seed, "sampling", prompt.id, index) for index in range(count)),
            settings.max_tokens,
            settings.temperature,
            settings.top_p,
        )
        for prompt in prompts
    ]


async def sample(
    generate: Generate,
    requests: Sequence[GroupRequest],
    done: Callable[[int], None],
    *,
    max_sequences: int,
) -> list[tuple[Completion, ...]]:
    """The completions of every request, in order.

    Args:
        generate: takes a list of requests.
        max_sequences: what the engines decode at once. Twice as many requests are asked at a time:
            enough to keep them busy, few enough for a call's timeout to be about that call.

    Raises:
        RunError: a prompt could not be answered.
    """
    asking = asyncio.Semaphore(2 * max_sequences)

    async def one(request: GroupRequest) -> tuple[Completion, ...]:
        async with asking:
            (group,) = await generate([request])
        if not isinstance(group, RolloutGroup):
            raise RunError(f"no answer to {request.prompt.id}: {group}")
        done(1)
        return group.completions

    return list(await asyncio.gather(*map(one, requests)))


async def sample_with_engine(
    model: str,
    settings: RolloutSection,
    cluster: ClusterSection,
    requests: Sequence[GroupRequest],
    run: str,
    *,
    say: Callable[[str], None],
    done: Callable[[int], None],
    max_prompt_tokens: int = 256,
) -> list[tuple[Completion, ...]]:
    """The same with an engine of its own, started for it and ended after it."""
    memory = shared_memory_folder(run)
    role = Role(
        "rollout",
        RolloutActor,
        cluster.rollout.model_copy(update={"actors": 1}),
        lambda number: {
            "model": model,
            "settings": settings,
            "max_prompt_tokens": max_prompt_tokens,
            "max_tokens": max(request.max_tokens for request in requests),
            "shared_memory": str(memory),
            "run": run,
            "name": f"rollout-{number}",
            "gpus": cluster.rollout.gpus,
        },
    )
    layout = choose_layout(cluster.cpu_layout)
    handles = await spawn_in_thread([role], layout, timeout_s=cluster.start_timeout_s, say=say)
    engine = handles["rollout"][0]

    async def ask(reference: Any, timeout_s: float = cluster.call_timeout_s) -> Any:
        return await call(reference, "rollout-0", timeout_s)

    try:
        await ask(engine.serve_start_weights.remote())
        return await sample(
            lambda batch: ask(engine.generate.remote(list(batch), 0)),
            requests,
            done,
            max_sequences=settings.max_sequences,
        )
    finally:
        with contextlib.suppress(PavlovError):
            await ask(engine.shutdown.remote(), _CLOSE_S)
