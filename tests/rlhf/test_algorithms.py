import pytest
import torch

from rlhf.algorithms import Share, algorithm_of
from rlhf.algorithms.grpo import group_relative
from rlhf.algorithms.ppo import generalised_advantages
from rlhf.algorithms.rloo import leave_one_out
from rlhf.config import (
    CEMSection,
    GRPOSection,
    GSPOSection,
    PPOSection,
    ReinforcePPSection,
    RLOOSection,
)
from rlhf.losses import BatchSize, clipped_policy_loss


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


GRPO, RLOO = GRPOSection(), RLOOSection(type="rloo")
GSPO, CEM = GSPOSection(type="gspo"), CEMSection(type="cem")
PLUS_PLUS = ReinforcePPSection(type="reinforce_pp")
COMPARED_IN_GROUPS = [GRPO, RLOO, GSPO, CEM]


def credit_of(settings, values):
    """Where tokens add nothing."""
    return algorithm_of(settings).credit(values, torch.zeros_like(values))


def credit(settings, *rows: list[float]):
    return credit_of(settings, rewards(*rows))


@pytest.mark.parametrize("settings", COMPARED_IN_GROUPS, ids=lambda s: s.type)
def test_groups_never_mix(settings):
    alone = credit(settings, [1, 2, 6])
    beside = credit(settings, [1, 2, 6], [1e6, -1e6, 3e5])
    assert torch.equal(beside.values_PG[:1], alone.values_PG)
    assert torch.equal(beside.trained_PG[:1], alone.trained_PG)


