"""`pavlov tune`: the settings of fine-tuning, chosen by the reward of what the model then says.

Each trial is a run of `pavlov sft` in a folder of its own below ``trials/``; all share one engine,
one ensemble and what the first has measured of the policy that all start from. The settings follow
from the seed, so that a search that was interrupted goes on with the trials that are left.
Successive halving (Li et al., 2020, A System for Massively Parallel Hyperparameter Tuning) ends
those that fall behind. A trial's objective is the best mean *lower reward* of its evaluations:
reward less disagreement. Being chosen on them makes it look better than it is; therefore the winner
meets the median trial on prompts that no trial saw.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import statistics
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray.tune import Callback
from rich.console import Console
from rich.table import Table

from actors.sft_worker import SFTJob, read_evaluations
from cluster.capacity import require_memory, sft_memory_gib
from cluster.files import as_json, folder_beside, resolve_run_folder, write_atomically
from cluster.layout import usable_cores
from cluster.progress import Progressing
from cluster.session import ray_session
from cluster.spawn import find_cause, first_line
from models.sources import resolve_model
from rlhf.config import LoRASection, SFTConfig, TuneConfig
from rlhf.errors import ActorLostError, CheckpointError, RunError, WeightUpdateError
from rlhf.seeding import derive_seed
from rlhf.statistics import paired_interval
from rlhf.stopping import Evaluation, verdict
from trainers.attempts import Clock, until_done
from trainers.comparing import side_by_side
from trainers.sft import EXAMPLES, claim, fit, start_job, steps_of
from trainers.sft_data import Prepared, prepare

_DONE = "finished.json"
_FAILED = "failed.txt"
_LOOK_EVERY_S = 0.5
_TRIAL_CPUS = 0.05


@dataclass(frozen=True, slots=True)
class Trial:
    """What one trial tries."""

    number: int
    learning_rate: float
    epochs: int
    batch_conversations: int
    lora_rank: int

    @property
    def sentence(self) -> str:
        """Its settings in one line."""
        adapter = f", rank {self.lora_rank}" if self.lora_rank else ""
        return (
            f"rate {self.learning_rate:.2g}, {self.epochs} epochs, batch "
            f"{self.batch_conversations}{adapter}"
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trial."""

    trial: Trial
    objective: float
    best_step: int
    reward: float
    disagreement: float
    steps: int
    ended: str


def run_tune(
    config: TuneConfig, config_path: Path, console: Console, *, resume: bool = False
) -> Path:
    """Search; returns the run folder, with the winner in ``policy/``.

    Everything that the user may have got wrong is checked before the folder is claimed and before
    any actor starts.
    """
    folder_path = resolve_run_folder(config.run.dir, config_path)
    prepared = prepare(config, console, more_prompts=config.tune.final_prompts)
    require_memory(_memory_gib(config, prepared.model), config.cluster)
    folder = claim(config, folder_path, prepared, resume=resume)
    try:
        clock = Clock(folder.path)
        until_done(
            lambda _: _attempt(config, prepared, folder.path, clock, console),
            config.cluster.restarts,
            console.print,
            resume=resume,
            where="with the trials that are left",
        )
    finally:
        folder.release()
    return folder.path


def _attempt(
    config: TuneConfig, prepared: Prepared, run: Path, clock: Clock, console: Console
) -> None:
    """The trials that are left, the final comparison and the summary."""
    with ray_session(run.name, num_cpus=usable_cores()) as namespace:
        console.print(f"run {run}  namespace {namespace}")
        trials = drawn(config)
        left = [trial for trial in trials if not (_folder(run, trial) / _DONE).is_file()]
        if len(left) < len(trials):
            console.print(f"{len(trials) - len(left)} trials are there already")
        concurrent = min(config.tune.concurrent, max(1, len(left)))
        shared = start_job(
            config, prepared, run, namespace, console, resume=False, concurrent=concurrent
        )
        shared = replace(shared, prompted=())
        if left:
            _search(config, left, shared, len(prepared.train), clock, console)
        outcomes = [_outcome(run, trial) for trial in trials]
        unseen = prepared.prompts[config.answers.limit :]
        summary = _final(replace(shared, prompts=unseen), outcomes, console)
    summary["wall_s"] = round(clock.save(), 1)
    write_atomically(run / "summary.json", as_json(summary, indent=2) + "\n")
    _show(outcomes, summary, run, console)


