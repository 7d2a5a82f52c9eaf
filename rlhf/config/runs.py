"""Whole configurations, one for each command, and which of their settings clash."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rlhf.config.actors import (
    ClusterSection,
    LearnerSection,
    PolicySection,
    ReferenceSection,
    RolloutSection,
)
from rlhf.config.algorithms import RLSection
from rlhf.config.ensemble import EnsembleSection, PairsSection
from rlhf.config.section import Fraction, Section, changed
from rlhf.rows import reply_room
from rlhf.statistics import conformal_rank, enough_to_promise


class RunSection(Section):
    """Where a run keeps its files."""

    dir: str | None = None
    """The run's folder, relative to PAVLOV_RUNS; default: the config's name."""
    checkpoint_every: PositiveInt = 5
    """Steps between checkpoints. The last step always writes one."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""


class DomainShiftSection(Section):
    """What follows when the ensemble's members disagree."""

    response: Literal["mark", "mask"] = "mark"
    """`mark` records it; `mask` also keeps flagged completions out of the loss."""
    calibration_completions: NonNegativeInt = 128
    """Completions of the start policy that the run's threshold is set by: a small policy cut off at
    a few tokens is far from human-rated replies from the start. 0: the reward model's own."""
    false_alarm_rate: Fraction = 0.05
    """Share of the start policy's completions that the run's threshold may flag."""
    disagreement_penalty: NonNegativeFloat = 0.0
    """Times the members' disagreement within families is taken off the mean reward."""

    @model_validator(mode="after")
    def _the_rate_can_be_promised(self) -> DomainShiftSection:
        count, rate = self.calibration_completions, self.false_alarm_rate
        if not count and changed(self, "false_alarm_rate"):
            raise ValueError(
                f"reward.domain_shift.false_alarm_rate = {rate:g} with "
                "reward.domain_shift.calibration_completions = 0: the reward model's own threshold "
                "has a rate of its own; leave it out, or draw completions"
            )
        if count and conformal_rank(count, rate) > count:
            raise ValueError(
                f"reward.domain_shift.calibration_completions = {count} with "
                f"reward.domain_shift.false_alarm_rate = {rate:g}: no threshold set by so few "
                "promises this rate, and nothing would be flagged; draw at least "
                f"{enough_to_promise(rate)}, or 0 for the reward model's own threshold"
            )
        return self


class RewardSection(Section):
    """The reward-model ensemble that scores completions."""

    model: str
    """A reward-model folder, from here or below PAVLOV_RUNS: `<run>/reward` of `pavlov reward`."""
    domain_shift: DomainShiftSection = DomainShiftSection()
    """The answer to disagreement."""


class PromptsSection(Section):
    """Where prompts come from."""

    prompts: list[str] = Field(min_length=1)
    """Files (JSONL, JSONL.gz, Parquet) relative to PAVLOV_DATA; HH transcripts are recognised."""
    max_prompt_tokens: PositiveInt = 256
    """Longer prompts are left out and counted."""
    limit: PositiveInt | None = None
    """At most this many prompts."""


class LoopConfig(Section):
    """What every command with a reinforcement-learning loop configures."""

    seed: NonNegativeInt = 0
    """Every random choice follows from it."""
    policy: PolicySection = PolicySection()
    """What is trained."""
    rl: RLSection = RLSection()
    """The loop."""
    learner: LearnerSection = LearnerSection()
    """The optimiser."""
    rollout: RolloutSection = RolloutSection()
    """The engine."""
    cluster: ClusterSection = ClusterSection()
    """The placement."""

    @property
    def patience_s(self) -> float:
        """How long the loop waits for a step: longer than all that may happen in one.

        Attempts of generating, scoring and recovering, then learning, publishing and saving, each
        with a timeout of its own.
        """
        cluster = self.cluster
        attempt_s = 3 * cluster.call_timeout_s + 2 * cluster.start_timeout_s
        return self.rl.max_attempts * attempt_s + 4 * cluster.call_timeout_s

    @model_validator(mode="after")
    def _cache_is_kept_only_off_policy(self) -> LoopConfig:
        if self.rollout.keep_cache and self.rl.max_staleness == 0:
            raise ValueError(
                "rollout.keep_cache = true with rl.max_staleness = 0: no request is in flight at "
                "an update, so there is nothing to keep"
            )
        return self

    @model_validator(mode="after")
    def _adapters_travel_by_file(self) -> LoopConfig:
        if self.policy.lora is not None and self.cluster.weight_transport == "nccl":
            raise ValueError(
                'policy.lora with cluster.weight_transport = "nccl": engines merge the adapter '
                'from a file; set cluster.weight_transport = "shared_memory" or "object_store"'
            )
        if self.policy.lora is not None and self.learner.zero_stage == 3:
            raise ValueError(
                "policy.lora with learner.zero_stage = 3: the reference is the same weights with "
                "the adapter off, which every rank must be able to read alone; set zero_stage to "
                "2 or less"
            )
        return self

    @model_validator(mode="after")
    def _one_gpu_an_engine_rank(self) -> LoopConfig:
        gpus, wanted = self.cluster.rollout.gpus, self.rollout.tensor_parallel
        if wanted > 1 and gpus != wanted:
            raise ValueError(
                f"rollout.tensor_parallel = {wanted} with cluster.rollout.gpus = {gpus:g}: an "
                "engine needs one GPU a rank"
            )
        return self

    @model_validator(mode="after")
    def _nccl_needs_gpus(self) -> LoopConfig:
        if self.cluster.weight_transport == "nccl" and (
            self.cluster.rollout.gpus < 1 or self.cluster.learner.gpus < 1
        ):
            raise ValueError(
                'cluster.weight_transport = "nccl" with cluster.rollout.gpus = '
                f"{self.cluster.rollout.gpus:g} and cluster.learner.gpus = "
                f"{self.cluster.learner.gpus:g}: NCCL needs a whole GPU on both ends"
            )
        return self


