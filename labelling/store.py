"""Projects, what is to be judged, who judges, and what they said.

What an assessor does next and its recording: `labelling/queue.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from sqlalchemy import Connection, and_, case, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from labelling.database import Database
from labelling.records import Answer, Honeypot, Judgement, Kind, Verdict, Work
from labelling.tables import (
    answer,
    assessor,
    assignment,
    audit,
    demand,
    honeypot,
    judgement,
    pair,
    project,
    prompt,
)
from rlhf.errors import DataError
from rlhf.records import OVERALL, Message

Role = Literal["assessor", "expert", "owner"]
"""Who judges; who also writes honeypots; who also sees everybody's figures."""

State = Literal["active", "paused", "revoked"]
TIRED = "faster and less sure than before"
"""Why judgements are in doubt that were given after fatigue set in."""

_ANSWER = ("text", "model", "checkpoint", "finished")
_NAME = re.compile(r"[\w.@+ -]{1,80}")


@dataclass(frozen=True, slots=True)
class Project:
    """A question put to assessors: its name and the criteria asked beside the overall verdict."""

    id: int
    name: str
    criteria: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Assessor:
    """Who judges, in one project."""

    id: int
    project: Project
    name: str
    kind: Kind
    role: Role
    state: State
    reason: str
    vouched: float
    """Judgements before this time no longer count against them: an owner let them go on."""


