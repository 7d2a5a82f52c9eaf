"""Quality control of assessors, on planted truths; and the service itself, on real servers
(`tests/proofs/label_server.py`). Everybody here is simulated."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from labelling.aggregation import Vote, dawid_skene, majority
from labelling.attention import FALSE_PAUSE_RATE, attention
from labelling.fatigue import fatigue
from labelling.quality import position_bias
from labelling.records import Judgement
from labelling.worlds import SPAM, SimulatedPerson, Spam, World, play, polluted
from rlhf.records import OVERALL
from rlhf.statistics import paired_interval, wilson_interval
from tests.proofs.label_server import (
    five_hundred_pairs,
    killed_on_postgresql,
    killed_on_sqlite,
    pages,
)
from tests.proofs.runner import PICTURES, hold, prove

_WITHIN = 160
_LOOK_EVERY = 1000
_FIRST_SEED = 200  # of worlds that nothing was chosen by
_RATES = (0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002)


def position(folder: Path) -> dict[str, Any]:
    """In each of 24 worlds (50 assessors, 100 judgements each, R = 3 judges a pair, 5 % ties,
    honest ones right on 80 % of pairs) a project's share of first-shown answers chosen is within
    3 points of what was planted (0.50, 0.53, 0.56 or 0.60), and p is below 0.001 wherever 0.56 or
    more was planted."""
    planted = (0.50, 0.53, 0.56, 0.60)
    errors: list[float] = []
    sure: list[bool] = []
    covered: list[bool] = []
    least_p = 1.0
    for seed in range(24):
        share = planted[seed % len(planted)]
        people = tuple(SimulatedPerson(f"p{at}", position_bias=share - 0.5) for at in range(50))
        found = position_bias(play(World(people, each=100), seed).judgements)
        errors.append(found.share[0] - share)
        covered.append(found.share[1] <= share <= found.share[2])
        if share >= 0.56:
            sure.append(found.p < 0.001)
        if share == 0.50:
            least_p = min(least_p, found.p)
    largest = max(map(abs, errors))
    figures = {
        "worlds": len(errors),
        "largest error, points": 100 * largest,
        "mean error, points": 100 * statistics.fmean(errors),
        "planted share inside the 95 % interval, worlds": sum(covered),
        "p < 0.001 where 0.56 or 0.60 was planted, worlds": f"{sum(sure)} of {len(sure)}",
        "least p of the six worlds without bias": least_p,
    }
    return hold({"within 3 points": largest <= 0.03, "0.56 is told": all(sure)}, figures)


def pausing_three(folder: Path) -> dict[str, Any]:
    """R = 3 judges a pair, 10 worlds: 200 assessors, honest ones right on 92 % of honeypots and
    80 % of pairs (of verdicts that are no tie; 5 % are, of spammers too); 30 spammers (random,
    first-shown, longest answer, half the time random), ten of them among the 25 who are there from
    the beginning, the others join one every two minutes; 10 % honeypots, 5 % repeats, judged anew.
    Honest ones judge 300 times. At least 95 % of spammers are paused within 160 judgements of their
    own and at most 3 % of honest ones ever, looked at every 1000 judgements of the pool."""
    return _pausing(folder, 3, 10, picture=True)


def pausing_five(folder: Path) -> dict[str, Any]:
    """The same with R = 5 judges a pair, 10 worlds."""
    return _pausing(folder, 5, 10, picture=True)


def _pausing(folder: Path, judges: int, worlds: int, *, picture: bool) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    played: list[dict[str, Any]] = []
    for seed in range(_FIRST_SEED, _FIRST_SEED + worlds):
        path = folder / f"world-{seed}.json"
        if not path.is_file():
            path.write_text(json.dumps(_paused_world(judges, seed)) + "\n")
        played.append(json.loads(path.read_text()))
        print(f"R = {judges}, world {seed}", flush=True)
    kinds = {
        kind: [row for w in played for row in w.values() if row["kind"] == kind]
        for kind in ("honest", *SPAM)
    }
    spammers = [row for kind in SPAM for row in kinds[kind]]
    caught = _share([row["paused"] is not None and row["paused"] <= _WITHIN for row in spammers])
    wrongly = _share([row["paused"] is not None for row in kinds["honest"]])
    figures: dict[str, Any] = {
        "spammers paused within 160": _told(caught, len(spammers)),
        "honest ever paused": _told(wrongly, len(kinds["honest"])),
    }
    for kind in SPAM:
        rows = kinds[kind]
        when = sorted(row["paused"] for row in rows if row["paused"] is not None)
        within = _share([row["paused"] is not None and row["paused"] <= _WITHIN for row in rows])
        figures[f"{kind}, paused within 160"] = (
            f"{_told(within, len(rows))}; median after {statistics.median(when):g} judgements"
        )
    curve = []
    for rate in _RATES:
        bar = -math.log(rate)
        hit = _share([row["within"] >= bar for row in spammers])
        false = _share([row["ever"] >= bar for row in kinds["honest"]])
        curve.append((rate, hit, false))
        figures[f"at a threshold of 1 / {rate:g}"] = (
            f"{hit[0]:.1%} of spammers within 160, {false[0]:.2%} of honest ones ever"
        )
    (folder / "curve.json").write_text(json.dumps([[r, h[0], f[0]] for r, h, f in curve]) + "\n")
    if picture:
        _draw(folder.parent)
    bars = {"95 % of spammers": caught[0] >= 0.95, "3 % of honest ones": wrongly[0] <= 0.03}
    return hold(bars, figures)


def _paused_world(judges: int, seed: int) -> dict[str, Any]:
    """For each assessor their kind, after how many judgements they were paused, and the largest log
    evidence that any look saw, within 160 of their judgements and ever. Paused assessors judge on
    unheard, for the other thresholds."""
    world = polluted(seed, judges=judges)
    rows: dict[str, dict[str, Any]] = {
        person.name: {"kind": person.spam or "honest", "within": -math.inf, "ever": -math.inf}
        for person in world.people
    }

    def pause(judgements: Sequence[Judgement], paused: frozenset[str]) -> list[str]:
        found = attention(judgements, uncounted=paused)
        for name, one in found.items():
            row = rows[name]
            row["ever"] = max(row["ever"], one.log_evidence)
            if one.judgements <= _WITHIN:
                row["within"] = max(row["within"], one.log_evidence)
        return [name for name, one in found.items() if one.state == "paused"]

    played = play(world, seed, pause=pause, look_every=_LOOK_EVERY, go_on=True)
    return {name: row | {"paused": played.paused.get(name)} for name, row in rows.items()}


def _draw(folder: Path) -> None:
    """The trade-off of every R that has been measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, title in (("pausing_three", "R = 3"), ("pausing_five", "R = 5")):
        path = folder / name / "curve.json"
        if not path.is_file():
            continue
        rows = json.loads(path.read_text())
        axes.plot([100 * row[2] for row in rows], [100 * row[1] for row in rows], "o-", label=title)
        for rate, hit, false in rows:
            if rate == FALSE_PAUSE_RATE:
                axes.annotate(
                    "default", (100 * false, 100 * hit), textcoords="offset points", xytext=(6, -12)
                )
    axes.axhline(95, color="grey", linewidth=0.8, linestyle=":")
    axes.axvline(3, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("honest assessors ever paused, %")
    axes.set_ylabel("spammers paused within 160 judgements, %")
    axes.set_title("Thresholds from 1 / 0.2 to 1 / 0.002; dotted: what is asked", fontsize=10)
    axes.legend()
    figure.tight_layout()
    picture = PICTURES / "label_pausing.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def tired(folder: Path) -> dict[str, Any]:
    """5 worlds of 100 assessors, half of whom tire: from an onset uniform in 60..160 of a shift of
    200 judgements accuracy is 0.20 lower and time 40 % shorter. It is everybody's first shift: time
    is 50 % longer at first and wears off with 25 judgements; log-normal spread 0.5 within and 0.4
    between assessors, R = 3, right on 92 % of honeypots (10 %) and 80 % of pairs. Fatigue is found
    within 30 judgements after the onset in at least 80 % of tired shifts, and in at most 5 % of
    shifts without."""
    delays: list[int] = []
    errors: list[int] = []
    early = missed = false = rested = 0
    for seed in range(5):
        draw = random.Random(seed)
        people = tuple(
            SimulatedPerson(
                f"p{at}",
                seconds=30 * math.exp(draw.gauss(0, 0.4)),
                fatigue_onset=draw.randint(60, 160) if at % 2 else None,
            )
            for at in range(100)
        )
        found = {
            window.assessor: window
            for window in fatigue(play(World(people, each=200), seed).judgements)
        }
        for person in people:
            window = found.get(person.name)
            if person.fatigue_onset is None:
                rested += 1
                false += window is not None
            elif window is None:
                missed += 1
            elif window.found_number < person.fatigue_onset:
                early += 1
            else:
                delays.append(window.found_number - person.fatigue_onset)
                errors.append(window.onset_number - person.fatigue_onset)
    shifts = len(delays) + missed + early
    soon = wilson_interval(sum(delay <= 30 for delay in delays), shifts)
    alarms = wilson_interval(false, rested)
    figures = {
        "found within 30 judgements": _told(soon, shifts),
        "false breaks in shifts without": _told(alarms, rested),
        "found before the onset (counted as not found)": early,
        "not found": missed,
        "delay, judgements, at 10, 25, 50, 75, 90 % of those found": _quantiles(delays),
        "onset estimate less onset, at 10, 25, 50, 75, 90 %": _quantiles(errors),
    }
    return hold({"80 % within 30": soon[0] >= 0.80, "5 % false": alarms[0] <= 0.05}, figures)


def aggregated(folder: Path) -> dict[str, Any]:
    """24 worlds of 40 assessors, 100 judgements each, one in four bad (random, first-shown, longest
    or half the time random), nobody paused, 10 % honeypots: labels by Dawid & Skene with the
    honeypots known are right more often than those by majority (ties between answers and pairs
    without a decided verdict count half), with R = 3 and with R = 5; the paired 95 % interval over
    worlds is above 0."""
    figures: dict[str, Any] = {}
    bars: dict[str, bool] = {}
    for judges in (3, 5):
        gains, ours, theirs = [], [], []
        for seed in range(24):
            skilled, counted = _label_accuracies(judges, seed)
            gains.append(skilled - counted)
            ours.append(skilled)
            theirs.append(counted)
        mean, low, high = paired_interval(gains)
        figures[f"R = {judges}"] = (
            f"{statistics.fmean(ours):.3f} against {statistics.fmean(theirs):.3f} by majority: "
            f"{100 * mean:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
        )
        bars[f"better with R = {judges}"] = low > 0
    return hold(bars, figures)


def _label_accuracies(judges: int, seed: int) -> tuple[float, float]:
    """Share of pairs labelled rightly: by Dawid & Skene, by majority."""
    kinds: list[Spam | None] = [SPAM[at // 4 % 4] if at % 4 == 0 else None for at in range(40)]
    people = tuple(replace(SimulatedPerson(f"p{at}"), spam=kind) for at, kind in enumerate(kinds))
    played = play(World(people, each=100, judges=judges), seed)
    firsts = [row for row in played.judgements if not row.repeat]
    votes = [Vote(row.pair, row.assessor, row.verdicts[OVERALL]) for row in firsts]
    known = {row.pair: row.truth for row in firsts if row.truth is not None}
    classes = ("a", "b", "tie")
    found = dawid_skene(votes, classes, known=known)
    counts = majority(votes, classes)
    pairs = {row.pair for row in firsts} - known.keys()

    def right(shares: Any, pair: str) -> float:
        a, b = shares[pair][0], shares[pair][1]
        return 0.5 if a == b else float((a > b) == (played.truths[pair] == "a"))

    return tuple(  # type: ignore[return-value]
        statistics.fmean(right(shares, pair) for pair in sorted(pairs))
        for shares in (found.posteriors, counts)
    )


def _share(found: Sequence[bool]) -> tuple[float, float, float]:
    return wilson_interval(sum(found), len(found))


def _told(share: tuple[float, float, float], count: int) -> str:
    return f"{share[0]:.1%} ({share[1]:.1%} to {share[2]:.1%}) of {count}"


def _quantiles(values: Sequence[int]) -> list[int]:
    ordered = sorted(values)
    return [ordered[int(share * len(ordered))] for share in (0.1, 0.25, 0.5, 0.75, 0.9)]


PROOFS = [
    *(position, tired, aggregated, pausing_three, pausing_five),
    *(pages, five_hundred_pairs, killed_on_sqlite, killed_on_postgresql),
]


if __name__ == "__main__":
    sys.exit(prove("labelling", PROOFS, sys.argv[1:]))
