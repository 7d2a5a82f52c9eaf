"""What users of the chat server say of its answers, with their consent.

| they see    | and say                 | it becomes                                        |
|-------------|-------------------------|---------------------------------------------------|
| one answer  | up, down                | its showing's thumb; a later one takes its place  |
| two answers | first, second, tie, bad | a pair and their judgement on it; the first stays |

Of every answer its showing is kept: how it came about, and what was consented to.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, and_, func, insert, select, update

from labelling.queue import SHOWN, Shown
from labelling.records import Answer, Judgement, Kind, Verdict, Work, flipped
from labelling.rows import place, put_answer, put_judged, record
from labelling.store import PAUSED, Project, Store, assessor_elsewhere
from labelling.tables import answer, assessor, assignment, judgement, showing
from rlhf.errors import DataError
from rlhf.records import OVERALL, Message

Thumb = Literal["up", "down"]
THUMBS: tuple[Thumb, ...] = ("up", "down")
CONSENT_VERSION = "1"
CONSENT = (
    "The whole conversation, these answers and what I say of them may be kept by those who run "
    "this assistant, read by people, and used to train and compare assistants."
)
"""What is agreed to; shown before it is asked. Another wording is another `CONSENT_VERSION`."""


@dataclass(frozen=True, slots=True)
class Showing:
    """An answer as it was shown: the completion that it is of, what it was drawn with, what the
    ensemble said of it, and when it was given (seconds since 1970)."""

    answer: Answer
    completion: str
    sampling: Mapping[str, Any]
    verdict: Mapping[str, Any]
    answered: float


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a user says of one answer, or of two in the order shown, to a conversation.

    Raises:
        ValueError: the two answers cannot be compared.
    """

    assessor: str
    prompt: tuple[Message, ...]
    showings: tuple[Showing, ...]
    verdict: Thumb | Shown
    comment: str
    at: float

    def __post_init__(self) -> None:
        assert self.verdict in (SHOWN if self.compares else THUMBS)
        if self.compares:
            self.judgement("")

    @property
    def compares(self) -> bool:
        """Whether two answers stood beside each other."""
        return len(self.showings) == 2

    def judgement(self, doubt: str) -> Judgement:
        """The verdict on two answers; a is the one that stood first."""
        named: dict[str, Verdict] = {"first": "a", "second": "b", "tie": "tie", "bad": "bad"}
        first, second = (each.answer for each in self.showings)
        return Judgement(
            "",
            self.assessor,
            {OVERALL: named[self.verdict]},
            first="a",
            at=self.at,
            comment=self.comment,
            doubt=doubt,
            work=Work(self.prompt, first, second, source="chat"),
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """What feedback has become: a showing's id, or of two answers the assignment's. `before`: they
    had judged the two answers otherwise, and that verdict stays."""

    id: str
    before: bool = False


def put_feedback(store: Store, into: Project, given: Feedback) -> Kept:
    """Keep feedback; who gives it for the first time becomes an assessor who cannot sign in.

    Raises:
        DataError: the owner has revoked them.
    """
    return store.database.change(lambda db: _put(db, into, given))


def _put(db: Connection, into: Project, given: Feedback) -> Kept:
    who = assessor_elsewhere(db, into, given.assessor, "person")
    columns = assessor.c.state, assessor.c.doubted
    state, doubted = db.execute(select(*columns).where(assessor.c.id == who)).one()
    if state == "revoked":
        raise DataError(f"project {into.name} takes nothing more from {given.assessor}")
    judged = None
    if given.compares:
        judged, known = _compare(db, into, given.judgement(PAUSED if doubted else ""), who)
        if known:
            return judged
    shown = [_show(db, into, given, each, who) for each in given.showings]
    kept = judged or Kept(shown[0])
    details = {"id": kept.id, "verdict": given.verdict, "consent": CONSENT_VERSION}
    record(db, into, given.assessor, "feedback", details)
    return kept


def _compare(db: Connection, into: Project, given: Judgement, who: int) -> tuple[Kept, bool]:
    """What the verdict on a pair has become, and whether there was one by then."""
    pair = place(db, into, given)
    known = put_judged(db, into, given, pair, who, given.assessor)
    stays = db.execute(
        select(assignment.c.id, judgement.c.verdicts)
        .join_from(assignment, judgement)
        .where(assignment.c.assessor_id == who, assignment.c.pair_id == pair.id)
        .where(assignment.c.task != "repeat")
    ).one()
    verdict = given.verdicts[OVERALL]
    said = flipped(verdict) if pair.swapped else verdict
    return Kept(stays.id, stays.verdicts[OVERALL] != said), known


def _show(db: Connection, into: Project, given: Feedback, shown: Showing, who: int) -> str:
    """The id of an answer's showing to somebody, brought up to date."""
    answer_id = put_answer(db, into, given.prompt, shown.answer)
    values: dict[str, Any] = {
        "completion": shown.completion,
        "sampling": dict(shown.sampling),
        "verdict": dict(shown.verdict),
        "answered": shown.answered,
        "consent": {"version": CONSENT_VERSION, "wording": CONSENT},
        "at": given.at,
    }
    if not given.compares:
        values |= {"thumb": given.verdict, "comment": given.comment}
    theirs = and_(showing.c.answer_id == answer_id, showing.c.assessor_id == who)
    known = db.execute(select(showing.c.id).where(theirs)).scalar_one_or_none()
    if known is not None:
        db.execute(update(showing).where(theirs).values(values))
        return str(known)
    key = secrets.token_urlsafe(12)
    new = {"id": key, "answer_id": answer_id, "assessor_id": who, "comment": ""}
    db.execute(insert(showing).values({**new, **values}))
    return key


def reactions(store: Store, of: Project, kind: Kind = "person") -> dict[str, dict[str, int]]:
    """Thumbs up and down by the version that answered, but those of who has been paused."""
    with store.database.reading() as db:
        rows = db.execute(
            select(answer.c.checkpoint, showing.c.thumb, func.count())
            .join_from(showing, answer)
            .join(assessor, assessor.c.id == showing.c.assessor_id)
            .where(assessor.c.project_id == of.id, assessor.c.kind == kind)
            .where(showing.c.thumb.is_not(None), assessor.c.doubted.is_(False))
            .group_by(answer.c.checkpoint, showing.c.thumb)
            .order_by(answer.c.checkpoint)
        )
        found: dict[str, dict[str, int]] = {}
        for version, thumb, count in rows:
            found.setdefault(version, {"up": 0, "down": 0})[thumb] = count
    return found
