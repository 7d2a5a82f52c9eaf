import math
import time
from dataclasses import replace

import numpy as np
import pytest

from labelling.attention import _events, attention, decide
from labelling.pool import WAYS, Pool, Rates, columns, fit, tables_of
from labelling.records import VERDICTS, Judgement
from labelling.worlds import SimulatedPerson, World, play, polluted
from rlhf.records import OVERALL


def judged(pair, assessor, verdict, first="a", **more):
    return Judgement(pair, assessor, {OVERALL: verdict}, first, **more)


def test_every_classs_probabilities_of_what_is_said_sum_to_one():
    for spread in (np.array([0.0]), np.array([-0.4, 0.0, 0.4])):
        tables = tables_of(Rates(lean=0.05, tie=0.2, bad=0.1, undecided=0.3), spread)
        by_shown = tables.pair_V2C.reshape(len(VERDICTS), 9, 2, -1)
        assert by_shown.sum(axis=0) == pytest.approx(1)
        by_shown = tables.honeypot_TVC.reshape(len(VERDICTS), len(VERDICTS), 9, -1)
        assert by_shown.sum(axis=1) == pytest.approx(1)
        assert tables.pair_V2C.min() > 0 and tables.honeypot_TVC.min() > 0


def known_pool(data, rates):
    """A pool whose rates are known and whose assessors are all attentive."""
    nodes, classes = np.array([0.0]), 1 + len(WAYS)
    tables = tables_of(rates, nodes)
    class_AC = np.zeros((len(data.assessors), classes))
    class_AC[:, 0] = 1
    code_N = (data.verdict_N * 3 + data.side_N) * 3 + data.longer_N
    says_N2 = np.log(tables.pair_V2C[code_N, :, 0])
    even_N, half_N = np.zeros(len(code_N)), np.full(len(code_N), 0.5)
    return Pool(rates, tables, class_AC, even_N, half_N, says_N2, code_N, np.ones(1))


def test_the_evidence_of_one_honeypot_and_of_one_pair_by_hand():
    rates = Rates(honeypot=0.9, pair=0.8, tie=0.0, bad=0.0)
    rows = [judged("pot", "x", "b", "", truth="a", at=0)]
    data = columns(rows)
    found = decide(data, known_pool(data, rates), 0.03)["x"]
    # Wrong: attentive 0.1, guessing 0.5, half of the time 0.3. The undecided share is the same for
    # all. Without an order or words all ways guess but "always says tie", whose guess is a lapse.
    wrong = 0.9 / 1.0  # of wrong ones, those that say b: (1 - 0.1) / (1 - 0.1 + 0.1)
    lapse = 0.05 * 0.5  # says b though always tie
    guesses = 0.05 * 0.5 * wrong + 0.05 * 4 * 0.5 + 0.05 * lapse
    half = 0.7 * (0.5 * 0.1 * wrong + 0.5 * 0.5 * wrong)
    expected = math.log((half + guesses) / (0.1 * wrong))
    assert found.log_evidence == pytest.approx(expected)

    # y said a, then x says b: a is right with 0.8, so an attentive x says b with
    # 0.8 * 0.2 + 0.2 * 0.8 = 0.32, a guess with 0.5, half of the time 0.41.
    rows = [judged("1", "y", "a", "", at=0), judged("1", "x", "b", "", at=1)]
    data = columns(rows)
    found = decide(data, known_pool(data, rates), 0.03)
    expected = math.log((0.7 * 0.41 + 0.25 * 0.5 + 0.05 * lapse) / 0.32)
    assert found["x"].log_evidence == pytest.approx(expected, abs=1e-6)
    # When x came, y's evidence was revised to the same; before it was that of no others.
    assert found["y"].log_evidence == pytest.approx(expected, abs=1e-6)
    assert found["y"].judgements == 1


def test_evidence_has_mean_one_for_an_attentive_assessor_however_the_others_judge_later():
    # All outcomes of three judges of one pair, weighed by their probability: the expectation of e
    # after every one of the three judgements is 1 for whoever judged first.
    rates = Rates(honeypot=0.9, pair=0.8, tie=0.1, bad=0.05)
    table = tables_of(rates, np.array([0.0])).pair_V2C
    code = {verdict: (at * 3 + 0) * 3 + 2 for at, verdict in enumerate(VERDICTS)}
    for judges in (1, 2, 3):
        total = 0.0
        for outcome in np.ndindex(*(len(VERDICTS),) * judges):
            rows = [
                judged("1", f"j{at}", VERDICTS[said], "a", at=at) for at, said in enumerate(outcome)
            ]
            chance = sum(
                0.5 * math.prod(table[code[row.verdicts[OVERALL]], true, 0] for row in rows)
                for true in range(2)
            )
            data = columns(rows)
            pool = known_pool(data, rates)
            who, _, evidence = _events(data, pool)
            course = evidence[who == 0].sum(axis=0)
            e = np.exp(course[1:] - course[0]) @ np.array(list(WAYS.values()))
            total += chance * e
        assert total == pytest.approx(1)


