"""When supervised fine-tuning has gone far enough: by the reward of what the model says.

Every so many steps the policy answers the same held-out prompts, and each answer has a *lower
reward*: the ensemble's mean less so many deviations over its members, so that a reward which rises
where the members disagree has not risen. The anchor is the last evaluation that was surely better
than the anchor before it, by a paired test over prompts. Training stops when the anchor is
`patience` evaluations old. What is kept is the evaluation with the highest mean, wherever it lies.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config import StoppingSection
from rlhf.ensemble import lower_bound
from rlhf.statistics import paired_interval


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured before the optimiser step `step`; P prompts, the same every time.

    `loss` is the mean over held-out tokens, in nats. `rewards_P` and `disagreement_P` are the
    ensemble's mean and deviation for the answer to each prompt.
    """

    step: int
    loss: float
    rewards_P: tuple[float, ...]
    disagreement_P: tuple[float, ...]
    flagged_share: float = 0.0
    length_mean: float = 0.0

    @property
    def reward(self) -> float:
        """Mean reward."""
        return statistics.fmean(self.rewards_P)

    @property
    def disagreement(self) -> float:
        """Mean disagreement."""
        return statistics.fmean(self.disagreement_P)

    def lower_P(self, penalty: float) -> list[float]:
        """Rewards less `penalty` times the disagreement."""
        return [
            lower_bound(reward, disagreement, penalty)
            for reward, disagreement in zip(self.rewards_P, self.disagreement_P, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from all evaluations so far: positions in their list."""

    best_by_reward: int
    best_by_loss: int
    anchor: int
    stop: bool


def verdict(evaluations: Sequence[Evaluation], settings: StoppingSection) -> Verdict:
    """See the module.

    Raises:
        ValueError: there are none.
    """
    if not evaluations:
        raise ValueError("nothing was evaluated")
    lower = [each.lower_P(settings.disagreement_penalty) for each in evaluations]
    means = [statistics.fmean(each) for each in lower]
    anchor = 0
    for place in range(1, len(evaluations)):
        if surely_better(lower[place], lower[anchor], settings.confidence):
            anchor = place
    losses = [each.loss for each in evaluations]
    return Verdict(
        means.index(max(means)),
        losses.index(min(losses)),
        anchor,
        len(evaluations) - 1 - anchor >= settings.patience,
    )


def surely_better(later_P: Sequence[float], earlier_P: Sequence[float], confidence: float) -> bool:
    """Whether the mean paired difference lies above 0, one-sided at `confidence`."""
    differences = [later - earlier for later, earlier in zip(later_P, earlier_P, strict=True)]
    z = statistics.NormalDist().inv_cdf(confidence)
    _, low, _ = paired_interval(differences, z=z)
    return low > 0
