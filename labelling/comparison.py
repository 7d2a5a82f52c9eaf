"""Models compared directly: who beats whom, how sure that is, and what to ask next.

Only direct comparisons count. A single rating would hide that A beats B, B beats C and C beats A,
which human preferences do (Condorcet, 1785). So the outcome is a matrix; a winner is named where
one model beats every other, and else the smallest set of models each of which beats all outside of
it (Smith, 1973), with the cycles inside.

Ties count half in shares and not at all in tests of who is better.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from labelling.records import PREFERS_A, Judgement
from rlhf.records import OVERALL
from rlhf.statistics import anytime_sign_test, fair_tail, wilson_interval


@dataclass(frozen=True, slots=True)
class Comparison:
    """One verdict on two things, models or answers: 1 the first is better, 0 the second, 0.5 a
    tie; `assessor` is whose it is, where that matters."""

    first: str
    second: str
    outcome: float
    assessor: str = ""

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise ValueError(f"{self.first} compared with itself")
        if self.outcome not in (0.0, 0.5, 1.0):
            raise ValueError(f"outcome {self.outcome}: 1, 0 or 0.5")


@dataclass(frozen=True, slots=True)
class Record:
    """How one model did against another."""

    wins: int = 0
    losses: int = 0
    ties: int = 0

    @property
    def count(self) -> int:
        """Judgements."""
        return self.wins + self.losses + self.ties

    @property
    def share(self) -> tuple[float, float, float]:
        """Share of wins, ties as half, with its 95 % Wilson interval."""
        return wilson_interval(self.wins + self.ties / 2, self.count)

    @property
    def p(self) -> float:
        """Sign test that neither is better, which holds however often it is looked at."""
        return anytime_sign_test(self.wins, self.wins + self.losses)

    @property
    def reversed(self) -> Record:
        """The same from the other's side."""
        return Record(self.losses, self.wins, self.ties)


class WinMatrix:
    """All comparisons of models, by pair."""

    def __init__(self, comparisons: Iterable[Comparison]) -> None:
        records: dict[tuple[str, str], Record] = {}
        for comparison in comparisons:
            pair = (comparison.first, comparison.second)
            flipped = pair[0] > pair[1]
            outcome = 1 - comparison.outcome if flipped else comparison.outcome
            key = (pair[1], pair[0]) if flipped else pair
            old = records.get(key, Record())
            records[key] = Record(
                old.wins + (outcome == 1), old.losses + (outcome == 0), old.ties + (outcome == 0.5)
            )
        self.models = sorted({model for pair in records for model in pair})
        self._records = records

    def record(self, one: str, other: str) -> Record:
        """How `one` did against `other`; empty where they never met."""
        if one > other:
            return self._records.get((other, one), Record()).reversed
        return self._records.get((one, other), Record())

    def beats(self, one: str, other: str) -> bool:
        """Whether it has won more often than lost."""
        record = self.record(one, other)
        return record.wins > record.losses

    def surely_beats(self, level: float = 0.05) -> dict[tuple[str, str], float]:
        """Pairs (better, worse) whose sign test holds at `level` over all pairs together, with p
        adjusted (Holm, 1979)."""
        met = [pair for pair, record in self._records.items() if record.wins + record.losses]
        adjusted = holm({pair: self._records[pair].p for pair in met})
        return {
            (pair if self.beats(*pair) else (pair[1], pair[0])): p
            for pair, p in adjusted.items()
            if p <= level and self._records[pair].wins != self._records[pair].losses
        }

    def condorcet_winner(self) -> str | None:
        """The model that beats every other, if there is one."""
        for model in self.models:
            if all(self.beats(model, other) for other in self.models if other != model):
                return model
        return None

    def smith_set(self) -> list[str]:
        """The smallest set of models each of which beats every model outside of it."""
        # By the number of models that each beats or ties with: the set is a beginning of this
        # order, for whoever is inside beats more than whoever is outside.
        unbeaten = {
            model: sum(not self.beats(other, model) for other in self.models if other != model)
            for model in self.models
        }
        order = sorted(self.models, key=lambda model: (-unbeaten[model], model))
        for size in range(1, len(order) + 1):
            inside, outside = order[:size], order[size:]
            tied = outside and unbeaten[inside[-1]] == unbeaten[outside[0]]
            if not tied and all(self.beats(a, b) for a in inside for b in outside):
                return sorted(inside)
        return sorted(order)

    def cycles(self, *, sure: bool = False) -> list[list[str]]:
        """Sets of models in which each can be reached from each by "beats" (or, `sure`, by sure
        beats): several in one set cannot be put in an order, and stand by name here."""
        edges = (
            set(self.surely_beats())
            if sure
            else {(a, b) for a in self.models for b in self.models if a != b and self.beats(a, b)}
        )
        reach = {model: _reached(model, edges) for model in self.models}
        found: list[list[str]] = []
        for model in self.models:
            same = sorted(
                other for other in self.models if other in reach[model] and model in reach[other]
            )
            if len(same) > 1 and same not in found:
                found.append(same)
        return found

    def ask_next(self) -> list[tuple[float, str, str]]:
        """Pairs by how much one more verdict is expected to tell of who is better, most first:
        (bits, one, other)."""
        pairs = combinations(self.models, 2)
        told = [(expected_information(self.record(a, b)), a, b) for a, b in pairs]
        return sorted(told, key=lambda item: (-item[0], item[1], item[2]))


