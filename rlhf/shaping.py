"""From the ensemble's rewards to those that credit is given by, before the KL penalty.

Each reward of one's own and each penalty is logged by itself (`reward/own_<name>`,
`reward/penalty_<name>`), and the mean of what comes out beside the ensemble's
(`reward/trained_mean`, `reward/mean`). Shapes: P prompts, G completions of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.config import RLSection, ShapingSection
from rlhf.records import Completion, ScoredGroup

_EPSILON = 1e-4


def shaped_rewards(groups: Sequence[ScoredGroup], settings: RLSection) -> Tensor:
    """The ensemble's rewards, clipped, whitened and weighed, plus those of one's own, less the
    penalties; float64, shape (P, G).

    Raises:
        ValueError: the groups differ in size.
    """
    shaping = settings.shaping
    rewards_PG = torch.tensor([group.scores.rewards_G for group in groups], dtype=torch.float64)
    if shaping.clip is not None:
        rewards_PG = rewards_PG.clamp(-shaping.clip, shaping.clip)
    if shaping.whiten:
        # Over the step's completions: the ensemble's scale drifts as the policy moves.
        spread = rewards_PG.std(correction=0)
        rewards_PG = (rewards_PG - rewards_PG.mean()) / (spread + _EPSILON)
    rewards_PG = shaping.ensemble_weight * rewards_PG
    for own in settings.rewards:
        own_PG = [group.scores.own_G[own.name] for group in groups]
        rewards_PG = rewards_PG + own.weight * torch.tensor(own_PG, dtype=torch.float64)
    penalties = [
        [
            sum(penalties_of(completion, shaping).values())
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
