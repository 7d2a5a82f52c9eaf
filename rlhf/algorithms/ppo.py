"""PPO: each token against what a critic expected from there on.

Schulman et al. (2017), Proximal Policy Optimization Algorithms, equations 7 and 9, with the
advantages of Schulman et al. (2015), High-Dimensional Continuous Control Using Generalized
Advantage Estimation, equation 16. A completion is an episode, a token an action: the completion's
reward comes with its last token, penalties by the token with their own, and nothing comes after the
end, whether the completion stopped or was cut off.

Shapes: B completions, T tokens (padded on the right).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algorithms.base import ClippedRatio, Credit
from rlhf.config import PPOSection
from rlhf.losses import BatchSize, reduce_tokens

_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class PPO(ClippedRatio):
    """See the module."""

    settings: PPOSection

    def credit(self, rewards_PG: Tensor, terms_PG: Tensor) -> Credit:
        """All are trained on; their credit waits for the critic (`advantages`)."""
        return Credit(torch.zeros_like(rewards_PG), torch.ones_like(rewards_PG, dtype=torch.bool))

    def advantages(
        self, rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Advantages, whitened over the step's tokens if so set, and the returns that the critic is
        to learn; zero at padding."""
        advantages_BT = generalised_advantages(
            rewards_BT,
            values_BT,
            mask_BT,
            gamma=self.settings.gamma,
            gae_lambda=self.settings.gae_lambda,
        )
        returns_BT = (advantages_BT + values_BT) * mask_BT
        if self.settings.whiten:
            real_N = advantages_BT[mask_BT > 0]
            centred_BT = advantages_BT - real_N.mean()
            advantages_BT = centred_BT / (real_N.std(correction=0) + _EPSILON) * mask_BT
        return advantages_BT, returns_BT

    def critic_loss(
        self,
        values_BT: Tensor,
        old_values_BT: Tensor,
        returns_BT: Tensor,
        mask_BT: Tensor,
        size: BatchSize,
    ) -> Tensor:
        """Half the squared error, a mean over tokens; of the estimate or of the one held within
        `critic.clip` of the old, whichever is worse (as in the paper's own code)."""
        reach = self.settings.critic.clip
        held_BT = old_values_BT + (values_BT - old_values_BT).clamp(-reach, reach)
        free_BT = (values_BT - returns_BT).square()
        worse_BT = torch.maximum(free_BT, (held_BT - returns_BT).square())
        return reduce_tokens(0.5 * worse_BT, mask_BT.to(values_BT.dtype), "token", size)


def generalised_advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, gae_lambda: float
) -> Tensor:
    """Sum over l of (gamma * lambda)^l * delta_{t+l}, where delta_t = r_t + gamma V_{t+1} - V_t and
    V after the last token is 0; (B, T), zero at padding."""
    mask_BT = mask_BT.to(values_BT.dtype)
    advantages_BT = torch.zeros_like(values_BT)
    later_B = torch.zeros_like(values_BT[:, 0])
    value_B = torch.zeros_like(later_B)
    for t in reversed(range(values_BT.shape[1])):
        here_B = mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * value_B - values_BT[:, t]
        # Padding stands on the right: it leaves both at zero until the last token is reached.
        later_B = here_B * (delta_B + gamma * gae_lambda * later_B)
        value_B = here_B * values_BT[:, t]
        advantages_BT[:, t] = later_B
    return advantages_BT
