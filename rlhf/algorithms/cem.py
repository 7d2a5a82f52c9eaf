"""The cross-entropy method: keep the best completions, make them likelier.

Rubinstein & Kroese (2004), The Cross-Entropy Method, section 4.2: sample from the policy, keep the
elite by reward, fit the policy to it by maximum likelihood. With one elite a prompt it is best-of-N
filtering (RAFT: Dong et al., 2023); with the elite taken over the batch, prompts that went well
teach more than others. It needs no baseline and no ratio, so there is little to set wrongly: the
easy start. It learns nothing from bad completions, and narrows the policy quickly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algorithms.base import Credit, Share, within_groups
from rlhf.config import CEMSection
from rlhf.losses import PolicyLoss, reduce_tokens


@dataclass(frozen=True, slots=True)
class CrossEntropyMethod:
    """See the module."""

    settings: CEMSection

    def credit(self, rewards_PG: Tensor, terms_PG: Tensor) -> Credit:
        """1 for the elite; the others, and groups of equal rewards, are not trained on."""
        rewards_PG = rewards_PG + terms_PG
        if self.settings.elite_of == "batch":
            # One group of all completions.
            flat_1N = rewards_PG.reshape(1, -1)
            elite_PG = self._elite(flat_1N).reshape(rewards_PG.shape)
            trained_PG = elite_PG & bool((flat_1N != flat_1N[:, :1]).any())
        else:
            elite_PG = self._elite(rewards_PG)
            trained_PG = elite_PG & within_groups(elite_PG, rewards_PG).trained_PG
        return Credit(elite_PG.to(rewards_PG.dtype), trained_PG)

    def _elite(self, rewards_PG: Tensor) -> Tensor:
        """True for the best of each row; of equal ones the first are taken."""
        size = rewards_PG.shape[1]
        # At least one, and never everybody: that would be no choice.
        kept = max(1, min(size - 1, round(self.settings.elite_share * size)))
        best_PG = torch.argsort(rewards_PG, dim=1, descending=True, stable=True)[:, :kept]
        return torch.zeros_like(rewards_PG, dtype=torch.bool).scatter(1, best_PG, True)

    def loss(self, share: Share) -> PolicyLoss:
        """Cross-entropy of the elite's tokens. Whoever sampled them, they are what is wanted: there
        is no ratio in it (the one that is returned is for the metrics)."""
        padding_BT = share.mask_BT == 0
        logprobs_BT = share.policy_logprobs_BT.masked_fill(padding_BT, 0.0)
        mask_BT = share.mask_BT.to(logprobs_BT.dtype)
        loss = -reduce_tokens(
            logprobs_BT * share.credit_BT,
            mask_BT,
            self.settings.normalisation,
            share.size,
        )
        old_BT = share.old_logprobs_BT.masked_fill(padding_BT, 0.0)
        ratio_BT = torch.exp(logprobs_BT - old_BT).detach()
        return PolicyLoss(loss, ratio_BT, torch.zeros_like(padding_BT))