def majorities(
    judgements: Iterable[Judgement],
    sides: Callable[[Judgement], tuple[str, str]],
    criterion: str = OVERALL,
) -> list[tuple[tuple[str, str], float]]:
    """Pairs whose answers are of two sides, each with its majority's outcome for the first by one
    criterion: judges of one pair are not independent of each other, so that it counts once."""
    said: dict[str, list[float]] = defaultdict(list)
    whose: dict[str, tuple[str, str]] = {}
    for each in judgements:
        one, other = sides(each)
        if one and other and one != other and criterion in each.verdicts:
            said[each.pair].append(PREFERS_A[each.verdicts[criterion]])
            whose[each.pair] = (one, other)
    return [(whose[pair], _majority(outcomes)) for pair, outcomes in said.items()]


def _majority(outcomes: Sequence[float]) -> float:
    mean = math.fsum(outcomes) / len(outcomes)
    return 1.0 if mean > 0.5 else 0.0 if mean < 0.5 else 0.5


def holm(p_values: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """p adjusted for as many tests, step down (Holm, 1979)."""
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    adjusted: dict[tuple[str, str], float] = {}
    largest = 0.0
    for rank, (pair, p) in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p))
        adjusted[pair] = largest
    return adjusted


def chance_better(record: Record) -> float:
    """Posterior chance that the first is better: that its share of decided verdicts is above one
    half, from a uniform prior.

    Beta(wins + 1, losses + 1) above one half is a binomial tail: P(Bin(n + 1, 1/2) <= wins).
    """
    return fair_tail(record.wins, record.wins + record.losses + 1)


def expected_information(record: Record) -> float:
    """Bits that one more decided verdict is expected to tell of who is better (Lindley, 1956)."""
    wins, losses = record.wins, record.losses
    chance = (wins + 1) / (wins + losses + 2)
    now = _entropy(chance_better(record))
    later = chance * _entropy(chance_better(Record(wins + 1, losses))) + (1 - chance) * _entropy(
        chance_better(Record(wins, losses + 1))
    )
    return max(0.0, now - later)


def _entropy(chance: float) -> float:
    return -sum(p * math.log2(p) for p in (chance, 1 - chance) if p > 0)


def _reached(start: str, edges: Iterable[tuple[str, str]]) -> set[str]:
    edges, reached, todo = set(edges), set[str](), [start]
    while todo:
        here = todo.pop()
        for one, other in edges:
            if one == here and other not in reached:
                reached.add(other)
                todo.append(other)
    return reached
