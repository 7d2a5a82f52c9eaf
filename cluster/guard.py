"""The guard: whatever its owner leaves behind, it removes.

Every process of a run that has children or shared-memory files starts a guard: a small process in
a session of its own that reads a pipe. When the owner dies, however it dies, the pipe closes, and
the guard kills every process that carries the owner's marker in its environment and removes the
owner's files. Children inherit the environment, so grandchildren that were re-parented are found
too. A process that renamed itself (as Ray's and vLLM's do) has overwritten its environment: those
are named to the guard while their parents live, by number and start time. Linux only.

Run as ``python -m cluster.guard``; the standard library only, so that it starts in 50 ms.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

MARKER = "PAVLOV_OWNER"
_SHARED_MEMORY = Path("/dev/shm")
_TRACKERS_GRACE_S = 3.0


class Guard:
    """Starts a guard for this process. Children started later inherit the marker.

    Args:
        folders: folders to remove when this process is gone.
    """

    def __init__(self, *folders: Path) -> None:
        token = uuid4().hex
        # Appended: a driver's children carry its marker and their own.
        os.environ[MARKER] = f"{os.environ.get(MARKER, '')}:{token}".lstrip(":")
        environment = {k: v for k, v in os.environ.items() if k != MARKER}
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
        self._folders = folders
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.guard", token, *map(str, folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            close_fds=True,
            cwd="/",
            env=environment,
        )

    def watch(self) -> None:
        """Name the present descendants, and the shared-memory files that they and this one map."""
        # Guards, this process's own and those of actors, outlive everybody on purpose.
        below = [pid for pid in _descendants(os.getpid()) if not _runs(pid, b"cluster.guard")]
        for pid in below:
            self._tell(f"pid {pid} {_start_time(pid)}")
        for pid in [os.getpid(), *below]:
            for path in _mapped_shared_memory(pid):
                self._tell(f"file {path}")

    def close(self) -> None:
        """Remove the folders and let the guard go: the owner has ended its children itself."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(timeout=10)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()


def marked_processes(token: str) -> list[int]:
    """Processes whose environment carries the token, this one left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if token.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def _start_time(pid: int) -> str:
    """When a process started, in ticks since boot: with its number, it names one for good."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _mapped_shared_memory(pid: int) -> set[str]:
    paths = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            _, _, path = line.partition(f"{_SHARED_MEMORY}/")
            # Ray's own object store belongs to the raylet, not to an actor that maps it.
            if path and not path.endswith("(deleted)") and not path.startswith("plasma"):
                paths.add(f"{_SHARED_MEMORY}/{path}")
    return paths


def _runs(pid: int, word: bytes) -> bool:
    with contextlib.suppress(OSError):
        return word in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Wait for the owner's death, then clean up after it."""
    token, *folders = sys.argv[1:]
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    named: list[tuple[int, str]] = []
    files: set[str] = set()
    for line in sys.stdin:
        kind, _, rest = line.strip().partition(" ")
        if kind == "file":
            files.add(rest)
        else:
            pid, _, started = rest.partition(" ")
            named.append((int(pid), started))

    def left() -> list[int]:
        alive = [pid for pid, started in named if started and _start_time(pid) == started]
        return sorted({*marked_processes(token), *alive})

    for pid in left():
        files |= _mapped_shared_memory(pid)
    # Python's resource trackers unlink leaked shared memory by themselves once their process is
    # gone; they get a moment for it.
    deadline = time.monotonic() + _TRACKERS_GRACE_S
    while time.monotonic() < deadline and left():
        _kill([pid for pid in left() if not _runs(pid, b"resource_tracker")])
        time.sleep(0.1)
    _kill(left())
    for path in files:
        with contextlib.suppress(OSError):
            Path(path).unlink()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
