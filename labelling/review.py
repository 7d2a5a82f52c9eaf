"""What quality control does: pauses who does not read, and stops counting what was judged tired.

Judgements that are in doubt stay in the store with the reason, and their pairs return to the queue.
A review may be repeated at any time: it changes only what has become known since.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from labelling.attention import attention
from labelling.fatigue import FatigueSettings, fatigue
from labelling.records import Judgement, Kind
from labelling.store import PAUSED, TIRED, Assessor, Project, State, Store
from rlhf.config.label import AttentionSection

_ENOUGH = 10
"""Judgements below which nobody is told anything about."""
_turn = threading.Lock()
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Review:
    """What a review has changed: who was paused and why, how many judgements are newly in doubt."""

    paused: dict[str, str]
    doubted: int


def review(store: Store, of: Project, settings: AttentionSection) -> Review:
    """Review everybody in a project; what follows is stored.

    Models are assessors too, but neither attentive nor tired: they are left alone.
    """
    with _turn:
        found = store.judgements(of)
        everybody = {each.name: each for each in store.assessors(of)}
        paused: dict[str, str] = {}
        doubts: dict[str, str] = {}
        for kind in ("person", "simulated"):
            mine = [each for each in found if each.kind == kind]
            # Who was revoked alone is looked at like any other: what they said counts.
            out = {name for name, each in everybody.items() if each.doubted}
            paused |= _inattentive(mine, everybody, out, settings)
            doubts |= _tired(mine, out | paused.keys(), settings)
        for name, reason in paused.items():
            state: State = "revoked" if everybody[name].state == "revoked" else "paused"
            store.set_state(everybody[name], state, reason, "quality control", doubted=True)
        # Theirs who were paused before too: they may have sent another one since, and a review that
        # was cut short is made good.
        inattentive = {name for name, each in everybody.items() if each.doubted} | paused.keys()
        doubts |= {
            each.id: PAUSED for each in found if each.assessor in inattentive and not each.doubt
        }
        changed = store.doubt(of, doubts) if doubts else 0
        store.reviewed(of, len(found))
        return Review(paused, changed)


class Reviewer:
    """Reviews a project when so many judgements have come since the last time, or the last one that
    was wanted; one review of a project at a time."""

    def __init__(self, store: Store, settings: AttentionSection) -> None:
        self._store, self._settings = store, settings
        self._lock = threading.Lock()
        # By project that is being reviewed: who has called for it since the last look.
        self._asked: dict[int, set[Kind | None]] = {}

    def run(self, of: Project, kind: Kind | None) -> None:
        """Review if it is time; what it finds is stored. Where a review of the project is under
        way, that one looks again, and this returns at once.

        Args:
            kind: of who has judged; None where nothing is wanted, so that no judgement is the last.
        """
        with self._lock:
            under_way = of.id in self._asked
            self._asked.setdefault(of.id, set()).add(kind)
        while not under_way and (asked := self._taken(of)):
            for each in asked:
                self._look(of, each)

    def _taken(self, of: Project) -> set[Kind | None]:
        """Who has called since the last look; where nobody has, the review is over."""
        with self._lock:
            if asked := self._asked.pop(of.id):
                self._asked[of.id] = set()
            return asked

    def _look(self, of: Project, kind: Kind | None) -> None:
        try:
            if self._store.review_due(of, self._settings.review_every, kind):
                review(self._store, of, self._settings)
        except Exception:
            # The judgement that called for it is stored and acknowledged.
            _log.exception("the review of project %s failed", of.name)


def let_go_on(store: Store, who: Assessor, actor: str) -> None:
    """Who was paused or revoked judges on: what they said counts again, and no longer against
    them."""
    with _turn:
        store.set_state(who, "active", "", actor)
        theirs = {
            each.id: ""
            for each in store.judgements(who.project)
            if each.assessor == who.name and each.doubt == PAUSED
        }
        store.doubt(who.project, theirs, actor)


def _inattentive(
    judgements: Sequence[Judgement],
    everybody: dict[str, Assessor],
    out: set[str],
    settings: AttentionSection,
) -> dict[str, str]:
    """Who is to be paused, and why. What was said before an owner vouched for somebody says nothing
    against them."""
    told = [each for each in judgements if each.at >= everybody[each.assessor].vouched]
    if not told:
        return {}
    found = attention(
        told, false_pause_rate=settings.false_pause_rate, uncounted=out, spread=settings.spread
    )
    return {
        name: f"{each.way} (evidence {each.log_evidence:.1f} nats, "
        f"{1 - each.attentive:.0%} probable)"
        for name, each in found.items()
        if each.state == "paused" and name not in out and each.judgements >= _ENOUGH
    }


def _tired(
    judgements: Sequence[Judgement], out: set[str], settings: AttentionSection
) -> dict[str, str]:
    """Judgements from the onset of fatigue to the shift's end. Those found before are looked at
    again, so that a window grows with its shift."""
    told = [
        replace(each, doubt="") if each.doubt == TIRED else each
        for each in judgements
        if each.assessor not in out
    ]
    doubts = {}
    for window in fatigue(told, FatigueSettings(settings.false_break_rate), uncounted=out):
        for each in told[window.onset : window.end + 1]:
            if each.assessor == window.assessor and not each.doubt:
                doubts[each.id] = TIRED
    return doubts
