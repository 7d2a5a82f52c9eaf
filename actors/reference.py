"""The reference actor: per-token logprobs of completions under the frozen starting model."""

from __future__ import annotations

from collections.abc import Sequence

from actors.gauges import in_ray_actor
from cluster.guard import Guard
from models.chat import ChatTokenizer
from models.loading import load_causal_model
from models.logprobs import TokenLogprobs, reply_logprobs
from models.sources import resolve_model
from rlhf.records import RolloutGroup


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

    def logprobs(self, groups: Sequence[RolloutGroup]) -> list[tuple[tuple[float, ...], ...]]:
        """For every group a row per completion, in nats."""
        rows = [
            (group.prompt_token_ids, c.token_ids) for group in groups for c in group.completions
        ]
        flat = reply_logprobs(
            self._module,
            [prompt for prompt, _ in rows],
            [completion for _, completion in rows],
            temperature=self._temperature,
            pad_id=self._pad_id,
            budget_tokens=self._batch_tokens,
        )
        results, begin = [], 0
        for group in groups:
            end = begin + len(group.completions)
            results.append(tuple(flat[begin:end]))
            begin = end
        return results