@pytest.mark.parametrize("settings", COMPARED_IN_GROUPS, ids=lambda s: s.type)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e3])
def test_groups_of_equal_rewards_are_not_trained_on(settings, value):
    found = credit(settings, [value] * 7, [value] * 6 + [value + 1e-9])
    assert not found.trained_PG[0].any()
    assert found.trained_PG[1].any()
    if settings is not CEM:
        torch.testing.assert_close(found.values_PG[0], rewards([0.0] * 7)[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("settings", COMPARED_IN_GROUPS, ids=lambda s: s.type)
def test_a_group_that_only_its_tokens_tell_apart_is_trained_on(settings):
    found = algorithm_of(settings).credit(rewards([1, 1, 1]), rewards([0, 0, -0.1]))
    assert found.trained_PG.any()
    assert found.values_PG[0, 2] <= found.values_PG[0, :2].min()


@pytest.mark.parametrize("settings", [GRPO, GSPO], ids=lambda s: s.type)
@pytest.mark.parametrize("coefficient", [0.002, 0.02, 0.2])
def test_what_tokens_add_is_centred_and_not_divided(settings, coefficient):
    # KL of 4 6 8 12 nats: their mean is 7.5. In the second group the rewards differ as well.
    penalties = -coefficient * rewards([4, 6, 8, 12], [4, 6, 8, 12])
    found = algorithm_of(settings).credit(rewards([1, 1, 1, 1], [0, 0, 0, 4]), penalties)
    alone = coefficient * rewards([3.5, 1.5, -0.5, -4.5])
    torch.testing.assert_close(found.values_PG[:1], alone)
    torch.testing.assert_close(found.values_PG[1:], group_relative(rewards([0, 0, 0, 4])) + alone)


def test_the_algorithms_are_chosen_by_their_settings():
    values = rewards([1, 2, 6])
    centred = GRPOSection(divide_by_deviation=False)
    for settings, expected in (
        (GRPO, group_relative(values)),
        (GSPO, group_relative(values)),
        (centred, group_relative(values, divide_by_deviation=False)),
        (RLOO, leave_one_out(values)),
    ):
        assert torch.equal(credit_of(settings, values).values_PG, expected)


def test_reinforce_pp_compares_with_the_whole_batch_by_hand():
    # Mean 2, squares 4 + 4 + 1 + 1 over four: deviation sqrt(2.5).
    found = credit(PLUS_PLUS, [0, 4], [1, 3])
    expected = rewards([-2, 2], [-1, 1]) / (2.5**0.5 + 1e-4)
    torch.testing.assert_close(found.values_PG, expected)
    assert found.trained_PG.all()


def test_reinforce_pp_trains_on_a_group_of_equal_rewards_that_differs_from_the_batch():
    found = credit(PLUS_PLUS, [3, 3], [1, 1])
    assert found.trained_PG.all()
    assert (found.values_PG[0] > 0).all()
    assert not credit(PLUS_PLUS, [3, 3], [3, 3]).trained_PG.any()


def test_the_elite_of_a_prompt_are_its_best():
    found = credit(CEMSection(type="cem", elite_share=0.5), [1, 4, 2, 3], [9, 8, 7, 6])
    assert found.trained_PG.tolist() == [[False, True, False, True], [True, True, False, False]]
    assert found.values_PG[found.trained_PG].tolist() == [1.0] * 4


def test_the_elite_of_a_batch_may_come_from_one_prompt():
    settings = CEMSection(type="cem", elite_share=0.25, elite_of="batch")
    found = credit(settings, [1, 4, 2, 3], [9, 8, 7, 6])
    assert found.trained_PG.tolist() == [[False] * 4, [True, True, False, False]]
    # Equal rewards of a prompt are no reason to leave it out here.
    found = credit(settings, [1, 1, 1, 1], [9, 9, 9, 9])
    assert found.trained_PG.tolist() == [[False] * 4, [True, True, False, False]]
    assert not credit(settings, [1, 1], [1, 1]).trained_PG.any()


def test_at_least_one_is_elite_and_of_equal_ones_the_first():
    found = credit(CEMSection(type="cem", elite_share=0.01), [1, 5, 5])
    assert found.trained_PG.tolist() == [[False, True, False]]


CLIPS = {"low": "epsilon", "high": "epsilon_high"}


@pytest.mark.parametrize(("share", "size"), [(0.9, 4), (0.75, 2), (0.99, 8)])
def test_never_everybody_is_elite(share, size):
    found = credit(CEMSection(type="cem", elite_share=share), [float(n) for n in range(size)])
    assert found.trained_PG.tolist() == [[False, *[True] * (size - 1)]]


SIZE = BatchSize(sequences=2, tokens=5, max_tokens=4)
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.float64)
OLD = torch.log(torch.tensor([[0.5, 0.5, 0.5, 0.1], [0.5, 0.5, 0.1, 0.1]], dtype=torch.float64))


def test_cem_raises_the_likelihood_of_its_elite_by_hand():
    new = OLD.clone().requires_grad_()
    found = algorithm_of(CEM).loss(
        Share(new, OLD - 1, torch.ones(2, 1, dtype=torch.float64), MASK, SIZE)
    )
    # Five tokens of probability one half.
    assert found.loss.item() == pytest.approx(float(torch.log(torch.tensor(2.0))))
    found.loss.backward()
    torch.testing.assert_close(new.grad, -MASK / 5)
    assert not found.clipped_BT.any()
    # By e likelier than when they were sampled.
    torch.testing.assert_close(found.ratio_BT[MASK > 0], torch.full((5,), 2.718281828).double())


def test_gspo_by_hand():
    settings = GSPOSection(type="gspo", clip_low=0.1, clip_high=0.1)
    shift = torch.tensor([[0.3, 0.0, 0.0, 9.0], [-0.4, 0.0, 9.0, 9.0]], dtype=torch.float64)
    new = (OLD + shift).requires_grad_()
    values = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    found = algorithm_of(settings).loss(Share(new, OLD, values, MASK, SIZE))
    # Means of the logs: 0.1, clipped from 1.105 to 1.1; -0.2, free since the credit is positive.
    expected = -(1.1 * 2 + 0.8187307530779818 * 3) / 2
    assert found.loss.item() == pytest.approx(expected)
    assert found.clipped_BT.tolist() == [[True, True, True, False], [False] * 4]
    found.loss.backward()
    # All tokens of a completion alike; none of the clipped one.
    slope = -0.8187307530779818 * 3 / 2 / 2
    torch.testing.assert_close(
        new.grad, torch.tensor([[0.0] * 4, [slope, slope, 0.0, 0.0]], dtype=torch.float64)
    )


def test_a_part_without_weight_adds_nothing_to_any_algorithm():
    for settings in (*COMPARED_IN_GROUPS, PLUS_PLUS, PPOSection(type="ppo")):
        new = (OLD + 0.01).requires_grad_()
        nothing = torch.zeros_like(MASK)
        found = algorithm_of(settings).loss(
            Share(new, OLD, torch.ones(2, 1).double(), nothing, SIZE)
        )
        found.loss.backward()
        assert found.loss.item() == 0
        assert not new.grad.any()


@pytest.mark.parametrize("settings", [*COMPARED_IN_GROUPS, PLUS_PLUS], ids=lambda s: s.type)
def test_parts_of_a_batch_add_up_to_the_whole(settings):
    algorithm, values = algorithm_of(settings), torch.tensor([[1.0], [-2.0]]).double()
    new = OLD + torch.linspace(-0.2, 0.2, 8, dtype=torch.float64).reshape(2, 4)
    whole = algorithm.loss(Share(new, OLD, values, MASK, SIZE)).loss
    parts = [
        algorithm.loss(Share(*(each[n : n + 1] for each in (new, OLD, values, MASK)), SIZE))
        for n in range(2)
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole)


def test_the_dual_clip_bounds_what_a_bad_token_may_push_by_hand():
    ratios = torch.tensor([[4.0, 2.0, 0.5, 1.0]], dtype=torch.float64)
    new = (OLD[:1] + ratios.log()).requires_grad_()
    found = clipped_policy_loss(
        new,
        OLD[:1],
        torch.tensor([[-1.0]], dtype=torch.float64),
        torch.ones(1, 4, dtype=torch.float64),
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
        normalisation="token",
        size=BatchSize(1, 4, 4),
    )
    # -3 by the dual clip, -2 free, -0.8 by the lower clip, -1 free.
    assert found.loss.item() == pytest.approx((3 + 2 + 0.8 + 1) / 4)
    assert found.clipped_BT.tolist() == [[True, False, True, False]]
    found.loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, 0.5, 0.0, 0.25]], dtype=torch.float64))


