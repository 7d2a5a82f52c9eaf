"""`rl`: the loop, its algorithms, and the terms beside them."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal, Self

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

from rlhf.config.section import Fraction, Section, Temperature, changed, kind_by, one_of

ALGORITHMS = ("cem", "grpo", "gspo", "ppo", "reinforce_pp", "rloo")


class AlgorithmSection(Section):
    """What all algorithms share."""

    epochs: PositiveInt = 1
    """Passes over a step's completions."""
    mini_batches: PositiveInt = 1
    """Optimiser steps a pass is cut into."""


class ClippedSection(AlgorithmSection):
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

    type: Annotated[Literal["grpo"], BeforeValidator(one_of("grpo", ALGORITHMS))] = "grpo"
    """This algorithm."""
    divide_by_deviation: bool = True
    """Divide by the group's standard deviation (false: Dr. GRPO)."""


class RLOOSection(ClippedSection):
    """Against the mean of the siblings, without bias."""

    type: Literal["rloo"]
    """This algorithm."""
    ratio: Literal["token", "completion"] = "token"
    """What has a ratio, and is clipped by it: every token, or, as published, the completion as one
    action."""

    @model_validator(mode="after")
    def _completions_are_divided_by_a_constant(self) -> Self:
        if self.ratio == "completion" and self.normalisation != "constant":
            raise ValueError(
                'rl.algorithm.ratio = "completion" with rl.algorithm.normalisation = '
                f'"{self.normalisation}": there are no ratios of tokens to take a mean of; set '
                'normalisation = "constant"'
            )
        return self


class ReinforcePPSection(ClippedSection):
    """Against the batch's mean and deviation."""

    type: Literal["reinforce_pp"]
    """This algorithm."""


class CriticSection(Section):
    """What estimates the reward still to come from every token on."""

    model: str | None = None
    """A model of its own: `embedded`, a Hugging Face folder, or a hub id, with the policy's tokens.
    Default: a head on the policy's own last state."""
    learning_rate: PositiveFloat | None = None
    """Of a model of its own; default: the policy's."""
    head_learning_rate: PositiveFloat = 1e-3
    """Of the head, which starts at zero."""
    coefficient: PositiveFloat = 0.1
    """Of its loss beside the policy's."""
    clip: PositiveFloat = 0.2
    """An estimate's gradient stops once it has moved further than this in a step."""

    @model_validator(mode="after")
    def _a_rate_has_a_model(self) -> Self:
        if self.learning_rate is not None and self.model is None:
            raise ValueError(
                f"rl.algorithm.critic.learning_rate = {self.learning_rate:g} without "
                "rl.algorithm.critic.model: a head on the policy's state has no other weights; set "
                "rl.algorithm.critic.head_learning_rate, or a model"
            )
        return self


class PPOSection(ClippedSection):
    """Against what a critic expected, token by token."""

    type: Literal["ppo"]
    """This algorithm."""
    epochs: PositiveInt = 4
    """Passes over a step's completions."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of a reward a token later."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """How far advantages look ahead: 0 trusts the critic after one token, 1 only the rewards."""
    whiten: bool = True
    """Advantages of mean 0 and deviation 1 over a step's tokens."""
    critic: CriticSection = CriticSection()
    """The critic."""


class GSPOSection(AlgorithmSection):
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


class CEMSection(AlgorithmSection):
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
    | Annotated[PPOSection, Tag('type = "ppo"')]
    | Annotated[CEMSection, Tag('type = "cem"')],
    Discriminator(kind_by("type", "grpo", ALGORITHMS)),
]


class SteeredSection(Section):
    """A coefficient that may be steered towards a target (rlhf/steering.py)."""

    name: ClassVar[str]
    coefficient: NonNegativeFloat
    """Of the term."""
    target: PositiveFloat | None = None
    """What the coefficient is steered towards, in the units of the term; default: it stays."""
    rate: Fraction = 0.1
    """How fast it is steered: at most a fifth of this share a step."""

    @model_validator(mode="after")
    def _what_is_steered_can_move(self) -> Self:
        if self.target is not None and not self.coefficient:
            raise ValueError(
                f"rl.{self.name}.target = {self.target:g} with rl.{self.name}.coefficient = 0: the "
                "coefficient is multiplied to steer it, and zero stays zero; start above it"
            )
        if self.target is None and changed(self, "rate"):
            raise ValueError(
                f"rl.{self.name}.rate = {self.rate:g} without rl.{self.name}.target: the "
                "coefficient stays as it is; set the target"
            )
        return self


