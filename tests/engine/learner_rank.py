"""A rank of a learner: trains on a made-up batch, resumes, evaluates and sends, case after case in
one process, and leaves what came out in a folder for each."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from actors.engine import TrainingEngine
from actors.learner import LearnerActor
from rlhf.config import LearnerSection, LoRASection, RLSection
from rlhf.records import (
    Completion,
    Message,
    Prompt,
    RolloutGroup,
    TrainingBatch,
    TrainingSequence,
)

CASES: dict[str, Callable[[str], dict[str, Any]]] = {
    "ratio": lambda _: {"kl": {"coefficient": 0.1, "place": "loss"}},
    "whole": lambda _: {"kl": {"coefficient": 0.1, "place": "loss"}},
    # Several optimiser steps a batch, weights against the start, a critic on the policy's state or
    # of its own.
    "weighed": lambda _: {
        "algorithm": {"type": "rloo", "epochs": 2, "mini_batches": 2},
        "off_policy": {"weights": "sequence", "truncate": 5.0, "mask_outside": [1e-6, 1e6]},
    },
    "critic": lambda _: {"algorithm": {"type": "ppo", "epochs": 2, "mini_batches": 2}},
    "own critic": lambda model: {"algorithm": {"type": "ppo", "critic": {"model": model}}},
}
"""Settings of `rl`, from the model's folder."""


def completion(token_ids: tuple[int, ...]) -> Completion:
    logprobs = (-1.0,) * len(token_ids)
    return Completion(token_ids, "x", logprobs, "stop", 0, 0, 0)


# Of several lengths and in an odd number of micro-batches, so that the ranks' shares differ.
SEQUENCES = tuple(
    TrainingSequence(
        tuple(range(5, 12 + index)),
        tuple(range(20, 30 + 3 * index)),
        (-6.0,) * (10 + 3 * index),
        (-1.0) ** index * (1 + index),
        (-5.5,) * (10 + 3 * index),
        (0.0,) * (9 + 3 * index) + ((-1.0) ** index * (1 + index),),
    )
    for index in range(5)
)


def learn(
    model: str, out: Path, case: str, stage: int, rank: int, world_size: int, master: str
) -> None:
    """All that a learner does, once; what comes out goes into `out`."""
    batch = TrainingBatch(SEQUENCES, 64, 1.0, kl_coefficient=0.1, entropy_coefficient=0.01)
    actor = LearnerActor(
        model,
        "float32",
        LearnerSection(
            learning_rate=1e-3,
            zero_stage=stage,
            micro_batch_tokens=4096 if case == "whole" else 48,
        ),
        RLSection.model_validate({"max_tokens": 64} | CASES.get(case, lambda _: {})(model)),
        "float32",
        "shared_memory",
        str(out / "shm"),
        "ranks",
        f"learner-{rank}",
        rank=rank,
        world_size=world_size,
        lora=LoRASection(rank=4, alpha=8) if case == "adapter" else None,
        critic=model if case == "own critic" else None,
    )
    actor.start(master)
    gradients: list[dict[str, torch.Tensor]] = []
    norm = TrainingEngine._gradient_norm

    def spy(engine: TrainingEngine) -> torch.Tensor:
        # After the ranks have added up, before the step.
        gradients.append({name: p.grad.clone() for name, p in engine.module.named_parameters()})
        return norm(engine)

    if stage == 0 and case in ("ratio", "whole"):
        TrainingEngine._gradient_norm = spy
    reports = [actor.step(batch, step) for step in range(2)]
    TrainingEngine._gradient_norm = norm
    actor.save_checkpoint(str(out / "checkpoint"))
    actor.step(batch, 2)
    actor.load_checkpoint(str(out / "checkpoint"))
    reports.append(actor.step(batch, 2))
    groups = [
        RolloutGroup(
            Prompt("p", (Message("user", "?"),)),
            0,
            s.prompt_token_ids,
            (completion(s.completion_token_ids), completion(s.completion_token_ids[:4])),
        )
        for s in SEQUENCES
    ]
    evaluated = actor.evaluate(groups)
    probe = actor.probe()
    manifest = actor.export_weights(3)
    references = actor.reference_logprobs(groups) if case == "adapter" else None
    actor.save_policy(str(out / "policy"))
    if rank == 0:
        assert manifest is not None
        assert manifest.version == 3 and Path(manifest.location).is_file()
        (out / "reports.json").write_text(json.dumps([report.metrics for report in reports]))
        (out / "probe.json").write_text(json.dumps(probe.logprobs))
        (out / "evaluated.json").write_text(json.dumps(evaluated))
        if gradients:
            save_file(gradients[0], out / "gradients.safetensors")
        (out / "references.json").write_text(json.dumps(references))
        if case == "adapter":
            shutil.copy(manifest.location, out / "wire.safetensors")
    actor.shutdown()


if __name__ == "__main__":
    model, out, jobs, rank, world_size, master = sys.argv[1:]
    for case, stage in json.loads(jobs):
        where = Path(out) / f"{case}-{stage}"
        where.mkdir(exist_ok=True)
        learn(model, where, case, stage, int(rank), int(world_size), master)
