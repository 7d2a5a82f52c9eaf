"""What users of the chat server say, in the store."""

import random
import threading
from typing import Any

import pytest
from sqlalchemy import create_engine, select

from labelling.database import Database
from labelling.feedback import CONSENT, Feedback, Showing, put_feedback, reactions
from labelling.labels import METHODS, soft_labels
from labelling.records import Answer, Work
from labelling.report import report
from labelling.review import review
from labelling.store import PAUSED, Store, token_hash
from labelling.tables import assessor, showing
from rlhf.config import LabelConfig
from rlhf.errors import DataError
from rlhf.records import OVERALL, Message

PROMPT = (Message("user", "What is a cat?"),)
CAT, ANIMAL = "A cat.", "An animal that purrs."


def shown(text: str, version: str = "weights-1") -> Showing:
    sampling, verdict = {"temperature": 0.7, "seed": None}, {"reward": 1.5, "domain_shift": False}
    return Showing(Answer(text, "pavlov", version), f"chatcmpl-{text}", sampling, verdict, 5.0)


def said(verdict: Any, *texts: str, by: str = "visitor 1", **more: Any) -> Feedback:
    showings = more.pop("showings", tuple(map(shown, texts)))
    return Feedback(by, more.pop("prompt", PROMPT), showings, verdict, more.pop("comment", ""), 9.0)


@pytest.fixture
def project(store):
    return store.make_project("feedback", [])


def rows(store: Store) -> list[Any]:
    with store.database.reading() as db:
        return list(db.execute(select(showing).order_by(showing.c.completion)))


def test_a_thumb_is_kept_with_its_origin_and_consent_and_a_later_one_takes_its_place(
    store, project
):
    kept = put_feedback(store, project, said("up", CAT, comment="Nice."))
    [row] = rows(store)
    assert (row.id, row.thumb, row.comment, row.at) == (kept.id, "up", "Nice.", 9.0)
    assert row.completion == f"chatcmpl-{CAT}" and row.answered == 5.0
    assert row.sampling == {"temperature": 0.7, "seed": None}
    assert row.verdict == {"reward": 1.5, "domain_shift": False}
    assert row.consent["wording"] == CONSENT and row.consent["version"]
    assert put_feedback(store, project, said("down", CAT)).id == kept.id
    put_feedback(store, project, said("up", CAT, by="visitor 2"))
    assert sorted(row.thumb for row in rows(store)) == ["down", "up"]
    assert reactions(store, project) == {"weights-1": {"up": 1, "down": 1}}
    trail = [each for each in store.audit(project) if each["action"] == "feedback"]
    assert [each["actor"] for each in trail] == ["visitor 1", "visitor 1", "visitor 2"]
    assert trail[0]["details"] == {"id": kept.id, "verdict": "up", "consent": "1"}


@pytest.mark.parametrize("order", [(CAT, ANIMAL), (ANIMAL, CAT)])
@pytest.mark.parametrize(
    ("verdict", "better"), [("first", 0), ("second", 1), ("tie", None), ("bad", None)]
)
def test_two_answers_become_a_judgement_that_knows_what_stood_first(
    store, project, order, verdict, better
):
    kept = put_feedback(store, project, said(verdict, *order, comment="So."))
    [found] = store.judgements(project, with_work=True)
    texts = {"a": found.work.a.text, "b": found.work.b.text}
    assert texts[found.first] == order[0]
    given = found.verdicts[OVERALL]
    assert (texts.get(given) == order[better]) if better is not None else given == verdict
    assert (found.id, found.comment, found.at) == (kept.id, "So.", 9.0)
    assert [row.thumb for row in rows(store)] == [None, None]
    assert all(row.consent["wording"] == CONSENT for row in rows(store))
    assert reactions(store, project) == {}


def test_a_comparison_sent_again_is_the_first_one(store, project):
    kept = put_feedback(store, project, said("first", CAT, ANIMAL))
    assert put_feedback(store, project, said("first", CAT, ANIMAL)) == kept
    # The same verdict, with the two in the other places.
    assert put_feedback(store, project, said("second", ANIMAL, CAT)) == kept
    again = put_feedback(store, project, said("second", CAT, ANIMAL))
    assert again.id == kept.id and again.before
    [found] = store.judgements(project)
    assert found.verdicts[OVERALL] == found.first
    assert len([each for each in store.audit(project) if each["action"] == "feedback"]) == 1


def test_a_thumb_and_a_comparison_of_one_answer_stand_beside_each_other(store, project):
    put_feedback(store, project, said("up", CAT, comment="Nice."))
    put_feedback(store, project, said("second", CAT, ANIMAL))
    assert {(row.thumb, row.comment) for row in rows(store)} == {("up", "Nice."), (None, "")}
    put_feedback(store, project, said("down", ANIMAL))
    assert reactions(store, project) == {"weights-1": {"up": 1, "down": 1}}


