import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.exc import DBAPIError

from labelling.database import Database
from labelling.honeypots import honeypots, make_honeypot, retire_honeypot
from labelling.queue import Queue
from labelling.records import Answer, Honeypot, Judgement, Verdict, Work
from labelling.rows import place
from labelling.store import PAUSED, Assessor, Project, Store
from rlhf.config.label import AttentionSection, LabelSection, database_url
from rlhf.errors import DataError
from rlhf.records import Message

PLAIN = AttentionSection(honeypot_share=0.0, repeat_share=0.0)


def work(number: int, honeypot: Verdict | None = None, priority: float = 0.0) -> Work:
    return Work(
        (Message("user", f"question {number}"),),
        Answer(f"yes {number}", "one", "step-3"),
        Answer(f"no, and for a reason {number}", "two"),
        priority=priority,
        honeypot=honeypot and Honeypot(honeypot, "Because."),
    )


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def queue(store: Store, clock: Clock | None = None, **settings: object) -> Queue:
    settings.setdefault("attention", PLAIN)
    label = LabelSection(criteria=["helpful"], **settings)
    return Queue(store, label, clock=clock or Clock(), draw=random.Random(0))


def project(store: Store, works: list[Work], judges: int = 3) -> Project:
    made = store.make_project("assistant", ["helpful"])
    store.add_work(made, works, judges)
    return made


def people(store: Store, into: Project, count: int, **what: str) -> list[Assessor]:
    found = []
    for number in range(count):
        who = store.signed_in(store.invite(into, f"person {number}", **what))
        assert who is not None
        found.append(who)
    return found


def said(verdict: str) -> dict[str, str]:
    return {"helpful": verdict, "overall": verdict}


def test_each_pair_is_judged_by_as_many_as_wanted_and_by_nobody_twice(store):
    made = project(store, [work(n) for n in range(5)], judges=2)
    desk = queue(store)
    for who in people(store, made, 4):
        while task := desk.next(who):
            desk.judge(who, task.id, said("first"))
    found = store.judgements(made)
    assert Counter(each.pair for each in found) == dict.fromkeys({e.pair for e in found}, 2)
    assert len({(each.pair, each.assessor) for each in found}) == len(found) == 10
    assert store.counts(made) == {"pairs": 5, "wanted": 10, "taken": 10}


def test_a_thousand_requests_at_once_hand_out_no_duplicate(store):
    made = project(store, [work(n) for n in range(40)], judges=2)
    desk, everybody = queue(store), people(store, made, 50)
    tasks: list[tuple[str, str, str]] = []
    failures: list[Exception] = []

    def ask(who: Assessor) -> None:
        try:
            for _ in range(10):
                if task := desk.next(who):
                    tasks.append((who.name, task.id, task.pair))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(who,)) for who in everybody for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(tasks) == 1000
    # One open task each, and no pair with more than its two judges.
    assert len({name for name, _, _ in tasks}) == len({task for _, task, _ in tasks}) == 50
    assert max(Counter(pair for _, pair in {(t, p) for _, t, p in tasks}).values()) == 2


def test_the_order_shown_is_drawn_for_each_task_and_kept_with_the_verdict(store):
    made = project(store, [work(n) for n in range(60)], judges=1)
    desk, [who] = queue(store), people(store, made, 1)
    firsts = {}
    while task := desk.next(who):
        firsts[task.pair] = task.first
        desk.judge(who, task.id, {"helpful": "second", "overall": "first"})
    for each in store.judgements(made, with_work=True):
        shown = each.work.a if each.first == "a" else each.work.b
        assert shown.text == firsts[each.pair]
        assert each.verdicts == {"overall": each.first, "helpful": "ba"["ab".index(each.first)]}
    order = Counter(each.first for each in store.judgements(made))
    assert min(order.values()) > 15


def test_a_task_that_is_sent_again_counts_once_and_the_first_verdict_stays(store):
    made = project(store, [work(0)])
    desk, [who] = queue(store), people(store, made, 1)
    task = desk.next(who)
    assert not desk.judge(who, task.id, said("tie")).repeated
    assert desk.judge(who, task.id, said("first")).repeated
    [found] = store.judgements(made)
    assert found.verdicts["overall"] == "tie"


