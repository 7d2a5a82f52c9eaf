"""RLOO: each completion against the mean of its siblings.

Ahmadian et al. (2024), Back to Basics, equation 8; Kool et al. (2019). Unbiased, since the baseline
does not contain the sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf.algorithms.base import ClippedRatio, Credit, require_groups, within_groups
from rlhf.config import RLOOSection


@dataclass(frozen=True, slots=True)
class RLOO(ClippedRatio):
    """See the module."""

    settings: RLOOSection

    def credit(self, rewards_PG: Tensor) -> Credit:
        """Reward minus the mean of the others."""
        return within_groups(leave_one_out(rewards_PG), rewards_PG)


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """Reward minus the mean of the *other* completions of its group, (P, G).

    Equals the centred reward times G / (G - 1).
    """
    require_groups(rewards_PG)
    group_size = rewards_PG.shape[1]
    others_PG = (rewards_PG.sum(dim=1, keepdim=True) - rewards_PG) / (group_size - 1)
    return rewards_PG - others_PG
