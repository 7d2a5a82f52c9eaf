"""The actors of a run as the loop sees them: generate, score, learn, publish.

Calls are balanced over the actors of a role, take turns on few cores, and time out. A rollout
actor that died is started again by Ray, brought to the current weight version, and asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from actors.learner import LearnerActor
from actors.reference import ReferenceActor
from actors.reward import RewardActor
from actors.rollout import GroupRequest, RolloutActor
from cluster.layout import CpuLayout, Turns, choose_layout
from cluster.spawn import Role, call, spawn_in_thread, together, until_alive
from cluster.weights import WeightManifest, choose_transport
from cluster.weights.probe import Probe
from rlhf.config import RLConfig
from rlhf.errors import (
    ActorLostError,
    GenerationError,
    PavlovError,
    StaleWeightsError,
    WeightUpdateError,
)
from rlhf.records import (
    FailedGroup,
    GroupScores,
    RolloutGroup,
    ScoredGroup,
    StepReport,
    TrainingBatch,
)

Result = TypeVar("Result")

_CLOSE_S = 8.0


@dataclass(frozen=True, slots=True)
class Models:
    """The models that a run loads: policy, reference and a critic's backbone by names that every
    node resolves for itself, the reward model by its folder."""

    policy: str
    reference: str
    reward: Path
    critic: str | None = None


def run_roles(config: RLConfig, models: Models, run: str, shared_memory: Path) -> list[Role]:
    """The roles of `pavlov rl`, with their placement and constructor arguments."""
    cluster, rl = config.cluster, config.rl
    memory = str(shared_memory)

    def rollout(number: int) -> dict[str, Any]:
        return {
            "model": models.policy,
            "settings": config.rollout,
            "max_prompt_tokens": config.data.max_prompt_tokens,
            "max_tokens": rl.max_tokens,
            "shared_memory": memory,
            "run": run,
            "name": f"rollout-{number}",
            "gpus": cluster.rollout.gpus,
            "weight_transport": cluster.weight_transport,
        }

    def reward(number: int) -> dict[str, Any]:
        return {
            "model": str(models.reward),
            "disagreement_penalty": config.reward.domain_shift.disagreement_penalty,
            "run": run,
            "name": f"reward-{number}",
            "gpus": cluster.reward.gpus,
            "functions": rl.rewards,
        }

    def reference(number: int) -> dict[str, Any]:
        return {
            "model": models.reference,
            "dtype": config.reference.dtype,
            "temperature": rl.temperature,
            "batch_tokens": 2 * config.learner.micro_batch_tokens,
            "gpus": cluster.reference.gpus,
        }

    def learner(number: int) -> dict[str, Any]:
        return {
            "model": models.policy,
            "dtype": config.policy.dtype,
            "settings": config.learner,
            "rl": rl,
            "wire_dtype": config.rollout.dtype,
            "weight_transport": cluster.weight_transport,
            "shared_memory": memory,
            "run": run,
            "name": f"learner-{number}",
            "rank": number,
            "world_size": cluster.learner.actors,
            "gpus": cluster.learner.gpus,
            "lora": config.policy.lora,
            "critic": models.critic,
            "seed": config.seed,
        }

    roles = [
        Role("rollout", RolloutActor, cluster.rollout, rollout, restarts=3),
        Role("reward", RewardActor, cluster.reward, reward, restarts=3),
        Role("reference", ReferenceActor, cluster.reference, reference, restarts=3),
        Role("learner", LearnerActor, cluster.learner, learner),
    ]
    return [role for role in roles if role.name != "reference" or not config.learner_is_reference]


def _layout(config: RLConfig) -> CpuLayout:
    cluster = config.cluster
    return choose_layout(cluster.cpu_layout, side_by_side=cluster.side_by_side is not None)


class Fleet:
    """Handles of every actor, by role. Built by `start`, ended by `close`."""

    def __init__(self, handles: dict[str, list[Any]], config: RLConfig) -> None:
        self._rollouts = handles["rollout"]
        self._rewards = handles["reward"]
        self._learners = handles["learner"]
        # A learner that trains an adapter is the reference with it off.
        self._references = handles.get("reference", self._learners)
        self._config = config
        self._timeout_s = config.cluster.call_timeout_s
        self._outstanding = [0] * len(self._rollouts)
        self._recovering = [asyncio.Lock() for _ in self._rollouts]
        self._published: tuple[WeightManifest, Probe] | None = None
        self._gaps: dict[int, tuple[int, float]] = {}
        self.learner_is_sound = True
        """Whether no call to a rank has failed."""
        self.shift_threshold: float | None = None
        """Of the shift score, on the start policy's completions; None: the reward model's own."""
        on_cpu = config.cluster.learner.gpus == 0
        in_turns = _layout(config) == "turns"
        self.turns = Turns(self._pause, self._resume, enabled=on_cpu and in_turns)
        self._unscored: list[tuple[RolloutGroup, asyncio.Future[Any]]] = []
        self._scoring = asyncio.Condition()
        self._scorer: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        config: RLConfig,
        models: Models,
        run: str,
        shared_memory: Path,
        say: Callable[[str], None],
    ) -> Fleet:
        """Place and start every actor, and bring the learner's ranks together. Inside a
        `ray_session`."""
        cluster = choose_transport(config.cluster, say)
        config = config.model_copy(update={"cluster": cluster})
        handles = await spawn_in_thread(
            run_roles(config, models, run, shared_memory),
            _layout(config),
            # A share of the cores would not be the same on another machine or beside other actors.
            threads=1 if config.deterministic else None,
            timeout_s=config.cluster.start_timeout_s,
            say=say,
        )
        if config.policy.lora is not None:
            say("weights: the adapter alone is sent; engines merge it (vLLM's LoRA is not used)")
        fleet = cls(handles, config)
        master = await fleet._ask_learner(0, "address")
        await fleet._on_learners("start", master)
        if config.cluster.weight_transport == "nccl":
            await fleet._on_learners("connect", fleet._rollouts, config.rollout.tensor_parallel)
        fleet._scorer = asyncio.create_task(fleet._score_forever())
        return fleet

    async def generate(
        self, requests: Sequence[GroupRequest], version: int, *, together: bool
    ) -> list[RolloutGroup | GenerationError]:
        """Sample groups on the least busy engine.

        An engine that died or is behind is recovered and asked once more: the prompts did nothing
        wrong. If it dies of them again, they come back as errors.
        """
        index = min(range(len(self._rollouts)), key=lambda i: self._outstanding[i])
        generate = self._rollouts[index].generate

        async def ask() -> list[RolloutGroup | GenerationError]:
            answers = generate.remote(list(requests), version, together=together)
            return list(await self._call(answers, f"rollout-{index}"))

        self._outstanding[index] += len(requests)
        try:
            with contextlib.suppress(StaleWeightsError, ActorLostError):
                return await ask()
            await self._recover(index)
            try:
                return await ask()
            except (StaleWeightsError, ActorLostError) as error:
                return [GenerationError(str(error)) for _ in requests]
        finally:
            self._outstanding[index] -= len(requests)
            async with self._scoring:
                self._scoring.notify_all()

    async def sample(self, requests: Sequence[GroupRequest]) -> list[RolloutGroup]:
        """Groups outside of training, those that failed left out; repeatable where the run is."""
        if self._config.deterministic:
            drawn = await self.generate(requests, 0, together=True)
        else:
            calls = [self.generate([request], 0, together=False) for request in requests]
            drawn = [group for groups in await asyncio.gather(*calls) for group in groups]
        return [group for group in drawn if isinstance(group, RolloutGroup)]

    async def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup | GenerationError]:
        """Rewards and reference logprobs. Groups that arrive together are scored together."""
        futures = [asyncio.get_running_loop().create_future() for _ in groups]
        async with self._scoring:
            self._unscored += zip(groups, futures, strict=True)
            self._scoring.notify_all()
        return list(await asyncio.gather(*futures))

    async def _score_forever(self) -> None:
        while True:
            async with self._scoring:
                await self._scoring.wait_for(self._enough_to_score)
                work, self._unscored = self._unscored, []
            try:
                results = await self._score_batch([group for group, _ in work])
            except Exception as error:
                # Whoever waits for a score gets the error; the next batch may fare better.
                results = [error] * len(work)
            for (_, future), result in zip(work, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception) and not isinstance(result, GenerationError):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _enough_to_score(self) -> bool:
        """Taking turns, wait for a step's worth or until no engine has work: pausing costs."""
        if not self._unscored:
            return False
        waits = self.turns.enabled or self._config.deterministic
        full = len(self._unscored) >= self._config.rl.prompts_per_step
        return not waits or full or not any(self._outstanding)

    async def _score_batch(self, groups: list[RolloutGroup]) -> list[Any]:
        async with self.turns.take():
            scoring = self._spread(self._rewards, "reward", "score", groups)
            role = "learner" if self._references is self._learners else "reference"
            references = self._spread(self._references, role, "reference_logprobs", groups)
            if self.turns.enabled:
                scores, logprobs = await scoring, await references
            else:
                scores, logprobs = await together([scoring, references])
        return [
            ScoredGroup(group, self._flagged(group, score), reference)
            if isinstance(score, GroupScores)
            else score
            for group, score, reference in zip(groups, scores, logprobs, strict=True)
        ]

    def _flagged(self, group: RolloutGroup, scores: GroupScores) -> GroupScores:
        """Flags by this run's threshold, where it has one; empty text is always flagged."""
        if self.shift_threshold is None:
            return scores
        flags_G = tuple(
            shift > self.shift_threshold or not completion.text.strip()
            for shift, completion in zip(scores.shift_G, group.completions, strict=True)
        )
        return replace(scores, domain_shift_G=flags_G)

    async def _spread(
        self, handles: list[Any], role: str, method: str, groups: list[RolloutGroup]
    ) -> list[Any]:
        """One call per actor with its share of the groups; results in the groups' order."""
        shares = [groups[index :: len(handles)] for index in range(len(handles))]
        calls = [
            self._retried(handle, f"{role}-{index}", method, share)
            for index, (handle, share) in enumerate(zip(handles, shares, strict=True))
            if share
        ]
        parts = await together(calls)
        return [parts[index % len(handles)][index // len(handles)] for index in range(len(groups))]

    async def _retried(self, handle: Any, name: str, method: str, *arguments: Any) -> Any:
        """Call a stateless actor; one that died is started again by Ray and asked once more. A
        learner is not: its state is gone."""
        if handle in self._learners:
            return await self._ask_learner(self._learners.index(handle), method, *arguments)
        with contextlib.suppress(ActorLostError):
            return await self._call(getattr(handle, method).remote(*arguments), name)
        await self._until_alive(handle, name)
        return await self._call(getattr(handle, method).remote(*arguments), name)

    async def evaluated(
        self, groups: Sequence[ScoredGroup | FailedGroup]
    ) -> list[ScoredGroup | FailedGroup]:
        """The groups with what the current policy thinks of every token: logprobs and entropies."""
        rollouts = [group.rollout for group in groups if isinstance(group, ScoredGroup)]
        if not rollouts:
            return list(groups)
        async with self.turns.take():
            found = iter((await self._on_learners("evaluate", rollouts))[0])

        def evaluated(group: ScoredGroup) -> ScoredGroup:
            logprobs_GT, entropies_GT = next(found)
            return replace(group, learner_logprobs_GT=logprobs_GT, entropies_GT=entropies_GT)

        return [evaluated(group) if isinstance(group, ScoredGroup) else group for group in groups]

    async def learn(self, batch: TrainingBatch, step: int) -> StepReport:
        """One step on every rank, of one optimiser step or several."""
        async with self.turns.take():
            reports = await self._on_learners("step", batch, step)
        return reports[0]  # type: ignore[no-any-return]

    async def publish(self, version: int) -> float | None:
        """Bring the learner's weights to every engine as `version`; returns the largest probe gap,
        None where no engine could be asked.

        Raises:
            WeightUpdateError: an engine refused it.
        """
        async with self.turns.take():
            manifest = (await self._on_learners("export_weights", version))[0]
            probe = (await self._on_learners("probe"))[0]
        self._published = (manifest, probe)
        # Outside the turn: the probe needs the engines to run.
        transmit = self._ask_learner(0, "transmit_weights")
        updates = [self._update(index) for index in range(len(self._rollouts))]
        gaps = (await together([*updates, transmit]))[: len(self._rollouts)]
        return max((gap for gap in gaps if gap is not None), default=None)

    async def _update(self, index: int) -> float | None:
        assert self._published is not None
        manifest, probe = self._published
        try:
            return await self._updated(index, manifest, probe)
        except ActorLostError:
            # The broadcast fails with it: who waited for the replacement would be told that.
            if manifest.transport == "nccl":
                raise
            return await self._recover(index)

    async def _updated(self, index: int, manifest: WeightManifest, probe: Probe) -> float:
        update = self._rollouts[index].update_weights.remote(manifest, probe)
        gap = await self._call(update, f"rollout-{index}")
        self._gaps[index] = (manifest.version, gap)
        return float(gap)

    async def _recover(self, index: int) -> float | None:
        """Bring an engine that was started again to the current version before it serves; returns
        the gap of that version's probe, None where none was measured.

        The learner may publish meanwhile: what is current is read after every wait.

        Raises:
            ActorLostError: it does not come back in time, or its transport cannot take it back.
        """
        patience_s = 2 * self._config.cluster.start_timeout_s
        try:
            async with self._recovering[index], asyncio.timeout(patience_s):
                version = await self._bring_up_to_date(index)
        except TimeoutError:
            raise ActorLostError(
                f"rollout-{index} did not come back within {patience_s:.0f} s"
            ) from None
        measured, gap = self._gaps.get(index, (None, None))
        return gap if measured == version else None

    async def _bring_up_to_date(self, index: int) -> int:
        """Returns the version that the engine serves then."""
        rollout, name = self._rollouts[index], f"rollout-{index}"
        while True:
            version = await self._until_alive(rollout, name)
            assert self._published is not None
            manifest, probe = self._published
            if version == manifest.version:
                return manifest.version
            if manifest.transport == "nccl":
                raise ActorLostError(
                    f"{name} was replaced, and a new process cannot join a running NCCL group"
                )
            try:
                await self._updated(index, manifest, probe)
            except ActorLostError:
                continue
            except WeightUpdateError as error:
                if error.check != "version":
                    raise
                # Gone for a newer version that is about to be announced.
                while self._published[0] is manifest:
                    await asyncio.sleep(0.1)

    async def _until_alive(self, handle: Any, name: str) -> Any:
        """The actor's version, as soon as it answers again."""
        cluster = self._config.cluster
        return await until_alive(handle, name, cluster.call_timeout_s, cluster.start_timeout_s)

    async def save_checkpoint(self, folder: Path, *, in_turn: bool = True) -> None:
        """Every rank writes its part into `folder`.

        Args:
            in_turn: else whoever else computes is not waited for, as where the run is over.
        """
        async with self.turns.take() if in_turn else contextlib.nullcontext():
            await self._on_learners("save_checkpoint", str(folder))

    async def load_checkpoint(self, folder: Path) -> None:
        """Every rank reads its part of `folder`."""
        await self._on_learners("load_checkpoint", str(folder))

    async def save_policy(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        async with self.turns.take():
            await self._on_learners("save_policy", str(folder))

    async def close(self) -> None:
        """End the engines and drop weights in flight; what does not answer is ended by Ray."""
        if self._scorer is not None:
            self._scorer.cancel()
        ends = [
            asyncio.wait_for(self._call(actor.shutdown.remote(), "an actor"), _CLOSE_S)
            for actor in self._rollouts + self._learners
        ]
        await asyncio.gather(*ends, return_exceptions=True)

    async def _pause(self) -> None:
        await self._on_rollouts("pause")

    async def _resume(self) -> None:
        await self._on_rollouts("resume")

    async def _on_rollouts(self, method: str) -> None:
        calls: list[Coroutine[Any, Any, Any]] = [
            self._call(getattr(rollout, method).remote(), f"rollout-{index}")
            for index, rollout in enumerate(self._rollouts)
        ]
        # An engine that died neither needs a pause nor holds one.
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, ActorLostError):
                raise result

    async def _on_learners(self, method: str, *arguments: Any) -> list[Any]:
        ranks = range(len(self._learners))
        return await together(self._ask_learner(rank, method, *arguments) for rank in ranks)

    def _ask_learner(self, rank: int, method: str, *arguments: Any) -> Coroutine[Any, Any, Any]:
        """Asked at once, and not when it is awaited: what one rank is asked all are."""
        return self._answer(getattr(self._learners[rank], method).remote(*arguments), rank)

    async def _answer(self, reference: Awaitable[Any], rank: int) -> Any:
        try:
            return await self._call(reference, f"learner-{rank}")
        except PavlovError:
            self.learner_is_sound = False
            raise

    async def _call(self, reference: Awaitable[Result], name: str) -> Result:
        return await call(reference, name, self._timeout_s)
