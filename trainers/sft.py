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

import math
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.reward import RewardActor
from actors.rollout import RolloutActor
from actors.sft_worker import SFTJob, SFTWorker, read_evaluations, train_sft
from cluster.capacity import require_memory, sft_memory_gib
from cluster.files import RunFolder, resolve_run_folder, write_atomically
from cluster.layout import (
    CpuLayout,
    actor_environment,
    choose_layout,
    share_of_cores,
    usable_cores,
)
from cluster.progress import Progressing
from cluster.session import ray_session, shared_memory_folder
from cluster.spawn import Role, find_cause, first_cause, first_line, require_room, spawn
from cluster.weights import choose_transport
from models.sources import resolve_model
from rlhf.config import SFTConfig
from rlhf.errors import ActorLostError, PavlovError, ResourceError, RunError, RunFolderError
from rlhf.stopping import Evaluation, verdict
from trainers.attempts import Clock, until_done
from trainers.sft_data import Prepared, prepare, write_examples
from trainers.sft_report import show, summarise

EXAMPLES = ".examples.parquet"
_LOOK_EVERY_S = 1.0
_READ_CPUS = 0.01
"""A whole CPU, Ray Data's default, is never free beside actors that hold parts of it."""


def claim(config: SFTConfig, path: Path, prepared: Prepared, *, resume: bool) -> RunFolder:
    """Take the run's folder and leave the examples in it.

    Raises:
        RunFolderError: as `RunFolder.claim`, or it was started with other data.
    """
    folder = RunFolder.claim(path, config, resume=resume)
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
    folder_path = resolve_run_folder(config.run.dir, config_path)
    prepared = prepare(config, console)
    require_memory(sft_memory_gib(resolve_model(prepared.model), config), config.cluster)
    folder = claim(config, folder_path, prepared, resume=resume)
    path = folder.path

    def attempt(resume: bool) -> None:
        with ray_session(path.name, num_cpus=usable_cores()) as namespace:
            console.print(f"run {path}  namespace {namespace}")
            job = start_job(config, prepared, path, namespace, console, resume=resume)
            _train(job, path / EXAMPLES, clock, console)

    try:
        clock = Clock(path)
        until_done(attempt, config.cluster.restarts, console.print, resume=resume)
        show(summarise(path, config, clock.save()), path, console)
    finally:
        folder.release()
    return path


def steps_of(config: SFTConfig, examples: int) -> int:
    """Optimiser steps that training on so many examples may take."""
    return config.sft.epochs * math.ceil(examples / config.sft.batch_conversations)


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
    cluster = choose_transport(config.cluster, console.print)
    config = config.model_copy(update={"cluster": cluster})
    memory = shared_memory_folder(namespace)
    judges = _judges(config, prepared, namespace, memory)
    learner = config.cluster.learner
    workers = learner.model_copy(update={"actors": learner.actors * concurrent})
    require_room([*judges, Role("learner", SFTWorker, workers, lambda number: {})])
    handles = spawn(
        judges,
        layout_of(config, concurrent),
        threads=threads_of(config, concurrent),
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


def threads_of(config: SFTConfig, concurrent: int) -> int:
    """Threads of the engine, the ensemble and each worker, where nobody takes turns."""
    cluster = config.cluster
    return share_of_cores([cluster.rollout, cluster.reward, *[cluster.learner] * concurrent])


def layout_of(config: SFTConfig, concurrent: int) -> CpuLayout:
    """Threads of their own where several compute at once, whoever takes turns with the engine."""
    cluster = config.cluster
    side_by_side = cluster.side_by_side is not None or concurrent > 1
    return choose_layout(cluster.cpu_layout, side_by_side=side_by_side)


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
        Role("rollout", RolloutActor, cluster.rollout, engine, restarts=3),
        Role("reward", RewardActor, cluster.reward, ensemble, restarts=3),
    ]


def _train(job: SFTJob, data: Path, clock: Clock, console: Console) -> None:
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
            if said < len(evaluations):
                said = len(evaluations)
                clock.save()
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
        ActorLostError: a worker died.
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
    layout, threads = layout_of(job.config, concurrent), threads_of(job.config, concurrent)
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
            worker_runtime_env={"env_vars": actor_environment(layout, placement.gpus, threads)},
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
    # Ray says so of an actor that died, and of nothing else.
    if type(getattr(error, "controller_failure", None)).__name__ == "WorkerGroupStartupFailedError":
        return ActorLostError("a worker died while it started")
    failures = getattr(error, "worker_failures", {}).values()
    if failures:
        # The workers that one left waiting fail too.
        return first_cause([_worker_error(find_cause(failure)) for failure in failures])
    return RunError(f"training failed: {first_line(error)}")


def _worker_error(cause: BaseException) -> PavlovError:
    from ray.exceptions import RayActorError

    if isinstance(cause, PavlovError):
        return cause
    if isinstance(died := getattr(cause, "health_check_failure", None), RayActorError):
        return ActorLostError(f"a worker died: {first_line(died)}")
    return RunError(f"a worker failed: {type(cause).__name__}: {first_line(cause)}")
