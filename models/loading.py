"""Weights from a folder into a module, or one sentence that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.masks import require_packable
from models.precision import resolve_dtype
from rlhf.errors import ModelError


def load_causal_model(folder: Path, dtype: str, *, attention: str | None = None) -> nn.Module:
    """A causal language model from a folder, in evaluation mode.

    Args:
        attention: by what; None: ``sdpa``, or ``eager`` where the model has no other.

    Raises:
        ModelError: the weights do not fit the configuration, the architecture is unknown, or it
            does not read packed rows as it reads single ones.
    """
    from transformers import AutoModelForCausalLM

    model = _load(AutoModelForCausalLM, folder, dtype, attention)
    require_packable(model, folder)
    return model


def load_backbone(folder: Path, dtype: str) -> nn.Module:
    """The same without its language-model head: hidden states instead of logits. Of a model of
    several kinds of input it is the part for text, with that part's configuration.

    Raises:
        ModelError: as `load_causal_model`, or as `text_config`.
    """
    from transformers import AutoModel

    model: Any = _load(AutoModel, folder, dtype, None)
    if text_config(model.config) is not model.config:
        model = model.get_decoder()
    require_packable(model, folder)
    backbone: nn.Module = model
    return backbone


def load_config(folder: Path) -> Any:
    """A model's configuration.

    Raises:
        ModelError: it is damaged, or of an architecture that is unknown.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from None


def text_config(config: Any) -> Any:
    """The part of a configuration that is the text backbone's: of most, the whole.

    Raises:
        ModelError: there are several, or it does not say how many layers there are and how wide.
    """
    kind = type(config).__name__
    try:
        found = config.get_text_config()
    except ValueError:
        raise ModelError(f"{kind} has several text backbones: none of them can be chosen") from None
    for name in ("num_hidden_layers", "hidden_size"):
        if not isinstance(getattr(found, name, None), int):
            raise ModelError(f"{kind} has no text backbone that is known: it lacks {name}")
    return found


def _load(kind: Any, folder: Path, dtype: str, attention: str | None) -> nn.Module:
    from safetensors import SafetensorError

    config = _without_dropout(load_config(folder))
    if attention is None:
        known = kind._model_mapping.get(type(config), None)
        attention = "sdpa" if getattr(known, "_supports_sdpa", True) else "eager"
    try:
        model, report = kind.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, resolve_dtype(dtype)),
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    # Transformers would fill what is missing with random numbers and say so in a warning.
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{folder} cannot be loaded: it lacks {len(missing)} of the model's tensors, "
            f"{missing[0]} first"
        )
    loaded: nn.Module = model.eval()
    return loaded


def _without_dropout(config: Any) -> Any:
    """Engines sample without dropout: a learner with it would compute ratios of noise."""
    for name, value in config.to_dict().items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config
