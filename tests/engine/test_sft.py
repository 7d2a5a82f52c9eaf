"""`pavlov sft` as a user runs it: verdicts, what is kept, a kill and a resume, two workers."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from rlhf.config import SFTConfig, load_config
from rlhf.errors import PavlovError
from tests.commands import Commands
from tests.leftovers import assert_nothing_left, below, shared_memory
from trainers.sft import run_sft

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
WORDS = ["bread", "rice", "nets", "school", "river", "town", "hill", "pasta", "tea", "boat"]


class Runs(Commands):
    """Starts `pavlov sft` on the tiny model, in a folder of its own."""

    def __init__(self, folder: Path, model: Path, reward: Path) -> None:
        super().__init__(folder)
        talk, prompts = folder / "talk.jsonl", folder / "prompts.jsonl"
        rows: list[dict[str, Any]] = [
            {"prompt": f"What is {word} number {n}?", "completion": f"It is {word} for {n} people."}
            for n in range(4)
            for word in WORDS
        ]
        rows += [
            {"prompt": "Long?", "completion": "very " * 200},
            {"prompt": "Empty?", "completion": " "},
            {"messages": [{"role": "system", "content": "Be brief."}]},
        ]
        talk.write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = [{"id": word, "prompt": f"Tell me about {word}."} for word in WORDS[:6]]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in asked))
        self.config = folder / "tiny.toml"
        self.config.write_text(
            f"""
