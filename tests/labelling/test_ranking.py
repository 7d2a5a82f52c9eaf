"""Noisy Bradley-Terry: the order and who is to be believed, from comparisons alone."""

from __future__ import annotations

import gzip
import json
import math
import random
import tracemalloc
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

from labelling.comparison import Comparison, WinMatrix
from labelling.ranking import (
    Ranking,
    bradley_terry,
    crowd_bradley_terry,
    posterior_of,
)

CROWD = {
    **{f"careful{k}": 0.92 for k in range(6)},
    **{f"spammer{k}": 0.5 for k in range(4)},
    **{f"liar{k}": 0.1 for k in range(3)},
}


def told(assessor: str, first: str, second: str, wins: int = 1, losses: int = 0, ties: int = 0):
    outcomes = [1.0] * wins + [0.0] * losses + [0.5] * ties
    return [Comparison(first, second, outcome, assessor) for outcome in outcomes]


def planted(seed: int, items: int = 12, each: int = 60) -> tuple[dict[str, float], list]:
    draw = random.Random(seed)
    truth = {f"model-{at:02}": draw.gauss(0, 1.2) for at in range(items)}
    comparisons = []
    for assessor, reliability in CROWD.items():
        for _ in range(each):
            one, other = draw.sample(sorted(truth), 2)
            says_one = draw.random() < 1 / (1 + math.exp(truth[other] - truth[one]))
            if draw.random() > reliability:
                says_one = not says_one
            comparisons.append(Comparison(one, other, float(says_one), assessor))
    return truth, comparisons


def ordered_rightly(truth: dict[str, float], found: Ranking) -> float:
    pairs = list(combinations(truth, 2))
    right = [(truth[a] - truth[b]) * (found.scores[a] - found.scores[b]) > 0 for a, b in pairs]
    return sum(right) / len(pairs)


def test_a_planted_order_is_found_among_spammers_and_liars_better_than_without_reliabilities():
    plain, crowd = [], []
    for seed in range(8):
        truth, comparisons = planted(seed)
        plain.append(ordered_rightly(truth, bradley_terry(comparisons)))
        crowd.append(ordered_rightly(truth, crowd_bradley_terry(comparisons)))
    assert all(better >= worse for better, worse in zip(crowd, plain, strict=True))
    assert sum(crowd) / 8 > 0.85 > 0.8 > sum(plain) / 8


def test_the_careful_the_spammers_and_the_liars_are_told_apart():
    _, comparisons = planted(0, each=300)
    found = crowd_bradley_terry(comparisons).reliabilities
    assert set(found) == set(CROWD)
    by_kind = [
        [found[name] for name in CROWD if name.startswith(kind)]
        for kind in ("careful", "spammer", "liar")
    ]
    careful, spammers, liars = by_kind
    assert min(careful) > max(spammers) and min(spammers) > max(liars)
    for each, planted_at in zip(by_kind, (0.92, 0.5, 0.1), strict=True):
        assert sum(each) / len(each) == pytest.approx(planted_at, abs=0.1)


