"""Which number format a model is computed in on this machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch


def local_device() -> str:
    """Where this process computes: on its GPU if torch sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(name: str, device: str | None = None) -> str:
    """``auto`` becomes bfloat16 where the device multiplies it natively, else float32.

    A CPU without such instructions emulates bfloat16 about a hundred times slower than float32.
    The device is `local_device` where none is given.
    """
    if name != "auto":
        return name
    native = (device or local_device()) != "cpu" or _cpu_multiplies_bfloat16()
    return "bfloat16" if native else "float32"


@cache
def _cpu_multiplies_bfloat16() -> bool:
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
