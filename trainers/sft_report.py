"""What a run of fine-tuning came to: summary, curves and the table at the end."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.sft_worker import read_evaluations
from cluster.files import as_json, write_atomically
from rlhf.config import SFTConfig
from rlhf.statistics import paired_interval
from rlhf.stopping import Evaluation, verdict


def summarise(folder: Path, config: SFTConfig, wall_s: float) -> dict[str, Any]:
    """What the run came to; also written as ``summary.json``, with the curves beside it.

    The difference by which stopping by loss falls short is paired over prompts, 95 %. Both were
    chosen on these prompts, so the figures of the best are somewhat too good.
    """
    evaluations = read_evaluations(folder)
    said = verdict(evaluations, config.stopping)
    best, by_loss = evaluations[said.best_by_reward], evaluations[said.best_by_loss]
    penalty = config.stopping.disagreement_penalty
    cost, low, high = _difference(best, by_loss)
    summary: dict[str, Any] = {
        "reward_best_step": best.step,
        "reward_at_best": best.reward,
        "lower_reward_at_best": statistics.fmean(best.lower_P(penalty)),
        "loss_at_reward_best": best.loss,
        "loss_best_step": by_loss.step,
        "loss_at_best": by_loss.loss,
        "reward_at_loss_best": by_loss.reward,
        "cost_of_stopping_by_loss": cost,
        "cost_low": low,
        "cost_high": high,
        "reward_start": evaluations[0].reward,
        "loss_start": evaluations[0].loss,
        "stopped_by_reward": said.stop,
        "steps": evaluations[-1].step,
        "prompts": len(best.rewards_P),
        "wall_s": round(wall_s, 1),
    }
    baseline = folder / "baseline.json"
    if baseline.is_file():
        prompted = Evaluation(**json.loads(baseline.read_text()))
        gain, gain_low, gain_high = _difference(best, prompted)
        summary |= {
            "reward_prompted": prompted.reward,
            "gain_over_prompting": gain,
            "gain_low": gain_low,
            "gain_high": gain_high,
        }
    write_atomically(folder / "summary.json", as_json(summary, indent=2) + "\n")
    draw(evaluations, folder / "curves.png")
    return summary


def _difference(one: Evaluation, other: Evaluation) -> tuple[float, float, float]:
    pairs = zip(one.rewards_P, other.rewards_P, strict=True)
    return paired_interval([a - b for a, b in pairs])


def draw(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Loss, reward with its interval, and disagreement over steps, in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [each.step for each in evaluations]
    intervals = [paired_interval(each.rewards_P) for each in evaluations]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4))
    axes[0].plot(steps, [each.loss for each in evaluations])
    axes[0].set_title("loss on held-out conversations, nats per token", fontsize=9)
    axes[1].plot(steps, [mean for mean, _, _ in intervals])
    axes[1].fill_between(
        steps, [low for _, low, _ in intervals], [high for _, _, high in intervals], alpha=0.2
    )
    axes[1].set_title("reward of answers to held-out prompts, 95 %", fontsize=9)
    axes[2].plot(steps, [each.disagreement for each in evaluations])
    axes[2].set_title("disagreement of the ensemble", fontsize=9)
    for axis in axes:
        axis.set_xlabel("optimiser step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def show(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """The table at the end."""
    table = Table(title=f"{summary['prompts']} held-out prompts, {summary['steps']} steps")
    for column in ("", "step", "loss", "reward"):
        table.add_column(column, justify="right" if column else "left")
    at_start = (f"{summary['loss_start']:.3f}", f"{summary['reward_start']:+.2f}")
    table.add_row("start policy", "0", *at_start)
    if "reward_prompted" in summary:
        table.add_row("start policy, prompted", "0", "", f"{summary['reward_prompted']:+.2f}")
    for name, kind in (("best by loss", "loss"), ("best by reward", "reward")):
        loss = summary["loss_at_best" if kind == "loss" else "loss_at_reward_best"]
        reward = summary["reward_at_loss_best" if kind == "loss" else "reward_at_best"]
        table.add_row(name, str(summary[f"{kind}_best_step"]), f"{loss:.3f}", f"{reward:+.2f}")
    console.print(table)
    console.print(
        f"stopping by loss would have cost {summary['cost_of_stopping_by_loss']:+.2f} "
        f"[{summary['cost_low']:+.2f}, {summary['cost_high']:+.2f}] of reward"
    )
    if "reward_prompted" in summary:
        console.print(
            f"fine-tuning adds {summary['gain_over_prompting']:+.2f} [{summary['gain_low']:+.2f}, "
            f"{summary['gain_high']:+.2f}] to prompting"
        )
    console.print(f"curves: {folder / 'curves.png'}", markup=False)
