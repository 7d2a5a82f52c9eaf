"""The reference actor: per-token logprobs of completions under the frozen starting model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.gauges import in_ray_actor
from cluster.guard import Guard
from models.chat import ChatTokenizer
from models.loading import load_causal_model
from models.logprobs import TokenLogprobs, reply_logprobs
from models.sources import resolve_model
from rlhf.records import RolloutGroup

GroupLogprobs = tuple[tuple[float, ...], ...]
"""A row per completion."""


class ReferenceActor:
    """A frozen causal language model.

    Args:
        model: its name, which this node resolves.
        dtype: precision of the forward pass.
        temperature: the sampling temperature; logprobs are of the distribution at it.
        batch_tokens: padded tokens a forward pass may hold.
    """

    def __init__(
        self, model: str, dtype: str, temperature: float, batch_tokens: int, gpus: float = 0
    ) -> None:
        self._guard = Guard(with_parent=in_ray_actor())
        folder = resolve_model(model)
        self._module = TokenLogprobs(load_causal_model(folder, dtype))
        self._module.requires_grad_(False)
        if gpus:
            self._module.cuda()
        self._pad_id = ChatTokenizer(folder).pad_id
        self._temperature = temperature
        self._batch_tokens = batch_tokens

    def reference_logprobs(self, groups: Sequence[RolloutGroup]) -> list[GroupLogprobs]:
        """For every group a row per completion, in nats."""
        return group_logprobs(
            self._module,
            groups,
            temperature=self._temperature,
            pad_id=self._pad_id,
            budget_tokens=self._batch_tokens,
        )


def group_logprobs(
    module: TokenLogprobs, groups: Sequence[RolloutGroup], **settings: Any
) -> list[GroupLogprobs]:
    """`reply_logprobs` of all completions, by group."""
    rows = iter(
        reply_logprobs(
            module,
            [group.prompt_token_ids for group in groups for _ in group.completions],
            [completion.token_ids for group in groups for completion in group.completions],
            **settings,
        )
    )
    return [tuple(next(rows) for _ in group.completions) for group in groups]
