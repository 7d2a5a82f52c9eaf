"""Weights between processes of one node: a safetensors file in shared memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from cluster.weights.base import WeightManifest, WeightSender, entry


class SharedMemorySender(WeightSender):
    """Writes each version beside and renames it, then drops the one before the last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> WeightManifest:
        """Write the file. A sender that was replaced may write the same version again."""
        named = dict(tensors)
        path = write_tensors(named, self._folder, f"version-{version}")
        for old in self._folder.glob("version-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)
        entries = {name: entry(tensor) for name, tensor in named.items()}
        return WeightManifest(version, "shared_memory", str(path), entries)

    def close(self) -> None:
        """Remove every version."""
        for path in self._folder.glob("version-*.safetensors"):
            path.unlink(missing_ok=True)


def write_tensors(tensors: dict[str, Tensor], folder: Path, name: str) -> Path:
    """Write a safetensors file beside and rename it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    beside, path = folder / f".{name}.part", folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside)
    beside.rename(path)
    return path


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file, one at a time."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            yield name, file.get_tensor(name)
