"""One frozen record per stage, complete at construction.

::

    Prompt ─► Completion ─► RolloutGroup ─► ScoredGroup ─► TrainingBatch ─► StepReport
                                  └─► FailedGroup (takes the same place in the order)

Legend for names: G completions of one prompt, K ensemble members, T completion tokens,
B completions of a batch. Every log-probability is in nats, at the sampling temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]

OVERALL = "overall"
"""The criterion of pairs that name none."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Example: ``Message("user", "What is a good name for a cat?")``
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for the assistant's next turn.

    Example: ``Prompt("demo/train-001", (Message("user", "How do I boil an egg?"),))``
    """

    id: str
    messages: tuple[Message, ...]
    source: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer, with everything that training on it needs.

    `token_ids` and `rollout_logprobs_T` have the same length T ≥ 1; the end-of-turn token is
    included when the engine sampled it (`finish_reason == "stop"`). `oldest_version` and
    `newest_version` span the weight versions under which its tokens were sampled; `version_spans`
    say which tokens: (version, how many tokens) in their order, more than one where weights were
    updated in flight, empty where it is not known.
    """

    token_ids: tuple[int, ...]
    text: str
    rollout_logprobs_T: tuple[float, ...]
    finish_reason: FinishReason
    oldest_version: int
    newest_version: int
    seed: int
    version_spans: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.token_ids or len(self.token_ids) != len(self.rollout_logprobs_T):
            raise ValueError(
                f"a completion needs one logprob per token, got {len(self.token_ids)} tokens and "
                f"{len(self.rollout_logprobs_T)} logprobs"
            )
        if self.oldest_version > self.newest_version:
            raise ValueError(f"versions {self.oldest_version}..{self.newest_version} run backwards")
        spanned = sum(tokens for _, tokens in self.version_spans)
        if self.version_spans and spanned != len(self.token_ids):
            raise ValueError(
                f"version spans of {spanned} tokens in a completion of {len(self.token_ids)}"
            )

    @property
    def length(self) -> int:
        """Number of completion tokens, T."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G sibling completions of one prompt in one epoch."""

    prompt: Prompt
    epoch: int
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]

    @property
    def oldest_version(self) -> int:
        """The oldest weight version in any sibling: staleness counts from here."""
        return min(completion.oldest_version for completion in self.completions)


