from dataclasses import replace

import pytest

from rlhf.config import (
    CEMSection,
    EntropySection,
    GRPOSection,
    KLSection,
    PPOSection,
    RLOOSection,
    RLSection,
)
from rlhf.records import FailedGroup, StepReport, TrainingBatch
from rlhf.steps import step_metrics, training_batch

CENTRED = GRPOSection(divide_by_deviation=False)
CONTRACT = {
    "step",
    "weight_version",
    "reward/mean",
    "reward/std",
    "ensemble/disagreement",
    "ensemble/flagged_share",
    "kl/mean",
    "kl/coefficient",
    "entropy/mean",
    "staleness/mean",
    "staleness/max",
    "completion/length_mean",
    "time/step_s",
    "time/rollout_s",
    "time/learn_s",
    "time/weights_s",
    "tokens/step",
}
LOOP = "You use enough water and stir it once. " * 8
TIMES = {"step": 4.0, "rollout": 2.0, "learn": 1.0, "weights": 0.5}


def settings(coefficient=0.0, **values):
    return RLSection(**{"algorithm": CENTRED, "kl": KLSection(coefficient=coefficient)} | values)


def advantages_of(batch):
    return [sequence.advantage for sequence in batch.sequences]


@pytest.fixture
def failed(make):
    return FailedGroup(make.prompt("bad"), 0, "refused by a scorer", 3)


def test_each_completion_is_trained_on_as_it_was_sampled(make):
    completions = (
        make.completion(token_ids=(5, 6), rollout_logprobs_T=(-0.1, -0.2)),
        make.completion(token_ids=(4,), rollout_logprobs_T=(-0.3,)),
    )
    batch = training_batch([make.scored((1.0, 3.0), completions)], settings(max_tokens=9))
    first, second = batch.sequences
    assert first.prompt_token_ids == second.prompt_token_ids == (7, 8)
    assert (first.completion_token_ids, first.rollout_logprobs_T) == ((5, 6), (-0.1, -0.2))
    assert (second.completion_token_ids, second.rollout_logprobs_T) == ((4,), (-0.3,))
    assert advantages_of(batch) == [-1.0, 1.0]
    assert (batch.max_tokens, batch.temperature) == (9, 1.0)


def test_the_kl_penalty_is_subtracted_before_the_baseline(make):
    # 1 - 0.5 * 2 = 0 and 3 - 0.5 * 0 = 3; their mean is 1.5.
    batch = training_batch([make.scored((1.0, 3.0), kl_G=(2.0, 0.0))], settings(0.5))
    assert advantages_of(batch) == pytest.approx([-1.5, 1.5])


def test_the_algorithm_of_the_settings_is_used(make):
    group = make.scored((1.0, 2.0, 6.0))
    rloo = settings(algorithm=RLOOSection(type="rloo"))
    assert advantages_of(training_batch([group], rloo)) == pytest.approx([-3, -1.5, 4.5])
    grpo = settings(algorithm=GRPOSection())
    # Centred -2 -1 3; variance (4 + 1 + 9) / 2 = 7.
    expected = [value / (7**0.5 + 1e-4) for value in (-2, -1, 3)]
    assert advantages_of(training_batch([group], grpo)) == pytest.approx(expected)


def test_failed_groups_and_groups_without_signal_are_left_out(make, failed):
    groups = [failed, make.scored((2.0, 2.0)), make.scored((1.0, 3.0)), failed]
    assert advantages_of(training_batch(groups, settings())) == [-1.0, 1.0]


def test_only_the_elite_is_in_the_batch_of_the_cross_entropy_method(make):
    cem = settings(algorithm=CEMSection(type="cem", elite_share=0.3))
    groups = [make.scored((1.0, 5.0, 2.0)), make.scored((2.0, 2.0, 2.0))]
    batch = training_batch(groups, cem)
    assert advantages_of(batch) == [1.0]
    assert batch.num_sequences == 1
    assert batch.sequences[0].completion_token_ids == groups[0].rollout.completions[1].token_ids


def test_with_the_kl_in_the_loss_the_reward_is_free_of_it_and_all_are_trained_on(make):
    groups = [make.scored((1.0, 3.0), kl_G=(2.0, 0.0)), make.scored((2.0, 2.0))]
    batch = training_batch(groups, settings(kl=KLSection(coefficient=0.5, place="loss")))
    assert advantages_of(batch) == [-1.0, 1.0, 0.0, 0.0]
    assert [s.reference_logprobs_T for s in batch.sequences] == [
        row for group in groups for row in group.reference_logprobs_GT
    ]
    in_reward = training_batch(groups, settings(0.5))
    assert all(s.reference_logprobs_T == () for s in in_reward.sequences)


