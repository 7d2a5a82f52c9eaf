"""`pavlov sft`: supervised fine-tuning that stops by the reward of what the model says.

::

    read, tokenise ─► Ray Data ─► Ray Train workers around the one DeepSpeed wrapper
                                     │ every so many steps: weights
                                     ▼
                      engine answers held-out prompts ─► ensemble ─► verdict (rlhf/stopping.py)

The run folder holds ``policy/`` (best by reward), ``policy-by-loss/``, ``evaluations.jsonl`` and
every answer in ``answers/``; ``baseline.json`` is the start policy with a system turn and examples.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from actors.reward import RewardActor
from actors.rollout import RolloutActor
from actors.sft_worker import SFTJob, SFTWorker, read_evaluations, train_sft
from cluster.files import RunFolder, resolve_run_folder, write_atomically
from cluster.layout import CpuLayout, actor_environment, choose_layout, usable_cores
from cluster.session import ray_session, shared_memory_folder
from cluster.spawn import Role, find_cause, first_line, require_room, spawn
from models.chat import ChatTokenizer
from models.conversations import Example, examples_of
from models.data_files import short_name
from models.preferences import read_conversations, read_prompts
from models.reward_model import RewardModel
from models.sources import portable_name, resolve_model, resolve_reward_model
from rlhf.config import SFTConfig, data_path
from rlhf.errors import DataError, ModelError, PavlovError, ResourceError, RunError, RunFolderError
from rlhf.records import Conversation, Message, Prompt
from rlhf.seeding import derive_seed
from rlhf.statistics import paired_interval
from rlhf.stopping import Evaluation, verdict
from trainers.recording import Progressing

EXAMPLES = ".examples.parquet"
_LOOK_EVERY_S = 1.0
_READ_CPUS = 0.01
"""A whole CPU, Ray Data's default, is never free beside actors that hold parts of it."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a command has read and checked before it claims its folder.

    `prompts` holds `answers.limit` prompts and behind them as many as were asked for; `prompted`
    are the former with the baseline's prompting, none where a template refuses it.
    """

    model: str
    reward: Path
    reward_version: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    prompts: Sequence[Prompt]
    prompted: Sequence[Prompt]
    longest_prompt: int

    @property
    def fingerprint(self) -> str:
        """Hash of all that must stay the same when a run is resumed."""
        parts = [
            self.model,
            self.reward_version,
            *(repr((e.token_ids, e.learnt)) for e in (*self.train, *self.held_out)),
            *(repr(prompt) for prompt in (*self.prompts, *self.prompted)),
        ]
        return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def prepare(config: SFTConfig, console: Console, *, more_prompts: int = 0) -> Prepared:
    """Read the data and check it against policy and reward model; what is left out is said.

    Raises:
        DataError: too little is left.
        ModelError: a model cannot be used.
    """
    model = portable_name(config.policy.model)
    tokenizer = ChatTokenizer(resolve_model(model))
    reward = resolve_reward_model(config.reward.model)
    ensemble = RewardModel.load(reward)
    train, held_out, shown, taught = teaching(config, tokenizer, console)
    prompts = asked(config, tokenizer, ensemble, taught, console, more=more_prompts)
    before = prompted(config, prompts[: config.answers.limit], shown)
    try:
        lengths = [len(tokenizer.prompt_ids(prompt.messages)) for prompt in (*prompts, *before)]
        for prompt in before:
            ensemble.tokenise((prompt.messages, "Yes.", True))
    except ModelError as error:
        console.print(f"no baseline by prompting: {error}")
        before = []
        lengths = [len(tokenizer.prompt_ids(prompt.messages)) for prompt in prompts]
    return Prepared(
        model, reward, ensemble.card.version, train, held_out, prompts, before, max(lengths)
    )


def claim(config: SFTConfig, path: Path, prepared: Prepared, *, resume: bool) -> RunFolder:
    """Take the run's folder and leave the examples in it.

    Raises:
        RunFolderError: as `RunFolder.claim`, or it was started with other data.
    """
    folder = RunFolder.claim(path, config.model_dump(mode="json"), resume=resume)
    mark = folder.path / ".data"
    if resume and mark.is_file() and mark.read_text() != prepared.fingerprint:
        folder.release()
        raise RunFolderError(
            f"{path} was started with other conversations, prompts or another reward model; resume "
            "with the same or choose another run.dir"
        )
    write_examples(prepared.train, folder.path / EXAMPLES)
    write_atomically(mark, prepared.fingerprint)
    return folder


def run_sft(
    config: SFTConfig, config_path: Path, console: Console, *, resume: bool = False
) -> Path:
    """Fine-tune; returns the run folder.

    Everything that the user may have got wrong is checked before the folder is claimed and before
    any actor starts.
    """
    started = time.monotonic()
    folder_path = resolve_run_folder(config.run.dir, config_path)
    prepared = prepare(config, console)
    folder = claim(config, folder_path, prepared, resume=resume)
    try:
        with ray_session(folder.path.name, num_cpus=usable_cores()) as namespace:
            console.print(f"run {folder.path}  namespace {namespace}")
            job = start_job(config, prepared, folder.path, namespace, console, resume=resume)
            _train(job, folder.path / EXAMPLES, console)
        summary = summarise(folder.path, config, time.monotonic() - started)
        show(summary, folder.path, console)
    finally:
        folder.release()
    return folder.path


def teaching(
    config: SFTConfig, tokenizer: ChatTokenizer, console: Console
) -> tuple[list[Example], list[Example], list[Conversation], set[str]]:
    """What is learnt, what the loss is measured on, conversations for the baseline's examples, and
    what those to learn from open with; what was left out is said.

    Raises:
        DataError: nothing is left to learn from, or to measure on.
    """
    settings = config.data
    found, reports = read_conversations(
        [data_path(path) for path in settings.conversations], settings.limit
    )
    for report in reports:
        console.print(report.sentence())
    kept: list[tuple[Conversation, list[Example]]] = []
    why: Counter[str] = Counter()
    first: dict[str, str] = {}
    for line, path, conversation in found:
        try:
            examples = examples_of(conversation, tokenizer)
            longest = max(len(example.token_ids) for example in examples)
            reason = f"longer than {settings.max_tokens} tokens"
            if longest <= settings.max_tokens:
                kept.append((conversation, examples))
                continue
        except ModelError as error:
            reason = str(error)
        why[reason] += 1
        first.setdefault(reason, f"first at line {line} of {short_name(path)}")
    for reason, count in why.most_common(3):
        console.print(f"left out: {count} conversations: {reason} ({first[reason]})")
    turns = sorted(
        {conversation.first_user_turn for conversation, _ in kept},
        key=lambda turn: (derive_seed(config.seed, "held out", turn), turn),
    )
    measured: set[str] = set()
    held: list[Example] = []
    for turn in turns:
        if len(measured) >= settings.held_out or len(measured) >= len(turns) // 2:
            break
        measured.add(turn)
    held = [e for c, each in kept if c.first_user_turn in measured for e in each]
    train = [e for c, each in kept if c.first_user_turn not in measured for e in each]
    if not train or not held:
        raise DataError(
            f"{len(kept)} conversations with {len(turns)} different openings are left: too few to "
            "learn from some and measure the loss on others; give more, or a larger data.max_tokens"
        )
    random.Random(config.seed).shuffle(train)
    console.print(
        f"{len(train)} examples to learn from, {sum(e.count for e in train)} tokens learnt of "
        f"{sum(len(e.token_ids) for e in train)}; loss on {len(held)} others"
    )
    shown = [c for c, _ in kept if c.first_user_turn not in measured and len(c.messages) == 2]
    taught = {c.first_user_turn for c, _ in kept} - measured
    return train, held, shown, taught


def asked(
    config: SFTConfig,
    tokenizer: ChatTokenizer,
    ensemble: RewardModel,
    taught: set[str],
    console: Console,
    *,
    more: int = 0,
) -> list[Prompt]:
    """The prompts that are answered on the way, from the files in turns: `answers.limit` of them,
    and `more` behind.

    Raises:
        DataError: fewer than two are left, or less than `more` behind them.
    """
    settings = config.answers
    found, reports = read_prompts([data_path(path) for path in settings.prompts])
    for report in reports:
        console.print(report.sentence())
    by_source: dict[str, list[Prompt]] = {}
    for prompt in found:
        by_source.setdefault(prompt.source, []).append(prompt)
    turns = [p for each in zip_longest(*by_source.values()) for p in each if p is not None]
    kept: list[Prompt] = []
    why: Counter[str] = Counter()
    for prompt in turns:
        if len(kept) == settings.limit + more:
            break
        opening = next((m.content for m in prompt.messages if m.role == "user"), "")
        try:
            length = len(tokenizer.prompt_ids(prompt.messages))
            ensemble.tokenise((prompt.messages, "Yes.", True))
        except ModelError as error:
            why[str(error)] += 1
            continue
        if opening in taught:
            why["conversations to learn from open with them"] += 1
        elif length > settings.max_prompt_tokens:
            why[f"longer than {settings.max_prompt_tokens} tokens"] += 1
        else:
            kept.append(prompt)
    for reason, count in why.most_common(3):
        console.print(f"left out: {count} prompts: {reason}")
    if len(kept) < 2 or (more and len(kept) < settings.limit + more):
        raise DataError(
            f"{len(kept)} of the {len(found)} prompts of answers.prompts can be answered: at least "
            f"{settings.limit + more if more else 2} are needed; give others than the "
            "conversations', or a larger answers.max_prompt_tokens"
        )
    return kept


def prompted(
    config: SFTConfig, prompts: Sequence[Prompt], shown: Sequence[Conversation]
) -> list[Prompt]:
    """The same prompts with the baseline's system turn and examples before them."""
    system = Message("system", config.baseline.system)
    shots = tuple(m for c in shown[: config.baseline.shots] for m in c.messages)
    return [
        Prompt(prompt.id, (system, *shots, *(m for m in prompt.messages if m.role != "system")))
        for prompt in prompts
    ]


