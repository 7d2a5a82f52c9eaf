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

    Shapes: U units with two verdicts or more, V values, D draws.
    """
    found = alpha(units, distance)
    paired = [Counter(verdicts) for verdicts in units if len(verdicts) > 1]
    values = sorted({value for counts in paired for value in counts}, key=str)
    if math.isnan(found):
        return found, math.nan, math.nan
    far_VV = np.array([[distance(one, other) for other in values] for one in values])
    counts_UV = np.array([[counts[value] for value in values] for counts in paired], dtype=float)
    # Judges of one unit are paired with each other, not with themselves.
    observed_U = np.einsum("uv,vw,uw->u", counts_UV, far_VV, counts_UV)
    observed_U -= counts_UV @ np.diag(far_VV)
    observed_U /= counts_UV.sum(axis=1) - 1
    draw = np.random.default_rng(seed)
    size = len(paired)
    drawn_DU = draw.multinomial(size, np.full(size, 1 / size), size=draws)
    counts_DV = drawn_DU @ counts_UV
    expected_D = np.einsum("dv,vw,dw->d", counts_DV, far_VV, counts_DV)
    there = expected_D > 0
    alphas = (
        1 - (counts_DV.sum(axis=1) - 1)[there] * (drawn_DU @ observed_U)[there] / expected_D[there]
    )
    if not len(alphas):
        return found, math.nan, math.nan
    tail = (1 - level) / 2
    low, high = np.quantile(alphas, [tail, 1 - tail])
    return found, float(low), float(high)