class Store:
    """The labelling store of a database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    # Projects

    def make_project(self, name: str, criteria: Sequence[str]) -> Project:
        """The project of this name, made where there is none.

        Raises:
            DataError: it is there with other criteria, or that is no name.
        """
        if not _NAME.fullmatch(name):
            raise DataError(f"{name!r} is no name for a project: letters, digits and . @ + - _")
        with self.database.writing() as db:
            if found := _project(db, name):
                if set(found.criteria) != set(criteria):
                    raise DataError(
                        f"project {name} asks for {', '.join(found.criteria) or 'nothing more'}, "
                        f"not {', '.join(criteria) or 'nothing more'}; set label.criteria to its "
                        "own, or start another project"
                    )
                return found
            row = {"name": name, "criteria": list(criteria), "created": time.time()}
            key = db.execute(insert(project).values(row)).inserted_primary_key
            assert key is not None
            made = Project(key[0], name, tuple(criteria))
            record(db, made, "owner", "project", {"criteria": list(criteria)})
        return made

    def project(self, name: str) -> Project:
        """The project of this name.

        Raises:
            DataError: there is none.
        """
        with self.database.reading() as db:
            if found := _project(db, name):
                return found
            names = db.execute(select(project.c.name).order_by(project.c.name)).scalars().all()
        known = f"it has {', '.join(names)}" if names else "it has none"
        raise DataError(
            f"there is no project {name} in {self.database.name}: {known}; `pavlov label import` "
            "makes one"
        )

    # Work

    def add_work(
        self, into: Project, works: Iterable[Work], judges_per_pair: int, actor: str = "owner"
    ) -> tuple[int, int]:
        """Put pairs into the queue: how many are new, and how many were there already.

        A known pair's priority and honeypot are brought up to date. Which answer is a follows from
        the texts, so that the file's order says nothing.
        """
        counts = [0, 0]
        with self.database.writing() as db:
            for work in works:
                _, known = _put(db, into, work, judges_per_pair)
                counts[known] += 1
            details = {"new": counts[0], "known": counts[1]}
            record(db, into, actor, "import work", details)
        return counts[0], counts[1]

    def add_judgements(
        self, into: Project, judgements: Iterable[Judgement], actor: str = "owner"
    ) -> tuple[int, int]:
        """Take verdicts given elsewhere: how many are new, and how many were there already.

        Assessors who are not known are made, without a way to sign in.
        """
        counts = [0, 0]
        people: dict[tuple[str, str], int] = {}
        with self.database.writing() as db:
            for given in judgements:
                found = _put_judged(db, into, given)
                who = (given.assessor, given.kind)
                if who not in people:
                    people[who] = _assessor_elsewhere(db, into, given)
                counts[_take(db, into, given, found, people[who])] += 1
            details = {"new": counts[0], "known": counts[1]}
            record(db, into, actor, "import judgements", details)
        return counts[0], counts[1]

    # Assessors

    def invite(
        self, into: Project, name: str, kind: Kind = "person", role: Role = "assessor"
    ) -> str:
        """A new assessor; returns the token that signs them in, which is kept nowhere.

        Raises:
            DataError: the name is taken, or is none.
        """
        if not _NAME.fullmatch(name):
            raise DataError(f"{name!r} is no name for an assessor: letters, digits and . @ + - _")
        token = secrets.token_urlsafe(24)
        try:
            with self.database.writing() as db:
                db.execute(insert(assessor).values(_new(into, name, kind, role, token)))
                record(db, into, "owner", "invite", {"name": name, "kind": kind, "role": role})
        except IntegrityError:
            raise DataError(f"project {into.name} has an assessor {name} already") from None
        return token

    def signed_in(self, token: str) -> Assessor | None:
        """Who has this token; None where nobody has, or no longer."""
        with self.database.reading() as db:
            found = _assessors(db, assessor.c.token_hash == token_hash(token))
        return found[0] if found and found[0].state != "revoked" else None

    def assessors(self, of: Project) -> list[Assessor]:
        """Everybody in a project, in the order they came."""
        with self.database.reading() as db:
            return _assessors(db, assessor.c.project_id == of.id)

    def set_state(self, who: Assessor, state: State, reason: str, actor: str) -> None:
        """Pause, let go on, or revoke. Who may go on has their judgements so far vouched for:
        those doubted for their sake count again."""
        with self.database.writing() as db:
            values: dict[str, Any] = {"state": state, "reason": reason}
            if state == "active":
                values["vouched"] = time.time()
            db.execute(update(assessor).where(assessor.c.id == who.id).values(values))
            record(db, who.project, actor, state, {"assessor": who.name, "reason": reason})

    # Judgements

    def judgements(self, of: Project, *, with_work: bool = False) -> list[Judgement]:
        """All judgements of a project in the order they were given, doubted ones too."""
        with self.database.reading() as db:
            return list(_judgements(db, of, with_work=with_work))

    def doubt(self, of: Project, which: Mapping[str, str], actor: str = "quality control") -> int:
        """Stop counting judgements (their `Judgement.id`), for the reason given; their pairs return
        to the queue. An empty reason counts them again. Returns how many have changed."""
        changed = 0
        with self.database.writing() as db:
            rows = db.execute(
                select(judgement.c.assignment_id, judgement.c.doubt, assessor.c.kind)
                .add_columns(assignment.c.pair_id, assignment.c.task)
                .join_from(judgement, assignment)
                .join(assessor)
                .where(judgement.c.project_id == of.id)
            ).all()
            for row in rows:
                reason = which.get(row.assignment_id)
                if reason is None or reason == row.doubt:
                    continue
                changed += 1
                db.execute(
                    update(judgement)
                    .where(judgement.c.assignment_id == row.assignment_id)
                    .values(doubt=reason)
                )
                if row.task == "work" and bool(reason) != bool(row.doubt):
                    take(db, row.pair_id, row.kind, -1 if reason else 1)
            if changed:
                reasons = sorted(set(which.values()))
                record(db, of, actor, "doubt", {"judgements": changed, "reasons": reasons})
        return changed

    def make_honeypot(self, author: Assessor, task: str, explanation: str) -> None:
        """An expert's overall verdict on a task of theirs becomes the known one: from now on it
        tests those who have not seen the pair.

        Raises:
            DataError: they are no expert, have not judged it, or explain nothing.
        """
        if author.role == "assessor":
            raise DataError(f"{author.name} is no expert: honeypots are written by experts")
        if not explanation.strip():
            raise DataError("a honeypot without an explanation teaches nobody: write one")
        with self.database.writing() as db:
            row = db.execute(
                select(assignment.c.pair_id, judgement.c.verdicts)
                .join_from(assignment, judgement)
                .where(assignment.c.id == task, assignment.c.assessor_id == author.id)
            ).one_or_none()
            if row is None:
                raise DataError(f"{author.name} has judged no task {task[:24]!r}")
            verdict = row.verdicts[OVERALL]
            _set_honeypot(db, row.pair_id, Honeypot(verdict, explanation.strip()), author.id)
            unasked = update(demand).where(demand.c.pair_id == row.pair_id).values(wanted=0)
            db.execute(unasked)
            details = {"task": task, "verdict": verdict}
            record(db, author.project, author.name, "honeypot", details)

    def tired(self, who: Assessor) -> bool:
        """Whether their newest judgement is in doubt for fatigue: a break is due."""
        with self.database.reading() as db:
            newest = db.execute(
                select(judgement.c.doubt)
                .join(assignment)
                .where(assignment.c.assessor_id == who.id)
                .order_by(judgement.c.at.desc())
                .limit(1)
            ).scalar_one_or_none()
        return newest == TIRED

    def audit(self, of: Project) -> list[dict[str, Any]]:
        """The audit trail of a project, oldest first."""
        with self.database.reading() as db:
            rows = db.execute(
                select(audit.c.at, audit.c.actor, audit.c.action, audit.c.details)
                .where(audit.c.project_id == of.id)
                .order_by(audit.c.id)
            )
            return [dict(row._mapping) for row in rows]

    def counts(self, of: Project, kind: Kind = "person") -> dict[str, int]:
        """How far a project is for one kind of assessor: pairs, verdicts wanted and taken."""
        done = case((demand.c.taken < demand.c.wanted, demand.c.taken), else_=demand.c.wanted)
        with self.database.reading() as db:
            row = db.execute(
                select(
                    func.count().label("pairs"),
                    func.coalesce(func.sum(demand.c.wanted), 0).label("wanted"),
                    func.coalesce(func.sum(done), 0).label("taken"),
                ).where(demand.c.project_id == of.id, demand.c.kind == kind, demand.c.wanted > 0)
            ).one()
        return {key: int(value) for key, value in row._mapping.items()}


def token_hash(token: str) -> str:
    """What is kept of a token. Tokens are long and random: no salt or slow hash is wanted."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


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


