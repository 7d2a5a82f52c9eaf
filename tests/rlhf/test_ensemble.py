import math

import pytest
import torch

from rlhf.ensemble import (
    aggregate,
    disagreement,
    expected_calibration_error,
    quantile_threshold,
    standardise,
)


def test_each_member_is_standardised_by_its_own_scale():
    # (10 - 10) / 2, (14 - 10) / 2; (0.1 - 0.3) / 0.1, (0.3 - 0.3) / 0.1.
    result = standardise(
        torch.tensor([[10.0, 14.0], [0.1, 0.3]]), torch.tensor([10.0, 0.3]), torch.tensor([2, 0.1])
    )
    torch.testing.assert_close(result, torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))


def test_disagreement_is_the_population_deviation_over_members():
    # Column 1: mean 2, squares (1 + 1) / 2 = 1. Column 2: equal.
    result = disagreement(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    torch.testing.assert_close(result, torch.tensor([1.0, 0.0]))


def test_one_member_never_disagrees():
    assert disagreement(torch.tensor([[1.0, -7.0]])).tolist() == [0.0, 0.0]


def test_aggregate_subtracts_the_penalty_per_deviation():
    rewards = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    torch.testing.assert_close(aggregate(rewards), torch.tensor([2.0, 5.0]))
    penalised = aggregate(rewards, disagreement_penalty=0.5)
    torch.testing.assert_close(penalised, torch.tensor([1.5, 5.0]))


def test_quantile_threshold_by_hand():
    # N = 19, rate 0.05: order statistic ceil(20 * 0.95) = 19, the largest.
    assert quantile_threshold(torch.arange(19.0).flip(0), 0.05) == 18.0
    # N = 99, rate 0.1: order statistic ceil(100 * 0.9) = 90, the value 89 of 0..98.
    assert quantile_threshold(torch.arange(99.0), 0.1) == 89.0


def test_quantile_threshold_is_infinite_when_too_few_values_could_promise_the_rate():
    # N = 18, rate 0.05: order statistic ceil(19 * 0.95) = 19 of 18.
    assert quantile_threshold(torch.arange(18.0), 0.05) == math.inf


@pytest.mark.parametrize("count", [10, 20, 31, 100])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25])
def test_false_alarms_stay_below_the_rate_and_as_near_as_order_statistics_allow(count, rate):
    # Exchangeable: each of the values is equally likely to be the new one.
    values = torch.arange(float(count))
    alarms = sum(
        values[new].item() > quantile_threshold(values[values != new], rate) for new in range(count)
    )
    assert rate - 1 / count < alarms / count <= rate


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0])
def test_a_rate_outside_the_unit_interval_is_refused(rate):
    with pytest.raises(ValueError, match=f"false_alarm_rate must lie in .*{rate}"):
        quantile_threshold(torch.arange(9.0), rate)


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
