"""When an assessor tires: the onset of faster and less accurate judging within a shift.

A shift is one assessor's judgements with gaps below half an hour; those whose time or seconds are
not known are in none. From an onset k on, log seconds
are lower by ``-log(1 - 0.4)`` and the chance to be right by 0.2; before it all is as the assessor's
own baseline has it. The evidence for an onset at k after n judgements is a likelihood ratio L_k(n).
With a prior chance for every onset (1 / `shift_length` at each judgement, k = 1, 2, ...)::

    e(n) = sum_{k <= n} P(k) L_k(n) + P(k > n)

is a martingale of mean 1 in a shift without onset, so a threshold of 1 / rate is ever reached in at
most that share of shifts (Ville, 1939). This is the statistic of Shiryaev (1963), On Optimum
Methods in Quickest Detection Problems, with the false alarms of a whole shift bounded instead of
the posterior.

Log seconds: a normal linear model of each assessor, with a level, two curves of practice that wear
off with 10 and 40 judgements, and unknown variance, under its conjugate prior; so a ratio is one of
Student-t predictives (Bishop (2006), Pattern Recognition and Machine Learning, exercise 3.12), and
a short baseline makes it small. People get faster as they learn: that is what the curves take up.
The level may differ a little from shift to shift. The number of words is taken out by a slope that
the pool shares.

Right or wrong: verdict j is right with probability r_j by what the others said (honeypots: 1 or
0), so its likelihood at accuracy q is ``r q + (1 - r) (1 - q)``; q is the assessor's own, unknown,
over a grid with a prior about the pool's.

Shapes: n judgements of an assessor, F features, K candidate onsets, G grid of accuracies.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from labelling.pool import Columns, Floats, Pool, columns, fit
from labelling.records import Judgement


@dataclass(frozen=True, slots=True)
class FatigueSettings:
    """What is looked for, and how sure to be.

    `false_break_rate` is the chance that fatigue is found in a shift without. `day_spread` is by
    how much log seconds differ between one assessor's shifts, `shift_length` after how many
    judgements an onset is expected.
    """

    false_break_rate: float = 0.05
    gap_s: float = 1800.0
    speed: float = 0.4
    accuracy: float = 0.2
    shift_length: float = 200.0
    day_spread: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.false_break_rate < 1:
            raise ValueError(f"false_break_rate {self.false_break_rate} outside 0 to 1")
        if not 0 <= self.speed < 1 or not 0 <= self.accuracy < 0.5:
            raise ValueError(
                f"speed {self.speed} outside 0 to 1 or accuracy {self.accuracy} to 0.5"
            )


@dataclass(frozen=True, slots=True)
class Window:
    """Fatigue that was found: from the judgement at `onset` in the sequence that was given, at
    `onset_at`, until the shift's last, at `end`; found after the one at `found`.

    `onset_number` and `found_number` count the assessor's own judgements in shifts from 1. The
    evidence, in nats, is of the onset when it was found: of the seconds and of right and wrong.
    """

    assessor: str
    onset: int
    found: int
    end: int
    onset_number: int
    found_number: int
    onset_at: float
    found_at: float
    seconds_evidence: float
    accuracy_evidence: float


_PRACTICE = (10.0, 40.0)
_SHAPE = 4.0  # of the inverse gamma prior of the variance: as of eight judgements
_LEVEL_SPREAD = 2.0  # of the level's and the curves' priors, in standard deviations of log seconds
_CURVE_SPREAD = 1.0
_GRID = np.linspace(0.45, 0.99, 13)
_PRIOR_JUDGEMENTS = 20.0
_CLIP = 3.0


def fatigue(
    judgements: Sequence[Judgement],
    settings: FatigueSettings = FatigueSettings(),
    *,
    uncounted: Collection[str] = (),
) -> list[Window]:
    """Windows of fatigue in all shifts, in the order of assessors and time.

    Judgements of a window do not count for the assessor's baseline in later shifts.

    Args:
        judgements: of one kind of assessor; those with a `doubt` are left out.
        uncounted: assessors whose verdicts say nothing of what is true (paused ones).
    """
    data = columns(judgements)
    if not data.assessors:
        return []
    right_N = right_by_others(data, fit(data, uncounted=uncounted))
    at_N = np.array([judgements[place].at for place in data.place_N])
    log_N = adjusted_seconds(judgements, data)
    level = float(np.nanmedian(log_N)) if np.isfinite(log_N).any() else 0.0
    windows: list[Window] = []
    for who, name in enumerate(data.assessors):
        mine = np.flatnonzero((data.who_N == who) & (at_N > 0) & np.isfinite(log_N))
        pot_n = data.truth_N[mine] >= 0
        course = Course(settings, level)
        breaks = np.flatnonzero(np.diff(at_N[mine]) >= settings.gap_s) + 1
        start = 0
        for shift in np.split(mine, breaks):
            own = slice(start, start + len(shift))
            found = course.shift(log_N[shift], right_N[shift], pot_n[own], start)
            if found is not None:
                onset, seen, seconds, accuracy = found
                windows.append(
                    Window(
                        name,
                        int(data.place_N[shift[onset]]),
                        int(data.place_N[shift[seen]]),
                        int(data.place_N[shift[-1]]),
                        start + onset + 1,
                        start + seen + 1,
                        float(at_N[shift[onset]]),
                        float(at_N[shift[seen]]),
                        seconds,
                        accuracy,
                    )
                )
            start += len(shift)
    return windows


def right_by_others(data: Columns, pool: Pool) -> Floats:
    """The probability that each verdict is right: by the others on the pair, or by the honeypot's
    truth; nan for ties on other pairs, and for honeypots seen again."""
    right_N = np.where(data.verdict_N == 0, pool.a_N, 1 - pool.a_N)
    right_N[data.verdict_N >= 2] = np.nan
    known_N = data.truth_N >= 0
    right_N[known_N] = data.verdict_N[known_N] == data.truth_N[known_N]
    right_N[known_N & data.repeat_N] = np.nan
    return right_N


def adjusted_seconds(judgements: Sequence[Judgement], data: Columns) -> Floats:
    """Log seconds without what the number of words makes of them, by a slope within assessors;
    clipped at three robust standard deviations about the assessor's median (a telephone rang)."""
    seconds_N = np.array([judgements[place].seconds for place in data.place_N])
    words_N = np.array([sum(judgements[place].words) for place in data.place_N], dtype=float)
    with np.errstate(invalid="ignore"):
        log_N = np.log(np.where(seconds_N > 0, seconds_N, np.nan))
    log_words_N = np.log(np.maximum(words_N, 1))
    known_N = np.isfinite(log_N) & (words_N > 0)
    size = len(data.assessors)

    def centred(values_n: Floats) -> Floats:
        who_n = data.who_N[known_N]
        mean_A = np.bincount(who_n, values_n, size) / np.maximum(
            np.bincount(who_n, minlength=size), 1
        )
        rest_n: Floats = values_n - mean_A[who_n]
        return rest_n

    words_n, log_n = centred(log_words_N[known_N]), centred(log_N[known_N])
    # One more judgement's worth of none keeps few from making a steep slope.
    slope = float(words_n @ log_n) / (float(words_n @ words_n) + 1)
    usual = float(np.median(log_words_N[known_N])) if known_N.any() else 0.0
    rest_N: Floats = log_N - slope * np.where(words_N > 0, log_words_N - usual, 0)
    for who in range(size):
        mine = np.flatnonzero((data.who_N == who) & np.isfinite(rest_N))
        if len(mine) >= 5:
            middle = float(np.median(rest_N[mine]))
            spread = 1.4826 * float(np.median(np.abs(rest_N[mine] - middle)))
            half = _CLIP * max(spread, 0.1)
            rest_N[mine] = np.clip(rest_N[mine], middle - half, middle + half)
    return rest_N


