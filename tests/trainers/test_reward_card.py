"""The card's figures are what can be counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from models.reward_model import Answers, FamilyCard, OwnLayersCard, RewardCard, Scores
from rlhf.records import Message, PreferencePair
from tests.models.test_reward_model import HEADS, model_of
from trainers.reward_card import describe, longer_wins, pair_report, probe_report, report

PROMPT = (Message("user", "Why?"),)


def test_what_length_alone_gives_by_hand():
    # Longer wins, shorter wins, equal lengths (half), and a tie that has no say.
    longer_N = torch.tensor([3, -2, 0, 9])
    labels_N = torch.tensor([1.0, 1.0, 0.0, 0.5])
    weights_N = torch.tensor([2.0, 1.0, 1.0, 5.0])
    assert longer_wins(longer_N, labels_N, weights_N) == pytest.approx(2.5 / 4)
    assert longer_wins(longer_N[3:], labels_N[3:], weights_N[3:]) is None


def test_each_pair_is_judged_by_the_head_of_its_own_criterion_and_by_its_source():
    pairs = [
        PreferencePair(PROMPT, "a", "b", source="s", criterion="helpful"),
        PreferencePair(PROMPT, "a", "b", source="s", criterion="harmless"),
        PreferencePair(PROMPT, "a", "b", source="t", criterion="harmless"),
        PreferencePair(PROMPT, "a", "b", source="t", criterion="honest"),
    ]
    # One member; chosen replies first. Criteria: harmless, helpful. The reward is always right,
    # harmless on its first pair only, helpful everywhere.
    rewards_KN = torch.tensor([[1.0] * 4 + [0.0] * 4])
    harmless_N = torch.tensor([0.0, 1.0, -1.0, 0.0] + [0.0] * 4)
    helpful_N = torch.tensor([1.0] * 4 + [0.0] * 4)
    criteria_KCN = torch.stack([harmless_N, helpful_N]).unsqueeze(0)
    nothing_N = torch.zeros(8)
    said = Answers(rewards_KN, criteria_KCN, nothing_N, nothing_N)
    card = model_of(HEADS).card
    report = pair_report(card, said, pairs, [5, 2, 2, 5, 3, 3, 9, 1])
    assert (report["accuracy"], report["longer_wins"]) == (1.0, 2.5 / 4)
    criteria = {name: own["accuracy"] for name, own in report["per_criterion"].items()}
    assert criteria == {"harmless": 0.5, "helpful": 1.0}
    # A criterion that the model does not have goes by the reward.
    sources = {name: own["accuracy"] for name, own in report["per_source"].items()}
    assert sources == {"s": 1.0, "t": 0.5}


def answers(rewards_N: list[float], criteria_CN: list[list[float]]) -> Answers:
    """Of one member; chosen replies first."""
    nothing_N = torch.zeros(len(rewards_N))
    return Answers(
        torch.tensor([rewards_N]), torch.tensor([criteria_CN]), nothing_N, nothing_N.clone()
    )


def confidences(figures: dict) -> list[float]:
    return [each["confidence"] for each in figures["reliability"]]


def test_each_margin_is_brought_to_a_probability_by_its_own_temperature():
    temperature = {"reward": 2.0, "harmless": 0.5, "helpful": 4.0}
    card = model_of(HEADS, temperature=temperature).card
    pairs = [
        PreferencePair(PROMPT, "a", "b", source="s", criterion=criterion)
        for criterion in ("harmless", "helpful", "honest")
    ]
    # Margins: of the reward 1, 2, 3, of harmless 1, of helpful 2.
    said = answers(
        [1.0, 2.0, 3.0, 0.0, 0.0, 0.0],
        [[1.0, 9.0, 9.0, 0.0, 0.0, 0.0], [9.0, 2.0, 9.0, 0.0, 0.0, 0.0]],
    )
    found = pair_report(card, said, pairs, [1, 1] * 3)

    def sure(*logits: float) -> list[float]:
        return pytest.approx([1 / (1 + math.exp(-x)) for x in logits], rel=1e-5)

    assert confidences(found) == sure(1 / 2, 2 / 2, 3 / 2)
    assert confidences(found["per_criterion"]["harmless"]) == sure(1 / 0.5)
    assert confidences(found["per_criterion"]["helpful"]) == sure(2 / 4)
    # Of a source, each pair by its own: 2 / 4, 3 / 2 (by the reward) and 1 / 0.5.
    assert confidences(found["per_source"]["s"]) == sure(2 / 4, 3 / 2, 1 / 0.5)


def test_pairs_that_name_no_criterion_are_overall_and_criteria_without_pairs_are_left_out():
    card = model_of(
        HEADS,
        criteria=("helpful", "overall"),
        combination={"helpful": 0.0, "overall": 1.0},
        temperature={"reward": 1.0, "helpful": 1.0, "overall": 1.0},
    ).card
    pairs = [PreferencePair(PROMPT, "a", "b")] * 2
    said = answers([0.0] * 4, [[-1.0, -1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    found = pair_report(card, said, pairs, [2, 1, 2, 1])
    assert list(found["per_criterion"]) == ["overall"]
    assert found["per_criterion"]["overall"]["accuracy"] == 1.0
    assert list(found["per_source"]) == [""]


def test_reward_and_length_correlate_over_all_replies():
    # Rewards 1, 2, 3, 4 of lengths 10, 20, 30, 40: chosen ones first, lengths in turns.
    card = model_of(HEADS).card
    pairs = [PreferencePair(PROMPT, "a", "b", criterion="helpful")] * 2
    said = answers([1.0, 2.0, 3.0, 4.0], [[0.0] * 4] * 2)
    found = pair_report(card, said, pairs, [10, 30, 20, 40])["length_correlation"]
    assert found == pytest.approx(1.0)
    # In a constant there is nothing to correlate.
    assert pair_report(card, said, pairs, [7] * 4)["length_correlation"] == 0.0


@pytest.fixture
def card() -> RewardCard:
    plain = model_of(HEADS, combination={"harmless": 1.0, "helpful": 0.5}).card
    pairs = [
        PreferencePair(PROMPT, "a", "b", source="s", criterion="helpful"),
        PreferencePair(PROMPT, "a", "b", source="t", criterion="harmless", label=0.5),
    ]
    said = answers([1.0, 0.0, 0.0, 0.0], [[0.0] * 4, [1.0, 0.0, 0.0, 0.0]])
    figures = {**pair_report(plain, said, pairs, [2, 1, 1, 2]), "flagged_share": 0.25}
    loop = {"auroc": 0.75, "auroc_disagreement": 0.5, "auroc_distance": 1.0}
    return plain.model_copy(
        update={
            "data": {
                "pairs": 2,
                "pairs_held_out": 2,
                "pairs_by_criterion": {"helpful": 1, "harmless": 1},
                "hash": "h",
            },
            "metrics": {
                "cross_validation": figures,
                "probes": {"word loop": {**loop, "flagged_share": 0.5, "reward": -2.0}},
                "members_s": 0.0,
                "features_s": 3.0,
                "total_s": 5.0,
            },
        }
    )


def test_a_card_is_described_by_its_members_reward_and_accuracy(card):
    said = describe(card)
    assert said.splitlines()[0] == (
        "reward model v: 3 members on 1 layers of none, 2 pairs, reward = harmless + 0.5 helpful, "
        "features 3 s of 5 s"
    )
    assert "cross-validation: accuracy 1.000 [0.207, 1.000] on 1 pairs, 1 ties beside" in said
    assert "flagged 25.0% of replies" in said
    assert "  helpful, by its own head: accuracy 1.000" in said
    # The one pair of this criterion is a tie.
    assert "  harmless, by its own head: no decided pair" in said
    assert "validation" not in said.replace("cross-validation", "")


def test_the_whole_card_has_every_criterion_source_and_probe_in_tables_that_fit(card):
    text = report(card)
    for row in ("the reward", "harmless, own head", "helpful, own head", "source s", "source t"):
        assert f"\n| {row} | " in text
    assert "| word loop | 0.75 | 0.50 | 1.00 | 50% | -2.0 |" in text
    assert "threshold 0.50 on disagreement + distance" in text
    assert "none: too few replies" in report(card.model_copy(update={"threshold": None}))
    blocks = [block.splitlines() for block in text.split("\n\n")]
    tables = [[line for line in block if line.startswith("|")] for block in blocks]
    for table in filter(None, tables):
        assert len({line.count("|") for line in table}) == 1, table


def test_the_rewards_figures_leave_out_criteria_without_weight_in_it_and_the_card_says_so(card):
    only = card.model_copy(update={"combination": {"harmless": 0.0, "helpful": 1.0}})
    pairs = [
        PreferencePair(PROMPT, "a", "b", source=name, criterion=name)
        for name in ("helpful", "harmless", "harmless")
    ]
    # The reward is right on the pair of helpful alone.
    said = answers([1.0, 0.0, 0.0, 0.0, 1.0, 1.0], [[0.0] * 6] * 2)
    found = pair_report(only, said, pairs, [1, 1] * 3)
    assert (found["pairs"], found["accuracy"]) == (1, 1.0)
    assert found["per_criterion"]["harmless"]["pairs"] == 2
    assert found["per_source"]["harmless"]["pairs"] == 2
    without = [line for line in report(only).splitlines() if "without weight" in line]
    assert len(without) == 1 and "(harmless)" in without[0]
    assert "without weight" not in report(card)
    # Of pairs that are all harmless there is nothing else to say.
    nothing_else = answers([0.0, 0.0, 1.0, 1.0], [[0.0] * 4] * 2)
    assert pair_report(only, nothing_else, pairs[1:], [1, 1] * 2)["accuracy"] == 0.0


def test_a_card_can_be_read_where_no_validation_pair_has_weight(card):
    pairs = [PreferencePair(PROMPT, "a", "b", criterion="helpful", weight=0.0)]
    figures = pair_report(card, answers([1.0, 0.0], [[0.0] * 2] * 2), pairs, [1, 1])
    update = {
        "data": {
            **card.data,
            "pairs_validation": 1,
            "pairs_validation_seen": 0,
            "hash_validation": "v",
        },
        "metrics": {**card.metrics, "validation": {**figures, "flagged_share": 0.0}},
    }
    weightless = card.model_copy(update=update)
    assert "validation: no decided pair, ECE -, flagged" in describe(weightless)
    assert "\n| the reward | 1 | 0 | no decided pair | - | - | - |" in report(weightless)


def test_a_probe_is_told_from_held_out_replies_by_each_signal():
    inside_N, outside_N = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.5, 9.0])
    scores = Scores(
        rewards_KN=torch.tensor([[1.0, 3.0, -2.0], [1.0, 5.0, -2.0]]),
        criteria_KCN=torch.zeros(2, 1, 3),
        disagreement_N=outside_N,
        distance_N=-outside_N,
        shift_N=outside_N,
        shifted_N=torch.tensor([True, False, True]),
    )
    held_out = Answers(
        rewards_KN=torch.zeros(2, 2),
        criteria_KCN=torch.zeros(2, 1, 2),
        disagreement_N=torch.tensor([3.0, 0.25]),
        distance_N=torch.tensor([-0.6, -1.0]),
    )
    found = probe_report(scores, {"loop": 2, "none": 0, "noise": 1}, held_out, inside_N)
    assert list(found) == ["loop", "noise"]
    # Shift: 2 beats both, 1/2 beats 0. Disagreement: either beats 1/4. Distance: -1/2 beats both.
    assert found["loop"]["auroc"] == 0.75
    assert found["loop"]["auroc_disagreement"] == found["loop"]["auroc_distance"] == 0.5
    assert (found["loop"]["flagged_share"], found["loop"]["reward"]) == (0.5, 2.5)
    assert (found["noise"]["auroc"], found["noise"]["reward"]) == (1.0, -2.0)


def test_a_card_with_trained_members_says_what_was_held_out_and_which_layers_are_their_own(card):
    family = FamilyCard(layers=3, pooling="mean", own=OwnLayersCard(name="0" * 16, end=5))
    [bank] = card.banks
    bank = bank.model_copy(update={"families": (family, *bank.families[1:])})
    trained = card.model_copy(
        update={"banks": (bank,), "data": {**card.data, "pairs": 10, "pairs_held_out": 2}}
    )
    text = report(trained)
    assert "mean of layer 5, its own above 3" in text
    assert "## The held-out fold" in text
    assert "Cross-validation" not in text
    assert "the held-out fold: accuracy" in describe(trained)
