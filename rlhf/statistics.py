"""Intervals for comparisons: what a table may claim."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

Z_95 = statistics.NormalDist().inv_cdf(0.975)


def paired_interval(differences: Sequence[float], z: float = Z_95) -> tuple[float, float, float]:
    """Mean of paired differences and its normal interval, 95 % unless told: (mean, low, high)."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    half = z * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def auroc(negatives: Sequence[float], positives: Sequence[float]) -> float:
    """P(a positive scores above a negative), ties counted half: the area under the ROC curve
    (Hanley & McNeil, 1982)."""
    ordered = sorted(negatives)
    below = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in positives)
    return below / (2 * len(negatives) * len(positives))


def conformal_rank(count: int, false_alarm_rate: float) -> int:
    """Which of `count` sorted calibration values is the threshold: ceil((n + 1)(1 - rate)).

    Beyond `count` there are too few values to promise the rate.
    """
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate must lie in (0, 1), got {false_alarm_rate}")
    return int(-(-((count + 1) * (1 - false_alarm_rate)) // 1))


def enough_to_promise(false_alarm_rate: float) -> int:
    """The fewest calibration values whose conformal threshold is finite."""
    count = int(1 / false_alarm_rate) - 1
    while conformal_rank(count, false_alarm_rate) > count:
        count += 1
    return count


def wilson_interval(successes: float, trials: float, z: float = Z_95) -> tuple[float, float, float]:
    """Share and its score interval (Wilson, 1927), 95 % unless told: (share, low, high).

    Both may be fractional: where ties count as half, and where trials have weights.
    """
    if trials == 0:
        return math.nan, 0.0, 1.0
    share = successes / trials
    scale = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return share, max(0.0, centre - half), min(1.0, centre + half)


def sign_test(successes: int, trials: int) -> float:
    """Exact two-sided p that successes and failures are equally likely (Dixon & Mood, 1946), for a
    number of trials that was settled beforehand."""
    return min(1.0, 2 * fair_tail(min(successes, trials - successes), trials))


def anytime_sign_test(successes: int, trials: int) -> float:
    """The same where one may look after every trial and stop as one likes: whatever is done, the
    chance that it ever falls to a level is at most that level.

    It is 1 / e of the likelihood ratio of a chance of success that is uniform on (0, 1) to one of
    1/2, e = 2^n / ((n + 1) C(n, k)): a martingale of mean 1 under the latter (Ville, 1939; Robbins,
    1970, Statistical Methods Related to the Law of the Iterated Logarithm; Ramdas et al., 2023,
    Game-Theoretic Statistics and Safe Anytime-Valid Inference).
    """
    return min(1.0, (trials + 1) * fair_chance(successes, trials))


def fair_chance(successes: int, trials: int) -> float:
    """P(Bin(trials, 1/2) = successes)."""
    return math.exp(
        math.lgamma(trials + 1)
        - math.lgamma(successes + 1)
        - math.lgamma(trials - successes + 1)
        - trials * math.log(2)
    )


def fair_tail(successes: int, trials: int) -> float:
    """P(Bin(trials, 1/2) <= successes), in a time that grows as the root of the trials."""
    if successes < 0:
        return 0.0
    above = trials - successes - 1
    if successes > above:
        return 1 - fair_tail(above, trials)
    # Below the middle terms only fall: those that no longer count end the sum.
    total, term = 0.0, fair_chance(successes, trials)
    for k in range(successes, -1, -1):
        if total + term == total:
            break
        total += term
        term *= k / (trials - k + 1)
    return total
