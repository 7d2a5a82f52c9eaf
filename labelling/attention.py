"""Who is not reading: a test that may be looked at as often as one likes.

For each assessor the evidence is a likelihood ratio: how probable their verdicts are under ways of
not reading (`labelling.pool.WAYS`, mixed by their weights) over how probable they are of an
attentive assessor, both given what the others said of the same pairs and the truth of honeypots::

    e = sum_k w_k prod_j sum_t P(t | others) P(verdicts_j | t, way k)
        / prod_j sum_t P(t | others) P(verdicts_j | t, attentive)

The others' own probability cancels, so e is the ratio of two probabilities of everything that was
said by everybody. Such a ratio is a martingale of mean 1 for an attentive assessor, also where it
changes because somebody else judges a pair later; so the chance that it *ever* reaches 1 / rate is
at most `rate` (Ville, 1939; Ramdas et al. (2023), Game-Theoretic Statistics and Safe Anytime-Valid
Inference, section 2). Its whole course is rebuilt here from the times of the judgements, verdict
for verdict, and its maximum decides: nothing need be kept between calls.

An assessor is paused whose evidence has reached that, unless by now they are more probably
attentive after all: what others said since may have taken it back.

That holds exactly where the pool's rates are known; they are estimated (`labelling.pool.fit`), and
proofs measure what it comes to. "Attentive" means as good as the pool's attentive assessors:
whoever is as little right as one who reads half of the time looks like one in the end. `spread`
makes allowance for attentive assessors who differ, at a price: in two simulated worlds whose honest
assessors differed by 0.3 in log-odds, 29 of 340 of them were paused with the default of 0.1 (23 of
these were right on less than 0.78 of pairs, not 0.80), and 57 of 60 spammers within 160 judgements;
with 0.3 it was 7 and 55.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from labelling.pool import (
    SPREAD,
    WAYS,
    Columns,
    Floats,
    Pool,
    columns,
    fit,
    pair_evidence,
    repeat_evidence,
)
from labelling.records import Judgement

FALSE_PAUSE_RATE = 0.03
_REVISIONS = 8
"""A pair's verdicts after the eighth no longer revise the evidence of those before."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Whether an assessor reads.

    `log_evidence` is the largest that log e has been, in nats; `way` the most probable way of not
    reading then; `crossed_after` the number of own judgements after which the threshold was
    reached (None where it never was). `attentive` is the posterior probability now that they read.
    """

    assessor: str
    state: Literal["working", "paused"]
    log_evidence: float
    way: str
    judgements: int
    crossed_after: int | None
    attentive: float


def attention(
    judgements: Sequence[Judgement],
    *,
    false_pause_rate: float = FALSE_PAUSE_RATE,
    uncounted: Collection[str] = (),
    spread: float = SPREAD,
) -> dict[str, Attention]:
    """For every assessor whether they are to be paused, from all judgements so far.

    Args:
        judgements: of one kind of assessor; those with a `doubt` are left out.
        false_pause_rate: the chance that an attentive assessor is ever paused.
        uncounted: assessors who have been paused: their verdicts are no evidence on others.
        spread: see `labelling.pool.fit`.

    Raises:
        ValueError: the rate is not between 0 and 1, or the judgements are of several kinds.
    """
    if not 0 < false_pause_rate < 1:
        raise ValueError(f"false_pause_rate {false_pause_rate} outside 0 to 1")
    data = columns(judgements)
    if not data.assessors:
        return {}
    pool = fit(data, uncounted=uncounted, spread=spread)
    return decide(data, pool, false_pause_rate)


def decide(data: Columns, pool: Pool, false_pause_rate: float) -> dict[str, Attention]:
    """The course of every assessor's evidence, and what it comes to."""
    who_E, own_E, evidence_EC = _events(data, pool)
    start_A = np.searchsorted(who_E, np.arange(len(data.assessors)))
    course_EC = np.cumsum(evidence_EC, axis=0)
    before_AC = np.vstack([np.zeros(course_EC.shape[1]), course_EC])[start_A]
    course_EC -= before_AC[who_E]
    nodes = len(pool.attentive_C)
    ways_EK = course_EC[:, nodes:] + np.log(list(WAYS.values()))
    against_E = _log_sum(course_EC[:, :nodes] + np.log(pool.attentive_C))
    log_e_E = _log_sum(ways_EK) - against_E
    count_E = np.cumsum(own_E)
    threshold = -math.log(false_pause_rate)
    attentive_A = pool.attentive_A()
    found: dict[str, Attention] = {}
    for at, name in enumerate(data.assessors):
        end = start_A[at + 1] if at + 1 < len(start_A) else len(who_E)
        mine = slice(start_A[at], end)
        top = int(np.argmax(log_e_E[mine]))
        before = int(count_E[start_A[at]] - own_E[start_A[at]])
        over = np.flatnonzero(log_e_E[mine] >= threshold)
        found[name] = Attention(
            name,
            "paused" if len(over) and attentive_A[at] < 0.5 else "working",
            float(log_e_E[mine][top]),
            list(WAYS)[int(np.argmax(ways_EK[mine][top]))],
            int(count_E[end - 1]) - before,
            int(count_E[mine][over[0]]) - before if len(over) else None,
            float(attentive_A[at]),
        )
    return found


