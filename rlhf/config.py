"""Strict, typed configuration: TOML files with dotted overrides.

One root class a command: `RLConfig`, `RewardConfig`, `DemoConfig`. Sections are shared where the
meaning is shared. A sentence stands under every field; limits stand in the types; validators say
which two settings clash and why.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from rlhf.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16"]
"""`auto`: bfloat16 where the hardware multiplies it natively, else float32."""
Fraction = Annotated[float, Field(gt=0, lt=1)]


def _whole_or_fraction(gpus: float) -> float:
    if gpus > 1 and not gpus.is_integer():
        raise ValueError(f"GPUs are whole or a fraction below 1, got {gpus}")
    return gpus


Gpus = Annotated[float, Field(ge=0), AfterValidator(_whole_or_fraction)]


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


ALGORITHMS = ("cem", "grpo", "gspo", "reinforce_pp", "rloo")
KINDS = ("probe", "top", "full")
_TAG = re.compile(r'^(kind|type) = "\w+"$')


def _by(name: str, default: str, known: tuple[str, ...]) -> Callable[[object], str]:
    """Which of several sections a table is, by its key `name`: a discriminator with a default.
    What is none of them goes to the default's section, which refuses it by that key."""

    def tag(value: object) -> str:
        given = value.get(name, default) if isinstance(value, dict) else getattr(value, name, "")
        return f'{name} = "{given if given in known else default}"'

    return tag


def _one_of(own: str, known: tuple[str, ...]) -> Callable[[object], object]:
    """Refuses what is none of `known`; the others never get here but for `own`."""

    def check(value: object) -> object:
        if value != own:
            raise PydanticCustomError("unknown", f"input should be one of {', '.join(known)}")
        return value

    return check


class RunSection(Section):
    """Where a run keeps its files."""

    dir: str | None = None
    """The run's folder, relative to PAVLOV_RUNS; default: the config's name."""
    checkpoint_every: PositiveInt = 5
    """Steps between checkpoints. The last step always writes one."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""


class PolicySection(Section):
    """The network that is trained."""

    model: str = "embedded"
    """`embedded`, a Hugging Face folder, or a hub id."""
    dtype: DType = "auto"
    """Precision of the learner's forward and backward pass; master weights are always float32."""


class ReferenceSection(Section):
    """The frozen model that the KL penalty is measured against."""

    model: str | None = None
    """Default: the start policy."""
    dtype: DType = "auto"
    """Precision of its forward pass."""


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
    """Standard deviations over members subtracted from the mean reward."""


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


class ClippedSection(Section):
    """What the algorithms with a clipped ratio of tokens share."""

    clip_low: Fraction = 0.2
    """The ratio's gradient stops below 1 - clip_low for negative advantages."""
    clip_high: PositiveFloat = 0.2
    """The ratio's gradient stops above 1 + clip_high for positive advantages."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """The ratio's gradient stops above it for negative advantages (3 is usual); default: never."""
    normalisation: Literal["sequence", "token", "constant"] = "token"
    """What the loss is divided by; see rlhf/losses.py."""

    @model_validator(mode="after")
    def _the_dual_clip_lies_beyond_the_range(self) -> Self:
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(
                f"rl.algorithm.dual_clip = {self.dual_clip:g} with rl.algorithm.clip_high = "
                f"{self.clip_high:g}: it must lie above 1 + clip_high, or it would stop tokens "
                "that have hardly moved"
            )
        return self


class GRPOSection(ClippedSection):
    """Against the group's mean and deviation."""

    type: Annotated[Literal["grpo"], BeforeValidator(_one_of("grpo", ALGORITHMS))] = "grpo"
    """This algorithm."""
    divide_by_deviation: bool = True
    """Divide by the group's standard deviation (false: Dr. GRPO)."""


class RLOOSection(ClippedSection):
    """Against the mean of the siblings, without bias."""

    type: Literal["rloo"]
    """This algorithm."""


class ReinforcePPSection(ClippedSection):
    """Against the batch's mean and deviation."""

    type: Literal["reinforce_pp"]
    """This algorithm."""


