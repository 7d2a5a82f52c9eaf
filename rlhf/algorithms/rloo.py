"""RLOO: each completion against the mean of its siblings.

Ahmadian et al. (2024), Back to Basics, equation 8; Kool et al. (2019). Unbiased, since the baseline
does not contain the sample. There a completion is one action: `ratio = "completion"`. A ratio for
each token, the default, is clipped less often, and with completions of another sampler leaves their
prefixes to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf.algorithms.base import ClippedRatio, Credit, Share, require_groups, within_groups
from rlhf.config import RLOOSection
from rlhf.losses import PolicyLoss


@dataclass(frozen=True, slots=True)
class RLOO(ClippedRatio):
    """See the module."""

    settings: RLOOSection

    def credit(self, rewards_PG: Tensor, terms_PG: Tensor) -> Credit:
        """Reward minus the mean of the others."""
        rewards_PG = rewards_PG + terms_PG
        return within_groups(leave_one_out(rewards_PG), rewards_PG)

    def loss(self, share: Share) -> PolicyLoss:
        """The clipped surrogate, of tokens or of whole completions."""
        if self.settings.ratio == "token":
            return ClippedRatio.loss(self, share)
        padding_BT = share.mask_BT == 0

        def whole_B1(logprobs_BT: Tensor) -> Tensor:
            return logprobs_BT.masked_fill(padding_BT, 0.0).sum(dim=1, keepdim=True)

        found = ClippedRatio.loss(
            self,
            Share(
                whole_B1(share.policy_logprobs_BT),
                whole_B1(share.old_logprobs_BT),
                # The same for all tokens of a completion.
                share.credit_BT[:, :1],
                share.mask_BT.amax(dim=1, keepdim=True),
                share.size,
            ),
        )
        ratio_BT = found.ratio_BT.expand(padding_BT.shape)
        return PolicyLoss(found.loss, ratio_BT, found.clipped_BT & ~padding_BT)


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """Reward minus the mean of the *other* completions of its group, (P, G).

    Equals the centred reward times G / (G - 1).
    """
    require_groups(rewards_PG)
    group_size = rewards_PG.shape[1]
    others_PG = (rewards_PG.sum(dim=1, keepdim=True) - rewards_PG) / (group_size - 1)
    return rewards_PG - others_PG
