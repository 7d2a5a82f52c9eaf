"""`pavlov demo`: the whole pipeline on the embedded model.

::

    1 sample    two answers to each training prompt, one to each held-out prompt (base policy)
    2 compare   a *simulated* assessor with a published rule and noise (labelling/simulated.py)
    3 reward    a Bradley-Terry ensemble from the comparisons
    4 rl        the policy against the ensemble; held-out prompts are answered again at its end
    5 judge     tuned against base on the held-out prompts, by the rule, which did not train it

Each stage leaves a file in the output folder and is skipped where its file is there, so that an
interrupted demo goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.capacity import require_memory, rl_memory_gib
from cluster.files import folder_beside, in_ray_job, write_atomically
from cluster.layout import usable_cores
from cluster.progress import Progressing
from cluster.session import ray_session
from labelling.simulated import Answer, SimulatedAssessor, rule
from models.preferences import read_pairs, write_pairs
from models.reward_model import RewardModel
from models.sources import portable_name, resolve_model
from rlhf.config import DemoConfig, RLConfig, expanded, parse_config
from rlhf.ensemble import aggregate
from rlhf.errors import RunFolderError
from rlhf.records import Completion, Message, Prompt
from rlhf.statistics import paired_interval, wilson_interval
from trainers.attempts import Clock
from trainers.fleet import Fleet
from trainers.reward import require_pairs, train_reward_model
from trainers.reward_card import describe
from trainers.rl import run_rl
from trainers.sampling import requests_for, sample, sample_with_engine

INSTRUCTION = "You are a helpful assistant. Answer in one or two short sentences."
"""The system message of every prompt: what the base policy hears and seldom does."""

_PROMPTS = Path(__file__).with_name("demo_prompts.jsonl")


def demo_prompts(split: str, count: int) -> list[Prompt]:
    """The first `count` shipped prompts of ``train`` or ``heldout``."""
    rows = [json.loads(line) for line in _PROMPTS.read_text().splitlines()]
    chosen = [row for row in rows if row["split"] == split][:count]
    system = Message("system", INSTRUCTION)
    return [Prompt(row["id"], (system, Message("user", row["prompt"])), "demo") for row in chosen]


def run_demo(config: DemoConfig, out: Path, console: Console) -> dict[str, Any]:
    """Run or continue the demo in `out`; returns the summary."""
    out = expanded(out)
    if in_ray_job() and not out.is_absolute():
        raise RunFolderError(
            f"inside a Ray job the folder {out} would lie in Ray's temporary copy of the code and "
            "be lost; give an absolute --out on storage that outlives the job"
        )
    out = out.absolute()
    recorded = json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
    _refuse_other(out, recorded)
    model = resolve_model(config.policy.model)
    reinforcement = rl_config(config, out)
    require_memory(rl_memory_gib(model, model, reinforcement), reinforcement.cluster)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "config.json", recorded)
    clock = Clock(out)
    if not (out / "summary.json").is_file():
        base = _sample_base(config, out, console)
        clock.save()
        _compare(config, out, base, console)
        _train_reward(config, out, console)
        clock.save()
        _reinforce(config, out, console)
        clock.save()
        _judge(config, out, base, clock, console)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    _show(out, summary, console)
    return summary


def _refuse_other(out: Path, recorded: str) -> None:
    """Refuse a folder that holds something else than this demo."""
    config = out / "config.json"
    if config.is_file():
        if config.read_text() != recorded:
            raise RunFolderError(
                f"{out} holds a demo with other settings; remove it or choose another --out"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is not empty and holds no demo; choose another --out")


def _sample_base(config: DemoConfig, out: Path, console: Console) -> dict[str, list[Answer]]:
    """Stage 1: two answers to each training prompt, one to each held-out prompt."""
    path = out / "base.jsonl"
    if not path.is_file():
        train = demo_prompts("train", config.train_prompts)
        held = demo_prompts("heldout", config.heldout_prompts)
        requests = requests_for(train, 2, config.rl, config.seed)
        requests += requests_for(held, 1, config.rl, config.seed)
        console.print("1 sample    starting an engine")
        with (
            ray_session(f"{out.name}-sample", num_cpus=usable_cores()) as run,
            Progressing(console, "1 sample   ", len(requests)) as progress,
        ):
            drawn = asyncio.run(
                sample_with_engine(
                    portable_name(config.policy.model),
                    config.rollout,
                    config.cluster,
                    requests,
                    run,
                    say=console.print,
                    done=progress.advance,
                )
            )
        _write_answers(path, [request.prompt for request in requests], drawn)
    answers = _read_answers(path)
    console.print(f"1 sample    {sum(map(len, answers.values()))} answers of the base policy")
    return answers


def _compare(
    config: DemoConfig, out: Path, base: dict[str, list[Answer]], console: Console
) -> None:
    """Stage 2: the simulated assessor compares the two answers to each training prompt."""
    path = out / "pairs.parquet"
    if not path.is_file():
        assessor = SimulatedAssessor(config.assessor.noise, config.seed)
        pairs = []
        for prompt in demo_prompts("train", config.train_prompts):
            first, second = base[prompt.id]
            if first.text.strip() != second.text.strip() and first.text and second.text:
                pairs.append(assessor.compare(prompt, first, second))
        write_pairs(pairs, path)
    pairs, _ = read_pairs([path])
    console.print(f"2 compare   {len(pairs)} comparisons by the simulated assessor")


def _train_reward(config: DemoConfig, out: Path, console: Console) -> None:
    """Stage 3: the ensemble."""
    folder = out / "reward"
    if not folder.is_dir():
        pairs, _ = read_pairs([out / "pairs.parquet"])
        require_pairs(pairs, config.ensemble)
        own = out / ".own"
        model = train_reward_model(config.ensemble, pairs, [], config.seed, console, own)
        with folder_beside(folder) as beside:
            model.save(beside)
        shutil.rmtree(own, ignore_errors=True)
    console.print(f"3 reward    {describe(RewardModel.load(folder).card)}")


def _reinforce(config: DemoConfig, out: Path, console: Console) -> None:
    """Stage 4: RL, and the held-out prompts answered by the tuned policy while it is loaded."""
    answers = out / "tuned.jsonl"
    if answers.is_file():
        return
    settings = rl_config(config, out)
    held = demo_prompts("heldout", config.heldout_prompts)
    requests = requests_for(held, 1, config.rl, config.seed)

    async def answer(fleet: Fleet) -> None:
        with Progressing(console, "4 answer   ", len(requests)) as progress:

            async def generate(batch: Sequence[Any]) -> Any:
                return await fleet.generate(batch, 0, together=False)

            decoded = config.rollout.max_sequences * config.cluster.rollout.actors
            drawn = await sample(generate, requests, progress.advance, max_sequences=decoded)
        _write_answers(answers, held, drawn)

    console.print("4 rl        starting the actors")
    run_rl(
        settings,
        out / "rl.toml",
        console,
        resume=(out / "rl" / "config.json").is_file(),
        prompts=demo_prompts("train", config.train_prompts),
        finish=answer,
    )


def rl_config(config: DemoConfig, out: Path) -> RLConfig:
    """The demo's reinforcement learning as `pavlov rl` would run it."""
    values = {
        "seed": config.seed,
        "run": {"dir": str(out / "rl"), "checkpoint_every": 4, "keep_checkpoints": 1},
        "reward": {"model": str(out / "reward")},
        "data": {"prompts": [str(_PROMPTS)]},
        # As they are: what was set and what is a default stays told apart.
        **{
            name: getattr(config, name)
            for name in ("policy", "rl", "learner", "rollout", "cluster")
        },
    }
    return parse_config(RLConfig, values, "the demo's configuration")


