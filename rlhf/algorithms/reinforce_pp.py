"""REINFORCE++: each completion against the mean and deviation of the whole batch.

Hu (2025), REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models, section
3.3 (global advantage normalisation). A prompt whose answers are all alike is not without signal
here: they may all be better than the batch.

Two things differ from the paper, where a token is charged the KL from itself on and credit is
normalised over tokens: here a completion's KL counts for all of its tokens, and completions are
what is normalised over. What a token cannot change any more adds variance, not bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algorithms.base import ClippedRatio, Credit
from rlhf.config import ReinforcePPSection

_EPSILON = 1e-4


@dataclass(frozen=True, slots=True)
class ReinforcePP(ClippedRatio):
    """See the module."""

    settings: ReinforcePPSection

    def credit(self, rewards_PG: Tensor, terms_PG: Tensor) -> Credit:
        """Reward minus the batch's mean, over the batch's standard deviation."""
        rewards_PG = rewards_PG + terms_PG
        centred_PG = rewards_PG - rewards_PG.mean()
        values_PG = centred_PG / (rewards_PG.std(correction=0) + _EPSILON)
        differs = bool((rewards_PG != rewards_PG.flatten()[0]).any())
        return Credit(values_PG, torch.full(rewards_PG.shape, differs))
