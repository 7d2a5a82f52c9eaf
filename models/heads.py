"""Linear heads on pooled features: what an ensemble's members are.

How they are fitted stands in `models.head_fitting`.

Shapes: K members, C criteria, N replies or pairs, F feature families of H values each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from models.head_fitting import (
    NEVER_ZERO,
    Comparisons,
    ProbeGroup,
    bootstrap,
    fit_heads,
    prior_precision,
)
from rlhf.ensemble import distance, whitening


@dataclass(frozen=True, slots=True)
class Heads:
    """K members of C heads each on the families of one trunk, and the scales that they need.

    Member k reads family `family_K[k]`, standardised by the training replies, and disagrees with
    those that have its `kin_K`. Its heads are
    standardised in turn, combined with the weights `combination_C`, and the sum is brought back to
    deviation 1. `whitening_FHH` says how the training replies lie in each family.
    """

    weights_KCH: Tensor
    family_K: Tensor
    kin_K: Tensor
    feature_mean_FH: Tensor
    feature_deviation_FH: Tensor
    whitening_FHH: Tensor
    member_mean_KC: Tensor
    member_deviation_KC: Tensor
    combination_C: Tensor
    combined_deviation_K: Tensor

    @property
    def members(self) -> int:
        """K."""
        return self.weights_KCH.shape[0]

    def fit_together(self) -> bool:
        """Whether the tensors are numbers, and agree on K, C, F and H."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            wanted_type = torch.int64 if field.name in ("family_K", "kin_K") else torch.float32
            if tensor.dtype != wanted_type or not torch.isfinite(tensor).all():
                return False
        if self.weights_KCH.ndim != 3 or self.feature_mean_FH.ndim != 2:
            return False
        (members, criteria, width), families = self.weights_KCH.shape, len(self.feature_mean_FH)
        wanted = {
            "family_K": (members,),
            "kin_K": (members,),
            "feature_mean_FH": (families, width),
            "feature_deviation_FH": (families, width),
            "whitening_FHH": (families, width, width),
            "member_mean_KC": (members, criteria),
            "member_deviation_KC": (members, criteria),
            "combination_C": (criteria,),
            "combined_deviation_K": (members,),
        }
        return all(getattr(self, name).shape == shape for name, shape in wanted.items()) and bool(
            ((self.family_K >= 0) & (self.family_K < families)).all()
        )

    def raw(self, features_NFH: Tensor) -> Tensor:
        """Rewards on the Bradley-Terry scale (differences are log-odds), shape (K, C, N)."""
        raw_KCN = torch.empty(*self.weights_KCH.shape[:2], len(features_NFH))
        # One product a family: a copy of the features for each member would fill the memory.
        for family in range(features_NFH.shape[1]):
            own_K = self.family_K == family
            part_NH = self.standardised(features_NFH, family)
            raw_KCN[own_K] = torch.einsum("kch,nh->kcn", self.weights_KCH[own_K], part_NH)
        return raw_KCN

    def criteria(self, features_NFH: Tensor) -> Tensor:
        """Standardised rewards by criterion, shape (K, C, N)."""
        raw_KCN = self.raw(features_NFH)
        centred_KCN = raw_KCN - self.member_mean_KC.unsqueeze(2)
        return centred_KCN / self.member_deviation_KC.unsqueeze(2)

    def combined(self, criteria_KCN: Tensor) -> Tensor:
        """The stated combination of standardised criteria, standardised; shape (K, N)."""
        mixed_KN = torch.einsum("kcn,c->kn", criteria_KCN, self.combination_C)
        return mixed_KN / self.combined_deviation_K.unsqueeze(1)

    def rewards(self, features_NFH: Tensor) -> Tensor:
        """Standardised rewards, shape (K, N)."""
        return self.combined(self.criteria(features_NFH))

    def distances(self, features_NFH: Tensor) -> Tensor:
        """Mahalanobis distance from the training replies in each family, shape (F, N)."""
        return torch.stack(
            [
                distance(self.standardised(features_NFH, family), whitening_HH)
                for family, whitening_HH in enumerate(self.whitening_FHH)
            ]
        )

    def standardised(self, features_NFH: Tensor, family: int) -> Tensor:
        """One family's features by the training set's mean and deviation, shape (N, H)."""
        mean_H, deviation_H = self.feature_mean_FH[family], self.feature_deviation_FH[family]
        return (features_NFH[:, family] - mean_H) / deviation_H

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """By name, for a file that holds several."""
        return {f"{prefix}{f.name}": getattr(self, f.name).clone() for f in fields(self)}


