"""What an algorithm is to the loop and the learner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rlhf.config import ClippedSection
from rlhf.losses import BatchSize, PolicyLoss, clipped_policy_loss


@dataclass(frozen=True, slots=True)
class Credit:
    """How each completion is trained on: `values_PG` scale its loss, `trained_PG` says whether it
    has one at all. What has none is not in the batch, and does not count in its size."""

    values_PG: Tensor
    trained_PG: Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a batch: its completions' tokens, and the size of the whole.

    `old_logprobs_BT` are what a ratio is taken against: those of the engine that sampled, or, with
    importance weights, the learner's own before the step's first update. Credit is of tokens, the
    same for all of a completion unless a critic made it.
    """

    policy_logprobs_BT: Tensor
    old_logprobs_BT: Tensor
    credit_BT: Tensor
    mask_BT: Tensor
    size: BatchSize


class Algorithm(Protocol):
    """How rewards become a gradient."""

    def credit(self, rewards_PG: Tensor, terms_PG: Tensor) -> Credit:
        """Credit for a step's completions. `terms_PG` is what their tokens add to the rewards: less
        the KL penalty, plus the entropy. Their sum is what is climbed; they come apart for those
        that divide by the deviation of the rewards."""
        ...

    def loss(self, share: Share) -> PolicyLoss:
        """The loss of a part of the batch; those of all parts add up to the batch's."""
        ...


@dataclass(frozen=True, slots=True)
class ClippedRatio:
    """The loss that most algorithms share: PPO's clipped surrogate over tokens."""

    settings: ClippedSection

    def loss(self, share: Share) -> PolicyLoss:
        """On policy its gradient is that of credit times log-likelihood (REINFORCE)."""
        return clipped_policy_loss(
            share.policy_logprobs_BT,
            share.old_logprobs_BT,
            share.credit_BT,
            share.mask_BT,
            clip_low=self.settings.clip_low,
            clip_high=self.settings.clip_high,
            dual_clip=self.settings.dual_clip,
            normalisation=self.settings.normalisation,
            size=share.size,
        )


def within_groups(values_PG: Tensor, rewards_PG: Tensor) -> Credit:
    """Credit of completions that are compared within their group: a group of equal rewards, with
    what its tokens add, says nothing, and is left out."""
    differs_P1 = (rewards_PG != rewards_PG[:, :1]).any(dim=1, keepdim=True)
    return Credit(values_PG, differs_P1.expand(rewards_PG.shape))


def require_groups(rewards_PG: Tensor) -> None:
    """Refuse rewards that are no groups of at least two.

    Raises:
        ValueError: with the shape that they have.
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(
            "rewards need the shape (prompts, completions) with at least 2 completions, got "
            f"{tuple(rewards_PG.shape)}"
        )
