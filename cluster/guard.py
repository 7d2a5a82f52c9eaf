"""The guard: whatever its owner leaves behind, it removes.

Every process of a run that has children or shared-memory files starts a guard: a small process in
a session of its own that reads a pipe and looks. When the owner dies, however it dies, the guard
kills every process that carries the owner's marker in its environment and removes the
owner's files. Children inherit the environment, so grandchildren that were re-parented are found
too. A process that renamed itself (as Ray's and vLLM's do) has overwritten its environment: those
are named to the guard while their parents live, by number and start time. Linux only.

Run as ``python -m cluster.guard``; the standard library only, so that it starts in 50 ms.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from uuid import uuid4

MARKER = "PAVLOV_OWNER"
_SHARED_MEMORY = Path("/dev/shm")
_TRACKERS_GRACE_S = 3.0
_LOOK_EVERY_S = 1.0
_CLOSE_S = 10.0


class Guard:
    """Starts a guard for this process. Children started later inherit the marker.

    Args:
        folders: folders to remove when this process is gone.
        with_parent: end this process when its parent dies. An actor's parent is the raylet, and
            an actor that is busy in a long computation does not notice by itself.
    """

    def __init__(self, *folders: Path, with_parent: bool = False) -> None:
        token = uuid4().hex
        # Appended: a driver's children carry its marker and their own.
        os.environ[MARKER] = f"{os.environ.get(MARKER, '')}:{token}".lstrip(":")
        environment = {k: v for k, v in os.environ.items() if k != MARKER}
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
        # What is there already belongs to somebody else.
        self._others = set(_descendants(os.getpid()))
        self._other_files = self._mapped_by([os.getpid(), *self._others])
        launcher = subprocess.Popen(
            [
                *(sys.executable, "-m", "cluster.guard", token),
                *(_identity(os.getpid()), _identity(os.getppid()) if with_parent else "-"),
                *map(str, folders),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            close_fds=True,
            cwd="/",
            env=environment,
        )
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        self._pipe = launcher.stdin
        self.pid = int(launcher.stdout.readline())
        launcher.stdout.close()
        launcher.wait(timeout=30)

    def watch(self) -> None:
        """Name what was started since this guard was: descendants, and the files they map."""
        # Guards, this process's own and those of actors, outlive everybody on purpose.
        below = [
            pid
            for pid in _descendants(os.getpid())
            if pid not in self._others and not _runs(pid, b"-m\0cluster.guard\0")
        ]
        for pid in below:
            self._tell(f"pid {_identity(pid)}")
        for path in self._mapped_by([os.getpid(), *below]) - self._other_files:
            self._tell(f"file {path}")

    @staticmethod
    def _mapped_by(pids: list[int]) -> set[str]:
        return set().union(*map(_mapped_shared_memory, pids))

    def close(self) -> None:
        """Let the guard go: the owner has ended its children. Files and folders are removed."""
        self._tell("close")
        with contextlib.suppress(BrokenPipeError):
            self._pipe.close()
        deadline = time.monotonic() + _CLOSE_S
        while _start_time(self.pid) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._pipe.write(f"{line}\n".encode())
            self._pipe.flush()


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
    """When a process started, in ticks since boot.

    Empty for a process that is gone, also where its parent has not collected it yet.
    """
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def _identity(pid: int) -> str:
    """A process by number and start time: numbers come again, both together do not."""
    return f"{pid}@{_start_time(pid)}"


def _pid(identity: str) -> int:
    return int(identity.partition("@")[0])


def _is_alive(identity: str) -> bool:
    started = identity.partition("@")[2]
    return bool(started) and _start_time(_pid(identity)) == started


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
    """Files in shared memory that a process maps, by inode.

    By name would miss semaphores: glibc makes them under another name and links them.
    """
    inodes = set()
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith(f"{_SHARED_MEMORY}/"):
                inodes.add(int(fields[4]))
    if not inodes:
        return set()
    present = {}
    for path in _SHARED_MEMORY.iterdir():
        with contextlib.suppress(OSError):
            present[path.stat().st_ino] = str(path)
    return {path for inode, path in present.items() if inode in inodes}


def _remove(files: Iterable[str], folders: Iterable[Path | str]) -> None:
    for path in files:
        with contextlib.suppress(OSError):
            Path(path).unlink()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int, word: bytes) -> bool:
    with contextlib.suppress(OSError):
        return word in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _lines_while_alive(processes: set[str]) -> Iterator[str]:
    """Lines from the pipe until one of the processes is gone.

    The pipe's end is not enough to go by: a forked child of the owner holds it open.
    """
    buffer = b""
    while all(map(_is_alive, processes)):
        if not select.select([0], [], [], _LOOK_EVERY_S)[0]:
            continue
        if not (data := os.read(0, 65536)):
            # An owner may drop its guard and live on.
            time.sleep(0.05)
            while all(map(_is_alive, processes)):
                time.sleep(_LOOK_EVERY_S)
            return
        *lines, buffer = (buffer + data).split(b"\n")
        yield from (line.decode() for line in lines)


def main() -> None:
    """Wait for the owner's death, then clean up after it."""
    # No child of the owner's: Ray's workers kill their children when they exit.
    if child := os.fork():
        print(child, flush=True)
        os._exit(0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    token, owner, parent, *folders = sys.argv[1:]
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    named = {owner}
    files: set[str] = set()
    for line in _lines_while_alive({owner, parent} - {"-"}):
        kind, _, rest = line.partition(" ")
        if kind == "close":
            _remove(files, folders)
            return
        if kind == "file":
            files.add(rest)
        else:
            named.add(rest)

    def left() -> list[int]:
        return sorted(
            {*marked_processes(token), *(_pid(name) for name in named if _is_alive(name))}
        )

    for pid in left():
        files |= _mapped_shared_memory(pid)
    # Python's resource trackers unlink leaked shared memory by themselves once their process is
    # gone; they get a moment for it.
    deadline = time.monotonic() + _TRACKERS_GRACE_S
    while time.monotonic() < deadline and left():
        _kill([pid for pid in left() if not _runs(pid, b"resource_tracker")])
        time.sleep(0.1)
    _kill(left())
    _remove(files, folders)


if __name__ == "__main__":
    main()
