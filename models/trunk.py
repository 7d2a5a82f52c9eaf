"""The frozen trunk of a reward model: a backbone cut at a layer, one pass, pooled features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from models.chat import ChatTokenizer
from models.loading import load_backbone, load_config, text_config
from models.masks import attention_mask
from models.packing import PackedBatch, Row, TokenIds, collate, packed_batches
from models.precision import resolve_dtype
from models.sources import weights_fingerprint
from models.top_layers import TopLayers, keep_layers, tap_states
from rlhf.errors import ModelError
from rlhf.records import Message
from rlhf.rows import prompt_room, reply_room

COMPUTATION = 2
"""Which way features are computed, a part of what kept ones are found by. Whoever changes what they
come to (`Trunk.run`, `pool`, the taps, the masks, how rows are packed) adds one, so that features
of before are not taken for those of now. 2: layers that slide a window do."""

TokenRow = tuple[TokenIds, TokenIds]
"""Prompt and reply."""

Pooling = Literal["last", "mean", "max"]


@dataclass(frozen=True, slots=True, order=True)
class Family:
    """How a reply becomes a vector: the state after `layers` layers, of its last token, or the mean
    or the maximum of each value over its tokens. A finished reply ends with the end-of-turn token,
    so the last token's state knows whether the reply was cut off.

    With `own` (the name of trained layers) the frozen layers end at `layers` and the named ones go
    on from there.
    """

    layers: int
    pooling: Pooling
    own: str = ""

    def __str__(self) -> str:
        return f"{self.pooling}@{self.layers}" + (f"+{self.own}" if self.own else "")


@dataclass(frozen=True, slots=True)
class TrunkPass:
    """What one micro-batch left behind: the state after each layer that was asked for, in the
    flush layout of `models.packing`."""

    batch: PackedBatch
    states: dict[int, Tensor]
    own: Mapping[str, TopLayers]

    def pooled(self, family: Family) -> Tensor:
        """Features of the batch's replies, float32, shape (n, H)."""
        state = self.states[family.layers]
        if family.own:
            state = self.own[family.own](state, self.batch)
        return pool(state, self.batch, family.pooling)


def pool(hidden_BLH: Tensor, batch: PackedBatch, pooling: Pooling) -> Tensor:
    """One vector a reply, float32, shape (n, H)."""
    hidden_RH = hidden_BLH.flatten(0, 1)
    lengths_N = batch.reply_mask_NT.sum(dim=1)
    if pooling == "last":
        last_N1 = batch.columns_NT.gather(1, (lengths_N - 1).unsqueeze(1))
        return hidden_RH[last_N1.squeeze(1)].float()
    hidden_NTH = hidden_RH[batch.columns_NT].float()
    mask_NT1 = batch.reply_mask_NT.unsqueeze(-1)
    if pooling == "max":
        return hidden_NTH.masked_fill(mask_NT1 == 0, float("-inf")).amax(dim=1)
    return (hidden_NTH * mask_NT1).sum(dim=1) / lengths_N.unsqueeze(1)


