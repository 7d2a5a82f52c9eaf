import math
import random
import tracemalloc

import pytest

from labelling.agreement import alpha, alpha_interval, nominal

# Krippendorff (2011), section C: four observers, twelve units, missing values.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
UNITS = [[v for v in unit if v is not None] for unit in zip(*OBSERVERS, strict=True)]


def test_the_worked_example_of_its_author_nominal_and_interval():
    assert alpha(UNITS) == pytest.approx(0.743, abs=5e-4)
    assert alpha(UNITS, lambda a, b: (a - b) ** 2) == pytest.approx(0.849, abs=5e-4)


def test_full_agreement_is_one_chance_is_zero_and_systematic_disagreement_is_below():
    assert alpha([["a", "a"], ["b", "b"], ["c", "c", "c"]]) == 1
    draw = random.Random(0)
    chance = [[draw.choice("ab") for _ in range(3)] for _ in range(20_000)]
    assert alpha(chance) == pytest.approx(0, abs=0.02)
    assert alpha([["a", "b"]] * 50) < -0.9


def test_units_with_one_verdict_say_nothing_and_nothing_to_disagree_on_is_no_number():
    assert alpha([*UNITS, ["a"], []]) == alpha(UNITS)
    assert math.isnan(alpha([["a", "a"], ["a", "a"]]))
    assert math.isnan(alpha([["a"], ["b"]]))
    assert math.isnan(alpha([]))


def test_two_judges_of_two_outcomes_by_hand():
    # Three units agree on a, one on b, one differs: 7 a and 3 b. Observed 2 of 10 ordered pairs,
    # expected 2 * 7 * 3 of 10 * 9.
    units = [["a", "a"]] * 3 + [["b", "b"], ["a", "b"]]
    assert alpha(units) == pytest.approx(1 - (2 / 10) / (42 / 90))
    assert nominal("a", "a") == 0 and nominal("a", "b") == 1


def test_its_interval_holds_it_and_follows_from_the_seed():
    found, low, high = alpha_interval(UNITS, 0, draws=300)
    assert low < found < high
    assert alpha_interval(UNITS, 0, draws=300) == (found, low, high)


def test_its_interval_is_that_of_drawing_units_one_by_one():
    draw = random.Random(0)
    units = [[draw.choice("aaab") for _ in range(draw.choice((1, 2, 3)))] for _ in range(200)]
    found, low, high = alpha_interval(units, 0, draws=20_000)
    paired = [verdicts for verdicts in units if len(verdicts) > 1]
    drawn = sorted(alpha(draw.choices(paired, k=len(paired))) for _ in range(4_000))
    assert found == alpha(units)
    # Both ends to a tenth of the interval's width, some four deviations of the 4,000.
    assert low == pytest.approx(drawn[100], abs=0.1 * (high - low))
    assert high == pytest.approx(drawn[-101], abs=0.1 * (high - low))


def test_the_interval_of_many_units_takes_little_memory():
    draw = random.Random(0)
    units = [draw.choices("ab", k=3) for _ in range(50_000)]
    tracemalloc.start()
    try:
        alpha_interval(units, 0)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 50e6  # a draw for every unit is 400 MB
