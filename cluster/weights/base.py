"""The interface that every weight transport keeps."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.layout import several_nodes
from rlhf.config import ClusterSection
from rlhf.errors import WeightUpdateError


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What a tensor must be when it arrives."""

    dtype: str
    shape: tuple[int, ...]
    checksum: str


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """One version of the weights: where it is to be had, and what must arrive.

    `entries` is empty for mechanisms that carry no checksums of their own (NCCL): there the probe
    alone vouches for the content.
    """

    version: int
    transport: str
    location: Any
    entries: Mapping[str, TensorEntry]


class WeightSender(ABC):
    """The learner's end of a transport. Held by rank 0."""

    sends_from_device = False
    """Whether it wants tensors where the learner computes, and not on the CPU."""

    @abstractmethod
    def prepare(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> WeightManifest:
        """Make the tensors available and say where. Earlier versions may be dropped."""

    def transmit(self) -> None:  # noqa: B027 - most mechanisms have nothing to push
        """Send what was prepared, for mechanisms that push; returns when all engines have it."""

    @abstractmethod
    def close(self) -> None:
        """Drop everything that was made available."""


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, as 16 hexadecimal digits."""
    data: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()[:16]


def entry(tensor: Tensor) -> TensorEntry:
    """The manifest's entry for a tensor."""
    return TensorEntry(str(tensor.dtype), tuple(tensor.shape), checksum(tensor))


def verified(
    tensors: Iterable[tuple[str, Tensor]], entries: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors, each checked against the manifest before it is handed on.

    Raises:
        WeightUpdateError: by the check ``names``, ``shape`` or ``checksum``.
    """
    missing = set(entries)
    for name, tensor in tensors:
        if name not in missing:
            raise WeightUpdateError("names", f"{name} was not announced or came twice")
        missing.remove(name)
        wanted = entries[name]
        if (str(tensor.dtype), tuple(tensor.shape)) != (wanted.dtype, wanted.shape):
            raise WeightUpdateError(
                "shape",
                f"{name} is {tensor.dtype}{list(tensor.shape)}, announced was "
                f"{wanted.dtype}{list(wanted.shape)}",
            )
        if checksum(tensor) != wanted.checksum:
            raise WeightUpdateError("checksum", f"{name} differs from what the learner sent")
        yield name, tensor
    if missing:
        raise WeightUpdateError(
            "names", f"{len(missing)} tensors did not come, {min(missing)} first"
        )


def choose_transport(cluster: ClusterSection, say: Callable[[str], None]) -> ClusterSection:
    """The placement with the configured transport, or where nothing is configured and Ray has
    several nodes, with one that reaches them all. Inside a `ray_session`."""
    if not several_nodes() or "weight_transport" in cluster.model_fields_set:
        return cluster
    say("several nodes: weights travel by Ray's object store")
    return cluster.model_copy(update={"weight_transport": "object_store"})


def make_sender(transport: str, folder: Path) -> WeightSender:
    """The sender of the named transport; `folder` is the run's shared-memory folder."""
    if transport == "shared_memory":
        from cluster.weights.shared_memory import SharedMemorySender

        return SharedMemorySender(folder)
    if transport == "object_store":
        from cluster.weights.object_store import ObjectStoreSender

        return ObjectStoreSender(folder)
    if transport == "nccl":
        from cluster.weights.nccl import NcclSender

        return NcclSender()
    raise ValueError(f"unknown weight transport {transport!r}")


def fetch(manifest: WeightManifest, folder: Path) -> Path:
    """A file on this node with the manifest's tensors, for mechanisms that go through a file.

    Raises:
        WeightUpdateError: by the check ``version``, when it is not to be had, or not any more.
    """
    if manifest.transport == "object_store":
        from cluster.weights.object_store import fetch_to_file

        return fetch_to_file(manifest, folder)
    path = Path(manifest.location)
    if not path.parent.is_dir():
        raise WeightUpdateError(
            "version",
            f"this node has no {path.parent}; where learner and engines are on several nodes, set "
            'cluster.weight_transport = "object_store"',
        )
    if not path.is_file():
        raise WeightUpdateError(
            "version", f"version {manifest.version} is no longer at {path.name}"
        )
    return path
