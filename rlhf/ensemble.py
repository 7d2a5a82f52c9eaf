"""What makes reward models a family, and how they become one reward and one doubt.

Shapes: K members, N completions, S signals. Members' rewards are standardised before they get here:
each has mean 0 and deviation 1 on the replies it was trained on, so that none outvotes another by
scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.seeding import derive_seed
from rlhf.statistics import conformal_rank

Value = TypeVar("Value", float, Tensor)

_BLOCK = 8
"""Members that draw every example equally often between them."""
_ROWS_AT_ONCE = 8192
"""Of features in float64, which are not all made so at once."""


def bootstrap_draws(count: int, members: int, seed: int, first: int = 0) -> Tensor:
    """Which of `count` examples (at least 1) each member is trained on, indices, (K, count).

    As a draw with replacement, but balanced (Davison, Hinkley & Schechtman, 1986): members 0 to 7
    share out eight copies of every example, so do 8 to 15 and so on, and the mean of such a block
    leans on no example more than on another. Members are numbered from `first`, so that a member is
    the same whoever stands beside it.
    """
    start, stop = first // _BLOCK, math.ceil((first + members) / _BLOCK)
    blocks = []
    for block in range(start, stop):
        generator = torch.Generator().manual_seed(derive_seed(seed, "bootstrap", block))
        copies = torch.randperm(_BLOCK * count, generator=generator) % count
        blocks.append(copies.view(_BLOCK, count))
    return torch.cat(blocks)[first - start * _BLOCK :][:members]


def standardise(scores_KN: Tensor, mean_K: Tensor, deviation_K: Tensor) -> Tensor:
    """Each member's scores by its own mean and deviation (both stored with the reward model)."""
    return (scores_KN - mean_K.unsqueeze(1)) / deviation_K.unsqueeze(1)


def disagreement(rewards_KN: Tensor) -> Tensor:
    """Standard deviation over members (population form, so that K = 1 gives 0); shape (N,).

    Lakshminarayanan et al. (2017), deep ensembles: members agree where they saw data.
    """
    return rewards_KN.std(dim=0, correction=0)


def family_disagreement(rewards_KN: Tensor, family_K: Tensor) -> Tensor:
    """Disagreement within each family of members, averaged over families; shape (N,).

    Members that look at different features differ everywhere, on familiar replies too, which hides
    what disagreement is to show (measured: docs/reward-models.md). A family of one member says
    nothing and is left out; where all are such, the deviation is taken over all members.
    """
    families, sizes = torch.unique(family_K, return_counts=True)
    families = families[sizes > 1]
    if not len(families):
        return disagreement(rewards_KN)
    return torch.stack([disagreement(rewards_KN[family_K == f]) for f in families]).mean(dim=0)


def aggregate(rewards_KN: Tensor) -> Tensor:
    """Mean over members; shape (N,)."""
    return rewards_KN.mean(dim=0)


def lower_bound(reward: Value, disagreement: Value, penalty: float) -> Value:
    """A reward less `penalty` times the disagreement within families, wherever doubt is held
    against a reply: in training, in stopping, in best-of-N.

    After Coste et al. (2024), Reward Model Ensembles Help Mitigate Overoptimization, section 3.3
    (uncertainty-weighted optimisation), with the deviation instead of the variance, so that both
    terms have the reward's unit.
    """
    return reward - penalty * disagreement


def whitening(standardised_ND: Tensor, shrinkage: float = 0.1) -> Tensor:
    """The matrix W (D, D) with |W z| the Mahalanobis distance of z from the origin.

    The covariance of the standardised features is shrunk towards the identity,
    (1 - s) S + s I (Ledoit & Wolf, 2004, with a fixed weight), so that it can be inverted with
    fewer rows than features; W is the inverse of its Cholesky factor.
    """
    count, width = standardised_ND.shape
    covariance_DD = torch.zeros(width, width, dtype=torch.float64)
    for part_nD in torch.split(standardised_ND, _ROWS_AT_ONCE):
        rows_nD = part_nD.double()
        covariance_DD += rows_nD.T @ rows_nD / max(1, count)
    identity_DD = torch.eye(width, dtype=torch.float64)
    shrunk_DD = (1 - shrinkage) * covariance_DD + shrinkage * identity_DD
    lower_DD = torch.linalg.cholesky(shrunk_DD)
    inverse_DD: Tensor = torch.linalg.solve_triangular(lower_DD, identity_DD, upper=False)
    return inverse_DD.float()


def distance(standardised_ND: Tensor, whitening_DD: Tensor) -> Tensor:
    """Mahalanobis distance of each row from the training set, shape (N,).

    Lee et al. (2018), A Simple Unified Framework for Detecting Out-of-Distribution Samples,
    equation 2, with one class.
    """
    distance_N: Tensor = torch.linalg.vector_norm(standardised_ND @ whitening_DD.T, dim=1)
    return distance_N


def shift_score(signals_SN: Tensor, mean_S: Tensor, deviation_S: Tensor) -> Tensor:
    """One number for "not what the members know": the sum of the signals, each standardised by
    what it is on held-out replies; shape (N,)."""
    return standardise(signals_SN, mean_S, deviation_S).sum(dim=0)


def quantile_threshold(values_N: Tensor, false_alarm_rate: float) -> float:
    """Smallest threshold that at most `false_alarm_rate` of exchangeable values exceed.

    The split-conformal quantile (Vovk et al., 2005); infinite when N is too small to promise the
    rate.
    """
    count = values_N.numel()
    rank = conformal_rank(count, false_alarm_rate)
    if rank > count:
        return float("inf")
    return float(torch.sort(values_N).values[rank - 1])


def false_alarm_interval(count: int, false_alarm_rate: float) -> tuple[float, float]:
    """Where the true false-alarm rate of a conformal threshold lies with 95 % probability.

    Over calibration sets of `count` values it is distributed as Beta(n + 1 - k, k) for the rank k
    (Vovk, 2012, Conditional validity of inductive conformal predictors, section 4).
    """
    rank = conformal_rank(count, false_alarm_rate)
    if rank > count:
        return 0.0, 0.0
    first = count + 1 - rank

    def below(rate: float) -> float:
        """P(Beta(first, rank) <= rate) = P(Binomial(count, rate) >= first)."""
        terms = (
            math.lgamma(count + 1)
            - math.lgamma(hits + 1)
            - math.lgamma(count - hits + 1)
            + hits * math.log(rate)
            + (count - hits) * math.log1p(-rate)
            for hits in range(first)
        )
        return 1 - sum(map(math.exp, terms))

    return _solve(below, 0.025), _solve(below, 0.975)


def _solve(rising: Callable[[float], float], value: float) -> float:
    """Where a rising function on (0, 1) takes a value, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2
