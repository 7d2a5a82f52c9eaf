"""What a run leaves behind when it is killed: nothing, after a while."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import psutil

LEFT_BEHIND_S = 15


def below(pid: int) -> list[psutil.Process]:
    """Every process under this one."""
    return psutil.Process(pid).children(recursive=True)


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; one that waits to be collected by its parent does not."""
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def shared_memory() -> set[str]:
    """Names in shared memory."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def assert_nothing_left(
    processes: Iterable[psutil.Process], before: set[str], seconds: float = LEFT_BEHIND_S
) -> float:
    """Wait until the processes and everything new in shared memory are gone; returns how long."""
    started = time.monotonic()
    while True:
        running, files = alive(processes), shared_memory() - before
        waited = time.monotonic() - started
        if not running and not files:
            return waited
        if waited > seconds:
            raise AssertionError(f"after {seconds:g} s: {running}, {files}")
        time.sleep(0.2)
