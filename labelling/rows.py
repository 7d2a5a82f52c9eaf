"""What the store's parts do to rows alike: counting judges, placing pairs, the audit trail."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from sqlalchemy import Connection, and_, case, func, insert, select, update

from labelling.records import Answer, Honeypot, Judgement, Kind, Work, flipped
from labelling.tables import (
    answer,
    assessor,
    assignment,
    audit,
    demand,
    honeypot,
    judgement,
    pair,
    prompt,
)
from rlhf.errors import DataError
from rlhf.records import Message

if TYPE_CHECKING:
    from labelling.store import Project

_ID_CHARACTERS = 24


def record(
    db: Connection, of: Project, actor: str, action: str, details: Mapping[str, Any]
) -> None:
    """Add to the audit trail."""
    values = {"at": time.time(), "project_id": of.id, "actor": actor, "action": action}
    db.execute(insert(audit).values(**values, details=dict(details)))


def take(db: Connection, pair_id: int, kind: str, change: int) -> None:
    """Count a judge more, or one fewer, of a pair."""
    db.execute(
        update(demand)
        .where(demand.c.pair_id == pair_id, demand.c.kind == kind)
        .values(taken=demand.c.taken + change)
    )


def hold(db: Connection, pair_ids: Collection[int]) -> None:
    """Lock the demands of pairs. Who changes those of several pairs takes them in the order of
    their ids: so nobody waits in a circle."""
    theirs = select(demand.c.pair_id).where(demand.c.pair_id.in_(pair_ids))
    db.execute(theirs.order_by(demand.c.pair_id, demand.c.kind).with_for_update()).all()


@dataclass(frozen=True, slots=True)
class Put:
    """Where a pair stands in the store, whether its answers changed places for it, and whether it
    was there before."""

    id: int
    key: str
    swapped: bool
    known: bool


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def place(db: Connection, into: Project, item: Work | Judgement) -> Put:
    """The place of a pair, of one that was judged elsewhere too, its texts known or not."""
    work = item if isinstance(item, Work) else item.work
    if work is not None:
        return _place(db, into, _rows_of(work.prompt), (work.a, work.b), work.source)
    assert isinstance(item, Judgement)
    one, other = item.models[0] or "a", item.models[1] or "b"
    # Two answers of one model are two answers.
    answers = Answer("", one), Answer("", other, "b" if one == other else "")
    return _place(db, into, [{"role": "user", "content": item.pair}], answers, "")


def put_work(db: Connection, into: Project, work: Work, put: Put, judges: int, actor: str) -> None:
    """Ask for judges of a pair, or make it a honeypot."""
    if work.honeypot is not None:
        verdict = work.honeypot.verdict
        test = replace(work.honeypot, verdict=flipped(verdict) if put.swapped else verdict)
        set_honeypot(db, into, put.id, test, actor)
    asked = judges > 0 and not is_honeypot(db, put.id)
    for kind in get_args(Kind) if asked else ():
        where = and_(demand.c.pair_id == put.id, demand.c.kind == kind)
        # What training has flagged stays so when a file says nothing of it.
        higher = case((demand.c.priority > work.priority, demand.c.priority), else_=work.priority)
        queued = update(demand).where(where).values(wanted=judges, priority=higher)
        if not db.execute(queued).rowcount:
            row = {
                "pair_id": put.id,
                "kind": kind,
                "project_id": into.id,
                "wanted": judges,
                "taken": _judges(db, put.id, kind) if put.known else 0,
                "priority": work.priority,
                "shuffle": int(put.key[:12], 16),
            }
            db.execute(insert(demand).values(row))


def _judges(db: Connection, pair_id: int, kind: str) -> int:
    """How many judges of a kind a pair had, all of them elsewhere, before it was anybody's work."""
    return int(
        db.execute(
            select(func.count())
            .select_from(assignment)
            .join(assessor, assessor.c.id == assignment.c.assessor_id)
            .join(judgement, judgement.c.assignment_id == assignment.c.id)
            .where(assignment.c.pair_id == pair_id, assignment.c.task == "work")
            .where(assessor.c.kind == kind, judgement.c.doubt == "")
        ).scalar_one()
    )


def put_judged(
    db: Connection, into: Project, given: Judgement, put: Put, assessor_id: int, actor: str
) -> bool:
    """Record a verdict given elsewhere; whether it was there already."""
    if given.work is not None:
        put_work(db, into, given.work, put, 0, actor)
    if given.truth is not None and not is_honeypot(db, put.id):
        verdict = flipped(given.truth) if put.swapped else given.truth
        set_honeypot(db, into, put.id, Honeypot(verdict), actor)
    return _take_judgement(db, into, given, put, assessor_id)


def _place(
    db: Connection,
    into: Project,
    messages: list[dict[str, str]],
    answers: tuple[Answer, Answer],
    source: str,
) -> Put:
    """Where two answers to a prompt stand, and whether they did already."""
    prompt_id = _prompt(db, into, messages)
    digests = [_answer_digest(each) for each in answers]
    if digests[0] == digests[1]:
        raise DataError("two answers that are one and the same")
    swapped = digests[0] > digests[1]
    # In one order, so that two who put them there at once do not wait for each other.
    a_id, b_id = [_answer(db, prompt_id, each) for each in sorted(answers, key=_answer_digest)]
    key = _digest(messages, *sorted(digests))[:24]
    where = and_(pair.c.project_id == into.id, pair.c.key == key)
    known = db.execute(select(pair.c.id).where(where)).scalar_one_or_none()
    pair_id = known or _one(
        db,
        pair,
        {"project_id": into.id, "key": key},
        {"prompt_id": prompt_id, "a_id": a_id, "b_id": b_id, "source": source},
    )
    return Put(pair_id, key, swapped, known is not None)


