"""Whether a reward model is right and knows it, by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf.calibration import (
    calibrated_ece,
    expected_calibration_error,
    pair_figures,
    reliability_curve,
)
from rlhf.statistics import wilson_interval


def test_calibration_error_by_hand():
    # Two bins of two: confidence 0.6, both right, gap 0.4; confidence 0.9, half right, gap 0.4.
    # Weighted (2 * 0.4 + 2 * 0.4) / 4.
    error = expected_calibration_error(
        torch.tensor([0.9, 0.6, 0.9, 0.6]), torch.tensor([1.0, 1.0, 0.0, 1.0]), bins=2
    )
    assert error == pytest.approx(0.4)


def test_calibration_bins_weigh_by_their_size():
    # Bins of 2 and 1: gap |0.6 - 1| = 0.4 over two, |0.9 - 1| = 0.1 over one: 0.9 / 3.
    error = expected_calibration_error(torch.tensor([0.6, 0.6, 0.9]), torch.ones(3), bins=2)
    assert error == pytest.approx(0.3)


def test_calibration_sees_a_pair_and_its_mirror_alike():
    probabilities, outcomes = torch.tensor([0.9, 0.7, 0.6]), torch.tensor([1.0, 0.0, 1.0])
    direct = expected_calibration_error(probabilities, outcomes, bins=3)
    mirrored = expected_calibration_error(1 - probabilities, 1 - outcomes, bins=3)
    assert mirrored == pytest.approx(direct)


def test_calibrated_probabilities_have_no_error():
    outcomes = torch.tensor([1.0] * 8 + [0.0] * 2)
    assert expected_calibration_error(torch.full((10,), 0.8), outcomes, bins=1) == pytest.approx(
        0, abs=1e-6
    )


def test_more_bins_than_values_is_one_value_a_bin():
    error = expected_calibration_error(torch.tensor([0.6, 0.9]), torch.tensor([1.0, 0.0]), bins=10)
    assert error == pytest.approx((0.4 + 0.9) / 2)


def test_calibration_counts_weights_and_what_a_side_won():
    # One bin. Confidence 0.8, right by 0.75, weight 3; 0.6, right by 0, weight 1:
    # |3 * 0.05 + 1 * 0.6| / 4.
    error = expected_calibration_error(
        torch.tensor([0.8, 0.4]),
        torch.tensor([0.75, 1.0]),
        torch.tensor([3.0, 1.0]),
        bins=1,
    )
    assert error == pytest.approx(0.1875)


def test_at_a_half_either_side_is_half_right_so_that_a_coin_is_calibrated():
    coin_N = torch.full((100,), 0.5)
    for outcome in (0.0, 0.3, 1.0):
        assert expected_calibration_error(coin_N, torch.full((100,), outcome)) == 0
    # One bin. Confidence 0.5 and half right, confidence 0.8 and right by 0.3: |0 + 0.5| / 2.
    error = expected_calibration_error(torch.tensor([0.5, 0.2]), torch.tensor([1.0, 0.7]), bins=1)
    assert error == pytest.approx(0.25)
    # As accuracy counts a margin of zero.
    found = pair_figures(torch.zeros(1, 100), 1.0, torch.ones(100), torch.ones(100))
    assert (found["accuracy"], found["ece"]) == (0.5, 0.0)


# Three members; the mean margins are 1, -1, 0, 2.
MARGINS_KN = torch.tensor([[1.0, -1.0, 0.0, 2.0], [2.0, -2.0, 1.0, 3.0], [0.0, 0.0, -1.0, 1.0]])


def figures(labels: list[float], weights: list[float] | None = None) -> dict:
    weights_N = torch.ones(4) if weights is None else torch.tensor(weights)
    return pair_figures(MARGINS_KN, 2.0, torch.tensor(labels), weights_N)


def test_a_pair_is_right_on_its_labels_side_and_a_zero_margin_is_half_right():
    found = figures([1.0, 1.0, 1.0, 1.0])
    assert found["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert found["member_accuracy"] == [2.5 / 4, 3 / 4, 2 / 4]
    low, high = wilson_interval(2.5, 4)[1:]
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((low, high))
    # Labels below a half say that `rejected` was preferred.
    assert figures([0.0, 0.0, 0.0, 0.0])["accuracy"] == (0 + 1 + 0.5 + 0) / 4
    assert figures([0.9, 0.2, 0.7, 0.6])["accuracy"] == (1 + 1 + 0.5 + 1) / 4


def test_ties_have_no_right_side_but_are_calibrated():
    found = figures([1.0, 0.5, 0.5, 1.0])
    assert (found["pairs"], found["ties"], found["accuracy"]) == (4, 2, 1.0)
    assert found["ece"] != figures([1.0, 0.0, 0.0, 1.0])["ece"]
    nothing = figures([0.5] * 4)
    assert (nothing["accuracy"], nothing["accuracy_low"], nothing["member_accuracy"]) == (
        None,
        None,
        [],
    )


def test_a_pair_counts_by_its_weight():
    found = figures([1.0, 1.0, 1.0, 1.0], [1.0, 3.0, 0.0, 2.0])
    assert found["accuracy"] == pytest.approx((1 + 0 + 2) / 6)
    # Effective pairs: 6^2 / (1 + 9 + 4).
    low, high = wilson_interval(0.5 * 36 / 14, 36 / 14)[1:]
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((low, high))


# Reliability


def test_the_reliability_curve_by_hand():
    # Confidences 0.6, 0.7 | 0.8, 0.9; the likelier side was right for 0.4 (as 0) and 0.8, 0.9.
    curve = reliability_curve(
        torch.tensor([0.4, 0.7, 0.8, 0.9]), torch.tensor([0.0, 0.0, 1.0, 1.0]), bins=2
    )
    found = [(bin.confidence, bin.right, bin.mass) for bin in curve]
    assert found == [pytest.approx((0.65, 0.5, 2.0)), pytest.approx((0.85, 1.0, 2.0))]


def test_bins_without_weight_are_left_out_of_the_curve():
    curve = reliability_curve(
        torch.tensor([0.6, 0.7, 0.8, 0.9]),
        torch.tensor([1.0, 0.0, 1.0, 0.0]),
        torch.tensor([0.0, 0.0, 3.0, 1.0]),
        bins=2,
    )
    # 0.8 three times and 0.9 once; right for 1 three times and 0 once.
    assert [(bin.confidence, bin.right, bin.mass) for bin in curve] == [
        pytest.approx((3.3 / 4, 3 / 4, 4.0))
    ]


def test_the_least_sure_come_first_on_either_side_of_a_half():
    curve = reliability_curve(torch.tensor([0.1, 0.6, 0.7]), torch.ones(3), bins=3)
    # The likelier side of 0.1 is the other one, which was wrong.
    found = [(bin.confidence, bin.right) for bin in curve]
    assert found == [pytest.approx(pair) for pair in ((0.6, 1.0), (0.7, 1.0), (0.9, 0.0))]


def test_figures_hold_the_curve_and_the_band_of_their_probabilities():
    found = figures([1.0, 0.0, 1.0, 1.0])
    probabilities_N = torch.sigmoid(MARGINS_KN.mean(dim=0) / 2.0)
    curve = reliability_curve(probabilities_N, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert found["reliability"] == [
        {"confidence": bin.confidence, "right": bin.right, "mass": bin.mass} for bin in curve
    ]
    assert found["ece_band"] == calibrated_ece(probabilities_N, draws=200)


@pytest.mark.filterwarnings("ignore:std")
def test_no_pairs_have_no_figures():
    found = pair_figures(torch.zeros(3, 0), 1.0, torch.zeros(0), torch.zeros(0))
    assert found["pairs"] == 0
    assert (found["accuracy"], found["ece"], found["ece_band"]) == (None, None, None)
    assert found["reliability"] == []


def test_chance_alone_makes_an_error_and_a_calibrated_model_stays_below_the_band():
    generator = torch.Generator().manual_seed(3)
    probabilities_N = 0.5 + torch.rand(300, generator=generator) / 2
    band = calibrated_ece(probabilities_N)
    assert 0.03 < band < 0.15
    below = [
        expected_calibration_error(
            probabilities_N, torch.bernoulli(probabilities_N, generator=generator)
        )
        <= band
        for _ in range(200)
    ]
    assert 0.9 <= sum(below) / 200 <= 0.99
    boasting = expected_calibration_error(
        torch.full((300,), 0.95), torch.bernoulli(torch.full((300,), 0.6), generator=generator)
    )
    assert boasting > calibrated_ece(torch.full((300,), 0.95))


@pytest.mark.parametrize("heavy", [10.0, 0.0])
def test_the_band_knows_that_unequal_weights_leave_less_to_go_by(heavy):
    generator = torch.Generator().manual_seed(5)
    probabilities_N = 0.5 + torch.rand(300, generator=generator) / 2
    weights_N = torch.where(torch.rand(300, generator=generator) < 0.2, 1.0, heavy)
    band = calibrated_ece(probabilities_N, weights_N)
    below = [
        expected_calibration_error(
            probabilities_N, torch.bernoulli(probabilities_N, generator=generator), weights_N
        )
        <= band
        for _ in range(1000)
    ]
    assert 0.9 <= sum(below) / 1000 <= 0.99


def test_of_pairs_without_weight_nothing_is_said():
    found = pair_figures(
        MARGINS_KN, 1.0, torch.ones(MARGINS_KN.shape[1]), torch.zeros(MARGINS_KN.shape[1])
    )
    assert found["ece"] is found["ece_band"] is found["accuracy"] is None
