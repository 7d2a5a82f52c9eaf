import math

import pytest
import torch

from rlhf.losses import (
    BatchSize,
    bradley_terry_loss,
    centring_loss,
    clipped_policy_loss,
    entropy_from_logits,
    reduce_tokens,
)

NORMALISATIONS = ["sequence", "token", "constant"]


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_token_loss(ratios, advantages, *, clip_low=0.2, clip_high=0.2):
    """Loss and gradient of B completions of one token, from their ratios."""
    rollout = double([[-1.0]] * len(ratios))
    policy = (rollout + double(ratios).log().unsqueeze(1)).requires_grad_()
    result = clipped_policy_loss(
        policy,
        rollout,
        double(advantages).unsqueeze(1),
        torch.ones(len(ratios), 1, dtype=torch.bool),
        clip_low=clip_low,
        clip_high=clip_high,
        normalisation="token",
        size=BatchSize(len(ratios), len(ratios), 1),
    )
    result.loss.backward()
    return result, policy.grad.flatten()


def test_clipped_loss_by_hand():
    # ratio 1.5, A  2: min( 3.0,  1.2 *  2) =  2.4, clipped
    # ratio 0.5, A  2: min( 1.0,  0.8 *  2) =  1.0
    # ratio 0.5, A -2: min(-1.0,  0.8 * -2) = -1.6, clipped
    # ratio 1.5, A -2: min(-3.0,  1.2 * -2) = -3.0
    # The loss is minus their mean: -(2.4 + 1.0 - 1.6 - 3.0) / 4 = 0.3.
    result, _ = one_token_loss([1.5, 0.5, 0.5, 1.5], [2, 2, -2, -2])
    torch.testing.assert_close(result.loss, double(0.3))
    torch.testing.assert_close(result.ratio_BT.flatten(), double([1.5, 0.5, 0.5, 1.5]))
    assert result.clipped_BT.flatten().tolist() == [True, False, True, False]


def test_gradient_stops_where_clipped_for_both_signs_of_the_advantage():
    # Where free, d(-ratio * A / 4) / d logprob = -ratio * A / 4: -0.5 * 2 / 4 and 1.5 * 2 / 4.
    _, gradient = one_token_loss([1.5, 0.5, 0.5, 1.5], [2, 2, -2, -2])
    torch.testing.assert_close(gradient, double([0.0, -0.25, 0.0, 0.75]))


def test_the_two_clip_bounds_are_independent():
    # 1.4 lies below 1 + 0.5, 1.6 above; 0.95 lies above 1 - 0.1, 0.85 below.
    result, gradient = one_token_loss(
        [1.4, 1.6, 0.95, 0.85], [1, 1, -1, -1], clip_low=0.1, clip_high=0.5
    )
    assert result.clipped_BT.flatten().tolist() == [False, True, False, True]
    torch.testing.assert_close(gradient, double([-1.4, 0.0, 0.95, 0.0]) / 4)


def test_on_policy_gradient_is_minus_the_advantage():
    _, gradient = one_token_loss([1.0, 1.0], [3, -5])
    torch.testing.assert_close(gradient, double([-1.5, 2.5]))


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [
        ("sequence", 3.0),  # ((1 + 2 + 3) / 3 + 4 / 1) / 2
        ("token", 2.5),  # (1 + 2 + 3 + 4) / 4
        ("constant", 1.0),  # (1 + 2 + 3 + 4) / (2 * 5)
    ],
)
def test_the_three_normalisations_by_hand(normalisation, expected):
    values = double([[1, 2, 3], [4, 99, 99]])
    mask = double([[1, 1, 1], [1, 0, 0]])
    size = BatchSize(sequences=2, tokens=4, max_tokens=5)
    assert reduce_tokens(values, mask, normalisation, size).item() == pytest.approx(expected)


def random_batch():
    generator = torch.manual_seed(0)
    rollout = -2 * torch.rand(6, 5, dtype=torch.float64, generator=generator)
    policy = rollout + 0.4 * torch.randn(6, 5, dtype=torch.float64, generator=generator)
    advantages = torch.randn(6, dtype=torch.float64, generator=generator)
    lengths = torch.tensor([5, 1, 3, 4, 2, 5])
    return policy, rollout, advantages, torch.arange(5) < lengths.unsqueeze(1)