class Trunk:
    """Features of (conversation, reply) under a frozen backbone.

    Args:
        folder: the backbone.
        families: what a reply becomes, F vectors of the hidden size H; the deepest one decides how
            many layers are run.
        dtype: precision of the pass.
        max_tokens: of a row. A prompt keeps its last third of them, whatever the reply, so that
            replies to one prompt share its pass; a reply gets what the prompt leaves.
        batch_tokens: padded tokens a forward pass may hold.
        own: trained layers by the name that families call them.
    """

    def __init__(
        self,
        folder: Path,
        families: Sequence[Family],
        *,
        dtype: str,
        max_tokens: int,
        batch_tokens: int,
        device: str = "cpu",
        own: Mapping[str, TopLayers] | None = None,
    ) -> None:
        self.tokenizer = ChatTokenizer(folder)
        self._dtype = resolve_dtype(dtype, device)
        model: Any = load_backbone(folder, self._dtype)
        model.requires_grad_(False)
        self.families = tuple(families)
        self.layers = max(family.layers for family in families)
        # State 0 is what the first layer gets, so one layer is there to get it.
        keep_layers(model, 0, max(1, self.layers))
        self._states = tap_states(model, {family.layers for family in families})
        self.width = int(model.config.hidden_size)
        self._folder = folder
        self._model = model.to(device)
        self._own = {name: layers.to(device).eval() for name, layers in (own or {}).items()}
        self._max_tokens = max_tokens
        self._batch_tokens = batch_tokens

    @cached_property
    def fingerprint(self) -> str:
        """What features depend on beside tokens and family: weights, tokenizer, template,
        precision, and the way they are computed."""
        parts = [
            weights_fingerprint(self._folder),
            self.tokenizer.fingerprint,
            self._dtype,
            f"computation {COMPUTATION}",
        ]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]

    def tokenise(
        self, messages: Sequence[Message], reply: str, *, finished: bool = True
    ) -> TokenRow:
        """(prompt ids, reply ids), the prompt cut on the left and the reply on the right.

        Raises:
            ModelError: the reply has no token, or the chat template refuses the conversation.
        """
        prompt_ids, reply_ids = self._whole(messages, reply, finished)
        return (
            prompt_ids[-prompt_room(self._max_tokens) :],
            reply_ids[: reply_room(self._max_tokens, len(prompt_ids))],
        )

    def reads_to_its_end(
        self, row: TokenRow, messages: Sequence[Message], reply: str, *, finished: bool = True
    ) -> bool:
        """Whether `row`, which `tokenise` made of the others, has the whole reply."""
        # A row that has room left has: only a full one is looked into again.
        if sum(map(len, row)) < self._max_tokens:
            return True
        return len(self._whole(messages, reply, finished)[1]) == len(row[1])

    def _whole(self, messages: Sequence[Message], reply: str, finished: bool) -> TokenRow:
        reply_ids = self.tokenizer.reply_ids(reply, finished=finished)
        if len(reply_ids) == int(finished):
            raise ModelError("an empty reply cannot be scored")
        return self.tokenizer.prompt_ids(messages), reply_ids

    def features(
        self, rows: Sequence[TokenRow], progress: Callable[[int], None] = lambda count: None
    ) -> Tensor:
        """Features of tokenised rows in the order given, float32, shape (N, F, H).

        `progress` gets the number of rows done.
        """
        features_NFH = torch.empty(len(rows), len(self.families), self.width)
        for indices, part_nFH in self.stream(rows):
            features_NFH[list(indices)] = part_nFH
            progress(len(indices))
        return features_NFH

    def stream(self, rows: Sequence[TokenRow]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """The same as it comes: (which rows, their features (n, F, H)), the longest rows first."""
        for part in self.passes(rows):
            with torch.inference_mode():
                pooled = torch.stack([part.pooled(family) for family in self.families], dim=1)
            # A plain copy: an inference tensor could not be trained on.
            yield part.batch.indices, pooled.cpu().clone()

    def passes(self, rows: Sequence[TokenRow]) -> Iterator[TrunkPass]:
        """One forward pass a micro-batch. Neighbours with the same prompt share its part of it."""
        prompts, replies = [prompt for prompt, _ in rows], [reply for _, reply in rows]
        for chunk in packed_batches(prompts, replies, self._batch_tokens, aligned=False):
            yield self.run(chunk)

    def run(self, rows: Sequence[Row]) -> TrunkPass:
        """One forward pass over packed rows."""
        device = next(self._model.parameters()).device
        batch = collate(rows, self.tokenizer.pad_id, device, aligned=False)
        with torch.inference_mode():
            self._model(
                input_ids=batch.input_ids_BL,
                attention_mask=attention_mask(self._model, batch),
                position_ids=batch.position_ids_BL,
                use_cache=False,
            )
        states, self._states.taken = self._states.taken, {}
        return TrunkPass(batch, states, self._own)


def layers_at(folder: Path, depth: float) -> int:
    """How many layers `depth` is of a model's, at least one.

    Raises:
        ModelError: as `load_config` and `text_config`.
    """
    total: int = text_config(load_config(folder)).num_hidden_layers
    return max(1, round(total * depth))
