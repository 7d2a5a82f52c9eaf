"""What Pavlov adds to vLLM's workers: taking new weights from a file, checked tensor by tensor.

vLLM mixes this class into its worker (`worker_extension_cls`). On CPUs with AVX-512 the linear
layers are repacked after loading, so new weights go through vLLM's own `reload_weights`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cluster.weights.base import TensorEntry, verified
from cluster.weights.shared_memory import read_tensors
from models.adapters import are_adapter, merge, require_known
from models.weight_files import read_weights, weight_shapes
from rlhf.errors import WeightUpdateError


class WeightLoader:
    """Worker methods, called by `collective_rpc`. Names are prefixed: the worker has many."""

    model_runner: Any
    pavlov_version: int = -1

    def pavlov_load_weights(
        self, path: str, version: int, entries: Mapping[str, Mapping[str, Any]]
    ) -> str | None:
        """Load one version. Returns None, or ``check: reason`` of the check that refused it.

        A reason instead of an exception: vLLM passes only text through, and would end the engine.
        """
        announced = {
            name: TensorEntry(e["dtype"], tuple(e["shape"]), e["checksum"])
            for name, e in entries.items()
        }
        tensors = read_tensors(Path(path))
        try:
            # The whole update is checked before the first tensor touches the model.
            checked = list(verified(tensors, announced))
        except WeightUpdateError as error:
            return f"{error.check}: {error.detail}"
        try:
            self.pavlov_apply(self.pavlov_merged(dict(checked)))
        except WeightUpdateError as error:
            return f"{error.check}: {error.detail}"
        self.pavlov_version = version
        return None

    def pavlov_merged(self, tensors: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        """The whole model's tensors: as they came, or, of an adapter, the start model's from its
        folder with the difference added."""
        if not are_adapter(tensors):
            return tensors.items()
        folder = Path(self.model_runner.model_config.model)
        # Before the first tensor touches the model; the merged ones are then made one at a time.
        require_known(weight_shapes(folder), tensors)
        return merge(read_weights(folder), tensors, self.model_runner.model_config.dtype)

    def pavlov_apply(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put tensors into the model.

        A head that is tied to the embedding gets no tensor of its own, so on CPU it would keep the
        packed copy made of the old weights (vLLM 0.32; the probe found it): it is packed again.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.model_runner.reload_weights(weights_iterator=iter(tensors))
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def pavlov_loaded_version(self) -> int:
        """The version loaded last, -1 before the first."""
        return self.pavlov_version
