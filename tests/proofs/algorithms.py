"""What the algorithms do to the embedded model: the same prompts, ensemble and samples for each.

A cell is a demo run (`trainers/demo.py`) with other settings. ``docs/proofs/algorithms/`` keeps
what a cell gave, and in ``shared/`` what all begin with, the base answers and comparisons of one
`make demo`; the ensemble made of them is that of the first cell on a machine. So what differs is
the reinforcement learning alone. Every cell answers the held-out prompts, and is judged by the
ensemble that trained it *and* by the demo's rule, which took no part in training.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rlhf.config import DemoConfig, load_config
from rlhf.statistics import paired_interval
from tests.proofs.runner import PICTURES, ROOT, commit, hold, pavlov, prove, rows

CONFIG = ROOT / "configs" / "demo.toml"
# As many samples for each: 16 steps of 36 completions.
SAME = ("rl.num_steps=16", "rl.prompts_per_step=6", "rl.completions_per_prompt=6")
# Pinned, so that cells of another day stand on the reward model of the kept ones.
ENSEMBLE = (
    "ensemble.members=[{pooling='last',count=12,depth=0.67},"
    "{pooling='mean',count=10,depth=0.67},{pooling='mean',count=10,depth=0.4}]",
    "ensemble.folds=5",
)
SEEDS = (0, 1)
JUDGES = ("rule", "reward")
SIDES = ("base", "tuned")
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "grpo": (),
    "Dr. GRPO": (
        "rl.algorithm.divide_by_deviation=false",
        "rl.algorithm.normalisation=constant",
    ),
    "rloo": ("rl.algorithm.type=rloo",),
    "reinforce_pp": ("rl.algorithm.type=reinforce_pp",),
    "cem": ("rl.algorithm.type=cem",),
    "ppo": ("rl.algorithm.type=ppo",),
    "gspo": ("rl.algorithm.type=gspo",),
    "gspo, weights": ("rl.algorithm.type=gspo", "rl.off_policy.weights=sequence"),
}
TERMS: dict[str, tuple[str, ...]] = {
    "neither": ("rl.kl.coefficient=0", "rl.entropy.coefficient=0"),
    "KL alone": ("rl.entropy.coefficient=0",),
    "entropy alone": ("rl.kl.coefficient=0", "rl.entropy.coefficient=0.03"),
    "both": ("rl.entropy.coefficient=0.03",),
    "both, steered": (
        "rl.entropy.coefficient=0.03",
        "rl.entropy.target=2.8",
        "rl.entropy.rate=0.9",
    ),
}
FAST = ("learner.learning_rate=1e-4",)
"""A step so large that something must hold the policy."""
LAGS: dict[str, tuple[str, ...]] = {
    "0": (),
    "1": ("rl.max_staleness=1",),
    "1, weights": ("rl.max_staleness=1", "rl.off_policy.weights=token"),
    "4": ("rl.max_staleness=4",),
    "4, weights": ("rl.max_staleness=4", "rl.off_policy.weights=token"),
}
_KEPT = ROOT / "docs" / "proofs" / "algorithms"
_METRICS = (
    *("step", "reward/mean", "kl/mean", "entropy/mean", "tokens/step"),
    *("time/step_s", "time/rollout_s", "time/learn_s", "importance/effective_share"),
)


def cell(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What a demo of these settings gave: ``docs/proofs/algorithms/<name>.json``, made where there
    is none of these settings, so that a round goes on on another machine."""
    settings = [*SAME, *overrides]
    path = _KEPT / f"{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}.json"
    if path.is_file() and (kept := json.loads(path.read_text()))["settings"] == settings:
        return dict(kept)
    folder = _run(name, settings)
    found = {
        "settings": settings,
        "commit": commit(),
        "reward_version": json.loads((folder / "reward" / "reward.json").read_text())["version"],
        "comparison": [
            {f"{judge}_{side}": row[f"{judge}_{side}"] for judge in JUDGES for side in SIDES}
            for row in rows(folder / "comparison.jsonl")
        ],
        "metrics": [
            {key: row[key] for key in _METRICS if key in row}
            for row in rows(folder / "rl" / "metrics.jsonl")
        ],
        "lags": _lags(folder / "rl" / "rollouts"),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(_lines(found))
    return found


def _run(name: str, settings: Sequence[str]) -> Path:
    """The folder of a finished demo; one that was interrupted goes on."""
    settings = [*ENSEMBLE, *settings]
    cells = ROOT / "runs" / "proofs" / "algorithms" / "cells"
    folder = cells / name
    finished = [path.parent for path in sorted(cells.glob("*/summary.json"))]
    if folder in finished:
        return folder
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(_KEPT / "shared", folder)
        if finished:
            shutil.copytree(finished[0] / "reward", folder / "reward")
        # The demo takes a folder for its own by the settings that stand in it.
        config = load_config(DemoConfig, CONFIG, list(settings)).model_dump(mode="json")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"cell {name}: {' '.join(settings)}", flush=True)
    pavlov("demo", *settings, "--out", str(folder), runs=cells)
    # 2 GB a cell.
    for large in ("checkpoints", "policy"):
        shutil.rmtree(folder / "rl" / large)
    return folder


