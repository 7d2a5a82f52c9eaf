"""The models that take part, and the actors that hold them: precision, optimiser, placement."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rlhf.config.section import DType, Fraction, Gpus, Section


class LoRASection(Section):
    """An adapter that is trained in the place of the whole policy (models/adapters.py)."""

    rank: PositiveInt = 16
    """Rank of the difference in each layer."""
    alpha: PositiveInt = 32
    """The difference is multiplied by alpha / rank."""
    layers: list[str] | None = None
    """Names of the linear layers that get one, by their ends; default: all but the head."""


class PolicySection(Section):
    """The network that is trained."""

    model: str = "embedded"
    """`embedded`, a Hugging Face folder, or a hub id."""
    dtype: DType = "auto"
    """Precision of the learner's forward and backward pass; master weights are always float32."""
    lora: LoRASection | None = None
    """Train an adapter; default: all weights. Learning rates are some ten times larger then."""


class ReferenceSection(Section):
    """The frozen model that the KL penalty is measured against."""

    model: str | None = None
    """Default: the start policy. With `policy.lora` that is the learner's with its adapter off."""
    dtype: DType = "auto"
    """Precision of its forward pass."""


class LearnerSection(Section):
    """The DeepSpeed engine."""

    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate of AdamW."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    gradient_clip: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: what is sharded over ranks (1 optimiser, 2 + gradients, 3 + parameters)."""
    micro_batch_tokens: PositiveInt = 2048
    """Padded tokens a forward pass may hold."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""


class RolloutSection(Section):
    """The vLLM engine."""

    dtype: DType = "auto"
    """Precision of the engine."""
    max_sequences: PositiveInt = 64
    """Sequences decoded at once."""
    kv_cache_gib: PositiveFloat = 1.0
    """Memory for cached keys and values on CPU, in whole GiB (rounded, at least 1)."""
    gpu_memory_utilization: Fraction = 0.85
    """Share of the GPU's memory that the engine may take."""
    tensor_parallel: PositiveInt = 1
    """GPUs a single engine spans."""
    enforce_eager: bool = True
    """No compilation: starts in seconds instead of minutes, 4 % slower on CPU; compiling
    there wants a C++ compiler."""
    keep_cache: bool = False
    """Keep cached keys and values across weight updates (max_staleness > 0), salted by version."""


class RolePlacement(Section):
    """How many actors a role has, and what each takes."""

    actors: PositiveInt = 1
    """Actors of this role."""
    cpus: NonNegativeFloat = 0.25
    """CPUs each reserves from Ray; fractions let long-lived actors share cores."""
    gpus: Gpus = 0
    """GPUs each reserves: whole numbers or a fraction below 1."""


class ClusterSection(Section):
    """Where the actors run."""

    cpu_layout: Literal["turns", "threads"] | None = None
    """CPU only: `turns` lets one role compute at a time with all threads, `threads` gives each
    its share of them. Default: turns on up to 4 cores, unless a role has several actors."""
    weight_transport: Literal["shared_memory", "object_store", "nccl"] = "shared_memory"
    """How weights reach the engines. Default: object_store where Ray has several nodes."""
    start_timeout_s: PositiveFloat = 600
    """How long to wait for resources and for actors to start."""
    call_timeout_s: PositiveFloat = 1800
    """How long any single call to an actor may take."""
    restarts: NonNegativeInt = 2
    """How often a run that lost its learner goes on by itself, from its newest checkpoint."""
    rollout: RolePlacement = RolePlacement()
    """vLLM engines."""
    reward: RolePlacement = RolePlacement()
    """Reward-model members."""
    reference: RolePlacement = RolePlacement()
    """Frozen reference model."""
    learner: RolePlacement = RolePlacement()
    """Ranks of the learner."""

    @property
    def side_by_side(self) -> str | None:
        """A role of which several actors compute at once on CPU, if there is one."""
        for role in ("rollout", "reward", "reference", "learner"):
            placement: RolePlacement = getattr(self, role)
            if placement.actors > 1 and not placement.gpus:
                return role
        return None

    @model_validator(mode="after")
    def _side_by_side_with_a_thread_each(self) -> Self:
        role = self.side_by_side
        if role is not None and self.cpu_layout == "turns":
            raise ValueError(
                f'cluster.cpu_layout = "turns" with cluster.{role}.actors = '
                f"{getattr(self, role).actors}: they compute side by side; set "
                'cluster.cpu_layout = "threads", or leave it out'
            )
        return self