class KLSection(SteeredSection):
    """The penalty for leaving the reference model; its target is in nats per completion."""

    name = "kl"
    coefficient: NonNegativeFloat = 0.02
    """Reward subtracted per nat of a completion's KL to the reference; in the loss, the same slope
    under the algorithm's normalisation."""
    place: Literal["reward", "loss"] = "reward"
    """`reward`: credit is given to the penalised reward; `loss`: a term beside the algorithm's own,
    which credit neither centres nor divides."""
    estimator: Literal["k1", "k2", "k3"] | None = None
    """What is taken for the KL (rlhf/kl.py); default: k1 in the reward, k2 in the loss."""

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


class EntropySection(SteeredSection):
    """The bonus that keeps the policy from collapsing; its target is in nats per token.

    Entropies are exact, from the learner's logits.
    """

    name = "entropy"
    coefficient: NonNegativeFloat = 0.0
    """Loss subtracted per nat of mean token entropy; in the reward, reward added per nat of a
    completion's."""
    place: Literal["loss", "reward"] = "loss"
    """`loss`: the policy is made less certain where it goes; `reward`: it is also sent to where it
    is less certain, at the price of one more forward pass."""


class OffPolicySection(Section):
    """What is done about completions that the learner would not have sampled like this: stale ones,
    and the difference between engine and learner (rlhf/importance.py)."""

    weights: Literal["token", "sequence"] | None = None
    """What is weighed by how much likelier the learner makes it than the engine that sampled it.
    Default: nothing; the loss's own ratio, with its clip, is against the engine's logprobs."""
    truncate: Annotated[float, Field(ge=1)] = 2.0
    """Larger weights are cut to it."""
    mask_outside: Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)] | None = None
    """Tokens (or completions) whose weight lies outside are left out; default: none."""

    @model_validator(mode="after")
    def _the_range_is_one_and_has_weights(self) -> Self:
        default = OffPolicySection.model_fields["truncate"].default
        if self.weights is None and self.truncate != default:
            raise ValueError(
                f"rl.off_policy.truncate = {self.truncate:g} without rl.off_policy.weights: there "
                'are no weights to cut; set weights to "token" or "sequence"'
            )
        if self.mask_outside is None:
            return self
        low, high = self.mask_outside
        if not low <= 1 <= high:
            raise ValueError(
                f"rl.off_policy.mask_outside = [{low:g}, {high:g}]: on policy every weight is 1, "
                "so it must lie inside"
            )
        if self.weights is None:
            raise ValueError(
                f"rl.off_policy.mask_outside = [{low:g}, {high:g}] without rl.off_policy.weights: "
                'there is nothing to go by; set weights to "token" or "sequence"'
            )
        return self


class ShapingSection(Section):
    """What is done to rewards before the KL penalty and credit."""

    ensemble_weight: NonNegativeFloat = 1.0
    """What the ensemble's reward is multiplied by, once clipped and whitened; 0 trains on
    `rl.rewards` alone."""
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
    def _what_is_shaped_counts(self) -> Self:
        if self.length_target and not self.length_penalty:
            raise ValueError(
                f"rl.shaping.length_target = {self.length_target} with rl.shaping.length_penalty = "
                "0: nothing is subtracted beyond the target; set the penalty"
            )
        for name in changed(self, "clip", "whiten"):
            if not self.ensemble_weight:
                raise ValueError(
                    f"rl.shaping.{name} = {json.dumps(getattr(self, name))} with "
                    "rl.shaping.ensemble_weight = 0: it shapes the ensemble's reward, which is "
                    "multiplied by nothing; leave it out"
                )
        return self


