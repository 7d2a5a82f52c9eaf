"""Projects, what is to be judged, who judges, and what they said.

What an assessor does next and its recording: `labelling/queue.py`.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection, and_, case, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from labelling.database import Database
from labelling.records import Answer, Honeypot, Judgement, Kind, Work
from labelling.rows import (
    Put,
    hold,
    place,
    put_judged,
    put_work,
    record,
    take,
)
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

Item = TypeVar("Item", Work, Judgement)
Role = Literal["assessor", "expert", "owner"]
"""Who judges; who also writes honeypots; who also sees everybody's figures."""

State = Literal["active", "paused", "revoked"]
BREAK_S = 1800.0
"""A pause of so many seconds ends a shift."""

_PART = 200
_REVIEWS = 50
PAUSED = "their assessor is paused"
TIRED = "faster and less sure than before"
"""Why judgements are in doubt: all of somebody who does not read, and what was said when tired."""

_ANSWER = ("text", "model", "checkpoint", "finished")
_NAME = re.compile(r"[\w.@+ -]{1,80}")


@dataclass(frozen=True, slots=True)
class Project:
    """A question put to assessors: its name and the criteria asked beside the overall verdict."""

    id: int
    name: str
    criteria: tuple[str, ...]

    def require(self, criterion: str) -> None:
        """Do nothing where it is asked about.

        Raises:
            DataError: it is not.
        """
        if criterion not in (asked := (*self.criteria, OVERALL)):
            raise DataError(
                f"project {self.name} does not ask about {criterion!r}; it asks about "
                f"{', '.join(asked)}"
            )


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
    doubted: bool
    """Nothing that they said counts: quality control has paused them."""