@dataclass(frozen=True, slots=True)
class TrainedHead:
    """A member whose head was trained along with its features: `weights_CH` on them as they are.

    `kin` numbers those that it is compared with, beyond the numbers of families.
    """

    family: int
    kin: int
    weights_CH: Tensor

    @property
    def count(self) -> int:
        """One."""
        return 1


def fit_members(
    pairs: Comparisons,
    groups: Sequence[ProbeGroup | TrainedHead],
    combination_C: Tensor,
    seed: int,
    correlation_CC: Tensor | None = None,
) -> Heads:
    """All groups' members, with the scales of the replies that they were fitted on.

    `correlation_CC` is how far criteria borrow from each other (`head_fitting.prior_precision`), by
    default not at all.

    Raises:
        DataError: a criterion has no pair with any weight.
    """
    # What has no weight has no say, in the scales neither. A mask copies, so not without need.
    if not (pairs.weights_N > 0).all():
        pairs = pairs[pairs.weights_N > 0]
    # One family after the other: the replies of all are as large as the features once more.
    families = range(pairs.chosen_NFH.shape[1])
    moments = [_moments(pairs.replies_of(family)) for family in families]
    mean_FH, deviation_FH = map(torch.stack, zip(*moments, strict=True))
    criteria = len(combination_C)
    share_C = pairs.shares(criteria)
    if correlation_CC is None:
        correlation_CC = torch.eye(criteria)
    weights: list[Tensor] = []
    first = 0
    for group in groups:
        if isinstance(group, TrainedHead):
            # On standardised features; the constant falls out of every difference.
            weights.append((group.weights_CH * deviation_FH[group.family]).unsqueeze(0))
            first += 1
            continue
        draws_KN = torch.zeros(group.count, len(pairs.labels_N))
        for criterion, share in enumerate(share_C):
            own_N = pairs.criterion_N == criterion
            draws_KN[:, own_N] = share * bootstrap(pairs.weights_N[own_N], group.count, seed, first)
        weights.append(
            fit_heads(
                pairs,
                group.family,
                (mean_FH[group.family], deviation_FH[group.family]),
                draws_KN,
                prior_precision(
                    torch.tensor(group.l2_C).expand(group.count, -1), share_C, correlation_CC
                ),
                centring=group.centring,
            )
        )
        first += group.count
    unscaled = Heads(
        weights_KCH=torch.cat(weights),
        family_K=torch.tensor([group.family for group in groups for _ in range(group.count)]),
        kin_K=torch.tensor([group.kin for group in groups for _ in range(group.count)]),
        feature_mean_FH=mean_FH,
        feature_deviation_FH=deviation_FH,
        whitening_FHH=torch.stack(
            [whitening((pairs.replies_of(f) - mean_FH[f]).div_(deviation_FH[f])) for f in families]
        ),
        member_mean_KC=torch.zeros(first, criteria),
        member_deviation_KC=torch.ones(first, criteria),
        combination_C=combination_C,
        combined_deviation_K=torch.ones(first),
    )
    return rescaled(unscaled, pairs.chosen_NFH, pairs.rejected_NFH)


def _moments(replies_NH: Tensor) -> tuple[Tensor, Tensor]:
    return replies_NH.mean(dim=0), replies_NH.std(dim=0) + NEVER_ZERO


def rescaled(heads: Heads, *replies: Tensor) -> Heads:
    """The same heads with each member's mean and deviation over all `replies`, tensors of shape
    (N, F, H) each."""
    raw_KCN = torch.cat([heads.raw(part_NFH) for part_NFH in replies], dim=2)
    mean_KC, deviation_KC = raw_KCN.mean(dim=2), raw_KCN.std(dim=2) + NEVER_ZERO
    criteria_KCN = (raw_KCN - mean_KC.unsqueeze(2)) / deviation_KC.unsqueeze(2)
    mixed_KN = torch.einsum("kcn,c->kn", criteria_KCN, heads.combination_C)
    return Heads(
        heads.weights_KCH,
        heads.family_K,
        heads.kin_K,
        heads.feature_mean_FH,
        heads.feature_deviation_FH,
        heads.whitening_FHH,
        mean_KC,
        deviation_KC,
        heads.combination_C,
        mixed_KN.std(dim=1) + NEVER_ZERO,
    )
