"""A Ray cluster as a user starts it: `ray start --head`, with a token."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.leftovers import alive


@dataclass(frozen=True, slots=True)
class RayCluster:
    """A running one: its dashboard's address, the folder that it was started in, and the variables
    that its command line needs."""

    address: str
    folder: Path
    environment: dict[str, str]

    def call(self, program: str, *arguments: str) -> str:
        """What a program of Ray's prints."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name(program)), *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return done.stdout + done.stderr

    def ray(self, *arguments: str) -> str:
        """`ray …` on this cluster."""
        return self.call("ray", *arguments, "--address", self.address)

    def submit(
        self, name: str, variables: dict[str, str], command: list[str], wait: bool = True
    ) -> str:
        """`ray job submit` of the folder."""
        return self.call(
            *("ray", "job", "submit", "--address", self.address, "--submission-id", name),
            *([] if wait else ["--no-wait"]),
            *("--working-dir", ".", "--"),
            *("env", *(f"{key}={value}" for key, value in variables.items())),
            *command,
        )

    @property
    def session(self) -> Path:
        """Ray's own folder."""
        return (Path(self.environment["RAY_TMPDIR"]) / "ray" / "session_latest").resolve()


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[RayCluster]:
    """A cluster started in `folder`; ended after use."""
    home = Path(tempfile.mkdtemp(prefix="pavlov-proof-"))
    port, dashboard = free_ports(2)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        "RAY_process_group_cleanup_enabled": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(home),
    }
    (home / "token").write_text("a-token-of-this-proof-alone-0123456789")
    made = RayCluster(f"http://127.0.0.1:{dashboard}", folder, environment)
    began = made.call(
        *("ray", "start", "--head", "--port", str(port), "--dashboard-port", str(dashboard)),
        *("--num-cpus", "2", "--disable-usage-stats", "--temp-dir", str(home / "ray")),
    )
    try:
        assert "Ray runtime started" in began, began[-2000:]
        yield made
    finally:
        mine = [p for p in psutil.process_iter() if _mentions(p, str(home))]
        for process in mine:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(mine, timeout=10)
        for process in alive(mine):
            process.kill()
        shutil.rmtree(home, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that the system hands out."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _mentions(process: psutil.Process, word: str) -> bool:
    try:
        return any(word in part for part in process.cmdline())
    except psutil.Error:
        return False
