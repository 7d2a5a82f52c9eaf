"""Weights between GPUs: vLLM's own NCCL weight-transfer engine. Not yet run (see docs/gpu.md).

The learner's rank 0 is NCCL rank 0 and broadcasts; vLLM's trainer engine drives the engines'
control plane through the rollout actors, which forward its four calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from cluster.session import free_port, node_address
from cluster.weights.base import WeightManifest, WeightSender


class NcclSender(WeightSender):
    """Broadcasts to all engines at once."""

    sends_from_device = True

    def __init__(self) -> None:
        self._tensors: list[tuple[str, Tensor]] = []
        self._engine: Any = None

    def connect(self, rollouts: Sequence[Any], ranks_per_engine: int) -> None:
        """Join a process group with every engine rank. Called once, with Ray actor handles."""
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self._engine = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(
                rank=0,
                master_address=node_address(),
                master_port=free_port(),
                world_size=1 + len(rollouts) * ranks_per_engine,
            ),
            client=_EngineClient(rollouts, ranks_per_engine),
            source=_source(self._tensors),
        )

    def prepare(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> WeightManifest:
        """Keep the tensors for `transmit`; there is nothing to fetch."""
        self._tensors[:] = tensors
        return WeightManifest(version, "nccl", None, {})

    def transmit(self) -> None:
        """Broadcast; vLLM's engine starts, feeds and finishes the update on the other side."""
        self._engine.send_weights()

    def close(self) -> None:
        """Leave the process group."""
        if self._engine is not None:
            self._engine.shutdown()


class _EngineClient:
    """vLLM's control plane over rollout actors: its four calls, fanned out to every engine.

    vLLM's own Ray client gives every engine the same rank; here each gets its own ranks.
    """

    def __init__(self, rollouts: Sequence[Any], ranks_per_engine: int) -> None:
        self._rollouts = rollouts
        self._ranks = ranks_per_engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [
            init_info | {"rank_offset": 1 + index * self._ranks}
            for index in range(len(self._rollouts))
        ]
        self._call("init_weight_transfer", [(info,) for info in infos])

    def start_weight_update(self) -> None:
        self._call("start_weight_transfer", [()] * len(self._rollouts))

    def update_weights(self, update_info: Any) -> None:
        self._call("receive_weight_transfer", [(update_info,)] * len(self._rollouts))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_transfer", [()] * len(self._rollouts))

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        import ray

        pairs = zip(self._rollouts, arguments, strict=True)
        ray.get([getattr(rollout, method).remote(*args) for rollout, args in pairs], timeout=600)


def _source(tensors: list[tuple[str, Tensor]]) -> Any:
    """vLLM's `WeightSource` over a list that is replaced in place for every version."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class ListSource(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in tensors]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(tensors)

    return ListSource()