def _events(data: Columns, pool: Pool) -> tuple[Floats, Floats, Floats]:
    """What adds to whose evidence, in the order of time: the assessor, whether it is a judgement of
    their own (or else of somebody on a pair that they have judged), and what it adds (E, C)."""
    again_N, known_N = data.repeat_N, data.truth_N >= 0
    row_N = np.arange(len(data.who_N))
    rows, times, own, added = [], [], [], []

    pots = row_N[known_N]
    told_nC = np.log(pool.tables.honeypot_TVC[data.truth_N[pots], pool.code_N[pots]])
    rows.append(pots)
    times.append(pots)
    own.append(np.ones(len(pots)))
    added.append(np.where(again_N[pots, None], 0.0, told_nC))

    twice = row_N[~known_N & again_N]
    once = data.first_N[twice]
    rows.append(twice)
    times.append(twice)
    own.append(np.ones(len(twice)))
    added.append(
        repeat_evidence(
            pool.tables, pool.rates, pool.a_N[once], pool.code_N[once], pool.code_N[twice]
        )
    )

    # By pair, and within one by time: u is a place in this order, r the place within the pair.
    plain = row_N[~known_N & ~again_N]
    plain = plain[np.argsort(data.pair_N[plain] * len(row_N) + plain)]
    pair_u = data.pair_N[plain]
    start_u = np.searchsorted(pair_u, pair_u, side="left")
    last_u = np.searchsorted(pair_u, pair_u, side="right") - 1
    place_u = np.arange(len(plain)) - start_u
    odds_u = pool.says_N2[plain, 0] - pool.says_N2[plain, 1]
    total_u = np.concatenate([[0.0], np.cumsum(odds_u)])
    before_uC = np.zeros((len(plain), pool.tables.pair_V2C.shape[2]))
    for lag in range(_REVISIONS):
        u = np.arange(len(plain)) if lag == 0 else np.flatnonzero(place_u + lag < _REVISIONS)
        u = u[u + lag <= last_u[u]]
        if not len(u):
            break
        others_u = total_u[u + lag + 1] - total_u[start_u[u]] - odds_u[u] + pool.prior_N[plain[u]]
        a_u = 1 / (1 + np.exp(-np.clip(others_u, -50, 50)))
        now_uC = pair_evidence(pool.tables, a_u, pool.code_N[plain[u]])
        rows.append(plain[u])
        times.append(plain[u + lag])
        own.append(np.full(len(u), float(lag == 0)))
        added.append(now_uC - before_uC[u])
        before_uC[u] = now_uC
    who_E, time_E = data.who_N[np.concatenate(rows)], np.concatenate(times)
    order = np.lexsort((time_E, who_E))
    return who_E[order], np.concatenate(own)[order], np.concatenate(added)[order]


def _log_sum(log_EK: Floats) -> Floats:
    top_E = log_EK.max(axis=1)
    total_E: Floats = top_E + np.log(np.exp(log_EK - top_E[:, None]).sum(axis=1))
    return total_E