def test_nobody_can_sign_in_by_giving_feedback(store, project):
    put_feedback(store, project, said("up", CAT))
    [who] = store.assessors(project)
    assert (who.name, who.kind, who.role) == ("visitor 1", "person", "assessor")
    with store.database.reading() as db:
        kept = db.execute(select(assessor.c.token_hash)).scalar_one()
    assert kept not in {token_hash(text) for text in ("", who.name, str(who.id))}


def test_what_the_paused_say_is_kept_and_does_not_count_and_the_revoked_are_refused(store, project):
    put_feedback(store, project, said("up", CAT))
    [who] = store.assessors(project)
    store.set_state(who, "paused", "does not read", "quality control", doubted=True)
    put_feedback(store, project, said("first", CAT, ANIMAL))
    put_feedback(store, project, said("down", ANIMAL))
    assert [each.doubt for each in store.judgements(project)] == [PAUSED]
    assert len(rows(store)) == 2 and reactions(store, project) == {}
    # Out for another reason too, they are in doubt as before.
    store.set_state(who, "paused", "by the owner", "owner")
    put_feedback(store, project, said("up", CAT))
    store.set_state(who, "revoked", "", "owner")
    assert reactions(store, project) == {}
    with pytest.raises(DataError, match="nothing more from visitor 1"):
        put_feedback(store, project, said("up", CAT))
    store.set_state(who, "active", "", "owner")
    assert reactions(store, project) == {"weights-1": {"up": 1, "down": 1}}


def test_a_pair_that_others_are_asked_about_has_a_judge_more(store, project):
    answers = [shown(text).answer for text in (CAT, ANIMAL)]
    store.add_work(project, [Work(PROMPT, *answers)], 3)
    put_feedback(store, project, said("first", ANIMAL, CAT))
    assert store.counts(project) == {"pairs": 1, "wanted": 3, "taken": 1}
    assert len(store.judgements(project)) == 1


def test_two_equal_answers_are_no_comparison():
    with pytest.raises(ValueError, match="equal replies"):
        said("tie", CAT, CAT)


def test_many_at_once_are_kept_once(store, project):
    """Everybody's rows are the same: who comes second finds them."""
    kept, failed = [], []

    def give() -> None:
        try:
            kept.append(put_feedback(store, project, said("first", CAT, ANIMAL)))
            put_feedback(store, project, said("up", CAT))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=give) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len({each.id for each in kept}) == 1
    assert len(store.judgements(project)) == 1 and len(rows(store)) == 2


def test_quality_control_takes_feedback_and_pauses_who_always_says_first(store, project):
    """There are no seconds, and nobody else judges these pairs."""
    draw = random.Random(0)
    for number in range(60):
        prompt = (Message("user", f"question {number}"),)
        for who in range(3):
            verdict = "first" if who == 0 else draw.choice(["first", "second", "tie"])
            texts = draw.sample([CAT, ANIMAL], 2)
            by = f"visitor {who}"
            put_feedback(store, project, said(verdict, *texts, by=by, prompt=prompt))
    review(store, project, LabelConfig().label.attention)
    states = {each.name: each.state for each in store.assessors(project)}
    assert states["visitor 0"] == "paused"
    found = store.judgements(project, with_work=True)
    assert {each.doubt for each in found if each.assessor == "visitor 0"} == {PAUSED}
    assert report(store, project, LabelConfig())["judgements"] == 180


@pytest.mark.parametrize("method", METHODS)
def test_labels_are_made_of_feedback(store, project, method):
    put_feedback(store, project, said("first", CAT, ANIMAL))
    [found] = store.judgements(project, with_work=True)
    [label] = soft_labels([found], method, judges_wanted=1).values()
    chosen = found.work.a if label.a_better > 0.5 else found.work.b
    assert chosen.text == CAT and label.judges == 1


def test_a_store_of_the_first_schema_keeps_what_it_has(tmp_path, store):
    from alembic import command
    from alembic.config import Config

    from labelling.database import _MIGRATIONS

    before = store.make_project("before", ["helpful"])
    answers = [shown(text).answer for text in (CAT, ANIMAL)]
    store.add_work(before, [Work(PROMPT, *answers)], 3)
    with store.database.writing() as db:
        # What the first schema lacks.
        db.exec_driver_sql("DROP TABLE showing")
        db.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    url = store.database.url.render_as_string(hide_password=False)
    again = Store(Database(url))
    assert again.counts(again.project("before"))["pairs"] == 1
    put_feedback(again, again.project("before"), said("up", CAT))
    assert reactions(again, before) == {"weights-1": {"up": 1, "down": 0}}
    again.database.close()

    # A file that Alembic itself has made at the first schema is brought up likewise.
    file = f"sqlite:///{tmp_path}/first.db"
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    engine = create_engine(file)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.exec_driver_sql(
            "INSERT INTO project (name, criteria, created) VALUES ('old', '[]', 1.0)"
        )
    engine.dispose()
    newest = Store(Database(file))
    put_feedback(newest, newest.project("old"), said("up", CAT))
    assert len(rows(newest)) == 1
    newest.database.close()
