"""Weights between nodes without a shared GPU fabric: Ray's object store."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.weights.base import WeightManifest, WeightSender, entry
from cluster.weights.shared_memory import write_tensors
from rlhf.errors import WeightUpdateError


class ObjectStoreSender(WeightSender):
    """Puts each version into the object store and holds on to the newest."""

    def __init__(self, folder: Path) -> None:
        self._held: Any = None

    def prepare(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> WeightManifest:
        """Put the bytes of every tensor; receivers map them without a copy."""
        import ray

        named = {name: tensor.contiguous() for name, tensor in tensors}
        entries = {name: entry(tensor) for name, tensor in named.items()}
        raw = {name: tensor.view(-1).view(torch.uint8).numpy() for name, tensor in named.items()}
        self._held = ray.put(raw)
        # In a list: a bare reference among the arguments of a call would be resolved to its value.
        return WeightManifest(version, "object_store", [self._held], entries)

    def close(self) -> None:
        """Let go of the newest version."""
        self._held = None


def fetch_to_file(manifest: WeightManifest, folder: Path, timeout_s: float = 300) -> Path:
    """Bring a version to this node's shared memory, where the engine's workers can map it."""
    import ray

    try:
        raw = ray.get(manifest.location[0], timeout=timeout_s)
    except ray.exceptions.RayError as error:
        raise WeightUpdateError(
            "version", f"version {manifest.version} is not to be had: {type(error).__name__}"
        ) from None
    tensors = {}
    for name, data in raw.items():
        wanted = manifest.entries[name]
        dtype = getattr(torch, wanted.dtype.removeprefix("torch."))
        tensors[name] = torch.from_numpy(data.copy()).view(dtype).view(wanted.shape)
    path = write_tensors(tensors, folder, f"version-{manifest.version}")
    for old in folder.glob("version-*.safetensors"):
        if old != path:
            old.unlink(missing_ok=True)
    return path