def loss_and_gradient(policy, rollout, advantages, mask, normalisation, parts=(slice(None),)):
    """The sum over micro-batches, each trimmed to its own longest completion."""
    policy = policy.clone().requires_grad_()
    total = double(0.0)
    for part in parts:
        length = int(mask[part].sum(dim=1).max())
        loss = clipped_policy_loss(
            policy[part, :length],
            rollout[part, :length],
            advantages[part].unsqueeze(1),
            mask[part, :length],
            clip_low=0.2,
            clip_high=0.2,
            normalisation=normalisation,
            size=BatchSize(len(policy), int(mask.sum()), 8),
        ).loss
        loss.backward()
        total += loss.detach()
    return total, policy.grad


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_micro_batches_add_up_to_the_whole_batch(normalisation):
    batch = random_batch()
    whole = loss_and_gradient(*batch, normalisation)
    parts = [slice(0, 1), slice(1, 3), slice(3, 6)]
    torch.testing.assert_close(loss_and_gradient(*batch, normalisation, parts), whole)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("garbage", [0.0, 1e30, -1e30, math.nan, math.inf, -math.inf])
def test_padding_may_hold_anything(normalisation, garbage):
    policy, rollout, advantages, mask = random_batch()
    expected = loss_and_gradient(policy, rollout, advantages, mask, normalisation)
    dirty = policy.masked_fill(~mask, garbage), rollout.masked_fill(~mask, -garbage)
    loss, gradient = loss_and_gradient(*dirty, advantages, mask, normalisation)
    torch.testing.assert_close((loss, gradient), expected)
    assert (gradient[~mask] == 0).all()


def test_padding_is_never_reported_as_clipped():
    policy, rollout, advantages, mask = random_batch()
    result = clipped_policy_loss(
        policy.masked_fill(~mask, 5.0),
        rollout,
        advantages.unsqueeze(1),
        mask,
        clip_low=0.2,
        clip_high=0.2,
        normalisation="token",
        size=BatchSize(6, 20, 8),
    )
    assert result.clipped_BT.any()
    assert not result.clipped_BT[~mask].any()


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_completion_without_trained_tokens_adds_nothing(normalisation):
    values, size = double([[1.0, 2.0], [9.0, 9.0]]), BatchSize(2, 2, 2)
    loss = reduce_tokens(values, double([[1, 1], [0, 0]]), normalisation, size)
    assert loss == reduce_tokens(values[:1], double([[1, 1]]), normalisation, size)


