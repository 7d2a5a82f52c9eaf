import random
from itertools import pairwise

import numpy as np
import pytest

from labelling.aggregation import Vote, dawid_skene, majority

CLASSES = ("first", "second", "tie")


def world(
    seed: int, accuracies: list[float], units: int = 400, judged_by: int = 5, spammers: int = 0
) -> tuple[list[Vote], dict[int, str]]:
    """Units of a known truth, each judged by some of the assessors; spammers always say first."""
    draw = random.Random(seed)
    truth = {unit: draw.choice(CLASSES) for unit in range(units)}
    people = [*accuracies, *[-1.0] * spammers]
    votes = []
    for unit, right in truth.items():
        for who in draw.sample(range(len(people)), judged_by):
            if people[who] < 0:
                said = "first"
            elif draw.random() < people[who]:
                said = right
            else:
                said = draw.choice([name for name in CLASSES if name != right])
            votes.append(Vote(unit, who, said))
    return votes, truth


def accuracy(found: dict, truth: dict[int, str]) -> float:
    return sum(found[unit] == right for unit, right in truth.items()) / len(truth)


def of_majority(votes: list[Vote]) -> dict:
    return {
        unit: CLASSES[int(np.argmax(shares))] for unit, shares in majority(votes, CLASSES).items()
    }


def test_majority_is_the_share_of_verdicts():
    votes = [Vote("u", n, said) for n, said in enumerate(["first", "first", "tie", "second"])]
    np.testing.assert_allclose(majority(votes, CLASSES)["u"], [0.5, 0.25, 0.25])


@pytest.mark.parametrize("seed", range(3))
def test_one_bad_assessor_in_four_is_seen_through(seed):
    votes, truth = world(seed, [0.8] * 15 + [0.2] * 5)
    found = dawid_skene(votes, CLASSES)
    verdicts = {unit: found.verdict(unit) for unit in truth}
    assert accuracy(verdicts, truth) > accuracy(of_majority(votes), truth) + 0.02


def test_how_good_everybody_is_comes_out():
    votes, _ = world(1, [0.9] * 10 + [0.5] * 10, units=1500)
    found = dawid_skene(votes, CLASSES)
    for who, confusion in found.confusion.items():
        right = float(np.diag(confusion).mean())
        assert right == pytest.approx(0.9 if who < 10 else 0.5, abs=0.1)


def test_a_spammers_verdicts_weigh_nothing():
    votes, truth = world(2, [0.8] * 12, units=600, spammers=4)
    found = dawid_skene(votes, CLASSES)
    for who in range(12, 16):
        # The same whatever the truth.
        assert found.confusion[who][:, 0].min() > 0.9
    unit = next(iter(truth))
    without = [vote for vote in votes if vote.unit == unit and vote.assessor < 12]
    rest = [vote for vote in votes if vote.unit != unit]
    more = [Vote(unit, 12, "first")]
    one, other = (dawid_skene(rest + without + extra, CLASSES) for extra in ([], more))
    np.testing.assert_allclose(one.posteriors[unit], other.posteriors[unit], atol=0.05)


def test_one_who_has_it_backwards_counts_the_other_way_round():
    draw = random.Random(0)
    votes, right = [], {}
    for unit in range(300):
        right[unit] = draw.choice(["first", "second"])
        wrong = "second" if right[unit] == "first" else "first"
        votes += [
            Vote(unit, who, right[unit] if draw.random() < 0.85 else wrong) for who in range(4)
        ]
        votes.append(Vote(unit, "backwards", wrong))
    found = dawid_skene(votes, ("first", "second"))
    assert found.confusion["backwards"][0, 1] > 0.9
    assert accuracy({unit: found.verdict(unit) for unit in right}, right) > 0.97


def test_honeypots_hold_the_error_rates_to_the_truth():
    # Everybody has it backwards: without known truths nobody could tell.
    draw = random.Random(3)
    truth = {unit: draw.choice(["first", "second"]) for unit in range(200)}
    flip = {"first": "second", "second": "first"}
    votes = [
        Vote(unit, who, flip[right] if draw.random() < 0.9 else right)
        for unit, right in truth.items()
        for who in range(4)
    ]
    known = {unit: truth[unit] for unit in range(60)}
    blind = dawid_skene(votes, ("first", "second"))
    told = dawid_skene(votes, ("first", "second"), known=known)
    rest = {unit: right for unit, right in truth.items() if unit >= 60}
    assert accuracy({unit: blind.verdict(unit) for unit in rest}, rest) < 0.1
    assert accuracy({unit: told.verdict(unit) for unit in rest}, rest) > 0.9
    assert all(told.verdict(unit) == right for unit, right in known.items())


def test_the_likelihood_never_falls_from_step_to_step():
    votes, _ = world(4, [0.8, 0.7, 0.6, 0.9, 0.5, 0.4], units=100, judged_by=4)
    found = [
        dawid_skene(votes, CLASSES, iterations=n, tolerance=-1).log_likelihood for n in range(1, 15)
    ]
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(found))


def test_few_verdicts_make_nobody_certain():
    found = dawid_skene([Vote("u", "a", "first")], CLASSES)
    assert 0.4 < found.posteriors["u"][0] < 0.95


@pytest.mark.parametrize(
    ("votes", "said"),
    [([], "no votes"), ([Vote("u", "a", "neither")], "'neither' is none of the classes")],
)
def test_what_cannot_be_aggregated_is_refused(votes, said):
    with pytest.raises(ValueError, match=said):
        dawid_skene(votes, CLASSES)