def _memory_gib(config: TuneConfig, model: str) -> float:
    """Of as many trials at once as there may be, the largest of them."""
    trials = drawn(config)
    policy, concurrent = resolve_model(model), min(config.tune.concurrent, len(trials))
    return max(
        sft_memory_gib(policy, settings_of(config, trial), concurrent=concurrent)
        for trial in trials
    )


def drawn(config: TuneConfig) -> list[Trial]:
    """The trials, which follow from the seed: rates evenly spread in their logarithm, one in each
    of as many parts of the range as there are trials, choices at random."""
    draw = random.Random(derive_seed(config.seed, "tune"))
    settings, count = config.tune, config.tune.trials
    own = config.policy.lora.rank if config.policy.lora else 0
    low, high = (math.log(rate) for rate in settings.learning_rate)
    parts = list(range(count))
    draw.shuffle(parts)
    return [
        Trial(
            number,
            math.exp(low + (high - low) * (part + draw.random()) / count),
            draw.choice(settings.epochs),
            draw.choice(settings.batch_conversations),
            draw.choice(settings.lora_rank) or own,
        )
        for number, part in enumerate(parts)
    ]


def settings_of(config: TuneConfig, trial: Trial) -> SFTConfig:
    """The configuration that `pavlov sft` would run the trial by."""
    values = config.model_dump(exclude={"tune"})
    values["learner"]["learning_rate"] = trial.learning_rate
    values["sft"] |= {"epochs": trial.epochs, "batch_conversations": trial.batch_conversations}
    values["policy"]["lora"] = None
    if trial.lora_rank:
        lora = config.policy.lora or LoRASection()
        alpha = max(1, round(trial.lora_rank * lora.alpha / lora.rank))
        values["policy"]["lora"] = lora.model_dump() | {"rank": trial.lora_rank, "alpha": alpha}
    return SFTConfig.model_validate(values)


def _folder(run: Path, trial: Trial) -> Path:
    return run / "trials" / f"{trial.number:03d}"


