"""Losses as plain functions of tensors. Shapes: B completions, T tokens (padded), N pairs.

A policy loss is a *sum over the tensors given, divided by the size of the whole batch*, so that
micro-batches and ranks simply add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST_LOG_RATIO = 40.0

Normalisation = Literal["sequence", "token", "constant"]


@dataclass(frozen=True, slots=True)
class BatchSize:
    """The size of the whole batch, over all ranks and micro-batches."""

    sequences: int
    tokens: int
    max_tokens: int


def reduce_tokens(
    values_BT: Tensor, mask_BT: Tensor, normalisation: Normalisation, size: BatchSize
) -> Tensor:
    """Masked sum of per-token values, normalised over the whole batch; a scalar.

    ``sequence``: mean over each completion's tokens, then over completions (GRPO).
    ``token``: mean over all tokens of the batch (DAPO).
    ``constant``: sum over tokens divided by completions x `max_tokens` (Dr. GRPO), so that
    neither short nor long completions are favoured.
    """
    masked_BT = values_BT.masked_fill(mask_BT == 0, 0.0) * mask_BT
    if normalisation == "sequence":
        per_sequence_B = masked_BT.sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)
        return per_sequence_B.sum() / size.sequences
    if normalisation == "token":
        return masked_BT.sum() / size.tokens
    return masked_BT.sum() / (size.sequences * size.max_tokens)


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The scalar loss and, per token, the ratio and whether its gradient was clipped away."""

    loss: Tensor
    ratio_BT: Tensor
    clipped_BT: Tensor


def clipped_policy_loss(
    policy_logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    normalisation: Normalisation,
    size: BatchSize,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """The clipped surrogate of Schulman et al. (2017), PPO, equation 7, to be minimised.

    The ratio is taken against `old_logprobs_BT`. Where these are the logprobs of the engine that
    sampled, it also corrects the difference between engine and learner. `advantages_BT` may be one
    a completion, shape (B, 1). With a positive advantage the
    gradient stops above ``1 + clip_high``, with a negative one below ``1 - clip_low``, and with
    `dual_clip` above that ratio too (Ye et al., 2020, Mastering Complex Control, equation 6): a
    token that has become far likelier than it was sampled would else push without bound.
    """
    padding_BT = mask_BT == 0
    mask_BT = mask_BT.to(policy_logprobs_BT.dtype)
    # Padding may hold anything, even NaN, which a product with zero would keep.
    policy_logprobs_BT = policy_logprobs_BT.masked_fill(padding_BT, 0.0)
    old_logprobs_BT = old_logprobs_BT.masked_fill(padding_BT, 0.0)
    log_ratio_BT = policy_logprobs_BT - old_logprobs_BT
    # A whole completion's may be more than float32 holds: beyond, as good as any, and no slope.
    ratio_BT = torch.exp(log_ratio_BT.clamp(max=_LARGEST_LOG_RATIO))
    free_BT = ratio_BT * advantages_BT
    held_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_BT
    surrogate_BT = torch.minimum(free_BT, held_BT)
    clipped_BT = held_BT < free_BT
    if dual_clip is not None:
        floor_BT = (dual_clip * advantages_BT).expand_as(free_BT)
        below_BT = (advantages_BT < 0) & (surrogate_BT < floor_BT)
        surrogate_BT = torch.where(below_BT, floor_BT, surrogate_BT)
        clipped_BT = clipped_BT | below_BT
    loss = -reduce_tokens(surrogate_BT, mask_BT, normalisation, size)
    return PolicyLoss(loss, ratio_BT.detach(), clipped_BT.detach() & ~padding_BT)


def entropy_from_logits(logits_NV: Tensor, normaliser_N: Tensor | None = None) -> Tensor:
    """Exact entropy in nats of each row's softmax; shape (N,).

    log Z - sum p x, whose gradient stays finite where a probability underflows to zero (that of
    -p log p does not). `normaliser_N` is log Z where the caller has it already.
    """
    if normaliser_N is None:
        normaliser_N = torch.logsumexp(logits_NV, dim=-1)
    probabilities_NV = torch.exp(logits_NV - normaliser_N.unsqueeze(-1))
    return normaliser_N - (probabilities_NV * logits_NV).sum(dim=-1)


def bradley_terry_loss(
    margins_N: Tensor,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    wanted_margins_N: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of P(chosen over rejected) = sigmoid(r_chosen - r_rejected); a scalar.

    Bradley & Terry (1952); Christiano et al. (2017), equation 1. `margins_N` are the reward
    differences, `labels_N` the probability that the first is preferred (default 1; a tie is 0.5),
    `weights_N` count each pair (default 1). `wanted_margins_N` is by how much the preferred reply
    must win at least, subtracted from the difference on the preferred side (Touvron et al., 2023,
    Llama 2, equation 2; default 0): a tie has no such side, and a soft label its share of one.
    """
    labels_N = torch.ones_like(margins_N) if labels_N is None else labels_N
    weights_N = torch.ones_like(margins_N) if weights_N is None else weights_N
    if wanted_margins_N is not None:
        margins_N = margins_N - wanted_margins_N * (2 * labels_N - 1)
    losses_N = F.binary_cross_entropy_with_logits(margins_N, labels_N, reduction="none")
    return (losses_N * weights_N).sum() / weights_N.sum()


def centring_loss(sums_N: Tensor, weights_N: Tensor) -> Tensor:
    """Mean square of r_chosen + r_rejected, which keeps rewards around zero; a scalar.

    Bradley-Terry knows differences only, so that a prompt may shift both rewards at will
    (Eisenstein et al., 2023, Helping or Herding?, equation 5).
    """
    return (sums_N.square() * weights_N).sum() / weights_N.sum()
