"""The assistant's engine: several candidates for one conversation, as they are written."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.gauges import in_ray_actor
from actors.vllm_engine import start_engine
from cluster.guard import Guard
from models.chat import ChatTokenizer
from models.sources import resolve_model, weights_fingerprint
from rlhf.config import RolloutSection
from rlhf.records import FinishReason

_LOOK_EVERY_S = 0.5
_GREEDY = 1e-5
"""Below this temperature the likeliest token is taken."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How candidates are drawn. `logprobs` is how many alternatives of each token are told, None
    none at all; candidate i is drawn with `seed` + i where a seed is given."""

    candidates: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    def one(self, candidate: int) -> Sampling:
        """How this candidate alone is drawn."""
        seed = None if self.seed is None else (self.seed + candidate) % 2**63
        return replace(self, candidates=1, seed=seed)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's text and its log-probability at the sampling temperature."""

    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Piece:
    """What was added to a candidate, and by which weights. The last piece says why it ended:
    ``stop`` or ``length``."""

    candidate: int
    text: str
    tokens: int
    version: str
    ended: FinishReason | None = None
    chosen_T: tuple[TokenLogprob, ...] = ()
    alternatives_T: tuple[tuple[TokenLogprob, ...], ...] = ()


class ChatEngine:
    """One vLLM engine.

    Args:
        model: the assistant, by a name that this node resolves.
        settings: the engine.
        max_length: tokens of conversation and answer together.
    """

    def __init__(
        self, model: str, settings: RolloutSection, max_length: int, gpus: float = 0
    ) -> None:
        self._guard = Guard(with_parent=in_ray_actor())
        folder = resolve_model(model)
        self._end_ids = ChatTokenizer(folder).end_ids
        self._version = weights_fingerprint(folder)
        self._engine = start_engine(folder, settings, max_length, gpus=gpus)
        self._guard.watch()
        self._requests = 0
        self._closing = False
        if in_ray_actor():
            threading.Thread(target=self._end_with_engine, daemon=True).start()

    def _end_with_engine(self) -> None:
        """End this replica when its engine has died: Ray Serve then starts another."""
        while not self._closing:
            if self._engine.errored:
                os._exit(1)
            time.sleep(_LOOK_EVERY_S)

    def version(self) -> str:
        """Which weights answer: a hash of them."""
        return self._version

    def check_health(self) -> None:
        """Asked by Ray Serve.

        Raises:
            RuntimeError: the engine has died.
        """
        if self._engine.errored:
            raise RuntimeError("the engine has died")

    async def write(
        self, prompt_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of all candidates in the order in which they are written. The conversation is read
        once for all. Who stops listening stops the writing."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._requests += 1
        # Without chance all candidates are one, and vLLM does not write it several times.
        greedy = sampling.temperature < _GREEDY
        copies = sampling.candidates if greedy else 1
        parameters = SamplingParams(
            n=sampling.candidates // copies,
            temperature=0.0 if greedy else sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop=list(sampling.stop),
            stop_token_ids=list(self._end_ids),
            logprobs=sampling.logprobs,
            output_kind=RequestOutputKind.DELTA,
        )
        name = f"chat-{os.getpid()}-{self._requests}"
        stream = self._engine.generate(
            {"prompt_token_ids": list(prompt_ids)}, parameters, request_id=name
        )
        ended = False
        try:
            async for output in stream:
                for part in output.outputs:
                    piece = _piece(part, sampling.logprobs, self._version)
                    for copy in range(copies):
                        yield replace(piece, candidate=piece.candidate + copy)
            ended = True
        finally:
            if not ended:
                await asyncio.shield(self._engine.abort(name))

    def shutdown(self) -> None:
        """End the engine and its processes."""
        self._closing = True
        self._engine.shutdown()
        self._guard.close()


def _piece(output: Any, logprobs: int | None, version: str) -> Piece:
    """A piece from vLLM's output of one candidate."""
    chosen: list[TokenLogprob] = []
    alternatives: list[tuple[TokenLogprob, ...]] = []
    if logprobs is not None and output.logprobs:
        for token, position in zip(output.token_ids, output.logprobs, strict=True):
            told = {
                at: TokenLogprob(each.decoded_token or "", each.logprob)
                for at, each in position.items()
            }
            chosen.append(told[token])
            ranked = sorted(told.values(), key=lambda each: -each.logprob)
            alternatives.append(tuple(ranked[:logprobs]))
    return Piece(
        output.index,
        output.text,
        len(output.token_ids),
        version,
        output.finish_reason,
        tuple(chosen),
        tuple(alternatives),
    )
