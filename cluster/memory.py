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
    """Free memory in bytes; in a container with a limit, what is left of that.

    Cached files count as free: the kernel gives them back.
    """
    import psutil

    free = float(psutil.virtual_memory().available)
    for limit, used in (_CGROUP_V2, _CGROUP_V1):
        # "max" where there is no limit.
        with contextlib.suppress(OSError, ValueError):
            taken = max(0.0, float(used.read_text()) - _file_pages(used.with_name("memory.stat")))
            free = min(free, float(limit.read_text()) - taken)
    return max(0.0, free)


def _file_pages(stat: Path) -> float:
    """Bytes of files in memory that the kernel gives back when others want them; 0 where unknown.

    Shared memory counts as anonymous and is not among them.
    """
    try:
        sizes = dict(line.split() for line in stat.read_text().splitlines())
        # Version 1 also says them of the group without those below it, which its usage counts.
        total = "total_" if "total_active_file" in sizes else ""
        return sum(float(sizes[f"{total}{kind}_file"]) for kind in ("inactive", "active"))
    except (OSError, ValueError, KeyError):
        return 0.0