def _lags(rollouts: Path) -> dict[str, int]:
    """How many completions were so many versions behind."""
    lags: Counter[int] = Counter()
    for path in sorted(rollouts.glob("*.parquet")):
        for row in pq.read_table(path, columns=["step", "oldest_version"]).to_pylist():
            if row["oldest_version"] is not None:
                lags[row["step"] - row["oldest_version"]] += 1
    return {str(lag): count for lag, count in sorted(lags.items())}


def _lines(found: dict[str, Any]) -> str:
    """JSON with a line for each row of a table."""
    parts = []
    for key, value in found.items():
        table = isinstance(value, list) and value and isinstance(value[0], dict)
        lines = ",\n  ".join(json.dumps(row) for row in value) if table else ""
        said = f"[\n  {lines}\n ]" if table else json.dumps(value)
        parts.append(f" {json.dumps(key)}: {said}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def one_reward_model(cells: Iterable[dict[str, Any]]) -> bool:
    """Whether the same ensemble trained and judged all."""
    return len({each["reward_version"] for each in cells}) == 1


def judged(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tuned against base on the held-out prompts, means over seeds and paired over prompts."""
    found: dict[str, Any] = {}
    for name in JUDGES:
        differences = [
            [row[f"{name}_tuned"] - row[f"{name}_base"] for row in same]
            for same in zip(*(each["comparison"] for each in cells), strict=True)
            if all(row["reward_base"] is not None for row in same)
        ]
        found[name] = paired_interval([statistics.fmean(each) for each in differences])
    metrics = [each["metrics"] for each in cells]
    found["kl"] = statistics.fmean(run[-1]["kl/mean"] for run in metrics)
    found["entropy"] = statistics.fmean(
        run[-1]["entropy/mean"] for run in metrics if run[-1]["entropy/mean"] is not None
    )
    for name in ("learn", "rollout", "step"):
        seconds = [row[f"time/{name}_s"] for run in metrics for row in run]
        found[name] = statistics.median(seconds)
    return found


def shown(found: dict[str, Any]) -> str:
    (rule, *rule_ends), (reward, *reward_ends) = found["rule"], found["reward"]
    return (
        f"rule {rule:+.2f} [{rule_ends[0]:+.2f}, {rule_ends[1]:+.2f}], reward {reward:+.2f} "
        f"[{reward_ends[0]:+.2f}, {reward_ends[1]:+.2f}], KL {found['kl']:.1f}, entropy "
        f"{found['entropy']:.2f}, learning {found['learn']:.1f} s of {found['step']:.1f} s a step"
    )


def they_learn(folder: Path) -> dict[str, Any]:
    """Each algorithm from the embedded model on the same prompts, ensemble and samples (16 steps of
    36 completions, 2 seeds), against the base on held-out prompts, by the ensemble that trained it
    and by the rule that took no part in training: mean paired differences with 95 % intervals. The
    default is better by both."""
    # Seed by seed, so that an interrupted round has all algorithms once.
    made = {
        (name, seed): cell(f"{name}, seed {seed}", (f"seed={seed}", *settings))
        for seed in SEEDS
        for name, settings in ALGORITHMS.items()
    }
    figures: dict[str, Any] = {}
    bars = {"one reward model": one_reward_model(made.values())}
    for name in ALGORITHMS:
        found = judged([made[name, seed] for seed in SEEDS])
        figures[name] = shown(found)
        if name == "grpo":
            for judge in JUDGES:
                bars[f"the default is better by the {judge}"] = found[judge][1] > 0
    return hold(bars, figures)


def kl_and_entropy(folder: Path) -> dict[str, Any]:
    """With a large step (1e-4), the KL penalty keeps the policy nearer to the reference than the
    same run without, over all steps and over the last four; a fixed entropy bonus keeps it less
    certain over all steps, alone also in the last four (beside the KL these are reported), a
    steered one there too. The curves: docs/pictures/kl_and_entropy.png."""
    made = {
        name: cell(f"terms, {name}", ("seed=0", *FAST, *settings))
        for name, settings in TERMS.items()
    }
    curves = {name: each["metrics"] for name, each in made.items()}
    _draw(
        curves,
        {
            "kl/mean": "KL to the reference, nats per completion",
            "entropy/mean": "entropy, nats per token",
            "reward/mean": "reward of the ensemble",
        },
        "kl_and_entropy.png",
    )

    def mean(name: str, key: str, last: int = 0) -> float:
        """Over the last so many steps, 0 for all."""
        return statistics.fmean(row[f"{key}/mean"] for row in curves[name][-last:])

    figures = {
        f"{name}, {when}": f"KL {mean(name, 'kl', last):.1f}, "
        f"entropy {mean(name, 'entropy', last):.2f}, reward {mean(name, 'reward', last):+.2f}"
        for name in TERMS
        for when, last in (("all steps", 0), ("last four", 4))
    }
    bars = {
        "one reward model": one_reward_model(made.values()),
        "bonus alone, last four": mean("entropy alone", "entropy", 4)
        > mean("neither", "entropy", 4),
        "steered, last four": mean("both, steered", "entropy", 4)
        > max(mean("both", "entropy", 4), mean("KL alone", "entropy", 4)),
    }
    for held, free in (("KL alone", "neither"), ("both", "entropy alone")):
        for last in (0, 4):
            bars[f"{held}: KL below {free}, last {last}"] = mean(held, "kl", last) < mean(
                free, "kl", last
            )
    for held, free in (("entropy alone", "neither"), ("both", "KL alone")):
        bars[f"{held}: entropy above {free}"] = mean(held, "entropy") > mean(free, "entropy")
    return hold(bars, figures)


def staleness(folder: Path) -> dict[str, Any]:
    """The dial at 0, 1 and 4 publishes, with importance weights of tokens and without: no
    completion lags further than it says. Throughput, lags and the outcome are reported."""
    # A run of its own also at 0, so that all are of one machine and can be compared in time.
    made = {name: cell(f"lag {name}", ("seed=0", *more)) for name, more in LAGS.items()}
    figures: dict[str, Any] = {}
    bars = {"one reward model": one_reward_model(made.values())}
    for name, done in made.items():
        metrics = done["metrics"]
        found = judged([done])
        tokens = sum(row["tokens/step"] for row in metrics)
        seconds = sum(row["time/step_s"] for row in metrics)
        effective = statistics.fmean(
            row["importance/effective_share"]
            for row in metrics
            if "importance/effective_share" in row
        )
        figures[f"max_staleness {name}"] = (
            f"{tokens / seconds:.0f} tokens/s, lags {done['lags']}, effective share "
            f"{effective:.3f}, {shown(found)}"
        )
        bars[f"no lag beyond {name}"] = max(map(int, done["lags"])) <= int(name[0])
    return hold(bars, figures)


def _draw(curves: dict[str, list[dict[str, Any]]], panels: dict[str, str], name: str) -> None:
    """One panel a metric, one line a run, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4))
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for label, curve in curves.items():
            there = [(row["step"], row[key]) for row in curve if row[key] is not None]
            axis.plot(*zip(*there, strict=True), label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURES / name, dpi=110)
    pyplot.close(figure)


PROOFS = [they_learn, kl_and_entropy, staleness]


if __name__ == "__main__":
    sys.exit(prove("algorithms", PROOFS, sys.argv[1:]))