class Store:
    """The labelling store of a database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    # Projects

    def make_project(
        self, name: str, criteria: Sequence[str], *, at_least: bool = False
    ) -> Project:
        """The project of this name, made where there is none.

        Args:
            at_least: one that asks for more criteria will do.

        Raises:
            DataError: it is there with other criteria, or that is no name.
        """
        if not _NAME.fullmatch(name):
            raise DataError(f"{name!r} is no name for a project: letters, digits and . @ + - _")

        def make(db: Connection) -> Project:
            if found := _project(db, name):
                missing = set(criteria) - set(found.criteria)
                if missing or not (at_least or set(found.criteria) == set(criteria)):
                    raise DataError(
                        f"project {name} asks for {', '.join(found.criteria) or 'nothing more'}, "
                        f"not {', '.join(criteria) or 'nothing more'}; ask for the same, or "
                        "start another project"
                    )
                return found
            row = {"name": name, "criteria": list(criteria), "created": time.time()}
            key = db.execute(insert(project).values(row)).inserted_primary_key
            assert key is not None
            made = Project(key[0], name, tuple(criteria))
            record(db, made, "owner", "project", {"criteria": list(criteria)})
            return made

        return self.database.change(make)

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

        A known pair's honeypot is brought up to date; of two priorities it keeps the higher one.
        Which answer is a follows from the texts, so that the file's order says nothing.
        """

        def put(db: Connection, work: Work, at: Put) -> bool:
            put_work(db, into, work, at, judges_per_pair, actor)
            return at.known

        return self._in_parts(into, works, put, actor, "import work")

    def add_judgements(
        self, into: Project, judgements: Iterable[Judgement], actor: str = "owner"
    ) -> tuple[int, int]:
        """Take verdicts given elsewhere: how many are new, and how many were there already.

        Assessors who are not known are made, without a way to sign in.
        """

        def put(db: Connection, given: Judgement, at: Put) -> bool:
            who = assessor_elsewhere(db, into, given.assessor, given.kind)
            return put_judged(db, into, given, at, who, actor)

        return self._in_parts(into, judgements, put, actor, "import judgements")

    def _in_parts(
        self,
        into: Project,
        items: Iterable[Item],
        put: Callable[[Connection, Item, Put], bool],
        actor: str,
        action: str,
    ) -> tuple[int, int]:
        """Put items, a few hundred at a time, so that assessors need not wait for all of them; an
        import that was interrupted may be repeated. Imports into a project take turns: what one has
        put there is found by the next, and nobody waits in a circle."""
        new = known = 0
        left = iter(items)
        while part := list(islice(left, _PART)):
            found = self.database.change(partial(_put_part, into=into, part=part, put=put))
            known += sum(found)
            new += len(found) - sum(found)
        with self.database.writing() as db:
            record(db, into, actor, action, {"new": new, "known": known})
        return new, known

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

    def invite_again(self, into: Project, name: str) -> str:
        """A new token for an assessor who is there, imported ones too; the old one is void.

        Raises:
            DataError: there is no such assessor.
        """
        token = secrets.token_urlsafe(24)
        with self.database.writing() as db:
            theirs = and_(assessor.c.project_id == into.id, assessor.c.name == name)
            new = {"token_hash": token_hash(token)}
            if not db.execute(update(assessor).where(theirs).values(new)).rowcount:
                raise DataError(f"project {into.name} has no assessor {name}")
            record(db, into, "owner", "invite again", {"name": name})
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

    def kinds(self, project_name: str) -> dict[str, Kind]:
        """What everybody in a project is, by name; empty where there is no such project."""
        with self.database.reading() as db:
            return {each.name: each.kind for each in _assessors(db, project.c.name == project_name)}

    def set_state(
        self, who: Assessor, state: State, reason: str, actor: str, *, doubted: bool = False
    ) -> None:
        """Pause, let go on, or revoke. Who may go on has their judgements so far vouched for.

        Args:
            doubted: nothing that they have said or still say counts, until they may go on; a
                review sees to that.
        """
        with self.database.writing() as db:
            values: dict[str, Any] = {"state": state, "reason": reason}
            if state == "active":
                values |= {"vouched": time.time(), "doubted": False}
            elif doubted:
                values["doubted"] = True
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
                .order_by(assignment.c.pair_id)
            ).all()
            for row in rows:
                reason = which.get(row.assignment_id)
                if reason is None or reason == row.doubt:
                    continue
                hold(db, [row.pair_id])
                # Another server may have been first.
                done = db.execute(
                    update(judgement)
                    .where(judgement.c.assignment_id == row.assignment_id)
                    .where(judgement.c.doubt == row.doubt)
                    .values(doubt=reason)
                ).rowcount
                changed += done
                if done and row.task == "work" and bool(reason) != bool(row.doubt):
                    take(db, row.pair_id, row.kind, -1 if reason else 1)
            if changed:
                reasons = sorted(set(which.values()))
                record(db, of, actor, "doubt", {"judgements": changed, "reasons": reasons})
        return changed

    def tired(self, who: Assessor, now: float | None = None) -> bool:
        """Whether fatigue was found in what they judged lately: a break is due."""
        since = (time.time() if now is None else now) - BREAK_S
        with self.database.reading() as db:
            found = db.execute(
                select(judgement.c.id)
                .join(assignment)
                .where(assignment.c.assessor_id == who.id)
                .where(judgement.c.doubt == TIRED, judgement.c.at > since)
                .limit(1)
            ).first()
        return found is not None

    def review_due(self, of: Project, every: int, kind: Kind | None = "person") -> bool:
        """Whether so many judgements were given since the last review, or the last one wanted of
        this kind of assessor (None: none is). A review reads all: of large projects it is due after
        a fiftieth of them."""
        told = select(func.count()).select_from(judgement).where(judgement.c.project_id == of.id)
        last = select(project.c.reviewed).where(project.c.id == of.id)
        left = select(demand.c.pair_id).where(
            demand.c.project_id == of.id,
            demand.c.kind == kind,
            demand.c.taken < demand.c.wanted,
        )
        with self.database.reading() as db:
            total = db.execute(told).scalar_one()
            new = total - db.execute(last).scalar_one()
            enough = new >= max(every, total // _REVIEWS)
            if kind is None or new <= 0 or enough:
                return bool(enough)
            return db.execute(left.limit(1)).first() is None

    def reviewed(self, of: Project, judgements: int) -> None:
        """Note that so many judgements were there to be reviewed."""
        with self.database.writing() as db:
            db.execute(update(project).where(project.c.id == of.id).values(reviewed=judgements))

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


def _put_part(
    db: Connection,
    into: Project,
    part: Sequence[Item],
    put: Callable[[Connection, Item, Put], bool],
) -> list[bool]:
    """Put items; of each, whether it was there already."""
    # The imports' turn: whoever else puts rows of this project there need not wait for it.
    mine = select(project.c.id).where(project.c.id == into.id)
    db.execute(mine.with_for_update(key_share=True)).one()
    places = [place(db, into, item) for item in part]
    hold(db, {at.id for at in places})
    return [put(db, item, at) for item, at in zip(part, places, strict=True)]


def token_hash(token: str) -> str:
    """What is kept of a token. Tokens are long and random: no salt or slow hash is wanted."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


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
            doubted=row.doubted,
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
        "doubted": False,
        "created": time.time(),
    }


def assessor_elsewhere(db: Connection, into: Project, name: str, kind: Kind) -> int:
    """The id of somebody who judges elsewhere; made, without a way to sign in, where not known.

    Raises:
        DataError: they are known as another kind.
    """
    row = db.execute(
        select(assessor.c.id, assessor.c.kind).where(
            assessor.c.project_id == into.id, assessor.c.name == name
        )
    ).one_or_none()
    if row is None:
        values = _new(into, name, kind, "assessor", secrets.token_urlsafe(24))
        key = db.execute(insert(assessor).values(values)).inserted_primary_key
        assert key is not None
        return int(key[0])
    if row.kind != kind:
        raise DataError(
            f"project {into.name} knows {name} as {row.kind}, the file as {kind}; "
            "give one of them another name"
        )
    return int(row.id)


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
            # A pair may have become a honeypot since it was judged as work.
            truth=row.verdict if row.task == "honeypot" else None,
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
