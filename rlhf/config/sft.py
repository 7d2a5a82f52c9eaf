"""`pavlov sft`: conversations, when to stop, and how answers are judged on the way."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from rlhf.config.actors import ClusterSection, LearnerSection, PolicySection, RolloutSection
from rlhf.config.section import Section, Temperature


class ConversationsSection(Section):
    """What the policy is taught."""

    conversations: list[str] = Field(min_length=1)
    """Files (JSONL, JSONL.gz, Parquet) relative to PAVLOV_DATA: messages, prompt and completion, or
    pairs, of which the chosen reply is taken."""
    max_tokens: PositiveInt = 384
    """Longer conversations are left out and counted."""
    limit: PositiveInt | None = None
    """At most this many conversations."""
    held_out: PositiveInt = 200
    """Conversations that the loss is measured on and nothing else; no other opens as they do."""


class SFTSection(Section):
    """Supervised fine-tuning."""

    epochs: PositiveInt = 1
    """Passes over the conversations."""
    batch_conversations: PositiveInt = 16
    """Conversations an optimiser step is taken on."""
    packing: bool = True
    """Several conversations share a row, none sees another; false: one a row, sorted by length."""


class StoppingSection(Section):
    """When enough is enough (rlhf/stopping.py)."""

    every: PositiveInt = 20
    """Optimiser steps from one evaluation to the next."""
    patience: PositiveInt = 3
    """Evaluations without a sure rise after which training stops."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.9
    """How sure a rise must be, one-sided, paired over prompts."""
    disagreement_penalty: NonNegativeFloat = 1.0
    """Times the members' disagreement within families is taken off every reward."""


class AnswersSection(Section):
    """What the policy is asked on the way, and how it answers."""

    prompts: list[str] = Field(min_length=1)
    """Files of prompts, relative to PAVLOV_DATA."""
    limit: Annotated[int, Field(ge=2)] = 100
    """How many prompts are answered, the first of the files in turns."""
    max_prompt_tokens: PositiveInt = 256
    """Longer prompts are left out and counted."""
    max_tokens: PositiveInt = 64
    """Tokens an answer may have."""
    temperature: Temperature = 1.0
    """Sampling temperature, at least vLLM's least of 0.01; every prompt keeps its seed."""


class BaselineSection(Section):
    """Prompting the start policy, beside which training is shown."""

    system: str = "You are a helpful, honest and harmless assistant."
    """System turn of the prompted start policy."""
    shots: NonNegativeInt = 2
    """Conversations from the training data that it is shown as examples."""


class JudgeSection(Section):
    """Who says how good an answer is."""

    model: str
    """A reward-model folder, from here or below PAVLOV_RUNS: `<run>/reward` of `pavlov reward`."""


class SFTRunSection(Section):
    """Where a run keeps its files."""

    dir: str | None = None
    """The run's folder, relative to PAVLOV_RUNS; default: the config's name."""
    keep_checkpoints: PositiveInt = 1
    """How many of the newest checkpoints stay on disk; every evaluation leaves one."""


class SFTConfig(Section):
    """`pavlov sft`."""

    seed: NonNegativeInt = 0
    """Every random choice follows from it."""
    run: SFTRunSection = SFTRunSection()
    """The run's folder."""
    data: ConversationsSection
    """Conversations."""
    policy: PolicySection = PolicySection()
    """What is trained."""
    sft: SFTSection = SFTSection()
    """Passes and batches."""
    stopping: StoppingSection = StoppingSection()
    """When to stop."""
    reward: JudgeSection
    """The ensemble."""
    answers: AnswersSection
    """Held-out prompts."""
    baseline: BaselineSection = BaselineSection()
    """Prompting."""
    learner: LearnerSection = LearnerSection()
    """The optimiser."""
    rollout: RolloutSection = RolloutSection()
    """The engine that answers."""
    cluster: ClusterSection = ClusterSection()
    """The placement; workers are `cluster.learner`."""

    @model_validator(mode="after")
    def _one_engine_answers(self) -> Self:
        for role in ("rollout", "reward"):
            actors = getattr(self.cluster, role).actors
            if actors != 1:
                raise ValueError(
                    f"cluster.{role}.actors = {actors}: one engine answers and one ensemble "
                    "scores; set it to 1"
                )
        gpus, wanted = self.cluster.rollout.gpus, self.rollout.tensor_parallel
        if wanted > 1 and gpus != wanted:
            raise ValueError(
                f"rollout.tensor_parallel = {wanted} with cluster.rollout.gpus = {gpus:g}: an "
                "engine needs one GPU a rank"
            )
        if self.rollout.keep_cache:
            raise ValueError(
                "rollout.keep_cache = true: answers are drawn with new weights and empty caches"
            )
        return self

    @model_validator(mode="after")
    def _weights_go_by_file(self) -> Self:
        if self.cluster.weight_transport == "nccl":
            raise ValueError(
                'cluster.weight_transport = "nccl" with pavlov sft: the engine that answers takes '
                'weights from a file; set "shared_memory" or "object_store"'
            )
        return self
