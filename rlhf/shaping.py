"""What is done to the ensemble's rewards before the KL penalty and credit.

Each penalty is logged on its own (`reward/penalty_<name>`), and the mean of what is left beside the
ensemble's (`reward/trained_mean`, `reward/mean`). Shapes: P prompts, G completions of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.config import ShapingSection
from rlhf.records import Completion, ScoredGroup

_EPSILON = 1e-4


def shaped_rewards(groups: Sequence[ScoredGroup], settings: ShapingSection) -> Tensor:
    """Rewards clipped, whitened and less their penalties, in this order; float64, shape (P, G).

    Raises:
        ValueError: the groups differ in size.
    """
    rewards_PG = torch.tensor([group.scores.rewards_G for group in groups], dtype=torch.float64)
    if settings.clip is not None:
        rewards_PG = rewards_PG.clamp(-settings.clip, settings.clip)
    if settings.whiten:
        # Over the step's completions: the ensemble's scale drifts as the policy moves.
        spread = rewards_PG.std(correction=0)
        rewards_PG = (rewards_PG - rewards_PG.mean()) / (spread + _EPSILON)
    penalties = [
        [
            sum(penalties_of(completion, settings).values())
            for completion in group.rollout.completions
        ]
        for group in groups
    ]
    return rewards_PG - torch.tensor(penalties, dtype=torch.float64)


def penalties_of(completion: Completion, settings: ShapingSection) -> Mapping[str, float]:
    """What is subtracted from a completion's reward, by name; all zero by default.

    ``cut_off``: it ran into `max_tokens`. ``length``: so much for every token beyond the target.
    """
    beyond = max(0, completion.length - settings.length_target)
    return {
        "cut_off": settings.cut_off_penalty * (completion.finish_reason == "length"),
        "length": settings.length_penalty * beyond,
    }
