"""How far several judges of the same thing agree.

Krippendorff (2011), Computing Krippendorff's Alpha-Reliability: one less the disagreement observed
over the disagreement expected if verdicts were dealt out at random. 1 is full agreement, 0 what
chance gives, below 0 systematic disagreement. Units may have any number of judges; those with one
say nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

Distance = Callable[[Hashable, Hashable], float]


def nominal(one: Hashable, other: Hashable) -> float:
    """0 for the same verdict, 1 for any other."""
    return float(one != other)


def alpha(units: Sequence[Sequence[Hashable]], distance: Distance = nominal) -> float:
    """Krippendorff's alpha; `units` holds the verdicts on each thing that was judged.

    Not a number where no unit has two verdicts, or where all verdicts are the same: then there is
    nothing to disagree on.
    """
    paired = [list(verdicts) for verdicts in units if len(verdicts) > 1]
    counts = Counter(verdict for verdicts in paired for verdict in verdicts)
    total = counts.total()
    observed = sum(
        distance(one, other) / (len(verdicts) - 1)
        for verdicts in paired
        for place, one in enumerate(verdicts)
        for at, other in enumerate(verdicts)
        if place != at
    )
    expected = sum(
        many * more * distance(one, other)
        for one, many in counts.items()
        for other, more in counts.items()
    )
    if not expected:
        return math.nan
    return 1 - (total - 1) * observed / expected


def alpha_interval(
    units: Sequence[Sequence[Hashable]],
    seed: int,
    draws: int = 1000,
    level: float = 0.95,
    distance: Distance = nominal,
) -> tuple[float, float, float]:
    """Alpha and the quantiles of its bootstrap over units: (alpha, low, high).

    Units with the same verdicts are alike, so how often each pattern of verdicts is drawn is drawn,
    not how often each unit.

    Shapes: P patterns of two verdicts or more, V values, D draws.
    """
    found = alpha(units, distance)
    if math.isnan(found):
        return found, math.nan, math.nan
    paired = (tuple(sorted(verdicts, key=str)) for verdicts in units if len(verdicts) > 1)
    patterns = Counter(paired)
    values = sorted({value for verdicts in patterns for value in verdicts}, key=str)
    far_VV = np.array([[distance(one, other) for other in values] for one in values])
    counts_PV = np.array([[each.count(value) for value in values] for each in patterns], float)
    # Judges of one unit are paired with each other, not with themselves.
    observed_P = np.einsum("pv,vw,pw->p", counts_PV, far_VV, counts_PV)
    observed_P -= counts_PV @ np.diag(far_VV)
    observed_P /= counts_PV.sum(axis=1) - 1
    draw = np.random.default_rng(seed)
    size = patterns.total()
    drawn_DP = draw.multinomial(size, np.array(list(patterns.values())) / size, size=draws)
    counts_DV = drawn_DP @ counts_PV
    expected_D = np.einsum("dv,vw,dw->d", counts_DV, far_VV, counts_DV)
    there = expected_D > 0
    alphas = (
        1 - (counts_DV.sum(axis=1) - 1)[there] * (drawn_DP @ observed_P)[there] / expected_D[there]
    )
    if not len(alphas):
        return found, math.nan, math.nan
    tail = (1 - level) / 2
    low, high = np.quantile(alphas, [tail, 1 - tail])
    return found, float(low), float(high)
