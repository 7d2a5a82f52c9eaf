"""A driver with a fleet on a tiny model, idle or busy, for `tests/proofs/foundation.py` to kill at.

    python -m tests.proofs.fleet_driver MODEL REWARD idle|busy

Prints one JSON line with the process numbers of everything once it is up and, when busy, once it
has taken a step. Busy means that generation, scoring and learning go on all the time, at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil

from cluster.session import ray_session, shared_memory_folder
from rlhf.config import RLConfig, parse_config
from rlhf.prompts import PromptCursor
from rlhf.records import Message, Prompt
from trainers.fleet import Fleet, Models
from trainers.loop import Loop

PROMPTS = [Prompt(word, (Message("user", f"Tell me about {word}."),)) for word in "abcdefgh"]


def main() -> None:
    """Start, say so, and go on until killed."""
    model, reward, state = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    config = parse_config(
        RLConfig,
        {
            "policy": {"model": str(model), "dtype": "float32"},
            "reference": {"dtype": "float32"},
            "reward": {"model": str(reward)},
            "data": {"prompts": ["unused"], "max_prompt_tokens": 64},
            "rl": {
                "num_steps": 10**6,
                "prompts_per_step": 2,
                "completions_per_prompt": 4,
                "max_tokens": 400,
                "max_staleness": 2,
            },
            "rollout": {"dtype": "float32", "max_sequences": 16},
            "cluster": {"cpu_layout": "threads"},
        },
        "proof",
    )
    with ray_session("proof", num_cpus=2) as namespace:
        asyncio.run(_live(config, Models(model, model, reward), namespace, state))


async def _live(config: RLConfig, models: Models, namespace: str, state: str) -> None:
    memory = shared_memory_folder(namespace)
    fleet = await Fleet.start(config, models, namespace, memory, lambda text: None)
    try:
        if state == "idle":
            await fleet.publish(0)
            say()
            await asyncio.sleep(3600)

        async def record(step: int, metrics: dict[str, Any], groups: Any) -> None:
            if step == 0:
                say()

        await Loop(config, PromptCursor(PROMPTS, 0), fleet, record).run()
    finally:
        await fleet.close()


def say() -> None:
    """Name the processes below this one."""
    pids = {"driver": os.getpid()}
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline())
        for role in ("rollout", "reward", "reference", "learner"):
            if title.startswith("ray::") and f"{role.capitalize()}Actor" in title:
                pids[f"{role}-0"] = process.pid
        if process.name() == "raylet":
            pids["raylet"] = process.pid
        if title.startswith("VLLM::EngineCore"):
            pids["engine core"] = process.pid
    print(json.dumps(pids), flush=True)


if __name__ == "__main__":
    main()
