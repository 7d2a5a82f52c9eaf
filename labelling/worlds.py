"""Worlds of simulated assessors in which the truth is planted.

Nothing here is human judgement. Proofs measure in such worlds what quality control finds of what
was put in; simulated judges judge over HTTP as these persons do.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from labelling.records import Judgement, Verdict
from rlhf.records import OVERALL
from rlhf.seeding import derive_seed

Spam = Literal["random", "first", "longest", "half-random"]
SPAM: tuple[Spam, ...] = ("random", "first", "longest", "half-random")
Side = Literal["a", "b"]
Pause = Callable[[Sequence[Judgement], frozenset[str]], Collection[str]]
"""Takes all judgements so far and who is paused; returns who is to be paused as well."""


@dataclass(frozen=True, slots=True)
class Task:
    """A pair as it is shown: the better answer, the one shown first, both answers' words."""

    pair: str
    truth: Side
    first: Side
    words: tuple[int, int]
    honeypot: bool = False


@dataclass(frozen=True, slots=True)
class SimulatedPerson:
    """How somebody judges.

    `accuracy` is the chance to be right on a pair where a verdict is given that is no tie,
    `honeypot_accuracy` on a honeypot (ties there are wrong). `position_bias` is added to it where
    the better answer is shown first and taken away where it is shown second, so that the first is
    chosen with 1/2 + `position_bias` over all. From judgement `fatigue_onset` on (1 is the first)
    the accuracies are lower by `fatigue_accuracy` and the seconds by the share `fatigue_speed`.

    Seconds are log-normal about `seconds` for 200 words, grow with words to the power
    `word_slope`, and are larger by the share `practice` at first, which wears off with
    ``exp(-number / practice_judgements)``. Every judgement is drawn anew given the truth, a second
    look as well. Spammers judge a share of pairs without reading them: "half-random" every other
    one, the rest all; they say tie as often as others do.
    """

    name: str
    accuracy: float = 0.8
    honeypot_accuracy: float = 0.92
    tie_rate: float = 0.05
    position_bias: float = 0.0
    fatigue_onset: int | None = None
    fatigue_accuracy: float = 0.2
    fatigue_speed: float = 0.4
    seconds: float = 30.0
    spread: float = 0.5
    word_slope: float = 0.4
    practice: float = 0.5
    practice_judgements: float = 25.0
    spam: Spam | None = None

    def judge(self, task: Task, number: int, seed: int) -> tuple[Verdict, float]:
        """The verdict on the person's `number`-th judgement (1 is the first) and its seconds; the
        same for the same seed."""
        draw = random.Random(derive_seed(seed, self.name, task.pair, str(number)))
        tired = self.fatigue_onset is not None and number >= self.fatigue_onset
        return self._verdict(task, tired, draw), self._seconds(task, number, tired, draw)

    def _verdict(self, task: Task, tired: bool, draw: random.Random) -> Verdict:
        reads = self.spam is None or (self.spam == "half-random" and draw.random() < 0.5)
        other: Side = "b" if task.truth == "a" else "a"
        if reads and task.honeypot:
            if draw.random() < self.honeypot_accuracy - self.fatigue_accuracy * tired:
                return task.truth
            return "tie" if draw.random() < self.tie_rate else other
        if draw.random() < self.tie_rate:
            return "tie"
        if reads:
            lean = self.position_bias if task.first == task.truth else -self.position_bias
            right = draw.random() < self.accuracy + lean - self.fatigue_accuracy * tired
            return task.truth if right else other
        if self.spam == "first":
            return task.first
        if self.spam == "longest" and task.words[0] != task.words[1]:
            return "a" if task.words[0] > task.words[1] else "b"
        return "a" if draw.random() < 0.5 else "b"

    def _seconds(self, task: Task, number: int, tired: bool, draw: random.Random) -> float:
        usual = self.seconds * (max(1, sum(task.words)) / 200) ** self.word_slope
        usual *= 1 + self.practice * math.exp(-number / self.practice_judgements)
        usual *= 1 - self.fatigue_speed * tired
        seconds: float = usual * math.exp(draw.gauss(0.0, self.spread))
        return seconds


@dataclass(frozen=True, slots=True)
class World:
    """Who judges, and how work is handed out.

    Person n joins after `joins_s[n]` seconds (0 where there are none) and judges `each` times
    without a break. Pairs are handed out in order until `judges` judgements of each are counted;
    honeypots are drawn from as many as `honeypots`, none twice for anybody. Either answer is the
    better one and the first one with equal chance, independently; the better one is the longer one
    with the chance `longer`.
    """

    people: tuple[SimulatedPerson, ...]
    joins_s: tuple[float, ...] = ()
    each: int = 300
    judges: int = 3
    honeypot_share: float = 0.10
    repeat_share: float = 0.05
    honeypots: int = 500
    log_words: tuple[float, float] = (4.6, 0.6)
    longer: float = 0.5
    pairs: int | None = None
    """Pairs there are; None as many as are asked for."""


@dataclass(frozen=True, slots=True)
class Played:
    """What happened: judgements in the order of time, the planted truths of all pairs, and after
    how many judgements of their own assessors were paused."""

    judgements: list[Judgement]
    truths: Mapping[str, Side]
    paused: Mapping[str, int]


@dataclass(slots=True)
class _Desk:
    """What one person has done."""

    person: SimulatedPerson
    done: int = 0
    judged: dict[str, Judgement] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)