policy = {{ model = "{model}", dtype = "float32" }}
data = {{ conversations = ["{talk}"], max_tokens = 100, held_out = 6 }}
sft = {{ batch_conversations = 8, epochs = 2 }}
stopping = {{ every = 3, patience = 9 }}
reward.model = "{reward}"
answers = {{ prompts = ["{prompts}"], max_tokens = 12, max_prompt_tokens = 64 }}
learner = {{ learning_rate = 1e-3, micro_batch_tokens = 256 }}
rollout = {{ dtype = "float32", max_sequences = 8 }}
"""
        )

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        return self.command("sft", str(self.config), f"run.dir={name}", *arguments)

    def evaluated(self, name: str) -> subprocess.Popen[str]:
        """A run that has been evaluated twice and goes on."""
        process = self.start(name)
        deadline = time.monotonic() + 240
        while len(self.rows(name, "evaluations.jsonl")) < 2:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, "no evaluation within 240 s"
            time.sleep(0.05)
        return process


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_reward_model: Path
) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("sft"), tiny_model, tiny_reward_model)
    yield runs
    for process in runs.started:
        process.kill()


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> str:
    process = runs.start("unbroken")
    printed, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    (runs.folder / "printed.txt").write_text(printed)
    return "unbroken"


def test_a_run_says_what_it_left_out_learns_and_keeps_the_best(
    runs: Runs, unbroken: str, tiny_model: Path
) -> None:
    printed = (runs.folder / "printed.txt").read_text()
    assert (
        "2 left out (1 with empty reply, 1 with conversation without an assistant turn" in printed
    )
    assert "1 conversations: longer than 100 tokens (first at line 41 of" in printed
    folder = runs.folder / unbroken
    evaluations = runs.rows(unbroken, "evaluations.jsonl")
    metrics = runs.rows(unbroken, "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(len(metrics)))
    assert [row["step"] for row in evaluations] == [*range(0, len(metrics), 3), len(metrics)]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 0.3
    assert list((folder / "tensorboard").glob("events*"))
    summary = json.loads((folder / "summary.json").read_text())
    means = {row["step"]: sum(row["rewards_P"]) / 6 for row in evaluations}
    assert summary["reward_at_best"] == pytest.approx(means[summary["reward_best_step"]])
    assert summary["loss_at_best"] == min(row["loss"] for row in evaluations)
    assert summary["reward_start"] == pytest.approx(means[0])
    assert (folder / "curves.png").stat().st_size > 5000
    answers = runs.rows(unbroken, "answers/step-000000.jsonl")
    assert [row["id"] for row in answers] == WORDS[:6]
    prompted = runs.rows(unbroken, "answers/baseline.jsonl")
    assert prompted[0]["prompt"][0]["role"] == "system"
    # What is kept by loss is what was trained furthest here: other weights than the start's.
    start = load_file(tiny_model / "model.safetensors")
    kept = load_file(folder / "policy-by-loss" / "model.safetensors")
    assert any((kept[name] - start[name]).abs().max() > 1e-3 for name in start)


@pytest.mark.slow
def test_two_workers_learn_what_one_does(runs: Runs, unbroken: str) -> None:
    process = runs.start("two", "cluster.learner.actors=2", "learner.zero_stage=1")
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    one, two = (runs.rows(name, "metrics.jsonl") for name in (unbroken, "two"))
    assert [row["loss/train"] for row in two] == pytest.approx(
        [row["loss/train"] for row in one], abs=1e-4
    )
    one, two = (runs.rows(name, "evaluations.jsonl") for name in (unbroken, "two"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-4)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_from_its_checkpoint_and_ends_as_the_unbroken(
    runs: Runs, unbroken: str
) -> None:
    before = shared_memory()
    process = runs.evaluated("killed")
    started = below(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_nothing_left(started, before)
    process = runs.start("killed", "--resume")
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        one, other = runs.rows(unbroken, name), runs.rows("killed", name)
        assert [row["step"] for row in other] == [row["step"] for row in one]
        key = "loss/train" if name == "metrics.jsonl" else "loss"
        assert [r[key] for r in other] == pytest.approx([r[key] for r in one], abs=1e-4)
    policies = [
        load_file(runs.folder / name / "policy-by-loss" / "model.safetensors")
        for name in (unbroken, "killed")
    ]
    for name, tensor in policies[0].items():
        torch.testing.assert_close(policies[1][name], tensor, atol=2e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_goes_on_by_itself(runs: Runs, unbroken: str) -> None:
    before = shared_memory()
    process = runs.evaluated("worker")
    started = below(process.pid)
    [worker] = [each for each in started if "TrainWorker" in " ".join(each.cmdline())]
    worker.kill()
    printed, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert "a worker died" in printed and "going on from the newest checkpoint" in printed
    for name, key in (("metrics.jsonl", "loss/train"), ("evaluations.jsonl", "loss")):
        one, other = runs.rows(unbroken, name), runs.rows("worker", name)
        assert [row["step"] for row in other] == [row["step"] for row in one]
        assert [r[key] for r in other] == pytest.approx([r[key] for r in one], abs=1e-4)
    assert_nothing_left(started, before)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.conversations=['nowhere.jsonl']", "there is no data file"),
        ("reward.model=nowhere", "nowhere"),
        ("data.max_tokens=3", "too few"),
        ("answers.max_prompt_tokens=2", "at least 2 are needed"),
        ("policy.model=no-such-folder", "no-such-folder"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(
    runs: Runs, override: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAVLOV_RUNS", str(runs.folder))
    config = load_config(SFTConfig, runs.config, [override, "run.dir=refused"])
    with pytest.raises(PavlovError, match=said) as refusal:
        run_sft(config, runs.config, Console(quiet=True))
    assert len(str(refusal.value).splitlines()) == 1
    assert not (runs.folder / "refused").exists()


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_without_repeating_what_is_finished(runs: Runs) -> None:
    search = (
        *("tune", str(runs.config)),
        *("tune.trials=3", "tune.batch_conversations=[8]", "tune.lora_rank=[0, 2]"),
        *("tune.learning_rate=[1e-4, 1e-2]", "tune.final_prompts=2", "answers.limit=4"),
        *("stopping.every=2", "tune.grace=1", "run.dir=search"),
    )

    before = shared_memory()
    process = runs.command(*search)
    trials = runs.folder / "search" / "trials"
    deadline = time.monotonic() + 300
    while not list(trials.glob("*/finished.json")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, "no trial within 300 s"
        time.sleep(0.1)
    started = below(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_nothing_left(started, before)
    done = {path: path.stat().st_mtime_ns for path in trials.glob("*/finished.json")}
    process = runs.command(*search, "--resume")
    printed, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert f"{len(done)} trials are there already" in printed
    assert all(path.stat().st_mtime_ns == at for path, at in done.items())
    summary = json.loads((runs.folder / "search" / "summary.json").read_text())
    objectives = {t["trial"]["number"]: t["objective"] for t in summary["trials"]}
    assert sorted(objectives) == [0, 1, 2]
    # What an interrupted trial or an ended worker left is gone, and no optimiser's state was kept.
    kept = {path.name for path in trials.glob("*/*") if path.is_dir()}
    assert kept == {"policy", "answers"}
    # All start from one policy, which is measured once.
    assert len(list(trials.glob("*/answers/step-000000.jsonl"))) == 1
    starts = [runs.rows(f"search/trials/{n:03d}", "evaluations.jsonl")[0] for n in range(3)]
    assert starts[0] == starts[1] == starts[2] and starts[0]["step"] == 0
    assert summary["winner"]["objective"] == max(objectives.values())
    assert summary["low"] <= summary["difference"] <= summary["high"]
    assert (runs.folder / "search" / "policy" / "model.safetensors").is_file()
    assert (runs.folder / "search" / "trials.png").stat().st_size > 3000
