"""What a chat request comes to: a plan, and candidates as they grow, by an engine and an ensemble
that stand here or elsewhere."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from actors.chat_engine import Piece, Sampling, TokenLogprob
from rlhf.records import FinishReason, Message
from serving.ensemble import Verdict
from serving.openai_answers import Judgement, Logprobs, Outcome, ToldPosition, ToldToken, Usage

LEAST_LOGPROB = -9999.0
"""What an impossible token is given: JSON has no infinity."""


class Engine(Protocol):
    """What writes candidates: `actors.chat_engine.ChatEngine`, here or elsewhere."""

    def write(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """See `ChatEngine.write`."""

    async def version(self) -> str:
        """See `ChatEngine.version`."""


class Scorer(Protocol):
    """What judges them: `serving.ensemble.Ensemble`."""

    async def judge(self, messages: Sequence[Message], text: str, finished: bool) -> Verdict:
        """See `Ensemble.judge`."""

    async def version(self) -> str:
        """See `Ensemble.version`."""


@dataclass(slots=True)
class Candidate:
    """One answer as it grows."""

    index: int
    text: str = ""
    tokens: int = 0
    version: str = ""
    ended: FinishReason | None = None
    chosen_T: list[TokenLogprob] = field(default_factory=list)
    alternatives_T: list[Sequence[TokenLogprob]] = field(default_factory=list)
    verdict: Verdict | None = None
    beginning: Verdict | None = None
    """What was said of it when it had begun."""
    rejected: bool = False
    """Given up then; `verdict` is of its beginning."""

    @property
    def outcome(self) -> Outcome:
        """Why it ended, or that it was given up."""
        return "rejected" if self.rejected else self.reason

    @property
    def reason(self) -> FinishReason:
        """Why a whole candidate ended."""
        assert self.ended is not None, "the engine says why it stops"
        return self.ended

    def add(self, piece: Piece) -> None:
        """Take in what was written."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.version = piece.version
        self.ended = piece.ended or self.ended
        self.chosen_T += piece.chosen_T
        self.alternatives_T += piece.alternatives_T


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request comes to: `judged` where candidates are scored, `held` where nothing is sent
    before the choice."""

    name: str
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    n: int
    judged: bool
    held: bool
    created: int

    @property
    def chooses(self) -> bool:
        """Whether there are more candidates than are sent."""
        return self.sampling.candidates > self.n

    def usage(self, drawn: Sequence[Candidate]) -> Usage:
        """Tokens read, and tokens written for all candidates."""
        written = sum(candidate.tokens for candidate in drawn)
        read = len(self.prompt_ids)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }


def told(candidate: Candidate) -> Judgement:
    """What the ensemble says of a candidate, nulls where it was not asked."""
    verdict = candidate.verdict
    return {
        "reward": verdict.reward if verdict else None,
        "rewards": list(verdict.rewards_K) if verdict else None,
        "criteria": dict(verdict.criteria) if verdict else None,
        "disagreement": verdict.disagreement if verdict else None,
        "domain_shift": verdict.domain_shift if verdict else None,
        "members_missing": verdict.members_missing if verdict else None,
        "receipt": None,
    }


def logprobs_of(
    plan: Plan, chosen_T: Sequence[TokenLogprob], alternatives_T: Sequence[Sequence[TokenLogprob]]
) -> Logprobs | None:
    """In OpenAI's form; None where they were not asked for."""
    if plan.sampling.logprobs is None:
        return None

    def one(token: TokenLogprob) -> ToldToken:
        return {
            "token": token.text,
            "logprob": max(token.logprob, LEAST_LOGPROB),
            "bytes": list(token.text.encode()),
        }

    content: list[ToldPosition] = [
        {**one(token), "top_logprobs": [one(other) for other in others]}
        for token, others in zip(chosen_T, alternatives_T, strict=True)
    ]
    return {"content": content, "refusal": None}