def flipped(verdict: Verdict) -> Verdict:
    """The verdict with the two answers in the other order."""
    return {"a": "b", "b": "a"}.get(verdict, verdict)  # type: ignore[return-value]


def _project(db: Connection, name: str) -> Project | None:
    row = db.execute(select(project).where(project.c.name == name)).one_or_none()
    return None if row is None else Project(row.id, row.name, tuple(row.criteria))


def _assessors(db: Connection, where: Any) -> list[Assessor]:
    rows = db.execute(
        select(assessor, project.c.name.label("project"), project.c.criteria)
        .join(project)
        .where(where)
        .order_by(assessor.c.id)
    )
    return [
        Assessor(
            row.id,
            Project(row.project_id, row.project, tuple(row.criteria)),
            *(row.name, row.kind, row.role, row.state, row.reason, row.vouched),
        )
        for row in rows
    ]


def _new(into: Project, name: str, kind: str, role: str, token: str) -> dict[str, Any]:
    return {
        "project_id": into.id,
        "name": name,
        "kind": kind,
        "role": role,
        "token_hash": token_hash(token),
        "state": "active",
        "reason": "",
        "vouched": 0.0,
        "created": time.time(),
    }


def _assessor_elsewhere(db: Connection, into: Project, given: Judgement) -> int:
    row = db.execute(
        select(assessor.c.id, assessor.c.kind).where(
            assessor.c.project_id == into.id, assessor.c.name == given.assessor
        )
    ).one_or_none()
    if row is None:
        values = _new(into, given.assessor, given.kind, "assessor", secrets.token_urlsafe(24))
        key = db.execute(insert(assessor).values(values)).inserted_primary_key
        assert key is not None
        return int(key[0])
    if row.kind != given.kind:
        raise DataError(
            f"project {into.name} knows {given.assessor} as {row.kind}, the file as {given.kind}; "
            "give one of them another name"
        )
    return int(row.id)