SUPPORTED = {
    "loss_grpo": "sequence",
    "loss_grpo_epsilon_high": "sequence",
    "loss_bnpo": "token",
    "loss_dapo": "token",
    "loss_dapo_epsilon_high": "token",
    "loss_dr_grpo": "constant",
}


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_loss_and_gradient_agree_with_trl(trl, name, dtype, atol):
    case = trl["cases"][name]
    inputs = {key: torch.tensor(value) for key, value in trl["inputs"].items()}
    mask = inputs["completion_mask"]
    policy = torch.tensor(trl["inputs"]["policy_logprobs"], dtype=dtype, requires_grad=True)
    result = clipped_policy_loss(
        policy,
        torch.tensor(trl["inputs"]["old_logprobs"], dtype=dtype),
        torch.tensor(case["advantages"], dtype=dtype).unsqueeze(1),
        mask,
        clip_low=case["settings"]["epsilon"],
        clip_high=case["settings"]["epsilon_high"],
        normalisation=SUPPORTED[name],
        size=BatchSize(len(mask), int(mask.sum()), case["settings"]["max_completion_length"]),
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(case["loss"], abs=atol)
    expected = torch.tensor(case["grad_policy_logprobs"], dtype=dtype)
    torch.testing.assert_close(policy.grad, expected, rtol=0, atol=atol)


def test_every_trl_case_without_kl_at_token_level_is_compared(trl):
    supported = {
        name
        for name, case in trl["cases"].items()
        if case["loss"] is not None
        and case["settings"]["beta"] == 0
        and case["settings"].get("importance_sampling_level") == "token"
    }
    assert supported == set(SUPPORTED)


def test_entropy_by_hand():
    # Uniform over 4: ln 4. Odds 1 : 3: -(ln 0.25) / 4 - 3 (ln 0.75) / 4. Certainty: 0.
    logits = double([[5, 5, 5, 5], [0, math.log(3), -1e9, -1e9], [1e4, 0, 0, 0]])
    expected = double([math.log(4), -math.log(0.25) / 4 - 3 * math.log(0.75) / 4, 0])
    torch.testing.assert_close(entropy_from_logits(logits), expected)


def test_entropy_does_not_see_a_shift_of_the_logits():
    logits = torch.randn(3, 7, dtype=torch.float64, generator=torch.manual_seed(0))
    torch.testing.assert_close(entropy_from_logits(logits + 1e4), entropy_from_logits(logits))


def test_bradley_terry_by_hand():
    # Without labels the first is preferred: -ln sigmoid(0) = ln 2, -ln sigmoid(ln 3) = -ln 0.75.
    loss = bradley_terry_loss(double([0.0, math.log(3)]))
    assert loss.item() == pytest.approx((math.log(2) - math.log(0.75)) / 2)


@pytest.mark.parametrize("label", [0.0, 0.3, 0.5, 1.0])
def test_bradley_terry_with_soft_labels_is_their_cross_entropy(label):
    # sigmoid(ln 3) = 0.75, so the loss is -label ln 0.75 - (1 - label) ln 0.25.
    loss = bradley_terry_loss(double([math.log(3)]), double([label]))
    expected = -label * math.log(0.75) - (1 - label) * math.log(0.25)
    assert loss.item() == pytest.approx(expected)


def test_a_tie_pulls_the_rewards_together_and_is_at_rest_when_equal():
    # d loss / d margin = sigmoid(margin) - label, over two pairs.
    margins = double([0.0, math.log(3)]).requires_grad_()
    bradley_terry_loss(margins, double([0.5, 0.5])).backward()
    torch.testing.assert_close(margins.grad, double([0.0, (0.75 - 0.5) / 2]))


def test_bradley_terry_weights_count_pairs():
    margins, labels = double([0.0, math.log(3), -50.0]), double([1.0, 1.0, 1.0])
    weighted = bradley_terry_loss(margins, labels, double([4.0, 2.0, 0.0]))
    # (4 ln 2 - 2 ln 0.75) / 6; the third pair counts nothing.
    assert weighted.item() == pytest.approx((4 * math.log(2) - 2 * math.log(0.75)) / 6)
    repeated = bradley_terry_loss(double([0.0, 0.0, math.log(3)]))
    torch.testing.assert_close(weighted, repeated)


def test_bradley_terry_stays_finite_at_large_margins():
    margins = double([1000.0, -1000.0]).requires_grad_()
    loss = bradley_terry_loss(margins)
    loss.backward()
    assert loss.item() == pytest.approx(500)  # (0 + 1000) / 2
    torch.testing.assert_close(margins.grad, double([0.0, -0.5]))


# Margins and centring


def test_a_wanted_margin_counts_on_the_preferred_side_as_far_as_it_is_preferred():
    """log(1 + e^-(x - m)) for a win, log(1 + e^(x + m)) for a loss, no margin for a tie."""
    x, m = 0.7, 0.5

    def loss(label: float) -> float:
        values = (torch.tensor([v]) for v in (x, label, 1.0, m))
        return float(bradley_terry_loss(*values))

    assert loss(1.0) == pytest.approx(math.log1p(math.exp(-(x - m))), rel=1e-5)
    assert loss(0.0) == pytest.approx(math.log1p(math.exp(x + m)), rel=1e-5)
    plain = (math.log1p(math.exp(-x)) + math.log1p(math.exp(x))) / 2
    assert loss(0.5) == pytest.approx(plain, rel=1e-5)
    # A label of 3/4 has half the margin: 0.7 - 0.5 / 2 = 0.45.
    soft = 0.75 * math.log1p(math.exp(-0.45)) + 0.25 * math.log1p(math.exp(0.45))
    assert loss(0.75) == pytest.approx(soft, rel=1e-5)


def test_centring_is_the_weighted_mean_square_of_the_sums():
    # (1 x 4 + 3 x 1) / 4
    loss = centring_loss(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0]))
    assert float(loss) == pytest.approx(7 / 4)
