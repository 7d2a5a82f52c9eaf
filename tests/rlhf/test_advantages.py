import pytest
import torch

from rlhf.advantages import advantages, group_relative, leave_one_out, without_signal


def rewards(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_group_relative_by_hand():
    # Mean 1; deviations -1 -1 -1 3; squares 1 + 1 + 1 + 9 = 12; 12 / (4 - 1) = 4; deviation 2.
    result = group_relative(rewards([0, 0, 0, 4]), epsilon=0.0)
    torch.testing.assert_close(result, rewards([-0.5, -0.5, -0.5, 1.5]))


def test_group_relative_adds_epsilon_to_the_deviation():
    # As above with 2 + 1 in the denominator.
    result = group_relative(rewards([0, 0, 0, 4]), epsilon=1.0)
    torch.testing.assert_close(result, rewards([-1 / 3, -1 / 3, -1 / 3, 1.0]))


def test_group_relative_without_division_is_the_centred_reward():
    result = group_relative(rewards([1, 2, 6]), divide_by_deviation=False)
    torch.testing.assert_close(result, rewards([-2, -1, 3]))


def test_leave_one_out_by_hand():
    # Means of the others: (2 + 6) / 2 = 4, (1 + 6) / 2 = 3.5, (1 + 2) / 2 = 1.5.
    torch.testing.assert_close(leave_one_out(rewards([1, 2, 6])), rewards([-3, -1.5, 4.5]))


def test_leave_one_out_is_the_centred_reward_times_g_over_g_minus_one():
    values = torch.randn(5, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    centred = values - values.mean(dim=1, keepdim=True)
    torch.testing.assert_close(leave_one_out(values), centred * 4 / 3)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_groups_never_mix(algorithm):
    alone = advantages(rewards([1, 2, 6]), algorithm)
    beside = advantages(rewards([1, 2, 6], [1e6, -1e6, 3e5]), algorithm)
    torch.testing.assert_close(beside[:1], alone, rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e3])
def test_equal_rewards_get_zeros(algorithm, value):
    result = advantages(rewards([value] * 7), algorithm)
    torch.testing.assert_close(result, rewards([0.0] * 7), rtol=0, atol=1e-7)


def test_the_algorithms_are_chosen_by_name():
    values = rewards([1, 2, 6])
    assert torch.equal(advantages(values, "grpo"), group_relative(values))
    assert torch.equal(
        advantages(values, "grpo", divide_by_deviation=False),
        group_relative(values, divide_by_deviation=False),
    )
    assert torch.equal(advantages(values, "rloo"), leave_one_out(values))
    with pytest.raises(ValueError, match=r"'ppo'.*grpo and rloo"):
        advantages(values, "ppo")


@pytest.mark.parametrize("function", [group_relative, leave_one_out])
@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 0), (1, 2, 3)])
def test_rewards_that_are_no_groups_are_refused_by_shape(function, shape):
    with pytest.raises(ValueError, match=r"at least 2 completions, got \("):
        function(torch.zeros(shape))


def test_a_group_has_signal_as_soon_as_one_reward_differs():
    assert without_signal(rewards([0.3, 0.3, 0.3])[0])
    assert not without_signal(rewards([0.3, 0.3, 0.3 + 1e-12])[0])


@pytest.mark.parametrize(
    ("case", "algorithm", "divide_by_deviation"),
    [
        ("grpo_advantages_group", "grpo", True),
        ("grpo_advantages_none", "grpo", False),
        ("rloo_advantages", "rloo", True),
    ],
)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_advantages_agree_with_trl(trl, case, algorithm, divide_by_deviation, dtype, atol):
    result = advantages(
        torch.tensor(trl["inputs"]["rewards"], dtype=dtype),
        algorithm,
        divide_by_deviation=divide_by_deviation,
    )
    expected = torch.tensor(trl["cases"][case]["advantages"], dtype=dtype)
    torch.testing.assert_close(result.flatten(), expected, rtol=0, atol=atol)
