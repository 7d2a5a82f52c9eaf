"""The learner over ranks: two processes under gloo learn what one does, at every ZeRO stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from cluster.session import free_port
from models.adapters import merge
from models.loading import load_causal_model
from models.logprobs import TokenLogprobs, reply_logprobs
from tests.engine.learner_rank import CASES

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]


def learn(model: Path, out: Path, world_size: int, *jobs: tuple[str, int]) -> Path:
    """Each case at its ZeRO stage, by this many ranks, into ``<out>/<case>-<stage>``."""
    out.mkdir()
    port = free_port()
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.engine.learner_rank", str(model), str(out)),
                *(json.dumps(jobs), str(rank), str(world_size), f"127.0.0.1:{port}"),
            ],
            cwd=ROOT,
            # Nothing is compiled: there is no compiler.
            env={
                **os.environ,
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                "PATH": str(out),
                "TORCH_EXTENSIONS_DIR": str(out / "extensions"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, outputs[0][-3000:]
    assert not (out / "extensions").exists()
    return out


@pytest.fixture(scope="module")
def one(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a rank alone learns, a folder for each case; a process does all of them."""
    jobs = [(case, 0) for case in (*CASES, "adapter")]
    return learn(tiny_model, tmp_path_factory.mktemp("ranks") / "one", 1, *jobs)


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks learn, a folder for each case and ZeRO stage."""
    jobs = [("ratio", stage) for stage in range(4)]
    jobs += [("weighed", 0), ("critic", 3), ("own critic", 1), ("adapter", 1)]
    return learn(tiny_model, tmp_path_factory.mktemp("ranks") / "two", 2, *jobs)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_learn_what_one_learns_and_resume_from_their_checkpoint(
    one: Path, two: Path, tiny_model: Path, stage: int
) -> None:
    both = one / "ratio-0", two / f"ratio-{stage}"
    require_the_same(tiny_model, *both)
    if stage == 0:
        require_the_same_gradients(*both)


def test_one_micro_batch_learns_what_several_learn(one: Path, tiny_model: Path) -> None:
    both = one / "ratio-0", one / "whole-0"
    require_the_same(tiny_model, *both)
    require_the_same_gradients(*both)


def require_the_same_gradients(*both: Path) -> None:
    """Of the first step, to a hundred-thousandth of the largest."""
    one, two = (load_file(out / "gradients.safetensors") for out in both)
    for name in one:
        largest = float(one[name].abs().max())
        assert largest > 0, name
        torch.testing.assert_close(two[name], one[name], atol=1e-5 * largest, rtol=0, msg=name)


@pytest.mark.parametrize(("case", "stage"), [("weighed", 0), ("critic", 3), ("own critic", 1)])
def test_so_they_do_with_weights_and_with_a_critic(
    one: Path, two: Path, tiny_model: Path, case: str, stage: int
) -> None:
    reports = require_the_same(tiny_model, one / f"{case}-0", two / f"{case}-{stage}")
    if case != "weighed":
        # The head starts at zero, and then follows the returns.
        values = [report["critic/value"] for report in reports]
        assert values[0] == 0.0 and values[-1] != 0.0
    else:
        # The second of these steps is far from what was sampled.
        assert reports[-1]["importance/masked_share"] > 0
        assert reports[-1]["importance/truncated_share"] > 0
        assert 0 < reports[0]["importance/effective_share"] < 1


def test_an_adapter_is_all_that_is_trained_kept_and_sent(
    one: Path, two: Path, tiny_model: Path
) -> None:
    both = [one / "adapter-0", two / "adapter-1"]
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
