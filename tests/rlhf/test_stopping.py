import random

import pytest

from rlhf.config import StoppingSection
from rlhf.stopping import Evaluation, surely_better, verdict


def evaluation(
    step: int, reward: float, loss: float = 1.0, disagreement: float = 0.0, noise: float = 0.0
) -> Evaluation:
    """40 prompts about this reward; the same noise for the same step."""
    draw = random.Random(step)
    rewards = tuple(reward + p / 40 + noise * draw.gauss(0, 1) for p in range(40))
    return Evaluation(step, loss, rewards, (disagreement,) * 40)


SETTINGS = StoppingSection(patience=2, disagreement_penalty=1.0)


def test_it_goes_on_while_the_reward_surely_rises():
    found = verdict([evaluation(n, 0.1 * n) for n in range(6)], SETTINGS)
    assert (found.anchor, found.best_by_reward, found.stop) == (5, 5, False)


def test_it_stops_when_the_last_sure_rise_is_patience_evaluations_old():
    rewards = [0.0, 0.5, 0.5, 0.5]
    each = [evaluation(n, reward) for n, reward in enumerate(rewards)]
    assert [verdict(each[:n], SETTINGS).stop for n in (1, 2, 3, 4)] == [False, False, False, True]
    assert verdict(each, SETTINGS).anchor == 1


def test_a_rise_that_noise_explains_is_none():
    # 0.02 higher, with a deviation of 1 for every prompt.
    each = [evaluation(0, 0.0, noise=1.0), evaluation(1, 0.02, noise=1.0)]
    assert verdict(each, SETTINGS).anchor == 0
    # The same rise for every prompt is sure.
    assert verdict([evaluation(0, 0.0), evaluation(1, 0.02)], SETTINGS).anchor == 1


def test_small_rises_add_up_against_the_same_anchor():
    # Differences of neighbours are as often down as up, but for a drift.
    def drifting(step: int) -> Evaluation:
        rewards = tuple(0.04 * step + 0.4 * (-1) ** (step + p) * (step % 2) for p in range(40))
        return Evaluation(step, 1.0, rewards, (0.0,) * 40)

    first, second, third = (drifting(step) for step in range(3))
    assert not surely_better(second.rewards_P, first.rewards_P, 0.9)
    assert not surely_better(third.rewards_P, second.rewards_P, 0.9)
    assert verdict([first, second, third], StoppingSection(patience=9)).anchor == 2


def test_a_rise_with_as_much_disagreement_is_no_reason_to_go_on():
    each = [evaluation(n, 0.3 * n, disagreement=0.3 * n) for n in range(4)]
    found = verdict(each, SETTINGS)
    assert (found.anchor, found.best_by_reward, found.stop) == (0, 0, True)
    assert not verdict(each, StoppingSection(patience=2, disagreement_penalty=0)).stop


def test_best_by_loss_and_by_reward_are_told_apart():
    losses = [2.0, 1.0, 1.5, 1.8]
    each = [evaluation(n, 0.1 * n, loss) for n, loss in enumerate(losses)]
    found = verdict(each, SETTINGS)
    assert (found.best_by_loss, found.best_by_reward) == (1, 3)


def test_the_best_may_be_one_that_is_not_surely_better():
    each = [evaluation(0, 0.0, noise=1.0), evaluation(1, 0.05, noise=1.0)]
    means = [sum(one.rewards_P) for one in each]
    assert verdict(each, SETTINGS).best_by_reward == means.index(max(means))


def test_nothing_evaluated_is_refused():
    with pytest.raises(ValueError, match="nothing was evaluated"):
        verdict([], SETTINGS)
