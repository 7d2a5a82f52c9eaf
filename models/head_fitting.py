"""How linear heads are fitted, and how their L2 and what criteria tell of each other are chosen.

Shapes: K members, C criteria, N pairs, F feature families of H values each; L candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlhf.ensemble import bootstrap_draws
from rlhf.errors import DataError
from rlhf.losses import bradley_terry_loss, centring_loss

NEVER_ZERO = 1e-6
"""Added to deviations."""
_KEPT_GAIN = 0.9
"""Share of the best candidate's gain that a weaker L2 must keep to be preferred."""
_LEAST_EIGENVALUE = 0.05
"""Of the correlations of criteria, so that their inverse stays tame."""


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

    def of_family(self, family: int) -> Comparisons:
        """The same pairs with one family alone, which is number 0 then; nothing is copied."""
        only = slice(family, family + 1)
        return replace(
            self, chosen_NFH=self.chosen_NFH[:, only], rejected_NFH=self.rejected_NFH[:, only]
        )

    def between(self, criteria: Sequence[int]) -> Comparisons:
        """The pairs of these criteria alone, which are numbered from 0 then."""
        places_N = torch.full_like(self.criterion_N, -1)
        for place, criterion in enumerate(criteria):
            places_N[self.criterion_N == criterion] = place
        return replace(self, criterion_N=places_N)[places_N >= 0]

    def shares(self, criteria: int) -> Tensor:
        """Each criterion's share of the pairs' weight, shape (C,)."""
        total_C = torch.zeros(criteria).index_add(0, self.criterion_N, self.weights_N)
        return total_C / total_C.sum()

    def replies_of(self, family: int) -> Tensor:
        """One family's features of all replies, chosen ones first; shape (2 N, H)."""
        return torch.cat([self.chosen_NFH[:, family], self.rejected_NFH[:, family]])

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


def bootstrap(weights_N: Tensor, members: int, seed: int, first: int = 0) -> Tensor:
    """Each member's weights over a balanced draw of the N pairs, summing to 1; shape (K, N).

    Drawn (`rlhf.ensemble.bootstrap_draws`) from the pairs that count: a draw of pairs without
    weight would have no mean.

    Raises:
        DataError: no pair has any weight.
    """
    live = torch.nonzero(weights_N > 0).squeeze(1)
    if not len(live):
        raise DataError("every pair has weight 0: there is nothing to train on")
    draws_KN = torch.zeros(members, len(weights_N))
    for member, drawn in enumerate(bootstrap_draws(len(live), members, seed, first)):
        draws_KN[member] = torch.bincount(live[drawn], minlength=len(weights_N)) * weights_N
    return draws_KN / draws_KN.sum(dim=1, keepdim=True)


def prior_precision(l2_KC: Tensor, share_C: Tensor, correlation_CC: Tensor) -> Tensor:
    """What `fit_heads` weighs the products of criteria's heads with, shape (K, C, C).

    ``P_cd = sqrt(s_c l2_c s_d l2_d) (R^-1)_cd`` for the criteria's shares s of the pairs, their L2
    and the correlation R that their heads are taken to have: the penalty is that of a Gaussian
    prior whose draws for the criteria are correlated by R in every feature (Evgeniou & Pontil,
    2004; Zhang & Yeung, 2010). `correlation_CC` may have one matrix a member, shape (K, C, C); the
    unit matrix keeps the criteria apart.
    """
    root_KC = (l2_KC * share_C).sqrt()
    inverse: Tensor = torch.linalg.inv(correlation_CC)
    return root_KC.unsqueeze(2) * inverse * root_KC.unsqueeze(1)


def fit_heads(
    pairs: Comparisons,
    family: int,
    scale: tuple[Tensor, Tensor],
    draws_KN: Tensor,
    precision_KCC: Tensor,
    *,
    centring: float = 0.0,
) -> Tensor:
    """Weights (K, C, H) on one family standardised by `scale` (mean, deviation), by L-BFGS.

    Each member minimises the Bradley-Terry cross-entropy summed over its own weights of the pairs
    (which sum to the criteria's shares), plus `centring` times the square of a pair's summed
    rewards, summed likewise, plus ``sum_cd P_cd w_c . w_d`` (see `prior_precision`; with one
    criterion, or criteria apart, a mean cross-entropy plus ``l2 |w|^2``). The members are
    independent problems solved side by side.
    """
    mean_H, deviation_H = scale
    members, criteria = precision_KCC.shape[:2]
    difference_NH = (pairs.chosen_NFH[:, family] - pairs.rejected_NFH[:, family]) / deviation_H
    if centring:
        sum_NH = pairs.chosen_NFH[:, family] + pairs.rejected_NFH[:, family]
        sum_NH = (sum_NH - 2 * mean_H) / deviation_H
    parts = []
    for criterion in range(criteria):
        own_N = pairs.criterion_N == criterion
        draws_M = draws_KN[:, own_N].flatten()
        # Without pairs a criterion's heads are what the others tell of them.
        if draws_M.any():
            labels_M = pairs.labels_N[own_N].repeat(members)
            margins_M = pairs.margins_N[own_N].repeat(members)
            own_sum_NH = sum_NH[own_N] if centring else None
            own = difference_NH[own_N], own_sum_NH, labels_M, margins_M, draws_M
            parts.append((criterion, *own))
    weights_KCH = torch.zeros(members, criteria, difference_NH.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weights_KCH], max_iter=150, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = torch.einsum("kcd,kch,kdh->", precision_KCC, weights_KCH, weights_KCH)
        for criterion, own_NH, own_sum_NH, labels_M, margins_M, draws_M in parts:
            weights_KH = weights_KCH[:, criterion]
            part = bradley_terry_loss(
                (weights_KH @ own_NH.T).flatten(), labels_M, draws_M, margins_M
            )
            if own_sum_NH is not None:
                sums_M = (weights_KH @ own_sum_NH.T).flatten()
                part = part + centring * centring_loss(sums_M, draws_M)
            # From the mean back to the sum.
            loss = loss + draws_M.sum() * part
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return weights_KCH.detach()


