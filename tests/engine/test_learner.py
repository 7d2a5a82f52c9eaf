"""The learner over ranks: two processes under gloo learn what one does, at every ZeRO stage."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.cpp_extension import get_default_build_root

from models.adapters import merge
from models.loading import load_causal_model
from models.logprobs import TokenLogprobs, reply_logprobs
from rlhf.records import Completion

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]

RANK = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from actors.engine import TrainingEngine
from actors.learner import LearnerActor
from rlhf.config import LearnerSection, LoRASection, RLSection
from rlhf.records import Message, Prompt, RolloutGroup, TrainingBatch, TrainingSequence
from tests.engine.test_learner import CASES, completion

model, out, stage, rank, world_size, master, case = sys.argv[1:]
out, stage, rank, world_size = Path(out), int(stage), int(rank), int(world_size)
# Of several lengths and in an odd number of micro-batches, so that the ranks' shares differ.
sequences = tuple(
    TrainingSequence(
        tuple(range(5, 12 + index)), tuple(range(20, 30 + 3 * index)),
        (-6.0,) * (10 + 3 * index), (-1.0) ** index * (1 + index), (-5.5,) * (10 + 3 * index),
        (0.0,) * (9 + 3 * index) + ((-1.0) ** index * (1 + index),),
    )
    for index in range(5)
)
batch = TrainingBatch(sequences, 64, 1.0, kl_coefficient=0.1, entropy_coefficient=0.01)
actor = LearnerActor(
    model, "float32",
    LearnerSection(
        learning_rate=1e-3, zero_stage=stage, micro_batch_tokens=4096 if case == "whole" else 48
    ),
    RLSection.model_validate({"max_tokens": 64} | CASES.get(case, lambda _: {})(model)),
    "float32", "shared_memory", str(out / "shm"), "ranks",
    f"learner-{rank}", rank=rank, world_size=world_size,
    lora=LoRASection(rank=4, alpha=8) if case == "adapter" else None,
    critic=model if case == "own critic" else None,
)
gradients, norm = [], TrainingEngine._gradient_norm

def spy(engine):
    # After the ranks have added up, before the step.
    gradients.append({name: p.grad.clone() for name, p in engine.module.named_parameters()})
    return norm(engine)

if stage == 0 and case in ("ratio", "whole"):
    TrainingEngine._gradient_norm = spy
actor.start(master)
reports = [actor.step(batch, step) for step in range(2)]
actor.save_checkpoint(str(out / "checkpoint"))
actor.step(batch, 2)
actor.load_checkpoint(str(out / "checkpoint"))
reports.append(actor.step(batch, 2))
groups = [
    RolloutGroup(
        Prompt("p", (Message("user", "?"),)), 0, s.prompt_token_ids,
        (completion(s.completion_token_ids), completion(s.completion_token_ids[:4])),
    )
    for s in sequences
]
evaluated = actor.evaluate(groups)
probe = actor.probe()
manifest = actor.export_weights(3)
references = actor.reference_logprobs(groups) if case == "adapter" else None
actor.save_policy(str(out / "policy"))
if rank == 0:
    import json, shutil
    assert manifest.version == 3 and Path(manifest.location).is_file()
    (out / "reports.json").write_text(json.dumps([report.metrics for report in reports]))
    (out / "probe.json").write_text(json.dumps(probe.logprobs))
    (out / "evaluated.json").write_text(json.dumps(evaluated))
    if gradients:
        save_file(gradients[0], out / "gradients.safetensors")
    (out / "references.json").write_text(json.dumps(references))
    if case == "adapter":
        shutil.copy(manifest.location, out / "wire.safetensors")
actor.shutdown()
"""


CASES: dict[str, Callable[[str], dict[str, Any]]] = {
    "ratio": lambda _: {"kl": {"coefficient": 0.1, "place": "loss"}},
    "whole": lambda _: {"kl": {"coefficient": 0.1, "place": "loss"}},
    # Several optimiser steps a batch, weights against the start, a critic on the policy's state or
    # of its own.
    "weighed": lambda _: {
        "algorithm": {"type": "rloo", "epochs": 2, "mini_batches": 2},
        "off_policy": {"weights": "sequence", "truncate": 5.0, "mask_outside": [1e-6, 1e6]},
    },
    "critic": lambda _: {"algorithm": {"type": "ppo", "epochs": 2, "mini_batches": 2}},
    "own critic": lambda model: {"algorithm": {"type": "ppo", "critic": {"model": model}}},
}
"""Settings of `rl`, from the model's folder."""


