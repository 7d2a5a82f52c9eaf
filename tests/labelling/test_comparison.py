import gzip
import json
import math
from collections import Counter, defaultdict
from itertools import permutations
from pathlib import Path

import pytest

from labelling.agreement import alpha
from labelling.comparison import (
    Comparison,
    Record,
    WinMatrix,
    chance_better,
    expected_information,
    holm,
)

OUTCOME = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}


def matrix(**wins: int) -> WinMatrix:
    """`ab=3`: a has beaten b three times."""
    return WinMatrix(
        Comparison(pair[0], pair[1], 1.0) for pair, count in wins.items() for _ in range(count)
    )


def test_the_order_in_which_two_models_were_named_does_not_matter():
    found = WinMatrix([Comparison("a", "b", 1), Comparison("b", "a", 1), Comparison("b", "a", 0.5)])
    assert found.record("a", "b") == Record(1, 1, 1)
    assert found.record("b", "a") == Record(1, 1, 1)
    one = WinMatrix([Comparison("b", "a", 0), Comparison("a", "b", 1)])
    assert one.record("a", "b") == Record(2, 0, 0)
    assert one.record("b", "a") == Record(0, 2, 0)
    assert one.record("a", "nobody") == Record()


def test_ties_count_half_in_the_share_and_not_at_all_in_the_test():
    record = Record(wins=8, losses=2, ties=10)
    assert record.share[0] == pytest.approx((8 + 5) / 20)
    # (n + 1) C(n, k) / 2^n of the ten that were decided.
    assert record.p == pytest.approx(11 * 45 / 1024)
    assert Record(ties=5).p == 1.0
    assert Record(3000, 2000).p < 1e-40


def test_p_is_adjusted_for_as_many_pairs_step_down():
    found = holm({("a", "b"): 0.01, ("a", "c"): 0.04, ("b", "c"): 0.03})
    assert found == pytest.approx({("a", "b"): 0.03, ("b", "c"): 0.06, ("a", "c"): 0.06})


def test_a_winner_beats_every_other_and_needs_no_rating():
    found = matrix(ab=3, ba=1, ac=2, cb=5)
    assert found.condorcet_winner() == "a"
    assert found.smith_set() == ["a"]
    assert found.cycles() == []


def test_where_there_is_a_cycle_no_winner_is_named_but_the_set_that_beats_the_rest():
    found = matrix(ab=6, bc=6, ca=6, ad=4, bd=4, cd=4)
    assert found.condorcet_winner() is None
    assert found.smith_set() == ["a", "b", "c"]
    assert found.cycles() == [["a", "b", "c"]]
    assert found.cycles(sure=True) == []
    many = matrix(ab=60, bc=60, ca=60, ad=4, bd=4, cd=4)
    assert many.cycles(sure=True) == [["a", "b", "c"]]


def test_the_smallest_set_that_beats_the_rest_by_trying_all_of_them():
    worlds = [
        matrix(ab=1, bc=1, ca=1, ad=1, bd=1, cd=1, de=1, ea=0, ae=1, be=1, ce=1),
        matrix(ab=2, ba=2, ac=1, bc=1, cd=3, ad=1, bd=1),
        matrix(ab=1, bc=1, cd=1, da=1, ac=1, bd=1),
        matrix(ab=1, cd=1),
    ]
    for world in worlds:
        smallest = min(
            (
                sorted(chosen)
                for size in range(1, len(world.models) + 1)
                for chosen in map(set, permutations(world.models, size))
                if all(world.beats(a, b) for a in chosen for b in world.models if b not in chosen)
            ),
            key=len,
        )
        assert world.smith_set() == smallest


def test_the_chance_to_be_better_is_that_of_a_uniform_prior():
    # By integration of Beta(w + 1, l + 1) over the upper half.
    for wins, losses in [(0, 0), (3, 1), (7, 9)]:
        steps = 20_000
        grid = [(k + 0.5) / steps for k in range(steps)]
        density = [p**wins * (1 - p) ** losses for p in grid]
        upper = sum(d for p, d in zip(grid, density, strict=True) if p > 0.5)
        assert chance_better(Record(wins, losses)) == pytest.approx(upper / sum(density), abs=1e-4)


