import dataclasses
import math

import pytest

from rlhf.records import (
    Message,
    PreferencePair,
    ScoredGroup,
    StepReport,
    TrainingBatch,
    TrainingSequence,
)


def test_a_completion_needs_one_logprob_per_token(make):
    with pytest.raises(ValueError, match="got 3 tokens and 2 logprobs"):
        make.completion(token_ids=(1, 2, 3), rollout_logprobs_T=(-0.1, -0.2))


def test_an_empty_completion_is_refused(make):
    with pytest.raises(ValueError, match="got 0 tokens"):
        make.completion(length=0)


def test_versions_do_not_run_backwards(make):
    with pytest.raises(ValueError, match=r"versions 3\.\.2 run backwards"):
        make.completion(oldest_version=3, newest_version=2)


def test_version_spans_hold_every_token(make):
    with pytest.raises(ValueError, match="version spans of 3 tokens in a completion of 2"):
        make.completion(length=2, version_spans=((0, 1), (1, 2)))


def test_the_length_of_a_completion_is_its_tokens(make):
    assert make.completion(length=5).length == 5


def test_the_age_of_a_group_counts_from_its_oldest_sibling(make):
    group = make.rollout(
        make.completion(oldest_version=3, newest_version=3),
        make.completion(oldest_version=1, newest_version=4),
    )
    assert group.oldest_version == 1


def test_reference_logprobs_of_other_lengths_are_refused(make):
    group = make.scored((1.0, 2.0))
    for reference in [((-0.1, -0.2), (-0.1,)), ((-0.1, -0.2),)]:
        with pytest.raises(ValueError, match="reference logprobs do not match"):
            ScoredGroup(group.rollout, group.scores, reference)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rewards_G", (1.0,)),
        ("rewards_KG", ((1.0, 2.0), (1.0,))),
        ("disagreement_G", (0.0,)),
        ("distance_G", (0.0,)),
        ("shift_G", (0.0, 0.0, 0.0)),
        ("data_shift_G", (False,)),
        ("domain_shift_G", (False, False, False)),
        ("parts_G", {"helpful": (1.0, 2.0), "harmless": (1.0,)}),
    ],
)
def test_scores_for_another_number_of_completions_are_refused(make, field, value):
    group = make.scored((1.0, 2.0))
    scores = dataclasses.replace(group.scores, **{field: value})
    with pytest.raises(ValueError, match="do not match the number of completions"):
        ScoredGroup(group.rollout, scores, group.reference_logprobs_GT)


def test_a_batch_counts_its_sequences_and_completion_tokens():
    batch = TrainingBatch(
        (
            TrainingSequence((9, 9, 9), (1, 2), (-0.1, -0.2), 1.0),
            TrainingSequence((9,), (1, 2, 3), (-0.1,) * 3, -1.0),
        ),
        max_tokens=8,
        temperature=1.0,
    )
    assert (batch.num_sequences, batch.num_tokens) == (2, 5)


def test_no_stage_changes_after_construction(make):
    scored = make.scored((1.0, 2.0))
    records = [
        scored,
        scored.rollout,
        scored.rollout.prompt,
        scored.rollout.completions[0],
        scored.scores,
        TrainingBatch((), 8, 1.0),
        StepReport(),
    ]
    for record in records:
        name = dataclasses.fields(record)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, None)


USER, ASSISTANT = Message("user", "2 + 2?"), Message("assistant", "4")


@pytest.mark.parametrize("prompt", [(), (ASSISTANT,), (USER, ASSISTANT)])
def test_a_pair_answers_a_user_turn(prompt):
    with pytest.raises(ValueError, match="does not end in a user turn"):
        PreferencePair(prompt, "4", "5")


@pytest.mark.parametrize("value", [-0.1, 1.1e6, math.inf, math.nan])
@pytest.mark.parametrize("name", ["label", "weight", "margin"])
def test_labels_are_probabilities_and_weights_and_margins_at_most_a_million(name, value):
    with pytest.raises(ValueError, match=f"{name} outside 0 to 1") as caught:
        PreferencePair((USER,), "4", "5", **{name: value})
    # However many rows are refused, these are three reasons.
    assert str(value) not in str(caught.value)


def test_no_label_is_above_one_and_a_million_is_a_weight():
    with pytest.raises(ValueError, match="label outside 0 to 1"):
        PreferencePair((USER,), "4", "5", label=1.1)
    assert PreferencePair((USER,), "4", "5", weight=1e6, margin=1e6).weight == 1e6


def test_a_pair_is_filed_under_its_first_user_turn():
    system, later = Message("system", "Be brief."), Message("user", "And 3 + 3?")
    pair = PreferencePair((system, USER, ASSISTANT, later), "6", "7")
    assert pair.first_user_turn == "2 + 2?"
