"""Items put in order by people of whom some guess, and some have it backwards.

Chen, Bennett, Collins-Thompson & Horvitz (2013), Pairwise Ranking Aggregation in a Crowdsourced
Setting ("Crowd-BT"): items have scores s, assessor k has a reliability eta_k, and

    P(k says i > j) = eta_k sigmoid(s_i - s_j) + (1 - eta_k) sigmoid(s_j - s_i).

At eta = 1 that is Bradley & Terry (1952); at 1/2 the assessor tells nothing, below it the contrary.
As in the paper a virtual item, of score 0 here, has won and lost against every item, `regular`
times each: scores stay finite and have an origin. Reliabilities have a prior of `right` and `wrong`
verdicts given beforehand, which says that people are more often right than not: the data alone
cannot tell an order and honest assessors from the reverse order and liars.

Fitted by expectation maximisation from the scores of Bradley & Terry. The hidden thing is whether
the assessor meant what the scores say, with a probability r; reliabilities are shares of r; scores
rise by Newton steps, halved until the log-posterior does not fall. Given the reliabilities, items
that no chain of comparisons joins do not bear on each other, so a step is solved for each set of
joined items by itself: answers to different prompts never meet.

Shapes: C comparisons (a tie is two, of half the weight), I items, A assessors; B sets of N items.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from labelling.comparison import Comparison

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Scores in log-odds, their mean zero; how often each assessor means what the scores say; and
    the log-posterior of both, without constants."""

    scores: Mapping[str, float]
    reliabilities: Mapping[str, float]
    log_posterior: float

    @property
    def order(self) -> list[str]:
        """The items, best first; equal ones by name."""
        return sorted(self.scores, key=lambda item: (-self.scores[item], item))

    def probability(self, one: str, other: str) -> float:
        """That `one` is better than `other`, by their scores."""
        return 0.5 + 0.5 * math.tanh((self.scores[one] - self.scores[other]) / 2)


