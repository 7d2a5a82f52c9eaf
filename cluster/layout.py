"""How many threads each role computes with, and who waits for whom on few cores."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Literal

from rlhf.config import RolePlacement

CpuLayout = Literal["turns", "threads"]
FEW_CORES = 4


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_layout(configured: CpuLayout | None, *, side_by_side: bool = False) -> CpuLayout:
    """The configured layout, or turns on few cores, unless several processes that cannot take turns
    compute side by side.

    Two processes with all threads each get in each other's way: while threads that wait spun, by a
    factor of 26.
    """
    if side_by_side:
        return "threads"
    return configured or ("turns" if usable_cores() <= FEW_CORES else "threads")


def share_of_cores(placements: Iterable[RolePlacement]) -> int:
    """Threads that each of a run's CPU actors may compute with at once, so that they do not stall
    each other; one where several nodes may each have other cores."""
    actors = sum(placement.actors for placement in placements if not placement.gpus)
    return 1 if several_nodes() else max(1, usable_cores() // max(1, actors))


def several_nodes() -> bool:
    """Whether Ray has more nodes than this one; not before it was started or joined."""
    import ray

    return ray.is_initialized() and sum(node["Alive"] for node in ray.nodes()) > 1


def actor_environment(layout: CpuLayout, gpus: float, threads: int = 1) -> dict[str, str]:
    """Environment of an actor: its threads, and where its children find the code.

    Args:
        threads: what it computes with where nobody takes turns; all cores where they do.
    """
    environment = {
        "PYTHONPATH": os.pathsep.join(
            filter(
                None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]
            )
        ),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name in ("PAVLOV_CACHE", "PAVLOV_RUNS", "PAVLOV_DATA", "HF_HOME", "HF_HUB_OFFLINE"):
        if name in os.environ:
            environment[name] = os.environ[name]
    if gpus == 0:
        # Ray sets OMP_NUM_THREADS=1 for an actor of one CPU or less.
        environment |= {
            "OMP_NUM_THREADS": str(usable_cores() if layout == "turns" else threads),
            "VLLM_CPU_OMP_THREADS_BIND": "auto" if layout == "turns" else "nobind",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "DS_ACCELERATOR": "cpu",
        }
    return environment


class Turns:
    """Lets one role compute at a time.

    Generation has the machine whenever nobody else wants it; another role takes its turn with the
    engines paused. With layout ``threads`` and on GPUs every turn is free.
    """

    def __init__(
        self,
        pause: Callable[[], Awaitable[None]],
        resume: Callable[[], Awaitable[None]],
        *,
        enabled: bool,
    ) -> None:
        self._pause = pause
        self._resume = resume
        self._enabled = enabled
        self._lock = asyncio.Lock()

    @property
    def enabled(self) -> bool:
        """Whether roles take turns at all."""
        return self._enabled

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Compute alone until the block ends."""
        if not self._enabled:
            yield
            return
        async with self._lock:
            await self._pause()
            try:
                yield
            finally:
                await self._resume()
