"""Importance weights: what a completion is worth to a policy that did not sample it like this.

Completions come from an engine in another precision, and with `max_staleness` from older weights.
With w = learner/engine, the chances that the two give what was sampled, E_engine[w f] is
E_learner[f]. Two ways to use it:

- none (the default): the loss's own ratio is taken against the engine's logprobs. It is w on the
  step's first update, and its clip bounds it where that matters for the gradient's direction;
- `token` or `sequence`: credit is multiplied by w, cut from above, and the loss's ratio is against
  the learner's own logprobs at the start of the step, so that the clip speaks of this step's
  updates alone (Hilton et al., 2022, Batch Size-Invariance for Policy Optimization, section 3).

A weight of whole completions has no bias but much variance. One of tokens leaves the prefixes to
whoever sampled them: small variance, and a bias that grows with the lag. Cutting (Espeholt et al.,
2018, IMPALA, section 4) and leaving out add bias for less variance.

Shapes: B completions, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.config import OffPolicySection


@dataclass(frozen=True, slots=True)
class ImportanceWeights:
    """`ratios_BT` as they are, `weights_BT` as credit is multiplied by them, and which of them were
    cut or left out; all zero (False) at padding."""

    ratios_BT: Tensor
    weights_BT: Tensor
    truncated_BT: Tensor
    masked_BT: Tensor


def importance_weights(
    start_logprobs_BT: Tensor,
    rollout_logprobs_BT: Tensor,
    mask_BT: Tensor,
    settings: OffPolicySection,
) -> ImportanceWeights:
    """The weights of a step's tokens; without `settings.weights` all are 1 and the ratios, for the
    metrics, those of tokens."""
    real_BT = mask_BT > 0
    log_ratio_BT = (start_logprobs_BT - rollout_logprobs_BT).detach().masked_fill(~real_BT, 0.0)
    if settings.weights == "sequence":
        log_ratio_BT = log_ratio_BT.sum(dim=1, keepdim=True).expand_as(log_ratio_BT)
    # Not by a product: a ratio may be infinite.
    ratios_BT = torch.exp(log_ratio_BT).masked_fill(~real_BT, 0.0)
    if settings.weights is None:
        none_BT = torch.zeros_like(real_BT)
        return ImportanceWeights(ratios_BT, real_BT.to(ratios_BT.dtype), none_BT, none_BT)
    low, high = settings.mask_outside or (0.0, float("inf"))
    masked_BT = real_BT & ((ratios_BT < low) | (ratios_BT > high))
    truncated_BT = real_BT & ~masked_BT & (ratios_BT > settings.truncate)
    weights_BT = ratios_BT.clamp(max=settings.truncate).masked_fill(masked_BT, 0.0)
    return ImportanceWeights(ratios_BT, weights_BT, truncated_BT, masked_BT)


def effective_share(weights: float, squares: float, count: float) -> float:
    """Kish's effective sample size over the sample size, from the sums of the weights, of their
    squares and of ones: 1 where all weigh the same, 1/n where one stands for all."""
    # The sums are rounded: they may say a hair more than there can be.
    return min(1.0, weights**2 / (count * squares)) if squares else 0.0
