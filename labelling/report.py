"""A project's figures: who judged how well, whether the first answer is favoured, who beats whom.

Verdicts of one kind of assessor at a time. Figures of assessors are of all that they said overall;
those of the project are by one criterion, of what counts: no second looks, no honeypots, nothing in
doubt.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from labelling.agreement import alpha_interval
from labelling.comparison import Comparison, WinMatrix, holm, majorities
from labelling.feedback import reactions
from labelling.labels import counted
from labelling.quality import AssessorQuality, Interval, assessor_quality, position_bias
from labelling.records import Judgement, Kind
from labelling.store import Assessor, Project, Store
from rlhf.config.label import LabelConfig
from rlhf.records import OVERALL

_ASK = 10


def report(
    store: Store,
    of: Project,
    config: LabelConfig,
    kind: Kind = "person",
    criterion: str = OVERALL,
) -> dict[str, Any]:
    """All figures of a project as one JSON object; what is not known is null.

    Raises:
        DataError: the project does not ask about the criterion.
    """
    of.require(criterion)
    found = [each for each in store.judgements(of) if each.kind == kind]
    everybody = [each for each in store.assessors(of) if each.kind == kind]
    work = [each for each in counted(found, kind, criterion) if each.truth is None]
    by_pair: dict[str, list[str]] = defaultdict(list)
    for each in work:
        by_pair[each.pair].append(each.verdicts[criterion])
    alpha, low, high = (
        alpha_interval(list(by_pair.values()), config.seed) if work else (math.nan,) * 3
    )
    bias = position_bias(found, criterion)
    return {
        "project": of.name,
        "kind": kind,
        "criterion": criterion,
        "judgements": len(found),
        "doubted": sum(bool(each.doubt) for each in found),
        "progress": store.counts(of, kind),
        "agreement": _known(_agreement(by_pair.values())),
        "alpha": _known(alpha),
        "alpha_low": _known(low),
        "alpha_high": _known(high),
        "position_bias": {
            **_interval(bias.share),
            "p": bias.p if bias.decided else None,
            "count": bias.decided,
        },
        "assessors": assessor_figures(found, everybody),
        "reactions": reactions(store, of, kind),
        **compared(work, criterion),
    }


def assessor_figures(
    judgements: Sequence[Judgement], whose: Sequence[Assessor]
) -> list[dict[str, Any]]:
    """The figures of assessors, in the order given. `judgements` are a project's."""
    by_kind: dict[Kind, list[Judgement]] = defaultdict(list)
    for each in judgements:
        by_kind[each.kind].append(each)
    known = {kind: assessor_quality(mine) for kind, mine in by_kind.items()}
    return [
        _figures(who, known.get(who.kind, {}).get(who.name), by_kind[who.kind]) for who in whose
    ]


def _figures(
    who: Assessor, found: AssessorQuality | None, judgements: Sequence[Judgement]
) -> dict[str, Any]:
    """What is known of one assessor. Those whose judgements are all in doubt have no figures."""
    nothing: Interval = (math.nan, 0.0, 1.0)
    honeypot = found.honeypots if found else nothing
    return {
        "id": who.name,
        "key": who.id,
        "kind": who.kind,
        "state": who.state,
        "reason": who.reason,
        "judgements": sum(each.assessor == who.name for each in judgements),
        "counted": found.judgements if found else 0,
        "honeypot_accuracy": _known(honeypot[0]),
        "honeypot": _interval(honeypot),
        "consistency": _interval(found.consistency if found else nothing),
        "agreement": _interval(found.agreement if found else nothing),
        "first_shown": _interval(found.position.share if found else nothing),
        "seconds": _interval(found.seconds if found else (math.nan, -math.inf, math.inf)),
    }


def _agreement(units: Iterable[Sequence[str]]) -> float:
    """The share of pairs of judges of the same thing who say the same; nan where there are none."""
    same = total = 0
    for verdicts in units:
        counts = Counter(verdicts)
        total += math.comb(counts.total(), 2)
        same += sum(math.comb(count, 2) for count in counts.values())
    return same / total if total else math.nan


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(found: Interval) -> dict[str, float | None]:
    value, low, high = map(_known, found)
    return {"share": value, "low": low, "high": high}


def compared(judgements: Sequence[Judgement], criterion: str = OVERALL) -> dict[str, Any]:
    """Models by direct comparison, by one criterion: matrix, winner or cycles, what to ask next.

    Judges of one pair are not independent of each other: a pair counts once, by its majority.
    """
    matrix = WinMatrix(
        Comparison(*models, outcome)
        for models, outcome in majorities(judgements, lambda each: each.models, criterion)
    )
    records = {
        (one, other): matrix.record(one, other)
        for one in matrix.models
        for other in matrix.models
        if one != other and matrix.record(one, other).count
    }
    decided = {pair: each.p for pair, each in records.items() if each.wins + each.losses}
    adjusted = holm({pair: p for pair, p in decided.items() if pair[0] < pair[1]})
    sure = matrix.surely_beats()
    table: dict[str, dict[str, Any]] = {model: {} for model in matrix.models}
    for (one, other), record in records.items():
        share, low, high = record.share
        table[one][other] = {
            "wins": record.wins,
            "losses": record.losses,
            "ties": record.ties,
            "share": share,
            "low": low,
            "high": high,
            "p": adjusted.get((min(one, other), max(one, other))),
        }
    return {
        "win_matrix": table,
        "condorcet_winner": matrix.condorcet_winner() if len(matrix.models) > 1 else None,
        "sure_winner": next(
            (
                model
                for model in matrix.models
                if all((model, other) in sure for other in matrix.models if other != model)
                and len(matrix.models) > 1
            ),
            None,
        ),
        "smith_set": matrix.smith_set() if len(matrix.models) > 1 else [],
        "cycles": matrix.cycles(),
        "sure_cycles": matrix.cycles(sure=True),
        "ask_next": [
            {"one": one, "other": other, "bits": bits} for bits, one, other in matrix.ask_next()
        ][:_ASK],
    }