def play(
    world: World,
    seed: int,
    *,
    pause: Pause | None = None,
    look_every: int = 500,
    go_on: bool = False,
) -> Played:
    """Play a world through in the order of time.

    Args:
        pause: asked after every `look_every` judgements, and at the end, whom to pause.
        go_on: paused assessors judge on without their judgements filling a pair's number: for
            measuring at which other threshold they would have been paused.
    """
    draw = random.Random(derive_seed(seed, "world"))
    desks = [_Desk(person) for person in world.people]
    joins = world.joins_s or (0.0,) * len(desks)
    due = [(joins[at] + draw.random(), at) for at in range(len(desks))]
    heapq.heapify(due)
    shown: dict[str, tuple[Side, tuple[int, int]]] = {}
    open_pairs: dict[str, set[str]] = {}
    judged_by: dict[str, set[str]] = {}
    paused: dict[str, int] = {}
    judgements: list[Judgement] = []

    def made(name: str) -> str:
        words = [max(1, round(math.exp(draw.gauss(*world.log_words)))) for _ in range(2)]
        truth = _side(draw)
        # With an even chance lengths are as they come.
        if world.longer != 0.5:
            longer_is_better = (words[0] > words[1]) == (truth == "a")
            if longer_is_better != (draw.random() < world.longer):
                words.reverse()
        shown[name] = (truth, (words[0], words[1]))
        return name

    def plain(desk: _Desk) -> str | None:
        for name in open_pairs:
            if name not in desk.judged:
                by = open_pairs[name]
                break
        else:
            if world.pairs is not None and len(judged_by) >= world.pairs:
                return None
            name = made(f"pair-{len(judged_by)}")
            by = open_pairs[name] = judged_by[name] = set()
        if desk.person.name not in paused:
            by.add(desk.person.name)
            if len(by) >= world.judges:
                del open_pairs[name]
        return name

    def look() -> None:
        if pause is None:
            return
        for name in sorted(set(pause(judgements, frozenset(paused))) - paused.keys()):
            [desk] = [desk for desk in desks if desk.person.name == name]
            paused[name] = desk.done
            for pair in desk.judged:
                if name in (by := judged_by.get(pair, set())):
                    by.discard(name)
                    open_pairs[pair] = by

    pots = [made(f"honeypot-{at}") for at in range(world.honeypots)]
    while due:
        now, at = heapq.heappop(due)
        desk = desks[at]
        if desk.done >= world.each or (desk.person.name in paused and not go_on):
            continue
        chance, old, name = draw.random(), None, None
        if chance < world.honeypot_share and len(pots) > 0:
            fresh = [pot for pot in draw.sample(pots, min(len(pots), 50)) if pot not in desk.judged]
            name = fresh[0] if fresh else None
        elif chance < world.honeypot_share + world.repeat_share and desk.done >= 10:
            again = [
                pair
                for pair, before in desk.judged.items()
                if before.truth is None and pair not in desk.repeated
            ]
            if again:
                name = draw.choice(again)
                old = desk.judged[name]
                desk.repeated.add(name)
        if name is None and (name := plain(desk)) is None:
            continue
        truth, words = shown[name]
        honeypot = name.startswith("honeypot-")
        first: Side = _side(draw) if old is None else ("b" if old.first == "a" else "a")
        desk.done += 1
        verdict, seconds = desk.person.judge(
            Task(name, truth, first, words, honeypot), desk.done, seed
        )
        judgement = Judgement(
            name,
            desk.person.name,
            {OVERALL: verdict},
            first,
            seconds,
            now + seconds,
            "simulated",
            truth if honeypot else None,
            old is not None,
            words,
        )
        judgements.append(judgement)
        desk.judged.setdefault(name, judgement)
        heapq.heappush(due, (now + seconds + 1, at))
        if len(judgements) % look_every == 0:
            look()
    look()
    judgements.sort(key=lambda judgement: judgement.at)
    return Played(judgements, {name: truth for name, (truth, _) in shown.items()}, paused)


def polluted(
    seed: int,
    *,
    people: int = 200,
    spammers: int = 30,
    early: int = 25,
    early_spammers: int = 10,
    join_every_s: float = 120.0,
    honest: SimulatedPerson | None = None,
    each: int = 300,
    judges: int = 3,
) -> World:
    """A world whose early pool is full of spammers: `early` people are there from the beginning,
    `early_spammers` of them spammers, the others join one by one. Of the kinds of spammers in
    `SPAM` there are equally many (to within one), in random order; everybody has a speed of their
    own (log-normal, spread 0.4)."""
    draw = random.Random(derive_seed(seed, "people"))
    honest = honest or SimulatedPerson("")
    turn = draw.randrange(len(SPAM))
    kinds = [SPAM[(turn + at) % len(SPAM)] for at in range(spammers)]
    draw.shuffle(kinds)
    first = draw.sample(range(early), early_spammers)
    later = draw.sample(range(early, people), spammers - early_spammers)
    spam = dict(zip([*first, *later], kinds, strict=True))
    everybody = tuple(
        replace(
            honest,
            name=f"{spam.get(at, 'honest')}-{at}",
            seconds=honest.seconds * math.exp(draw.gauss(0, 0.4)),
            spam=spam.get(at),
        )
        for at in range(people)
    )
    joins = tuple(max(0, at - early + 1) * join_every_s for at in range(people))
    return World(everybody, joins, each, judges)


def _side(draw: random.Random) -> Side:
    return "a" if draw.random() < 0.5 else "b"
