"""What each layer lets a token of a packed row see, and whether a model keeps to it.

Transformers gives a mask of four dimensions to every layer as it is: a layer that slides a window
over the row has to be told so in its mask. Layers that know more of a row than their mask and its
positions (a recurrent state, a convolution, a bias by distance in columns) cannot be told at all:
models with such layers are refused when they are loaded.

Shapes as in `models.packing`: B rows, L columns, T tokens of a reply; H values a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.packing import PackedBatch, Row, collate
from rlhf.errors import ModelError

Masks = Tensor | dict[str, Tensor]
"""One mask for all layers, or one for each type of layer."""

TOLERANCE = 0.01
"""How far a reply's states in a packed row may be from those it has alone, as a share of how much
they vary from token to token. Measured: 1e-5 for the embedded model, at least 0.1 for every model
that `tests/models/test_masks.py` wants refused."""

_SHORT_WINDOW = 5
"""What a model's windows are set to while it is tried, so that a short row shows them."""


def attention_mask(model: nn.Module, batch: PackedBatch) -> Masks:
    """The packed mask in the form that the model's attention takes, windowed for its layers that
    slide a window: one where all layers see the same, else one for each of its layer types.

    A window counts positions, not columns: every reply sees the end of the prompt. Padding sees
    nothing, and a softmax over nothing is not a number: it is let see everything, which no real
    token reads.
    """
    config: Any = model.config
    config = config.get_text_config()
    types: list[str] = list(getattr(config, "layer_types", None) or [])
    views = {name: _view(config, name) for name in types} or {"": _view(config, None)}
    blind_BLL = ~batch.mask_B1LL.any(dim=-1, keepdim=True)
    masks = {
        view: _in_form(model, config, _seen(batch, *view) | blind_BLL)
        for view in set(views.values())
    }
    if len(masks) == 1:
        return next(iter(masks.values()))
    return {name: masks[view] for name, view in views.items()}


def _view(config: Any, layer_type: str | None) -> tuple[str, int]:
    """How far back layers of a type see: (`window`, `chunk` or `all`, of so many tokens). Where no
    types are told (None) all layers do what the configuration has."""
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    if window is not None and layer_type in (None, "sliding_attention"):
        return "window", window
    if chunk is not None and layer_type in (None, "chunked_attention"):
        return "chunk", chunk
    return "all", 0


