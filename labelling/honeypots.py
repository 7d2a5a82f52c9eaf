"""Pairs whose verdict is known: an expert makes one, an owner sees the most missed and retires one.

Those of a file are put there with its pairs (`labelling.rows.put_work`).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import case, delete, func, select

from labelling.database import Database
from labelling.records import Honeypot
from labelling.rows import hold, is_honeypot, record, set_honeypot
from labelling.store import Assessor, Project
from labelling.tables import answer, assessor, assignment, honeypot, judgement, pair, prompt
from rlhf.errors import DataError
from rlhf.records import OVERALL


def make_honeypot(database: Database, author: Assessor, task: str, explanation: str) -> None:
    """An expert's overall verdict on a task of theirs becomes the known one: from now on it
    tests those who have not seen the pair.

    Raises:
        DataError: they are no expert, have not judged it, explain nothing, or it is one.
    """
    if author.role == "assessor":
        raise DataError(f"{author.name} is no expert: honeypots are written by experts")
    if not explanation.strip():
        raise DataError("a honeypot without an explanation teaches nobody: write one")
    with database.writing() as db:
        row = db.execute(
            select(assignment.c.pair_id, judgement.c.verdicts)
            .join_from(assignment, judgement)
            .where(assignment.c.id == task, assignment.c.assessor_id == author.id)
        ).one_or_none()
        if row is None:
            raise DataError(f"{author.name} has judged no task {task[:24]!r}")
        if is_honeypot(db, row.pair_id):
            raise DataError("this is a honeypot already")
        hold(db, [row.pair_id])
        known = Honeypot(row.verdicts[OVERALL], explanation.strip())
        set_honeypot(db, author.project, row.pair_id, known, author.name, author.id)


def honeypots(database: Database, of: Project, at_most: int = 100) -> list[dict[str, Any]]:
    """The honeypots that people missed most, with how many judged them and how many of those
    missed them; what is in doubt does not count."""
    verdict = judgement.c.verdicts[OVERALL].as_string()
    told = (
        select(
            assignment.c.pair_id,
            func.count().label("judged"),
            func.sum(case((verdict != honeypot.c.verdict, 1), else_=0)).label("missed"),
        )
        .join_from(assignment, judgement)
        .join(assessor, assessor.c.id == assignment.c.assessor_id)
        .join(honeypot, honeypot.c.pair_id == assignment.c.pair_id)
        .where(assignment.c.project_id == of.id, assignment.c.task == "honeypot")
        .where(assessor.c.kind == "person", judgement.c.doubt == "")
        .group_by(assignment.c.pair_id)
        .subquery()
    )
    better = case((honeypot.c.verdict == "a", pair.c.a_id), else_=pair.c.b_id)
    judged, missed = (func.coalesce(told.c[name], 0) for name in ("judged", "missed"))
    query = (
        select(honeypot.c.pair_id, honeypot.c.verdict, honeypot.c.explanation)
        .add_columns(prompt.c.messages, answer.c.text)
        .add_columns(judged.label("judged"), missed.label("missed"))
        .join_from(honeypot, pair)
        .join(prompt, prompt.c.id == pair.c.prompt_id)
        .join(answer, answer.c.id == better)
        .outerjoin(told, told.c.pair_id == pair.c.id)
        .where(pair.c.project_id == of.id)
        .order_by(missed.desc(), judged.desc(), pair.c.id)
        .limit(at_most)
    )
    with database.reading() as db:
        return [dict(row._mapping) for row in db.execute(query)]


def retire_honeypot(database: Database, of: Project, pair_id: int, actor: str) -> None:
    """A honeypot tests nobody any more, and was no test to those who have judged it: what they
    said is a verdict like any other.

    Raises:
        DataError: there is no such honeypot.
    """
    with database.writing() as db:
        known = db.execute(
            select(pair.c.key, honeypot.c.verdict, honeypot.c.explanation)
            .join_from(honeypot, pair)
            .where(pair.c.project_id == of.id, pair.c.id == pair_id)
        ).one_or_none()
        if known is None:
            raise DataError(f"project {of.name} has no such honeypot")
        db.execute(delete(honeypot).where(honeypot.c.pair_id == pair_id))
        details = {"pair": known.key, "old": known.verdict, "new": None}
        record(db, of, actor, "honeypot", {**details, "explanation": known.explanation})