def test_an_expired_task_returns_to_the_queue_and_its_late_verdict_is_kept(store):
    made = project(store, [work(0)], judges=1)
    clock = Clock()
    desk, [one, other] = queue(store, clock, expires_s=60.0), people(store, made, 2)
    task = desk.next(one)
    assert desk.next(other) is None
    clock.now += 100
    again = desk.next(other)
    assert again.pair == task.pair and again.id != task.id
    desk.judge(other, again.id, said("first"))
    desk.judge(one, task.id, said("first"))
    assert len(store.judgements(made)) == 2
    assert store.counts(made) == {"pairs": 1, "wanted": 1, "taken": 1}
    with store.database.reading() as db:
        assert db.exec_driver_sql("SELECT taken FROM demand WHERE kind = 'person'").scalar() == 2
    assert desk.next(one) is None


def test_a_skipped_task_goes_to_somebody_else(store):
    made = project(store, [work(0)], judges=1)
    desk, [one, other] = queue(store), people(store, made, 2)
    task = desk.next(one)
    desk.skip(one, task.id)
    assert desk.next(one) is None
    assert desk.next(other).pair == task.pair
    with pytest.raises(DataError, match="skipped"):
        desk.judge(one, task.id, said("tie"))


def test_what_training_has_flagged_comes_first(store):
    made = project(store, [work(n, priority=float(n == 7)) for n in range(20)])
    [who] = people(store, made, 1)
    assert "question 7" in queue(store).next(who).prompt[0].content


def test_honeypots_look_like_work_and_a_missed_one_is_explained(store):
    made = project(store, [work(n, "a" if n < 10 else None) for n in range(20)])
    attention = AttentionSection(honeypot_share=0.9, repeat_share=0.0)
    desk, [who] = queue(store, attention=attention), people(store, made, 1)
    missed, right = [], []
    while task := desk.next(who):
        receipt = desk.judge(who, task.id, said("first"))
        (missed if receipt.missed else right).append(receipt.missed)
    assert missed and right
    assert set(missed) == {"An expert found the second answer better. Because."}
    found = [each for each in store.judgements(made) if each.truth]
    assert sum(each.verdicts["overall"] == each.truth for each in found) == 10 - len(missed)


def test_who_has_no_work_left_is_not_tested_either(store):
    made = project(store, [work(n, "a" if n < 20 else None) for n in range(40)], judges=1)
    attention = AttentionSection(honeypot_share=0.2, repeat_share=0.2, repeat_after=1)
    desk, [who] = queue(store, attention=attention), people(store, made, 1)
    while task := desk.next(who):
        desk.judge(who, task.id, said("tie"))
    assert len(store.judgements(made)) > 20
    assert [desk.next(who) for _ in range(20)] == [None] * 20
    store.add_work(made, [work(40)], 1)
    assert desk.next(who) is not None


def test_the_orders_of_a_pair_are_evened_out_and_nobody_can_tell_theirs(store):
    made = project(store, [work(n) for n in range(40)], judges=4)
    desk, everybody = queue(store), people(store, made, 5)
    # What is skipped was judged in no order.
    desk.skip(everybody[0], desk.next(everybody[0]).id)
    for who in everybody:
        while task := desk.next(who):
            desk.judge(who, task.id, said("tie"))
    by_pair: dict[str, list[str]] = {}
    for each in store.judgements(made):
        by_pair.setdefault(each.pair, []).append(each.first)
    for firsts in by_pair.values():
        assert sorted(firsts) == ["a", "a", "b", "b"] and firsts[0] != firsts[1]
    theirs = Counter(each.first for each in store.judgements(made) if each.assessor == "person 1")
    assert min(theirs.values()) > 4


def test_what_somebody_left_open_comes_back_to_them_when_nothing_else_is_left(store):
    made = project(store, [work(n) for n in range(3)], judges=1)
    clock = Clock()
    desk, [who] = queue(store, clock, expires_s=60.0), people(store, made, 1)
    left = desk.next(who)
    clock.now += 100
    for _ in range(2):
        other = desk.next(who)
        assert other.pair != left.pair
        desk.judge(who, other.id, said("tie"))
    again = desk.next(who)
    assert again == left
    clock.now += 50
    assert desk.next(who) == left
    desk.judge(who, left.id, said("first"))
    assert desk.next(who) is None
    assert store.counts(made) == {"pairs": 3, "wanted": 3, "taken": 3}
    assert all(each.seconds < 60 for each in store.judgements(made))