def test_where_all_are_careful_nothing_is_lost_by_asking_who_is():
    truth, comparisons = planted(1)
    careful = [each for each in comparisons if each.assessor.startswith("careful")]
    plain = ordered_rightly(truth, bradley_terry(careful))
    assert ordered_rightly(truth, crowd_bradley_terry(careful)) >= plain - 0.05


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_the_log_posterior(seed):
    _, comparisons = planted(seed, items=5, each=8)
    comparisons += told("careful0", "model-00", "model-01", ties=3)
    items, assessors, posterior = posterior_of(comparisons, 0.7, 3.0, 1.5)
    draw = np.random.default_rng(seed)
    scores, eta = draw.normal(size=len(items)), draw.uniform(0.1, 0.9, len(assessors))
    step = 1e-6
    for at, slope in enumerate(posterior.by_scores(scores, eta)):
        nudge = step * np.eye(len(items))[at]
        rise = posterior.value(scores + nudge, eta) - posterior.value(scores - nudge, eta)
        assert slope == pytest.approx(rise / (2 * step), abs=1e-6)
    for at, slope in enumerate(posterior.by_reliabilities(scores, eta)):
        nudge = step * np.eye(len(assessors))[at]
        rise = posterior.value(scores, eta + nudge) - posterior.value(scores, eta - nudge)
        assert slope == pytest.approx(rise / (2 * step), abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_that_of_newton_over_all_items_at_once(seed):
    draw = random.Random(seed)
    # Twelve prompts of two to five answers that are joined, in chains at least.
    comparisons = []
    for prompt in range(12):
        answers = [f"{prompt} {letter}" for letter in "abcde"[: 2 + prompt % 4]]
        draw.shuffle(answers)
        met = [*pairwise(answers), *(draw.sample(answers, 2) for _ in range(3))]
        for one, other in met:
            who = draw.choice(list(CROWD))
            comparisons.append(Comparison(one, other, draw.choice((0.0, 0.5, 1.0)), who))
    items, assessors, posterior = posterior_of(comparisons, 0.7, 3.0, 1.5)
    assert sorted(items) == sorted({x for each in comparisons for x in (each.first, each.second)})
    noise = np.random.default_rng(seed)
    scores, eta = noise.normal(size=len(items)), noise.uniform(0.1, 0.9, len(assessors))

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    # Minus the second derivative of Bradley and Terry's log-posterior, of all pairs of items.
    at = {name: place for place, name in enumerate(items)}
    curvature = np.diag(2 * 0.7 * sigmoid(scores) * sigmoid(-scores))
    for each in comparisons:
        one, other = at[each.first], at[each.second]
        bend = sigmoid(scores[one] - scores[other]) * sigmoid(scores[other] - scores[one])
        curvature[[one, other], [one, other]] += bend
        curvature[[one, other], [other, one]] -= bend
    step = np.linalg.solve(curvature, posterior.by_scores(scores, eta))
    stepped, _ = posterior.climb(scores, eta, -math.inf)
    assert stepped == pytest.approx(scores + step, abs=1e-12)


def test_answers_to_many_prompts_take_little_memory():
    draw = random.Random(0)
    comparisons = [
        Comparison(f"{prompt} a", f"{prompt} b", draw.choice((0.0, 0.5, 1.0)), f"k{who}")
        for prompt in range(3_000)
        for who in draw.sample(range(20), 2)
    ]
    tracemalloc.start()
    try:
        found = crowd_bradley_terry(comparisons)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.scores) == 6_000
    assert peak_bytes < 50e6  # one matrix of all items is 288 MB


def test_what_is_found_is_where_nothing_rises_any_more():
    _, comparisons = planted(2)
    found = crowd_bradley_terry(comparisons, tolerance=1e-14)
    items, assessors, posterior = posterior_of(comparisons, 0.5, 3.0, 1.0)
    eta = np.array([found.reliabilities[name] for name in assessors])
    centred = np.array([found.scores[name] for name in items])
    # The virtual item has score 0, so the mean that was taken off is where its own slope vanishes.
    shifts = np.linspace(-1, 1, 2001)
    shift = shifts[np.argmax([posterior.value(centred + shift, eta) for shift in shifts])]
    assert np.abs(posterior.by_scores(centred + shift, eta)).max() < 0.02
    assert np.abs(posterior.by_reliabilities(centred + shift, eta)).max() < 0.02
    assert posterior.value(centred + shift, eta) == pytest.approx(found.log_posterior, abs=1e-3)