@dataclass(frozen=True, slots=True)
class Posterior:
    """The log-posterior of scores and reliabilities, given the comparisons: who said that which
    item beats which, with what weight. Items are numbered set by set of joined ones; `sets` says
    how many sets there are of how many items, in that order."""

    who_C: NDArray[np.intp]
    better_C: NDArray[np.intp]
    worse_C: NDArray[np.intp]
    weight_C: Array
    sets: Sequence[tuple[int, int]]
    regular: float
    right: float
    wrong: float

    def value(self, scores_I: Array, eta_A: Array) -> float:
        """Up to a constant."""
        said_C = self._agree(scores_I, eta_A) + self._contrary(scores_I, eta_A)
        prior_A = _times_log(self.right, eta_A) + _times_log(self.wrong, 1 - eta_A)
        virtual_I = _log_sigmoid(scores_I) + _log_sigmoid(-scores_I)
        return float(
            (self.weight_C * np.log(said_C)).sum() + prior_A.sum() + self.regular * virtual_I.sum()
        )

    def meant(self, scores_I: Array, eta_A: Array) -> Array:
        """r: probability that the assessor meant what the scores say, given what was said. [C]"""
        agree_C = self._agree(scores_I, eta_A)
        return agree_C / (agree_C + self._contrary(scores_I, eta_A))

    def by_scores(self, scores_I: Array, eta_A: Array) -> Array:
        """The gradient: of log P(k says i > j) by s_i - s_j it is r - sigmoid(s_i - s_j). [I]"""
        found_I = self.regular * (1 - 2 * _sigmoid(scores_I))
        by_gap_C = self.weight_C * (self.meant(scores_I, eta_A) - _sigmoid(self._gap(scores_I)))
        np.add.at(found_I, self.better_C, by_gap_C)
        np.add.at(found_I, self.worse_C, -by_gap_C)
        return found_I

    def by_reliabilities(self, scores_I: Array, eta_A: Array) -> Array:
        """The gradient: of log P(k says i > j) by eta it is r / eta - (1 - r) / (1 - eta). [A]"""
        for_A, against_A = self._shares(self.meant(scores_I, eta_A))
        return for_A / eta_A - against_A / (1 - eta_A)

    def reliabilities(self, scores_I: Array, eta_A: Array) -> Array:
        """The best ones for r as it is: each a share of verdicts that were meant."""
        for_A, against_A = self._shares(self.meant(scores_I, eta_A))
        return for_A / (for_A + against_A)

    def climb(self, scores_I: Array, eta_A: Array, before: float) -> tuple[Array, float]:
        """Scores after a Newton step for r as it is, and the log-posterior there."""
        step_I = self._newton(scores_I, self.by_scores(scores_I, eta_A))
        for _ in range(30):
            found = self.value(scores_I + step_I, eta_A)
            if found >= before:
                return scores_I + step_I, found
            step_I = step_I / 2
        return scores_I, before

    def _newton(self, scores_I: Array, slope_I: Array) -> Array:
        """The slope over the curvature of Bradley & Terry's log-posterior."""
        chance_C, chance_I = _sigmoid(self._gap(scores_I)), _sigmoid(scores_I)
        bend_C = self.weight_C * chance_C * (1 - chance_C)
        diagonal_I = 2 * self.regular * chance_I * (1 - chance_I)
        np.add.at(diagonal_I, self.better_C, bend_C)
        np.add.at(diagonal_I, self.worse_C, bend_C)
        steps, start = [], 0
        for count, size in self.sets:
            stop = start + count * size
            here_C = (start <= self.better_C) & (self.better_C < stop)
            at_C, one_C = np.divmod(self.better_C[here_C] - start, size)
            other_C = (self.worse_C[here_C] - start) % size
            curvature_BNN = np.zeros((count, size, size))
            curvature_BNN[:, range(size), range(size)] = diagonal_I[start:stop].reshape(count, size)
            np.add.at(curvature_BNN, (at_C, one_C, other_C), -bend_C[here_C])
            np.add.at(curvature_BNN, (at_C, other_C, one_C), -bend_C[here_C])
            slope_BN1 = slope_I[start:stop].reshape(count, size, 1)
            steps.append(np.linalg.solve(curvature_BNN, slope_BN1).ravel())
            start = stop
        return np.concatenate(steps)

    def _gap(self, scores_I: Array) -> Array:
        gap_C: Array = scores_I[self.better_C] - scores_I[self.worse_C]
        return gap_C

    def _agree(self, scores_I: Array, eta_A: Array) -> Array:
        agree_C: Array = eta_A[self.who_C] * _sigmoid(self._gap(scores_I))
        return agree_C

    def _contrary(self, scores_I: Array, eta_A: Array) -> Array:
        contrary_C: Array = (1 - eta_A[self.who_C]) * _sigmoid(-self._gap(scores_I))
        return contrary_C

    def _shares(self, meant_C: Array) -> tuple[Array, Array]:
        """Verdicts meant, and not, of each assessor, those of the prior among them."""
        for_A = np.full(self.who_C.max() + 1, self.right)
        against_A = np.full(self.who_C.max() + 1, self.wrong)
        np.add.at(for_A, self.who_C, self.weight_C * meant_C)
        np.add.at(against_A, self.who_C, self.weight_C * (1 - meant_C))
        return for_A, against_A


def crowd_bradley_terry(
    comparisons: Sequence[Comparison],
    *,
    regular: float = 0.5,
    right: float = 3.0,
    wrong: float = 1.0,
    tolerance: float = 1e-9,
    iterations: int = 2000,
) -> Ranking:
    """Scores and reliabilities together, as the module says.

    Args:
        regular: comparisons won, and lost, against the virtual item.
        right: verdicts that every assessor is taken to have meant beforehand.
        wrong: the same of those that said the contrary.
        tolerance: what the log-posterior still has to gain in a round, relative to its size.

    Raises:
        ValueError: there are no comparisons, or a prior is not above zero.
    """
    if min(regular, right, wrong) <= 0:
        raise ValueError(f"regular {regular}, right {right} and wrong {wrong} have to be above 0")
    items, assessors, posterior = posterior_of(comparisons, regular, right, wrong)
    eta_A = np.full(len(assessors), right / (right + wrong))
    trusting = replace(posterior, right=0.0, wrong=0.0)
    scores_I = _climbed(trusting, np.ones(len(assessors)), len(items), tolerance, iterations)
    before = posterior.value(scores_I, eta_A)
    for _ in range(iterations):
        eta_A = posterior.reliabilities(scores_I, eta_A)
        scores_I, found = posterior.climb(scores_I, eta_A, posterior.value(scores_I, eta_A))
        if found - before < tolerance * max(1.0, abs(found)):
            break
        before = found
    return _ranking(items, scores_I, dict(zip(assessors, eta_A.tolist(), strict=True)), found)