def test_what_somebody_left_open_and_another_judged_does_not_come_back(store):
    made = project(store, [work(0)], judges=1)
    clock = Clock()
    desk, [one, other] = queue(store, clock, expires_s=60.0), people(store, made, 2)
    desk.next(one)
    clock.now += 100
    desk.judge(other, desk.next(other).id, said("tie"))
    assert desk.next(one) is None


def test_a_repeat_shows_the_same_pair_in_the_other_order_once(store):
    made = project(store, [work(n) for n in range(30)], judges=1)
    attention = AttentionSection(honeypot_share=0.0, repeat_share=0.6, repeat_after=5)
    desk, [who] = queue(store, attention=attention), people(store, made, 1)
    while task := desk.next(who):
        desk.judge(who, task.id, said("tie"))
    by_pair: dict[str, list[Judgement]] = {}
    for each in store.judgements(made):
        by_pair.setdefault(each.pair, []).append(each)
    twice = [both for both in by_pair.values() if len(both) == 2]
    assert twice and max(map(len, by_pair.values())) == 2
    assert all(one.first != other.first and other.repeat for one, other in twice)
    order = [each.id for each in store.judgements(made)]
    # Five were judged since.
    assert min(order.index(other.id) - order.index(one.id) for one, other in twice) > 5


def test_what_was_judged_without_its_texts_is_shown_to_nobody(store):
    made = project(store, [work(n) for n in range(6)], judges=2)
    given = [
        Judgement("task/7", "elsewhere", said("a"), truth="a", at=1.0),
        Judgement("task/8", "ann", said("a"), first="a", at=1.0),
    ]
    store.add_judgements(made, given)
    ann = store.signed_in(store.invite_again(made, "ann"))
    attention = AttentionSection(honeypot_share=0.4, repeat_share=0.4, repeat_after=1)
    desk, shown = queue(store, attention=attention), []
    while len(shown) < 12 and (task := desk.next(ann)):
        desk.judge(ann, task.id, said("first"))
        shown.append(task)
    # Six of work, and those again.
    assert len(shown) > 6 and all(task.first and task.second for task in shown)


def test_models_have_a_demand_of_their_own(store):
    made = project(store, [work(0)], judges=1)
    desk = queue(store)
    [person] = people(store, made, 1)
    model = store.signed_in(store.invite(made, "reward", "model"))
    for who in (person, model):
        task = desk.next(who)
        desk.judge(who, task.id, said("tie"))
    assert {each.kind for each in store.judgements(made)} == {"person", "model"}


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [
        ({"overall": "first"}, "no verdict on helpful"),
        ({**said("first"), "honest": "tie"}, "does not ask about 'honest'"),
        (said("both"), "'both' is no verdict"),
    ],
)
def test_a_wrong_verdict_is_refused_and_stores_nothing(store, verdicts, message):
    made = project(store, [work(0)])
    desk, [who] = queue(store), people(store, made, 1)
    task = desk.next(who)
    with pytest.raises(DataError, match=message):
        desk.judge(who, task.id, verdicts)
    assert store.judgements(made) == []
    assert desk.next(who).id == task.id


def test_nobody_judges_for_somebody_else_or_while_paused(store):
    made = project(store, [work(0)])
    desk, [one, other] = queue(store), people(store, made, 2)
    task = desk.next(one)
    with pytest.raises(DataError, match="person 1 has no task"):
        desk.judge(other, task.id, said("tie"))
    store.set_state(one, "paused", "by the owner", "owner")
    [paused, _] = store.assessors(made)
    with pytest.raises(DataError, match="person 0 is paused: by the owner"):
        desk.next(paused)


def test_doubted_judgements_free_their_pair_and_count_again_when_the_doubt_goes(store):
    made = project(store, [work(0)], judges=1)
    desk, [one, other] = queue(store), people(store, made, 2)
    task = desk.next(one)
    desk.judge(one, task.id, said("tie"))
    assert store.doubt(made, {task.id: "tired"}) == 1
    assert store.counts(made)["taken"] == 0
    assert store.judgements(made)[0].doubt == "tired"
    assert desk.next(other) is not None
    assert store.doubt(made, {task.id: ""}) == 1
    assert store.doubt(made, {task.id: ""}) == 0
    with store.database.reading() as db:
        # The other's open task, and the one that counts again.
        assert db.exec_driver_sql("SELECT taken FROM demand WHERE kind = 'person'").scalar() == 2