def test_groups_without_signal_are_counted(make, failed):
    groups = [failed, make.scored((2.0, 2.0)), make.scored((1.0, 3.0)), make.scored((4.0, 4.0))]
    batch = training_batch(groups, settings())
    row = step_metrics(0, 0, groups, batch, StepReport(), settings(), TIMES)
    assert (row["groups/failed"], row["groups/without_signal"]) == (1, 2)


@pytest.mark.parametrize("algorithm", [CENTRED, GRPOSection()])
def test_a_difference_in_kl_alone_is_trained_on_and_counted_as_no_signal(make, algorithm):
    group, rl = make.scored((2.0, 2.0), kl_G=(2.0, 0.0)), settings(0.5, algorithm=algorithm)
    batch = training_batch([group], rl)
    assert advantages_of(batch) == pytest.approx([-0.5, 0.5])
    row = step_metrics(0, 0, [group], batch, StepReport(), rl, TIMES)
    assert row["groups/without_signal"] == 1


def test_a_step_of_nothing_but_failures_is_empty(failed):
    batch = training_batch([failed, failed], settings())
    assert (batch.num_sequences, batch.num_tokens) == (0, 0)


def test_masked_completions_leave_without_refill_and_without_moving_the_baseline(make):
    group = make.scored((1.0, 2.0, 6.0), shifted_G=(False, True, False))
    # The mean stays 3, that of all three.
    others = make.scored((0.0, 4.0, 2.0))
    batch = training_batch([group, others], settings(), mask_shifted=True)
    assert advantages_of(batch) == [-2.0, 3.0, -2.0, 2.0, 0.0]


def test_marking_trains_on_flagged_completions_too(make):
    group = make.scored((1.0, 2.0, 6.0), shifted_G=(False, True, False))
    assert advantages_of(training_batch([group], settings())) == [-2.0, -1.0, 3.0]


@pytest.fixture
def row(make, failed):
    """Step 5 at version 7: a failure and two groups, sampled from version 4 on."""
    groups = [
        make.scored(
            (1.0, 3.0),
            (
                make.completion(
                    length=2, text="What a great question!", oldest_version=7, newest_version=7
                ),
                make.completion(
                    length=4, oldest_version=4, newest_version=6, finish_reason="length"
                ),
            ),
            kl_G=(0.5, 1.5),
            shifted_G=(True, False),
            disagreement_G=(0.1, 0.3),
            parts_G={"helpful": (0.0, 2.0), "harmless": (1.0, -1.0)},
        ),
        failed,
        make.scored(
            (5.0, 7.0),
            (
                make.completion(length=1, text=LOOP, oldest_version=6, newest_version=6),
                make.completion(length=3, oldest_version=6, newest_version=7),
            ),
            kl_G=(-1.0, 3.0),
            disagreement_G=(0.2, 0.2),
            parts_G={"helpful": (3.0, 5.0), "honest": (0.5, 0.0)},
        ),
    ]
    rl = settings(0.1, entropy=EntropySection(coefficient=0.01))
    report = StepReport({"entropy/mean": 1.25, "loss": 0.5, "reward/mean": 99.0})
    batch = training_batch(groups, rl, mask_shifted=True)
    return step_metrics(5, 7, groups, batch, report, rl, TIMES)


def test_a_step_has_every_key_of_the_contract(row):
    assert row.keys() >= CONTRACT


def test_the_metrics_of_a_step_by_hand(row):
    expected = {
        "step": 5,
        "weight_version": 8,  # trained on 7, published 8
        "reward/mean": 4.0,  # (1 + 3 + 5 + 7) / 4
        "reward/std": 5**0.5,  # sqrt((9 + 1 + 1 + 9) / 4)
        "ensemble/disagreement": 0.2,
        "ensemble/distance": 2.0,
        "ensemble/shift": -0.2,
        "ensemble/flagged_share": 0.25,
        "ensemble/flagged_share_data": 1.0,
        "criterion/helpful": 2.5,  # (0 + 2 + 3 + 5) / 4
        "criterion/harmless": 0.0,  # of the one group that has it
        "criterion/honest": 0.25,
        "text/flattery_share": 0.25,
        "text/sentence_loop_share": 0.25,
        "text/repetition_share": 0.25,
        "kl/mean": 1.0,  # (0.5 + 1.5 - 1 + 3) / 4
        "kl/coefficient": 0.1,
        "entropy/mean": 1.25,
        "entropy/coefficient": 0.01,
        "completion/length_mean": 2.5,
        "completion/finished_share": 0.75,
        "groups/failed": 1,
        "sequences/trained": 3,
        "tokens/step": 10,
        "time/step_s": 4.0,
        "time/rollout_s": 2.0,
        "time/learn_s": 1.0,
        "time/weights_s": 0.5,
    }
    assert {key: row[key] for key in expected} == pytest.approx(expected)


