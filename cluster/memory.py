"""How much memory this process may still take: the machine's, or its container's."""

from __future__ import annotations

import contextlib
from pathlib import Path

_CGROUP_V2 = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))
_CGROUP_V1 = (
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_memory() -> float:
    """Free memory in bytes; in a container with a limit, what is left of that."""
    import psutil

    free = float(psutil.virtual_memory().available)
    for limit, used in (_CGROUP_V2, _CGROUP_V1):
        # "max" where there is no limit.
        with contextlib.suppress(OSError, ValueError):
            free = min(free, float(limit.read_text()) - float(used.read_text()))
    return max(0.0, free)
