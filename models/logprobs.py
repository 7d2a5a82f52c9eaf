"""Log-probabilities of replies under a causal language model, on packed rows.

Shapes as in `models.packing`: B rows, N replies of up to T tokens; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.masks import attention_mask
from models.packing import PackedBatch, TokenIds, collate, packed_batches
from rlhf.losses import entropy_from_logits


class TokenLogprobs(nn.Module):
    """A causal language model whose output is logprobs and entropy of reply tokens, and what a
    critic expects before each of them, where there is one.

    A module of its own, so that DeepSpeed wraps exactly what is computed.
    """

    def __init__(self, model: nn.Module, critic: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.critic = critic

    def forward(
        self, batch: PackedBatch, temperature: float, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logprobs_NT, entropy_NT, values_NT), the first two in nats, float32, of the distribution
        at `temperature`."""
        logits_BKV = self.model(
            input_ids=batch.input_ids_BL,
            attention_mask=attention_mask(self.model, batch),
            position_ids=batch.position_ids_BL,
            logits_to_keep=batch.kept_columns,
            use_cache=False,
        ).logits
        logits_RV = logits_BKV.flatten(0, 1).float() / temperature
        normaliser_R = torch.logsumexp(logits_RV, dim=-1)
        chosen_NT = logits_RV[batch.predictors_NT, batch.reply_ids_NT]
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy_R = entropy_from_logits(logits_RV, normaliser_R)
        logprobs_NT = chosen_NT - normaliser_R[batch.predictors_NT]
        values_NT = None if self.critic is None else self.critic(batch)
        return logprobs_NT, entropy_R[batch.predictors_NT], values_NT


def reply_logprobs(
    module: TokenLogprobs,
    prompts: Sequence[TokenIds],
    replies: Sequence[TokenIds],
    *,
    temperature: float,
    pad_id: int,
    budget_tokens: int,
) -> list[tuple[float, ...]]:
    """Logprobs of each reply's tokens, in the order given, without gradients."""
    results: list[tuple[float, ...]] = [()] * len(replies)
    device = next(module.parameters()).device
    with torch.inference_mode():
        for rows in packed_batches(prompts, replies, budget_tokens):
            batch = collate(rows, pad_id, device)
            logprobs_NT, _, _ = module(batch, temperature)
            for row, index in zip(logprobs_NT.tolist(), batch.indices, strict=True):
                results[index] = tuple(row[: len(replies[index])])
    return results
