"""Weights from a folder into a module, or one sentence that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.precision import resolve_dtype
from rlhf.errors import ModelError


def load_causal_model(folder: Path, dtype: str, *, attention: str = "sdpa") -> nn.Module:
    """A causal language model from a folder, in evaluation mode.

    Raises:
        ModelError: the weights do not fit the configuration, or the architecture is unknown.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, folder, dtype, attention)


def load_backbone(folder: Path, dtype: str) -> nn.Module:
    """The same without its language-model head: hidden states instead of logits."""
    from transformers import AutoModel

    return _load(AutoModel, folder, dtype, "sdpa")


def _load(kind: Any, folder: Path, dtype: str, attention: str) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoConfig

    try:
        model, report = kind.from_pretrained(
            folder,
            config=_without_dropout(AutoConfig.from_pretrained(folder)),
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