def _search(
    config: TuneConfig,
    trials: Sequence[Trial],
    shared: SFTJob,
    examples: int,
    clock: Clock,
    console: Console,
) -> None:
    """All trials that are left, by Ray Tune; each leaves a mark when it has come to its end.

    Raises:
        ActorLostError: a trial was lost with a worker, the engine or the ensemble.
        RunError: a trial failed otherwise, or the search was interrupted.
    """
    # Ours ends the command; Tune's would let it go on with half a search.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    from ray import tune
    from ray.exceptions import RayActorError
    from ray.tune.schedulers import ASHAScheduler

    run = Path(shared.folder)
    penalty = config.stopping.disagreement_penalty

    def attempt(choice: dict[str, Any]) -> None:
        """One trial, in a process of Tune's own."""
        trial: Trial = choice["trial"]
        folder = _folder(run, trial)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        settings = settings_of(config, trial)
        # As a run says what it was: `pavlov promote` asks what a start policy was trained by.
        write_atomically(folder / "config.json", settings.model_dump_json(indent=2) + "\n")
        # As the job goes: the way of the weights may have been changed for several nodes.
        settings = settings.model_copy(update={"cluster": shared.config.cluster})
        job = replace(
            shared,
            config=settings,
            folder=str(folder),
            shared_memory=f"{shared.shared_memory}-trial-{trial.number}",
            steps=steps_of(settings, examples),
            start=start_known(run),
            # A trial that was cut short begins anew.
            checkpoints=False,
        )
        failures: list[BaseException] = []

        def train() -> None:
            try:
                fit(job, run / EXAMPLES, config.tune.concurrent)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=train, daemon=True)
        thread.start()
        told = 0
        while True:
            over = not thread.is_alive()
            evaluations = read_evaluations(folder)
            for place in range(told, len(evaluations)):
                found = _best(evaluations[: place + 1], penalty)
                tune.report({"objective": found[0], "evaluation": place})
            told = len(evaluations)
            if over:
                break
            thread.join(_LOOK_EVERY_S)
        if failures and isinstance(failures[0], WeightUpdateError | CheckpointError):
            # Weights that no engine takes are what such a setting leads to, and would again.
            (folder / _FAILED).write_text(str(failures[0]))
        elif failures:
            raise failures[0]

    with Progressing(console, "trials", len(trials)) as progress:
        tuner = tune.Tuner(
            tune.with_resources(attempt, {"CPU": _TRIAL_CPUS}),
            param_space={"trial": tune.grid_search(list(trials))},
            tune_config=tune.TuneConfig(
                metric="objective",
                mode="max",
                max_concurrent_trials=config.tune.concurrent,
                scheduler=ASHAScheduler(
                    time_attr="evaluation",
                    max_t=10**6,
                    grace_period=config.tune.grace,
                    reduction_factor=config.tune.reduction,
                ),
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=str(run / ".tune"),
                verbose=0,
                callbacks=[Marking(run, config, examples, clock, progress)],
            ),
        )
        results = tuner.fit()
    shutil.rmtree(run / ".tune", ignore_errors=True)
    if results.errors:
        causes = [find_cause(error) for error in results.errors]
        if lost := [each for each in causes if isinstance(each, ActorLostError | RayActorError)]:
            raise ActorLostError(f"a trial was lost: {first_line(lost[0])}")
        raise RunError(f"a trial failed: {first_line(causes[0])}; go on with --resume")
    if not all((_folder(run, trial) / _DONE).is_file() for trial in trials):
        raise RunError("the search was interrupted; go on with --resume")
    # Those of an earlier attempt too: large, and what an ended worker was just writing.
    for path in (run / "trials").glob("*/*"):
        if path.is_dir() and path.name not in ("policy", "answers"):
            shutil.rmtree(path, ignore_errors=True)


def start_known(run: Path) -> Evaluation | None:
    """What a trial has measured before its first step: all start from the same policy."""
    for folder in sorted((run / "trials").iterdir()):
        if evaluations := read_evaluations(folder):
            return evaluations[0]
    return None


class Marking(Callback):
    """What Tune calls when a trial is over: it is marked, and said."""

    def __init__(
        self, run: Path, config: TuneConfig, examples: int, clock: Clock, progress: Progressing
    ) -> None:
        self._run, self._config, self._examples, self._clock = run, config, examples, clock
        self._progress: Progressing | None = progress

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a copy of the search on disk; a terminal cannot be.
        return {**self.__dict__, "_progress": None}

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """See `ray.tune.Callback`."""
        done: Trial = trial.config["trial"]
        folder = _folder(self._run, done)
        mark = _mark(folder, settings_of(self._config, done), self._examples)
        write_atomically(folder / _DONE, json.dumps(mark) + "\n")
        self._clock.save()
        if self._progress is not None:
            self._progress.advance(note=f"{done.sentence}: {mark['ended']}")


def _mark(folder: Path, settings: SFTConfig, examples: int) -> dict[str, Any]:
    """What came of a trial, from what it measured."""
    evaluations = read_evaluations(folder)
    if (folder / _FAILED).is_file() or not evaluations:
        reason = (folder / _FAILED).read_text() if (folder / _FAILED).is_file() else "no evaluation"
        return {"objective": None, "ended": f"failed: {reason}"}
    objective, best = _best(evaluations, settings.stopping.disagreement_penalty)
    steps = evaluations[-1].step
    if verdict(evaluations, settings.stopping).stop:
        ended = "no sure rise"
    else:
        ended = "all data" if steps == steps_of(settings, examples) else "fell behind"
    return {
        "objective": objective,
        "best_step": best.step,
        "reward": best.reward,
        "disagreement": best.disagreement,
        "steps": steps,
        "ended": f"{ended} at step {steps}, objective {objective:+.3f}",
    }