@pytest.mark.parametrize("count", [0, 1, 6, 60, 301])
def test_what_a_verdict_would_tell_is_the_same_by_whole_numbers(count):
    def better(wins: int, losses: int) -> float:
        trials = wins + losses + 1
        return sum(math.comb(trials, k) for k in range(wins + 1)) / 2**trials

    def doubt(wins: int, losses: int) -> float:
        chance = better(wins, losses)
        return -sum(p * math.log2(p) for p in (chance, 1 - chance) if p > 0)

    for wins in range(count + 1):
        losses = count - wins
        chance = (wins + 1) / (count + 2)
        later = chance * doubt(wins + 1, losses) + (1 - chance) * doubt(wins, losses + 1)
        assert chance_better(Record(wins, losses)) == pytest.approx(better(wins, losses))
        told = expected_information(Record(wins, losses))
        assert told == pytest.approx(max(0.0, doubt(wins, losses) - later), abs=1e-11)


def test_the_next_comparison_is_where_a_verdict_tells_most():
    assert expected_information(Record(0, 0)) > expected_information(Record(4, 4)) > 0
    assert expected_information(Record(30, 1)) < expected_information(Record(8, 6))
    found = matrix(ab=9, ac=2, ca=2, bc=9)
    assert found.ask_next()[0][1:] == ("a", "c")
    # Who never met is asked first.
    assert matrix(ab=5, cd=5).ask_next()[0][1:] in {("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")}


@pytest.mark.parametrize(
    ("first", "second", "outcome", "said"),
    [("a", "a", 1, "compared with itself"), ("a", "b", 0.7, "outcome 0.7")],
)
def test_what_is_no_judgement_is_refused(first, second, outcome, said):
    with pytest.raises(ValueError, match=said):
        Comparison(first, second, outcome)


@pytest.fixture(scope="module")
def votes(hh_data: Path) -> list[dict]:
    path = hh_data / "mt_bench_votes" / "votes.jsonl.gz"
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_the_votes_of_mt_bench_worked_out_a_second_way(votes):
    found = WinMatrix(Comparison(v["model_a"], v["model_b"], OUTCOME[v["winner"]]) for v in votes)
    counted: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for vote in votes:
        winner = vote[vote["winner"]] if vote["winner"] != "tie" else "tie"
        counted[tuple(sorted((vote["model_a"], vote["model_b"])))][winner] += 1
    assert sum(counter.total() for counter in counted.values()) == len(votes) == 1821
    for (one, other), counter in counted.items():
        record = found.record(one, other)
        assert (record.wins, record.losses, record.ties) == (
            counter[one],
            counter[other],
            counter["tie"],
        )
    beaten_by_nobody = [
        model
        for model in found.models
        if all(
            counter[model] > counter[next(o for o in pair if o != model)]
            for pair, counter in counted.items()
            if model in pair
        )
    ]
    assert beaten_by_nobody == [found.condorcet_winner()]


def test_the_agreement_of_mt_benchs_judges_worked_out_a_second_way(votes):
    units: dict[tuple, list[str]] = defaultdict(list)
    for vote in votes:
        one, other = sorted((vote["model_a"], vote["model_b"]))
        said = vote[vote["winner"]] if vote["winner"] != "tie" else "tie"
        units[vote["question_id"], vote["turn"], one, other].append(said)
    verdicts = [list(said) for said in units.values()]
    # By the coincidence matrix (Krippendorff, 2011, section B), in the place of pairs.
    coincidences: Counter = Counter()
    for said in verdicts:
        if len(said) > 1:
            counts = Counter(said)
            for a, b in [(a, b) for a in counts for b in counts]:
                coincidences[a, b] += counts[a] * (counts[b] - (a == b)) / (len(said) - 1)
    total = sum(coincidences.values())
    margins = Counter()
    for (a, _), value in coincidences.items():
        margins[a] += value
    observed = sum(value for (a, b), value in coincidences.items() if a != b) / total
    expected = sum(margins[a] * margins[b] for a in margins for b in margins if a != b) / (
        total * (total - 1)
    )
    assert alpha(verdicts) == pytest.approx(1 - observed / expected)
    assert not math.isnan(alpha(verdicts))