@dataclass(frozen=True, slots=True)
class GroupScores:
    """What the ensemble says of one group.

    `rewards_KG` are standardised per member, `rewards_G` aggregated over members. Two signals say
    how far a completion is from what the members know: `disagreement_G`, their spread, and
    `distance_G`, from the replies they were trained on; `shift_G` is both in one number.
    `data_shift_G` is whether it passes the threshold of human-rated replies, `domain_shift_G` that
    of the start policy's completions, where there is one: a run acts upon the second. `parts_G`
    are the criteria that the reward combines, by name, averaged over members; `own_G` what the
    run's own reward functions say, by name and without their weights. `cut_G` is whether the row
    of the reward model was too short for the completion, so that its end was not read.
    """

    rewards_KG: tuple[tuple[float, ...], ...]
    rewards_G: tuple[float, ...]
    disagreement_G: tuple[float, ...]
    distance_G: tuple[float, ...]
    shift_G: tuple[float, ...]
    data_shift_G: tuple[bool, ...]
    domain_shift_G: tuple[bool, ...]
    reward_version: str
    parts_G: dict[str, tuple[float, ...]] = field(default_factory=dict)
    own_G: dict[str, tuple[float, ...]] = field(default_factory=dict)
    cut_G: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with its rewards and the reference model's logprobs (G rows, row g of length T_g).

    `entropies_GT` is the learner's exact entropy at every token, and `learner_logprobs_GT` what it
    thinks of that token before the step, where either is a part of the reward; else empty.
    """

    rollout: RolloutGroup
    scores: GroupScores
    reference_logprobs_GT: tuple[tuple[float, ...], ...]
    entropies_GT: tuple[tuple[float, ...], ...] = ()
    learner_logprobs_GT: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        lengths = [completion.length for completion in self.rollout.completions]
        if [len(row) for row in self.reference_logprobs_GT] != lengths:
            raise ValueError("reference logprobs do not match the completions' lengths")
        if self.entropies_GT and [len(row) for row in self.entropies_GT] != lengths:
            raise ValueError("entropies do not match the completions' lengths")
        if self.learner_logprobs_GT and [len(row) for row in self.learner_logprobs_GT] != lengths:
            raise ValueError("the learner's logprobs do not match the completions' lengths")
        scores = self.scores
        columns = [
            *(scores.rewards_G, scores.disagreement_G, scores.distance_G, scores.shift_G),
            *(scores.data_shift_G, scores.domain_shift_G),
            *scores.rewards_KG,
            *scores.parts_G.values(),
            *scores.own_G.values(),
        ]
        if any(len(column) != len(lengths) for column in columns):
            raise ValueError("rewards do not match the number of completions")

    @property
    def kl_G(self) -> tuple[float, ...]:
        """Sum over tokens of log(rollout/reference) per completion, in nats (the k1 estimate)."""
        return tuple(
            sum(completion.rollout_logprobs_T) - sum(reference)
            for completion, reference in zip(
                self.rollout.completions, self.reference_logprobs_GT, strict=True
            )
        )


@dataclass(frozen=True, slots=True)
class FailedGroup:
    """A group that could not be produced after all attempts. It keeps its place in the order."""

    prompt: Prompt
    epoch: int
    reason: str
    attempts: int


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """One completion as the learner sees it. `advantage` is its own, the same for every token.

    `reference_logprobs_T` are there where the loss has a term for them, and `rewards_T` where a
    critic makes an advantage of each token's; else empty.
    """

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    rollout_logprobs_T: tuple[float, ...]
    advantage: float
    reference_logprobs_T: tuple[float, ...] = ()
    rewards_T: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Everything one step of the loop trains on, over all ranks.

    The loss is normalised by `num_sequences`, `num_tokens` and `max_tokens` of the whole batch,
    so that the number of ranks and micro-batches does not change the gradient.
    """

    sequences: tuple[TrainingSequence, ...]
    max_tokens: int
    temperature: float
    kl_coefficient: float = 0.0
    """Of the KL as a term of the loss; 0 where it is in the reward."""
    entropy_coefficient: float = 0.0
    """Of the entropy as a bonus."""

    @property
    def num_sequences(self) -> int:
        """Completions trained on, B."""
        return len(self.sequences)

    @property
    def num_tokens(self) -> int:
        """Completion tokens trained on."""
        return sum(len(sequence.completion_token_ids) for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What the learner says of one step of the loop: named metrics, averaged over the batch."""

    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation to learn from; its last turn is the assistant's, and not finished where it was
    cut off at a length limit.

    Example: ``Conversation((Message("user", "2 + 2?"), Message("assistant", "4")))``
    """

    messages: tuple[Message, ...]
    source: str = ""
    finished: bool = True

    @property
    def first_user_turn(self) -> str:
        """What the conversation opens with: splits are made by it."""
        return next((m.content for m in self.messages if m.role == "user"), "")


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two replies to one conversation, and which of them is preferred.

    `label` is the probability that `chosen` is preferred: 1 for a clear verdict, 0.5 for a tie.
    `weight` scales the pair's share of a loss. `margin` is by how much, in log-odds, the preferred
    reply is to win at least. Both are at most a million: sums of them stay numbers in float32.
    `source` names the data set, `criterion` what was asked (helpful, honest, harmless); both may be
    empty. A reply that was cut off at a length
    limit is not finished: a reward model may see the difference.

    Example: ``PreferencePair((Message("user", "2 + 2?"),), chosen="4", rejected="5")``
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    label: float = 1.0
    weight: float = 1.0
    margin: float = 0.0
    source: str = ""
    criterion: str = ""
    chosen_finished: bool = True
    rejected_finished: bool = True

    def __post_init__(self) -> None:
        # Reasons without the value: rows are counted by them (`models.data_files.Tally`).
        if not self.prompt or self.prompt[-1].role != "user":
            raise ValueError("prompt that does not end in a user turn")
        if not 0 <= self.label <= 1:
            raise ValueError("label outside 0 to 1")
        if not 0 <= self.weight <= 1e6:
            raise ValueError("weight outside 0 to 1,000,000")
        if not 0 <= self.margin <= 1e6:
            raise ValueError("margin outside 0 to 1,000,000")

    @property
    def judged_by(self) -> str:
        """The criterion; pairs that name none were judged on the whole."""
        return self.criterion or OVERALL

    @property
    def first_user_turn(self) -> str:
        """What the conversation opens with: splits are made by it."""
        return next(message.content for message in self.prompt if message.role == "user")
