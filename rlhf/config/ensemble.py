"""Preference pairs, and the reward model's members."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from rlhf.config.actors import LearnerSection, LoRASection
from rlhf.config.section import DType, Fraction, Gpus, Section, kind_by, one_of

KINDS = ("probe", "top", "full", "lora")


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
    validation: list[Annotated[PairFile, BeforeValidator(_named)]] = Field(default=[])
    """Pair files opened once, for the reported figures; what opens with a first user turn of the
    training data is left out."""
    limit: PositiveInt | None = None
    """At most this many training pairs."""


class ProbeMembers(Section):
    """Linear heads on a frozen backbone cut at a layer: the default on CPU."""

    kind: Annotated[Literal["probe"], BeforeValidator(one_of("probe", KINDS))] = "probe"
    """This kind."""
    count: PositiveInt = 16
    """Members, each on a bootstrap draw of its own. Eight share out the pairs between them: with
    multiples of 8 the ensemble depends on its seed the least."""
    model: str | None = None
    """Backbone; default: `ensemble.model`. Members of one backbone share its pass."""
    depth: Annotated[float, Field(gt=0, le=1)] = 0.53
    """Share of the layers that are run; deeper ones add cost, not accuracy (measured)."""
    pooling: Literal["last", "mean", "max"] = "last"
    """The reply's last token, or the mean or maximum over its tokens."""
    l2: list[PositiveFloat] = Field(default=[0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0], min_length=1)
    """Candidates for the weight of the squared norm; cross-validation chooses, by criterion."""
    centring: NonNegativeFloat = 0.0
    """Weight of the mean square of a pair's summed rewards (keeps rewards around zero)."""


class MemberLearnerSection(LearnerSection):
    """The optimiser of a member with layers of its own."""

    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate of AdamW for the layers."""
    warmup_steps: NonNegativeInt = 10
    """Steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""


class TrainedMembers(Section):
    """Members with layers of their own, trained by Ray Train: the choice where there are GPUs."""

    count: PositiveInt = 4
    """Members, each on a bootstrap draw of its own and with a head drawn by its own seed."""
    model: str | None = None
    """Backbone; default: `ensemble.model`."""
    depth: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the layers after which a member ends."""
    pooling: Literal["last", "mean", "max"] = "last"
    """The reply's last token, or the mean or maximum over its tokens."""
    epochs: PositiveInt = 1
    """Times that a draw is gone through."""
    batch_pairs: PositiveInt = 16
    """Pairs a step, over all workers."""
    centring: NonNegativeFloat = 0.0
    """Weight of the mean square of a pair's summed rewards (keeps rewards around zero)."""
    head_learning_rate: PositiveFloat = 1e-3
    """Of the linear heads, which start from noise."""
    learner: MemberLearnerSection = MemberLearnerSection()
    """The optimiser."""
    dtype: DType = "auto"
    """Precision of the forward and backward pass; weights are kept in float32."""
    workers: PositiveInt = 1
    """Ranks that train one member together."""
    cpus_per_worker: PositiveFloat = 1.0
    """Declared to Ray: as many members train at once as fit."""
    gpus_per_worker: Gpus = 0
    """Declared to Ray."""


class TopMembers(TrainedMembers):
    """Own layers above a shared trunk."""

    kind: Literal["top"]
    """This kind."""
    layers: PositiveInt = 1
    """How many are its own."""


class FullMembers(TrainedMembers):
    """All layers of its own; the embeddings stay frozen."""

    kind: Literal["full"]
    """This kind."""


class LoRALearnerSection(MemberLearnerSection):
    """The optimiser of a member that trains an adapter."""

    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate of AdamW for the adapter."""


class LoRAMembers(TrainedMembers):
    """An adapter of its own in all layers; the layers themselves stay frozen."""

    kind: Literal["lora"]
    """This kind."""
    lora: LoRASection = LoRASection()
    """The adapter; it alone is kept."""
    learner: LoRALearnerSection = LoRALearnerSection()
    """The optimiser."""


OwnLayers = TopMembers | FullMembers | LoRAMembers
"""Members that Ray Train trains."""


Members = Annotated[
    Annotated[ProbeMembers, Tag('kind = "probe"')]
    | Annotated[TopMembers, Tag('kind = "top"')]
    | Annotated[FullMembers, Tag('kind = "full"')]
    | Annotated[LoRAMembers, Tag('kind = "lora"')],
    Discriminator(kind_by("kind", "probe", KINDS)),
]


class EnsembleSection(Section):
    """The reward model's members, and how they become one reward."""

    model: str = "embedded"
    """The backbone: `embedded`, a Hugging Face folder, or a hub id."""
    dtype: DType = "auto"
    """Precision of the frozen pass."""
    members: list[Members] = Field(
        default=[ProbeMembers(pooling="last"), ProbeMembers(pooling="mean")], min_length=1
    )
    """Groups of members; disagreement is taken within a feature family (pooling and depth), among
    trained members within their group."""
    combination: dict[str, float] | None = None
    """The reward as weights of the standardised criteria, such as `{helpful = 1, harmless = 0.5}`.
    Default: `overall` where the data has it, else every criterion with the same weight."""
    correlations: list[Annotated[float, Field(ge=-0.95, le=0.95)]] = Field(
        default=[-0.9, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 0.9], min_length=1
    )
    """Candidates for how alike the heads of two criteria are taken to be before their pairs are
    seen: cross-validation chooses. `[0]` keeps criteria apart."""
    max_tokens: Annotated[int, Field(ge=16)] = 768
    """Of prompt and reply: a prompt keeps its last third of them, a reply gets the rest."""
    folds: Annotated[int, Field(ge=2)] = 10
    """Folds of the cross-validation, by first user turn. With few of them, members that have seen
    less than the final ones set the threshold, too high (docs/reward-models.md)."""
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
    def _candidates_differ(self) -> EnsembleSection:
        if len({f"{each:g}" for each in self.correlations}) < len(self.correlations):
            raise ValueError("ensemble.correlations names a candidate twice")
        return self

    @model_validator(mode="after")
    def _the_combination_has_weight(self) -> EnsembleSection:
        if self.combination is not None and not any(self.combination.values()):
            raise ValueError("ensemble.combination gives no criterion any weight")
        return self
