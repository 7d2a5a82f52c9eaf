import math
import random
from dataclasses import replace

import pytest

from labelling.quality import assessor_quality, median_interval, position_bias, sign_test
from labelling.records import Judgement
from rlhf.records import OVERALL
from rlhf.statistics import wilson_interval


def judged(pair, assessor, verdict, first="a", **more):
    return Judgement(pair, assessor, {OVERALL: verdict}, first, **more)


def test_the_sign_test_by_hand():
    # Two-sided: P(0 or 1 of 5) + P(4 or 5 of 5) = 2 * (1 + 5) / 32.
    assert sign_test(1, 5) == pytest.approx(12 / 32)
    assert sign_test(4, 5) == pytest.approx(12 / 32)
    assert sign_test(0, 10) == pytest.approx(2 / 1024)
    assert sign_test(3, 6) == 1
    assert sign_test(0, 0) == 1
    # Normal approximation with continuity: z = 499.5 / sqrt(25,000 / ... ) of 100,000 throws.
    z = (50_500 - 50_000 - 0.5) / math.sqrt(100_000 / 4)
    assert sign_test(50_500, 100_000) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


def test_position_bias_counts_decided_ordinary_first_looks_whose_order_is_known():
    rows = [
        judged("1", "x", "a", "a"),
        judged("2", "x", "b", "b"),
        judged("3", "x", "b", "a"),
        judged("4", "x", "tie", "a"),
        judged("5", "x", "bad", "a"),
        judged("6", "x", "a", ""),
        judged("7", "x", "a", "a", truth="a"),
        judged("1", "x", "a", "b", repeat=True),
        judged("8", "x", "a", "a", doubt="paused"),
    ]
    found = position_bias(rows)
    assert (found.first, found.decided) == (2, 3)
    assert found.share == wilson_interval(2, 3)
    assert found.p == 1
    nothing = position_bias([])
    assert math.isnan(nothing.share[0]) and nothing.p == 1


def test_the_median_lies_between_order_statistics_that_cover_it():
    # Of six values, smallest and largest both miss the median with 2 / 64; the next ones with
    # 2 * 7 / 64 > 0.05.
    assert median_interval([6, 1, 5, 2, 4, 3]) == (3.5, 1, 6)
    assert median_interval([1, 2, 3, 4, 5]) == (3, -math.inf, math.inf)
    assert median_interval([math.nan, 2.0])[0] == 2
    assert math.isnan(median_interval([math.nan])[0])


def test_the_median_is_covered_as_often_as_promised():
    draw = random.Random(0)
    covered = 0
    for _ in range(1000):
        _, low, high = median_interval([draw.gauss(0, 1) for _ in range(40)])
        covered += low <= 0 <= high
    assert 940 <= covered <= 995


def test_an_assessors_measures_by_hand():
    rows = [
        judged("pot-1", "x", "a", truth="a", seconds=10.0, at=1),
        judged("pot-2", "x", "tie", truth="b", seconds=20.0, at=2),
        judged("1", "x", "a", "a", seconds=30.0, at=3),
        judged("1", "x", "a", "b", repeat=True, at=4),
        judged("2", "x", "b", "a", at=5),
        judged("2", "x", "a", "b", repeat=True, at=6),
        judged("1", "y", "a", at=7),
        judged("1", "z", "b", at=8),
        judged("2", "y", "a", at=9),
        judged("3", "x", "a", at=10),
    ]
    found = assessor_quality(rows)["x"]
    assert found.judgements == 7
    assert found.honeypots == wilson_interval(1, 2)
    assert found.consistency == wilson_interval(1, 2)
    # Pair 1: one of two others agrees; pair 2: none of one; pair 3 has no others.
    assert found.agreement == wilson_interval(0.5, 2)
    assert found.seconds[0] == 20
    # Decided first looks: 1 (first), 2 (second), 3 (first).
    assert (found.position.first, found.position.decided) == (2, 3)


def test_one_who_judged_nothing_that_could_be_measured_has_no_numbers_but_whole_intervals():
    [found] = assessor_quality([judged("1", "x", "tie", "")]).values()
    for share in (found.honeypots, found.consistency, found.agreement, found.position.share):
        assert math.isnan(share[0]) and share[1:] == (0, 1)
    assert math.isnan(found.seconds[0])
    assert assessor_quality([]) == {}


def test_people_and_models_are_not_measured_together():
    one = judged("1", "x", "a")
    with pytest.raises(ValueError, match="one kind at a time"):
        assessor_quality([one, replace(one, assessor="m", kind="model")])
