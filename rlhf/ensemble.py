"""How a family of reward models becomes one reward and one doubt.

Shapes: K members, N completions. Members are standardised before they get here: each has mean 0
and deviation 1 on held-out replies, so that no member outvotes another by scale.
"""

from __future__ import annotations

import torch
from torch import Tensor


def standardise(scores_KN: Tensor, mean_K: Tensor, deviation_K: Tensor) -> Tensor:
    """Each member's scores by its own mean and deviation (both stored with the reward model)."""
    return (scores_KN - mean_K.unsqueeze(1)) / deviation_K.unsqueeze(1)


def disagreement(rewards_KN: Tensor) -> Tensor:
    """Standard deviation over members (population form, so that K = 1 gives 0); shape (N,).

    Lakshminarayanan et al. (2017), deep ensembles: members agree where they saw data.
    """
    return rewards_KN.std(dim=0, correction=0)


def aggregate(rewards_KN: Tensor, *, disagreement_penalty: float = 0.0) -> Tensor:
    """Mean over members minus `disagreement_penalty` standard deviations; shape (N,).

    Coste et al. (2024), Reward Model Ensembles Help Mitigate Overoptimization, section 3.3
    (uncertainty-weighted optimisation).
    """
    return rewards_KN.mean(dim=0) - disagreement_penalty * disagreement(rewards_KN)


def quantile_threshold(values_N: Tensor, false_alarm_rate: float) -> float:
    """Smallest threshold that at most `false_alarm_rate` of exchangeable values exceed.

    The split-conformal quantile, order statistic ceil((N + 1)(1 - rate)) (Vovk et al., 2005);
    infinite when N is too small to promise the rate.
    """
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate must lie in (0, 1), got {false_alarm_rate}")
    count = values_N.numel()
    rank = -int(-((count + 1) * (1 - false_alarm_rate)) // 1)
    if rank > count:
        return float("inf")
    return float(torch.sort(values_N).values[rank - 1])


def expected_calibration_error(
    probabilities_N: Tensor, outcomes_N: Tensor, *, bins: int = 10
) -> float:
    """ECE over bins of equal mass: mean |confidence - accuracy|, weighted by bin size.

    `probabilities_N` are of the outcome 1. Confidence is max(p, 1 - p) and an outcome counts as
    right when the likelier side won (Guo et al., 2017, equation 3, with equal-mass bins).
    """
    confidence_N = torch.maximum(probabilities_N, 1 - probabilities_N)
    right_N = ((probabilities_N > 0.5) == (outcomes_N > 0.5)).to(confidence_N.dtype)
    order = torch.argsort(confidence_N)
    error = 0.0
    for index in torch.tensor_split(order, min(bins, max(1, order.numel()))):
        gap = (confidence_N[index].mean() - right_N[index].mean()).abs()
        error += float(gap) * index.numel() / order.numel()
    return error
