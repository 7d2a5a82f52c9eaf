"""The card's figures are what can be counted by hand."""

from __future__ import annotations

import pytest
import torch

from models.reward_model import Answers, Scores
from rlhf.records import Message, PreferencePair
from tests.models.test_reward_model import HEADS, model_of
from trainers.reward_card import longer_wins, pair_report, probe_report

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
    held_out = Answers(torch.zeros(2, 2), torch.zeros(2, 1, 2), inside_N, inside_N)
    report = probe_report(scores, {"loop": 2, "none": 0, "noise": 1}, held_out, inside_N)
    assert list(report) == ["loop", "noise"]
    # 2 beats both, 1/2 beats one of two: 3 of 4; turned round, none.
    assert report["loop"]["auroc"] == report["loop"]["auroc_disagreement"] == 0.75
    assert report["loop"]["auroc_distance"] == 0.0
    assert (report["loop"]["flagged_share"], report["loop"]["reward"]) == (0.5, 2.5)
    assert (report["noise"]["auroc"], report["noise"]["reward"]) == (1.0, -2.0)
