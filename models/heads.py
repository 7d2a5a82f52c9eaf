"""Linear heads on pooled features: what an ensemble's members are, and how they are fitted.

Shapes: K members, C criteria, N replies or pairs, F feature families of H values each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlhf.ensemble import distance, whitening
from rlhf.errors import DataError
from rlhf.losses import bradley_terry_loss, centring_loss
from rlhf.seeding import derive_seed

_NEVER_ZERO = 1e-6
_KEPT_GAIN = 0.9
"""Share of the best candidate's gain that a weaker L2 must keep to be preferred."""


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
        features_KHN = self.standardised(features_NFH).permute(1, 2, 0)[self.family_K]
        return self.weights_KCH @ features_KHN

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
        parts_FNH = self.standardised(features_NFH).transpose(0, 1)
        return torch.stack(list(map(distance, parts_FNH, self.whitening_FHH)))

    def standardised(self, features_NFH: Tensor) -> Tensor:
        """Features by the training set's mean and deviation, shape (N, F, H)."""
        return (features_NFH - self.feature_mean_FH) / self.feature_deviation_FH

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """By name, for a file that holds several."""
        return {f"{prefix}{f.name}": getattr(self, f.name).clone() for f in fields(self)}


@dataclass(frozen=True, slots=True)
class Comparisons:
    """N pairs as tensors: features of both replies, and what was said of them.

    `labels_N` is the probability that chosen is preferred, `margins_N` by how much at least (in
    log-odds), `criterion_N` the index of what was asked.
    """

    chosen_NFH: Tensor
    rejected_NFH: Tensor
    labels_N: Tensor
    weights_N: Tensor
    margins_N: Tensor
    criterion_N: Tensor

    def __getitem__(self, mask_N: Tensor) -> Comparisons:
        return Comparisons(*(getattr(self, f.name)[mask_N] for f in fields(self)))

    @property
    def replies_NFH(self) -> Tensor:
        """Features of all replies, chosen ones first; shape (2 N, F, H)."""
        return torch.cat([self.chosen_NFH, self.rejected_NFH])


@dataclass(frozen=True, slots=True)
class ProbeGroup:
    """`count` bootstrap members on one family; `l2_C` is each criterion's weight of |w|^2."""

    family: int
    count: int
    l2_C: tuple[float, ...]
    centring: float = 0.0

    @property
    def kin(self) -> int:
        """Members of one family are compared with each other."""
        return self.family


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
) -> Heads:
    """All groups' members, with the scales of the replies that they were fitted on.

    Raises:
        DataError: a criterion has no pair with any weight.
    """
    # What has no weight has no say, in the scales neither.
    pairs = pairs[pairs.weights_N > 0]
    replies_NFH = pairs.replies_NFH
    mean_FH, deviation_FH = replies_NFH.mean(dim=0), replies_NFH.std(dim=0) + _NEVER_ZERO
    criteria = len(combination_C)
    weights: list[Tensor] = []
    first = 0
    for group in groups:
        if isinstance(group, TrainedHead):
            # On standardised features; the constant falls out of every difference.
            weights.append((group.weights_CH * deviation_FH[group.family]).unsqueeze(0))
            first += 1
            continue
        heads_CKH = []
        for criterion in range(criteria):
            own = pairs[pairs.criterion_N == criterion]
            draws_KN = bootstrap(own.weights_N, group.count, seed, first)
            heads_CKH.append(
                fit_heads(
                    own,
                    group.family,
                    (mean_FH[group.family], deviation_FH[group.family]),
                    draws_KN,
                    torch.full((group.count,), group.l2_C[criterion]),
                    centring=group.centring,
                )
            )
        weights.append(torch.stack(heads_CKH, dim=1))
        first += group.count
    unscaled = Heads(
        weights_KCH=torch.cat(weights),
        family_K=torch.tensor([group.family for group in groups for _ in range(group.count)]),
        kin_K=torch.tensor([group.kin for group in groups for _ in range(group.count)]),
        feature_mean_FH=mean_FH,
        feature_deviation_FH=deviation_FH,
        whitening_FHH=torch.stack(
            [whitening(part_NH) for part_NH in ((replies_NFH - mean_FH) / deviation_FH).unbind(1)]
        ),
        member_mean_KC=torch.zeros(first, criteria),
        member_deviation_KC=torch.ones(first, criteria),
        combination_C=combination_C,
        combined_deviation_K=torch.ones(first),
    )
    return rescaled(unscaled, replies_NFH)


def rescaled(heads: Heads, replies_NFH: Tensor) -> Heads:
    """The same heads with each member's mean and deviation over `replies_NFH`."""
    raw_KCN = heads.raw(replies_NFH)
    mean_KC, deviation_KC = raw_KCN.mean(dim=2), raw_KCN.std(dim=2) + _NEVER_ZERO
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
        mixed_KN.std(dim=1) + _NEVER_ZERO,
    )


