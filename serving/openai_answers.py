"""The answers of the chat interface: what its document promises and what it is typed by.

They are plain dictionaries: nothing is validated when they are sent.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config

# pydantic reads no other before Python 3.12.
from typing_extensions import TypedDict

from rlhf.records import FinishReason

_exactly = with_config(ConfigDict(extra="forbid", use_attribute_docstrings=True))
Outcome = FinishReason | Literal["rejected"]
"""Why a candidate ended; ``rejected``: given up early, being far behind."""
Count = Annotated[int, Field(ge=0)]


@_exactly
class Fault(TypedDict):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    """The field that was wrong, dotted where it lies deeper: ``messages.0.content``."""
    code: str | None


@_exactly
class ErrorAnswer(TypedDict):
    """Whatever is refused or fails."""

    error: Fault


@_exactly
class Health(TypedDict):
    """Engine and ensemble answer."""

    status: Literal["ok"]


@_exactly
class ServedModel(TypedDict):
    """The assistant."""

    id: str
    object: Literal["model"]
    created: Count
    """Unix time at which this replica started."""
    owned_by: Literal["pavlov"]
    weight_version: str
    """Hash of the weights that answer now."""
    reward_version: str | None
    """Version of the reward model; null where there is none."""


@_exactly
class ModelList(TypedDict):
    """The one model that is served."""

    object: Literal["list"]
    data: list[ServedModel]


@_exactly
class ToldToken(TypedDict):
    """A token and its log-probability, in nats; at least -9999."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


@_exactly
class ToldPosition(ToldToken):
    """A token that was written, and the likeliest in its place."""

    top_logprobs: list[ToldToken]


@_exactly
class Logprobs(TypedDict):
    """Of every token of an answer or a chunk."""

    content: list[ToldPosition]
    refusal: None


@_exactly
class Usage(TypedDict):
    """Tokens read once, and written for all candidates."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count


@_exactly
class Judgement(TypedDict):
    """What the ensemble says of a text; nulls where it was not asked."""

    reward: float | None
    """Mean over members, in deviations over the training replies."""
    rewards: list[float] | None
    """Each member's."""
    criteria: dict[str, float] | None
    """The mean by criterion."""
    disagreement: float | None
    """Standard deviation over the members of a family, mean over families."""
    domain_shift: bool | None
    """Whether the text is of a kind the ensemble does not know."""
    members_missing: Count | None
    """Members that did not answer; the others judged alone."""
    receipt: str | None
    """What /v1/feedback takes for this text; null where no feedback is taken."""


@_exactly
class JudgedCandidate(Judgement):
    """A candidate, sent or not, as it would have been sent."""

    text: str
    finish_reason: Outcome


@_exactly
class Own(TypedDict):
    """What only Pavlov says; what the ensemble says here is of the first choice."""

    weight_version: str
    """Hash of the weights that wrote it."""
    reward_version: str | None
    reward: float | None
    disagreement: float | None
    domain_shift: bool | None
    choices: list[Judgement]
    candidates: NotRequired[list[JudgedCandidate]]
    """All that were written, if they were asked for."""


@_exactly
class Reply(TypedDict):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


@_exactly
class Choice(TypedDict):
    """An answer that is sent."""

    index: Count
    message: Reply
    logprobs: Logprobs | None
    finish_reason: FinishReason


@_exactly
class ChatCompletion(TypedDict):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: Count
    model: str
    choices: list[Choice]
    usage: Usage
    pavlov: Own


@_exactly
class Delta(TypedDict):
    """What is added to a choice."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


@_exactly
class ChunkChoice(TypedDict):
    """An addition to one choice."""

    index: Count
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


@_exactly
class ChatChunk(TypedDict):
    """An event of a streamed answer. The last before ``[DONE]`` has `pavlov`; where usage was asked
    for it has that too, and no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: Count
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage]
    pavlov: NotRequired[Own]


@_exactly
class FeedbackAnswer(TypedDict):
    """Feedback that is kept."""

    object: Literal["feedback"]
    id: str
    project: str
