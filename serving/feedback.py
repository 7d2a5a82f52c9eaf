"""Thumbs, and the choice between two answers: `POST /v1/feedback`.

The chat server keeps no conversation. An answer comes with a receipt that says, signed, how it came
about; a client that sends it back with the conversation and its user's consent has both kept. So
any replica takes feedback on what any other has answered, until the server ends: its key ends with
it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from fastapi import BackgroundTasks, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from labelling import feedback as kept
from labelling.database import Database
from labelling.queue import SHOWN
from labelling.records import Answer
from labelling.review import Reviewer
from labelling.store import Store
from rlhf.config.label import AttentionSection
from rlhf.config.serve import ServeSection
from rlhf.errors import DataError
from serving.candidates import Candidate, Plan
from serving.openai_answers import FeedbackAnswer
from serving.openai_form import ChatMessage, ChatRequest, RefusedError
from serving.openapi_document import errors

GOOD_FOR_S = 86_400
COMMENT_LIMIT = 2000
_STOP_LIMIT = 100


class ShownAnswer(BaseModel):
    """An answer as it was shown, and its receipt."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str
    receipt: str


class FeedbackRequest(BaseModel):
    """The body of /v1/feedback: the conversation as it was sent, one answer or two in the order
    shown, and what is said of them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    answers: Annotated[list[ShownAnswer], Field(min_length=1, max_length=2)]
    verdict: Literal["up", "down", "first", "second", "tie", "bad"]
    comment: Annotated[str, Field(max_length=COMMENT_LIMIT)] = ""
    consent: bool = False
    user: Annotated[str, Field(max_length=256)] | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """How an answer came about; conversation and text by their SHA-256."""

    completion: str
    candidate: int
    weight_version: str
    sampling: dict[str, Any]
    verdict: dict[str, Any]
    finish_reason: str | None
    at: float
    conversation: str
    text: str


class Feedback:
    """Receipts, and the labelling project that feedback goes to.

    Args:
        key: all replicas of a server have the same, and nobody else.

    Raises:
        DataError, ResourceError: `serve.feedback` or `serve.feedback_project` cannot be used.
    """

    def __init__(
        self, settings: ServeSection, key: bytes, clock: Callable[[], float] = time.time
    ) -> None:
        assert settings.feedback_url is not None
        self._settings, self._key, self._clock = settings, key, clock
        self._store = Store(Database(settings.feedback_url, "serve.feedback"))
        self._project = self._store.make_project(settings.feedback_project, [], at_least=True)
        self._reviewer = Reviewer(self._store, AttentionSection())

    def receipt(self, body: ChatRequest, plan: Plan, candidate: Candidate, text: str) -> str:
        """What a client sends back with its feedback on `text`, a candidate as it is shown."""
        sampling, verdict = plan.sampling, candidate.verdict
        receipt = Receipt(
            completion=plan.name,
            candidate=candidate.index,
            weight_version=candidate.version,
            sampling={
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_tokens,
                "seed": sampling.seed,
                "best_of": sampling.candidates,
                "n": plan.n,
                "stop": [text[:_STOP_LIMIT] for text in sampling.stop],
            },
            verdict={
                "reward_version": verdict and verdict.version,
                "reward": verdict and verdict.reward,
                "disagreement": verdict and verdict.disagreement,
                "domain_shift": verdict and verdict.domain_shift,
            },
            finish_reason=candidate.ended,
            at=self._clock(),
            conversation=_digest_of(body.messages),
            text=_digest(text),
        )
        content = base64.urlsafe_b64encode(json.dumps(asdict(receipt)).encode()).decode()
        return f"{content}.{self._signature(content)}"

    def take(self, body: FeedbackRequest, whose: str) -> FeedbackAnswer:
        """Keep feedback.

        Args:
            whose: the hash of an API key where there are keys, or else an address.

        Raises:
            RefusedError: there is no consent, or the receipts are not of these answers to this
                conversation.
        """
        if not body.consent:
            raise RefusedError(
                400, "nothing is kept without consent: true by the user", param="consent"
            )
        allowed = kept.THUMBS if len(body.answers) == 1 else SHOWN
        if body.verdict not in allowed:
            raise RefusedError(
                400,
                "the verdict is up or down of one answer, and first, second, tie or bad of two",
                param="verdict",
            )
        receipts = self._receipts(body)
        messages = ChatRequest(messages=body.messages).conversation(self._settings.system)
        for param, text in _texts(body):
            # PostgreSQL keeps no such text.
            if "\x00" in text:
                raise RefusedError(400, f"{param}: text with a NUL character", param=param)
        try:
            given = kept.Feedback(
                self._name(body.user, whose),
                messages,
                tuple(map(self._showing, body.answers, receipts)),
                body.verdict,
                body.comment,
                self._clock(),
            )
        except ValueError as error:
            raise RefusedError(
                400, f"these answers cannot be compared: {error}", param="answers"
            ) from None
        try:
            put = kept.put_feedback(self._store, self._project, given)
        except DataError as error:
            raise RefusedError(403, str(error)) from None
        if put.before:
            raise RefusedError(
                409, "you have compared these two answers before; that verdict stays"
            )
        return {"object": "feedback", "id": put.id, "project": self._project.name}

    def review(self) -> None:
        """Quality control of those who compare answers, if it is time; never fails."""
        self._reviewer.run(self._project, None)

    def close(self) -> None:
        """Close the database."""
        self._store.database.close()

    def _receipts(self, body: FeedbackRequest) -> list[Receipt]:
        """Those of the answers, each of them proven."""
        conversation = _digest_of(body.messages)
        receipts = []
        for place, answer in enumerate(body.answers):
            param = f"answers.{place}.receipt"
            receipt = self._read(answer.receipt, param)
            if receipt.at < self._clock() - GOOD_FOR_S:
                raise RefusedError(400, "the answer is older than a day", param=param)
            if receipt.text != _digest(answer.text):
                raise RefusedError(
                    400, "the receipt is of another text", param=f"answers.{place}.text"
                )
            receipts.append(receipt)
        if len({each.conversation for each in receipts}) > 1:
            raise RefusedError(400, "the answers are to different conversations", param="answers")
        if receipts[0].conversation != conversation:
            raise RefusedError(400, "the receipt is of another conversation", param="messages")
        if len({(each.completion, each.candidate) for each in receipts}) < len(receipts):
            raise RefusedError(400, "the two answers are one and the same", param="answers")
        return receipts

    def _read(self, signed: str, param: str) -> Receipt:
        content, _, signature = signed.partition(".")
        expected = self._signature(content)
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise RefusedError(
                400,
                "the receipt is not by this server since its last start: feedback on what was "
                "answered before is not taken",
                param=param,
            )
        return Receipt(**json.loads(base64.urlsafe_b64decode(content)))

    def _signature(self, content: str) -> str:
        return base64.urlsafe_b64encode(self._hash(f"receipt {content}")).decode()

    def _hash(self, text: str) -> bytes:
        return hmac.digest(self._key, text.encode(), "sha256")

    def _showing(self, shown: ShownAnswer, receipt: Receipt) -> kept.Showing:
        answer = Answer(
            shown.text,
            self._settings.name,
            receipt.weight_version,
            finished=receipt.finish_reason == "stop",
        )
        return kept.Showing(
            answer, receipt.completion, receipt.sampling, receipt.verdict, receipt.at
        )

    def _name(self, user: str | None, whose: str) -> str:
        """What they are called as an assessor; it shows neither key, user nor address."""
        if self._settings.keys:
            return f"key {whose[:16]}"
        if user:
            return f"user {hashlib.sha256(user.encode()).hexdigest()[:16]}"
        return f"visitor {self._hash(f'visitor {whose}').hex()[:16]}"


def install_feedback(app: FastAPI, feedback: Feedback) -> None:
    """Take feedback at /v1/feedback."""

    # No coroutine: the database is waited for in a thread.
    @app.post("/v1/feedback", responses=errors(400, 403, 409, 413, 503))
    def give(body: FeedbackRequest, request: Request, later: BackgroundTasks) -> FeedbackAnswer:
        answer = feedback.take(body, request.state.whose)
        if len(body.answers) == 2:
            later.add_task(feedback.review)
        return answer


def _digest_of(messages: list[ChatMessage]) -> str:
    turns = [each.message() for each in messages]
    return _digest([[each.role, each.content] for each in turns])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _texts(body: FeedbackRequest) -> list[tuple[str, str]]:
    answers = [(f"answers.{place}.text", each.text) for place, each in enumerate(body.answers)]
    messages = [("messages", each.message().content) for each in body.messages]
    return [("comment", body.comment), *answers, *messages]