class GSPOSection(Section):
    """As GRPO, with the ratio of whole completions."""

    type: Literal["gspo"]
    """This algorithm."""
    divide_by_deviation: bool = True
    """Divide by the group's standard deviation."""
    clip_low: Fraction = 3e-4
    """As GRPO's; the ratio is a mean over tokens, and so far closer to 1."""
    clip_high: PositiveFloat = 4e-4
    """As GRPO's."""
    normalisation: Literal["sequence"] = "sequence"
    """A mean over completions: there are no ratios of tokens."""


class CEMSection(Section):
    """The cross-entropy method: the best completions are made likelier."""

    type: Literal["cem"]
    """This algorithm."""
    elite_share: Fraction = 0.25
    """Share of the completions that is kept, at least one."""
    elite_of: Literal["prompt", "batch"] = "prompt"
    """The best of every prompt, or of all completions of a step."""
    normalisation: Literal["sequence", "token", "constant"] = "token"
    """What the loss is divided by; see rlhf/losses.py."""


AlgorithmSettings = Annotated[
    Annotated[GRPOSection, Tag('type = "grpo"')]
    | Annotated[RLOOSection, Tag('type = "rloo"')]
    | Annotated[ReinforcePPSection, Tag('type = "reinforce_pp"')]
    | Annotated[GSPOSection, Tag('type = "gspo"')]
    | Annotated[CEMSection, Tag('type = "cem"')],
    Discriminator(_by("type", "grpo", ALGORITHMS)),
]


def _require_start(name: str, coefficient: float, target: float | None) -> None:
    if target is not None and not coefficient:
        raise ValueError(
            f"rl.{name}.target = {target:g} with rl.{name}.coefficient = 0: the coefficient is "
            "multiplied to steer it, and zero stays zero; start above it"
        )


class KLSection(Section):
    """The penalty for leaving the reference model."""

    coefficient: NonNegativeFloat = 0.02
    """Reward subtracted, or loss added, per nat of a completion's KL to the reference."""
    place: Literal["reward", "loss"] = "reward"
    """`reward`: credit is given to the penalised reward; `loss`: a term beside the algorithm's own,
    which credit neither centres nor divides."""
    estimator: Literal["k1", "k2", "k3"] | None = None
    """What is taken for the KL (rlhf/kl.py); default: k1 in the reward, k2 in the loss."""
    target: PositiveFloat | None = None
    """Nats per completion that the coefficient is steered towards; default: it stays as it is."""
    rate: Fraction = 0.1
    """How fast it is steered: at most a fifth of this share a step."""

    @model_validator(mode="after")
    def _what_is_steered_can_move(self) -> Self:
        _require_start("kl", self.coefficient, self.target)
        return self

    @model_validator(mode="after")
    def _the_gradient_is_that_of_the_kl(self) -> Self:
        if self.place == "reward" and self.estimator in ("k2", "k3"):
            raise ValueError(
                f'rl.kl.estimator = "{self.estimator}" with rl.kl.place = "reward": its own '
                "gradient would be missing there, and the expected one is not that of the KL; take "
                "k1, or the loss"
            )
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                'rl.kl.estimator = "k1" with rl.kl.place = "loss": its expected gradient there is '
                "zero; take k2, or the reward"
            )
        return self


class EntropySection(Section):
    """The bonus that keeps the policy from collapsing."""

    coefficient: NonNegativeFloat = 0.0
    """Loss subtracted per nat of mean token entropy (exact, from the learner's logits)."""
    target: PositiveFloat | None = None
    """Nats per token that the coefficient is steered towards; default: it stays as it is."""
    rate: Fraction = 0.1
    """How fast it is steered: at most a fifth of this share a step."""

    @model_validator(mode="after")
    def _what_is_steered_can_move(self) -> Self:
        _require_start("entropy", self.coefficient, self.target)
        return self