def bradley_terry(
    comparisons: Sequence[Comparison],
    *,
    regular: float = 0.5,
    tolerance: float = 1e-12,
    iterations: int = 200,
) -> Ranking:
    """Scores as if everybody meant what they said: Bradley & Terry (1952).

    Raises:
        ValueError: there are no comparisons, or `regular` is not above zero.
    """
    if regular <= 0:
        raise ValueError(f"regular {regular} has to be above 0")
    items, assessors, posterior = posterior_of(comparisons, regular, 0.0, 0.0)
    everybody_A = np.ones(len(assessors))
    scores_I = _climbed(posterior, everybody_A, len(items), tolerance, iterations)
    found = posterior.value(scores_I, everybody_A)
    return _ranking(items, scores_I, dict.fromkeys(assessors, 1.0), found)


def posterior_of(
    comparisons: Sequence[Comparison], regular: float, right: float, wrong: float
) -> tuple[list[str], list[str], Posterior]:
    """Items, assessors and the posterior over both. Of each assessor's verdicts on a pair only the
    sum counts, so equal ones are one of more weight."""
    if not comparisons:
        raise ValueError("there are no comparisons to rank by")
    joined = _joined(comparisons)
    items = [name for names in joined for name in names]
    assessors = sorted({told.assessor for told in comparisons})
    item_at = {name: at for at, name in enumerate(items)}
    assessor_at = {name: at for at, name in enumerate(assessors)}
    weights: dict[tuple[int, int, int], float] = {}
    for told in comparisons:
        who = assessor_at[told.assessor]
        one, other = item_at[told.first], item_at[told.second]
        for key, weight in (
            ((who, one, other), told.outcome),
            ((who, other, one), 1 - told.outcome),
        ):
            if weight:
                weights[key] = weights.get(key, 0.0) + weight
    who_C, better_C, worse_C = np.array(list(weights)).T
    weight_C = np.array(list(weights.values()))
    sizes = Counter(map(len, joined))
    sets = [(sizes[size], size) for size in sorted(sizes)]
    posterior = Posterior(who_C, better_C, worse_C, weight_C, sets, regular, right, wrong)
    return items, assessors, posterior


def _joined(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Sets of items that chains of comparisons join, small ones first, in the order of names."""
    of: dict[str, list[str]] = {}
    for told in comparisons:
        few, many = sorted(
            (of.setdefault(name, [name]) for name in (told.first, told.second)), key=len
        )
        if few is not many:
            many += few
            of.update(dict.fromkeys(few, many))
    sets = {id(names): names for names in of.values()}.values()
    return sorted(map(sorted, sets), key=lambda names: (len(names), names))


def _climbed(
    posterior: Posterior, eta_A: Array, items: int, tolerance: float, iterations: int
) -> Array:
    """The best scores for these reliabilities."""
    scores_I = np.zeros(items)
    before = posterior.value(scores_I, eta_A)
    for _ in range(iterations):
        scores_I, found = posterior.climb(scores_I, eta_A, before)
        if found - before < tolerance * max(1.0, abs(found)):
            break
        before = found
    return scores_I


def _ranking(
    items: Sequence[str], scores_I: Array, reliabilities: Mapping[str, float], found: float
) -> Ranking:
    centred = (scores_I - scores_I.mean()).tolist()
    return Ranking(dict(zip(items, centred, strict=True)), reliabilities, found)


def _sigmoid(x: Array) -> Array:
    # By tanh: an exponential would overflow for scores far apart.
    found: Array = 0.5 + 0.5 * np.tanh(x / 2)
    return found


def _log_sigmoid(x: Array) -> Array:
    found: Array = -np.logaddexp(0.0, -x)
    return found


def _times_log(count: float, chance: Array) -> Array:
    """A prior's share; nothing where there is none, whatever the chance."""
    return count * np.log(chance) if count else np.zeros_like(chance)