def _best(evaluations: Sequence[Evaluation], penalty: float) -> tuple[float, Evaluation]:
    """The largest mean lower reward, and where."""
    means = [statistics.fmean(each.lower_P(penalty)) for each in evaluations]
    return max(means), evaluations[means.index(max(means))]


def _outcome(run: Path, trial: Trial) -> Outcome:
    mark = json.loads((_folder(run, trial) / _DONE).read_text())
    if mark["objective"] is None:
        return Outcome(trial, -math.inf, 0, math.nan, math.nan, 0, mark["ended"])
    return Outcome(trial, **mark)


def _final(job: SFTJob, outcomes: Sequence[Outcome], console: Console) -> dict[str, Any]:
    """The winner against the median trial on prompts that the search did not see.

    Raises:
        RunError: fewer than two trials came to something.
    """
    run = Path(job.folder)
    ranked = sorted(outcomes, key=lambda outcome: -outcome.objective)
    good = [outcome for outcome in ranked if outcome.objective > -math.inf]
    if len(good) < 2:
        raise RunError(
            f"{len(good)} of {len(outcomes)} trials came to something: {ranked[-1].ended}"
        )
    winner, median = good[0], good[len(good) // 2]
    console.print(
        f"trials {winner.trial.number} and {median.trial.number} answer {len(job.prompts)} prompts"
    )
    policies = [_folder(run, outcome.trial) / "policy" for outcome in (winner, median)]
    found = side_by_side(job, policies, run / "final")
    pairs = zip(found[0].rewards_P, found[1].rewards_P, strict=True)
    mean, low, high = paired_interval([a - b for a, b in pairs])
    with folder_beside(run / "policy") as beside:
        shutil.copytree(policies[0], beside, dirs_exist_ok=True)
    return {
        "winner": asdict(winner),
        "median": asdict(median),
        "prompts": len(job.prompts),
        "reward_winner": found[0].reward,
        "reward_median": found[1].reward,
        "difference": mean,
        "low": low,
        "high": high,
        "trials": [asdict(outcome) for outcome in outcomes],
    }


def _show(
    outcomes: Sequence[Outcome], summary: dict[str, Any], run: Path, console: Console
) -> None:
    table = Table(title=f"{len(outcomes)} trials, best first")
    for column in ("trial", "settings", "objective", "reward", "disagreement", "best at", "ended"):
        table.add_column(column)
    for outcome in sorted(outcomes, key=lambda outcome: -outcome.objective):
        table.add_row(
            str(outcome.trial.number),
            outcome.trial.sentence,
            f"{outcome.objective:+.3f}",
            f"{outcome.reward:+.3f}",
            f"{outcome.disagreement:.3f}",
            f"step {outcome.best_step}",
            outcome.ended,
        )
    console.print(table)
    console.print(
        f"on {summary['prompts']} prompts that no trial saw the winner is "
        f"{summary['difference']:+.3f} [{summary['low']:+.3f}, {summary['high']:+.3f}] above the "
        "median trial"
    )
    draw(outcomes, run / "trials.png")
    console.print(f"all trials: {run / 'trials.png'}", markup=False)


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Objective over learning rate, a mark a trial."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for outcome in outcomes:
        if outcome.objective == -math.inf:
            continue
        axis.scatter(outcome.trial.learning_rate, outcome.objective, color="tab:blue")
        axis.annotate(
            str(outcome.trial.number),
            (outcome.trial.learning_rate, outcome.objective),
            textcoords="offset points",
            xytext=(4, 4),
            fontsize=8,
        )
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("reward less disagreement, best evaluation")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
