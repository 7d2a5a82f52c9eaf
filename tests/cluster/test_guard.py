"""The guard: whatever its owner leaves behind, it removes. No engine and no cluster is started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from cluster.guard import MARKER, Guard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard is for Linux")

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = Path("/dev/shm")
PATIENCE_S = 10.0

OWNER = """
import json, mmap, os, subprocess, sys, time
from pathlib import Path
from cluster.guard import Guard

folder, mapped, watches = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "watch"
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
guard = Guard(folder)
pids = {"guard": guard._process.pid}
folder.mkdir()
(folder / "version-1.safetensors").write_bytes(b"weights")
mapped.write_bytes(bytes(4096))
with mapped.open("r+b") as file:
    memory = mmap.mmap(file.fileno(), 4096)

pids["child"] = subprocess.Popen(SLEEP).pid
pids["own session"] = subprocess.Popen(SLEEP, start_new_session=True).pid
# Of a parent that is gone at once: re-parented, in a session of its own.
daemon = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], start_new_session=True).pid)"
made = subprocess.run([sys.executable, "-c", daemon, *SLEEP], stdout=subprocess.PIPE)
pids["orphan"] = int(made.stdout)
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); signal.signal(1, signal.SIG_IGN); time.sleep(600)"
pids["stubborn"] = subprocess.Popen([sys.executable, "-c", stubborn]).pid
if watches:
    # Like a process that renamed itself: its environment can no longer be read.
    pids["unmarked"] = subprocess.Popen(SLEEP, env={}).pid
    guard.watch()
if sys.argv[4] == "fork":
    pids["fork"] = os.fork() or time.sleep(600)
print(json.dumps(pids), flush=True)
sys.stdin.read()
if sys.argv[4] == "exit":
    sys.exit(0)
raise RuntimeError("a crash")
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be collected by its parent does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


class Owned:
    """A process with a guard, what it started, and what it put into shared memory."""

    def __init__(self, *, watch: bool = False, ending: str = "crash") -> None:
        token = uuid4().hex[:8]
        self.folder = SHARED_MEMORY / f"pavlovtest-{token}"
        self.mapped = SHARED_MEMORY / f"pavlovtest-{token}.map"
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(OWNER), self.folder, self.mapped]
            + ["watch" if watch else "no", ending],
            env={k: v for k, v in os.environ.items() if k != MARKER} | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        self.pids: dict[str, int] = json.loads(self.process.stdout.readline())

    def left(self) -> list[str]:
        names = [name for name, pid in self.pids.items() if alive(pid)]
        return names + [path.name for path in (self.folder, self.mapped) if path.exists()]

    def clear_away(self) -> None:
        self.process.kill()
        self.process.wait(timeout=10)
        within(1, lambda: not self.left())
        for pid in self.pids.values():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.mapped.unlink(missing_ok=True)
        if self.folder.exists():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()


@pytest.fixture
def owned() -> Iterator[Callable[..., Owned]]:
    made: list[Owned] = []

    def make(**how: object) -> Owned:
        made.append(Owned(**how))  # type: ignore[arg-type]
        assert not set(made[-1].pids) - set(made[-1].left())
        return made[-1]

    yield make
    for one in made:
        one.clear_away()


@pytest.mark.parametrize("watch", [False, True])
def test_a_killed_owner_leaves_no_process_and_no_shared_memory(owned, watch):
    owner = owned(watch=watch)
    assert {owner.folder.name, owner.mapped.name} <= set(owner.left())
    os.kill(owner.process.pid, signal.SIGKILL)
    assert within(PATIENCE_S, lambda: not owner.left()), owner.left()


def test_an_owner_that_crashes_or_just_ends_leaves_nothing_either(owned):
    for ending in ("crash", "exit"):
        owner = owned(ending=ending)
        owner.process.stdin.close()
        assert within(PATIENCE_S, lambda owner=owner: not owner.left()), owner.left()


def test_an_owner_that_forked_leaves_nothing_either(owned):
    """A child by fork has a copy of the pipe's end and an environment from before the marker."""
    owner = owned(watch=True, ending="fork")
    os.kill(owner.process.pid, signal.SIGKILL)
    assert within(PATIENCE_S, lambda: set(owner.left()) <= {"fork"}), owner.left()


def test_while_its_owner_lives_a_guard_touches_nothing(owned):
    owner = owned(watch=True)
    before = owner.left()
    os.kill(owner.pids["guard"], signal.SIGINT)
    os.kill(owner.pids["guard"], signal.SIGTERM)
    os.kill(owner.pids["guard"], signal.SIGHUP)
    time.sleep(1)
    assert owner.left() == before


def test_the_death_of_one_owner_is_nothing_to_another(owned):
    one, other = owned(), owned()
    before = other.left()
    os.kill(one.process.pid, signal.SIGKILL)
    assert within(PATIENCE_S, lambda: not one.left())
    assert other.left() == before


NESTED = """
import os, subprocess, sys, time
from pathlib import Path
from cluster.guard import Guard
depth = int(sys.argv[1])
guard = Guard()
if depth:
    below = subprocess.Popen([sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2]])
print(depth, os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("killed", "gone"), [(1, [0, 1]), (2, [0, 1, 2])])
def test_an_owner_takes_along_what_is_below_it_and_not_what_is_above(killed, gone):
    process = subprocess.Popen(
        [sys.executable, "-c", NESTED, "2", NESTED],
        env={k: v for k, v in os.environ.items() if k != MARKER} | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    pids: dict[int, int] = {}
    try:
        assert process.stdout is not None
        for _ in range(3):
            depth, pid = map(int, process.stdout.readline().split())
            pids[depth] = pid
        os.kill(pids[killed], signal.SIGKILL)
        assert within(PATIENCE_S, lambda: not any(alive(pids[depth]) for depth in gone))
        time.sleep(0.5)
        assert [depth for depth in sorted(pids) if not alive(pids[depth])] == gone
    finally:
        for pid in pids.values():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=10)


def test_closing_a_guard_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(MARKER, "outer")
    folder, bystander = tmp_path / "weights", tmp_path / "other"
    guard = Guard(folder)
    folder.mkdir()
    bystander.mkdir()
    (folder / "version-1.safetensors").write_bytes(b"weights")
    pid = guard._process.pid
    assert alive(pid)
    guard.close()
    assert not alive(pid)
    assert not Path(f"/proc/{pid}").exists()
    assert not folder.exists()
    assert bystander.exists()


def test_closing_twice_or_after_the_guard_died_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv(MARKER, "outer")
    guard = Guard(tmp_path / "weights")
    os.kill(guard._process.pid, signal.SIGKILL)
    guard.watch()
    guard.close()
    guard.close()


def test_children_inherit_the_markers_of_all_their_owners(monkeypatch):
    monkeypatch.setenv(MARKER, "outer")
    guard = Guard()
    try:
        outer, own = os.environ[MARKER].split(":")
        assert outer == "outer"
        assert len(own) == 32
        assert MARKER.encode() not in Path(f"/proc/{guard._process.pid}/environ").read_bytes()
    finally:
        guard.close()