def _held_out_margins(
    pairs: Comparisons,
    precision_LCC: Tensor,
    folds_N: Tensor,
    centring: float,
) -> Tensor:
    """Cross-validated margins, shape (L, N): of every pair by its own criterion's head, one head
    without bootstrap for each of L precisions. Pairs come with one family alone: a fold copies
    what they have."""
    margins_LN = torch.zeros(len(precision_LCC), len(folds_N))
    for fold in sorted(set(folds_N.tolist())):
        held, fit = folds_N == fold, (folds_N != fold) & (pairs.weights_N > 0)
        if not fit.any():
            continue
        own = pairs[fit]
        replies_NH = own.replies_of(0)
        scale = replies_NH.mean(dim=0), replies_NH.std(dim=0) + NEVER_ZERO
        draws_LN = (own.weights_N / own.weights_N.sum()).expand(len(precision_LCC), -1)
        weights_LCH = fit_heads(own, 0, scale, draws_LN, precision_LCC, centring=centring)
        apart_NH = (pairs.chosen_NFH[held, 0] - pairs.rejected_NFH[held, 0]) / scale[1]
        margins_LCN = weights_LCH @ apart_NH.T
        place_1N = pairs.criterion_N[held].expand(len(precision_LCC), 1, -1)
        margins_LN[:, held] = margins_LCN.gather(1, place_1N).squeeze(1)
    return margins_LN


def _tempered_loss(margins_N: Tensor, pairs: Comparisons) -> float:
    """Mean cross-entropy after a temperature of its own."""
    temperature = fit_temperature(margins_N, pairs.labels_N, pairs.weights_N)
    return float(bradley_terry_loss(margins_N / temperature, pairs.labels_N, pairs.weights_N))


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
    pairs = replace(pairs.of_family(family), criterion_N=torch.zeros_like(pairs.criterion_N))
    precision_L11 = torch.tensor(candidates).view(-1, 1, 1)
    margins_LN = _held_out_margins(pairs, precision_L11, folds_N, centring)
    losses = {
        f"{l2:g}": _tempered_loss(margins_N, pairs)
        for l2, margins_N in zip(candidates, margins_LN, strict=True)
    }
    coin = _tempered_loss(torch.zeros_like(pairs.labels_N), pairs)
    least = min(losses.values())
    allowed = coin - _KEPT_GAIN * (coin - least) if least < coin else least
    return min(l2 for l2 in candidates if losses[f"{l2:g}"] <= allowed), losses


def correlation_losses(
    pairs: Comparisons, group: ProbeGroup, correlation_LCC: Tensor, folds_N: Tensor
) -> Tensor:
    """What heads under each of L prior correlations of the criteria lose on held-out pairs, (L,).

    The cross-entropy in nats, summed over pairs (as many as weigh as these do, by Kish), each
    criterion's after its own temperature: so a criterion of few pairs counts by what it gains.
    """
    pairs = pairs.of_family(group.family)
    criteria = correlation_LCC.shape[1]
    l2_LC = torch.tensor(group.l2_C).expand(len(correlation_LCC), -1)
    precision_LCC = prior_precision(l2_LC, pairs.shares(criteria), correlation_LCC)
    margins_LN = _held_out_margins(pairs, precision_LCC, folds_N, group.centring)
    losses_L = torch.zeros(len(correlation_LCC))
    for criterion in range(criteria):
        own_N = pairs.criterion_N == criterion
        own = pairs[own_N]
        if not own.weights_N.any():
            continue
        count = float(own.weights_N.sum() ** 2 / own.weights_N.square().sum())
        losses_L += count * torch.tensor([_tempered_loss(m_N, own) for m_N in margins_LN[:, own_N]])
    return losses_L


def correlation_matrix(criteria: int, pairwise: Mapping[tuple[int, int], float]) -> Tensor:
    """Correlations of all criteria from those of two at a time, shape (C, C).

    Chosen two by two they need not fit together: they are shrunk, all by the same factor, as far
    as it takes to have an inverse.
    """
    correlation_CC = torch.eye(criteria)
    for (one, other), value in pairwise.items():
        correlation_CC[one, other] = correlation_CC[other, one] = value
    least = float(torch.linalg.eigvalsh(correlation_CC).min())
    if least >= _LEAST_EIGENVALUE:
        return correlation_CC
    kept = (1 - _LEAST_EIGENVALUE) / (1 - least)
    return kept * correlation_CC + (1 - kept) * torch.eye(criteria)


def fit_temperature(margins_N: Tensor, labels_N: Tensor, weights_N: Tensor) -> float:
    """The temperature T that minimises the cross-entropy of sigmoid(margin / T) on held-out pairs.

    Guo et al. (2017), section 4.2. From about 0.01 to 100, by a grid over the logarithm and a
    finer one around its best.
    """

    def best(grid: Tensor) -> float:
        losses = [bradley_terry_loss(margins_N / each, labels_N, weights_N) for each in grid]
        return float(grid[torch.stack(losses).argmin()])

    coarse = best(torch.logspace(-2, 2, 161))
    return best(coarse * torch.logspace(-0.025, 0.025, 51))