class RLConfig(LoopConfig):
    """`pavlov rl`."""

    deterministic: bool = False
    """Repeat and resume token for token: one engine, fixed threads, float32, synchronous."""
    run: RunSection = RunSection()
    """The run's folder."""
    reference: ReferenceSection = ReferenceSection()
    """What holds the policy back."""
    reward: RewardSection
    """What the policy is trained towards."""
    data: PromptsSection
    """Prompts."""

    @property
    def learner_is_reference(self) -> bool:
        """Whether the reference is the learner's own model, its adapter off."""
        return self.policy.lora is not None and self.reference.model is None

    @model_validator(mode="after")
    def _a_reference_that_is_the_learner_has_no_actor(self) -> RLConfig:
        if not self.learner_is_reference:
            return self
        placement = self.cluster.reference
        settings = {
            f"{place}.{name}": getattr(section, name)
            for place, section in (("reference", self.reference), ("cluster.reference", placement))
            for name in changed(section)
        }
        for name, value in settings.items():
            raise ValueError(
                f"{name} = {json.dumps(value)} with policy.lora: the reference is the learner's "
                "own model, its adapter off, and no actor of its own starts; leave it out, or set "
                "reference.model"
            )
        return self

    @model_validator(mode="after")
    def _terms_beside_the_loss_hold_all_completions(self) -> RLConfig:
        if self.reward.domain_shift.response != "mask":
            return self
        if self.rl.kl.place == "loss":
            raise ValueError(
                'rl.kl.place = "loss" with reward.domain_shift.response = "mask": those furthest '
                'out would be the ones that nothing pulls back; set rl.kl.place = "reward"'
            )
        if self.rl.entropy.place == "reward":
            raise ValueError(
                'rl.entropy.place = "reward" with reward.domain_shift.response = "mask": the term '
                "beside the loss is a mean over all of the policy's completions, and those that "
                'are masked would be missing; set rl.entropy.place = "loss"'
            )
        return self

    @model_validator(mode="after")
    def _deterministic_needs(self) -> RLConfig:
        if not self.deterministic:
            return self
        wanted = {
            "rl.max_staleness": (self.rl.max_staleness, 0),
            "cluster.learner.actors": (self.cluster.learner.actors, 1),
            "cluster.rollout.actors": (self.cluster.rollout.actors, 1),
            "policy.dtype": (self.policy.dtype, "float32"),
            **(
                {}
                if self.learner_is_reference
                else {"reference.dtype": (self.reference.dtype, "float32")}
            ),
            "rollout.dtype": (self.rollout.dtype, "float32"),
        }
        wrong = [
            f"{key} = {json.dumps(needed)} (it is {json.dumps(value)})"
            for key, (value, needed) in wanted.items()
            if value != needed
        ]
        if wrong:
            raise ValueError(f"deterministic = true needs {', '.join(wrong)}")
        return self


class RewardConfig(Section):
    """`pavlov reward`."""

    seed: NonNegativeInt = 0
    """Every random choice follows from it."""
    run: RunSection = RunSection()
    """The run's folder."""
    data: PairsSection
    """Pairs."""
    ensemble: EnsembleSection = EnsembleSection()
    """Members."""


class AssessorSection(Section):
    """The demo's simulated assessor."""

    noise: PositiveFloat = 0.5
    """P(first preferred) = sigmoid(rule difference / noise)."""


class DemoConfig(LoopConfig):
    """`pavlov demo`."""

    assessor: AssessorSection = AssessorSection()
    """Who compares the answers, simulated."""
    ensemble: EnsembleSection = EnsembleSection()
    """The reward model."""
    train_prompts: PositiveInt = 150
    """How many of the shipped training prompts are used."""
    heldout_prompts: Annotated[int, Field(ge=2)] = 100
    """How many of the shipped held-out prompts are compared on."""

    @model_validator(mode="after")
    def _the_reward_model_reads_whole_answers(self) -> DemoConfig:
        prompt_tokens: int = PromptsSection.model_fields["max_prompt_tokens"].default
        room = reply_room(self.ensemble.max_tokens, prompt_tokens)
        if self.rl.max_tokens > room:
            raise ValueError(
                f"rl.max_tokens = {self.rl.max_tokens} with ensemble.max_tokens = "
                f"{self.ensemble.max_tokens}: the reward model reads at most {room} tokens of an "
                "answer, and what is written beyond would count for nothing; set one smaller or "
                "the other larger"
            )
        return self
