"""Supervised fine-tuning on HH with the embedded model: does loss stop where reward does?"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.sft_worker import read_evaluations
from cluster.layout import usable_cores
from cluster.session import ray_session
from models.sources import resolve_model
from rlhf.config import SFTConfig, load_config
from rlhf.statistics import paired_interval
from rlhf.stopping import verdict
from tests.proofs.runner import PICTURES, ROOT, hold, pavlov, prove, rows, start, until
from trainers.comparing import side_by_side
from trainers.sft import start_job
from trainers.sft_data import prepare
from trainers.sft_report import draw

CONFIG = "configs/sft_hh_cpu.toml"
SEARCH = "configs/tune_hh_cpu.toml"
FRESH = 120
OTHER = (
    "hh/helpful-online/validation.jsonl.gz",
    "hh/helpful-rejection-sampled/validation.jsonl.gz",
)
_SEARCH_S = 40 * 60


def judge(folder: Path) -> Path:
    """The ensemble that judges; trained once."""
    run = folder.parent / "judge"
    if not (run / "reward" / "reward.json").is_file():
        shutil.rmtree(run, ignore_errors=True)
        pavlov("reward", "configs/reward_hh_cpu.toml", f"run.dir={run}", runs=folder.parent)
    return run / "reward"


def curves(folder: Path) -> dict[str, Any]:
    """Fine-tuned on few chosen replies of HH (helpful) at a large step (1e-4) to the end of four
    epochs, whatever the verdict: where the loss and where the reward is best, and what either
    checkpoint's answers to prompts that chose nothing are worth. Reported, not judged. The curves:
    docs/pictures/sft_hh.png."""
    reward = judge(folder)
    # Few conversations, seen often: if the loss is to turn up anywhere, it does here.
    overrides = ["data.limit=400", "sft.epochs=4", "learner.learning_rate=1e-4"]
    overrides += ["stopping.patience=1000", "stopping.every=8"]
    overrides += [f"reward.model={reward}", f"run.dir={folder / 'run'}"]
    if not (folder / "run" / "summary.json").is_file():
        more = ("--resume",) if (folder / "run" / "config.json").is_file() else ()
        pavlov("sft", CONFIG, *overrides, *more, runs=folder)
    config = load_config(SFTConfig, ROOT / CONFIG, overrides)
    evaluations = read_evaluations(folder / "run")
    said = verdict(evaluations, config.stopping)
    draw(evaluations, PICTURES / "sft_hh.png")
    first = next(
        (
            n
            for n in range(1, len(evaluations) + 1)
            if verdict(evaluations[:n], load_config(SFTConfig, ROOT / CONFIG, []).stopping).stop
        ),
        None,
    )
    run = folder / "run"
    found = fresh(
        overrides, [run / "policy", run / "policy-by-loss", resolve_model("embedded")], folder
    )
    best, by_loss, base = (each.rewards_P for each in found)

    def against(one: Any, other: Any) -> str:
        mean, low, high = paired_interval([a - b for a, b in zip(one, other, strict=True)])
        return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"

    figures = {
        "evaluations": [
            f"step {e.step}: loss {e.loss:.3f}, reward {e.reward:+.3f}, disagreement "
            f"{e.disagreement:.3f}"
            for e in evaluations
        ],
        "step of the best loss": evaluations[said.best_by_loss].step,
        "step of the best reward": evaluations[said.best_by_reward].step,
        "the shipped patience would have stopped at step": None
        if first is None
        else evaluations[first - 1].step,
        "fresh prompts": len(best),
        "reward, best by reward": f"{paired_interval(best)[0]:+.3f} "
        f"{[round(end, 3) for end in paired_interval(best)[1:]]}",
        "reward, best by loss": f"{paired_interval(by_loss)[0]:+.3f} "
        f"{[round(end, 3) for end in paired_interval(by_loss)[1:]]}",
        "best by reward less best by loss": against(best, by_loss),
        "best by reward less the start policy": against(best, base),
        "best by loss less the start policy": against(by_loss, base),
    }
    return hold({"both were measured": len(evaluations) > 3}, figures)


def fresh(overrides: list[str], policies: list[Path], folder: Path) -> list[Any]:
    """The policies side by side on prompts of files that the run did not see."""
    console = Console()
    other = [f"answers.prompts={list(OTHER)}", f"answers.limit={FRESH}"]
    config = load_config(SFTConfig, ROOT / CONFIG, [*overrides, *other])
    prepared = prepare(config, console)
    with ray_session("fresh", num_cpus=usable_cores()) as run:
        job = start_job(config, prepared, folder, run, console, resume=False)
        return side_by_side(job, policies, folder / "fresh")


def search(folder: Path) -> dict[str, Any]:
    """`pavlov tune` on the shipped configuration, 8 trials on two cores, killed with SIGKILL once
    two are finished and resumed: no finished trial is repeated, and both attempts together take at
    most 40 minutes. The winner against the median trial on 100 prompts that no trial saw is
    reported, either way."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    reward = judge(folder)
    command = ("tune", SEARCH, f"reward.model={reward}", "run.dir=search")
    began = time.monotonic()
    run = start(*command, runs=folder, log=folder / "log")
    trials = folder / "search" / "trials"
    until(lambda: len(list(trials.glob("*/finished.json"))) >= 2, "two trials", 1800)
    run.send_signal(signal.SIGKILL)
    run.wait()
    done = {path: path.stat().st_mtime_ns for path in trials.glob("*/finished.json")}
    pavlov(*command, "--resume", runs=folder)
    seconds = time.monotonic() - began
    summary = json.loads((folder / "search" / "summary.json").read_text())
    ranked = sorted(summary["trials"], key=lambda trial: -trial["objective"])
    figures = {
        "seconds": round(seconds),
        "finished before the kill": len(done),
        "trials, best first": [
            f"{t['trial']['number']}: rate {t['trial']['learning_rate']:.2g}, batch "
            f"{t['trial']['batch_conversations']}, rank {t['trial']['lora_rank']}, objective "
            f"{t['objective']:+.3f}, ended at step {t['steps']}"
            for t in ranked
        ],
        "prompts that no trial saw": summary["prompts"],
        "winner less median": f"{summary['difference']:+.3f} [{summary['low']:+.3f}, "
        f"{summary['high']:+.3f}]",
    }
    bars = {
        "no finished trial was repeated": all(
            path.stat().st_mtime_ns == at for path, at in done.items()
        ),
        "8 trials": len(ranked) == 8,
        "within 40 minutes": seconds <= _SEARCH_S,
    }
    return hold(bars, figures)


