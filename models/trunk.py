"""The frozen trunk of a reward model: a backbone cut at a layer, one pass, pooled features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.chat import ChatTokenizer
from models.loading import load_backbone
from models.logprobs import attention_mask
from models.packing import TokenIds, collate, micro_batches, pack
from models.precision import resolve_dtype
from models.sources import weights_fingerprint
from rlhf.errors import ModelError
from rlhf.records import Message

_MIN_PROMPT_TOKENS = 32

FAMILIES = 2
"""Features come in families of H: the last token's state, then the reply's mean."""


class Trunk:
    """Features of (conversation, reply): hidden state of the last token, and the reply's mean.

    D = `width` = 2 x hidden size. A finished reply ends with the end-of-turn token, so the
    last-token features know whether the reply was cut off.
    """

    def __init__(
        self,
        folder: Path,
        *,
        depth: float,
        dtype: str,
        max_tokens: int,
        batch_tokens: int,
        device: str = "cpu",
    ) -> None:
        self.tokenizer = ChatTokenizer(folder)
        model: Any = load_backbone(folder, dtype)
        model.requires_grad_(False)
        self.layers = cut_layers(model, depth)
        self.width = FAMILIES * model.config.hidden_size
        self._folder = folder
        self._dtype = resolve_dtype(dtype)
        self._model = model.to(device)
        self._max_tokens = max_tokens
        self._batch_tokens = batch_tokens

    @cached_property
    def fingerprint(self) -> str:
        """What features depend on beside the tokens: weights, tokenizer, template, layers,
        precision, pooling."""
        parts = [
            weights_fingerprint(self._folder),
            self.tokenizer.fingerprint,
            *(str(self.layers), self._dtype, "last+mean"),
        ]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]

    def tokenise(
        self, messages: Sequence[Message], reply: str, *, finished: bool = True
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(prompt ids, reply ids), the prompt cut on the left and the reply on the right.

        Raises:
            ModelError: the reply has no token.
        """
        reply_ids = self.tokenizer.reply_ids(reply, finished=finished)
        if len(reply_ids) == int(finished):
            raise ModelError("an empty reply cannot be scored")
        prompt_ids = self.tokenizer.prompt_ids(messages)
        least = min(_MIN_PROMPT_TOKENS, self._max_tokens // 2)
        kept_prompt = max(least, self._max_tokens - len(reply_ids))
        prompt_ids = prompt_ids[-kept_prompt:]
        return prompt_ids, reply_ids[: self._max_tokens - len(prompt_ids)]

    def features(
        self,
        rows: Sequence[tuple[TokenIds, TokenIds]],
        progress: Callable[[int], None] = lambda count: None,
    ) -> Tensor:
        """Features of tokenised (prompt, reply) rows, float32, shape (N, D).

        Neighbours with the same prompt share its pass. `progress` gets the number of rows done.
        """
        features_ND = torch.empty(len(rows), self.width)
        device = next(self._model.parameters()).device
        packed = pack([prompt for prompt, _ in rows], [reply for _, reply in rows])
        with torch.inference_mode():
            for chunk in micro_batches(packed, self._batch_tokens):
                batch = collate(chunk, self.tokenizer.pad_id, device)
                hidden_BLH = self._model(
                    input_ids=batch.input_ids_BL,
                    attention_mask=attention_mask(self._model, batch),
                    position_ids=batch.position_ids_BL,
                    use_cache=False,
                ).last_hidden_state
                hidden_RH = hidden_BLH[:, -batch.kept_columns :].flatten(0, 1).float()
                mask_NT1 = batch.reply_mask_NT.unsqueeze(-1)
                lengths_N = batch.reply_mask_NT.sum(dim=1)
                last_N = batch.columns_NT.gather(1, (lengths_N - 1).unsqueeze(1)).squeeze(1)
                mean_NH = (hidden_RH[batch.columns_NT] * mask_NT1).sum(dim=1)
                mean_NH = mean_NH / lengths_N.unsqueeze(1)
                pooled_ND = torch.cat([hidden_RH[last_N], mean_NH], dim=1)
                features_ND[list(batch.indices)] = pooled_ND.cpu()
                progress(len(batch.indices))
        return features_ND


def cut_layers(model: Any, depth: float) -> int:
    """Keep the first `depth` share of the model's layers, without the final norm; returns how many.

    Raises:
        ModelError: the architecture keeps its layers where they are not found.
    """
    total = model.config.num_hidden_layers
    stacks = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    if len(stacks) != 1:
        raise ModelError(f"the layers of {type(model).__name__} cannot be cut")
    parent, name = stacks[0]
    kept: int = max(1, round(total * depth))
    setattr(parent, name, getattr(parent, name)[:kept])
    model.config.num_hidden_layers = kept
    if hasattr(model, "norm"):
        model.norm = nn.Identity()
    return kept
