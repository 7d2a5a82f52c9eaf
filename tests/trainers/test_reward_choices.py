"""What cross-validation chooses for a reward model: what criteria tell of each other, and when not
to believe it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.head_fitting import Comparisons, ProbeGroup
from models.heads import TrainedHead
from models.reward_model import Answers
from rlhf.records import Message, PreferencePair
from tests.models.test_head_fitting import BOTH_L2, comparisons, related
from trainers.reward_choices import choose_correlation, temperatures

CANDIDATES = [-0.9, -0.5, 0.0, 0.5, 0.9]
GROUP = ProbeGroup(0, 2, (BOTH_L2, BOTH_L2))


def chosen(
    pairs: Comparisons,
    folds_N: torch.Tensor,
    groups: Sequence[ProbeGroup | TrainedHead] = (GROUP,),
    candidates: Sequence[float] = CANDIDATES,
) -> tuple[float, dict[str, float]]:
    """The correlation of the two criteria, and what the candidates lost."""
    names = ["helpful", "honest"]
    correlation_CC, losses = choose_correlation([pairs], [groups], folds_N, names, candidates)
    assert torch.equal(correlation_CC, correlation_CC.T)
    assert correlation_CC.diagonal().tolist() == [1, 1]
    return round(float(correlation_CC[0, 1]), 4), losses.get("helpful ~ honest", {})


@pytest.mark.parametrize("planted", [-0.9, 0.9])
def test_criteria_that_agree_or_oppose_each_other_are_found_to(planted):
    pairs, _, folds_N = related(planted, few=120)
    correlation, losses = chosen(pairs, folds_N)
    assert correlation * planted > 0.4
    assert list(losses) == ["-0.9", "-0.5", "0", "0.5", "0.9"]
    assert losses["0"] - min(losses.values()) > 1


def test_of_few_verdicts_at_random_a_correlation_is_hardly_ever_believed():
    """Some candidate is always best by chance; few gain a nat by it."""
    preferred = believed = 0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        difference_NH = torch.randn(60, 40, generator=generator)
        labels_N = (torch.rand(60, generator=generator) > 0.5).float()
        pairs = comparisons(difference_NH, labels_N, criterion_N=torch.arange(60) % 2)
        group = ProbeGroup(0, 2, (0.3, 0.3))
        correlation, losses = chosen(pairs, torch.arange(60) % 5, [group])
        preferred += min(losses, key=losses.__getitem__) != "0"
        believed += correlation != 0
    assert preferred >= 5
    assert believed <= 2


def test_one_candidate_is_taken_untried_and_zero_keeps_criteria_apart():
    pairs, _, folds_N = related(-0.9)
    assert chosen(pairs, folds_N, candidates=[0.0]) == (0.0, {})
    assert chosen(pairs, folds_N, candidates=[-0.3]) == (-0.3, {})


def test_without_a_zero_among_the_candidates_the_weakest_is_what_has_to_be_beaten():
    pairs, _, folds_N = related(-0.9, few=120)
    assert chosen(pairs, folds_N, candidates=[0.5, 0.9])[0] == 0.5


def test_trained_heads_say_nothing_of_criteria():
    pairs, _, folds_N = related(-0.9)
    trained = TrainedHead(0, 1, torch.zeros(2, 40))
    for candidates in (CANDIDATES, [-0.3], [0.5, 0.9]):
        assert chosen(pairs, folds_N, [trained], candidates) == (0.0, {})
    assert chosen(pairs, folds_N, [trained, GROUP]) == chosen(pairs, folds_N)


def test_every_criterion_is_weighed_by_its_own_l2():
    pairs, _, folds_N = related(0.9, few=120)
    swapped = replace(pairs, criterion_N=1 - pairs.criterion_N)
    uneven = [ProbeGroup(0, 2, l2_C) for l2_C in ((0.01, 1.0), (1.0, 0.01))]
    one, other = chosen(pairs, folds_N, uneven[:1])[1], chosen(swapped, folds_N, uneven[1:])[1]
    assert one == pytest.approx(other, abs=0.2)
    assert one != pytest.approx(chosen(pairs, folds_N, uneven[1:])[1], abs=1.0)


def three(planted: float) -> tuple[Comparisons, torch.Tensor]:
    """A third criterion, of the verdicts at every fourth pair of the first."""
    pairs, _, folds_N = related(planted, few=120)
    criterion_N = pairs.criterion_N.clone()
    criterion_N[(criterion_N == 0) & (torch.arange(len(criterion_N)) % 4 == 0)] = 2
    return replace(pairs, criterion_N=criterion_N), folds_N


def test_every_two_of_three_criteria_are_asked_about_and_loss_is_the_mean_over_groups():
    pairs, folds_N = three(-0.9)
    names = ["helpful", "honest", "harmless"]
    group = ProbeGroup(0, 2, (BOTH_L2,) * 3)
    once = choose_correlation([pairs], [[group]], folds_N, names, CANDIDATES)
    correlation_CC, losses = once
    assert list(losses) == ["helpful ~ honest", "helpful ~ harmless", "honest ~ harmless"]
    assert correlation_CC[0, 1] < 0 < correlation_CC[0, 2]
    assert correlation_CC[1, 2] <= 0
    twice = choose_correlation([pairs] * 2, [[group]] * 2, folds_N, names, CANDIDATES)
    torch.testing.assert_close(twice[0], correlation_CC)
    for name, tried in losses.items():
        assert twice[1][name] == pytest.approx(tried)


def test_three_criteria_stay_apart_unless_all_correlations_together_gain(monkeypatch):
    """Two by two each correlation gains; what they come to together is asked once more."""
    asked: list[int] = []

    def losses(*args: Any) -> torch.Tensor:
        correlation_LCC = args[2]
        asked.append(correlation_LCC.shape[1])
        # Two criteria like the last candidate best, three like the first matrix.
        sign = -1 if correlation_LCC.shape[1] == 2 else 1
        return sign * 5 * torch.arange(float(len(correlation_LCC)))

    monkeypatch.setattr("trainers.reward_choices.correlation_losses", losses)
    pairs, folds_N = three(-0.9)
    names = ["helpful", "honest", "harmless"]
    group = ProbeGroup(0, 2, (BOTH_L2,) * 3)
    correlation_CC, _ = choose_correlation([pairs], [[group]], folds_N, names, CANDIDATES)
    assert asked == [2, 2, 2, 3]
    assert torch.equal(correlation_CC, torch.eye(3))


def test_the_rewards_temperature_is_of_the_pairs_that_the_reward_is_about():
    # The reward is right on 80 of 100 pairs of "a" by a margin of 2, and on as few of "b".
    margins_N = torch.tensor([2.0] * 80 + [-2.0] * 20 + [2.0] * 20 + [-2.0] * 80)
    rewards_KN = torch.cat([margins_N, torch.zeros(200)]).unsqueeze(0)
    nothing_N = torch.zeros(400)
    said = Answers(rewards_KN, rewards_KN.unsqueeze(1).expand(1, 2, 400), nothing_N, nothing_N)
    prompt = (Message("user", "?"),)
    pairs = [PreferencePair(prompt, "yes", "no", criterion=name) for name in "a" * 100 + "b" * 100]
    alone = temperatures(said, pairs, ["a", "b"], {"a": 1.0, "b": 0.0})
    mixed = temperatures(said, pairs, ["a", "b"], {"a": 1.0, "b": 1.0})
    assert alone["reward"] == alone["a"] == pytest.approx(2 / math.log(4), rel=0.02)
    assert mixed["reward"] > 2 * alone["reward"]