def steps_of(config: SFTConfig, examples: int) -> int:
    """Optimiser steps that training on so many examples may take."""
    return config.sft.epochs * math.ceil(examples / config.sft.batch_conversations)


def write_examples(examples: Sequence[Example], path: Path) -> None:
    """Tokens and what is learnt of them, as Ray Data reads them."""
    table = pa.table(
        {
            "token_ids": pa.array([list(e.token_ids) for e in examples], pa.list_(pa.int32())),
            "learnt": pa.array([list(e.learnt) for e in examples], pa.list_(pa.bool_())),
        }
    )
    beside = path.with_suffix(".part")
    pq.write_table(table, beside)
    beside.rename(path)


def start_job(
    config: SFTConfig,
    prepared: Prepared,
    folder: Path,
    namespace: str,
    console: Console,
    *,
    resume: bool,
    concurrent: int = 1,
) -> SFTJob:
    """A job with its engine and ensemble, once there is room for them and for the workers of so
    many jobs at once. Inside a `ray_session`.

    Raises:
        ResourceError: there is not.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if len(nodes) > 1 and config.cluster.weight_transport == "shared_memory":
        console.print("several nodes: weights travel by Ray's object store")
        cluster = config.cluster.model_copy(update={"weight_transport": "object_store"})
        config = config.model_copy(update={"cluster": cluster})
    memory = shared_memory_folder(namespace)
    judges = _judges(config, prepared, namespace, memory)
    learner = config.cluster.learner
    workers = learner.model_copy(update={"actors": learner.actors * concurrent})
    require_room([*judges, Role("learner", SFTWorker, workers, lambda number: {})])
    handles = spawn(
        judges,
        layout_of(config, concurrent),
        timeout_s=config.cluster.start_timeout_s,
        say=console.print,
    )
    return SFTJob(
        config,
        prepared.model,
        str(folder),
        str(memory),
        prepared.held_out,
        prepared.prompts[: config.answers.limit],
        prepared.prompted,
        steps_of(config, len(prepared.train)),
        handles["rollout"][0],
        handles["reward"][0],
        resume,
    )


def layout_of(config: SFTConfig, concurrent: int) -> CpuLayout:
    """A thread each where several compute at once, whoever takes turns with the engine."""
    if config.cluster.learner.actors > 1 or concurrent > 1:
        return "threads"
    return choose_layout(config.cluster.cpu_layout)


def _judges(config: SFTConfig, prepared: Prepared, run: str, memory: Path) -> list[Role]:
    """The engine that answers and the ensemble that scores."""
    answers, cluster = config.answers, config.cluster

    def engine(number: int) -> dict[str, Any]:
        return {
            "model": prepared.model,
            "settings": config.rollout,
            "max_prompt_tokens": prepared.longest_prompt,
            "max_tokens": answers.max_tokens,
            "shared_memory": str(memory),
            "run": run,
            "name": f"rollout-{number}",
            "gpus": cluster.rollout.gpus,
            "weight_transport": cluster.weight_transport,
        }

    def ensemble(number: int) -> dict[str, Any]:
        return {
            "model": str(prepared.reward),
            "disagreement_penalty": 0.0,
            "run": run,
            "name": f"reward-{number}",
            "gpus": cluster.reward.gpus,
        }

    return [
        Role("rollout", RolloutActor, cluster.rollout, engine),
        Role("reward", RewardActor, cluster.reward, ensemble),
    ]


def _train(job: SFTJob, data: Path, console: Console) -> None:
    """Ray Train, and beside it a line for every evaluation."""
    failures: list[BaseException] = []

    def train() -> None:
        try:
            fit(job, data)
        except BaseException as error:
            failures.append(error)

    folder, config = Path(job.folder), job.config
    thread = threading.Thread(target=train, daemon=True)
    said = len(read_evaluations(folder)) if job.resume else 0
    done = 0
    with Progressing(console, "sft", job.steps) as progress:
        thread.start()
        while True:
            thread.join(_LOOK_EVERY_S)
            over = not thread.is_alive()
            evaluations = read_evaluations(folder)
            for place in range(said, len(evaluations)):
                note = _line(evaluations[: place + 1], config)
                progress.advance(evaluations[place].step - done, note=note)
                done = evaluations[place].step
            said = len(evaluations)
            if over:
                break
    if failures:
        raise failures[0]


def _line(evaluations: Sequence[Evaluation], config: SFTConfig) -> str:
    last = evaluations[-1]
    said = verdict(evaluations, config.stopping)
    best = evaluations[said.best_by_reward]
    return (
        f"loss {last.loss:.3f}  reward {last.reward:+.2f} (best {best.reward:+.2f} at step "
        f"{best.step})  disagreement {last.disagreement:.2f}  flagged {last.flagged_share:.0%}"
        + ("  stopped: no sure rise" if said.stop else "")
    )


def fit(job: SFTJob, data: Path, concurrent: int = 1) -> None:
    """Train by Ray Train on the examples in a file; the run folder has what came of it.

    Raises:
        PavlovError: as a worker raised it.
        RunError: anything else that ended training.
    """
    import ray.data
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster, placement = job.config.cluster, job.config.cluster.learner
    resources = {"CPU": placement.cpus} | ({"GPU": placement.gpus} if placement.gpus else {})
    # Read by the controller, which would else try again for ever.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_timeout_s)
    options = ray.data.ExecutionOptions(preserve_order=True)
    storage = Path(job.folder) / ".ray-train"
    # The annotations are those of Ray Train's first version.
    loop: Any = train_sft
    run_config: Any = RunConfig
    failures: Any = FailureConfig
    trainer = TorchTrainer(
        loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=placement.actors,
            use_gpu=placement.gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=run_config(
            name="sft",
            storage_path=str(storage),
            failure_config=failures(max_failures=0, controller_failure_limit=0),
            worker_runtime_env={
                "env_vars": actor_environment(layout_of(job.config, concurrent), placement.gpus)
            },
        ),
        # Others wait while rank 0 has the engine answer and the ensemble score.
        torch_config=TorchConfig(timeout_s=int(3 * cluster.call_timeout_s)),
        datasets={
            "train": ray.data.read_parquet(str(data), num_cpus=_READ_CPUS, override_num_blocks=1)
        },
        # Every worker reads every batch, in one order, and takes its share of it.
        dataset_config=DataConfig(datasets_to_split=[], execution_options=options),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _reason(error) from None
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _reason(error: Any) -> PavlovError:
    if "WorkerGroupStartupTimeout" in repr(error) + str(error):
        return ResourceError(
            "the learner's workers could not be placed in time: set cluster.learner.cpus and gpus "
            "to what is free, or wait with a larger cluster.start_timeout_s"
        )
    for failure in getattr(error, "worker_failures", {}).values():
        cause = find_cause(failure)
        if isinstance(cause, PavlovError):
            return cause
        return RunError(f"a worker failed: {type(cause).__name__}: {first_line(cause)}")
    return RunError(f"training failed: {first_line(error)}")


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
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
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
