"""Servers as a user starts them: `pavlov label serve`, `pavlov serve`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT


class Server:
    """A running server; `address` is where it answers, `said` what it wrote until it did."""

    def __init__(self, process: subprocess.Popen[str], address: str, said: str) -> None:
        self.process, self.address, self.said = process, address, said

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """End it; returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=seconds)


def start(*command: str, runs: Path, seconds: float = 180) -> Server:
    """Start a server, and wait until it says where it answers."""
    process = subprocess.Popen(
        [sys.executable, "pavlov.py", *command],
        cwd=ROOT,
        env={**os.environ, "PAVLOV_RUNS": str(runs), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    deadline = time.monotonic() + seconds
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"(http://[\w.]+:\d+)/", line):
            return Server(process, found.group(1), "".join(said))
        if time.monotonic() > deadline:
            break
    process.kill()
    raise AssertionError(f"{' '.join(command)} did not start: {''.join(said)[-2000:]}")


@contextlib.contextmanager
def running(*command: str, runs: Path) -> Iterator[Server]:
    """A server that ends with the block."""
    server = start(*command, runs=runs)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
