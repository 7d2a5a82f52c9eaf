import pytest
import torch

from rlhf.config import GRPOSection, KLSection, RLSection, ShapingSection
from rlhf.records import StepReport
from rlhf.shaping import penalties_of, shaped_rewards
from rlhf.steps import step_metrics, training_batch

TIMES = {"step": 1.0}


@pytest.fixture
def groups(make):
    """Rewards 1, 5 and -9, 3; the second completion of each was cut off, after four tokens."""
    completions = (
        make.completion(token_ids=(5, 6), rollout_logprobs_T=(-0.1, -0.2), finish_reason="stop"),
        make.completion(
            token_ids=(5, 6, 7, 8), rollout_logprobs_T=(-0.1,) * 4, finish_reason="length"
        ),
    )
    return [make.scored(rewards, completions) for rewards in ((1.0, 5.0), (-9.0, 3.0))]


def shaping(**values) -> RLSection:
    return RLSection(shaping=ShapingSection(**values))


def test_nothing_is_done_by_default(groups):
    found = shaped_rewards(groups, RLSection())
    assert found.tolist() == [[1.0, 5.0], [-9.0, 3.0]]
    assert penalties_of(groups[0].rollout.completions[1], ShapingSection()) == {
        "cut_off": 0.0,
        "length": 0.0,
    }


def test_rewards_are_clipped_on_both_sides(groups):
    found = shaped_rewards(groups, shaping(clip=2.5))
    assert found.tolist() == [[1.0, 2.5], [-2.5, 2.5]]


def test_whitening_is_over_all_completions_of_a_step(groups):
    # Mean 0; squares 1 + 25 + 81 + 9 over four: 29.
    found = shaped_rewards(groups, shaping(whiten=True))
    expected = torch.tensor([[1.0, 5.0], [-9.0, 3.0]]).double() / (29**0.5 + 1e-4)
    torch.testing.assert_close(found, expected)


def test_penalties_come_last_and_in_the_units_of_what_is_left(groups):
    settings = shaping(clip=2.0, cut_off_penalty=0.5, length_penalty=0.1, length_target=3)
    # One token beyond three, and cut off: 2 - 0.5 - 0.1.
    assert shaped_rewards(groups, settings).tolist() == [
        [1.0, pytest.approx(1.4)],
        [-2.0, pytest.approx(1.4)],
    ]


def test_credit_is_given_to_shaped_rewards_less_their_kl_and_the_metrics_tell_them_apart(groups):
    settings = RLSection(
        algorithm=GRPOSection(divide_by_deviation=False),
        kl=KLSection(coefficient=0.0),
        shaping=ShapingSection(clip=2.0, cut_off_penalty=1.0),
    )
    batch = training_batch(groups, settings)
    # 1 and 2 - 1 are equal: no signal. -2 and 2 - 1: their mean is -0.5.
    assert [sequence.advantage for sequence in batch.sequences] == [-1.5, 1.5]
    row = step_metrics(0, 0, groups, batch, StepReport(), settings, TIMES)
    assert row["reward/mean"] == 0.0
    assert row["reward/trained_mean"] == pytest.approx((1 + 1 - 2 + 1) / 4)
    assert row["reward/penalty_cut_off"] == 0.5
    assert row["reward/penalty_length"] == 0.0
    assert row["groups/without_signal"] == 1
