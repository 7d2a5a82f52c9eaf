import threading

import pytest

from labelling import review as review_module
from labelling.labels import soft_labels
from labelling.queue import Queue
from labelling.records import Answer, Honeypot, Judgement, Work
from labelling.report import report
from labelling.review import Reviewer, let_go_on, review
from labelling.store import PAUSED, TIRED, Store
from labelling.worlds import SimulatedPerson, World, play
from rlhf.config import AttentionSection, LabelConfig, LabelSection
from rlhf.records import OVERALL, Message

SETTINGS = AttentionSection()


def stored(store: Store, people: list[SimulatedPerson], each: int = 120):
    """A project that has been judged in a world with planted truths."""
    played = play(World(tuple(people), each=each, judges=3), seed=1)
    project = store.make_project("world", [])
    works = {
        name: Work(
            (Message("user", name),),
            Answer(f"{name} good", "tuned"),
            Answer(f"{name} bad", "base"),
            honeypot=Honeypot(truth) if name.startswith("honeypot") else None,
        )
        for name, truth in played.truths.items()
    }
    given = [
        Judgement(**{**{f: getattr(j, f) for f in j.__slots__}, "work": works[j.pair]})
        for j in played.judgements
    ]
    store.add_judgements(project, given)
    return project, played


def test_who_does_not_read_is_paused_and_what_they_said_is_judged_again(store):
    people = [SimulatedPerson(f"honest-{n}") for n in range(5)]
    people.append(SimulatedPerson("spammer", spam="random"))
    project, _ = stored(store, people)
    found = review(store, project, SETTINGS)
    assert found.paused.keys() == {"spammer"}
    by_name = {each.name: each for each in store.assessors(project)}
    assert by_name["spammer"].state == "paused" and "nats" in by_name["spammer"].reason
    judgements = store.judgements(project)
    assert {j.assessor for j in judgements if j.doubt == PAUSED} == {"spammer"}
    # A second review has nothing to change.
    again = review(store, project, SETTINGS)
    assert not again.paused and not again.doubted

    let_go_on(store, by_name["spammer"], "owner")
    assert not [j for j in store.judgements(project) if j.doubt == PAUSED]
    # An owner has vouched for them: the old judgements are no longer held against them.
    assert not review(store, project, SETTINGS).paused


def test_who_was_revoked_alone_is_reviewed_like_any_other_and_stays_revoked(store):
    people = [SimulatedPerson(f"honest-{n}") for n in range(5)]
    people.append(SimulatedPerson("spammer", spam="random"))
    project, _ = stored(store, people)
    for who in store.assessors(project):
        if who.name in ("spammer", "honest-0"):
            store.set_state(who, "revoked", "by the owner", "owner")
    assert review(store, project, SETTINGS).paused.keys() == {"spammer"}
    states = {each.name: (each.state, each.doubted) for each in store.assessors(project)}
    assert states["spammer"] == ("revoked", True)
    assert states["honest-0"] == ("revoked", False)
    assert {j.assessor for j in store.judgements(project) if j.doubt} == {"spammer"}


def test_judgements_from_the_onset_of_fatigue_are_in_doubt_and_the_person_is_told(store):
    people = [SimulatedPerson(f"honest-{n}") for n in range(5)]
    people.append(SimulatedPerson("tired", fatigue_onset=90))
    project, _ = stored(store, people, each=160)
    review(store, project, SETTINGS)
    doubted = [j for j in store.judgements(project) if j.doubt == TIRED]
    assert {j.assessor for j in doubted} == {"tired"}
    assert 40 <= len(doubted) <= 90
    by_name = {each.name: each for each in store.assessors(project)}
    last = max(j.at for j in doubted)
    assert store.tired(by_name["tired"], last + 60)
    assert not store.tired(by_name["tired"], last + 3600)
    assert not store.tired(by_name["honest-0"], last + 60)


def test_verdicts_of_different_kinds_are_never_counted_together(store):
    project = store.make_project("kinds", [])
    work = Work((Message("user", "q"),), Answer("one", "m1"), Answer("other", "m2"))
    store.add_work(project, [work], 1)
    desk = Queue(store, LabelSection(attention=AttentionSection(honeypot_share=0, repeat_share=0)))
    for kind, verdict in (("person", "tie"), ("model", "first")):
        who = store.signed_in(store.invite(project, kind, kind))
        desk.judge(who, desk.next(who).id, {OVERALL: verdict})
    judgements = store.judgements(project, with_work=True)
    people = soft_labels(judgements, "majority", judges_wanted=1)
    [label] = people.values()
    assert label.a_better == 0.5
    models = soft_labels(judgements, "majority", judges_wanted=1, kind="model")
    assert next(iter(models.values())).a_better in (0.0, 1.0)
    found = report(store, project, LabelConfig(), "model")
    assert [each["id"] for each in found["assessors"]] == ["model"]
    assert found["judgements"] == 1


