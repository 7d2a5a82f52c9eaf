"""The rollout actor: one vLLM engine that samples groups and takes new weights in flight."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.gauges import Gauges, in_ray_actor
from actors.vllm_engine import start_engine
from cluster.guard import Guard
from cluster.session import hold_shared_memory
from cluster.spawn import first_line
from cluster.weights.base import WeightManifest, fetch
from cluster.weights.probe import PROBE_TEXT, Probe, check_probe
from models.chat import ChatTokenizer
from models.precision import resolve_dtype
from models.sources import resolve_model
from rlhf.config import RolloutSection
from rlhf.errors import GenerationError, ModelError, StaleWeightsError, WeightUpdateError
from rlhf.records import Completion, Prompt, RolloutGroup

_LOOK_EVERY_S = 0.5
_UNFINISHED = ("abort", "error")
"""Why vLLM ends a completion that is none."""


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """Sample one completion per seed for a prompt. `temperature` 0 is greedy."""

    prompt: Prompt
    epoch: int
    seeds: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Admitted:
    """A group that the engine works on: vLLM's collectors by the names of their requests."""

    request: GroupRequest
    prompt_ids: tuple[int, ...]
    collectors: dict[str, Any]


class RolloutActor:
    """One `AsyncLLM`.

    Promises: per-token logprobs of the distribution that was sampled from; a seed of its own for
    every completion; the weight version of every token; new weights without losing requests; and
    no answer before it has the current weights (`StaleWeightsError`).

    Args:
        model: the start weights, by a name that this node resolves.
        settings: the engine.
        max_prompt_tokens: longest prompt admitted.
        max_tokens: longest completion.
        shared_memory: folder for weights in flight on this node.
        worker_extension: qualified name of the class mixed into vLLM's worker.
    """

    def __init__(
        self,
        model: str,
        settings: RolloutSection,
        max_prompt_tokens: int,
        max_tokens: int,
        shared_memory: str,
        run: str,
        name: str,
        gpus: float = 0,
        weight_transport: str = "shared_memory",
        worker_extension: str = "actors.vllm_worker.WeightLoader",
    ) -> None:
        # Weights fetched from the object store lie in a folder of this actor's own.
        self._shared_memory = Path(f"{shared_memory}-{name}")
        self._held = hold_shared_memory(self._shared_memory)
        self._guard = Guard(self._shared_memory, with_parent=in_ray_actor())
        self._gauges = Gauges(run, name)
        self._settings = settings
        self._dtype = resolve_dtype(settings.dtype)
        folder = resolve_model(model)
        self._tokenizer = ChatTokenizer(folder)
        self._max_prompt_tokens = max_prompt_tokens
        self._weight_version: int | None = None
        self._requests = 0
        self._tokens = 0
        self._waiting = 0
        self._since = (time.monotonic(), 0)
        self._holds = 0
        self._updating = asyncio.Lock()
        self._answering = asyncio.Lock()
        self._updated = asyncio.Event()
        # The probe has to fit as well, and the one token that vLLM wants to add to it.
        probe_tokens = len(self._tokenizer.reply_ids(PROBE_TEXT, finished=False)) + 1
        self._engine = start_engine(
            folder,
            settings,
            max(max_prompt_tokens + max_tokens, probe_tokens),
            gpus=gpus,
            transport=weight_transport,
            extension=worker_extension,
        )
        self._guard.watch()
        self._closing = False
        if in_ray_actor():
            threading.Thread(target=self._end_with_engine, daemon=True).start()

    def _end_with_engine(self) -> None:
        """End this actor when its engine has died: Ray then starts it again.

        Calls to a dead engine need not fail: those that wait for its reply wait for ever
        (vLLM 0.32 fails requests, but not pauses, updates and resumes).
        """
        while not self._closing:
            if self._engine.errored:
                os._exit(1)
            time.sleep(_LOOK_EVERY_S)

    async def generate(
        self, requests: Sequence[GroupRequest], version: int, *, together: bool = False
    ) -> list[RolloutGroup | GenerationError]:
        """Sample every group; a group that cannot be sampled, whether the engine refuses a request
        of it or fails at one, comes back as its error.

        Args:
            version: the oldest weight version that may serve.
            together: admit all groups while the engine is paused, with empty caches, so that the
                same requests are scheduled the same way every time.

        Raises:
            StaleWeightsError: this engine has not got that version yet.
        """
        current = await self.version()
        if current is None or current < version:
            raise StaleWeightsError(f"version {version} was asked for, this engine has {current}")
        try:
            if together:
                await self.pause(clear_cache=True)
            try:
                admitted = [await self._admit(request) for request in requests]
            finally:
                if together:
                    await self.resume()
            return list(await asyncio.gather(*map(self._collect, admitted)))
        except Exception:
            if in_ray_actor() and self._engine.errored:
                # Before anybody is told: who asks again must not meet this process.
                os._exit(1)
            raise

    async def answer(
        self, manifest: WeightManifest, probe: Probe, requests: Sequence[GroupRequest]
    ) -> list[RolloutGroup | GenerationError]:
        """Take a version and sample with it, before another trainer's version comes: for those who
        share an engine.

        Raises:
            WeightUpdateError: as `update_weights`.
        """
        async with self._answering:
            await self.update_weights(manifest, probe)
            return await self.generate(requests, manifest.version, together=True)

    async def _admit(self, request: GroupRequest) -> Admitted | GenerationError:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        try:
            prompt_ids = self._tokenizer.prompt_ids(request.prompt.messages)
        except ModelError as error:
            return GenerationError(f"prompt {request.prompt.id}: {error}")
        if len(prompt_ids) > self._max_prompt_tokens:
            return GenerationError(
                f"prompt {request.prompt.id} has {len(prompt_ids)} tokens, more than "
                f"{self._max_prompt_tokens}"
            )
        salt = f"version {self._weight_version}" if self._settings.keep_cache else None
        collectors: dict[str, Any] = {}
        try:
            for seed in request.seeds:
                parameters = SamplingParams(
                    temperature=request.temperature,
                    top_p=request.top_p,
                    max_tokens=request.max_tokens,
                    seed=seed,
                    logprobs=0,
                    stop_token_ids=list(self._tokenizer.end_ids),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                self._requests += 1
                name = f"r{self._requests}"
                engine_prompt: dict[str, Any] = {"prompt_token_ids": list(prompt_ids)}
                if salt is not None:
                    engine_prompt["cache_salt"] = salt
                collectors[name] = await self._engine.add_request(name, engine_prompt, parameters)
        except Exception as error:
            return await self._given_up(request, collectors, error)
        self._waiting += len(collectors)
        return Admitted(request, prompt_ids, collectors)

    async def _collect(
        self, admitted: Admitted | GenerationError
    ) -> RolloutGroup | GenerationError:
        if isinstance(admitted, GenerationError):
            return admitted
        request, collectors = admitted.request, admitted.collectors
        outputs = [asyncio.ensure_future(collector.get()) for collector in collectors.values()]
        try:
            completions = tuple(
                self._completion(output, seed)
                for output, seed in zip(await asyncio.gather(*outputs), request.seeds, strict=True)
            )
        except Exception as error:
            return await self._given_up(request, collectors, error)
        finally:
            self._waiting -= len(collectors)
            for output in outputs:
                output.cancel()
        self._report(sum(completion.length for completion in completions))
        return RolloutGroup(request.prompt, request.epoch, admitted.prompt_ids, completions)

    async def _given_up(
        self, request: GroupRequest, names: Iterable[str], error: Exception
    ) -> GenerationError:
        """What is recorded of a group of which one request failed; the others are stopped.

        Raises:
            Exception: `error`, where the engine died of it: then the prompt did nothing wrong.
        """
        if self._engine.errored:
            raise error
        await self._engine.abort(list(names))
        own = isinstance(error, GenerationError)
        reason = str(error) if own else f"{type(error).__name__}: {first_line(error)}"
        return GenerationError(f"prompt {request.prompt.id}: {reason}")

    def _completion(self, sampled: Any, seed: int) -> Completion:
        """The completion of a request.

        Raises:
            GenerationError: the engine gave none.
        """
        output = sampled.outputs[0] if sampled.outputs else None
        if output is None or not output.token_ids or output.finish_reason in _UNFINISHED:
            reason = None if output is None else output.finish_reason
            raise GenerationError(f"the engine ended a completion without an answer ({reason})")
        token_ids = tuple(output.token_ids)
        spans = tuple((int(span.version), span.end - span.start) for span in output.weight_versions)
        versions = [version for version, _ in spans]
        return Completion(
            token_ids=token_ids,
            text=self._tokenizer.decode(token_ids),
            rollout_logprobs_T=tuple(
                position[token].logprob
                for position, token in zip(output.logprobs, token_ids, strict=True)
            ),
            finish_reason="stop" if output.finish_reason == "stop" else "length",
            oldest_version=min(versions),
            newest_version=max(versions),
            seed=seed,
            version_spans=spans,
        )

    def _report(self, tokens: int) -> None:
        """Export what was generated; the rate over a second at least."""
        self._tokens += tokens
        self._gauges.set({"rollout/tokens": self._tokens, "rollout/queue_depth": self._waiting})
        now = time.monotonic()
        since, before = self._since
        if now - since >= 1:
            self._gauges.set({"rollout/tokens_per_s": (self._tokens - before) / (now - since)})
            self._since = (now, self._tokens)

    async def pause(self, *, clear_cache: bool = False) -> None:
        """Stop between two tokens; requests are kept. Pauses nest."""
        self._holds += 1
        if self._holds == 1 or clear_cache:
            await self._engine.pause_generation(mode="keep", clear_cache=clear_cache)

    async def resume(self) -> None:
        """Go on, once every pause has been lifted."""
        self._holds = max(0, self._holds - 1)
        if self._holds == 0:
            await self._engine.resume_generation()

    async def update_weights(self, manifest: WeightManifest, probe: Probe) -> float:
        """Take a version; requests in flight go on with it. Returns the probe's mean |difference|.

        Cached keys and values belong to the weights that made them: they are cleared, and requests
        in flight are recomputed (unless `rollout.keep_cache`, where the version salts the cache).

        Raises:
            WeightUpdateError: a check refused it. The engine then serves nothing until an update
                succeeds.
        """
        async with self._updating:
            return await self._update(manifest, probe)

    async def _update(self, manifest: WeightManifest, probe: Probe) -> float:
        self._weight_version = None
        self._updated.clear()
        await self.pause(clear_cache=not self._settings.keep_cache)
        try:
            if manifest.transport == "nccl":
                await asyncio.wait_for(self._updated.wait(), 600)
            else:
                await self._load(manifest)
            await self._engine.update_weight_version(str(manifest.version))
        finally:
            await self.resume()
        gap = check_probe(probe, await self._probe_logprobs(probe.token_ids), self._dtype)
        self._weight_version = manifest.version
        self._gauges.set({"weight_version": manifest.version, "weights/probe_gap": gap})
        return gap

    async def _load(self, manifest: WeightManifest) -> None:
        path = await asyncio.to_thread(fetch, manifest, self._shared_memory)
        entries = {
            name: {"dtype": e.dtype, "shape": list(e.shape), "checksum": e.checksum}
            for name, e in manifest.entries.items()
        }
        refusals = await self._engine.collective_rpc(
            "pavlov_load_weights", args=(str(path), manifest.version, entries)
        )
        for refusal in filter(None, refusals):
            check, _, detail = refusal.partition(": ")
            raise WeightUpdateError(check, detail)
        loaded = await self._engine.collective_rpc("pavlov_loaded_version")
        if set(loaded) != {manifest.version}:
            raise WeightUpdateError(
                "version", f"workers hold {sorted(set(loaded))} after version {manifest.version}"
            )

    async def _probe_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._requests += 1
        collector = await self._engine.add_request(
            f"probe{self._requests}",
            {"prompt_token_ids": list(token_ids)},
            SamplingParams(
                max_tokens=1, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
            ),
        )
        output = await collector.get()
        return [
            position[token].logprob
            for position, token in zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
        ]

    async def serve_start_weights(self) -> None:
        """Serve the weights the engine was started with as version 0, where nobody trains them."""
        await self._engine.update_weight_version("0")
        self._weight_version = 0

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """NCCL only: join the learner's process group."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info))

    async def start_weight_transfer(self) -> None:
        """NCCL only: make the model ready to receive; waits until generation is paused."""
        while self._holds == 0:
            await asyncio.sleep(0.01)
        await self._engine.start_weight_update()

    async def receive_weight_transfer(self, update_info: Any) -> None:
        """NCCL only: receive what the learner broadcasts."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._engine.update_weights(WeightTransferUpdateRequest(update_info))

    async def finish_weight_transfer(self) -> None:
        """NCCL only: the broadcast is complete."""
        await self._engine.finish_weight_update()
        self._updated.set()

    async def version(self) -> int | None:
        """The weight version this engine serves, None before the first; waits for an update."""
        async with self._updating:
            return self._weight_version

    async def shutdown(self) -> None:
        """End the engine and its processes."""
        self._closing = True
        self._engine.shutdown()
        self._guard.close()
