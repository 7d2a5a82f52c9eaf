"""What an assessor judges next, and the recording of it.

A task is work, a honeypot (its verdict is known) or a repeat (judged by them before, now in the
other order); they look alike, and while there is no work there is none of them. Which answer stands
first is drawn, and evened out over the judges of a pair. A pair is handed out to as many assessors
as it wants judges, to nobody twice but for its repeat, and one task at a time: the database's own
constraints hold that, however many ask at once. Tasks that are skipped, or open for too long,
return to the queue; an assessor gets one back that they left open where they have no other.
"""

from __future__ import annotations

import random
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, and_, case, exists, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from labelling.records import Verdict, flipped
from labelling.rows import is_honeypot, record, take
from labelling.store import PAUSED, Assessor, Store
from labelling.tables import (
    answer,
    assessor,
    assignment,
    demand,
    feedback,
    honeypot,
    judgement,
    pair,
    prompt,
)
from rlhf.config.label import LabelSection
from rlhf.errors import DataError
from rlhf.records import OVERALL, Message

Shown = Literal["first", "second", "tie", "bad"]
"""A verdict as the assessor sees it."""

SHOWN: tuple[Shown, ...] = ("first", "second", "tie", "bad")
COMMENT_LIMIT = 4000


@dataclass(frozen=True, slots=True)
class Task:
    """What the assessor sees: two answers in the order drawn, by nobody."""

    id: str
    prompt: tuple[Message, ...]
    first: str
    second: str
    pair: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """A judgement is on disk. `missed` is the explanation where it was a honeypot and missed."""

    repeated: bool
    missed: str | None = None


