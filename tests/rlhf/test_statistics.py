import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.statistics import (
    Z_95,
    anytime_sign_test,
    auroc,
    fair_tail,
    paired_interval,
    sign_test,
    wilson_interval,
)


def test_95_percent_of_a_normal_lies_within_1_96_deviations():
    assert pytest.approx(1.959963985, abs=1e-9) == Z_95


def test_paired_interval_by_hand():
    # Mean 2, deviation 1, half width 1.959964 / sqrt(3) = 1.131586.
    assert paired_interval([1, 2, 3]) == pytest.approx((2, 2 - 1.131586, 2 + 1.131586), abs=1e-6)


def test_one_difference_claims_nothing():
    assert paired_interval([0.4]) == (0.4, -math.inf, math.inf)


def test_wilson_interval_of_8_in_10():
    # z^2 = 3.841459; centre (0.8 + 3.841459 / 20) / 1.3841459 = 0.716740;
    # half 1.959964 / 1.3841459 * sqrt(0.016 + 3.841459 / 400) = 0.226578.
    assert wilson_interval(8, 10) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)


def test_wilson_interval_stays_within_zero_and_one():
    # With no success the upper end is z^2 / (n + z^2) = 3.841459 / 13.841459.
    assert wilson_interval(0, 10) == pytest.approx((0, 0, 0.277533), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((1, 0.722467, 1), abs=1e-6)
    for trials in range(1, 200):
        assert wilson_interval(0, trials)[1] >= 0
        assert wilson_interval(trials, trials)[2] <= 1


def test_a_tie_counts_half():
    share, low, high = wilson_interval(2.5, 5)
    assert share == 0.5
    assert low + high == pytest.approx(1)


def test_no_trials_claim_nothing():
    share, low, high = wilson_interval(0, 0)
    assert math.isnan(share)
    assert (low, high) == (0, 1)


# ROC


def test_the_area_by_hand_with_a_tie():
    # 3 beats 1 and 2; 2 beats 1 and ties with 2: 3.5 of 4.
    assert auroc([1.0, 2.0], [3.0, 2.0]) == 3.5 / 4
    assert auroc([0.0], [1.0]) == 1.0
    assert auroc([1.0], [0.0]) == 0.0


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
)
def test_the_area_is_the_share_of_pairs_in_order(negatives, positives):
    pairs = [(n < p) + 0.5 * (n == p) for n in negatives for p in positives]
    assert auroc(negatives, positives) == pytest.approx(sum(pairs) / len(pairs))


def test_a_wilson_interval_of_one_deviation_by_hand():
    # z = 1: centre (0.6 + 1 / 20) / 1.1 = 0.590909; half sqrt(0.024 + 1 / 400) / 1.1 = 0.147989.
    assert wilson_interval(6, 10, z=1.0) == pytest.approx((0.6, 0.442920, 0.738898), abs=1e-6)


# Fair coins


@pytest.mark.parametrize("trials", [0, 1, 2, 7, 40, 301])
def test_a_fair_coins_tail_is_the_sum_of_its_binomials(trials):
    for most in range(-1, trials + 1):
        exact = sum(math.comb(trials, k) for k in range(most + 1)) / 2**trials
        assert fair_tail(most, trials) == pytest.approx(exact, rel=1e-11)


def test_a_fair_coins_tail_of_a_million_throws_is_that_of_the_normal_distribution():
    # 500 deviations of 1/2 below the middle, with continuity: z = 499.5 / 500.
    normal = math.erfc(499.5 / 500 / math.sqrt(2)) / 2
    assert fair_tail(499_500, 1_000_000) == pytest.approx(normal, rel=1e-5)
    assert fair_tail(0, 1_000_000) == 0


def test_the_sign_test_for_every_look_by_hand():
    # e = 2^n / ((n + 1) C(n, k)): 256 / 9 for 8 of 8, 2^25 / (26 * 53,130) for 20 of 25.
    assert anytime_sign_test(8, 8) == pytest.approx(9 / 256)
    assert anytime_sign_test(5, 25) == pytest.approx(26 * 53_130 / 2**25)
    assert anytime_sign_test(2, 3) == 1
    assert anytime_sign_test(0, 0) == 1
    assert anytime_sign_test(600_000, 1_000_000) == 0


def chance_ever_below(level: float, trials: int, test) -> float:
    """That a fair coin's p, looked at after each of so many throws, is ever at most `level`."""
    chances, ever = {0: 1.0}, 0.0
    for thrown in range(1, trials + 1):
        after = dict.fromkeys(range(thrown + 1), 0.0)
        for heads, chance in chances.items():
            after[heads] += chance / 2
            after[heads + 1] += chance / 2
        chances = {}
        for heads, chance in after.items():
            if test(heads, thrown) <= level:
                ever += chance
            else:
                chances[heads] = chance
    return ever


@pytest.mark.parametrize("level", [0.05, 0.2])
def test_a_fair_coin_is_ever_called_unfair_at_most_as_often_as_the_level_says(level):
    ever = chance_ever_below(level, 400, anytime_sign_test)
    assert level / 3 < ever <= level
    # What it is for: the test of a number settled beforehand does not keep its level.
    assert chance_ever_below(level, 400, sign_test) > 3 * level
