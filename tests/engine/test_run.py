"""`pavlov rl` as a user runs it: the run folder, a kill, a resume, and what is left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from tests.commands import Commands
from tests.leftovers import assert_nothing_left, below, shared_memory

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
STEPS = 4

REQUIRED_METRICS = [
    "step",
    "weight_version",
    "reward/mean",
    "reward/std",
    "ensemble/disagreement",
    "ensemble/flagged_share",
    "kl/mean",
    "kl/coefficient",
    "entropy/mean",
    "staleness/mean",
    "staleness/max",
    "completion/length_mean",
    "time/step_s",
    "time/rollout_s",
    "time/learn_s",
    "time/weights_s",
    "tokens/step",
]


class Runs(Commands):
    """Starts `pavlov rl` on the tiny model, in a folder of its own."""

    def __init__(self, folder: Path, model: Path, reward: Path) -> None:
        super().__init__(folder)
        prompts = folder / "prompts.jsonl"
        words = ["bread", "rice", "nets", "school", "river", "town", "hill", "pasta"]
        rows = [{"id": word, "prompt": f"Tell me about {word}."} for word in words]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.config = folder / "tiny.toml"
        self.config.write_text(
            f"""
deterministic = true
policy = {{ model = "{model}", dtype = "float32" }}
reference.dtype = "float32"
reward.model = "{reward}"
data = {{ prompts = ["{prompts}"], max_prompt_tokens = 64 }}
run.checkpoint_every = 1
rl = {{ num_steps = {STEPS}, prompts_per_step = 2, completions_per_prompt = 4, max_tokens = 24 }}
learner.learning_rate = 1e-3
rollout = {{ dtype = "float32", max_sequences = 8 }}
"""
        )

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        return self.command("rl", str(self.config), f"run.dir={name}", *arguments)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return self.rows(name, "metrics.jsonl")

    def rollouts(self, name: str) -> list[dict[str, Any]]:
        paths = sorted((self.folder / name / "rollouts").glob("*.parquet"))
        return [row for path in paths for row in pq.read_table(path).to_pylist()]

    def until_step(self, name: str, process: subprocess.Popen[str], steps: int) -> None:
        deadline = time.monotonic() + 240
        while len(self.metrics(name)) < steps:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, "no step within 240 s"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_reward_model: Path
) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("runs"), tiny_model, tiny_reward_model)
    yield runs
    for process in runs.started:
        process.kill()


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> str:
    process = runs.start("unbroken")
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return "unbroken"


def test_a_run_leaves_the_promised_folder(runs: Runs, unbroken: str) -> None:
    folder = runs.folder / unbroken
    metrics = runs.metrics(unbroken)
    assert [row["step"] for row in metrics] == list(range(STEPS))
    assert all(key in row for row in metrics for key in REQUIRED_METRICS)
    assert all(row["staleness/max"] == 0 for row in metrics)
    assert len(runs.rollouts(unbroken)) == STEPS * 2 * 4
    assert json.loads((folder / "config.json").read_text())["rl"]["num_steps"] == STEPS
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "policy" / "model.safetensors").is_file()
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step-000003",
        "step-000004",
    ]


@pytest.mark.slow
def test_a_run_killed_in_step_three_leaves_nothing_and_resumes_token_for_token(
    runs: Runs, unbroken: str
) -> None:
    before = shared_memory()
    process = runs.start("killed")
    runs.until_step("killed", process, 2)
    processes = below(process.pid)
    assert any("VLLM" in part for p in processes for part in p.cmdline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_nothing_left(processes, before)
    assert len(runs.metrics("killed")) < STEPS
    resumed = runs.start("killed", "--resume")
    output, errors = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, errors
    assert "resuming" in output
    assert_same_run(runs, unbroken, "killed")


def assert_same_run(runs: Runs, first: str, second: str) -> None:
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith(("time/", "learner/"))} for row in rows]
        for rows in (runs.metrics(first), runs.metrics(second))
    ]
    assert runs.rollouts(first) == runs.rollouts(second)
    assert timeless[0] == timeless[1]


@pytest.mark.slow
def test_a_run_that_loses_its_learner_goes_on_by_itself_token_for_token(
    runs: Runs, unbroken: str
) -> None:
    process = runs.start("bereft")
    runs.until_step("bereft", process, 2)
    [learner] = [p for p in below(process.pid) if "LearnerActor" in " ".join(p.cmdline())]
    learner.kill()
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert "learner-0 died" in output
    assert "going on from the newest checkpoint" in output
    assert_same_run(runs, unbroken, "bereft")


@pytest.mark.slow
def test_a_run_whose_raylet_is_killed_ends_and_leaves_nothing(runs: Runs, unbroken: str) -> None:
    before = shared_memory()
    process = runs.start("headless")
    runs.until_step("headless", process, 1)
    processes = below(process.pid)
    [raylet] = [p for p in processes if p.name() == "raylet"]
    raylet.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert "Traceback" not in errors
    assert_nothing_left(processes, before)


@pytest.mark.slow
def test_an_interrupted_run_ends_cleanly(runs: Runs, unbroken: str) -> None:
    before = shared_memory()
    process = runs.start("interrupted")
    runs.until_step("interrupted", process, 1)
    processes = below(process.pid)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert_nothing_left(processes, before)


@pytest.mark.slow
def test_a_run_that_is_stopped_keeps_its_steps_and_resumes_token_for_token(
    runs: Runs, unbroken: str
) -> None:
    """Between the checkpoints that are due, of which there would be none before the last step."""
    process = runs.start("stopped", "run.checkpoint_every=99")
    runs.until_step("stopped", process, 2)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM, errors
    steps = len(runs.metrics("stopped"))
    assert f"kept: all {steps} steps" in output
    resumed = runs.start("stopped", "run.checkpoint_every=99", "--resume")
    output, errors = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, errors
    assert f"after step {steps} (step-{steps:06d})" in output
    assert_same_run(runs, unbroken, "stopped")


@pytest.mark.slow
def test_a_critic_and_a_reward_of_ones_own_in_a_run_that_is_not_waited_for(runs: Runs) -> None:
    """PPO on stale completions, with weights and so the learner's own KL in the reward."""
    (runs.folder / "own_rewards.py").write_text(
        "def length(prompts, completions):\n"
        "    return [float(completion.length) for completion in completions]\n"
    )
    process = runs.start(
        "critic",
        *("deterministic=false", "rl.max_staleness=1", "rl.num_steps=3"),
        *("rl.algorithm.type=ppo", "rl.algorithm.epochs=2", "rl.off_policy.weights=token"),
        "rl.entropy.coefficient=0.01",
        "rl.rewards=[{name='length', function='own_rewards:length', weight=-0.1}]",
    )
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    rows = runs.metrics("critic")
    assert len(rows) == 3
    for row in rows:
        assert row["reward/own_length"] == pytest.approx(row["completion/length_mean"])
        assert 0 < row["importance/effective_share"] <= 1
        assert row["staleness/max"] <= 1
    # Zero at first, then something that was learned.
    values = [row["critic/value"] for row in rows]
    assert values[0] == 0 and values[-1] != 0
    tensors = load_file(runs.folder / "critic" / "policy" / "model.safetensors")
    assert not any("critic" in name for name in tensors)