class ShapingSection(Section):
    """What is done to rewards before the KL penalty and credit."""

    clip: PositiveFloat | None = None
    """Rewards beyond this many deviations are cut to it; default: never."""
    whiten: bool = False
    """Mean 0 and deviation 1 over a step's completions."""
    cut_off_penalty: NonNegativeFloat = 0.0
    """Subtracted from a completion that ran into `rl.max_tokens`."""
    length_penalty: NonNegativeFloat = 0.0
    """Subtracted for every token beyond the target."""
    length_target: NonNegativeInt = 0
    """Tokens that cost nothing."""

    @model_validator(mode="after")
    def _a_target_has_a_penalty(self) -> Self:
        if self.length_target and not self.length_penalty:
            raise ValueError(
                f"rl.shaping.length_target = {self.length_target} with rl.shaping.length_penalty = "
                "0: nothing is subtracted beyond the target; set the penalty"
            )
        return self


class RLSection(Section):
    """The reinforcement-learning loop."""

    num_steps: PositiveInt = 16
    """Optimiser steps."""
    prompts_per_step: PositiveInt = 8
    """Groups a step trains on."""
    completions_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Siblings of a prompt, G."""
    max_staleness: NonNegativeInt = 0
    """Publishes by which a completion may lag behind the learner; 0 is synchronous."""
    max_tokens: PositiveInt = 64
    """Tokens a completion may have."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; every logprob is taken at it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; below 1 the ratio loss would be taken against another distribution."""
    max_attempts: PositiveInt = 3
    """Attempts at a group before it becomes a recorded failure."""
    algorithm: AlgorithmSettings = GRPOSection()
    """Advantages and loss."""
    kl: KLSection = KLSection()
    """KL penalty."""
    entropy: EntropySection = EntropySection()
    """Entropy bonus."""
    shaping: ShapingSection = ShapingSection()
    """Clipping, whitening, penalties for length."""

    def with_coefficients(self, kl: float, entropy: float) -> RLSection:
        """The same with other coefficients, as steering changes them."""
        return self.model_copy(
            update={
                "kl": self.kl.model_copy(update={"coefficient": kl}),
                "entropy": self.entropy.model_copy(update={"coefficient": entropy}),
            }
        )

    @model_validator(mode="after")
    def _kl_in_the_loss_needs_its_own_samples(self) -> Self:
        if self.kl.place == "loss" and self.max_staleness > 0:
            raise ValueError(
                f'rl.kl.place = "loss" with rl.max_staleness = {self.max_staleness}: the term is a '
                "mean over the policy's own completions, and stale ones are not; set "
                'rl.kl.place = "reward"'
            )
        if self.kl.place == "loss" and self.algorithm.type == "cem":
            raise ValueError(
                'rl.kl.place = "loss" with rl.algorithm.type = "cem": the term is a mean over the '
                'policy\'s own completions, and the elite is not; set rl.kl.place = "reward"'
            )
        return self

    @model_validator(mode="after")
    def _ratios_need_the_sampled_distribution(self) -> RLSection:
        if self.top_p < 1:
            raise ValueError(
                f"rl.top_p = {self.top_p} with a ratio loss: the engine samples from a truncated "
                "distribution that the learner's logprobs do not describe; set rl.top_p = 1"
            )
        return self


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
    """Memory for cached keys and values on CPU, in GiB."""
    gpu_memory_utilization: Fraction = 0.85
    """Share of the GPU's memory that the engine may take."""
    tensor_parallel: PositiveInt = 1
    """GPUs a single engine spans."""
    enforce_eager: bool = True
    """No compilation: starts in seconds instead of minutes, 4 % slower on CPU."""
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
    one thread of its own. Default: turns on up to 4 cores."""
    weight_transport: Literal["shared_memory", "object_store", "nccl"] = "shared_memory"
    """How weights reach the engines."""
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

    @model_validator(mode="after")
    def _deterministic_needs(self) -> RLConfig:
        if not self.deterministic:
            return self
        wanted = {
            "rl.max_staleness": (self.rl.max_staleness, 0),
            "cluster.learner.actors": (self.cluster.learner.actors, 1),
            "cluster.rollout.actors": (self.cluster.rollout.actors, 1),
            "policy.dtype": (self.policy.dtype, "float32"),
            "reference.dtype": (self.reference.dtype, "float32"),
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


class PairFile(Section):
    """A file of pairs, and by what they were judged."""

    path: str
    """Resolved against PAVLOV_DATA."""
    criterion: str = Field(default="", max_length=40)
    """helpful, harmless, honest or any other; rows that name one themselves keep it."""


def _named(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class PairsSection(Section):
    """Where preference pairs come from."""

    train: list[Annotated[PairFile, BeforeValidator(_named)]] = Field(min_length=1)
    """Pair files to train on: paths against PAVLOV_DATA, or `{path, criterion}`."""
    validation: list[Annotated[PairFile, BeforeValidator(_named)]] = []
    """Pair files opened once, for the reported figures."""
    limit: PositiveInt | None = None
    """At most this many training pairs."""


class ProbeMembers(Section):
    """Linear heads on a frozen backbone cut at a layer: the default on CPU."""

    kind: Annotated[Literal["probe"], BeforeValidator(_one_of("probe", KINDS))] = "probe"
    """This kind."""
    count: PositiveInt = 16
    """Members, each on a bootstrap draw of its own."""
    model: str | None = None
    """Backbone; default: `ensemble.model`. Members of one backbone share its pass."""
    depth: Annotated[float, Field(gt=0, le=1)] = 0.67
    """Share of the layers that are run; deeper ones add cost, not accuracy (measured)."""
    pooling: Literal["last", "mean"] = "last"
    """The reply's last token, or the mean over its tokens."""
    l2: list[PositiveFloat] = Field(default=[0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0], min_length=1)
    """Candidates for the weight of the squared norm; cross-validation chooses, by criterion."""
    centring: NonNegativeFloat = 0.0
    """Weight of the mean square of a pair's summed rewards (keeps rewards around zero)."""


