"""GSPO: ratios of whole completions instead of tokens.

Zheng et al. (2025), Group Sequence Policy Optimization, equations 5 and 7: the ratio is the
geometric mean of the tokens' ratios, so that one unlikely token does not decide, and a completion
is clipped as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algorithms.base import Credit, within_groups
from rlhf.algorithms.grpo import group_relative
from rlhf.config import GSPOSection
from rlhf.losses import BatchSize, PolicyLoss


@dataclass(frozen=True, slots=True)
class GSPO:
    """See the module."""

    settings: GSPOSection

    def credit(self, rewards_PG: Tensor) -> Credit:
        """As GRPO."""
        values_PG = group_relative(
            rewards_PG, divide_by_deviation=self.settings.divide_by_deviation
        )
        return within_groups(values_PG, rewards_PG)

    def loss(
        self,
        policy_logprobs_BT: Tensor,
        rollout_logprobs_BT: Tensor,
        credit_B: Tensor,
        mask_BT: Tensor,
        size: BatchSize,
    ) -> PolicyLoss:
        """The clipped surrogate over completions, their mean over the batch."""
        padding_BT = mask_BT == 0
        log_ratio_BT = (policy_logprobs_BT - rollout_logprobs_BT).masked_fill(padding_BT, 0.0)
        live_B = (mask_BT.sum(dim=1) > 0).to(policy_logprobs_BT.dtype)
        lengths_B = (~padding_BT).sum(dim=1).clamp(min=1)
        ratio_B = torch.exp(log_ratio_BT.sum(dim=1) / lengths_B)
        held_B = ratio_B.clamp(1 - self.settings.clip_low, 1 + self.settings.clip_high)
        free_B, held_B = ratio_B * credit_B, held_B * credit_B
        loss = -(torch.minimum(free_B, held_B) * live_B).sum() / size.sequences
        ratio_BT = ratio_B.detach().unsqueeze(1).expand(mask_BT.shape)
        clipped_BT = (held_B < free_B).detach().unsqueeze(1) & ~padding_BT
        return PolicyLoss(loss, ratio_BT, clipped_BT)