def completion(token_ids: tuple[int, ...]) -> Completion:
    logprobs = (-1.0,) * len(token_ids)
    return Completion(token_ids, "x", logprobs, "stop", 0, 0, 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def learn(
    model: Path, out: Path, stage: int, world_size: int, case: str = "ratio", **environment: str
) -> None:
    out.mkdir()
    port = free_port()
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", RANK, str(model), str(out), str(stage)),
                *(str(rank), str(world_size), f"127.0.0.1:{port}", case),
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
    require_the_same(tiny_model, alone, tmp_path / "two")
    if stage == 0:
        require_the_same_gradients(alone, tmp_path / "two")


def test_one_micro_batch_learns_what_several_learn(
    alone: Path, tiny_model: Path, tmp_path: Path
) -> None:
    learn(tiny_model, tmp_path / "whole", 0, 1, "whole")
    require_the_same(tiny_model, alone, tmp_path / "whole")
    require_the_same_gradients(alone, tmp_path / "whole")


def require_the_same_gradients(*both: Path) -> None:
    """Of the first step, to a hundred-thousandth of the largest."""
    one, two = (load_file(out / "gradients.safetensors") for out in both)
    for name in one:
        largest = float(one[name].abs().max())
        assert largest > 0, name
        torch.testing.assert_close(two[name], one[name], atol=1e-5 * largest, rtol=0, msg=name)


@pytest.mark.parametrize(("case", "stage"), [("weighed", 0), ("critic", 3), ("own critic", 1)])
def test_so_they_do_with_weights_and_with_a_critic(
    tiny_model: Path, tmp_path: Path, case: str, stage: int
) -> None:
    for name, ranks, zero in (("one", 1, 0), ("two", 2, stage)):
        learn(tiny_model, tmp_path / name, zero, ranks, case)
    reports = require_the_same(tiny_model, tmp_path / "one", tmp_path / "two")
    if case != "weighed":
        # The head starts at zero, and then follows the returns.
        values = [report["critic/value"] for report in reports]
        assert values[0] == 0.0 and values[-1] != 0.0
    else:
        # The second of these steps is far from what was sampled.
        assert reports[-1]["importance/masked_share"] > 0
        assert reports[-1]["importance/truncated_share"] > 0
        assert 0 < reports[0]["importance/effective_share"] < 1


def test_an_adapter_is_all_that_is_trained_kept_and_sent(tiny_model: Path, tmp_path: Path) -> None:
    both = [tmp_path / "one", tmp_path / "two"]
    for ranks, out in enumerate(both, 1):
        learn(tiny_model, out, ranks - 1, ranks, "adapter")
    start = load_file(tiny_model / "model.safetensors")
    layers = {name for name in start if "proj" in name}
    require_the_same(tiny_model, *both, changed=layers)
    wire = load_file(both[0] / "wire.safetensors")
    ends = {f".lora_{side}" for side in "AB"}
    assert wire.keys() == {name.removesuffix(".weight") + end for name in layers for end in ends}
    # What an engine makes of it, and what peft makes of the folder, is the policy.
    policy = load_file(both[0] / "policy" / "model.safetensors")
    for name, merged in merge(start.items(), wire, torch.float32):
        torch.testing.assert_close(merged, policy[name], atol=1e-6, rtol=0, msg=name)
    loaded = PeftModel.from_pretrained(
        load_causal_model(tiny_model, "float32"), str(both[0] / "policy" / "adapter")
    ).merge_and_unload()
    for name, merged in loaded.named_parameters():
        torch.testing.assert_close(merged, policy[name], atol=1e-6, rtol=0, msg=name)
    # A checkpoint holds no weight that stays as it was.
    kept = sum(
        path.stat().st_size for path in (both[0] / "checkpoint").rglob("*") if path.is_file()
    )
    assert kept < 0.7 * (tiny_model / "model.safetensors").stat().st_size
    # With the adapter off the learner is the start model.
    references = json.loads((both[0] / "references.json").read_text())
    first = references[0][0]
    expected = reply_logprobs(
        TokenLogprobs(load_causal_model(tiny_model, "float32")),
        [tuple(range(5, 12))],
        [tuple(range(20, 30))],
        temperature=1.0,
        pad_id=0,
        budget_tokens=1024,
    )
    assert first == pytest.approx(expected[0], abs=1e-4)


def require_the_same(
    model: Path, *both: Path, changed: set[str] | None = None
) -> list[dict[str, float]]:
    """That both learned the same, and something (all weights, or those named); returns what the
    first reports."""
    start = load_file(model / "model.safetensors")
    one, two = (load_file(out / "policy" / "model.safetensors") for out in both)
    assert one.keys() == two.keys()
    for name in one:
        moved = float((one[name] - start[name]).abs().max())
        assert moved > 1e-3 if changed is None or name in changed else moved == 0, name
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=0, msg=name)
    reports = [json.loads((out / "reports.json").read_text()) for out in both]
    for single, double in zip(*reports, strict=True):
        assert single.keys() == double.keys()
        for key in single.keys() - {"learner/tokens_per_s"}:
            assert double[key] == pytest.approx(single[key], rel=1e-3, abs=1e-5), key
    probes = [json.loads((out / "probe.json").read_text()) for out in both]
    assert probes[0] == pytest.approx(probes[1], abs=1e-4)
    evaluated = [json.loads((out / "evaluated.json").read_text()) for out in both]
    for one_group, two_group in zip(*evaluated, strict=True):
        logprobs, entropies = one_group
        assert [len(row) for row in logprobs][1] == [len(row) for row in entropies][1] == 4
        assert max(map(max, logprobs)) < 0 < min(map(min, entropies))
        for one_rows, two_rows in zip(one_group, two_group, strict=True):
            for one_row, two_row in zip(one_rows, two_rows, strict=True):
                assert one_row == pytest.approx(two_row, abs=1e-4)
    return list(reports[0])


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
