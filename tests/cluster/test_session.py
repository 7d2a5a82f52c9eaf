"""What the start of a run sweeps away of the runs before it. No cluster is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.learner import LearnerActor
from cluster import session
from cluster.session import shared_memory_folder, sweep_shared_memory
from rlhf.config import LearnerSection, RLSection

ROOT = Path(__file__).parents[2]

pytest.importorskip("ray", reason="ray is not installed")


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of /dev/shm: the real one holds other runs' weights."""
    folder = tmp_path / "shm"
    folder.mkdir()

    def path(name: Any) -> Path:
        return folder if str(name) == "/dev/shm" else Path(name)

    monkeypatch.setattr(session, "Path", path)
    assert shared_memory_folder("x") == folder / "pavlov-x"
    return folder


def test_what_a_run_that_is_gone_left_in_shared_memory_is_removed(shared):
    gone = shared_memory_folder("gone")
    gone.mkdir()
    (gone / "version-3.safetensors").write_bytes(b"weights")
    (shared / "of-somebody-else").mkdir()
    sweep_shared_memory()
    assert [path.name for path in shared.iterdir()] == ["of-somebody-else"]


def test_what_an_engine_fetched_into_a_folder_of_its_own_is_removed_too(shared):
    fetched = shared_memory_folder("gone") / "rollout-0"
    fetched.mkdir(parents=True)
    (fetched / "version-3.safetensors").write_bytes(b"weights")
    sweep_shared_memory()
    assert not list(shared.iterdir())


LEARNER = """
import sys
from pathlib import Path
import torch
from actors.learner import LearnerActor
from rlhf.config import LearnerSection, RLSection

folder = Path(sys.argv[2])
actor = LearnerActor(
    sys.argv[1], "float32", LearnerSection(), RLSection(), "float32", "shared_memory",
    str(folder), "run", "learner-0",
)
actor._sender.prepare(1, [("w", torch.ones(2))])
print("ready", flush=True)
sys.stdin.read()
"""


def test_the_start_of_a_run_takes_nothing_from_a_run_that_lives(shared, tiny_model):
    live = shared_memory_folder("live")
    process = subprocess.Popen(
        [sys.executable, "-c", LEARNER, str(tiny_model), str(live)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        sweep_shared_memory()
        assert (live / "version-1.safetensors").is_file()
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_a_learner_that_shuts_down_drops_its_weights(shared, tiny_model, monkeypatch):
    from cluster.guard import MARKER

    monkeypatch.setenv(MARKER, "outer")
    folder = shared_memory_folder("mine")
    actor = LearnerActor(
        str(tiny_model),
        "float32",
        LearnerSection(),
        RLSection(),
        "float32",
        "shared_memory",
        str(folder),
        "run",
        "learner-0",
    )
    folder.mkdir(exist_ok=True)
    (folder / "version-1.safetensors").write_bytes(b"weights")
    actor.shutdown()
    assert not folder.exists()
