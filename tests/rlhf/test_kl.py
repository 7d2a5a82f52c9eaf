import pytest

from rlhf.kl import penalised_rewards


def test_the_penalty_is_the_coefficient_times_the_nats_of_the_completion():
    # 1 - 0.1 * 3, -2 - 0.1 * -5.
    assert penalised_rewards((1.0, -2.0), (3.0, -5.0), 0.1) == pytest.approx((0.7, -1.5))


def test_a_zero_coefficient_leaves_rewards_alone():
    assert penalised_rewards((1.0, -2.0), (3.0, -5.0), 0.0) == (1.0, -2.0)


def test_kl_is_the_log_ratio_of_rollout_to_reference_summed_over_tokens(make):
    group = make.scored((0.0, 0.0), kl_G=(0.75, -0.25))
    assert group.kl_G == pytest.approx((0.75, -0.25))


def test_rewards_without_their_kl_are_refused():
    with pytest.raises(ValueError):
        penalised_rewards((1.0, 2.0), (0.0,), 0.1)