class TrainedMembers(Section):
    """Members with layers of their own, trained by Ray Train: the choice where there are GPUs."""

    kind: Literal["top", "full"]
    """`top`: own `layers` above a shared trunk; `full`: all layers its own (embeddings frozen)."""
    count: PositiveInt = 4
    """Members, each on a bootstrap draw of its own and with a head drawn by its own seed."""
    model: str | None = None
    """Backbone; default: `ensemble.model`."""
    depth: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the layers after which a member ends."""
    layers: PositiveInt = 1
    """`top`: how many of them are its own."""
    pooling: Literal["last", "mean"] = "last"
    """The reply's last token, or the mean over its tokens."""
    epochs: PositiveInt = 1
    """Times that a draw is gone through."""
    batch_pairs: PositiveInt = 16
    """Pairs a step, over all workers."""
    centring: NonNegativeFloat = 0.0
    """Weight of the mean square of a pair's summed rewards (keeps rewards around zero)."""
    head_learning_rate: PositiveFloat = 1e-3
    """Of the linear heads, which start from noise."""
    learner: LearnerSection = LearnerSection(learning_rate=1e-4, warmup_steps=10, weight_decay=0.01)
    """The optimiser."""
    dtype: DType = "auto"
    """Precision of the forward and backward pass; weights are kept in float32."""
    workers: PositiveInt = 1
    """Ranks that train one member together."""
    cpus_per_worker: PositiveFloat = 1.0
    """Declared to Ray: as many members train at once as fit."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """Declared to Ray."""


Members = Annotated[
    Annotated[ProbeMembers, Tag('kind = "probe"')]
    | Annotated[TrainedMembers, Tag('kind = "top"')]
    | Annotated[TrainedMembers, Tag('kind = "full"')],
    Discriminator(_by("kind", "probe", KINDS)),
]


class EnsembleSection(Section):
    """The reward model's members, and how they become one reward."""

    model: str = "embedded"
    """The backbone: `embedded`, a Hugging Face folder, or a hub id."""
    dtype: DType = "auto"
    """Precision of the frozen pass."""
    members: list[Members] = Field(
        default=[
            ProbeMembers(count=12, pooling="last"),
            ProbeMembers(count=10, pooling="mean"),
            ProbeMembers(count=10, pooling="mean", depth=0.4),
        ],
        min_length=1,
    )
    """Groups of members; disagreement is taken within a feature family (pooling and depth), among
    trained members within their group."""
    combination: dict[str, float] | None = None
    """The reward as weights of the standardised criteria, such as `{helpful = 1, harmless = 0.5}`.
    Default: `overall` where the data has it, else every criterion with the same weight."""
    max_tokens: Annotated[int, Field(ge=16)] = 384
    """Of prompt and reply: a prompt keeps its last third of them, a reply gets the rest."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Folds of the cross-validation, by first user turn."""
    false_alarm_rate: Fraction = 0.05
    """Share of held-out replies that the domain-shift threshold may flag."""
    batch_tokens: PositiveInt = 2048
    """Padded tokens a forward pass may hold."""

    @model_validator(mode="after")
    def _enough_members_to_disagree(self) -> EnsembleSection:
        count = sum(group.count for group in self.members)
        if count < 3:
            raise ValueError(
                f"ensemble.members gives {count} members: at least 3 are needed to disagree (fewer "
                "than 8 are a lottery)"
            )
        return self

    @model_validator(mode="after")
    def _the_combination_has_weight(self) -> EnsembleSection:
        if self.combination is not None and not any(self.combination.values()):
            raise ValueError("ensemble.combination gives no criterion any weight")
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