def test_two_items_worked_out_by_hand():
    # Scores t and -t. 9 to 1, and 3 to 3 of each against the virtual item of score 0: the slope
    # 2 * 9 * sigmoid(-2t) - 2 * 1 * sigmoid(2t) + 2 * 3 * (1 - 2 sigmoid(t)) is zero at t = log 2:
    # sigmoid(2t) = 4/5 and sigmoid(t) = 2/3 give 18/5 - 8/5 - 6/3 = 0.
    comparisons = told("k", "x", "y", wins=9, losses=1)
    found = bradley_terry(comparisons, regular=3)
    assert found.scores == pytest.approx({"x": math.log(2), "y": -math.log(2)})
    assert found.probability("x", "y") == pytest.approx(0.8)
    assert found.probability("y", "x") == pytest.approx(0.2)
    # One verdict by somebody of reliability 3/4, at those scores: 3/4 * 4/5 + 1/4 * 1/5 = 13/20
    # that it is x, and if so it was meant with 12/13.
    items, _, posterior = posterior_of(told("k", "x", "y"), 3.0, 2.0, 1.0)
    scores, eta = np.array([found.scores[item] for item in items]), np.array([0.75])
    assert posterior.meant(scores, eta) == pytest.approx([12 / 13])
    # With the prior, eta is next (2 + 12/13) of the 2 + 1 + 1 verdicts.
    assert posterior.reliabilities(scores, eta) == pytest.approx([(2 + 12 / 13) / 4])
    said = math.log(13 / 20) + 2 * math.log(3 / 4) + math.log(1 / 4)
    assert posterior.value(scores, eta) == pytest.approx(said + 3 * 2 * math.log(2 / 3 * 1 / 3))


def test_a_tie_is_half_of_each():
    tie = bradley_terry(told("k", "x", "y", ties=4, wins=3))
    halves = bradley_terry(told("k", "x", "y", wins=5, losses=2))
    assert tie.scores == pytest.approx(halves.scores)
    found = crowd_bradley_terry(told("k", "x", "y", wins=0, ties=6))
    assert found.scores == pytest.approx({"x": 0, "y": 0})
    assert found.probability("x", "y") == pytest.approx(0.5)


def test_scores_have_mean_zero_and_do_not_run_away_where_one_item_always_wins():
    found = crowd_bradley_terry(
        told("k", "x", "y", wins=50) + told("l", "y", "z", wins=50) + told("l", "x", "z", wins=9)
    )
    assert sum(found.scores.values()) == pytest.approx(0, abs=1e-9)
    assert max(map(abs, found.scores.values())) < 10
    assert found.order == ["x", "y", "z"]


def test_the_order_in_which_items_and_verdicts_are_named_does_not_matter():
    _, comparisons = planted(3)
    turned = [Comparison(c.second, c.first, 1 - c.outcome, c.assessor) for c in comparisons[::-1]]
    found, again = crowd_bradley_terry(comparisons), crowd_bradley_terry(turned)
    assert found.scores == pytest.approx(again.scores, abs=1e-6)
    assert found.reliabilities == pytest.approx(again.reliabilities, abs=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "outcome", "said"),
    [("x", "x", 1, "compared with itself"), ("x", "y", 0.7, "outcome 0.7")],
)
def test_what_is_no_comparison_is_refused(first, second, outcome, said):
    with pytest.raises(ValueError, match=said):
        Comparison(first, second, outcome, "k")


def test_nothing_to_rank_by_and_no_prior_are_refused():
    with pytest.raises(ValueError, match="no comparisons"):
        crowd_bradley_terry([])
    with pytest.raises(ValueError, match="above 0"):
        crowd_bradley_terry(told("k", "x", "y"), wrong=0)
    with pytest.raises(ValueError, match="above 0"):
        bradley_terry(told("k", "x", "y"), regular=0)


def test_the_judges_of_mt_bench_agree_with_who_beats_whom(hh_data: Path):
    with gzip.open(hh_data / "mt_bench_votes" / "votes.jsonl.gz", "rt") as file:
        votes = [json.loads(line) for line in file]
    outcome = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}
    comparisons = [
        Comparison(v["model_a"], v["model_b"], outcome[v["winner"]], v["judge"]) for v in votes
    ]
    found = crowd_bradley_terry(comparisons)
    direct = WinMatrix(comparisons)
    assert found.order[0] == direct.condorcet_winner()
    for better, worse in direct.surely_beats():
        assert found.probability(better, worse) > 0.5
    assert min(found.reliabilities.values()) > 0.5
