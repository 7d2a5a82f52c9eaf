"""One verdict from several people who are not equally good.

Majority counts everybody alike. Dawid & Skene (1979), Maximum Likelihood Estimation of Observer
Error-Rates Using the EM Algorithm, section 3, learn from the verdicts alone how often each assessor
says what where the truth is what, and weigh them by it; a spammer's verdicts, the same whatever the
truth, then weigh nothing, and one who has it backwards counts the other way round.

Shapes: U units, A assessors, C classes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Vote:
    """What an assessor said of a unit."""

    unit: Hashable
    assessor: Hashable
    verdict: Hashable


@dataclass(frozen=True, slots=True)
class Aggregate:
    """For every unit a probability for each class; for every assessor and true class the
    probabilities of what is said; how common each class is."""

    classes: tuple[Hashable, ...]
    posteriors: Mapping[Hashable, Array]
    confusion: Mapping[Hashable, Array]
    prevalence: Array
    log_likelihood: float

    def verdict(self, unit: Hashable) -> Hashable:
        """The most probable class; of equal ones the first."""
        return self.classes[int(np.argmax(self.posteriors[unit]))]


def majority(votes: Sequence[Vote], classes: Sequence[Hashable]) -> dict[Hashable, Array]:
    """The share of each class among a unit's verdicts."""
    place = {name: at for at, name in enumerate(classes)}
    counts: dict[Hashable, Array] = {}
    for vote in votes:
        counts.setdefault(vote.unit, np.zeros(len(classes)))[place[vote.verdict]] += 1
    return {unit: count / count.sum() for unit, count in counts.items()}


def dawid_skene(
    votes: Sequence[Vote],
    classes: Sequence[Hashable],
    *,
    known: Mapping[Hashable, Hashable] | None = None,
    smoothing: float = 1.0,
    tolerance: float = 1e-6,
    iterations: int = 200,
) -> Aggregate:
    """The most probable error rates and truths, by expectation maximisation from the majority.

    Args:
        known: units whose truth is given (honeypots): they hold the error rates to it.
        smoothing: verdicts that every assessor is taken to have given beforehand for every true
            class, shared out evenly but for one more on the truth; keeps few verdicts from making
            somebody certain.

    Raises:
        ValueError: there are no votes, or a verdict or truth is no class.
    """
    if not votes:
        raise ValueError("there are no votes to aggregate")
    place = {name: at for at, name in enumerate(classes)}
    known = known or {}
    said = {vote.verdict for vote in votes} | set(known.values())
    if strange := sorted(map(str, said - place.keys())):
        raise ValueError(f"{strange[0]!r} is none of the classes {list(classes)}")
    units = list(dict.fromkeys(vote.unit for vote in votes))
    assessors = list(dict.fromkeys(vote.assessor for vote in votes))
    unit_at = {unit: at for at, unit in enumerate(units)}
    assessor_at = {name: at for at, name in enumerate(assessors)}
    who_V = np.array([assessor_at[vote.assessor] for vote in votes])
    what_V = np.array([place[vote.verdict] for vote in votes])
    where_V = np.array([unit_at[vote.unit] for vote in votes])
    size = len(classes)

    shares = majority(votes, classes)
    truth_UC = np.stack([shares[unit] for unit in units])
    given = {unit_at[unit]: place[name] for unit, name in known.items() if unit in unit_at}
    before = -np.inf
    # Prior verdicts for each true class: one share for every class, and one more for the truth.
    prior_CC = smoothing * (np.ones((size, size)) / size + np.eye(size))
    for _ in range(iterations):
        for at, name in given.items():
            truth_UC[at] = np.eye(size)[name]
        prevalence_C = (truth_UC.sum(axis=0) + 1 / size) / (len(units) + 1)
        counts_ACC = np.tile(prior_CC, (len(assessors), 1, 1))
        # The truth's probability is added to what was said under it.
        for true in range(size):
            np.add.at(counts_ACC[:, true], (who_V, what_V), truth_UC[where_V, true])
        confusion_ACC = counts_ACC / counts_ACC.sum(axis=2, keepdims=True)
        log_UC = np.tile(np.log(prevalence_C), (len(units), 1))
        np.add.at(log_UC, where_V, np.log(confusion_ACC[who_V, :, what_V]))
        top_U1 = log_UC.max(axis=1, keepdims=True)
        weight_UC = np.exp(log_UC - top_U1)
        truth_UC = weight_UC / weight_UC.sum(axis=1, keepdims=True)
        free = [at for at in range(len(units)) if at not in given]
        evidence_U = (top_U1[:, 0] + np.log(weight_UC.sum(axis=1)))[free]
        tied_U = np.array([log_UC[at, name] for at, name in given.items()])
        found = float(evidence_U.sum() + tied_U.sum() + (prior_CC * np.log(confusion_ACC)).sum())
        if found - before < tolerance * max(1.0, abs(found)):
            before = found
            break
        before = found
    for at, name in given.items():
        truth_UC[at] = np.eye(size)[name]
    return Aggregate(
        tuple(classes),
        dict(zip(units, truth_UC, strict=True)),
        dict(zip(assessors, confusion_ACC, strict=True)),
        prevalence_C,
        before,
    )