Root = TypeVar("Root", bound=Section)


def load_config(root: type[Root], path: Path, overrides: Sequence[str] = ()) -> Root:
    """Read a TOML file, apply dotted overrides, validate.

    Example: ``load_config(RLConfig, Path("configs/rl_hh_cpu.toml"), ["rl.num_steps=3"])``

    Raises:
        ConfigError: one sentence that names the file, the key and the remedy.
    """
    try:
        values = tomllib.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"there is no configuration file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    for override in overrides:
        _apply_override(values, override)
    return parse_config(root, values, str(path))


def parse_config(root: type[Root], values: dict[str, Any], origin: str) -> Root:
    """Validate a mapping as `root`; errors name `origin`."""
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_sentence(root, error)}") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"an override is written key=value, got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.strip().split(".")
    table = values
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
    table[leaf] = value


def _sentence(root: type[Section], error: ValidationError) -> str:
    first, *rest = error.errors()
    # Which section of several a table was taken for is no part of the key.
    tags = [part for part in first["loc"] if _TAG.match(str(part))]
    parts = [str(part) for part in first["loc"] if part not in tags]
    key = ".".join(parts)
    if first["type"] == "extra_forbidden" and tags and _unnumbered(parts) in known_keys(root):
        # A setting of another kind.
        kind = ".".join([*parts[:-1], str(tags[-1])])
        text = f"{key} = {_toml(first['input'])} with {kind}: that one has no such setting"
    elif first["type"] == "extra_forbidden":
        text = f"{key} is not a known key"
        close = difflib.get_close_matches(key, known_keys(root), n=1, cutoff=0.4)
        if close:
            text += f"; did you mean {close[0]}?"
    elif first["type"] == "missing":
        below = [known for known in known_keys(root) if known.startswith(f"{key}.")]
        text = f"{below[0] if below else key} is required"
    elif first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        text = f"{key}: {reason}" if key and key.split(".")[-1] not in reason else reason
    else:
        reason = first["msg"][0].lower() + first["msg"][1:]
        text = f"{key} = {first['input']!r}: {reason}"
    return text + (f" (and {len(rest)} more)" if rest else "")


def _unnumbered(parts: Sequence[str]) -> str:
    return ".".join(part for part in parts if not part.isdigit())


def _toml(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool | int | float | str) else repr(value)


def known_keys(root: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key of a configuration class."""
    keys = []
    for name, field in root.model_fields.items():
        keys.append(prefix + name)
        for section in _sections_of(field.annotation):
            keys += known_keys(section, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))


def _sections_of(annotation: Any) -> list[type[Section]]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, Annotated):
        return [each for part in typing.get_args(annotation) for each in _sections_of(part)]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return []


def data_path(path: str) -> Path:
    """A data path made absolute against PAVLOV_DATA (default ``../shared/data``)."""
    return _against("PAVLOV_DATA", "../shared/data", path)


def runs_path(path: str) -> Path:
    """A run folder made absolute against PAVLOV_RUNS (default ``runs``)."""
    return _against("PAVLOV_RUNS", "runs", path)


def _against(variable: str, default: str, path: str) -> Path:
    base = Path(os.environ.get(variable) or default).expanduser().absolute()
    return (base / Path(path).expanduser()).resolve()