@pytest.fixture(scope="module")
def small():
    return play(
        replace(polluted(1, people=50, spammers=8, early=15, early_spammers=5), each=150), 1
    )


def test_spammers_are_told_and_named_and_honest_ones_let_be(small):
    found = attention(small.judgements)
    named = {
        "first": "chooses the answer shown first",
        "longest": "chooses the longest answer",
    }
    honest = [one for name, one in found.items() if name.startswith("honest")]
    spammers = [one for name, one in found.items() if not name.startswith("honest")]
    assert sum(one.state == "paused" for one in honest) <= 3
    assert sum(one.state == "paused" for one in spammers) >= 7
    for one in spammers:
        kind = one.assessor.rsplit("-", 1)[0]
        assert named.get(kind, one.way) == one.way
        if kind in named:
            assert one.crossed_after is not None and one.crossed_after <= 30
        assert one.judgements == 150


def test_the_pools_rates_are_found_though_two_in_five_of_the_early_pool_do_not_read():
    world = polluted(3, people=25, spammers=10, early=25, early_spammers=10, each=120)
    rates = fit(columns(play(world, 3).judgements)).rates
    assert rates.pair == pytest.approx(0.80, abs=0.05)
    assert rates.honeypot == pytest.approx(0.92, abs=0.04)
    assert rates.tie == pytest.approx(0.05, abs=0.02)


def test_attentive_assessors_are_hardly_ever_paused_however_often_one_looks():
    people = tuple(SimulatedPerson(f"p{at}") for at in range(60))
    paused = 0
    for seed in range(3):
        looks = []

        def pause(judgements, paused, looks=looks):
            found = attention(judgements, false_pause_rate=0.1, uncounted=paused)
            looks.append(found)
            return [name for name, one in found.items() if one.state == "paused"]

        played = play(World(people, each=100), seed, pause=pause, look_every=400)
        assert len(looks) > 10
        paused += len(played.paused)
    # At 0.1 of 180 at most 18 are expected; the bound leaves room for two standard deviations.
    assert paused <= 26


def test_a_paused_assessor_says_nothing_of_the_others():
    rows = []
    for at in range(40):
        rows += [
            judged(f"{at}", "x", "a", "", at=3 * at),
            judged(f"{at}", "y", "b" if at % 2 else "a", "", at=3 * at + 1),
        ]
    alone = attention([row for row in rows if row.assessor == "x"], uncounted=["y"])["x"]
    beside = attention(rows, uncounted=["y"])["x"]
    assert beside.log_evidence == pytest.approx(alone.log_evidence, abs=1e-6)


def test_edge_cases_are_answered_and_nobody_is_paused_for_nothing():
    assert attention([]) == {}
    [one] = attention([judged("1", "x", "a", "")]).values()
    assert one.state == "working" and one.crossed_after is None
    ties = [judged(f"{pair}", who, "tie", "") for pair in range(30) for who in "xyz"]
    assert all(math.isfinite(one.log_evidence) for one in attention(ties).values())
    bad = [judged(f"{at}", "x", "bad", "", truth="bad") for at in range(30)]
    assert attention(bad)["x"].state == "working"
    repeated = [judged("1", "x", "a", at=0), judged("1", "x", "b", repeat=True, at=1)]
    assert attention(repeated)["x"].judgements == 2
    doubted = [replace(row, doubt="tired") for row in repeated]
    assert attention(doubted) == {}


def test_people_and_models_are_not_judged_together_and_rates_are_rates():
    one = judged("1", "x", "a")
    with pytest.raises(ValueError, match="one kind at a time"):
        attention([one, replace(one, assessor="m", kind="model")])
    with pytest.raises(ValueError, match="false_pause_rate 0"):
        attention([one], false_pause_rate=0)


def test_two_hundred_assessors_of_two_hundred_judgements_take_about_a_second():
    people = tuple(SimulatedPerson(f"p{at}") for at in range(200))
    judgements = play(World(people, each=50), 0).judgements
    many = [
        replace(row, pair=f"{row.pair}/{copy}", at=row.at + 1e5 * copy)
        for copy in range(4)
        for row in judgements
    ]
    started = time.process_time()
    attention(many)
    assert time.process_time() - started < 4


def test_who_prefers_longer_answers_where_they_are_better_is_not_taken_for_a_spammer():
    people = [SimulatedPerson(f"honest-{n}") for n in range(20)]
    people.append(SimulatedPerson("spammer", spam="longest"))
    played = play(World(tuple(people), each=120, longer=0.95), seed=3)
    assert fit(columns(played.judgements)).rates.longer > 0.85
    found = attention(played.judgements)
    assert [name for name, each in found.items() if each.state == "paused"] == ["spammer"]
