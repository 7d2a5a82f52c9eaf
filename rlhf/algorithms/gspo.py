"""GSPO: ratios of whole completions instead of tokens.

Zheng et al. (2025), Group Sequence Policy Optimization, equations 5 and 7: the ratio is the
geometric mean of the tokens' ratios, so that one unlikely token does not decide, and a completion
is clipped as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algorithms.base import Credit, Share
from rlhf.algorithms.grpo import compared_with_its_group
from rlhf.config import GSPOSection
from rlhf.losses import PolicyLoss


@dataclass(frozen=True, slots=True)
class GSPO:
    """See the module."""

    settings: GSPOSection

    def credit(self, rewards_PG: Tensor, terms_PG: Tensor) -> Credit:
        """As GRPO."""
        return compared_with_its_group(rewards_PG, terms_PG, self.settings.divide_by_deviation)

    def loss(self, share: Share) -> PolicyLoss:
        """The clipped surrogate over completions, their mean over the batch."""
        padding_BT = share.mask_BT == 0
        log_ratio_BT = share.policy_logprobs_BT - share.old_logprobs_BT
        log_ratio_BT = log_ratio_BT.masked_fill(padding_BT, 0.0)
        lengths_B = (~padding_BT).sum(dim=1)
        ratio_B = torch.exp(log_ratio_BT.sum(dim=1) / lengths_B.clamp(min=1))
        held_B = ratio_B.clamp(1 - self.settings.clip_low, 1 + self.settings.clip_high)
        # The same for all tokens of a completion.
        credit_B = share.credit_BT[:, 0]
        free_B, held_B = ratio_B * credit_B, held_B * credit_B
        # A completion without tokens has no weight.
        surrogate_B = torch.minimum(free_B, held_B) * (lengths_B > 0)
        ratio_BT = ratio_B.detach().unsqueeze(1).expand(padding_BT.shape)
        clipped_BT = (held_B < free_B).unsqueeze(1) & ~padding_BT
        return PolicyLoss(-surrogate_B.sum() / share.size.sequences, ratio_BT, clipped_BT)
