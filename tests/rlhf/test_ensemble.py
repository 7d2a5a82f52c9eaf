import math

import pytest
import torch

from rlhf import ensemble
from rlhf.ensemble import (
    aggregate,
    bootstrap_draws,
    disagreement,
    distance,
    false_alarm_interval,
    family_disagreement,
    lower_bound,
    quantile_threshold,
    shift_score,
    standardise,
    whitening,
)
from rlhf.statistics import conformal_rank


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


def test_the_lower_bound_takes_off_the_disagreement_by_the_penalty():
    rewards = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    torch.testing.assert_close(aggregate(rewards), torch.tensor([2.0, 5.0]))
    penalised = lower_bound(aggregate(rewards), disagreement(rewards), 0.5)
    torch.testing.assert_close(penalised, torch.tensor([1.5, 5.0]))
    assert lower_bound(2.0, 1.0, 0.5) == 1.5


def test_a_covariance_is_the_same_in_blocks(monkeypatch):
    rows = torch.randn(50, 3, generator=torch.manual_seed(0))
    whole = whitening(rows)
    monkeypatch.setattr(ensemble, "_ROWS_AT_ONCE", 7)
    torch.testing.assert_close(whitening(rows), whole)


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


def test_the_distance_of_uncorrelated_features_by_hand():
    # Deviations 2 and 1, no shrinkage: (2, 2) lies at sqrt((2/2)^2 + (2/1)^2).
    rows_ND = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]])
    found_N = distance(torch.tensor([[2.0, 2.0], [0.0, 0.0]]), whitening(rows_ND, shrinkage=0.0))
    torch.testing.assert_close(found_N, torch.tensor([math.sqrt(5.0), 0.0]))


def test_the_distance_knows_how_features_go_together():
    # Covariance [[1, 0.8], [0.8, 1]]: with the correlation (1, 1) is 2 / 1.8 away in squares,
    # against it (1, -1) is 2 / 0.2.
    generator = torch.Generator().manual_seed(0)
    first_N, noise_N = torch.randn(2, 200_000, generator=generator)
    rows_ND = torch.stack([first_N, 0.8 * first_N + 0.6 * noise_N], dim=1)
    along, across = distance(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), whitening(rows_ND, 0.0))
    assert along == pytest.approx(math.sqrt(2 / 1.8), rel=0.02)
    assert across == pytest.approx(math.sqrt(2 / 0.2), rel=0.02)


def test_shrinkage_takes_fewer_rows_than_features():
    rows_ND = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError):
        whitening(rows_ND, shrinkage=0.0)
    whitening_DD = whitening(rows_ND, shrinkage=0.25)
    assert torch.isfinite(whitening_DD).all()
    # A direction that no row has is left with the shrinkage alone: variance 1/4, distance doubled.
    free_D = torch.linalg.svd(rows_ND).Vh[-1]
    assert distance(free_D.unsqueeze(0), whitening_DD).item() == pytest.approx(2.0, rel=1e-3)


def test_the_shift_score_by_hand():
    signals_SN = torch.tensor([[1.0, 3.0], [10.0, 10.0]])
    found_N = shift_score(signals_SN, torch.tensor([1.0, 8.0]), torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(found_N, torch.tensor([0.0 + 0.5, 1.0 + 0.5]))


def test_the_interval_of_the_false_alarm_rate_is_that_of_its_beta_distribution():
    # n = 19, rate 0.05: rank 19, so Beta(1, 19), whose quantile q is 1 - (1 - q)^(1/19).
    low, high = false_alarm_interval(19, 0.05)
    assert low == pytest.approx(1 - 0.975 ** (1 / 19), rel=1e-6)
    assert high == pytest.approx(1 - 0.025 ** (1 / 19), rel=1e-6)


@pytest.mark.parametrize(("count", "rate"), [(40, 0.1), (128, 0.05), (1000, 0.05)])
def test_the_interval_holds_in_simulation(count, rate):
    generator = torch.Generator().manual_seed(0)
    # Of uniform values the true false-alarm rate of a threshold t is 1 - t.
    sorted_RN = torch.rand(4000, count, generator=generator).sort(dim=1).values
    true_R = 1 - sorted_RN[:, conformal_rank(count, rate) - 1]
    low, high = false_alarm_interval(count, rate)
    assert low < rate < high
    assert (true_R < low).double().mean().item() == pytest.approx(0.025, abs=0.01)
    assert (true_R > high).double().mean().item() == pytest.approx(0.025, abs=0.01)


def test_too_few_values_for_a_threshold_never_alarm():
    assert false_alarm_interval(18, 0.05) == (0.0, 0.0)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0])
def test_a_rate_outside_the_unit_interval_is_refused(rate):
    with pytest.raises(ValueError, match=f"false_alarm_rate must lie in .*{rate}"):
        quantile_threshold(torch.arange(9.0), rate)


def test_disagreement_is_taken_within_families_and_those_of_one_member_say_nothing():
    rewards_KN = torch.tensor([[1.0], [3.0], [10.0], [16.0], [99.0]])
    family_K = torch.tensor([0, 0, 1, 1, 2])
    # Deviations 1 and 3; the fifth stands alone.
    assert family_disagreement(rewards_KN, family_K).tolist() == [2.0]


def test_members_that_all_stand_alone_disagree_with_each_other():
    rewards_KN = torch.tensor([[1.0], [3.0]])
    assert family_disagreement(rewards_KN, torch.tensor([0, 1])).tolist() == [1.0]


def test_every_eight_members_draw_every_example_equally_often():
    draws_KN = bootstrap_draws(50, 24, 0)
    for eight_KN in draws_KN.split(8):
        assert torch.bincount(eight_KN.flatten()).tolist() == [8] * 50
    counts_KN = torch.stack([torch.bincount(draw_N, minlength=50) for draw_N in draws_KN])
    assert len(torch.unique(counts_KN, dim=0)) == 24
    # Each leaves out about as many as a draw with replacement would (37 %).
    left_out_K = (counts_KN == 0).float().mean(dim=1)
    assert left_out_K.min() > 0.2
    assert left_out_K.max() < 0.5
    assert left_out_K.mean().item() == pytest.approx((7 / 8) ** 8, abs=0.03)


def test_a_member_draws_the_same_by_its_seed_and_number_whoever_stands_beside_it():
    draws_KN = bootstrap_draws(50, 20, 0)
    assert torch.equal(bootstrap_draws(50, 3, 0, first=6), draws_KN[6:9])
    assert not torch.equal(bootstrap_draws(50, 20, 1), draws_KN)
    assert bootstrap_draws(1, 2, 0).tolist() == [[0], [0]]
