"""What the bfloat16 probe sees: faults planted between the checksums and the model.

Imported by the process that runs vLLM's model too, by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.vllm_worker import WeightLoader
from rlhf.errors import WeightUpdateError

TENSORS = {
    "embedding": "model.embed_tokens.weight",
    "first query": "model.layers.0.self_attn.q_proj.weight",
    "first gate": "model.layers.0.mlp.gate_proj.weight",
    "middle gate": "model.layers.15.mlp.gate_proj.weight",
    "last down": "model.layers.29.mlp.down_proj.weight",
    "first norm": "model.layers.0.input_layernorm.weight",
    "last norm": "model.norm.weight",
    "every tensor": "",
}
NOISE = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
_GATES = [f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (0, 1)]


class FaultyAfterChecksums(WeightLoader):
    """Loads weights with the fault that `plant` names."""

    fault: tuple[str, str, float] = ("", "", 0.0)
    before: dict[str, Tensor]

    def plant(self, kind: str, name: str, amount: float) -> None:
        """`kind` is noise, stale, swap or bit; an empty `name` is every tensor."""
        self.fault = (kind, name, amount)

    def pavlov_apply(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Spoil what arrived, then load it."""
        named = {name: tensor.clone() for name, tensor in tensors}
        new = dict(named)
        kind, chosen, amount = self.fault
        generator = torch.Generator().manual_seed(0)
        for name in [chosen] if chosen else list(named) if kind else []:
            tensor = named[name]
            if kind == "noise":
                noise = torch.randn(tensor.shape, generator=generator)
                named[name] = tensor + (amount * tensor.float().std() * noise).to(tensor.dtype)
            elif kind == "stale":
                named[name] = self.before[name]
            elif kind == "swap":
                named[_GATES[0]], named[_GATES[1]] = new[_GATES[1]], new[_GATES[0]]
            elif kind == "bit":
                # The highest bit of the exponent: a small number becomes a huge one.
                tensor.view(torch.int16).view(-1)[7] ^= 1 << 14
        self.before = new
        super().pavlov_apply(named.items())


async def sensitivity(folder: Path) -> dict[str, Any]:
    """The gap without a fault, and the smallest planted fault that is refused."""
    from actors.learner import LearnerActor
    from actors.rollout import RolloutActor
    from models.sources import resolve_model
    from rlhf.config import LearnerSection, RLSection, RolloutSection
    from rlhf.records import TrainingBatch, TrainingSequence

    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    model, memory = str(resolve_model("embedded")), f"/dev/shm/pavlov-{folder.name}-{os.getpid()}"
    learner = LearnerActor(
        *(model, "bfloat16", LearnerSection(learning_rate=4e-5), RLSection(), "bfloat16"),
        *("shared_memory", memory, "proof", "learner-0"),
    )
    learner.start(learner.address())
    engine = RolloutActor(
        *(model, RolloutSection(dtype="bfloat16"), 64, 64, memory, "proof", "rollout-0"),
        worker_extension="tests.proofs.probe.FaultyAfterChecksums",
    )

    async def gap(kind: str, name: str, amount: float = 0.0) -> tuple[float, bool]:
        await engine._engine.collective_rpc("plant", args=(kind, name, amount))
        try:
            return await engine.update_weights(manifest, probe), False
        except WeightUpdateError as error:
            assert error.check == "probe", error
            return float("nan"), True

    def publish(version: int) -> tuple[Any, Any]:
        return learner.export_weights(version), learner.probe()

    try:
        manifest, probe = publish(0)
        clean, refused = await gap("", "")
        assert not refused
        figures: dict[str, Any] = {"mean gap without a fault, nats": clean}
        for label, name in TENSORS.items():
            gaps = {}
            for amount in NOISE:
                gaps[amount], refused = await gap("noise", name, amount)
                if refused:
                    break
            figures[f"noise in {label}"] = (
                f"refused from {amount:g} deviations on"
                if refused
                else f"never refused up to {NOISE[-1]:g} deviations"
            ) + f" (gaps below: {', '.join(f'{g:.3f}' for g in gaps.values() if g == g)})"
        for kind, name in (("swap", _GATES[0]), ("bit", _GATES[0])):
            value, refused = await gap(kind, name)
            figures[f"{kind} in a gate projection"] = (
                "refused" if refused else f"not refused ({value:.3f})"
            )
        # One optimiser step on a made-up sequence, and everything left at the version before.
        await gap("", "")
        sequence = TrainingSequence(tuple(range(5, 20)), tuple(range(30, 90)), (-6.0,) * 60, 1.0)
        learner.step(TrainingBatch((sequence,), 64, 1.0), 0)
        earlier = probe
        manifest, probe = publish(1)
        moved = [abs(a - b) for a, b in zip(earlier.logprobs, probe.logprobs, strict=True)]
        figures["one optimiser step moves the probe by, nats"] = sum(moved) / len(moved)
        value, refused = await gap("stale", "")
        figures["every tensor one step old"] = (
            "refused" if refused else f"not refused ({value:.3f})"
        )
        return figures
    finally:
        await engine.shutdown()
        learner.shutdown()