def test_the_entropy_of_whoever_sampled_counts_every_token(make):
    group = make.scored(
        (1.0, 1.0),
        (
            make.completion(token_ids=(5, 6, 4), rollout_logprobs_T=(-1.0, -2.0, -3.0)),
            make.completion(token_ids=(4,), rollout_logprobs_T=(-6.0,)),
        ),
    )
    # Equal rewards: nothing is trained on, and the learner has no entropy to report.
    batch = training_batch([group], settings())
    row = step_metrics(0, 0, [group], batch, StepReport(), settings(), TIMES)
    assert (batch.num_sequences, row["entropy/mean"], row["entropy/sampled"]) == (0, None, 3.0)


def test_staleness_counts_from_the_oldest_version_in_a_completion(row):
    # 7 - 7, 7 - 4, 7 - 6, 7 - 6.
    assert row["staleness/mean"] == pytest.approx(1.25)
    assert row["staleness/max"] == 3


def test_the_learner_adds_metrics_but_replaces_none(row):
    assert row["loss"] == 0.5
    assert row["reward/mean"] == 4.0


def test_a_reward_of_one_part_has_no_parts_in_its_metrics(make):
    group = make.scored((1.0, 3.0))
    batch = training_batch([group], settings())
    row = step_metrics(0, 0, [group], batch, StepReport(), settings(), TIMES)
    assert not [key for key in row if key.startswith("criterion/")]


def test_a_mean_over_nothing_is_none_never_a_number(failed):
    rl = settings()
    row = step_metrics(0, 0, [failed], TrainingBatch((), 8, 1.0), StepReport(), rl, TIMES)
    assert row.keys() >= CONTRACT
    for key in (
        "reward/mean",
        "reward/std",
        "ensemble/disagreement",
        "ensemble/flagged_share",
        "kl/mean",
        "entropy/mean",
        "entropy/sampled",
        "staleness/mean",
        "staleness/max",
        "completion/length_mean",
        "completion/finished_share",
        "text/flattery_share",
        "text/sentence_loop_share",
        "text/repetition_share",
    ):
        assert row[key] is None
    assert row["reward/trained_mean"] is None
    assert not [key for key in row if key.startswith(("criterion/", "reward/penalty_"))]
    assert (row["groups/failed"], row["tokens/step"], row["sequences/trained"]) == (1, 0, 0)


PPO = PPOSection(type="ppo")


def test_a_critic_gets_the_reward_with_the_last_token_and_every_penalty_with_its_own(make):
    completions = (
        make.completion(token_ids=(5, 6), rollout_logprobs_T=(-0.5, -1.0)),
        make.completion(token_ids=(4,), rollout_logprobs_T=(-0.3,)),
    )
    group = replace(
        make.scored((1.0, 3.0), completions),
        reference_logprobs_GT=((-1.5, -0.5), (-0.3,)),
    )
    batch = training_batch([group], settings(0.1, algorithm=PPO))
    # 0.1 * (-0.5 + 1.5) and 0.1 * (-1 + 0.5) are taken off, the reward comes at the end.
    assert [s.rewards_T for s in batch.sequences] == [
        pytest.approx((-0.1, 1.0 + 0.05)),
        pytest.approx((3.0,)),
    ]
    row = step_metrics(0, 0, [group], batch, StepReport(), settings(0.1, algorithm=PPO), TIMES)
    assert row["reward/trained_mean"] == pytest.approx(
        sum(sum(s.rewards_T) for s in batch.sequences) / 2
    )
    others = training_batch([group], settings(0.1))
    assert all(s.rewards_T == () for s in others.sequences)


def test_equal_rewards_are_no_reason_for_ppo_to_leave_a_group_out(make):
    batch = training_batch([make.scored((2.0, 2.0))], settings(algorithm=PPO))
    assert batch.num_sequences == 2


def test_entropy_in_the_reward_counts_for_every_completion(make):
    entropy = EntropySection(coefficient=0.5, place="reward")
    group = replace(make.scored((1.0, 3.0)), entropies_GT=((2.0, 4.0), (0.0, 2.0)))
    # 1 + 0.5 * 6 and 3 + 0.5 * 2: equal, so it is all the same which. Both stay in the step, for
    # the bonus is a mean over all.
    assert advantages_of(training_batch([group], settings(entropy=entropy))) == [0.0, 0.0]
    once = PPO.model_copy(update={"epochs": 1})
    with_critic = training_batch([group], settings(entropy=entropy, algorithm=once))
    assert [s.rewards_T for s in with_critic.sequences] == [(1.0, 3.0), (0.0, 4.0)]
    assert with_critic.entropy_coefficient == 0.5
    # As a bonus in the loss the rewards are free of it.
    in_loss = settings(entropy=EntropySection(coefficient=0.5))
    assert advantages_of(training_batch([group], in_loss)) == [-1.0, 1.0]


def test_entropies_of_other_completions_are_refused(make):
    with pytest.raises(ValueError, match="entropies do not match"):
        replace(make.scored((1.0, 3.0)), entropies_GT=((2.0,), (0.0, 2.0)))