@dataclass(slots=True)
class _Line:
    """The conjugate posterior of the linear model: mean (K, F), covariance over the variance
    (F, F), and the inverse gamma's shape and rate (K). K is one onset each; all have the same
    covariance, for they have seen the same judgements less a known step."""

    mean_KF: Floats
    covariance_FF: Floats
    shape: float
    rate_K: Floats

    def learn(self, feature_F: Floats, value_K: Floats) -> Floats:
        """Take in a judgement; returns the log predictive density (K) it had, a Student-t."""
        along_F = self.covariance_FF @ feature_F
        scale = 1 + float(feature_F @ along_F)
        rest_K = value_K - self.mean_KF @ feature_F
        ratio_K = rest_K**2 / (2 * self.rate_K * scale)
        log_K: Floats = (
            math.lgamma(self.shape + 0.5)
            - math.lgamma(self.shape)
            - 0.5 * np.log(2 * math.pi * self.rate_K * scale)
            - (self.shape + 0.5) * np.log1p(ratio_K)
        )
        self.mean_KF = self.mean_KF + rest_K[:, None] * (along_F / scale)
        self.covariance_FF = self.covariance_FF - np.outer(along_F, along_F) / scale
        self.rate_K = self.rate_K + 0.5 * rest_K**2 / scale
        self.shape += 0.5
        return log_K

    def only(self, at: int) -> _Line:
        """One of the K."""
        return _Line(
            self.mean_KF[at : at + 1], self.covariance_FF, self.shape, self.rate_K[at : at + 1]
        )


