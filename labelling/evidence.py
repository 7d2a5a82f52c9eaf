"""Whether judges prefer one version of the assistant to another, and who they are.

A policy looks good to the reward model that it was trained against, by construction (Goodhart). So
that model's word, and that of any from which it was refreshed, is no evidence for it. Verdicts of
people are; so are those of a reward model that took no part, and they are marked as such. Those of
simulated assessors never are. Only direct comparisons count: what a third version was worth says
nothing about these two.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from labelling.comparison import Comparison, Record, WinMatrix, majorities
from labelling.labels import counted
from labelling.records import Judgement, Kind
from rlhf.errors import PromotionError
from rlhf.records import OVERALL

LEVEL = 0.05
_JUDGE = re.compile(r"reward-model .*@([\w.-]+)( \d+)?")


@dataclass(frozen=True, slots=True)
class Evidence:
    """How the new version did against the one before it: a pair counts once, by its majority."""

    kind: Kind
    record: Record
    judgements: int
    judges: int
    left_out: int
    """Judgements by models that took part in its training, or that do not say which they are."""
    criteria: dict[str, Record] = field(default_factory=dict)
    """How it did by the other criteria that were asked; they decide nothing."""

    @property
    def sure(self) -> bool:
        """Whether the new version is the better one: an equal one is *ever* taken for it with a
        chance of at most `LEVEL`, however often one looks."""
        return _sure(self.record)

    @property
    def sentence(self) -> str:
        """For people."""
        if not self.record.count:
            return "nobody has compared it with the version that is served" + self._left_out
        share, low, high = self.record.share
        return (
            f"preferred in {share:.0%} [{low:.0%}, {high:.0%}] of {self.record.count} pairs "
            f"({self.record.wins} to {self.record.losses}, p = {self.record.p:.3g}); "
            f"{_CALLED[self.kind]}: {self.judges}{self._left_out}"
            + "".join(_by_criterion(*each) for each in self.criteria.items())
        )

    @property
    def _left_out(self) -> str:
        if not self.left_out:
            return ""
        return f" ({self.left_out} judgements by models that are not independent do not count)"


_CALLED: dict[Kind, str] = {
    "person": "people who judged",
    "model": "reward models that judged and took no part in its training",
}


def judge_name(folder: str, version: str) -> str:
    """What a reward model is called as an assessor."""
    return f"reward-model {folder}"[:60] + f"@{version[:16]}"


def direct_evidence(
    judgements: Sequence[Judgement],
    new: str,
    before: str,
    kind: Kind,
    trained_by: Collection[str] | None = None,
) -> Evidence:
    """What judges of one kind say of two versions (`Answer.checkpoint`).

    Args:
        judgements: a project's, with their work.
        trained_by: versions of the reward models that took part in training the new one; None
            where that is not known, and then no model is independent.

    Raises:
        PromotionError: simulated assessors are no evidence.
    """
    if kind == "simulated":
        raise PromotionError("simulated assessors are no evidence; let people compare the versions")
    found = [
        each
        for each in counted(judgements, kind)
        if each.truth is None and {new, before} == set(_versions(each))
    ]
    used = [each for each in found if kind == "person" or _independent(each.assessor, trained_by)]

    def record(criterion: str) -> Record:
        said = majorities(used, _versions, criterion)
        return WinMatrix(Comparison(*versions, outcome) for versions, outcome in said).record(
            new, before
        )

    judges = len({each.assessor for each in used})
    others = sorted({name for each in used for name in each.verdicts} - {OVERALL})
    criteria = {name: record(name) for name in others}
    return Evidence(kind, record(OVERALL), len(used), judges, len(found) - len(used), criteria)


def _sure(record: Record) -> bool:
    return record.wins > record.losses and record.p <= LEVEL


def _by_criterion(name: str, record: Record) -> str:
    warning = " (warning: surely worse)" if _sure(record.reversed) else ""
    return f"; {name}: {record.wins} to {record.losses}{warning}"


def _versions(judgement: Judgement) -> tuple[str, str]:
    work = judgement.work
    return ("", "") if work is None else (work.a.checkpoint, work.b.checkpoint)


def _independent(assessor: str, trained_by: Collection[str] | None) -> bool:
    named = _JUDGE.fullmatch(assessor)
    if named is None or trained_by is None:
        return False
    return not any(version.startswith(named.group(1)) for version in trained_by)
