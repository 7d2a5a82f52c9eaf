"""What is measured of assessors and of a project, each with its interval.

Shares have Wilson intervals at 95 %, medians the interval between two order statistics. What is
counted: overall verdicts, unless a criterion is named, without a `doubt`; repeats only where
self-consistency is meant.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from labelling.records import Judgement, Verdict
from rlhf.records import OVERALL
from rlhf.statistics import fair_chance, sign_test, wilson_interval

Interval = tuple[float, float, float]
"""Value, low, high."""


@dataclass(frozen=True, slots=True)
class PositionBias:
    """How often the answer shown first was chosen among decided verdicts: the share with its
    interval, and the exact two-sided binomial p that it is one half."""

    first: int
    decided: int
    share: Interval
    p: float


@dataclass(frozen=True, slots=True)
class AssessorQuality:
    """One assessor's measures; a share of nothing is (nan, 0, 1).

    `honeypots` is the share of honeypots judged right; `consistency` of second looks, in the other
    order, with the first look's verdict; `agreement` of the others' verdicts on the same pairs with
    the assessor's own, averaged over pairs; `seconds` the median per judgement.
    """

    assessor: str
    judgements: int
    honeypots: Interval
    consistency: Interval
    agreement: Interval
    seconds: Interval
    position: PositionBias


def position_bias(judgements: Sequence[Judgement], criterion: str = OVERALL) -> PositionBias:
    """Of ordinary work: no honeypots, no repeats, which answer was shown first known.

    The order is drawn for every pair, so without bias the expected share is exactly 1/2. It is
    evened out over a pair's judges: where they agree, p and the interval of a project are cautious.
    """
    told = [(row.first, row.verdicts.get(criterion)) for row in _plain(judgements) if row.first]
    decided = [(first, verdict) for first, verdict in told if verdict in ("a", "b")]
    chosen = sum(first == verdict for first, verdict in decided)
    share = wilson_interval(chosen, len(decided))
    return PositionBias(chosen, len(decided), share, sign_test(chosen, len(decided)))


def median_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The median and the narrowest symmetric pair of order statistics that covers it with at least
    `level` (David & Nagaraja (2003), Order Statistics, section 7.1); infinite where there are too
    few. Values that are no numbers are left out."""
    ordered = sorted(value for value in values if not math.isnan(value))
    size = len(ordered)
    if not size:
        return math.nan, -math.inf, math.inf
    # The k-th smallest and k-th largest miss the median with 2 P(Bin(n, 1/2) < k).
    outside, k = 0.0, 0
    while True:
        outside += 2 * fair_chance(k, size)
        if outside > 1 - level:
            break
        k += 1
    middle = statistics.median(ordered)
    return (middle, ordered[k - 1], ordered[size - k]) if k else (middle, -math.inf, math.inf)


def assessor_quality(judgements: Sequence[Judgement]) -> dict[str, AssessorQuality]:
    """Every assessor's measures, by name.

    Raises:
        ValueError: some judgements are of people and some of something else.
    """
    if len(kinds := {judgement.kind for judgement in judgements}) > 1:
        raise ValueError(f"judgements of kinds {sorted(kinds)}: one kind at a time")
    counted = sorted((row for row in judgements if not row.doubt), key=lambda row: row.at)
    own: dict[str, list[Judgement]] = defaultdict(list)
    for row in counted:
        own[row.assessor].append(row)
    said: dict[str, Counter[Verdict]] = defaultdict(Counter)
    for row in _plain(counted):
        said[row.pair][row.verdicts[OVERALL]] += 1
    return {name: _measured(name, rows, said) for name, rows in own.items()}


def _measured(
    name: str, rows: Sequence[Judgement], said: dict[str, Counter[Verdict]]
) -> AssessorQuality:
    pots = [row for row in rows if row.truth is not None and not row.repeat]
    right = sum(row.verdicts[OVERALL] == row.truth for row in pots)
    looks: dict[str, Verdict] = {}
    same = []
    for row in rows:
        if row.repeat and row.pair in looks:
            same.append(row.verdicts[OVERALL] == looks[row.pair])
        else:
            looks.setdefault(row.pair, row.verdicts[OVERALL])
    # Verdicts on one pair are not independent of each other: a pair counts once.
    agreed = [
        (said[row.pair][row.verdicts[OVERALL]] - 1) / (said[row.pair].total() - 1)
        for row in _plain(rows)
        if said[row.pair].total() > 1
    ]
    return AssessorQuality(
        name,
        len(rows),
        wilson_interval(right, len(pots)),
        wilson_interval(sum(same), len(same)),
        wilson_interval(math.fsum(agreed), len(agreed)),
        median_interval([row.seconds for row in rows]),
        position_bias(rows),
    )


def _plain(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Ordinary work: first looks, at pairs whose truth is not known."""
    return [row for row in judgements if row.truth is None and not row.repeat and not row.doubt]