def bootstrap(weights_N: Tensor, members: int, seed: int, first: int = 0) -> Tensor:
    """Each member's weights over a draw of N pairs with replacement, summing to 1; shape (K, N).

    Drawn from the pairs that count: a draw of pairs without weight would have no mean. Members are
    numbered from `first`, so that a member is the same whoever stands beside it.

    Raises:
        DataError: no pair has any weight.
    """
    live = torch.nonzero(weights_N > 0).squeeze(1)
    if not len(live):
        raise DataError("every pair has weight 0: there is nothing to train on")
    draws_KN = torch.zeros(members, len(weights_N))
    for member in range(members):
        generator = torch.Generator().manual_seed(derive_seed(seed, "bootstrap", first + member))
        drawn = live[torch.randint(len(live), (len(live),), generator=generator)]
        draws_KN[member] = torch.bincount(drawn, minlength=len(weights_N)) * weights_N
    return draws_KN / draws_KN.sum(dim=1, keepdim=True)


def fit_heads(
    pairs: Comparisons,
    family: int,
    scale: tuple[Tensor, Tensor],
    draws_KN: Tensor,
    l2_K: Tensor,
    *,
    centring: float = 0.0,
) -> Tensor:
    """Weights (K, H) on one family standardised by `scale` (mean, deviation), by L-BFGS.

    Each member minimises its Bradley-Terry cross-entropy over its own weights of the pairs plus
    ``l2 * |w|^2``, plus `centring` times the mean square of the pair's summed rewards. The members
    are independent problems solved side by side.
    """
    mean_H, deviation_H = scale
    difference_NH = (pairs.chosen_NFH[:, family] - pairs.rejected_NFH[:, family]) / deviation_H
    sum_NH = (
        pairs.chosen_NFH[:, family] + pairs.rejected_NFH[:, family] - 2 * mean_H
    ) / deviation_H
    members = len(draws_KN)
    labels_M = pairs.labels_N.repeat(members)
    margins_M = pairs.margins_N.repeat(members)
    weights_KH = torch.zeros(members, difference_NH.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weights_KH], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        # The draws sum to 1 for each member: K times the mean is the sum of the members' losses.
        loss = members * bradley_terry_loss(
            (weights_KH @ difference_NH.T).flatten(), labels_M, draws_KN.flatten(), margins_M
        )
        if centring:
            sums_KN = weights_KH @ sum_NH.T
            loss = loss + members * centring * centring_loss(sums_KN.flatten(), draws_KN.flatten())
        loss = loss + (l2_K * weights_KH.square().sum(dim=1)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return weights_KH.detach()


def choose_l2(
    pairs: Comparisons,
    family: int,
    candidates: Sequence[float],
    folds_N: Tensor,
    *,
    centring: float = 0.0,
) -> tuple[float, dict[str, float]]:
    """The L2 for one group and criterion, and every candidate's cross-validated cross-entropy.

    Chosen is the smallest candidate that keeps nine tenths of the best one's gain over a coin:
    strong shrinkage makes all members alike, so that they agree even where they know nothing.
    Losses are of one head without bootstrap, after its own temperature, on pairs of one criterion.
    """
    if len(candidates) == 1:
        return candidates[0], {}
    margins_LN = torch.zeros(len(candidates), len(folds_N))
    for fold in sorted(set(folds_N.tolist())):
        held, fit = folds_N == fold, (folds_N != fold) & (pairs.weights_N > 0)
        if not fit.any():
            continue
        own = pairs[fit]
        replies_NH = own.replies_NFH[:, family]
        scale = replies_NH.mean(dim=0), replies_NH.std(dim=0) + _NEVER_ZERO
        draws_LN = (own.weights_N / own.weights_N.sum()).expand(len(candidates), -1)
        weights_LH = fit_heads(
            own, family, scale, draws_LN, torch.tensor(candidates), centring=centring
        )
        apart_NH = (pairs.chosen_NFH[held, family] - pairs.rejected_NFH[held, family]) / scale[1]
        margins_LN[:, held] = weights_LH @ apart_NH.T
    losses: dict[str, float] = {}
    for l2, margins_N in zip(candidates, margins_LN, strict=True):
        temperature = fit_temperature(margins_N, pairs.labels_N, pairs.weights_N)
        losses[f"{l2:g}"] = float(
            bradley_terry_loss(margins_N / temperature, pairs.labels_N, pairs.weights_N)
        )
    coin = float(
        bradley_terry_loss(torch.zeros_like(pairs.labels_N), pairs.labels_N, pairs.weights_N)
    )
    least = min(losses.values())
    allowed = coin - _KEPT_GAIN * (coin - least) if least < coin else least
    return min(l2 for l2 in candidates if losses[f"{l2:g}"] <= allowed), losses


def fit_temperature(margins_N: Tensor, labels_N: Tensor, weights_N: Tensor) -> float:
    """The temperature T that minimises the cross-entropy of sigmoid(margin / T) on held-out pairs.

    Guo et al. (2017), section 4.2; a grid over the logarithm, which one parameter needs no more of.
    """
    grid = torch.logspace(-2, 2, 161)
    losses = torch.stack([bradley_terry_loss(margins_N / t, labels_N, weights_N) for t in grid])
    return float(grid[losses.argmin()])
