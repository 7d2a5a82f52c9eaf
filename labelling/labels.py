"""From what several assessors said of each pair to one soft label a pair, by one of three methods.

| method          | a pair's label                                                                 |
|-----------------|--------------------------------------------------------------------------------|
| `dawid-skene`   | the posterior, with everybody's confusions learned; honeypots hold them        |
| `majority`      | the share of those who preferred answer a, ties as half                        |
| `bradley-terry` | by the scores of the answers, with everybody's reliability learned: it carries |
|                 | over from pair to pair where answers were in several                           |

The weight is the share of the judges wanted who judged it, at most 1, less the probability that
both answers are bad: such a pair says little of which is better.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Literal

from labelling.aggregation import Vote, dawid_skene, majority
from labelling.comparison import Comparison
from labelling.ranking import crowd_bradley_terry
from labelling.records import PREFERS_A, VERDICTS, Judgement, Kind, SoftLabel
from rlhf.records import OVERALL

Method = Literal["dawid-skene", "majority", "bradley-terry"]
METHODS: tuple[Method, ...] = ("dawid-skene", "majority", "bradley-terry")


def counted(
    judgements: Sequence[Judgement], kind: Kind = "person", criterion: str = OVERALL
) -> list[Judgement]:
    """Those that labels are made from: of one kind of assessor, by one criterion, not in doubt, and
    no second look."""
    return [
        each
        for each in judgements
        if each.kind == kind and criterion in each.verdicts and not each.doubt and not each.repeat
    ]


def soft_labels(
    judgements: Sequence[Judgement],
    method: Method,
    *,
    judges_wanted: int,
    kind: Kind = "person",
    criterion: str = OVERALL,
) -> dict[str, SoftLabel]:
    """A label for every judged pair that is no honeypot."""
    given = counted(judgements, kind, criterion)
    work = [each for each in given if each.truth is None]
    if not work:
        return {}
    counts: dict[str, int] = defaultdict(int)
    for each in work:
        counts[each.pair] += 1
    votes = [Vote(each.pair, each.assessor, each.verdicts[criterion]) for each in given]
    if method == "dawid-skene":
        known: dict[Hashable, Hashable] = {
            each.pair: each.truth for each in given if each.truth and criterion == OVERALL
        }
        shares = dawid_skene(votes, VERDICTS, known=known).posteriors
    else:
        shares = majority(votes, VERDICTS)
    if method == "bradley-terry":
        preferred = _by_scores(given, criterion)
    else:
        preferred = {
            pair: sum(p * PREFERS_A[name] for p, name in zip(shares[pair], VERDICTS, strict=True))
            for pair in counts
        }
    bad = VERDICTS.index("bad")
    return {
        pair: SoftLabel(
            min(1.0, max(0.0, float(preferred[pair]))),
            min(1.0, count / judges_wanted) * (1 - float(shares[pair][bad])),
            count,
        )
        for pair, count in counts.items()
    }


def _by_scores(judgements: Sequence[Judgement], criterion: str) -> dict[str, float]:
    """Answers are one item in all pairs that they stand in."""
    items: dict[str, tuple[str, str]] = {}
    for each in judgements:
        if each.work is None:
            items[each.pair] = (f"{each.pair} a", f"{each.pair} b")
        else:
            prompt = repr(each.work.prompt)
            items[each.pair] = (
                f"{prompt} {each.work.a!r}",
                f"{prompt} {each.work.b!r}",
            )
    ranking = crowd_bradley_terry(
        [
            Comparison(*items[each.pair], PREFERS_A[each.verdicts[criterion]], each.assessor)
            for each in judgements
        ]
    )
    return {pair: ranking.probability(*both) for pair, both in items.items()}
