"""The learner over ranks: two processes under gloo learn what one does, at every ZeRO stage."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.cpp_extension import get_default_build_root

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]

RANK = """
import sys
from pathlib import Path
from actors.learner import LearnerActor
from rlhf.config import KLSection, LearnerSection, RLSection
from rlhf.records import TrainingBatch, TrainingSequence

model, out, stage, rank, world_size, master = sys.argv[1:]
out, stage, rank, world_size = Path(out), int(stage), int(rank), int(world_size)
# Of several lengths and in an odd number of micro-batches, so that the ranks' shares differ.
sequences = tuple(
    TrainingSequence(
        tuple(range(5, 12 + index)), tuple(range(20, 30 + 3 * index)),
        (-6.0,) * (10 + 3 * index), (-1.0) ** index * (1 + index), (-5.5,) * (10 + 3 * index),
    )
    for index in range(5)
)
batch = TrainingBatch(sequences, 64, 1.0, kl_coefficient=0.1, entropy_coefficient=0.01)
actor = LearnerActor(
    model, "float32", LearnerSection(learning_rate=1e-3, zero_stage=stage, micro_batch_tokens=48),
    RLSection(max_tokens=64, kl=KLSection(coefficient=0.1, place="loss")),
    "float32", "shared_memory", str(out / "shm"), "ranks",
    f"learner-{rank}", rank=rank, world_size=world_size,
)
actor.start(master)
reports = [actor.step(batch, step) for step in range(2)]
actor.save_checkpoint(str(out / "checkpoint"))
actor.step(batch, 2)
actor.load_checkpoint(str(out / "checkpoint"))
reports.append(actor.step(batch, 2))
probe = actor.probe()
manifest = actor.export_weights(3)
actor.save_policy(str(out / "policy"))
if rank == 0:
    import json
    assert manifest.version == 3 and Path(manifest.location).is_file()
    (out / "reports.json").write_text(json.dumps([report.metrics for report in reports]))
    (out / "probe.json").write_text(json.dumps(probe.logprobs))
actor.shutdown()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def learn(model: Path, out: Path, stage: int, world_size: int, **environment: str) -> None:
    out.mkdir()
    port = free_port()
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", RANK, str(model), str(out), str(stage)),
                *(str(rank), str(world_size), f"127.0.0.1:{port}"),
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, outputs[0][-3000:]


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks") / "alone"
    learn(tiny_model, out, 0, 1)
    return out


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_learn_what_one_learns_and_resume_from_their_checkpoint(
    alone: Path, tiny_model: Path, tmp_path: Path, stage: int
) -> None:
    learn(tiny_model, tmp_path / "two", stage, 2)
    start = load_file(tiny_model / "model.safetensors")
    both = (alone, tmp_path / "two")
    one, two = (load_file(out / "policy" / "model.safetensors") for out in both)
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - start[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=0, msg=name)
    reports = [json.loads((out / "reports.json").read_text()) for out in both]
    for single, double in zip(*reports, strict=True):
        assert single.keys() == double.keys()
        for key in single.keys() - {"learner/tokens_per_s"}:
            assert double[key] == pytest.approx(single[key], rel=1e-3, abs=1e-5), key
    probes = [json.loads((out / "probe.json").read_text()) for out in both]
    assert probes[0] == pytest.approx(probes[1], abs=1e-4)


def test_a_build_that_was_killed_half_way_holds_nobody_up(
    alone: Path, tiny_model: Path, tmp_path: Path
) -> None:
    built = next((Path(get_default_build_root()) / "pavlov").glob("torch-*"))
    copy = shutil.copytree(built, tmp_path / "extensions")
    [operator] = [path for path in copy.iterdir() if path.is_dir()]
    # As torch leaves it when its process is gone.
    (operator / "lock").touch()
    learn(tiny_model, tmp_path / "after", 0, 1, TORCH_EXTENSIONS_DIR=str(copy))
    assert not (operator / "lock").exists()