@dataclass(frozen=True, slots=True)
class _Put:
    """Where a pair stands in the store, and whether its answers changed places for it."""

    id: int
    key: str
    swapped: bool


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def _put(db: Connection, into: Project, work: Work, judges: int) -> tuple[_Put, bool]:
    """The pair's place, and whether it was known."""
    messages = [{"role": each.role, "content": each.content} for each in work.prompt]
    put, known = _place(db, into, messages, (work.a, work.b), work.source)
    if work.honeypot is not None:
        verdict = work.honeypot.verdict
        test = replace(work.honeypot, verdict=flipped(verdict) if put.swapped else verdict)
        _set_honeypot(db, put.id, test)
        judges = 0
    for kind in get_args(Kind) if judges else ():
        where = and_(demand.c.pair_id == put.id, demand.c.kind == kind)
        queued = {"wanted": judges, "priority": work.priority}
        if not db.execute(update(demand).where(where).values(queued)).rowcount:
            row = {"pair_id": put.id, "kind": kind, "project_id": into.id, "taken": 0}
            db.execute(insert(demand).values(**row, shuffle=int(put.key[:12], 16), **queued))
    return put, known


def _put_judged(db: Connection, into: Project, given: Judgement) -> _Put:
    """The place of a pair that was judged elsewhere, its texts known or not."""
    if given.work is not None:
        put, _ = _put(db, into, given.work, 0)
    else:
        answers = Answer("", given.models[0] or "a"), Answer("", given.models[1] or "b")
        put, _ = _place(db, into, [{"role": "user", "content": given.pair}], answers, "")
    if given.truth is not None and (given.work is None or given.work.honeypot is None):
        verdict = flipped(given.truth) if put.swapped else given.truth
        _set_honeypot(db, put.id, Honeypot(verdict))
    return put


def _place(
    db: Connection,
    into: Project,
    messages: list[dict[str, str]],
    answers: tuple[Answer, Answer],
    source: str,
) -> tuple[_Put, bool]:
    """Where two answers to a prompt stand, and whether they did already."""
    prompt_id = _one(
        db, prompt, {"project_id": into.id, "digest": _digest(messages)}, {"messages": messages}
    )
    digests = [_digest(each.text, each.model, each.checkpoint) for each in answers]
    if digests[0] == digests[1]:
        raise DataError("two answers that are one and the same")
    swapped = digests[0] > digests[1]
    ids = [
        _one(
            db,
            answer,
            {"prompt_id": prompt_id, "digest": digest},
            {
                "text": each.text,
                "words": len(each.text.split()),
                "model": each.model,
                "checkpoint": each.checkpoint,
                "finished": each.finished,
            },
        )
        for digest, each in zip(digests, answers, strict=True)
    ]
    key = _digest(messages, *sorted(digests))[:24]
    where = and_(pair.c.project_id == into.id, pair.c.key == key)
    known = db.execute(select(pair.c.id).where(where)).scalar_one_or_none()
    a_id, b_id = reversed(ids) if swapped else ids
    pair_id = known or _one(
        db,
        pair,
        {"project_id": into.id, "key": key},
        {"prompt_id": prompt_id, "a_id": a_id, "b_id": b_id, "source": source},
    )
    return _Put(pair_id, key, swapped), known is not None


def _set_honeypot(
    db: Connection, pair_id: int, known: Honeypot, author_id: int | None = None
) -> None:
    values = {"verdict": known.verdict, "explanation": known.explanation, "author_id": author_id}
    old = update(honeypot).where(honeypot.c.pair_id == pair_id).values(values)
    if not db.execute(old).rowcount:
        db.execute(insert(honeypot).values(pair_id=pair_id, **values))


