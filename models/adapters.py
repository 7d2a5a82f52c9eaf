"""LoRA: a policy that is the start model and a small difference, and how the difference travels.

Hu et al. (2021), LoRA: Low-Rank Adaptation of Large Language Models, section 4.1: a linear layer's
weight is W + (alpha / r) B A, and only A (r, in) and B (out, r) are trained. Layers are put in by
peft.

On its way to an engine an adapter is two tensors a layer, ``<layer>.lora_A`` and
``<layer>.lora_B``, with the scale inside B: whoever has the start model can merge it and need not
know more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config import LoRASection
from rlhf.errors import ModelError, WeightUpdateError

_NAME = "default"
"""What peft calls an adapter that is given no name."""
_ENDS = {f".lora_{side}.{_NAME}.weight": f".lora_{side}" for side in "AB"}
_BASE = ".base_layer."


def add_adapter(
    model: Any, settings: LoRASection, seed: int, setting: str = "policy.lora"
) -> nn.Module:
    """The model with adapters in its linear layers, in place; nothing else is trained. A begins
    random, B at zero. `setting` is what the user wrote `settings` as.

    Raises:
        ModelError: a layer that `settings.layers` names is not there, or is none that can be
            merged: linear, and not a head that is tied to the embedding.
    """
    from peft import inject_adapter_in_model

    _require_layers(model, settings, setting)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted: nn.Module = inject_adapter_in_model(_peft_config(settings), model)
    except ValueError as error:
        raise ModelError(f"{setting}: {str(error).splitlines()[0]}") from None
    return adapted


def _require_layers(model: Any, settings: LoRASection, setting: str) -> None:
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    for wanted in settings.layers or ():
        found = [
            module
            for name, module in model.named_modules()
            if name == wanted or name.endswith(f".{wanted}")
        ]
        if not found:
            raise ModelError(f"{setting}.layers: the model has no layer {wanted!r}")
        if not all(isinstance(module, nn.Linear) for module in found):
            raise ModelError(f"{setting}.layers: {wanted!r} is no linear layer")
        if tied and any(module is head for module in found):
            raise ModelError(
                f"{setting}.layers: {wanted!r} is tied to the embedding and has no weight of its "
                "own to adapt"
            )


def require_mergeable(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], setting: str = "policy.lora"
) -> None:
    """Refuse adapters that could not be merged into the start model; `shapes` are of its tensors.

    Raises:
        ModelError: a layer has no weight of its own there, or one of another shape.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            there = shapes.get(f"{name}.weight")
            if not isinstance(base, nn.Linear) or there != tuple(base.weight.shape):
                raise ModelError(
                    f"{setting}: the adapter of {name} cannot be merged into the start model's "
                    f"tensors ({type(base).__name__}, {there or 'not there'}); name other layers "
                    f"in {setting}.layers, or train all weights"
                )


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The start model for a while: adapters are passed over."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def are_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these names are an adapter as it travels, and nothing else."""
    return all(name.endswith((".lora_A", ".lora_B")) for name in names)


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted model belongs to the adapter."""
    return name.endswith(tuple(_ENDS))


def on_the_wire(
    parameters: Iterable[tuple[str, Tensor]], settings: LoRASection
) -> Iterator[tuple[str, Tensor]]:
    """An adapter's parameters under the names that they travel by, the scale inside B."""
    for name, tensor in parameters:
        end = next(end for end in _ENDS if name.endswith(end))
        scale = settings.alpha / settings.rank if end.startswith(".lora_B") else 1.0
        yield name.removesuffix(end) + _ENDS[end], scale * tensor


def require_known(names: Iterable[str], adapter: Mapping[str, Tensor]) -> None:
    """Refuse an adapter of layers that a model with tensors of these names has not.

    Raises:
        WeightUpdateError: by the check ``names``.
    """
    layers = {name.removesuffix(".weight") for name in names}
    if left := [name for name in adapter if name.rpartition(".")[0] not in layers]:
        raise WeightUpdateError("names", f"the start model has no layer for {min(left)}")


def merge(
    start: Iterable[tuple[str, Tensor]], adapter: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The start model's tensors, those with a difference added in `dtype`.

    The sum is taken in float32. In bfloat16 it keeps a difference down to some 1/256 of the weight
    that it is added to, as weights that are trained whole and sent in bfloat16 do.

    Raises:
        WeightUpdateError: by the check ``names``, where the adapter has layers that are not there.
    """
    left = dict(adapter)
    for name, tensor in start:
        plain = name.replace(_BASE, ".")
        layer = plain.removesuffix(".weight")
        low, high = left.pop(f"{layer}.lora_A", None), left.pop(f"{layer}.lora_B", None)
        if low is not None and high is not None:
            tensor = (tensor.float() + high.float() @ low.float()).to(dtype)
        yield plain, tensor
    if left:
        raise WeightUpdateError("names", f"the start model has no layer for {min(left)}")


def save_adapter(adapter: Mapping[str, Tensor], settings: LoRASection, folder: Path) -> None:
    """Write what travels as a folder that peft reads."""
    from safetensors.torch import save_file

    folder.mkdir()
    unscaled = {
        f"base_model.model.{name}.weight": (
            tensor * (settings.rank / settings.alpha) if name.endswith(".lora_B") else tensor
        ).contiguous()
        for name, tensor in adapter.items()
    }
    save_file(unscaled, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _peft_config(settings).save_pretrained(str(folder))


def _peft_config(settings: LoRASection) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.layers or "all-linear",
        # Engines sample without dropout.
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
