from collections import Counter

import pytest

from labelling.worlds import SPAM, SimulatedPerson, Task, World, play, polluted
from rlhf.records import OVERALL


def test_a_person_judges_as_it_was_planted():
    person = SimulatedPerson("x", position_bias=0.06)
    said = Counter()
    for at in range(6000):
        truth, first = "ab"[at % 2], "ab"[at // 2 % 2]
        verdict, seconds = person.judge(Task(f"{at}", truth, first, (100, 100)), at + 1, 0)
        assert seconds > 0
        said["tie"] += verdict == "tie"
        said["right"] += verdict == truth
        said["first"] += verdict == first
    decided = 6000 - said["tie"]
    assert said["tie"] / 6000 == pytest.approx(0.05, abs=0.01)
    assert said["right"] / decided == pytest.approx(0.80, abs=0.02)
    assert said["first"] / decided == pytest.approx(0.56, abs=0.02)


def test_fatigue_begins_where_it_was_planted_and_the_same_seed_gives_the_same():
    fresh, tired = SimulatedPerson("x"), SimulatedPerson("x", fatigue_onset=50)
    task = Task("1", "a", "b", (80, 120))
    assert fresh.judge(task, 49, 7) == tired.judge(task, 49, 7)
    assert tired.judge(task, 50, 7)[1] == pytest.approx(0.6 * fresh.judge(task, 50, 7)[1])
    assert fresh.judge(task, 50, 7) != fresh.judge(task, 50, 8)


def test_a_world_is_handed_out_as_it_says():
    people = tuple(SimulatedPerson(f"p{at}") for at in range(20))
    played = play(World(people, each=100), 0)
    assert [row.at for row in played.judgements] == sorted(row.at for row in played.judgements)
    assert set(Counter(row.assessor for row in played.judgements).values()) == {100}
    pots = sum(row.truth is not None for row in played.judgements)
    assert pots / 2000 == pytest.approx(0.10, abs=0.02)
    assert sum(row.repeat for row in played.judgements) / 2000 == pytest.approx(0.05, abs=0.015)
    plain = [row for row in played.judgements if row.truth is None and not row.repeat]
    judges = Counter(row.pair for row in plain)
    assert max(judges.values()) == 3 and Counter(judges.values())[3] > 0.9 * len(judges)
    assert len({(row.pair, row.assessor) for row in plain}) == len(plain)
    looks = {(row.pair, row.assessor): row.first for row in plain}
    assert all(
        looks[row.pair, row.assessor] != row.first for row in played.judgements if row.repeat
    )
    assert all(row.kind == "simulated" for row in played.judgements)


def test_paused_assessors_stop_and_their_pairs_are_handed_out_again():
    people = tuple(SimulatedPerson(f"p{at}") for at in range(10))
    out = ["p3", "p4"]
    played = play(World(people, each=60), 0, pause=lambda rows, paused: out, look_every=100)
    count = Counter(row.assessor for row in played.judgements)
    assert all(count[name] == played.paused[name] < 30 for name in out)
    assert count["p5"] == 60
    plain = [row for row in played.judgements if row.truth is None and not row.repeat]
    counted = Counter(row.pair for row in plain if row.assessor not in out)
    left = [row.pair for row in plain if row.assessor in out]
    assert len(set(left)) < len(left), "no pair that both had judged"
    assert all(counted[pair] == 3 for pair in left)


def test_a_polluted_world_has_its_spammers_early_and_of_every_kind():
    world = polluted(0)
    spam = [person.spam for person in world.people]
    assert sum(kind is not None for kind in spam) == 30
    assert sum(kind is not None for kind in spam[:25]) == 10
    assert {Counter(spam)[kind] for kind in SPAM} <= {7, 8}
    assert world.joins_s[:25] == (0,) * 25 and world.joins_s[25] == 120


def test_every_verdict_is_an_overall_one():
    played = play(World((SimulatedPerson("x"),), each=5), 0)
    assert all(row.verdicts.keys() == {OVERALL} for row in played.judgements)
