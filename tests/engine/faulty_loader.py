"""vLLM's worker with faults between the checksums and the model, where only the probe looks.

Imported by the process that runs vLLM's model, by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from actors.vllm_worker import WeightLoader


class FaultyLoader(WeightLoader):
    """Loads weights with the fault that `plant` names."""

    fault = ""
    before: dict[str, Tensor]

    def plant(self, fault: str) -> None:
        self.fault = fault

    def pavlov_load_weights(
        self, path: str, version: int, entries: Mapping[str, Mapping[str, Any]]
    ) -> str | None:
        if self.fault == "skip":
            return None
        return super().pavlov_load_weights(path, version, entries)

    def pavlov_apply(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        named = {name: tensor.clone() for name, tensor in tensors}
        new = dict(named)
        layer = "model.layers.{}.mlp.gate_proj.weight"
        first, second = layer.format(0), layer.format(1)
        if self.fault == "stale":
            named[first] = self.before[first]
        elif self.fault == "swap":
            named[first], named[second] = named[second], named[first]
        elif self.fault == "bit":
            # The highest bit of the exponent that is off: a small number becomes a huge one.
            named[first].view(torch.int32).view(-1)[7] ^= 1 << 30
        self.before = new
        super().pavlov_apply(named.items())