def _seen(batch: PackedBatch, kind: str, size: int) -> Tensor:
    query_B1L1 = batch.position_ids_BL[:, None, :, None]
    key_B11L = batch.position_ids_BL[:, None, None, :]
    if kind == "window":
        return batch.mask_B1LL & (query_B1L1 - key_B11L < size)
    if kind == "chunk":
        return batch.mask_B1LL & (query_B1L1 // size == key_B11L // size)
    return batch.mask_B1LL


def _in_form(model: nn.Module, config: Any, mask_B1LL: Tensor) -> Tensor:
    if getattr(config, "_attn_implementation", "sdpa") == "sdpa":
        return mask_B1LL
    dtype = next(model.parameters()).dtype
    bias = torch.zeros(mask_B1LL.shape, dtype=dtype, device=mask_B1LL.device)
    return bias.masked_fill_(~mask_B1LL, torch.finfo(dtype).min)


def require_packable(model: Any, folder: Path) -> None:
    """Refuse a model by which a reply is another one in a packed row than alone.

    Short replies are read packed, and apart by the mask that the model makes itself, with windows
    shortened meanwhile. That is about a model's layers and not about its weights, so it is done in
    float32: the noise of bfloat16 alone moves single states by more than a leak may.

    Raises:
        ModelError: the two differ by more than `TOLERANCE`, or the model cannot read packed rows.
    """
    kind = type(model).__name__
    if "local" in (getattr(model.config, "attention_layers", None) or []):
        raise ModelError(
            f"{folder} cannot be used: {kind} has windows that count columns, so that a reply "
            "which shares a row would see too little of its prompt"
        )
    try:
        with torch.no_grad(), _short_windows(model), _in_float32(model):
            error = packing_error(model)
    except Exception as raised:
        # Whatever a model's own code raises on an input that is not foreseen.
        said = (str(raised) or type(raised).__name__).splitlines()[0]
        raise ModelError(f"{folder} cannot be used: {kind} reads no packed rows ({said})") from None
    # Not the other way round: a state that is not a number is refused too.
    if not error <= TOLERANCE:
        raise ModelError(
            f"{folder} cannot be used: {kind} reads replies that share a row otherwise than each "
            f"alone (by {error:.2g} of how much their tokens differ), as layers do that are "
            "recurrent, convolve, count columns or have windows of a form that is not known here; "
            "take a model whose layers go by the attention mask and positions alone"
        )


def packing_error(model: Any) -> float:
    """How far a short batch's replies are from what they are alone, as `TOLERANCE` counts it."""
    vocabulary = model.config.get_text_config().vocab_size
    # Plain words, one hopes: special tokens stand at the ends of a vocabulary.
    ids = [vocabulary // 4 + 7919 * n % max(1, vocabulary // 2) for n in range(30)]
    # The first reply puts the second far from its prompt; the one on a row of its own has a longer
    # prompt, so that there is padding on either side. All within 16 positions: toys have no more.
    shared = Row(tuple(ids[:6]), (tuple(ids[6:16]), tuple(ids[16:20])), (0, 1))
    single = Row(tuple(ids[20:27]), (tuple(ids[27:30]),), (2,))
    alone_BL = torch.tensor(
        [(*row.prompt, *row.replies[-1]) for row in (shared, single)],
        device=next(model.parameters()).device,
    )
    batch = collate([shared, single], 0, alone_BL.device)
    packed_BLH = _states(
        model(
            input_ids=batch.input_ids_BL,
            attention_mask=attention_mask(model, batch),
            position_ids=batch.position_ids_BL,
            use_cache=False,
        )
    )
    packed_RH = packed_BLH[:, -batch.kept_columns :].flatten(0, 1)
    alone_BLH = _states(model(input_ids=alone_BL, use_cache=False))
    errors = []
    for row, states_LH in zip((shared, single), alone_BLH, strict=True):
        length = len(row.replies[-1])
        wanted_TH = states_LH[-length:]
        found_TH = packed_RH[batch.columns_NT[row.indices[-1], :length]]
        scale = (wanted_TH - wanted_TH.mean(dim=0)).norm().clamp_min(1e-6)
        errors.append((found_TH - wanted_TH).norm() / scale)
    return float(torch.stack(errors).max().detach())


def _states(output: Any) -> Tensor:
    """Of a causal language model its logits, of a backbone its last states: float32, (B, L, H)."""
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found.float()


@contextmanager
def _short_windows(model: Any) -> Iterator[None]:
    configs = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    kept = [
        (config, name, getattr(config, name))
        for config in configs.values()
        for name in ("sliding_window", "attention_chunk_size")
        if isinstance(getattr(config, name, None), int)
    ]
    try:
        for config, name, _ in kept:
            setattr(config, name, _SHORT_WINDOW)
        yield
    finally:
        for config, name, value in kept:
            setattr(config, name, value)


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """A model that computes in float32, one module's weights at a time: there may be no room for
    all of them."""
    narrow: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def widen(module: nn.Module, _inputs: Any) -> None:
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        halves = [tensor for tensor in own if tensor.dtype in (torch.bfloat16, torch.float16)]
        narrow[module] = [(tensor, tensor.data) for tensor in halves]
        for tensor in halves:
            tensor.data = tensor.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for tensor, data in narrow.pop(module):
            tensor.data = data

    hooks = [
        hook
        for module in model.modules()
        for hook in (
            module.register_forward_pre_hook(widen),
            module.register_forward_hook(restore),
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(narrow):
            restore(module)
