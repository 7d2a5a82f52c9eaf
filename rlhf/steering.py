"""Coefficients that are steered from step to step, so that KL or entropy keeps to a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.config import RLSection

_LARGEST_ERROR = 0.2


def steered(settings: RLSection, last: Mapping[str, Any]) -> RLSection:
    """The settings of the next step, from the metrics of the `last` one.

    They hold all that is needed (`kl/coefficient`, `kl/mean`, `entropy/coefficient`,
    `entropy/mean`), so that a resumed run goes on as the unbroken one would have. A coefficient
    without a target stays as the settings have it.
    """
    kl, entropy = settings.kl, settings.entropy
    kl_coefficient, entropy_coefficient = kl.coefficient, entropy.coefficient
    if kl.target is not None:
        error = _error(last["kl/mean"], kl.target)
        kl_coefficient = last["kl/coefficient"] * (1 + kl.rate * error)
    if entropy.target is not None:
        # The other way round: a bonus grows while there is too little.
        error = -_error(last["entropy/mean"], entropy.target)
        entropy_coefficient = last["entropy/coefficient"] * (1 + entropy.rate * error)
    return settings.with_coefficients(kl_coefficient, entropy_coefficient)


def _error(mean: float | None, target: float) -> float:
    """Relative to the target and cut to a fifth, none where nothing was measured.

    Proportional control in log space: Ziegler et al. (2019), Fine-Tuning Language Models from Human
    Preferences, section 2.2.
    """
    if mean is None:
        return 0.0
    return max(-_LARGEST_ERROR, min(_LARGEST_ERROR, mean / target - 1))