def test_two_reviews_at_once_doubt_a_judgement_once(store):
    made = project(store, [work(n) for n in range(20)], judges=1)
    desk, [who] = queue(store), people(store, made, 1)
    doubts = {}
    while task := desk.next(who):
        desk.judge(who, task.id, said("tie"))
        doubts[task.id] = "tired"
    changed: list[int] = []
    threads = [
        threading.Thread(target=lambda: changed.append(store.doubt(made, doubts))) for _ in "12"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(changed) == 20
    with store.database.reading() as db:
        assert (
            db.exec_driver_sql("SELECT min(taken) FROM demand WHERE kind = 'person'").scalar() == 0
        )


def test_what_somebody_sends_after_they_were_paused_is_kept_and_does_not_count(store):
    made = project(store, [work(0)], judges=1)
    desk, [who] = queue(store), people(store, made, 1)
    task = desk.next(who)
    store.set_state(who, "paused", "chooses at random", "quality control", doubted=True)
    desk.judge(who, task.id, said("tie"))
    [found] = store.judgements(made)
    assert found.doubt == PAUSED
    assert store.counts(made)["taken"] == 0


def test_a_known_pair_is_nobodys_work_whichever_came_first(store):
    made = project(store, [work(0), work(1)])
    store.add_work(made, [work(0, "a")], 3)
    assert store.counts(made)["pairs"] == 1
    store.add_work(made, [work(0), work(1)], 3)
    assert store.counts(made)["pairs"] == 1


def test_a_flagged_pair_stays_flagged_when_a_file_says_nothing_of_it(store):
    made = project(store, [work(n, priority=float(n == 7)) for n in range(20)])
    store.add_work(made, [work(n) for n in range(20)], 3)
    [one, other] = people(store, made, 2)
    assert "question 7" in queue(store).next(one).prompt[0].content
    store.add_work(made, [work(9, priority=2.0)], 3)
    assert "question 9" in queue(store).next(other).prompt[0].content


def test_a_known_verdict_that_is_set_or_changed_is_on_record(store):
    made = project(store, [work(0, "a")])
    store.add_work(made, [work(0, "a")], 3)
    store.add_work(made, [work(0, "b")], 3, actor="eve")
    trail = [each for each in store.audit(made) if each["action"] == "honeypot"]
    assert [each["actor"] for each in trail] == ["owner", "eve"]
    one, other = (each["details"] for each in trail)
    assert one["pair"] == other["pair"]
    assert one["old"] is None and {one["new"], other["new"]} == {"a", "b"}
    assert other["old"] == one["new"]


def test_a_honeypot_that_people_miss_is_seen_and_retired(store):
    works = [work(0, "a"), work(1, "b"), *(work(n) for n in range(2, 12))]
    made = project(store, works, judges=4)
    attention = AttentionSection(honeypot_share=0.9, repeat_share=0.0)
    desk, everybody = queue(store, attention=attention), people(store, made, 4)
    everybody.append(store.signed_in(store.invite(made, "gpt", "model")))
    for who in everybody:
        while task := desk.next(who):
            # Everybody says what is known of 0, and the contrary of 1: "yes" is better.
            desk.judge(who, task.id, said("first" if task.first.startswith("yes") else "second"))
    store.doubt(made, {j.id: PAUSED for j in store.judgements(made) if j.assessor == "person 0"})
    wrong, right = honeypots(store.database, made)
    assert (wrong["judged"], wrong["missed"]) == (3, 3)
    assert (right["judged"], right["missed"]) == (3, 0)
    assert wrong["messages"][-1]["content"] == "question 1"
    assert wrong["text"] == "no, and for a reason 1" and wrong["explanation"] == "Because."
    other = store.make_project("other", [])
    with pytest.raises(DataError, match="project other has no such honeypot"):
        retire_honeypot(store.database, other, wrong["pair_id"], "owner")
    retire_honeypot(store.database, made, wrong["pair_id"], "olga")
    assert [each["pair_id"] for each in honeypots(store.database, made)] == [right["pair_id"]]
    assert all(j.truth is None or j.verdicts["overall"] == j.truth for j in store.judgements(made))
    last = store.audit(made)[-1]
    assert (last["actor"], last["action"], last["details"]["new"]) == ("olga", "honeypot", None)
    assert last["details"]["old"] in ("a", "b") and last["details"]["explanation"] == "Because."
    with pytest.raises(DataError, match="no such honeypot"):
        retire_honeypot(store.database, made, wrong["pair_id"], "olga")


def test_a_honeypot_that_is_retired_while_somebody_judges_it_is_missed_by_nobody(store):
    made = project(store, [work(0, "tie"), work(1)])
    attention = AttentionSection(honeypot_share=0.99, repeat_share=0.0)
    desk, [who] = queue(store, attention=attention), people(store, made, 1)
    task = desk.next(who)
    retire_honeypot(store.database, made, honeypots(store.database, made)[0]["pair_id"], "owner")
    assert desk.judge(who, task.id, said("first")).missed is None
    assert [each.truth for each in store.judgements(made)] == [None]


def test_imports_of_the_same_pairs_in_opposite_order_do_not_stop_each_other(store):
    works = [work(n) for n in range(150)]
    made = project(store, works)
    failures: list[Exception] = []

    def put(order: int) -> None:
        try:
            for judges in range(2, 8):
                store.add_work(made, works[::order], judges)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=put, args=(order,)) for order in (1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("order", [1, -1])
def test_new_pairs_that_several_import_at_once_are_new_to_one_of_them(labels_url, order):
    works = [work(n, "a" if n % 3 == 0 else None) for n in range(250)]
    given = [
        Judgement("p", f"judge {n % 7}", {"overall": "a"}, work=each)
        for n, each in enumerate(works)
        if n % 3
    ]
    counts, failures = list[tuple[tuple[int, int], ...]](), list[Exception]()
    together = threading.Barrier(4, timeout=60)

    def put(order: int) -> None:
        try:
            together.wait()
            store = Store(Database(database_url(labels_url)))
            together.wait()
            made = store.make_project("assistant", ["helpful"])
            together.wait()
            counts.append(
                (
                    store.add_work(made, works[::order], 3),
                    store.add_judgements(made, given[::order]),
                )
            )
            store.database.close()
        except Exception as error:
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=put, args=(each,)) for each in (1, order, 1, order)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [tuple(map(sum, zip(*each, strict=True))) for each in zip(*counts, strict=True)] == [
        (250, 750),
        (len(given), 3 * len(given)),
    ]
    store = Store(Database(database_url(labels_url)))
    made = store.project("assistant")
    # 84 are honeypots, and 166 have had a judge.
    assert store.counts(made) == {"pairs": 166, "wanted": 498, "taken": 166}
    actions = [(each["action"], each["details"]) for each in store.audit(made)]
    assert sum(action == "honeypot" for action, _ in actions) == 84
    told = [details["new"] for action, details in actions if action.startswith("import")]
    assert len(told) == 8 and sum(told) == 250 + len(given)
    store.database.close()


