"""Training of one reward-model member with layers of its own: what every Ray Train worker runs.

All workers hold the same pairs and walk through the same batches; each takes its share of a batch's
micro-batches, and gradients are summed. So the number of workers does not change what is learnt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.engine import TrainingEngine
from models.adapters import is_adapter, on_the_wire
from models.packing import PackedBatch, Row, micro_batches, share_of
from models.precision import local_device, resolve_dtype
from models.sources import resolve_model
from models.top_layers import TopLayers, write_layers
from models.trunk import Family, Pooling, Trunk, pool
from rlhf.config import LoRAMembers, OwnLayers
from rlhf.ensemble import bootstrap_draws
from rlhf.losses import bradley_terry_loss, centring_loss
from rlhf.seeding import derive_seed

_HEAD_DEVIATION = 0.02


@dataclass(frozen=True, slots=True)
class PairRow:
    """A pair in tokens, and what was said of it (`models.heads.Comparisons`)."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    label: float
    weight: float
    margin: float
    criterion: int


@dataclass(frozen=True, slots=True)
class MemberJob:
    """One member to train: on layers `cut` to `end` of `model`, by `settings`.

    `member` numbers it among all that share `seed`; `dtype` and `max_tokens` are the ensemble's,
    `out` is the folder for its layers, which every node must see.
    """

    model: str
    cut: int
    end: int
    settings: OwnLayers
    criteria: int
    pairs: Sequence[PairRow]
    member: int
    seed: int
    dtype: str
    max_tokens: int
    out: str


@dataclass(frozen=True, slots=True)
class TrainedMember:
    """What training gave: the name of the layers in ``out``, the heads (C, H) on their features,
    and figures."""

    name: str
    weights_CH: Tensor
    figures: dict[str, float]


class Member(nn.Module):
    """Own layers, pooling, and a linear head for each of C criteria."""

    def __init__(self, layers: TopLayers, width: int, job: MemberJob) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(derive_seed(job.seed, "head", job.member))
        self.layers = layers
        self.heads_CH = nn.Parameter(
            _HEAD_DEVIATION * torch.randn(job.criteria, width, generator=generator)
        )
        self._pooling: Pooling = job.settings.pooling

    def forward(self, hidden_BLH: Tensor, batch: PackedBatch) -> Tensor:
        """Rewards of the batch's replies by every criterion, shape (n, C)."""
        pooled_NH = pool(self.layers(hidden_BLH, batch), batch, self._pooling)
        # Not as a matrix product, which autocast would round to bfloat16.
        return (pooled_NH.unsqueeze(1) * self.heads_CH).sum(dim=2)


def train_member(config: dict[str, Any]) -> TrainedMember | None:
    """The loop of a Ray Train worker; `config` holds the `MemberJob` as ``job``. Rank 0 writes the
    layers and returns what was trained."""
    import ray.train

    job: MemberJob = config["job"]
    context = ray.train.get_context()
    return MemberTraining(job, context.get_world_rank(), context.get_world_size()).run()


def batches(job: MemberJob) -> list[list[PairRow]]:
    """The member's bootstrap draw of the pairs, gone through in a new order every epoch."""
    live = [pair for pair in job.pairs if pair.weight > 0]
    [drawn] = bootstrap_draws(len(live), 1, job.seed, first=job.member)
    generator = torch.Generator().manual_seed(derive_seed(job.seed, "order", job.member))
    order = torch.cat(
        [drawn[torch.randperm(len(drawn), generator=generator)] for _ in range(job.settings.epochs)]
    ).tolist()
    size = job.settings.batch_pairs
    return [[live[n] for n in order[at : at + size]] for at in range(0, len(order), size)]