class Queue:
    """The tasks of all projects of a store."""

    def __init__(
        self,
        store: Store,
        settings: LabelSection,
        *,
        clock: Callable[[], float] = time.time,
        draw: random.Random | None = None,
    ) -> None:
        self._store, self._settings, self._clock = store, settings, clock
        self._draw = draw or random.SystemRandom()

    def next(self, who: Assessor) -> Task | None:
        """Their open task, or a new one; None where nothing is left for them.

        Raises:
            DataError: they are paused.
        """
        if who.state != "active":
            raise DataError(f"{who.name} is {who.state}: {who.reason}")
        # For itself: it takes several demands, and who waits for one below is to hold none.
        with self._store.database.writing() as db:
            self._expire(db, who)

        def draw(db: Connection) -> Task | None:
            found = self._open(db, who) or self._draw_task(db, who)
            return None if found is None else _task(db, found)

        try:
            # Another request of theirs may be first: then it has made their task.
            return self._store.database.change(draw)
        except IntegrityError:
            raise DataError(f"{who.name} asks from too many places at once") from None

    def judge(
        self,
        who: Assessor,
        task: str,
        verdicts: Mapping[str, Shown],
        *,
        seconds: float | None = None,
        comment: str = "",
    ) -> Receipt:
        """Record the verdicts on a task, by criterion, as shown. The same task counts once: what is
        sent again is acknowledged and changes nothing. One that has expired is taken all the same.

        Args:
            seconds: the time taken. A person's is at most the time since the task was handed out.

        Raises:
            DataError: it is not their task, or a criterion lacks a verdict.
        """
        asked = [*who.project.criteria, OVERALL]
        if missing := [name for name in asked if name not in verdicts]:
            raise DataError(f"no verdict on {', '.join(missing)}")
        if strange := [name for name in verdicts if name not in asked]:
            raise DataError(f"project {who.project.name} does not ask about {strange[0]!r}")
        if wrong := [each for each in verdicts.values() if each not in SHOWN]:
            raise DataError(f"{wrong[0]!r} is no verdict: {', '.join(SHOWN)}")
        comment = comment.replace("\r\n", "\n").replace("\x00", "\ufffd")
        comment = comment.encode(errors="replace").decode()
        if len(comment) > COMMENT_LIMIT:
            raise DataError(f"a comment of {len(comment)} characters; at most {COMMENT_LIMIT}")
        now = self._clock()
        try:
            with self._store.database.writing() as db:
                row = self._theirs(db, who, task)
                if row.state == "done":
                    return Receipt(True, _given(db, task))
                if row.state == "skipped":
                    raise DataError("this task was skipped, and is somebody else's now")
                taken = now - row.created
                if seconds is None or (who.kind == "person" and not 0 <= seconds <= taken):
                    seconds = taken
                names = {"first": row.first, "second": "b" if row.first == "a" else "a"}
                truly: dict[str, Any] = {
                    name: names.get(shown, shown) for name, shown in verdicts.items()
                }
                values = {"project_id": who.project.id, "verdicts": truly, "seconds": seconds}
                # Somebody whom quality control has paused meanwhile loses nothing by sending it.
                doubted = db.execute(
                    select(assessor.c.doubted).where(assessor.c.id == who.id)
                ).scalar_one()
                doubt = PAUSED if doubted else ""
                db.execute(
                    insert(judgement).values(
                        assignment_id=task, comment=comment, at=now, doubt=doubt, **values
                    )
                )
                db.execute(update(assignment).where(assignment.c.id == task).values(state="done"))
                change = (row.state == "expired") - bool(doubt)
                if change and row.task == "work":
                    take(db, row.pair_id, who.kind, change)
                missed = self._missed(db, row, truly[OVERALL], now)
                details = {"task": task, "of": row.task}
                record(db, who.project, who.name, "judgement", details)
                return Receipt(False, missed)
        except IntegrityError:
            # The same task, sent twice at once: the other is stored.
            return Receipt(True)

    def skip(self, who: Assessor, task: str) -> None:
        """Leave a task to somebody else; they do not see it again.

        Raises:
            DataError: it is not their task.
        """
        with self._store.database.writing() as db:
            row = self._theirs(db, who, task)
            if row.state != "open":
                return
            db.execute(update(assignment).where(assignment.c.id == task).values(state="skipped"))
            if row.task == "work":
                take(db, row.pair_id, who.kind, -1)
            record(db, who.project, who.name, "skip", {"task": task})

    def judged(self, who: Assessor) -> int:
        """How many judgements they have given."""
        with self._store.database.reading() as db:
            return _judged(db, who)

    def unknown(self, who: Assessor, task: str) -> bool:
        """Whether the verdict on a task of theirs is not known: an expert may make it so."""
        with self._store.database.reading() as db:
            return not is_honeypot(db, self._theirs(db, who, task).pair_id)

    def task(self, who: Assessor, task: str) -> tuple[Task, str, str | None]:
        """A task of theirs, its state, and what was said where it was a honeypot and missed.

        Raises:
            DataError: it is not their task.
        """
        with self._store.database.reading() as db:
            row = self._theirs(db, who, task)
            return _task(db, row), row.state, _given(db, task)

    def _expire(self, db: Connection, who: Assessor) -> None:
        late = and_(
            assignment.c.project_id == who.project.id,
            assignment.c.state == "open",
            assignment.c.expires < self._clock(),
        )
        rows = db.execute(
            select(assignment.c.id, assignment.c.pair_id, assignment.c.task, _kind_of())
            .where(late)
            # As in `labelling.rows.hold`.
            .order_by(assignment.c.pair_id, "kind")
            .with_for_update(skip_locked=True, of=assignment)
        ).all()
        for row in rows:
            gone = update(assignment).where(assignment.c.id == row.id)
            db.execute(gone.values(state="expired"))
            if row.task == "work":
                take(db, row.pair_id, row.kind, -1)

    def _open(self, db: Connection, who: Assessor) -> Any:
        open_ = and_(assignment.c.assessor_id == who.id, assignment.c.state == "open")
        return db.execute(select(assignment).where(open_)).one_or_none()

    def _theirs(self, db: Connection, who: Assessor, task: str) -> Any:
        mine = and_(assignment.c.id == task, assignment.c.assessor_id == who.id)
        row = None
        if re.fullmatch(r"[\w-]{1,24}", task, re.ASCII):
            row = db.execute(select(assignment).where(mine).with_for_update()).one_or_none()
        if row is None:
            raise DataError(f"{who.name} has no task {task[:24]!a}")
        return row

    def _draw_task(self, db: Connection, who: Assessor) -> Any:
        pair_id = self._work(db, who)
        if pair_id is None:
            return None
        shares, chance = self._settings.attention, self._draw.random()
        seed, kind, first = secrets.randbits(53), "work", ""
        if chance < shares.honeypot_share:
            if (known := self._honeypot(db, who)) is not None:
                pair_id, kind = known, "honeypot"
        elif chance < shares.honeypot_share + shares.repeat_share and (
            repeat := self._repeat(db, who)
        ):
            pair_id, first, kind = repeat.pair_id, flipped(repeat.first), "repeat"
        if kind == "work":
            take(db, pair_id, who.kind, 1)
            first = self._rarer(db, who, pair_id)
        mine = and_(assignment.c.assessor_id == who.id, assignment.c.pair_id == pair_id)
        now = self._clock()
        opened = {"state": "open", "created": now, "expires": now + self._settings.expires_s}
        left = and_(mine, assignment.c.task == kind, assignment.c.state == "expired")
        if not db.execute(update(assignment).where(left).values(opened)).rowcount:
            values = {
                "id": secrets.token_urlsafe(12),
                "project_id": who.project.id,
                "pair_id": pair_id,
                "assessor_id": who.id,
                "task": kind,
                "first": first or random.Random(seed).choice("ab"),
                "seed": seed,
            }
            db.execute(insert(assignment).values(values | opened))
        return self._open(db, who)

    def _work(self, db: Connection, who: Assessor) -> int | None:
        """A pair that wants judges, locked: flagged ones first, then begun ones. Those that others
        are just being given are waited for where there is nothing else; what they left open
        themselves comes last."""
        fresh = ~_seen(who, demand.c.pair_id)
        left = exists().where(
            assignment.c.assessor_id == who.id,
            assignment.c.pair_id == demand.c.pair_id,
            assignment.c.task == "work",
            assignment.c.state == "expired",
        )
        for theirs, wait in ((fresh, False), (fresh, True), (left, True)):
            wanting = (
                select(demand.c.pair_id)
                .where(
                    demand.c.project_id == who.project.id,
                    demand.c.kind == who.kind,
                    demand.c.taken < demand.c.wanted,
                    theirs,
                )
                .order_by(demand.c.priority.desc(), demand.c.taken.desc(), demand.c.shuffle)
                .limit(1)
                .with_for_update(skip_locked=not wait)
            )
            if (pair_id := db.execute(wanting).scalar_one_or_none()) is not None:
                return int(pair_id)
        return None

    def _rarer(self, db: Connection, who: Assessor, pair_id: int) -> str:
        """The answer that stood first for fewer of a pair's judges; "" where both did equally."""
        shown = db.execute(
            select(assignment.c.first)
            .join(assessor)
            .where(
                assignment.c.pair_id == pair_id,
                assignment.c.task == "work",
                assignment.c.state.in_(["open", "done"]),
                assessor.c.kind == who.kind,
            )
        ).scalars()
        lead = sum({"a": 1, "b": -1}.get(first, 0) for first in shown)
        return "a" if lead < 0 else "b" if lead > 0 else ""

    def _honeypot(self, db: Connection, who: Assessor) -> int | None:
        """One that they have not seen, those seen by fewest first: answers get about."""
        used = (
            select(func.count())
            .select_from(assignment)
            .where(assignment.c.pair_id == honeypot.c.pair_id)
            .scalar_subquery()
        )
        return db.execute(
            select(honeypot.c.pair_id)
            .join(pair)
            .where(pair.c.project_id == who.project.id, ~_seen(who, honeypot.c.pair_id))
            .where(_has_texts(honeypot.c.pair_id))
            .order_by(used, pair.c.key)
            .limit(1)
        ).scalar_one_or_none()

    def _repeat(self, db: Connection, who: Assessor) -> Any:
        """The work that they judged longest ago, not repeated yet, with its old order; None where
        too few judgements have been given since."""
        again = assignment.alias()
        mine = and_(assignment.c.assessor_id == who.id, assignment.c.state == "done")
        since = db.execute(
            select(assignment.c.created)
            .where(mine)
            .order_by(assignment.c.created.desc())
            .offset(self._settings.attention.repeat_after - 1)
            .limit(1)
        ).scalar_one_or_none()
        if since is None:
            return None
        return db.execute(
            select(assignment.c.pair_id, assignment.c.first)
            .where(
                mine,
                assignment.c.task == "work",
                assignment.c.created < since,
                assignment.c.first != "",
                _has_texts(assignment.c.pair_id),
                ~exists().where(
                    again.c.assessor_id == who.id,
                    again.c.pair_id == assignment.c.pair_id,
                    again.c.task == "repeat",
                ),
            )
            .order_by(assignment.c.created)
            .limit(1)
        ).one_or_none()

    def _missed(self, db: Connection, row: Any, verdict: Verdict, now: float) -> str | None:
        if row.task != "honeypot" or not self._settings.attention.feedback:
            return None
        theirs = select(honeypot).where(honeypot.c.pair_id == row.pair_id)
        known = db.execute(theirs).one_or_none()
        # It may have been retired meanwhile.
        if known is None or known.verdict == verdict:
            return None
        shown = {row.first: "the first answer", flipped(row.first): "the second answer"}
        better = shown.get(known.verdict)
        text = (
            f"An expert found {better} better."
            if better
            else "An expert found them equally good."
            if known.verdict == "tie"
            else "An expert found both of them bad."
        )
        text = f"{text} {known.explanation}".strip()
        db.execute(insert(feedback).values(assignment_id=row.id, text=text, given=now))
        return text


