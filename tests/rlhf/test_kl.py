import math

import pytest
import torch

from rlhf.kl import kl_in_the_loss, token_penalties
from rlhf.losses import BatchSize


def test_the_penalty_of_a_token_is_the_coefficient_times_its_log_ratio():
    # 0.1 * (-1 + 4), 0.1 * (-6 + 1).
    assert token_penalties((-1.0, -6.0), (-4.0, -1.0), 0.1) == pytest.approx([0.3, -0.5])


def test_kl_is_the_log_ratio_of_rollout_to_reference_summed_over_tokens(make):
    group = make.scored((0.0, 0.0), kl_G=(0.75, -0.25))
    assert group.kl_G == pytest.approx((0.75, -0.25))


def test_logprobs_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        token_penalties((-1.0, -2.0), (-1.0,), 0.1)


SIZE = BatchSize(sequences=2, tokens=3, max_tokens=2)
MASK = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
POLICY = torch.tensor([[-1.0, -0.5], [-2.0, float("nan")]])
REFERENCE = torch.tensor([[-1.5, -1.0], [-1.0, 9.0]])


@pytest.mark.parametrize(
    ("estimator", "value"),
    [
        # s = 0.5 + 0.5 = 1 and -1: squares over two, over two completions.
        ("k2", (0.5 + 0.5) / 2),
        # exp(-0.5) - 1 + 0.5 twice, exp(1) - 1 - 1.
        ("k3", (2 * (math.exp(-0.5) - 0.5) + math.e - 2) / 2),
    ],
)
def test_kl_in_the_loss_by_hand(estimator, value):
    policy = POLICY.clone().requires_grad_()
    term = kl_in_the_loss(
        policy, REFERENCE, MASK, estimator=estimator, normalisation="token", size=SIZE
    )
    assert term.item() == pytest.approx(value)
    term.backward()
    # Every token moves by its completion's s, over the tokens of the batch.
    torch.testing.assert_close(policy.grad, torch.tensor([[1 / 3, 1 / 3], [-1 / 3, 0.0]]))


def test_a_part_without_weight_adds_nothing_to_the_kl():
    policy = POLICY.clone().requires_grad_()
    for estimator in ("k2", "k3"):
        term = kl_in_the_loss(
            policy,
            REFERENCE,
            torch.zeros_like(MASK),
            estimator=estimator,
            normalisation="sequence",
            size=SIZE,
        )
        assert term.item() == 0
        term.backward()
        assert not policy.grad.any()
