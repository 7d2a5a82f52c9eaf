"""How often a reward model is right, and whether it knows.

Shapes: K members, N pairs. A margin is the reward of `chosen` minus that of `rejected`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.ensemble import aggregate
from rlhf.statistics import wilson_interval


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Pairs of like confidence: how sure the model was on average, and how often it was right."""

    confidence: float
    right: float
    mass: float


def reliability_curve(
    probabilities_N: Tensor,
    outcomes_N: Tensor,
    weights_N: Tensor | None = None,
    *,
    bins: int = 10,
) -> list[ReliabilityBin]:
    """Confidence against being right in bins of equal count, the least sure first.

    `probabilities_N` are of the outcome 1. Confidence is max(p, 1 - p), and the likelier side is
    right as far as it won: an outcome may be anything between 0 and 1. At 1/2 neither side is the
    likelier, and half right whatever the outcome.
    """
    weights_N = torch.ones_like(probabilities_N) if weights_N is None else weights_N
    confidence_N = torch.maximum(probabilities_N, 1 - probabilities_N)
    right_N = torch.where(probabilities_N > 0.5, outcomes_N, 1 - outcomes_N)
    right_N = right_N.masked_fill(probabilities_N == 0.5, 0.5)
    order = torch.argsort(confidence_N, stable=True)
    curve = []
    for index in torch.tensor_split(order, min(bins, max(1, order.numel()))):
        mass = float(weights_N[index].sum())
        if mass:
            curve.append(
                ReliabilityBin(
                    float((confidence_N[index] * weights_N[index]).sum()) / mass,
                    float((right_N[index] * weights_N[index]).sum()) / mass,
                    mass,
                )
            )
    return curve


def expected_calibration_error(
    probabilities_N: Tensor,
    outcomes_N: Tensor,
    weights_N: Tensor | None = None,
    *,
    bins: int = 10,
) -> float:
    """Mean |confidence - being right| over the bins of `reliability_curve`, by their mass (Guo et
    al., 2017, equation 3, with bins of equal count)."""
    curve = reliability_curve(probabilities_N, outcomes_N, weights_N, bins=bins)
    mass = sum(bin.mass for bin in curve)
    return sum(bin.mass * abs(bin.confidence - bin.right) for bin in curve) / max(mass, 1e-12)


def calibrated_ece(
    probabilities_N: Tensor,
    weights_N: Tensor | None = None,
    *,
    bins: int = 10,
    draws: int = 1000,
    quantile: float = 0.95,
) -> float:
    """The ECE that a perfectly calibrated model with these probabilities stays below in `quantile`
    of all samples: with few pairs in a bin chance alone makes one (Vaicenavicius et al., 2019,
    section 4, consistency resampling)."""
    weights_N = torch.ones_like(probabilities_N) if weights_N is None else weights_N
    confidence_N = torch.maximum(probabilities_N, 1 - probabilities_N)
    order = torch.argsort(confidence_N, stable=True)
    confidence_N, weights_N = confidence_N[order], weights_N[order]
    parts = min(bins, max(1, order.numel()))
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(draws):
        # The likelier side is right as often as it is said to be.
        gaps_N = (confidence_N - torch.bernoulli(confidence_N, generator=generator)) * weights_N
        errors.append(sum(float(part.sum().abs()) for part in torch.tensor_split(gaps_N, parts)))
    return float(torch.tensor(errors).quantile(quantile)) / max(float(weights_N.sum()), 1e-12)


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
        if weights_N.any()
        else None,
        "ece_band": calibrated_ece(probabilities_N, weights_N, draws=200)
        if weights_N.any()
        else None,
        "reliability": [
            asdict(bin) for bin in reliability_curve(probabilities_N, labels_N, weights_N)
        ],
        "member_accuracy": [accuracy(row_N) for row_N in margins_KN] if total else [],
    }