def test_labels_weigh_less_where_judges_are_missing_or_both_answers_are_bad():
    def judged(pair: str, *verdicts: str) -> list[Judgement]:
        return [Judgement(pair, f"p{n}", {OVERALL: v}) for n, v in enumerate(verdicts)]

    found = soft_labels(
        [*judged("full", "a", "a", "b"), *judged("one", "a"), *judged("bad", "bad", "bad", "a")],
        "majority",
        judges_wanted=3,
    )
    assert found["full"].a_better == 2 / 3 and found["full"].weight == 1
    assert found["one"].weight == 1 / 3
    assert abs(found["bad"].weight - 1 / 3) < 1e-9
    assert abs(found["bad"].a_better - 2 / 3) < 1e-9


def test_a_review_that_was_cut_short_is_made_good_by_the_next(store):
    people = [SimulatedPerson(f"honest-{n}") for n in range(5)]
    people.append(SimulatedPerson("spammer", spam="random"))
    project, _ = stored(store, people)
    [spammer] = [each for each in store.assessors(project) if each.name == "spammer"]
    # Killed after the pause, before the doubts.
    store.set_state(spammer, "paused", "chooses at random", "quality control", doubted=True)
    review(store, project, SETTINGS)
    theirs = [j for j in store.judgements(project) if j.assessor == "spammer"]
    assert {j.doubt for j in theirs} == {PAUSED}


def test_a_review_is_due_after_so_many_judgements_whoever_counts_them(store):
    project = store.make_project("due", [])
    works = [Work((Message("user", f"q{n}"),), Answer("one"), Answer("other")) for n in range(12)]
    store.add_work(project, works, 1)
    desk = Queue(store, LabelSection(attention=AttentionSection(honeypot_share=0, repeat_share=0)))
    who = store.signed_in(store.invite(project, "ann"))
    due = []
    while task := desk.next(who):
        desk.judge(who, task.id, {OVERALL: "tie"})
        due.append(store.review_due(project, 5))
        if due[-1]:
            store.reviewed(project, len(due))
    # The last one wanted makes it due as well.
    assert [n for n, each in enumerate(due, 1) if each] == [5, 10, 12]


def test_reviews_of_a_large_project_are_due_after_a_fiftieth_of_its_judgements(store):
    project = store.make_project("large", [])
    given = [Judgement(f"{n}", "ann", {OVERALL: "a"}) for n in range(300)]
    store.add_judgements(project, given)
    for reviewed, due in ((294, True), (295, False)):
        store.reviewed(project, reviewed)
        assert store.review_due(project, 5, None) is due


def test_a_review_that_is_called_for_during_another_is_not_lost(store, monkeypatch):
    """Nobody calls again after the last judgement, of the same project or of another one."""
    settings = AttentionSection(honeypot_share=0, repeat_share=0)
    desk, reviewer = Queue(store, LabelSection(attention=settings)), Reviewer(store, settings)
    projects = [store.make_project(name, []) for name in ("one", "other")]
    works = [Work((Message("user", f"q{n}"),), Answer("one"), Answer("other")) for n in range(2)]
    people = []
    for project in projects:
        store.add_work(project, works, 1)
        people.append(store.signed_in(store.invite(project, "ann")))

    def judge(who) -> None:
        desk.judge(who, desk.next(who).id, {OVERALL: "tie"})

    reviewed = []
    inside, go_on = threading.Event(), threading.Event()

    def slow(store, of, settings):
        found = review(store, of, settings)
        reviewed.append(of.name)
        inside.set()
        assert go_on.wait(30)
        return found

    monkeypatch.setattr(review_module, "review", slow)
    for who in (*people, people[0]):
        judge(who)
    threads = [threading.Thread(target=reviewer.run, args=(projects[0], "person"))]
    threads[0].start()
    assert inside.wait(30)
    store.add_work(projects[0], [Work((Message("user", "q"),), Answer("1"), Answer("2"))], 1)
    judge(people[0])
    reviewer.run(projects[0], "person")
    judge(people[1])
    threads.append(threading.Thread(target=reviewer.run, args=(projects[1], "person")))
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert sorted(reviewed) == ["one", "one", "other"]
    assert not [each.name for each in projects if store.review_due(each, 20)]


def test_a_review_that_fails_is_no_reason_for_the_next_one_to_fail(store, monkeypatch):
    project, _ = stored(store, [SimulatedPerson("ann")])
    reviewer = Reviewer(store, SETTINGS)
    with monkeypatch.context() as patched:
        patched.setattr(review_module, "review", lambda *_: 1 / 0)
        reviewer.run(project, "person")
    assert store.review_due(project, 20)
    reviewer.run(project, "person")
    assert not store.review_due(project, 20)


@pytest.mark.parametrize(("kind", "due"), [("person", True), (None, False)])
def test_where_nothing_is_wanted_no_judgement_is_the_last(store, kind, due):
    project = store.make_project("due", [])
    work = Work((Message("user", "q"),), Answer("one"), Answer("other"))
    store.add_judgements(project, [Judgement("", "ann", {OVERALL: "a"}, work=work)])
    assert store.review_due(project, 2, kind) is due
    assert store.review_due(project, 1, kind)