def test_an_import_that_meets_feedback_on_the_same_answers_finds_them(store):
    made = store.make_project("assistant", ["helpful"])
    texts = work(0)
    with ThreadPoolExecutor() as pool:
        with store.database.writing() as db:
            place(db, made, texts)
            done = pool.submit(store.add_work, made, [work(1), texts], 3)
            time.sleep(0.3)
            assert not done.done()
        assert done.result(timeout=30) == (1, 1)
    assert store.counts(made)["pairs"] == 2


def test_verdicts_from_elsewhere_take_their_place_in_the_queue(store):
    made = project(store, [work(0)], judges=2)
    given = Judgement("p", "eve", {"overall": "a"}, work=work(0))
    assert store.add_judgements(made, [given, given]) == (1, 1)
    assert store.counts(made)["taken"] == 1
    desk, [who] = queue(store), people(store, made, 1)
    desk.judge(who, desk.next(who).id, said("tie"))
    assert desk.next(people(store, store.make_project("other", ["helpful"]), 1)[0]) is None
    assert store.counts(made) == {"pairs": 1, "wanted": 2, "taken": 2}
    [imported] = [each for each in store.judgements(made) if each.assessor == "eve"]
    store.doubt(made, {imported.id: "doubtful"})
    assert store.counts(made)["taken"] == 1