def _seen(who: Assessor, pair_id: Any) -> Any:
    return exists().where(assignment.c.assessor_id == who.id, assignment.c.pair_id == pair_id)


def _has_texts(pair_id: Any) -> Any:
    """Whether a pair can be shown: what was judged elsewhere may have come without its texts."""
    judged = pair.alias()
    return ~exists().where(
        judged.c.id == pair_id,
        answer.c.id.in_([judged.c.a_id, judged.c.b_id]),
        answer.c.text == "",
    )


def _kind_of() -> Any:
    return (
        select(assessor.c.kind)
        .where(assessor.c.id == assignment.c.assessor_id)
        .scalar_subquery()
        .label("kind")
    )


def _judged(db: Connection, who: Assessor) -> int:
    done = and_(assignment.c.assessor_id == who.id, assignment.c.state == "done")
    return int(db.execute(select(func.count()).select_from(assignment).where(done)).scalar_one())


def _given(db: Connection, task: str) -> str | None:
    query = select(feedback.c.text).where(feedback.c.assignment_id == task)
    return db.execute(query).scalar_one_or_none()


def _task(db: Connection, row: Any) -> Task:
    a, b = answer.alias(), answer.alias()
    a_first = row.first != "b"
    found = db.execute(
        select(
            pair.c.key,
            prompt.c.messages,
            case((a_first, a.c.text), else_=b.c.text).label("one"),
            case((a_first, b.c.text), else_=a.c.text).label("other"),
        )
        .select_from(pair)
        .join(prompt, prompt.c.id == pair.c.prompt_id)
        .join(a, a.c.id == pair.c.a_id)
        .join(b, b.c.id == pair.c.b_id)
        .where(pair.c.id == row.pair_id)
    ).one()
    messages = tuple(Message(each["role"], each["content"]) for each in found.messages)
    return Task(row.id, messages, found.one, found.other, found.key)
