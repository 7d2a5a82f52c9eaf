"""The probe after every update: engine and learner must say the same of a fixed text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.errors import WeightUpdateError

PROBE_TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1984 a small town by the river counted 3,512 "
    "people; most of them baked bread, mended nets or taught at the school on the hill."
)

TOLERANCE = {"float32": (2e-4, 2e-3), "bfloat16": (0.15, 1.0)}
"""Allowed (mean, largest) |difference| of a token's logprob in nats, by the coarser of the two
precisions, the learner's and the engine's.

Measured without a fault: float32 mean 2e-5, max 7e-5; bfloat16 mean 0.05, max 0.34.
"""


@dataclass(frozen=True, slots=True)
class Probe:
    """Token ids of the fixed text, the learner's logprobs of all but the first, and the precision
    that it computed them in (``float32`` or ``bfloat16``)."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    dtype: str


def check_probe(probe: Probe, engine_logprobs: Sequence[float], dtype: str) -> float:
    """Mean |difference| in nats.

    Args:
        dtype: the engine's precision.

    Raises:
        WeightUpdateError: by the check ``probe``.
    """
    gaps = [abs(a - b) for a, b in zip(probe.logprobs, engine_logprobs, strict=True)]
    mean, largest = sum(gaps) / len(gaps), max(gaps)
    dtype = max(dtype, probe.dtype, key=TOLERANCE.__getitem__)
    allowed_mean, allowed_largest = TOLERANCE[dtype]
    if not (mean <= allowed_mean and largest <= allowed_largest) or math.isnan(mean):
        raise WeightUpdateError(
            "probe",
            f"engine and learner differ by {mean:.2g} nats a token on average and {largest:.2g} at "
            f"most ({dtype} allows {allowed_mean:g} and {allowed_largest:g})",
        )
    return mean
