"""Which number format a model is computed in on this machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch


def resolve_dtype(name: str) -> str:
    """``auto`` becomes bfloat16 where the hardware multiplies it natively, else float32.

    A CPU without such instructions emulates bfloat16 about a hundred times slower than float32.
    """
    if name != "auto":
        return name
    return "bfloat16" if torch.cuda.is_available() or _cpu_multiplies_bfloat16() else "float32"


@cache
def _cpu_multiplies_bfloat16() -> bool:
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
