"""`pavlov rl`: set up, run the loop, leave a run folder that can be resumed and served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.gauges import Gauges
from cluster.capacity import require_memory, rl_memory_gib
from cluster.files import RunFolder, resolve_run_folder
from cluster.layout import usable_cores
from cluster.progress import Progressing
from cluster.session import ray_session, shared_memory_folder
from cluster.spawn import first_cause
from models.chat import ChatTokenizer
from models.reward_model import RewardModel
from models.sources import (
    portable_name,
    require_context,
    resolve_model,
    resolve_reward_model,
    weights_fingerprint,
)
from rlhf.config import PPOSection, RLConfig, data_path
from rlhf.errors import CheckpointError, ModelError, RunError
from rlhf.prompts import PromptCursor
from rlhf.records import FailedGroup, Prompt, ScoredGroup
from rlhf.reward_functions import RewardFunctions
from trainers.attempts import until_done
from trainers.checkpoints import Checkpoints, cancelled_by_sigterm
from trainers.domain_shift import require_same_scores, shift_threshold
from trainers.fleet import Fleet, Models
from trainers.loop import Loop
from trainers.prompts import usable_prompts
from trainers.recording import Recorder

Finish = Callable[[Fleet], Awaitable[None]]


def run_rl(
    config: RLConfig,
    config_path: Path,
    console: Console,
    *,
    resume: bool = False,
    prompts: Sequence[Prompt] | None = None,
    finish: Finish | None = None,
) -> Path:
    """Train; returns the run folder, with the policy in ``policy/``.

    Everything that the user may have got wrong is checked before the folder is claimed and before
    any actor starts.

    Args:
        prompts: used instead of `data.prompts`.
        finish: awaited with the actors still up, after the last step.
    """
    folder_path = resolve_run_folder(config.run.dir, config_path)
    models = resolve_models(config)
    policy, reference = resolve_model(models.policy), resolve_model(models.reference)
    RewardFunctions(config.rl.rewards)
    longest = config.data.max_prompt_tokens + config.rl.max_tokens
    critic = {resolve_model(models.critic)} if models.critic else set[Path]()
    for model in {policy, reference} | critic:
        require_context(model, longest, "data.max_prompt_tokens + rl.max_tokens")
    card = RewardModel.load(models.reward).card
    card.require_room(
        ChatTokenizer(policy).fingerprint,
        config.data.max_prompt_tokens,
        config.rl.max_tokens,
        "rl.max_tokens",
    )
    if prompts is None:
        files = [data_path(path) for path in config.data.prompts]
        limits = config.data.max_prompt_tokens, console, config.data.limit
        prompts = usable_prompts(files, [policy], *limits)
    require_memory(rl_memory_gib(policy, reference, config), config.cluster)
    folder = RunFolder.claim(folder_path, config, resume=resume)
    try:
        made_with = _made_with(models, card.version)
        until_done(
            lambda again: _attempt(
                config, models, made_with, prompts, folder, console, again, finish
            ),
            config.cluster.restarts,
            console.print,
            resume=resume,
        )
    finally:
        folder.release()
    return folder.path


def _attempt(*arguments: Any) -> None:
    """Train with actors of its own, until the end or until something is lost that Ray cannot
    replace: the learner, whose state stands in the checkpoints."""
    try:
        asyncio.run(_train(*arguments))
    except ExceptionGroup as group:
        raise _first_cause(group) from group


def resolve_models(config: RLConfig) -> Models:
    """Policy, reference and reward model; a wrong one is refused here."""
    reward = resolve_reward_model(config.reward.model)
    RewardModel.load(reward)
    policy = portable_name(config.policy.model)
    reference = portable_name(config.reference.model) if config.reference.model else policy
    vocabularies = {ChatTokenizer(resolve_model(name)).vocabulary for name in {policy, reference}}
    if len(vocabularies) > 1:
        raise ModelError(
            f"reference.model = {reference!r} reads other tokens than policy.model = {policy!r}: a "
            "KL between them means nothing; take one with the same tokenizer"
        )
    if isinstance(config.rl.algorithm, PPOSection) and config.rl.algorithm.critic.model:
        critic = portable_name(config.rl.algorithm.critic.model)
        if ChatTokenizer(resolve_model(critic)).vocabulary not in vocabularies:
            raise ModelError(
                f"rl.algorithm.critic.model = {critic!r} reads other tokens than policy.model = "
                f"{policy!r}; take one with the same tokenizer"
            )
    else:
        critic = None
    return Models(policy, reference, reward, critic)


def _made_with(models: Models, reward_version: str) -> dict[str, str]:
    """What a run's models are, by the settings that name them: a path may hold another one when the
    run is resumed. Weights are read once for it, and are in memory then for who loads them."""
    named = {
        "policy.model": models.policy,
        "reference.model": models.reference,
        "rl.algorithm.critic.model": models.critic,
    }
    read = {name: weights_fingerprint(resolve_model(name)) for name in set(named.values()) if name}
    return {
        "reward.model": reward_version,
        **{setting: read[name] for setting, name in named.items() if name},
    }


def _require_same_models(
    checkpoint: Path, state: Mapping[str, Any], made_with: Mapping[str, str]
) -> None:
    """Refuse to go on with other models than a checkpoint was made with; one of an earlier Pavlov
    does not say.

    Raises:
        CheckpointError: they are others.
    """
    before = state.get("made_with", made_with)
    if other := [name for name in made_with if before.get(name) != made_with[name]]:
        what = ", ".join(f"{name} ({before.get(name)}, now {made_with[name]})" for name in other)
        raise CheckpointError(
            f"{checkpoint} was made with another {what}; resume with the same or choose another "
            "run.dir"
        )


async def _train(
    config: RLConfig,
    models: Models,
    made_with: Mapping[str, str],
    prompts: Sequence[Prompt],
    folder: RunFolder,
    console: Console,
    resume: bool,
    finish: Finish | None,
) -> None:
    checkpoint = folder.newest_checkpoint() if resume else None
    step = checkpoint[1]["step"] if checkpoint else 0
    cursor = PromptCursor(prompts, config.seed, step * config.rl.prompts_per_step)
    if checkpoint and checkpoint[1]["prompts"] != cursor.fingerprint:
        raise CheckpointError(
            f"{checkpoint[0]} was made with other prompts or another seed; resume with the same"
        )
    if checkpoint:
        _require_same_models(*checkpoint, made_with)
        require_same_scores(config, folder.path, made_with["reward.model"])
    if resume:
        where = f"after step {step} ({checkpoint[0].name})" if checkpoint else "from the start"
        console.print(f"resuming {folder.path} {where}")
    with ray_session(folder.path.name, num_cpus=usable_cores()) as namespace:
        memory = shared_memory_folder(namespace)
        console.print(f"run {folder.path}  namespace {namespace}")
        fleet = await Fleet.start(config, models, namespace, memory, console.print)
        try:
            if checkpoint:
                await fleet.load_checkpoint(checkpoint[0])
            fleet.shift_threshold = await shift_threshold(
                config,
                fleet,
                prompts,
                folder.path,
                console.print,
                reward_version=made_with["reward.model"],
                at_start=step == 0,
            )
            await _steps(config, fleet, cursor, folder, console, namespace, step, made_with)
            await fleet.save_policy(folder.path / "policy")
            if finish is not None:
                await finish(fleet)
        finally:
            await fleet.close()


async def _steps(
    config: RLConfig,
    fleet: Fleet,
    cursor: PromptCursor,
    folder: RunFolder,
    console: Console,
    namespace: str,
    first_step: int,
    made_with: Mapping[str, str],
) -> None:
    recorder = Recorder(folder.path, first_step)
    gauges = Gauges(namespace, "driver")
    progress = Progressing(console, "rl", config.rl.num_steps, first_step)
    state = {"prompts": cursor.fingerprint, "made_with": dict(made_with)}
    checkpoints = Checkpoints(config, folder, fleet, state, first_step, console.print)

    async def record(
        step: int, metrics: dict[str, Any], groups: Sequence[ScoredGroup | FailedGroup]
    ) -> None:
        recorder.record(metrics, groups)
        gauges.set(metrics)
        progress.advance(note=_summary(metrics))
        await checkpoints.recorded(step, metrics)
        if metrics["groups/failed"] == len(groups):
            failed = [group for group in groups if isinstance(group, FailedGroup)]
            raise RunError(f"every group of step {step} failed: {failed[0].reason}")

    loop = Loop(config, cursor, fleet, record, first_step, recorder.last)
    try:
        with progress, cancelled_by_sigterm():
            try:
                await loop.run()
            except BaseException as error:
                await checkpoints.at_early_end(loop, error, _first_cause(error))
                raise
    finally:
        recorder.close()


def _summary(metrics: dict[str, Any]) -> str:
    parts = [
        ("reward", "reward/mean", "+.2f"),
        ("kl", "kl/mean", ".1f"),
        ("entropy", "entropy/mean", ".2f"),
        ("length", "completion/length_mean", ".0f"),
        ("flagged", "ensemble/flagged_share", ".0%"),
    ]
    return "  ".join(
        f"{label} {metrics[key]:{form}}"
        for label, key, form in parts
        if metrics.get(key) is not None
    )


def _first_cause(group: BaseException) -> BaseException:
    """The `first_cause` of a group of concurrent failures; a wait in vain is an error of ours."""
    leaves: list[BaseException] = []
    queue = [group]
    while queue:
        error = queue.pop(0)
        if isinstance(error, BaseExceptionGroup):
            queue += error.exceptions
        else:
            leaves.append(error)
    cause = first_cause(leaves)
    return RunError(str(cause)) if isinstance(cause, TimeoutError) else cause
