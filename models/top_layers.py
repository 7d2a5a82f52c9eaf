"""Trained layers above a frozen cut: what `top` and `full` members have and probes have not.

A member of kind `top` shares a trunk and goes on with layers of its own; one of kind `full` is the
same with the cut below the first layer, so that all layers are its own and only the embeddings,
which stay frozen, are shared. Shapes: B rows, L columns, H hidden size, N replies, C criteria.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.adapters import add_adapter, are_adapter, merge, require_mergeable
from models.loading import load_backbone
from models.masks import attention_mask
from models.packing import PackedBatch
from rlhf.config import LoRASection
from rlhf.errors import ModelError, WeightUpdateError


class TopLayers(nn.Module):
    """Layers `cut` to `end` of a backbone with its final norm, initialised by it.

    Fed with the state after `cut` layers they give what the backbone gives, bit for bit
    (`tests/models/test_top_layers.py`).

    Args:
        folder: the backbone.
        cut: layers below, which the trunk runs; 0 for all layers of one's own.
        end: the layer that they end with.
        dtype: of the weights.

    Raises:
        ModelError: the backbone has fewer layers, keeps them where they are not found, or does
            more with its embeddings than to pass them on.
    """

    def __init__(self, folder: Path, cut: int, end: int, dtype: str) -> None:
        super().__init__()
        model: Any = load_backbone(folder, dtype)
        _require_plain_embeddings(model)
        keep_layers(model, cut, end)
        # The input is the state after the cut: the embedding is the trunk's.
        model.set_input_embeddings(nn.Identity())
        self.model = model

    def forward(self, hidden_BLH: Tensor, batch: PackedBatch) -> Tensor:
        """The state after the last own layer and the norm, shape (B, L, H)."""
        state: Tensor = self.model(
            inputs_embeds=hidden_BLH.to(next(self.model.parameters()).dtype),
            attention_mask=attention_mask(self.model, batch),
            position_ids=batch.position_ids_BL,
            use_cache=False,
        ).last_hidden_state
        return state

    def recompute_activations(self) -> None:
        """Save memory in training: activations are computed again on the way back."""
        # The reentrant form learns nothing from an input without a gradient of its own.
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def add_adapter(self, settings: LoRASection, seed: int) -> None:
        """Train an adapter in these layers, and nothing else of them.

        Raises:
            ModelError: a layer that `settings.layers` names is not there, or is none that can be
                merged.
        """
        setting = "ensemble.members.lora"
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        self.model = add_adapter(self.model, settings, seed, setting)
        require_mergeable(self.model, shapes, setting)

    def read(self, path: Path) -> TopLayers:
        """Read weights that `write_layers` wrote, in this module's precision; an adapter is merged
        into what these layers are.

        Raises:
            ModelError: they are not of these layers.
        """
        try:
            tensors = load_file(path)
            if are_adapter(tensors):
                dtype = next(self.parameters()).dtype
                tensors = dict(merge(self.state_dict().items(), tensors, dtype))
            self.load_state_dict(tensors)
        except (RuntimeError, OSError, ValueError, SafetensorError, WeightUpdateError) as error:
            raise ModelError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from None
        return self


def write_layers(tensors: dict[str, Tensor], folder: Path) -> str:
    """Write the weights of `TopLayers`, beside and renamed; returns the name of the file, which
    is its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{uuid4().hex}.part"
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, beside)
    name = file_hash(beside)
    beside.rename(folder / f"{name}.safetensors")
    return name


def file_hash(path: Path) -> str:
    """What a file of layers is called."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def keep_layers(model: Any, first: int, end: int) -> None:
    """Keep layers `first` to `end` (exclusive) of a model, in place.

    Raises:
        ModelError: the architecture keeps its layers where they are not found, or has fewer.
    """
    parent, name = _layer_stack(model)
    total = model.config.num_hidden_layers
    if end > total:
        raise ModelError(f"{end} layers are wanted of {type(model).__name__}, which has {total}")
    setattr(parent, name, getattr(parent, name)[first:end])
    model.config = copy.copy(model.config)
    model.config.num_hidden_layers = end - first
    if getattr(model.config, "layer_types", None):
        # Which layers slide a window is told by place: what was cut below must go there too.
        model.config.layer_types = model.config.layer_types[first:end]


@dataclass(slots=True)
class States:
    """What a pass left: the state after so many layers; and the hooks that take it."""

    taken: dict[int, Tensor]
    hooks: list[Any]


def tap_states(model: Any, taps: Set[int]) -> States:
    """Have every pass of a model leave its states after the layers `taps` (0: what the first layer
    gets), raw: before any final norm, whatever that is called."""
    parent, name = _layer_stack(model)
    layers, states = getattr(parent, name), States({}, [])

    def before_first(_: nn.Module, args: Any, kwargs: Any) -> None:
        states.taken[0] = args[0] if args else kwargs["hidden_states"]

    def after(tap: int, output: Any) -> None:
        states.taken[tap] = output[0] if isinstance(output, tuple) else output

    for tap in taps:
        if tap == 0:
            hook = layers[0].register_forward_pre_hook(before_first, with_kwargs=True)
        else:
            hook = layers[tap - 1].register_forward_hook(
                lambda _, args, output, tap=tap: after(tap, output)
            )
        states.hooks.append(hook)
    return states


def _require_plain_embeddings(model: Any) -> None:
    """Refuse a backbone that scales its embeddings or adds positions to them: given hidden states
    instead, it would do so again."""
    states = tap_states(model, {0})
    given_BLH = torch.linspace(-1, 1, 2 * model.config.hidden_size).reshape(1, 2, -1)
    with torch.inference_mode():
        model(inputs_embeds=given_BLH.to(next(model.parameters())), use_cache=False)
    for hook in states.hooks:
        hook.remove()
    seen_BLH = states.taken[0]
    if not torch.equal(seen_BLH.float().cpu(), given_BLH.to(seen_BLH.dtype).float()):
        raise ModelError(
            f"{type(model).__name__} changes its embeddings before the first layer, so that "
            "trained layers cannot be put on a cut; use members of kind probe"
        )


def _layer_stack(model: Any) -> tuple[nn.Module, str]:
    """Where a model keeps its layers: the module that has the list, and the list's name."""
    stacks = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers
    ]
    if len(stacks) != 1:
        raise ModelError(f"the layers of {type(model).__name__} cannot be cut")
    return stacks[0]
