"""The algorithms, one file each: how rewards become credit, and credit a loss.

| file | credit | loss |
|---|---|---|
| `cem.py` | 1 for the elite, nothing for the rest | cross-entropy |
| `grpo.py` | against its group's mean (and deviation) | clipped ratio of tokens |
| `rloo.py` | against the mean of its siblings | clipped ratio of tokens |
| `reinforce_pp.py` | against the batch's mean and deviation | clipped ratio of tokens |
| `gspo.py` | as `grpo` | clipped ratio of whole completions |
| `ppo.py` | of each token, by a critic | clipped ratio of tokens, and the critic's |

What each expects, and when it fails: docs/algorithms.md. Shapes: P prompts, G completions of each,
B completions of a batch, T tokens.
"""

from __future__ import annotations

from rlhf.algorithms.base import Algorithm, Credit, Share
from rlhf.algorithms.cem import CrossEntropyMethod
from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.gspo import GSPO
from rlhf.algorithms.ppo import PPO
from rlhf.algorithms.reinforce_pp import ReinforcePP
from rlhf.algorithms.rloo import RLOO
from rlhf.config import (
    AlgorithmSettings,
    CEMSection,
    GRPOSection,
    GSPOSection,
    PPOSection,
    ReinforcePPSection,
    RLOOSection,
)

__all__ = ["PPO", "Algorithm", "Credit", "Share", "algorithm_of"]


def algorithm_of(settings: AlgorithmSettings) -> Algorithm:
    """The algorithm that `rl.algorithm` describes."""
    match settings:
        case CEMSection():
            return CrossEntropyMethod(settings)
        case GRPOSection():
            return GRPO(settings)
        case GSPOSection():
            return GSPO(settings)
        case PPOSection():
            return PPO(settings)
        case ReinforcePPSection():
            return ReinforcePP(settings)
        case RLOOSection():
            return RLOO(settings)
