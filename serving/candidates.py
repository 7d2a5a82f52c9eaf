"""What a chat request comes to: a plan, and candidates as they grow, by an engine and an ensemble
that stand here or elsewhere."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.chat_engine import Piece, Sampling, TokenLogprob
from actors.chat_scorer import Verdict
from rlhf.records import Message


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


_TOLD = ("reward", "criteria", "disagreement", "domain_shift", "members_missing")


@dataclass(slots=True)
class Candidate:
    """One answer as it grows."""

    index: int
    text: str = ""
    tokens: int = 0
    version: str = ""
    ended: str | None = None
    chosen_T: list[TokenLogprob] = field(default_factory=list)
    alternatives_T: list[Sequence[TokenLogprob]] = field(default_factory=list)
    verdict: Verdict | None = None

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

    def usage(self, drawn: Sequence[Candidate]) -> dict[str, int]:
        """Tokens read, and tokens written for all candidates."""
        written = sum(candidate.tokens for candidate in drawn)
        read = len(self.prompt_ids)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }


def told(candidate: Candidate) -> dict[str, Any]:
    """What the ensemble says of a candidate, nulls where it was not asked."""
    verdict = candidate.verdict
    said = {name: verdict and getattr(verdict, name) for name in _TOLD}
    return said | {"rewards": verdict and list(verdict.rewards_K)}


def logprobs_of(
    plan: Plan, chosen_T: Sequence[TokenLogprob], alternatives_T: Sequence[Sequence[TokenLogprob]]
) -> dict[str, Any] | None:
    """In OpenAI's form; None where they were not asked for."""
    if plan.sampling.logprobs is None:
        return None

    def one(token: TokenLogprob) -> dict[str, Any]:
        return {
            "token": token.text,
            "logprob": token.logprob,
            "bytes": list(token.text.encode()),
        }

    content = [
        {**one(token), "top_logprobs": [one(other) for other in others]}
        for token, others in zip(chosen_T, alternatives_T, strict=True)
    ]
    return {"content": content, "refusal": None}