@pytest.mark.parametrize("function", [group_relative, leave_one_out])
@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 0), (1, 2, 3)])
def test_rewards_that_are_no_groups_are_refused_by_shape(function, shape):
    with pytest.raises(ValueError, match=r"at least 2 completions, got \("):
        function(torch.zeros(shape))


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("grpo_advantages_group", GRPO),
        ("grpo_advantages_none", GRPOSection(divide_by_deviation=False)),
        ("rloo_advantages", RLOO),
    ],
)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_advantages_agree_with_trl(trl, case, settings, dtype, atol):
    values = torch.tensor(trl["inputs"]["rewards"], dtype=dtype)
    result = credit_of(settings, values).values_PG
    expected = torch.tensor(trl["cases"][case]["advantages"], dtype=dtype)
    torch.testing.assert_close(result.flatten(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["gspo", "rloo"])
def test_losses_of_whole_completions_agree_with_trl(trl, kind, dtype, atol):
    case = trl["cases"]["loss_grpo_sequence" if kind == "gspo" else "loss_rloo"]
    mask = torch.tensor(trl["inputs"]["completion_mask"])
    policy = torch.tensor(trl["inputs"]["policy_logprobs"], dtype=dtype, requires_grad=True)
    clips = {f"clip_{side}": case["settings"][key] for side, key in CLIPS.items()}
    share = Share(
        policy,
        torch.tensor(trl["inputs"]["old_logprobs"], dtype=dtype),
        torch.tensor(case["advantages"], dtype=dtype).unsqueeze(1),
        mask,
        BatchSize(len(mask), int(mask.sum()), 8),
    )
    if kind == "gspo":
        settings, factor = GSPOSection(type="gspo", **clips), 1
    else:
        # TRL's is a mean over completions, here over completions times the tokens they may have.
        whole = {"ratio": "completion", "normalisation": "constant"}
        settings, factor = RLOOSection(type="rloo", **whole, **clips), share.size.max_tokens
    found = algorithm_of(settings).loss(share)
    (factor * found.loss).backward()
    assert factor * found.loss.item() == pytest.approx(case["loss"], abs=atol)
    expected = torch.tensor(case["grad_policy_logprobs"], dtype=dtype)
    torch.testing.assert_close(policy.grad, expected, rtol=0, atol=atol)
    assert found.clipped_BT.any()


def test_a_completion_that_has_become_far_likelier_is_no_nan():
    policy = torch.full((3, 160), -0.1, requires_grad=True)
    old, mask = torch.full((3, 160), -0.8), torch.ones(3, 160)
    mask[2, 1:] = 0
    share = Share(policy, old, torch.tensor([[1.0], [0.0], [1.0]]), mask, BatchSize(3, 321, 160))
    whole = RLOOSection(type="rloo", ratio="completion", normalisation="constant")
    found = algorithm_of(whole).loss(share)
    found.loss.backward()
    assert torch.isfinite(found.loss)
    assert torch.isfinite(policy.grad).all()
    # Clipped are the tokens of those with credit, and no padding.
    assert found.clipped_BT.sum(dim=1).tolist() == [160, 0, 1]


# Completions of three tokens and of two.
PPO_MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
PPO_REWARDS = torch.tensor([[0.0, -0.5, 2.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
VALUES = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 9.0]], dtype=torch.float64)


def ppo(**settings):
    return algorithm_of(PPOSection(type="ppo", **settings))


def test_generalised_advantages_by_hand():
    # gamma 0.5, lambda 0.5: deltas of the first, from its end: 2 - 0.5 = 1.5;
    # -0.5 + 0.5 * 0.5 - 2 = -2.25; 0 + 0.5 * 2 - 1 = 0. Added up by 0.25 a token: 1.5;
    # -2.25 + 0.375 = -1.875; 0 - 0.46875. Of the second: 1 + 1 = 2; 0 + 0.5 * -1 - 0 = -0.5, so
    # -0.5 + 0.5 = 0. What stands at padding does not count.
    found = generalised_advantages(PPO_REWARDS, VALUES, PPO_MASK, gamma=0.5, gae_lambda=0.5)
    expected = torch.tensor([[-0.46875, -1.875, 1.5], [0.0, 2.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_advantages_that_look_ahead_to_the_end_are_the_discounted_return_less_the_value(gamma):
    found, returns = ppo(gamma=gamma, gae_lambda=1.0, whiten=False).advantages(
        PPO_REWARDS, VALUES, PPO_MASK
    )
    first = [gamma * (-0.5) + gamma**2 * 2, -0.5 + gamma * 2, 2.0]
    expected = torch.tensor([first, [gamma * 1.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(returns, expected)
    torch.testing.assert_close(found, (expected - VALUES) * PPO_MASK)


def test_whitened_advantages_have_mean_0_and_deviation_1_over_real_tokens_and_keep_the_returns():
    raw, returns = ppo(whiten=False).advantages(PPO_REWARDS, VALUES, PPO_MASK)
    white, same = ppo().advantages(PPO_REWARDS, VALUES, PPO_MASK)
    real = white[PPO_MASK > 0]
    assert real.mean() == pytest.approx(0, abs=1e-9)
    assert real.std(correction=0) == pytest.approx(1, abs=1e-6)
    assert white[1, 2] == 0
    assert torch.equal(same, returns)
    # Only shifted and scaled.
    correlation = torch.corrcoef(torch.stack([real, raw[PPO_MASK > 0]]))[0, 1]
    assert correlation == pytest.approx(1)


def test_the_critic_pays_for_the_worse_of_its_estimate_and_the_one_held_near_the_old():
    size = BatchSize(sequences=1, tokens=4, max_tokens=9)
    values = torch.tensor([[1.0, 3.0, 0.1, 7.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    returns = torch.tensor([[2.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    loss = ppo(critic={"clip": 0.5}).critic_loss(values, old, returns, mask, size)
    # Held at 0.5, 0.5 and 0.1: squares 1 or 2.25, 1 or 2.25, 3.61.
    assert float(loss.detach()) == pytest.approx(0.5 * (2.25 + 2.25 + 3.61) / 4)
    loss.backward()
    # Those that moved too far towards the return do not go on; the third does.
    assert values.grad.tolist() == [[0.0, 0.0, pytest.approx((0.1 - 2) / 4), 0.0]]


def test_ppo_waits_for_its_critic_with_credit_and_trains_on_all():
    found = credit(PPOSection(type="ppo"), [2, 2], [1, 3])
    assert found.values_PG.tolist() == [[0, 0], [0, 0]]
    assert found.trained_PG.all()
