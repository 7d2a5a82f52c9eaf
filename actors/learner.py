"""The learner actor: one rank of the DeepSpeed engine that trains the policy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from actors.gauges import Gauges
from actors.policy import TrainedPolicy
from actors.policy_update import PolicyUpdate
from actors.reference import GroupLogprobs, group_logprobs
from cluster.session import free_port, node_address
from cluster.weights import WeightManifest
from models.adapters import without_adapter
from models.critic import Critic
from models.sources import resolve_model
from rlhf.algorithms import algorithm_of
from rlhf.config import LearnerSection, LoRASection, PPOSection, RLSection
from rlhf.records import RolloutGroup, StepReport, TrainingBatch


class LearnerActor(TrainedPolicy):
    """One rank that trains on the loop's batches; see `TrainedPolicy`.

    Args:
        rl: the loop's settings.
        gpus: GPUs that it holds.
        critic: the model of the critic's own backbone, by a name that this node resolves.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        settings: LearnerSection,
        rl: RLSection,
        wire_dtype: str,
        weight_transport: str,
        shared_memory: str,
        run: str,
        name: str,
        rank: int = 0,
        world_size: int = 1,
        gpus: float = 0,
        lora: LoRASection | None = None,
        seed: int = 0,
        critic: str | None = None,
    ) -> None:
        super().__init__(
            model,
            dtype,
            settings,
            wire_dtype,
            weight_transport,
            shared_memory,
            rank,
            world_size,
            lora,
            seed,
        )
        self._gauges = Gauges(run, name)
        self._rl = rl
        self._gpus = gpus
        self._critic_model = critic
        self._update: PolicyUpdate | None = None

    def address(self) -> str:
        """``host:port`` on this node where the ranks can meet; asked of rank 0."""
        host = "127.0.0.1" if self._world_size == 1 else node_address()
        return f"{host}:{free_port()}"

    def start(self, master: str | None) -> None:
        """See `TrainedPolicy.start`."""
        super().start(master)
        assert self._engine is not None
        self._update = PolicyUpdate(
            self._engine,
            algorithm_of(self._rl.algorithm),
            self._rl,
            pad_id=self._tokenizer.pad_id,
            batch_tokens=self._settings.micro_batch_tokens,
            rank=self._rank,
            world_size=self._world_size,
        )

    def _critic(self, policy: Any) -> tuple[Critic | None, dict[str, float]]:
        """The critic, where the algorithm has one, and its rates as multiples of the policy's."""
        if not isinstance(self._rl.algorithm, PPOSection):
            return None, {}
        settings, rate = self._rl.algorithm.critic, self._settings.learning_rate
        folder = None if self._critic_model is None else resolve_model(self._critic_model)
        critic = Critic(policy, folder)
        if self._settings.gradient_checkpointing and critic.backbone is not None:
            critic.backbone.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        return critic, {
            "critic.head": settings.head_learning_rate / rate,
            "critic.backbone": (settings.learning_rate or rate) / rate,
        }

    def connect(self, rollouts: Sequence[Any], ranks_per_engine: int) -> None:
        """NCCL only: join a process group with the engines."""
        from cluster.weights.nccl import NcclSender

        if isinstance(self._sender, NcclSender):
            self._sender.connect(rollouts, ranks_per_engine)

    def step(self, batch: TrainingBatch, step: int) -> StepReport:
        """Train on this rank's share of the batch: one optimiser step, or several
        (`rl.algorithm.epochs`, `mini_batches`). A collective.

        An empty batch changes nothing: no step is taken, and the report is empty.
        """
        if not batch.sequences:
            return StepReport()
        assert self._update is not None
        started = time.monotonic()
        metrics = self._update.step(batch, step)
        tokens = batch.num_tokens * self._rl.algorithm.epochs
        metrics["learner/tokens_per_s"] = tokens / (time.monotonic() - started)
        self._gauges.set(metrics)
        return StepReport(metrics)

    def evaluate(self, groups: Sequence[RolloutGroup]) -> list[tuple[GroupLogprobs, GroupLogprobs]]:
        """Logprobs and exact entropies of the current policy at every completion's tokens: for
        every group a row per completion of each, in nats. A collective."""
        assert self._update is not None
        flat = self._update.evaluate(
            [group.prompt_token_ids for group in groups for _ in group.completions],
            [completion.token_ids for group in groups for completion in group.completions],
            self._rl.temperature,
        )
        rows = iter(flat)
        found = []
        for group in groups:
            logprobs_GT, entropies_GT = zip(*(next(rows) for _ in group.completions), strict=True)
            found.append((logprobs_GT, entropies_GT))
        return found

    def reference_logprobs(self, groups: Sequence[RolloutGroup]) -> list[GroupLogprobs]:
        """As the reference actor's: the start policy is here, with the adapter off."""
        assert self._engine is not None and self._lora is not None
        with without_adapter(self._engine.module), self._autocast():
            return group_logprobs(
                self._engine.module,  # type: ignore[arg-type]
                groups,
                temperature=self._rl.temperature,
                pad_id=self._tokenizer.pad_id,
                budget_tokens=2 * self._settings.micro_batch_tokens,
            )

    def export_weights(self, version: int) -> WeightManifest | None:
        """See `TrainedPolicy.export_weights`."""
        if self._rank == 0:
            self._gauges.set({"weight_version": version})
        return super().export_weights(version)