@pytest.mark.slow
def test_an_adapter_in_a_run_has_no_reference_actor_and_reaches_the_engine(runs: Runs) -> None:
    settings = ("policy.lora.rank=4", "reference.dtype=auto", "learner.zero_stage=1")
    process = runs.start("adapter", *settings, "rl.num_steps=3")
    printed, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert "reference-0" not in printed
    rows = runs.metrics("adapter")
    # The engine merged what the learner has, and the adapter, zero at first, moves the policy.
    assert all(row["weights/probe_gap"] < 1e-3 for row in rows)
    assert abs(rows[0]["kl/mean"]) < 1e-2
    assert abs(rows[-1]["kl/mean"]) > 1e-2
    policy = runs.folder / "adapter" / "policy"
    assert (policy / "adapter" / "adapter_config.json").is_file()
    assert (policy / "model.safetensors").is_file()


def test_a_run_that_is_interrupted_while_its_actors_start_ends_cleanly(runs: Runs) -> None:
    before = shared_memory()
    process = runs.start("early")
    assert process.stdout is not None
    while "namespace" not in (line := process.stdout.readline()):
        assert line, process.stderr.read() if process.stderr else ""
    # Placed, and none of them ready yet.
    time.sleep(3)
    started = below(process.pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert_nothing_left(started, before)
