"""The assistant over HTTP: OpenAI's chat interface, with best-of-N and the ensemble's doubt.

| path                 | does                                      |
|----------------------|-------------------------------------------|
| /v1/chat/completions | an answer, whole or as server-sent events |
| /v1/feedback         | what a user says of answers               |
| /v1/models, …/{id}   | the one model that is served              |
| /health              | 200 when engine and ensemble answer       |
| /metrics             | this replica's counters for Prometheus    |
| /                    | the page (`serving/chat_page.py`)         |

::

    request ─► admitted? ─► one conversation, N candidates ─► scored as each ends ─► the best n
                429           read once, written together      (overlapped)          answer

Who is let in, and for how long: `serving/places.py`. What is chosen among is held until it is
chosen; a single candidate is sent as it is written.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from functools import partial
from uuid import uuid4

from anyio import CancelScope
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from prometheus_client import generate_latest
from starlette.types import Receive, Scope, Send

from actors.chat_engine import Sampling
from models.chat import ChatTokenizer
from rlhf.config.serve import LOOPBACK, ServeConfig
from rlhf.errors import ModelError
from rlhf.records import FinishReason
from serving.best_of import BestOf
from serving.candidates import Candidate, Engine, Plan, Scorer, logprobs_of, told
from serving.chat_page import add_chat_page, is_open
from serving.feedback import Feedback, install_feedback
from serving.openai_answers import (
    ChatChunk,
    ChatCompletion,
    Choice,
    ChunkChoice,
    Delta,
    Health,
    Judgement,
    Logprobs,
    ModelList,
    Own,
    ServedModel,
)
from serving.openai_form import ChatRequest, RefusedError, as_refused, install_errors
from serving.openapi_document import STREAM, document, errors
from serving.pages import path_of
from serving.places import Metrics, Place, Places
from serving.strict_json import StrictRoute
from serving.this_machine import is_asked_from_here

Chunks = AsyncGenerator[ChatChunk, None]
_ALIVE_S = 10.0
"""How long engine and ensemble have to say that they are there."""
_READ_AT_ONCE = 2
"""Conversations that are tokenised at once; the others in their places wait."""


def chat_app(
    config: ServeConfig,
    tokenizer: ChatTokenizer,
    engine: Engine,
    scorer: Scorer | None,
    feedback: Feedback | None = None,
) -> FastAPI:
    """The application; `scorer` is None where there is no reward model, `feedback` where none is
    taken."""
    return _Chat(config, tokenizer, engine, scorer, feedback).app


class _Chat:
    def __init__(
        self,
        config: ServeConfig,
        tokenizer: ChatTokenizer,
        engine: Engine,
        scorer: Scorer | None,
        feedback: Feedback | None,
    ) -> None:
        self.settings, self.tokenizer = config.serve, tokenizer
        self.engine, self.scorer, self.feedback = engine, scorer, feedback
        self.started = int(time.time())
        self.limit = RateLimitItemPerMinute(self.settings.requests_per_minute)
        self.limiter = MovingWindowRateLimiter(MemoryStorage())
        self.metrics = Metrics()
        self.places = Places(self.settings, self.metrics)
        self.readers = ThreadPoolExecutor(_READ_AT_ONCE, "read")
        self.best = BestOf(self.settings, engine, scorer, self.metrics.tokens.inc)
        self.app = self._app()

    def _app(self) -> FastAPI:
        app = FastAPI(title="Pavlov", docs_url=None, redoc_url=None, redirect_slashes=False)
        app.router.route_class = StrictRoute
        scored = self.scorer is not None
        app.openapi = partial(document, app, self.settings, scored)  # type: ignore[method-assign]
        install_errors(app)
        app.middleware("http")(self._guard)
        add_chat_page(app, self.settings, scored)

        @app.get("/health", response_model=Health, responses=errors(503, 504))
        async def health() -> Response:
            await self._versions()
            return JSONResponse({"status": "ok"})

        @app.get("/metrics", response_class=PlainTextResponse)
        def metrics() -> Response:
            return PlainTextResponse(generate_latest(self.metrics.registry))

        @app.get("/v1/models", responses=errors(503, 504))
        async def models() -> ModelList:
            return {"object": "list", "data": [await self._served()]}

        # A name may have a slash in it.
        @app.get("/v1/models/{model:path}", responses=errors(404, 503, 504))
        async def one_model(model: str) -> ServedModel:
            self._require_model(model)
            return await self._served()

        @app.post(
            "/v1/chat/completions",
            response_model=ChatCompletion,
            responses={200: STREAM, **errors(400, 404, 413, 503, 504)},
        )
        async def completions(body: ChatRequest) -> Response:
            return await self.complete(body)

        if self.feedback is not None:
            install_feedback(app, self.feedback)
        return app

    async def _guard(
        self, request: Request, go_on: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        path = path_of(request.scope)
        if path in ("/health", "/metrics"):
            return await go_on(request)
        try:
            self._require_own_name(request)
            if not is_open(path):
                self._admit(request)
        except RefusedError as error:
            wait = {"Retry-After": "5"} if error.status == 429 else None
            return error.response(wait)
        return await go_on(request)

    def _require_own_name(self, request: Request) -> None:
        """Without keys only programs of this machine are let in, and not pages of other sites that
        have their name resolved to it."""
        host = request.headers.get("host", "")
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if host and not self.settings.keys and name not in (*LOOPBACK, self.settings.host):
            raise RefusedError(403, f"without keys this server is not called {name[:80]!r}")
        asker = request.client.host if request.client else None
        if not self.settings.keys and not is_asked_from_here(asker, request.headers):
            raise RefusedError(403, "without serve.keys only programs of this machine are let in")

    def _admit(self, request: Request) -> None:
        """Who may ask, and how often."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        whose = f"address {request.client.host if request.client else ''}"
        if self.settings.keys:
            whose = hashlib.sha256(key.encode(errors="replace")).hexdigest()
            if whose not in self.settings.keys:
                raise RefusedError(401, "no such API key", code="invalid_api_key")
        if not self.limiter.hit(self.limit, whose):
            raise RefusedError(429, "too many requests", code="rate_limit_exceeded")
        request.state.whose = whose

    async def _versions(self) -> tuple[str, str | None]:
        async with asyncio.timeout(_ALIVE_S):
            weights = await self.engine.version()
            return weights, None if self.scorer is None else await self.scorer.version()

    async def _served(self) -> ServedModel:
        weights, reward = await self._versions()
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.started,
            "owned_by": "pavlov",
            "weight_version": weights,
            "reward_version": reward,
        }

    # One request

    async def complete(self, body: ChatRequest) -> Response:
        """Answer a request.

        Raises:
            RefusedError: it asks for what there is not, or there is no room.
        """
        place = self.places.take()
        if place is None:
            error = RefusedError(429, "all places are taken", code="overloaded")
            return error.response({"Retry-After": "2"})
        with ExitStack() as held:
            held.callback(place.free)
            async with asyncio.timeout_at(place.until):
                # A long conversation takes up to a second to tokenise, in which others are
                # answered.
                loop = asyncio.get_running_loop()
                plan = await loop.run_in_executor(self.readers, self._plan, body)
            if body.stream:
                # From here on it is the stream's: nothing is awaited before that is called.
                held.pop_all()
                return _EventStream(self._events(body, plan, place), _UNBUFFERED, place)
            async with place.turn():
                drawn = await self.best.draw(plan)
                said = self._said(body, plan, drawn)
            return JSONResponse(said)

    def _require_model(self, name: str) -> None:
        if name != self.settings.name:
            raise RefusedError(
                404,
                f"there is no model {name[:80]!r}; this one is {self.settings.name}",
                param="model",
                code="model_not_found",
            )

    def _plan(self, body: ChatRequest) -> Plan:
        settings = self.settings
        if body.model:
            self._require_model(body.model)
        n = body.n or 1
        best_of = body.best_of or max(n, settings.best_of)
        if best_of < n:
            raise RefusedError(400, f"best_of = {best_of} is less than n = {n}", param="best_of")
        if best_of > settings.best_of_limit:
            raise RefusedError(
                400,
                f"{best_of} candidates are more than {settings.best_of_limit}",
                param="best_of" if body.best_of else "n",
            )
        if self.scorer is None and (best_of > n or body.score):
            raise RefusedError(
                400,
                "there is no reward model here to choose or to score by",
                param="best_of" if best_of > n else "score",
            )
        lengths = {
            "max_completion_tokens": body.max_completion_tokens,
            "max_tokens": body.max_tokens,
        }
        for field, length in lengths.items():
            if (length or 0) > settings.max_tokens:
                raise RefusedError(
                    400, f"{length} tokens are more than {settings.max_tokens}", param=field
                )
        longest = body.max_completion_tokens or body.max_tokens or settings.max_tokens
        if body.top_logprobs is not None and not body.logprobs:
            raise RefusedError(400, "top_logprobs without logprobs", param="top_logprobs")
        messages = body.conversation(settings.system)
        try:
            prompt_ids = self.tokenizer.prompt_ids(messages)
        except ModelError as error:
            raise RefusedError(400, str(error), param="messages") from None
        if len(prompt_ids) > settings.max_prompt_tokens:
            raise RefusedError(
                400,
                f"the conversation has {len(prompt_ids)} tokens; at most "
                f"{settings.max_prompt_tokens} are read",
                param="messages",
                code="context_length_exceeded",
            )
        seed = None if body.seed is None else body.seed % 2**63
        sampling = Sampling(
            candidates=best_of,
            max_tokens=longest,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=body.top_p or 1.0,
            stop=body.stops,
            seed=seed,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        judged = self.scorer is not None and (
            best_of > n or bool(body.score) or settings.domain_shift != "answer"
        )
        held = best_of > n or (judged and settings.domain_shift == "decline")
        name = f"chatcmpl-{uuid4().hex}"
        return Plan(name, messages, prompt_ids, sampling, n, judged, held, int(time.time()))

    def _shown(self, candidate: Candidate) -> str:
        """Its text, or what stands for it where the ensemble does not know its kind."""
        if self._declined(candidate):
            return self.settings.decline_text
        return candidate.text + self._notice(candidate)

    def _declined(self, candidate: Candidate) -> bool:
        shifted = candidate.verdict is not None and candidate.verdict.domain_shift
        return shifted and self.settings.domain_shift == "decline"

    def _logprobs(self, plan: Plan, candidate: Candidate) -> Logprobs | None:
        if self._declined(candidate):
            return None
        return logprobs_of(plan, candidate.chosen_T, candidate.alternatives_T)

    def _notice(self, candidate: Candidate) -> str:
        shifted = candidate.verdict is not None and candidate.verdict.domain_shift
        if self.settings.domain_shift != "notice" or not shifted:
            return ""
        return f"\n\n{self.settings.notice_text}"

    # Its form

    def _said(self, body: ChatRequest, plan: Plan, drawn: Sequence[Candidate]) -> ChatCompletion:
        chosen = self.best.chosen(plan, drawn)
        choices: list[Choice] = [
            {
                "index": place,
                "message": {
                    "role": "assistant",
                    "content": self._shown(candidate),
                    "refusal": None,
                },
                "logprobs": self._logprobs(plan, candidate),
                "finish_reason": candidate.reason,
            }
            for place, candidate in enumerate(chosen)
        ]
        return {
            "id": plan.name,
            "object": "chat.completion",
            "created": plan.created,
            "model": self.settings.name,
            "choices": choices,
            "usage": plan.usage(drawn),
            "pavlov": self._own(body, plan, chosen, drawn),
        }

    def _own(
        self,
        body: ChatRequest,
        plan: Plan,
        chosen: Sequence[Candidate],
        drawn: Sequence[Candidate],
    ) -> Own:
        """What only Pavlov says of an answer."""
        best = chosen[0].verdict
        own: Own = {
            "weight_version": chosen[0].version,
            "reward_version": best.version if best else None,
            "reward": best.reward if best else None,
            "disagreement": best.disagreement if best else None,
            "domain_shift": best.domain_shift if best else None,
            "choices": [self._told(body, plan, each, self._shown(each)) for each in chosen],
        }
        if body.candidates:
            # As each would have been sent: what is declined is told nowhere.
            texts = [self._shown(each) for each in drawn]
            own["candidates"] = [
                {"text": text, "finish_reason": each.outcome, **self._told(body, plan, each, text)}
                for each, text in zip(drawn, texts, strict=True)
            ]
        return own

    def _told(self, body: ChatRequest, plan: Plan, candidate: Candidate, text: str) -> Judgement:
        said = told(candidate)
        if self.feedback is not None:
            said["receipt"] = self.feedback.receipt(body, plan, candidate, text)
        return said

    async def _events(
        self, body: ChatRequest, plan: Plan, place: Place
    ) -> AsyncGenerator[str, None]:
        """Server-sent events. An error once they have begun is an event of its own."""
        try:
            async with place.turn():
                events = self._held(body, plan) if plan.held else self._flowing(body, plan)
                async with aclosing(events):
                    async for chunk in events:
                        yield f"data: {json.dumps(chunk, ensure_ascii=False, allow_nan=False)}\n\n"
            yield "data: [DONE]\n\n"
        except Exception as error:
            refused = as_refused(error)
            yield f"data: {bytes(refused.response().body).decode()}\n\n"

    async def _flowing(self, body: ChatRequest, plan: Plan) -> Chunks:
        """Pieces as they are written."""
        drawn = [Candidate(at) for at in range(plan.sampling.candidates)]
        for candidate in drawn:
            yield self._chunk(plan, candidate.index, {"role": "assistant", "content": ""})
        async with aclosing(self.best.pieces(plan, plan.sampling)) as pieces:
            async for piece in pieces:
                candidate = drawn[piece.candidate]
                candidate.add(piece)
                said = logprobs_of(plan, piece.chosen_T, piece.alternatives_T)
                if piece.text or said:
                    delta: Delta = {"content": piece.text}
                    yield self._chunk(plan, candidate.index, delta, logprobs=said)
                if piece.ended:
                    if plan.judged:
                        await self.best.judge(plan, candidate)
                    if notice := self._notice(candidate):
                        yield self._chunk(plan, candidate.index, {"content": notice})
                    over = all(each.ended for each in drawn)
                    for chunk in self._end(body, plan, candidate.index, drawn, drawn, over):
                        yield chunk

    async def _held(self, body: ChatRequest, plan: Plan) -> Chunks:
        """The chosen ones, once they are chosen."""
        drawn = await self.best.draw(plan)
        chosen = self.best.chosen(plan, drawn)
        for index, candidate in enumerate(chosen):
            yield self._chunk(plan, index, {"role": "assistant", "content": ""})
            said = self._logprobs(plan, candidate)
            delta: Delta = {"content": self._shown(candidate)}
            yield self._chunk(plan, index, delta, logprobs=said)
            over = candidate is chosen[-1]
            for chunk in self._end(body, plan, index, chosen, drawn, over):
                yield chunk

    def _end(
        self,
        body: ChatRequest,
        plan: Plan,
        index: int,
        chosen: Sequence[Candidate],
        drawn: Sequence[Candidate],
        over: bool,
    ) -> Iterator[ChatChunk]:
        """How a choice ends, and where it is the last one (`over`) the answer: without choices,
        which clients that did not ask for it do not expect, only to tell the usage."""
        ended = last = self._chunk(plan, index, {}, ended=chosen[index].reason)
        if over and body.stream_options is not None and body.stream_options.include_usage:
            last = self._chunk(plan, None, {})
            last["usage"] = plan.usage(drawn)
        if over:
            last["pavlov"] = self._own(body, plan, chosen, drawn)
        yield ended
        if last is not ended:
            yield last

    def _chunk(
        self,
        plan: Plan,
        choice: int | None,
        delta: Delta,
        *,
        ended: FinishReason | None = None,
        logprobs: Logprobs | None = None,
    ) -> ChatChunk:
        choices: list[ChunkChoice] = []
        if choice is not None:
            choices.append(
                {
                    "index": choice,
                    "delta": delta,
                    "logprobs": logprobs,
                    "finish_reason": ended,
                }
            )
        return {
            "id": plan.name,
            "object": "chat.completion.chunk",
            "created": plan.created,
            "model": self.settings.name,
            "choices": choices,
        }


class _EventStream(StreamingResponse):
    """Server-sent events in a place of their own. When the client has left, also before they began,
    their generator is closed and the place given back at once: nobody else would before the garbage
    collector."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[str, None], headers: dict[str, str], place: Place
    ) -> None:
        super().__init__(events, headers=headers)
        self._events, self._place = events, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                with CancelScope(shield=True):
                    await self._events.aclose()
            finally:
                self._place.free()


_UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