class RewardFunction(Section):
    """A reward of one's own beside the ensemble's (rlhf/reward_functions.py)."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """What the metrics call it."""
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """`module:function`, from here or installed: prompts and completions in, a number for each
    completion out."""
    weight: float = 1.0
    """What it is multiplied by; negative for a penalty."""


class RLSection(Section):
    """The reinforcement-learning loop."""

    num_steps: PositiveInt = 16
    """Steps of the loop, an update of the weights each."""
    prompts_per_step: PositiveInt = 8
    """Groups a step trains on."""
    completions_per_prompt: PositiveInt = 8
    """Siblings of a prompt, G; one is enough where they are not compared with each other."""
    max_staleness: NonNegativeInt = 0
    """Publishes by which a completion may lag behind the learner; 0 is synchronous."""
    max_tokens: PositiveInt = 64
    """Tokens a completion may have."""
    temperature: Temperature = 1.0
    """Sampling temperature; every logprob is taken at it. At least 0.01: vLLM samples at that where
    it is asked for less, and engine and learner would speak of two distributions."""
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
    off_policy: OffPolicySection = OffPolicySection()
    """Importance weights."""
    shaping: ShapingSection = ShapingSection()
    """Clipping, whitening, penalties for length."""
    rewards: list[RewardFunction] = Field(default_factory=list)
    """Rewards of one's own."""

    def with_coefficients(self, kl: float, entropy: float) -> RLSection:
        """The same with other coefficients, as steering changes them."""
        return self.model_copy(
            update={
                "kl": self.kl.model_copy(update={"coefficient": kl}),
                "entropy": self.entropy.model_copy(update={"coefficient": entropy}),
            }
        )

    @model_validator(mode="after")
    def _terms_beside_the_loss_need_their_own_samples(self) -> Self:
        passes = self.algorithm.epochs * self.algorithm.mini_batches
        for name, place, other in (("kl", "loss", "reward"), ("entropy", "reward", "loss")):
            # Both have a part beside the algorithm's loss that is exact on policy alone. An entropy
            # in the loss claims no such thing.
            if getattr(self, name).place != place:
                continue
            here, remedy = f'rl.{name}.place = "{place}"', f'rl.{name}.place = "{other}"'
            if self.max_staleness > 0:
                raise ValueError(
                    f"{here} with rl.max_staleness = {self.max_staleness}: the term beside the "
                    "loss is a mean over the policy's own completions, and stale ones are not; set "
                    f"{remedy}"
                )
            if passes > 1:
                raise ValueError(
                    f"{here} with rl.algorithm.epochs = {self.algorithm.epochs} and "
                    f"rl.algorithm.mini_batches = {self.algorithm.mini_batches}: the term beside "
                    "the loss is a mean over the policy's own completions, and after the first "
                    f"optimiser step they are not; set both to 1, or {remedy}"
                )
            if self.algorithm.type == "cem":
                raise ValueError(
                    f'{here} with rl.algorithm.type = "cem": the term beside the loss is a mean '
                    f"over the policy's own completions, and the elite is not; set {remedy}"
                )
        return self

    @model_validator(mode="after")
    def _ratios_need_the_sampled_distribution(self) -> RLSection:
        cem = self.algorithm.type == "cem"
        if self.top_p < 1 and not (cem and self.kl.coefficient == 0):
            what = "the KL to the reference" if cem else "a ratio loss"
            raise ValueError(
                f"rl.top_p = {self.top_p} with {what}: the engine samples from a truncated "
                "distribution that the learner's logprobs do not describe; set rl.top_p = 1"
            )
        return self

    @model_validator(mode="after")
    def _who_compares_siblings_has_some(self) -> Self:
        alone = self.completions_per_prompt == 1
        kind = self.algorithm.type
        over_batch = isinstance(self.algorithm, CEMSection) and self.algorithm.elite_of == "batch"
        if alone and kind not in ("ppo", "reinforce_pp") and not over_batch:
            raise ValueError(
                f'rl.completions_per_prompt = 1 with rl.algorithm.type = "{kind}": it compares '
                "completions of the same prompt; draw at least 2"
            )
        if alone and self.prompts_per_step == 1 and kind != "ppo":
            raise ValueError(
                "rl.completions_per_prompt = 1 with rl.prompts_per_step = 1: "
                f'rl.algorithm.type = "{kind}" compares the completions of a step; draw at least 2'
            )
        return self

    @model_validator(mode="after")
    def _weights_fit_the_ratio(self) -> Self:
        weights, kind = self.off_policy.weights, self.algorithm.type
        if weights is not None and kind == "cem":
            raise ValueError(
                f'rl.off_policy.weights = "{weights}" with rl.algorithm.type = "cem": the elite is '
                "what is wanted, whoever sampled it; leave them out"
            )
        whole = {"gspo": 'rl.algorithm.type = "gspo"'}
        if isinstance(self.algorithm, RLOOSection) and self.algorithm.ratio == "completion":
            whole["rloo"] = 'rl.algorithm.ratio = "completion"'
        if weights == "token" and kind in whole:
            raise ValueError(
                f'rl.off_policy.weights = "token" with {whole[kind]}: the ratio is of whole '
                'completions; set weights = "sequence"'
            )
        return self

    @model_validator(mode="after")
    def _something_is_rewarded(self) -> Self:
        names = [reward.name for reward in self.rewards]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rl.rewards: two are called {twice[0]!r}; metrics need one name each")
        if not self.shaping.ensemble_weight and not any(r.weight for r in self.rewards):
            raise ValueError(
                "rl.shaping.ensemble_weight = 0 without rl.rewards: nothing would be rewarded"
            )
        return self
