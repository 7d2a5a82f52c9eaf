"""The guard: whatever its owner leaves behind, it removes. No engine and no cluster is started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
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

folder, mapped, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def start(code, **options):
    arguments = [sys.executable, "-c", code, str(mapped)]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, **options).pid

MAP = "import mmap, sys, time; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 4096); "
SLEEP = "import time; time.sleep(600)"
DEAF = "import signal; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; " + SLEEP
DAEMON = '''import subprocess, sys
code = "import time; time.sleep(600)"
sleeper = subprocess.Popen(
    [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL
)
print(sleeper.pid)
'''

guard = Guard(folder)
pids = {"guard": guard.pid}
folder.mkdir()
(folder / "version-1.safetensors").write_bytes(b"weights")
mapped.write_bytes(bytes(4096))

pids["child"] = start(SLEEP)
pids["child in a session of its own"] = start(SLEEP, start_new_session=True)
pids["deaf child"] = start(DEAF)
# Of a parent that is gone at once: re-parented, and in a session of its own.
made = subprocess.run([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE)
pids["orphan in a session of its own"] = int(made.stdout)
if how == "plain":
    pids["child that maps a file"] = start(MAP + "time.sleep(600)")
else:
    with mapped.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 4096)
    # Like a process that renamed itself: its environment can no longer be read.
    pids["child without a marker"] = start(SLEEP, env={})
    if how == "forked":
        pids["child by fork"] = os.fork()
        if not pids["child by fork"]:
            time.sleep(600)
            os._exit(0)
    guard.watch()
time.sleep(0.3)
print(json.dumps(pids), flush=True)
if sys.stdin.readline() == "crash\\n":
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

    def __init__(self, how: str) -> None:
        token = uuid4().hex[:8]
        self.folder = SHARED_MEMORY / f"pavlovtest-{token}"
        self.mapped = SHARED_MEMORY / f"pavlovtest-{token}.map"
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, self.folder, self.mapped, how],
            env={k: v for k, v in os.environ.items() if k != MARKER} | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.pids: dict[str, int] = {}

    def read_pids(self) -> None:
        assert self.process.stdout is not None
        self.pids = json.loads(self.process.stdout.readline())

    def everything(self) -> list[str]:
        return [*self.pids, self.folder.name, self.mapped.name]

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

    def make(how: str = "plain") -> Owned:
        made.append(Owned(how))
        made[-1].read_pids()
        assert made[-1].left() == made[-1].everything()
        return made[-1]

    yield make
    for one in made:
        one.clear_away()


@pytest.mark.parametrize("how", ["plain", "watched", "forked"])
def test_a_killed_owner_leaves_no_process_and_no_shared_memory(owned, how):
    owner = owned(how)
    os.kill(owner.process.pid, signal.SIGKILL)
    assert within(PATIENCE_S, lambda: not owner.left()), owner.left()


@pytest.mark.parametrize("ending", ["crash", "exit"])
def test_an_owner_that_crashes_or_just_ends_leaves_nothing_either(owned, ending):
    owner = owned()
    owner.process.communicate(f"{ending}\n", timeout=30)
    assert within(PATIENCE_S, lambda: not owner.left()), owner.left()


def test_while_its_owner_lives_a_guard_touches_nothing(owned):
    owner = owned("watched")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(owner.pids["guard"], number)
    time.sleep(0.5)
    assert owner.left() == owner.everything()


def test_the_death_of_one_owner_is_nothing_to_another(owned):
    one, other = owned(), owned()
    os.kill(one.process.pid, signal.SIGKILL)
    assert within(PATIENCE_S, lambda: not one.left()), one.left()
    assert other.left() == other.everything()


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


DROPS = """
import gc, subprocess, sys, time
from cluster.guard import Guard

def work():
    guard = Guard()
    raise RuntimeError("the engine did not start")

try:
    work()
except RuntimeError:
    pass
gc.collect()
code = "import time; time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
time.sleep(3)
print("lives", child.pid, flush=True)
"""


def test_an_owner_that_drops_its_guard_lives_on_and_leaves_nothing_in_the_end():
    """An actor whose constructor fails must still be able to say why."""
    done = subprocess.run(
        [sys.executable, "-c", DROPS],
        env={k: v for k, v in os.environ.items() if k != MARKER} | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    lives, child = done.stdout.split()
    assert lives == "lives"
    try:
        assert within(PATIENCE_S, lambda: not alive(int(child)))
    finally:
        with contextlib.suppress(OSError):
            os.kill(int(child), signal.SIGKILL)


def test_closing_a_guard_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(MARKER, "outer")
    folder, bystander = tmp_path / "weights", tmp_path / "other"
    guard = Guard(folder)
    folder.mkdir()
    bystander.mkdir()
    (folder / "version-1.safetensors").write_bytes(b"weights")
    pid = guard.pid
    assert alive(pid)
    guard.close()
    assert not alive(pid)
    assert not folder.exists()
    assert bystander.exists()


def test_closing_twice_or_after_the_guard_died_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv(MARKER, "outer")
    guard = Guard(tmp_path / "weights")
    os.kill(guard.pid, signal.SIGKILL)
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
        assert MARKER.encode() not in Path(f"/proc/{guard.pid}/environ").read_bytes()
    finally:
        guard.close()