class MemberTraining:
    """One rank's part in training a member; the ranks have met already."""

    def __init__(self, job: MemberJob, rank: int, world_size: int) -> None:
        folder = resolve_model(job.model)
        settings = job.settings
        self._job, self._rank, self._world_size = job, rank, world_size
        self._trunk = Trunk(
            folder,
            [Family(job.cut, settings.pooling)],
            dtype=job.dtype,
            max_tokens=job.max_tokens,
            batch_tokens=settings.learner.micro_batch_tokens,
            device=local_device(),
        )
        layers = TopLayers(folder, job.cut, job.end, "float32")
        if isinstance(settings, LoRAMembers):
            layers.add_adapter(settings.lora, derive_seed(job.seed, "adapter", job.member))
        if settings.learner.gradient_checkpointing:
            layers.recompute_activations()
        self._engine = TrainingEngine(
            Member(layers, self._trunk.width, job),
            settings.learner,
            resolve_dtype(settings.dtype),
            rank=rank,
            world_size=world_size,
            master=None,
            rate_factors={"heads_CH": settings.head_learning_rate / settings.learner.learning_rate},
        )
        self._losses: list[float] = []

    def run(self) -> TrainedMember | None:
        """Train, write the layers; rank 0 returns what was trained, the others None."""
        started = time.monotonic()
        for step, batch in enumerate(batches(self._job)):
            self.step(batch, step)
        # A collective, so all ranks walk through all of them.
        heads_CH, layers = self._trained()
        # Each rank knows its own part of every batch's loss.
        losses = torch.tensor(self._losses, device=self._engine.device)
        torch.distributed.all_reduce(losses)
        if self._rank != 0:
            return None
        figures = {
            "loss": float(losses[-max(1, len(losses) // 10) :].mean()),
            "steps": float(len(losses)),
            "seconds": time.monotonic() - started,
        }
        return TrainedMember(write_layers(layers, Path(self._job.out)), heads_CH, figures)

    def _trained(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The heads (C, H), and the layers in the ensemble's precision, an adapter as it travels.
        A collective."""
        settings = self._job.settings
        lora = settings.lora if isinstance(settings, LoRAMembers) else None

        def wanted(name: str) -> bool:
            return lora is None or name == "heads_CH" or is_adapter(name)

        trained = dict(self._engine.weights(torch.float32, wanted=wanted))
        heads_CH = trained.pop("heads_CH")
        if lora is not None:
            trained = dict(on_the_wire(trained.items(), lora))
        else:
            dtype = getattr(torch, resolve_dtype(self._job.dtype))
            trained = {name: value.to(dtype) for name, value in trained.items()}
        return heads_CH, {name.removeprefix("layers."): value for name, value in trained.items()}

    def step(self, batch: Sequence[PairRow], step: int) -> float:
        """One optimiser step on this rank's share of the batch; returns the gradient's norm."""
        rows = [
            Row(pair.prompt, (pair.chosen, pair.rejected), (2 * n, 2 * n + 1))
            for n, pair in enumerate(batch)
        ]
        budget = self._job.settings.learner.micro_batch_tokens
        chunks = micro_batches(rows, budget, aligned=False)
        mine = share_of(chunks, self._rank, self._world_size)
        total = sum(pair.weight for pair in batch)
        self._losses.append(0.0)
        return self._engine.step(
            [self._loss(batch, chunk, live / total) for chunk, live in mine], step
        )

    def _loss(
        self, batch: Sequence[PairRow], rows: Sequence[Row], share: float
    ) -> Callable[[], Tensor]:
        """A micro-batch's part of the mean loss of the batch, computed when called."""

        def compute() -> Tensor:
            passed = self._trunk.run(rows)
            # A copy: an inference tensor cannot be kept for the way back.
            hidden_BLH = passed.states[self._job.cut].clone()
            rewards_NC = self._engine.run(hidden_BLH, passed.batch)
            pairs = [batch[index // 2] for index in passed.batch.indices[::2]]
            device = rewards_NC.device
            criterion_P1 = torch.tensor([[p.criterion] for p in pairs], device=device)
            weights_P = torch.tensor([p.weight for p in pairs], device=device)
            chosen_P, rejected_P = (
                side.gather(1, criterion_P1).squeeze(1)
                for side in (rewards_NC[0::2], rewards_NC[1::2])
            )
            loss = bradley_terry_loss(
                chosen_P - rejected_P,
                torch.tensor([p.label for p in pairs], device=device),
                weights_P,
                torch.tensor([p.margin for p in pairs], device=device),
            )
            if centring := self._job.settings.centring:
                loss = loss + centring * centring_loss(chosen_P + rejected_P, weights_P)
            # A mean over the micro-batch, as a share of the batch's.
            loss = loss * (weights_P.sum() * share)
            self._losses[-1] += float(loss.detach())
            return loss

        return compute