def _judge(
    config: DemoConfig, out: Path, base: dict[str, list[Answer]], clock: Clock, console: Console
) -> None:
    """Stage 5: the paired comparison on held-out prompts."""
    console.print("5 judge     tuned against base on the held-out prompts")
    tuned = _read_answers(out / "tuned.jsonl")
    held = demo_prompts("heldout", config.heldout_prompts)
    model = RewardModel.load(out / "reward")
    pairs = [(p, base[p.id][0], tuned[p.id][0]) for p in held]
    usable = [(p, b, t) for p, b, t in pairs if b.text.strip() and t.text.strip()]
    texts = [(p.messages, a.text, a.finished) for p, b, t in usable for a in (b, t)]
    rewards = aggregate(model.score(texts).rewards_KN).tolist()
    scores = {p.id: (rewards[2 * i], rewards[2 * i + 1]) for i, (p, _, _) in enumerate(usable)}
    rows = [
        {
            "id": prompt.id,
            "prompt": prompt.messages[-1].content,
            "base": first.text,
            "tuned": second.text,
            "rule_base": rule(prompt.messages[-1].content, first.text, finished=first.finished),
            "rule_tuned": rule(prompt.messages[-1].content, second.text, finished=second.finished),
            "reward_base": scores[prompt.id][0] if prompt.id in scores else None,
            "reward_tuned": scores[prompt.id][1] if prompt.id in scores else None,
            "finished_base": first.finished,
            "finished_tuned": second.finished,
        }
        for prompt, first, second in pairs
    ]
    metrics = [json.loads(line) for line in (out / "rl" / "metrics.jsonl").read_text().splitlines()]
    write_atomically(out / "comparison.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        **summarise(rows),
        "kl_last": metrics[-1]["kl/mean"],
        "steps": len(metrics),
        "wall_s": round(clock.save(), 1),
        "assessor": "simulated (labelling/simulated.py)",
    }
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures from the rows of ``comparison.jsonl``: anyone can recompute them.

    The win rate counts ties as half; its interval is Wilson's. Rule and reward are paired means.
    """
    differences = [row["rule_tuned"] - row["rule_base"] for row in rows]
    wins = sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences)
    share, low, high = wilson_interval(wins, len(differences))
    mean, rule_low, rule_high = paired_interval(differences)
    scored = [row for row in rows if row["reward_base"] is not None]
    return {
        "prompts": len(rows),
        "rule_base": statistics.fmean(row["rule_base"] for row in rows),
        "rule_tuned": statistics.fmean(row["rule_tuned"] for row in rows),
        "rule_difference": mean,
        "rule_low": rule_low,
        "rule_high": rule_high,
        "win_rate": share,
        "win_rate_low": low,
        "win_rate_high": high,
        "reward_base": statistics.fmean(row["reward_base"] for row in scored),
        "reward_tuned": statistics.fmean(row["reward_tuned"] for row in scored),
        "finished_base": statistics.fmean(row["finished_base"] for row in rows),
        "finished_tuned": statistics.fmean(row["finished_tuned"] for row in rows),
    }


def _show(out: Path, summary: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{summary['prompts']} held-out prompts")
    for column in ("", "base", "tuned"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("rule (0-4)", f"{summary['rule_base']:.2f}", f"{summary['rule_tuned']:.2f}")
    table.add_row("reward", f"{summary['reward_base']:+.2f}", f"{summary['reward_tuned']:+.2f}")
    table.add_row("finished", f"{summary['finished_base']:.0%}", f"{summary['finished_tuned']:.0%}")
    console.print(table)
    share, low, high = (summary[f"win_rate{end}"] for end in ("", "_low", "_high"))
    console.print(
        f"by the rule, tuned wins {share:.0%} [{low:.0%}, {high:.0%}]; difference "
        f"{summary['rule_difference']:+.2f} "
        f"[{summary['rule_low']:+.2f}, {summary['rule_high']:+.2f}]"
    )
    rows = [json.loads(line) for line in (out / "comparison.jsonl").read_text().splitlines()]
    for row in rows[:3]:
        console.print(f"\n> {row['prompt']}", markup=False)
        console.print(f"  base:  {' '.join(row['base'].split())}", markup=False)
        console.print(f"  tuned: {' '.join(row['tuned'].split())}", markup=False)
    console.print(
        f"\n{summary['steps']} steps, {summary['wall_s'] / 60:.1f} min. The assessor was "
        f"simulated; every answer stands in {out / 'comparison.jsonl'}",
        markup=False,
    )


def _write_answers(
    path: Path, prompts: Sequence[Prompt], drawn: Sequence[tuple[Completion, ...]]
) -> None:
    rows = [
        {"id": prompt.id, "answers": [[c.text, c.finish_reason == "stop"] for c in completions]}
        for prompt, completions in zip(prompts, drawn, strict=True)
    ]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _read_answers(path: Path) -> dict[str, list[Answer]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        row["id"]: [Answer(text, finished) for text, finished in row["answers"]] for row in rows
    }
