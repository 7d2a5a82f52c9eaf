"""How far several judges of the same thing agree.

Krippendorff (2011), Computing Krippendorff's Alpha-Reliability: one less the disagreement observed
over the disagreement expected if verdicts were dealt out at random. 1 is full agreement, 0 what
chance gives, below 0 systematic disagreement. Units may have any number of judges; those with one
say nothing.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

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
    units: Sequence[Sequence[Hashable]], seed: int, draws: int = 1000, level: float = 0.95
) -> tuple[float, float, float]:
    """Alpha and the quantiles of its bootstrap over units: (alpha, low, high)."""
    draw = random.Random(seed)
    found = sorted(
        value
        for _ in range(draws)
        if not math.isnan(value := alpha(draw.choices(units, k=len(units))))
    )
    if not found:
        return alpha(units), math.nan, math.nan
    tail = (1 - level) / 2
    low, high = (found[min(len(found) - 1, int(q * len(found)))] for q in (tail, 1 - tail))
    return alpha(units), low, high