def _one(db: Connection, table: Any, key: Mapping[str, Any], rest: Mapping[str, Any]) -> int:
    """The id of the row with this key, made where there is none."""
    where = and_(*(table.c[name] == value for name, value in key.items()))
    found = db.execute(select(table.c.id).where(where)).scalar_one_or_none()
    if found is None:
        made = db.execute(insert(table).values(**key, **rest)).inserted_primary_key
        assert made is not None
        found = made[0]
    return int(found)


def _take(db: Connection, into: Project, given: Judgement, found: _Put, assessor_id: int) -> bool:
    """Record a verdict given elsewhere; whether it was there already."""
    task = "repeat" if given.repeat else "honeypot" if given.truth is not None else "work"
    seen = and_(
        assignment.c.assessor_id == assessor_id,
        assignment.c.pair_id == found.id,
        assignment.c.task == "repeat" if given.repeat else assignment.c.task != "repeat",
    )
    if db.execute(select(assignment.c.id).where(seen)).first():
        return True
    first: str = flipped(given.first) if found.swapped and given.first else given.first
    taken = db.execute(select(assignment.c.id).where(assignment.c.id == given.id)).first()
    key = secrets.token_urlsafe(12) if taken or not given.id else given.id
    common = {"project_id": into.id}
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


def _judgements(db: Connection, of: Project, *, with_work: bool) -> Iterator[Judgement]:
    a, b = answer.alias(), answer.alias()
    columns = [
        *(judgement.c.assignment_id, judgement.c.verdicts, pair.c.key, pair.c.source),
        *(assessor.c.name, assessor.c.kind),
        *(assignment.c.first, assignment.c.task, judgement.c.seconds, judgement.c.at),
        *(judgement.c.comment, judgement.c.doubt, honeypot.c.verdict, honeypot.c.explanation),
        *(a.c.words.label("words_a"), b.c.words.label("words_b")),
        *(a.c.model.label("model_a"), b.c.model.label("model_b")),
    ]
    if with_work:
        columns += [prompt.c.messages]
        for label, each in (("a", a), ("b", b)):
            further = (name for name in _ANSWER if name != "model")
            columns += [each.c[name].label(f"{name}_{label}") for name in further]
    rows = db.execute(
        select(*columns)
        .select_from(judgement)
        .join(assignment, assignment.c.id == judgement.c.assignment_id)
        .join(assessor, assessor.c.id == assignment.c.assessor_id)
        .join(pair, pair.c.id == assignment.c.pair_id)
        .join(prompt, prompt.c.id == pair.c.prompt_id)
        .join(a, a.c.id == pair.c.a_id)
        .join(b, b.c.id == pair.c.b_id)
        .outerjoin(honeypot, honeypot.c.pair_id == pair.c.id)
        .where(judgement.c.project_id == of.id)
        .order_by(judgement.c.at, judgement.c.id)
    )
    for row in rows:
        yield Judgement(
            pair=row.key,
            assessor=row.name,
            verdicts=row.verdicts,
            first=row.first,
            seconds=math.nan if row.seconds is None else row.seconds,
            at=row.at,
            kind=row.kind,
            truth=row.verdict,
            repeat=row.task == "repeat",
            words=(row.words_a, row.words_b),
            models=(row.model_a, row.model_b),
            comment=row.comment,
            doubt=row.doubt,
            work=_work(row) if with_work and row.text_a else None,
            id=row.assignment_id,
        )


def _work(row: Any) -> Work:
    one, other = (
        Answer(*(getattr(row, f"{name}_{label}") for name in _ANSWER)) for label in ("a", "b")
    )
    return Work(
        tuple(Message(each["role"], each["content"]) for each in row.messages),
        one,
        other,
        source=row.source,
        honeypot=None if row.verdict is None else Honeypot(row.verdict, row.explanation),
    )
