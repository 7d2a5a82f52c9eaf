"""What a pool of assessors says of the pairs and of each other: who reads, and what is true.

Every assessor is attentive or has one of the ways of not reading in `WAYS`. Attentive ones are
right on a honeypot with probability p0 and on another pair with q0, whatever the pair (the one-coin
model of Dawid & Skene, 1979), lean towards the first answer by as much as the pool does, and say
tie or bad as often as the pool. Those who do not read say what their way says, whatever the truth.
Expectation maximisation finds the truths, the ways and p0, q0 together. Honeypots and the ways'
marks (always the first, the longest) tell who reads before anybody's agreement does; that is what
holds the estimate while two in five do not read. Better answers are often the longer ones: how
often is found too, lest who prefers them for being better looks like one who does not read.

A pair's truth is answer a or b; ties are taken to say nothing of it.

Shapes: N judgements that are no repeats, A assessors, P pairs, C classes (the attentive ones, then
`WAYS`), V codes of what was said of what was shown, T truths.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labelling.records import VERDICTS, Judgement
from rlhf.records import OVERALL

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WAYS: dict[str, float] = {
    "reads only half of the time": 0.7,
    "chooses at random": 0.05,
    "chooses the answer shown first": 0.05,
    "chooses the answer shown second": 0.05,
    "chooses the longest answer": 0.05,
    "chooses the shortest answer": 0.05,
    "always says tie": 0.05,
}
"""Ways of not reading and their weights: most for the one that is hardest to tell. What a mark
gives away in a few verdicts can spare a factor of twenty."""

SPREAD = 0.1
"""Standard deviation of attentive assessors' log-odds to be right: about 0.80 most are within 0.78
and 0.82. People who differ more want more (docs/labelling.md)."""

_LAPSE = 0.05  # of those with a mark: they sometimes do otherwise
_ROUNDS = 40
_DECIDED = 2  # verdicts below this are a or b
_SIDES = 3  # a, b, not known
# What is taken to have been seen before anything was: (right, wrong) and the like.
_PRIOR_HONEYPOT = (9.0, 1.0)
_PRIOR_PAIR = (8.0, 2.0)
_PRIOR_SHARES = 20.0
_ATTENTIVE = 0.8


@dataclass(frozen=True, slots=True)
class Columns:
    """Judgements as arrays, in the order of time; `place_N` is where each stood in the sequence.

    `side_N` and `longer_N` are the first and the longer answer: 0 a, 1 b, 2 not known or neither.
    `truth_N` is -1 where it is not known. `first_N` is the row of the assessor's first judgement of
    the pair: another one is a repeat.
    """

    assessors: tuple[str, ...]
    who_N: Ints
    pair_N: Ints
    verdict_N: Ints
    side_N: Ints
    longer_N: Ints
    truth_N: Ints
    first_N: Ints
    place_N: Ints
    pairs: int

    @property
    def repeat_N(self) -> NDArray[np.bool_]:
        """Whether the assessor had judged the pair before."""
        again_N: NDArray[np.bool_] = self.first_N != np.arange(len(self.who_N))
        return again_N


def columns(judgements: Sequence[Judgement]) -> Columns:
    """Judgements that count (no `doubt`), as arrays.

    Raises:
        ValueError: some are of people and some of something else.
    """
    if len(kinds := {judgement.kind for judgement in judgements}) > 1:
        raise ValueError(f"judgements of kinds {sorted(kinds)}: one kind at a time")
    side = {"a": 0, "b": 1, "": 2}
    code: dict[Any, int] = {verdict: at for at, verdict in enumerate(VERDICTS)} | {None: -1}
    kept = [at for at, judgement in enumerate(judgements) if not judgement.doubt]
    kept.sort(key=lambda at: judgements[at].at)  # stable: of equal times the first given
    rows = [judgements[at] for at in kept]
    who: dict[str, int] = {}
    pair: dict[str, int] = {}
    seen: dict[tuple[int, int], int] = {}
    who_N = [who.setdefault(row.assessor, len(who)) for row in rows]
    pair_N = [pair.setdefault(row.pair, len(pair)) for row in rows]
    units = zip(who_N, pair_N, strict=True)
    return Columns(
        tuple(who),
        np.array(who_N, np.int64),
        np.array(pair_N, np.int64),
        np.array([code[row.verdicts[OVERALL]] for row in rows], np.int64),
        np.array([side[row.first] for row in rows], np.int64),
        np.array(
            [
                2 if row.words[0] == row.words[1] else int(row.words[1] > row.words[0])
                for row in rows
            ],
            np.int64,
        ),
        np.array([code[row.truth] for row in rows], np.int64),
        np.array([seen.setdefault(unit, at) for at, unit in enumerate(units)], np.int64),
        np.array(kept, np.int64),
        len(pair),
    )


@dataclass(frozen=True, slots=True)
class Rates:
    """How attentive assessors judge: right on honeypots and on pairs, `lean` above one half that
    the first answer is chosen, shares of tie and bad, share of undecided among what is wrong on
    honeypots, chance that a second look repeats the first beyond what the truth makes it; and the
    share of pairs whose better answer is the longer one."""

    honeypot: float = 0.9
    pair: float = 0.75
    lean: float = 0.0
    tie: float = 0.05
    bad: float = 0.01
    undecided: float = 0.1
    persistence: float = 0.0
    longer: float = 0.5


@dataclass(frozen=True, slots=True)
class Tables:
    """Probabilities of every code of `Pool`: for pairs by truth (V, 2, C), for honeypots (T, V, C).
    The first `attentive` classes are attentive, the others `WAYS`."""

    pair_V2C: Floats
    honeypot_TVC: Floats


@dataclass(frozen=True, slots=True)
class Pool:
    """The fitted pool. `class_AC` are probabilities of what each assessor is; `prior_N` the
    log-odds that answer a is the better before anything was said (longer ones often are); `a_N` the
    probability that it is by that and the others' verdicts; `says_N2` the log-likelihood of
    what was said if a is, and if b is (0 where it does not count)."""

    rates: Rates
    tables: Tables
    class_AC: Floats
    prior_N: Floats
    a_N: Floats
    says_N2: Floats
    code_N: Ints
    attentive_C: Floats

    def attentive_A(self) -> Floats:
        """The probability that each assessor reads."""
        share_A: Floats = self.class_AC[:, : len(self.attentive_C)].sum(axis=1)
        return share_A


def fit(data: Columns, *, uncounted: Collection[str] = (), spread: float = SPREAD) -> Pool:
    """Truths, ways and rates by expectation maximisation.

    Args:
        uncounted: assessors whose verdicts say nothing of the truths and the rates (paused ones);
            their own ways are found all the same.
        spread: standard deviation, in log-odds, of attentive assessors' chances to be right. With
            0 they are all alike.
    """
    size = len(data.assessors)
    counted_A = np.array([name not in uncounted for name in data.assessors], dtype=float)
    code_N = (data.verdict_N * _SIDES + data.side_N) * _SIDES + data.longer_N
    node_Z = np.array([0.0]) if spread == 0 else np.array([-1.73, 0.0, 1.73]) * spread
    share_Z = np.array([1.0]) if spread == 0 else np.array([1.0, 4.0, 1.0]) / 6
    attentive = len(node_Z)
    prior_C = np.concatenate(
        [_ATTENTIVE * share_Z, (1 - _ATTENTIVE) * np.array(list(WAYS.values()))]
    )
    share_C, class_AC = prior_C, np.tile(prior_C, (size, 1))

    known_N, again_N = data.truth_N >= 0, data.repeat_N
    known = _rows(data)
    pair_n, pot_n = known.plain, known.pots
    twice_n = np.flatnonzero(~known_N & again_N)
    once_n = data.first_N[twice_n]
    who_p, at_p, code_p = data.who_N[pair_n], data.pair_N[pair_n], code_N[pair_n]
    rates = Rates()
    a_N, prior_N = np.full(len(code_N), 0.5), np.zeros(len(code_N))
    says_N2 = np.zeros((len(code_N), 2))
    for _ in range(_ROUNDS):
        tables = tables_of(rates, node_Z)
        # What each is expected to say, given all that they may be.
        say_AV2 = np.log(np.einsum("ac,vtc->avt", class_AC, tables.pair_V2C))
        says_p2 = say_AV2[who_p, code_p] * counted_A[who_p, None]
        odds_p = says_p2[:, 0] - says_p2[:, 1]
        prior_N = _toward_a(data, rates.longer)
        total_p = np.bincount(at_p, odds_p, data.pairs)[at_p] + prior_N[pair_n]
        a_p = _sigmoid(total_p - odds_p)
        a_N[pair_n], says_N2[pair_n] = a_p, says_p2
        a_N[twice_n] = a_N[once_n]
        log_nC = np.empty((len(code_N), len(prior_C)))
        log_nC[pair_n] = pair_evidence(tables, a_p, code_p)
        log_nC[pot_n] = np.log(tables.honeypot_TVC[data.truth_N[pot_n], code_N[pot_n]])
        log_nC[twice_n] = repeat_evidence(
            tables, rates, a_N[once_n], code_N[once_n], code_N[twice_n]
        )
        log_nC[known_N & again_N] = 0
        score_AC = np.stack([np.bincount(data.who_N, column, size) for column in log_nC.T], axis=1)
        before, class_AC = class_AC, _softmax(score_AC + np.log(share_C))
        weight_A = class_AC[:, :attentive].sum(axis=1) * counted_A
        rates = replace(
            _rates(data, known, weight_A, tables, a_N, code_N),
            longer=_longer(data, pair_n, _sigmoid(total_p)),
        )
        seen_C = prior_C * _PRIOR_SHARES + counted_A @ class_AC
        seen_C[:attentive] = seen_C[:attentive].sum() * share_Z
        share_C = seen_C / seen_C.sum()
        # Which attentive one somebody is settles slowly and changes little.
        moved_AC = class_AC - before
        read_A = np.abs(moved_AC[:, :attentive].sum(axis=1)).max()
        if max(read_A, np.abs(moved_AC[:, attentive:]).max()) < 2e-3:
            break
    tables = tables_of(rates, node_Z)
    return Pool(rates, tables, class_AC, prior_N, a_N, says_N2, code_N, share_Z)


def _sigmoid(odds_n: Floats) -> Floats:
    chance_n: Floats = 1 / (1 + np.exp(-np.clip(odds_n, -50, 50)))
    return chance_n


def _toward_a(data: Columns, longer: float) -> Floats:
    """Log-odds that a is the better, where the longer answer is with the chance `longer`."""
    odds = np.log(longer / (1 - longer))
    toward_N: Floats = np.array([odds, -odds, 0.0])[data.longer_N]
    return toward_N


def _longer(data: Columns, pair_n: Ints, a_n: Floats) -> float:
    """The share of pairs whose better answer is the longer one; a verdict stands for its pair, so
    that those judged more often count more."""
    told = data.longer_N[pair_n] < 2
    is_longer_n = np.where(data.longer_N[pair_n] == 0, a_n, 1 - a_n)[told]
    share = (float(is_longer_n.sum()) + _PRIOR_SHARES / 2) / (told.sum() + _PRIOR_SHARES)
    return float(np.clip(share, 0.05, 0.95))


def pair_evidence(tables: Tables, a_n: Floats, code_n: Ints) -> Floats:
    """Log-likelihood (n, C) of what was said of pairs whose truth is a with probability `a_n`."""
    table_V2C = tables.pair_V2C
    mixed_nC = table_V2C[code_n, 1] + a_n[:, None] * (table_V2C[code_n, 0] - table_V2C[code_n, 1])
    evidence_nC: Floats = np.log(mixed_nC)
    return evidence_nC


def repeat_evidence(
    tables: Tables, rates: Rates, a_n: Floats, once_n: Ints, twice_n: Ints
) -> Floats:
    """Log-likelihood (n, C) of what was said at the second look, given the first.

    An attentive assessor says the same again with the pool's persistence, and else judges anew.
    """
    table_V2C = tables.pair_V2C
    half = attentive = table_V2C.shape[2] - len(WAYS)
    same_n = (once_n // _SIDES**2 == twice_n // _SIDES**2).astype(float)
    truth_n2 = np.stack([a_n, 1 - a_n], axis=1)
    again_n2C = table_V2C[twice_n].copy()
    kept_n2C = (
        rates.persistence * same_n[:, None, None]
        + (1 - rates.persistence) * again_n2C[:, :, :attentive]
    )
    # Half of the first looks of one who reads half of the time were no look.
    chance = table_V2C[twice_n][:, :, half + 1]
    middle = attentive // 2
    read_n2 = 0.5 * kept_n2C[:, :, middle] + 0.5 * again_n2C[:, :, middle]
    again_n2C[:, :, half] = 0.5 * chance + 0.5 * read_n2
    again_n2C[:, :, :attentive] = kept_n2C
    first_n2C = table_V2C[once_n] * truth_n2[:, :, None]
    evidence_nC: Floats = np.log((first_n2C * again_n2C).sum(axis=1) / first_n2C.sum(axis=1))
    return evidence_nC


def tables_of(rates: Rates, node_Z: Floats) -> Tables:
    """The probabilities of every code under every class."""
    verdict_V, side_V, longer_V = np.unravel_index(
        np.arange(len(VERDICTS) * _SIDES**2), (len(VERDICTS), _SIDES, _SIDES)
    )
    decided = 1 - rates.tie - rates.bad
    chance_V = np.array([decided / 2, decided / 2, rates.tie, rates.bad])[verdict_V]

    def marked(target_V: Ints, known_V: NDArray[np.bool_]) -> Floats:
        sure_V = (1 - _LAPSE) * (verdict_V == target_V) + _LAPSE * chance_V
        return np.where(known_V, sure_V, chance_V)

    ways_VK = np.stack(
        [
            chance_V,
            marked(side_V, side_V < 2),
            marked(1 - side_V, side_V < 2),
            marked(longer_V, longer_V < 2),
            marked(1 - longer_V, longer_V < 2),
            marked(np.full_like(verdict_V, VERDICTS.index("tie")), verdict_V >= 0),
        ],
        axis=1,
    )
    pair_2VC, honeypot_TVC = [], []
    for true in range(_DECIDED):
        lean_V = rates.lean * np.where(side_V == 2, 0, np.where(side_V == true, 1, -1))
        right_VZ = np.clip(_moved(rates.pair, node_Z) + lean_V[:, None], 0.02, 0.98)
        said_VZ = np.where((verdict_V == true)[:, None], right_VZ, 1 - right_VZ) * decided
        said_VZ = np.where((verdict_V < _DECIDED)[:, None], said_VZ, chance_V[:, None])
        pair_2VC.append(_with_half(said_VZ, ways_VK))
    for true in range(len(VERDICTS)):
        right_Z = _moved(rates.honeypot, node_Z)
        wrong = [0.0 if v == true else share for v, share in enumerate(_wrong(rates))]
        wrong_V = (np.array(wrong) / sum(wrong))[verdict_V]
        hit_V = verdict_V == true
        said_VZ = np.where(hit_V[:, None], right_Z, wrong_V[:, None] * (1 - right_Z))
        # Of one who guesses it counts whether they are right, not in which way they are wrong:
        # how often guesses are ties is not known well enough for it to be evidence.
        guess = chance_V[hit_V][0]
        guessed_VK = ways_VK.copy()
        guessed_VK[:, 0] = np.where(hit_V, guess, wrong_V * (1 - guess))
        honeypot_TVC.append(_with_half(said_VZ, guessed_VK))
    return Tables(np.stack(pair_2VC, axis=1), np.stack(honeypot_TVC))


def _wrong(rates: Rates) -> tuple[float, float, float, float]:
    """How wrong verdicts on honeypots are shared out among those that are wrong."""
    share = rates.undecided
    return (1 - share, 1 - share, share / 2, share / 2)


def _with_half(said_VZ: Floats, ways_VK: Floats) -> Floats:
    middle = said_VZ.shape[1] // 2
    half_V = 0.5 * said_VZ[:, middle] + 0.5 * ways_VK[:, 0]
    return np.concatenate([said_VZ, half_V[:, None], ways_VK], axis=1)


def _moved(chance: float, node_Z: Floats) -> Floats:
    odds: Floats = chance / (1 - chance) * np.exp(node_Z)
    moved: Floats = odds / (1 + odds)
    return moved


def _softmax(score_AC: Floats) -> Floats:
    weight_AC: Floats = np.exp(score_AC - score_AC.max(axis=1, keepdims=True))
    weight_AC /= weight_AC.sum(axis=1, keepdims=True)
    return weight_AC


@dataclass(frozen=True, slots=True)
class _Rows:
    """Which rows tell which rate: all honeypots; those judged wrongly where one answer is the
    better; other pairs; those decided; decided second looks at a decided first one."""

    pots: Ints
    wrong: Ints
    plain: Ints
    told: Ints
    twice: Ints


def _rows(data: Columns) -> _Rows:
    known_N, again_N = data.truth_N >= 0, data.repeat_N
    decided_N = data.verdict_N < _DECIDED
    missed_N = (data.truth_N < _DECIDED) & (data.verdict_N != data.truth_N)
    return _Rows(
        np.flatnonzero(known_N & ~again_N),
        np.flatnonzero(known_N & ~again_N & missed_N),
        np.flatnonzero(~known_N & ~again_N),
        np.flatnonzero(~known_N & ~again_N & decided_N),
        np.flatnonzero(~known_N & again_N & decided_N & decided_N[data.first_N]),
    )


def _rates(
    data: Columns, rows: _Rows, weight_A: Floats, tables: Tables, a_N: Floats, code_N: Ints
) -> Rates:
    """The rates of attentive assessors, each weighed by the probability that they are."""
    weight_N = weight_A[data.who_N]
    verdict_N, pots, wrong = data.verdict_N, rows.pots, rows.wrong
    hit = float(weight_N[pots[verdict_N[pots] == data.truth_N[pots]]].sum())
    honeypot = (hit + _PRIOR_HONEYPOT[0]) / (weight_N[pots].sum() + sum(_PRIOR_HONEYPOT))
    undecided = weight_N[wrong[verdict_N[wrong] >= _DECIDED]].sum() + 1
    undecided /= weight_N[wrong].sum() + 10

    said = np.bincount(verdict_N[rows.plain], weight_N[rows.plain], len(VERDICTS))
    tie, bad = (
        float(said[at] + prior) / float(said.sum() + 20) for at, prior in ((2, 1), (3, 0.4))
    )
    weight_n, verdict_n = weight_N[rows.told], verdict_N[rows.told]
    code_n, a_n = code_N[rows.told], a_N[rows.told]
    middle_V2 = tables.pair_V2C[:, :, (tables.pair_V2C.shape[2] - len(WAYS)) // 2]
    a_n = (
        a_n * middle_V2[code_n, 0] / (a_n * middle_V2[code_n, 0] + (1 - a_n) * middle_V2[code_n, 1])
    )
    true = float((weight_n * np.where(verdict_n == 0, a_n, 1 - a_n)).sum())
    pair = (true + _PRIOR_PAIR[0]) / (float(weight_n.sum()) + sum(_PRIOR_PAIR))
    side_n = data.side_N[rows.told]
    sided_n = weight_n * (side_n < 2)
    lean = float((sided_n * ((verdict_n == side_n) - 0.5)).sum() / (sided_n.sum() + 50))

    twice = rows.twice
    same = float(weight_N[twice[verdict_N[twice] == verdict_N[data.first_N[twice]]]].sum())
    alone = pair**2 + (1 - pair) ** 2
    agreed = (same + 10 * alone) / (float(weight_N[twice].sum()) + 10)
    return Rates(
        float(np.clip(honeypot, 0.6, 0.99)),
        float(np.clip(pair, 0.55, 0.98)),
        float(np.clip(lean, -0.2, 0.2)),
        min(tie, 0.6),
        min(bad, 0.3),
        float(undecided),
        float(np.clip((agreed - alone) / (1 - alone), 0, 0.95)),
    )
