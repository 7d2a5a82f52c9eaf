"""How often a reward model is right, and whether it knows.

Shapes: K members, N pairs. A margin is the reward of `chosen` minus that of `rejected`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.ensemble import aggregate
from rlhf.statistics import wilson_interval


def expected_calibration_error(
    probabilities_N: Tensor,
    outcomes_N: Tensor,
    weights_N: Tensor | None = None,
    *,
    bins: int = 10,
) -> float:
    """ECE over bins of equal mass: mean |confidence - accuracy|, weighted by bin size.

    `probabilities_N` are of the outcome 1. Confidence is max(p, 1 - p), and the likelier side is
    right as far as it won: an outcome may be anything between 0 and 1 (Guo et al., 2017,
    equation 3, with equal-mass bins).
    """
    weights_N = torch.ones_like(probabilities_N) if weights_N is None else weights_N
    confidence_N = torch.maximum(probabilities_N, 1 - probabilities_N)
    right_N = torch.where(probabilities_N > 0.5, outcomes_N, 1 - outcomes_N)
    order = torch.argsort(confidence_N, stable=True)
    error = 0.0
    for index in torch.tensor_split(order, min(bins, max(1, order.numel()))):
        gap = ((confidence_N[index] - right_N[index]) * weights_N[index]).sum().abs()
        error += float(gap) / max(float(weights_N.sum()), 1e-12)
    return error


def pair_figures(
    margins_KN: Tensor, temperature: float, labels_N: Tensor, weights_N: Tensor
) -> dict[str, Any]:
    """Accuracy with its 95 % interval, calibration, and each member's accuracy.

    P(chosen preferred) = sigmoid(mean margin / temperature). `labels_N` is the probability that
    `chosen` was preferred: a pair counts as right when both lie on the same side of a half, and a
    half when the margin is zero. Ties (label 0.5) have no right side and are left out of accuracy,
    not of calibration. `weights_N` count each pair; the interval goes by the effective number of
    pairs, (sum w)^2 / sum w^2 (Kish, 1965).
    """
    margins_N = aggregate(margins_KN)
    probabilities_N = torch.sigmoid(margins_N / temperature)
    decided_N = (labels_N != 0.5) & (weights_N > 0)
    sides_N = torch.sign(labels_N[decided_N] - 0.5)
    counts_N = weights_N[decided_N].double()
    total = float(counts_N.sum())

    def accuracy(margins: Tensor) -> float | None:
        right_N = 0.5 + 0.5 * torch.sign(margins[decided_N]) * sides_N
        return float((right_N * counts_N).sum()) / total if total else None

    share = accuracy(margins_N)
    effective = total**2 / float(counts_N.square().sum()) if total else 0.0
    low, high = wilson_interval((share or 0.0) * effective, effective)[1:]
    return {
        "pairs": len(labels_N),
        "ties": int((labels_N == 0.5).sum()),
        "accuracy": share,
        "accuracy_low": low if total else None,
        "accuracy_high": high if total else None,
        "ece": expected_calibration_error(probabilities_N, labels_N, weights_N)
        if len(labels_N)
        else None,
        "member_accuracy": [accuracy(row_N) for row_N in margins_KN] if total else [],
    }