def chain(folder: Path) -> dict[str, Any]:
    """Fine-tuning, `reward`, `rl` as documented, with the policy that the search chose: it is start
    and reference of RL, whose first step is at its reference and whose reward rises from there.
    """
    reward = judge(folder)
    tuned = folder.parent / "search" / "search" / "policy"
    assert tuned.is_dir(), "run the proof `search` first"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pavlov(
        *("rl", "configs/rl_hh_cpu.toml", f"policy.model={tuned}", f"reward.model={reward}"),
        "run.dir=rl",
        runs=folder,
    )
    metrics = rows(folder / "rl" / "metrics.jsonl")
    figures = {
        "KL in step 0": round(metrics[0]["kl/mean"], 3),
        "reward by step": [round(row["reward/mean"], 2) for row in metrics],
        "KL by step": [round(row["kl/mean"], 2) for row in metrics],
        "flagged by step": [round(row["ensemble/flagged_share"], 2) for row in metrics],
    }
    bars = {
        "starts at its reference": abs(metrics[0]["kl/mean"]) < 0.5,
        "the reward rises": sum(row["reward/mean"] for row in metrics[-3:]) / 3
        > metrics[0]["reward/mean"],
    }
    return hold(bars, figures)


PROOFS = [curves, search, chain]


if __name__ == "__main__":
    sys.exit(prove("sft", PROOFS, sys.argv[1:]))