class Course:
    """One assessor's shifts in the order of time: what is known of them so far."""

    def __init__(self, settings: FatigueSettings, level: float, accuracy: float = 0.8) -> None:
        self._settings = settings
        self._step = math.log1p(-settings.speed)
        # In standard deviations of 0.5, which the prior of the variance is about.
        self._line = _Line(
            np.array([[level, 0.0, 0.0]]),
            np.diag([_LEVEL_SPREAD**2, _CURVE_SPREAD**2, _CURVE_SPREAD**2]),
            _SHAPE,
            np.array([0.25 * (_SHAPE - 1)]),
        )
        self._right_2G = np.stack([_prior(accuracy), _prior(0.9)])

    def shift(
        self, log_n: Floats, right_n: Floats, pot_n: NDArray[np.bool_], done: int
    ) -> tuple[int, int, float, float] | None:
        """A shift's judgements, after `done` earlier ones: (onset, when it was found, evidence of
        the seconds, of right and wrong), or None; then the baseline knows it."""
        settings, size = self._settings, len(log_n)
        self._line.covariance_FF[0, 0] += (settings.day_spread / 0.5) ** 2 * (done > 0)
        hazard = 1 / settings.shift_length
        # Row 0 is no onset; row k an onset at judgement k - 1 of the shift.
        line = self._line
        seconds_K, accuracy_K = np.zeros(1), np.zeros(1)
        fresh_2G, tired_2KG = np.log(self._right_2G), np.log(self._right_2G)[:, None].repeat(1, 1)
        found: tuple[int, int, float, float] | None = None
        kept = [line.only(0)]
        grids = [fresh_2G]
        tired_G = np.clip(_GRID - settings.accuracy, 0.05, 1)
        for at in range(size):
            # A new candidate has seen what the one without onset has.
            line = _Line(
                np.vstack([line.mean_KF, line.mean_KF[:1]]),
                line.covariance_FF,
                line.shape,
                np.append(line.rate_K, line.rate_K[0]),
            )
            seconds_K = np.append(seconds_K, seconds_K[0])
            accuracy_K = np.append(accuracy_K, accuracy_K[0])
            tired_2KG = np.concatenate([tired_2KG, tired_2KG[:, :1]], axis=1)
            if math.isfinite(log_n[at]):
                number = done + at
                feature_F = np.array([1.0, *(math.exp(-number / wears) for wears in _PRACTICE)])
                value_K = np.full(at + 2, log_n[at] - self._step)
                value_K[0] = log_n[at]
                seconds_K = seconds_K + line.learn(feature_F, value_K)
            if math.isfinite(right_n[at]):
                kind, r = int(pot_n[at]), right_n[at]
                before_K = _log_sums(tired_2KG[kind])
                tired_2KG[kind, 0] += np.log(r * _GRID + (1 - r) * (1 - _GRID))
                tired_2KG[kind, 1:] += np.log(r * tired_G + (1 - r) * (1 - tired_G))
                accuracy_K = accuracy_K + _log_sums(tired_2KG[kind]) - before_K
            kept.append(line.only(0))
            grids.append(tired_2KG[:, 0].copy())
            if found is not None:
                continue
            ratio_k = seconds_K[1:] + accuracy_K[1:] - seconds_K[0] - accuracy_K[0]
            prior_k = math.log(hazard) + math.log1p(-hazard) * np.arange(at + 1)
            later = (1 - hazard) ** (at + 1)
            evidence = np.exp(np.minimum(prior_k + ratio_k, 700)).sum() + later
            if evidence >= 1 / settings.false_break_rate:
                onset = int(np.argmax(prior_k + ratio_k))
                found = (
                    onset,
                    at,
                    float(seconds_K[onset + 1] - seconds_K[0]),
                    float(accuracy_K[onset + 1] - accuracy_K[0]),
                )
        until = size if found is None else found[0]
        self._line = kept[until]
        self._right_2G = np.exp(grids[until] - _log_sums(grids[until])[:, None])
        return found


def _prior(accuracy: float) -> Floats:
    """A beta prior about `accuracy` over the grid."""
    right, wrong = accuracy * _PRIOR_JUDGEMENTS, (1 - accuracy) * _PRIOR_JUDGEMENTS
    log_G = (right - 1) * np.log(_GRID) + (wrong - 1) * np.log(1 - _GRID)
    weight_G: Floats = np.exp(log_G - log_G.max())
    weight_G /= weight_G.sum()
    return weight_G


def _log_sums(log_KG: Floats) -> Floats:
    top_K = log_KG.max(axis=-1)
    sums_K: Floats = top_K + np.log(np.exp(log_KG - top_K[..., None]).sum(axis=-1))
    return sums_K