def test_verdicts_from_elsewhere_count_for_work_that_comes_later(store):
    made = store.make_project("assistant", ["helpful"])
    given = [
        Judgement("p", "eve", {"overall": "a"}, work=work(0)),
        Judgement("p", "ann", {"overall": "a"}, work=work(0)),
        Judgement("p", "ann", {"overall": "a"}, work=work(0), repeat=True),
        Judgement("p", "bob", {"overall": "b"}, work=work(0), doubt="doubtful"),
        Judgement("p", "gpt", {"overall": "b"}, work=work(0), kind="model"),
    ]
    store.add_judgements(made, given)
    store.add_work(made, [work(0)], 3)
    store.add_work(made, [work(0)], 3)
    assert store.counts(made) == {"pairs": 1, "wanted": 3, "taken": 2}
    assert store.counts(made, "model")["taken"] == 1
    store.doubt(made, {each.id: "doubtful" for each in store.judgements(made)})
    assert store.counts(made)["taken"] == store.counts(made, "model")["taken"] == 0


@pytest.mark.parametrize("models", [("one", "one"), ("b", ""), ("", "")])
def test_two_answers_of_one_model_are_two_answers_without_their_texts_too(store, models):
    made = store.make_project("assistant", [])
    given = [
        Judgement(name, who, {"overall": "a"}, first="b", models=models)
        for name in ("x", "y")
        for who in ("ann", "bob")
    ]
    assert store.add_judgements(made, given) == (4, 0)
    found = store.judgements(made)
    assert len({each.pair for each in found}) == 2
    assert all(each.verdicts["overall"] != each.first for each in found)
    placed = (each.models[:: 1 if each.first == "b" else -1] for each in found)
    assert set(placed) == {(models[0] or "a", models[1] or "b")}


def test_a_token_can_be_replaced(store):
    made = project(store, [work(0)])
    old = store.invite(made, "ann")
    new = store.invite_again(made, "ann")
    assert store.signed_in(old) is None and store.signed_in(new).name == "ann"
    with pytest.raises(DataError, match="no assessor bob"):
        store.invite_again(made, "bob")


def test_an_expert_makes_a_honeypot_that_others_are_tested_by(store):
    made = project(store, [work(0), work(1)])
    desk = queue(store)
    [plain] = people(store, made, 1)
    expert = store.signed_in(store.invite(made, "expert", role="expert"))
    task = desk.next(expert)
    desk.judge(expert, task.id, said("first"))
    with pytest.raises(DataError, match="no expert"):
        make_honeypot(store.database, plain, task.id, "Mine.")
    with pytest.raises(DataError, match="explanation"):
        make_honeypot(store.database, expert, task.id, " ")
    make_honeypot(store.database, expert, task.id, "It answers what was asked.")
    assert store.counts(made)["pairs"] == 1
    [found] = store.judgements(made)
    # It tests others; the one who wrote it has passed no test.
    assert found.truth is None
    with pytest.raises(DataError, match="already"):
        make_honeypot(store.database, expert, task.id, "Once more.")
    tested = queue(store, attention=AttentionSection(honeypot_share=0.99, repeat_share=0))
    tested.judge(plain, tested.next(plain).id, said("bad"))
    assert [each.truth for each in store.judgements(made)][1] == found.verdicts["overall"]


def test_the_audit_trail_tells_what_happened_and_cannot_be_changed(store):
    made = project(store, [work(0)])
    desk, [who] = queue(store), people(store, made, 1)
    desk.judge(who, desk.next(who).id, said("tie"))
    actions = [entry["action"] for entry in store.audit(made)]
    assert actions == ["project", "import work", "invite", "judgement"]
    statements = ["UPDATE audit SET actor = 'x'", "DELETE FROM audit"]
    if store.database.sqlite:
        statements.append(
            "INSERT OR REPLACE INTO audit (id, at, actor, action, details) "
            "VALUES (1, 0, 'x', 'x', '{}')"
        )
    for statement in statements:
        with pytest.raises(DBAPIError, match="append-only"), store.database.writing() as db:
            db.exec_driver_sql(statement)
    assert len(store.audit(made)) == 4
