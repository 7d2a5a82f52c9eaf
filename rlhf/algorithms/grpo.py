"""GRPO: each completion against the mean, and the deviation, of its group.

Shao et al. (2024), DeepSeekMath, section 4.1. Without the division, and normalised by a constant,
it is Dr. GRPO (Liu et al., 2025, Understanding R1-Zero-Like Training, section 3.2).

There the KL stands in the loss. Here it may be in the reward, and is then not divided: in a group
of equal rewards the quotient would be the KL's noise, as loud as any difference in reward, however
small its coefficient.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf.algorithms.base import ClippedRatio, Credit, require_groups, within_groups
from rlhf.config import GRPOSection

_EPSILON = 1e-4


@dataclass(frozen=True, slots=True)
class GRPO(ClippedRatio):
    """See the module."""

    settings: GRPOSection

    def credit(self, rewards_PG: Tensor, terms_PG: Tensor) -> Credit:
        """Reward minus the group's mean, over the group's standard deviation; plus what the tokens
        add, minus the group's mean."""
        return compared_with_its_group(rewards_PG, terms_PG, self.settings.divide_by_deviation)


def compared_with_its_group(
    rewards_PG: Tensor, terms_PG: Tensor, divide_by_deviation: bool
) -> Credit:
    """Group-relative credit, of groups that say something."""
    values_PG = group_relative(rewards_PG, divide_by_deviation=divide_by_deviation)
    values_PG = values_PG + group_relative(terms_PG, divide_by_deviation=False)
    return within_groups(values_PG, rewards_PG + terms_PG)


def group_relative(
    rewards_PG: Tensor, *, divide_by_deviation: bool = True, epsilon: float = _EPSILON
) -> Tensor:
    """Reward minus the group's mean, over the group's (unbiased) standard deviation; (P, G).

    A group of equal rewards gets zeros.
    """
    require_groups(rewards_PG)
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if not divide_by_deviation:
        return centred_PG
    return centred_PG / (rewards_PG.std(dim=1, keepdim=True) + epsilon)