def put_answer(db: Connection, into: Project, to: Sequence[Message], given: Answer) -> int:
    """The id of an answer to a prompt, both put there where they are not known."""
    return _answer(db, _prompt(db, into, _rows_of(to)), given)


def _rows_of(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": each.role, "content": each.content} for each in messages]


def _prompt(db: Connection, into: Project, messages: list[dict[str, str]]) -> int:
    key = {"project_id": into.id, "digest": _digest(messages)}
    return _one(db, prompt, key, {"messages": messages})


def _answer_digest(given: Answer) -> str:
    return _digest(given.text, given.model, given.checkpoint)


def _answer(db: Connection, prompt_id: int, given: Answer) -> int:
    values = {
        "text": given.text,
        "words": len(given.text.split()),
        "model": given.model,
        "checkpoint": given.checkpoint,
        "finished": given.finished,
    }
    key = {"prompt_id": prompt_id, "digest": _answer_digest(given)}
    return _one(db, answer, key, values)


def is_honeypot(db: Connection, pair_id: int) -> bool:
    """Whether the verdict on a pair is known."""
    known = select(honeypot.c.pair_id).where(honeypot.c.pair_id == pair_id)
    return db.execute(known).first() is not None


def set_honeypot(
    db: Connection,
    into: Project,
    pair_id: int,
    known: Honeypot,
    actor: str,
    author_id: int | None = None,
) -> None:
    """Make a pair a honeypot, or correct its verdict; nobody is asked for it as work any more. An
    explanation that is there stays where there is no new one."""
    where = honeypot.c.pair_id == pair_id
    old = db.execute(select(honeypot.c.verdict).where(where)).scalar_one_or_none()
    values: dict[str, Any] = {"explanation": known.explanation} if known.explanation else {}
    if old != known.verdict:
        values |= {"verdict": known.verdict, "author_id": author_id}
        key = db.execute(select(pair.c.key).where(pair.c.id == pair_id)).scalar_one()
        record(db, into, actor, "honeypot", {"pair": key, "old": old, "new": known.verdict})
    if old is None:
        db.execute(insert(honeypot).values({"pair_id": pair_id, "explanation": "", **values}))
    elif values:
        db.execute(update(honeypot).where(where).values(values))
    db.execute(update(demand).where(demand.c.pair_id == pair_id).values(wanted=0))


def _one(db: Connection, table: Any, key: Mapping[str, Any], rest: Mapping[str, Any]) -> int:
    """The id of the row with this key, made where there is none."""
    where = and_(*(table.c[name] == value for name, value in key.items()))
    found = db.execute(select(table.c.id).where(where)).scalar_one_or_none()
    if found is None:
        made = db.execute(insert(table).values(**key, **rest)).inserted_primary_key
        assert made is not None
        found = made[0]
    return int(found)


def _take_judgement(
    db: Connection, into: Project, given: Judgement, found: Put, assessor_id: int
) -> bool:
    task = "repeat" if given.repeat else "honeypot" if given.truth is not None else "work"
    seen = and_(
        assignment.c.assessor_id == assessor_id,
        assignment.c.pair_id == found.id,
        assignment.c.task == "repeat" if given.repeat else assignment.c.task != "repeat",
    )
    old = db.execute(
        select(assignment.c.id, assignment.c.state, judgement.c.id.label("judged"))
        .outerjoin(judgement)
        .where(seen)
    ).one_or_none()
    if old is not None and old.judged is not None:
        return True
    first: str = flipped(given.first) if found.swapped and given.first else given.first
    common = {"project_id": into.id}
    if old is not None:
        # Seen here and left, but judged elsewhere.
        key, here = old.id, {"first": first, "state": "done"}
        db.execute(update(assignment).where(assignment.c.id == key).values(here))
    else:
        used = db.execute(select(assignment.c.id).where(assignment.c.id == given.id)).first()
        fits = given.id and len(given.id) <= _ID_CHARACTERS and not used
        key = given.id if fits else secrets.token_urlsafe(12)
        db.execute(
            insert(assignment).values(
                id=key,
                pair_id=found.id,
                assessor_id=assessor_id,
                task=task,
                first=first,
                seed=0,
                state="done",
                created=given.at,
                expires=given.at,
                **common,
            )
        )
    open_before = old is not None and old.state == "open"
    if task == "work" and not given.doubt and not open_before:
        take(db, found.id, given.kind, 1)
    db.execute(
        insert(judgement).values(
            assignment_id=key,
            verdicts={
                name: flipped(verdict) if found.swapped else verdict
                for name, verdict in given.verdicts.items()
            },
            seconds=None if math.isnan(given.seconds) else given.seconds,
            comment=given.comment,
            at=given.at,
            doubt=given.doubt,
            **common,
        )
    )
    return False
