"""The rollout actor but for its engine."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import actors.chat_engine
import actors.rollout
from actors.chat_engine import ChatEngine, Piece, Sampling
from actors.rollout import GroupRequest, RolloutActor
from cluster.weights.probe import PROBE_TEXT
from models.chat import ChatTokenizer
from rlhf.config import RolloutSection
from rlhf.errors import GenerationError
from rlhf.records import Message, Prompt, RolloutGroup

TOKEN = SimpleNamespace(logprob=-0.5)


def sampled(token_ids: Sequence[int] = (5, 6), finish_reason: str = "stop") -> SimpleNamespace:
    """What vLLM tells of a request that has ended."""
    output = SimpleNamespace(
        token_ids=list(token_ids),
        logprobs=[{token: TOKEN} for token in token_ids],
        finish_reason=finish_reason,
        weight_versions=[SimpleNamespace(version="0", start=0, end=len(token_ids))]
        if token_ids
        else [],
    )
    return SimpleNamespace(outputs=[output])


@dataclass
class Engine:
    """An engine in memory: `refuses` when a seed is asked for, else answers with `ends`. A request
    that is `None` to it never ends but by an abort."""

    ends: Callable[[int], Any] = lambda seed: sampled()
    refuses: Callable[[int], Exception | None] = lambda seed: None
    dies: bool = False
    errored: bool = False
    at_work: set[str] = field(default_factory=set)
    asked: list[Any] = field(default_factory=list)

    async def add_request(self, name: str, prompt: Any, parameters: Any) -> Any:
        self.asked.append(parameters)
        if error := self.refuses(parameters.seed):
            self.errored = self.dies
            raise error
        self.at_work.add(name)
        return SimpleNamespace(get=lambda: self._get(name, parameters.seed))

    async def _get(self, name: str, seed: int) -> Any:
        end = self.ends(seed)
        while end is None:
            await asyncio.sleep(3600)
        self.at_work.discard(name)
        if isinstance(end, Exception):
            self.errored = self.dies
            raise end
        return end

    async def abort(self, names: list[str]) -> None:
        self.at_work -= set(names)

    async def update_weight_version(self, version: str) -> None:
        pass

    def shutdown(self) -> None:
        pass


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names, without the seconds that importing it takes."""
    module, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    kinds = SimpleNamespace(FINAL_ONLY=2, DELTA=1)
    parameters.RequestOutputKind = kinds  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)


@pytest.fixture
def actor_with(
    vllm: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Engine], RolloutActor]]:
    started: list[RolloutActor] = []

    def start(engine: Engine) -> RolloutActor:
        monkeypatch.setattr(actors.rollout, "start_engine", lambda *_, **__: engine)
        memory = str(tmp_path / "memory")
        started.append(RolloutActor(str(tiny_model), RolloutSection(), 64, 8, memory, "r", "e"))
        return started[-1]

    yield start
    for actor in started:
        asyncio.run(actor.shutdown())


def ask(actor: RolloutActor, *prompts: str) -> list[RolloutGroup | GenerationError]:
    """Groups of three siblings; the second prompt's are seeded from 10, and so on."""

    async def generate() -> list[RolloutGroup | GenerationError]:
        await actor.serve_start_weights()
        requests = [
            GroupRequest(
                Prompt(name, (Message("user", "Why?"),)),
                0,
                tuple(range(10 * place, 10 * place + 3)),
                8,
                1.0,
            )
            for place, name in enumerate(prompts)
        ]
        return await asyncio.wait_for(actor.generate(requests, 0), 10)

    return asyncio.run(generate())


REFUSED = ValueError("Token id 999 is out of vocabulary")


def test_a_request_that_the_engine_refuses_is_a_failure_of_its_group_alone(actor_with: Any) -> None:
    engine = Engine(refuses=lambda seed: REFUSED if seed == 2 else None)
    bad, good = ask(actor_with(engine), "bad", "good")
    assert isinstance(bad, GenerationError)
    assert str(bad) == "prompt bad: ValueError: Token id 999 is out of vocabulary"
    assert isinstance(good, RolloutGroup) and len(good.completions) == 3
    assert engine.at_work == set()


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (RuntimeError("it failed"), "RuntimeError: it failed"),
        (sampled(()), "ended a completion without an answer"),
        (SimpleNamespace(outputs=[]), "ended a completion without an answer"),
        (sampled(finish_reason="error"), r"without an answer \(error\)"),
        (sampled((5,), "abort"), r"without an answer \(abort\)"),
    ],
)
def test_a_request_that_fails_or_ends_without_an_answer_is_a_failure_of_its_group_alone(
    actor_with: Any, end: Any, said: str
) -> None:
    engine = Engine(ends=lambda seed: end if seed == 1 else sampled())
    actor = actor_with(engine)
    bad, good = ask(actor, "bad", "good")
    assert isinstance(bad, GenerationError) and isinstance(good, RolloutGroup)
    with pytest.raises(GenerationError, match=f"prompt bad: .*{said}"):
        raise bad
    assert engine.at_work == set() and actor._waiting == 0


def test_siblings_of_a_request_that_failed_are_not_waited_for(actor_with: Any) -> None:
    engine = Engine(ends=lambda seed: REFUSED if seed == 1 else None)
    [bad] = ask(actor_with(engine), "bad")
    assert isinstance(bad, GenerationError)
    assert engine.at_work == set()


@pytest.mark.parametrize("when", ["refuses", "ends"])
def test_an_engine_that_died_is_no_failure_of_the_prompt(actor_with: Any, when: str) -> None:
    engine = Engine(dies=True, **{when: lambda seed: RuntimeError("the engine is dead")})
    with pytest.raises(RuntimeError, match="the engine is dead"):
        ask(actor_with(engine), "good")


@pytest.fixture
def closing_model(tiny_model: Path, tmp_path: Path) -> Path:
    """Its template ends turns with another token, 2, than its tokenizer ends sequences, 0."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "closing"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|endoftext|>"}))
    return folder


def test_sampling_ends_with_the_templates_end_of_turn_or_the_end_of_the_sequence(
    vllm: None, closing_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(ends=lambda seed: sampled((5, 0)))
    monkeypatch.setattr(actors.rollout, "start_engine", lambda *_, **__: engine)
    memory = str(tmp_path / "memory")
    actor = RolloutActor(str(closing_model), RolloutSection(), 64, 8, memory, "r", "e")
    [group] = ask(actor, "prompt")
    asyncio.run(actor.shutdown())
    assert [parameters.stop_token_ids for parameters in engine.asked] == [[2, 0]] * 3
    assert isinstance(group, RolloutGroup)
    assert group.completions[0].finish_reason == "stop"


def test_chat_ends_an_answer_with_either_too(
    vllm: None, closing_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    async def generate(prompt: Any, parameters: Any, request_id: str) -> AsyncGenerator[Any, None]:
        asked.append(parameters)
        part = SimpleNamespace(index=0, text="", token_ids=[0], finish_reason="stop")
        yield SimpleNamespace(outputs=[part])

    engine = SimpleNamespace(generate=generate, errored=False, shutdown=lambda: None)
    monkeypatch.setattr(actors.chat_engine, "start_engine", lambda *_, **__: engine)
    chat = ChatEngine(str(closing_model), RolloutSection(), 64)

    async def write() -> list[Piece]:
        sampling = Sampling(1, 8)
        return [piece async for piece in chat.write((1, 5), sampling)]

    [piece] = asyncio.run(write())
    chat.shutdown()
    assert asked[0].stop_token_ids == [2, 0]
    assert piece.ended == "stop"


@pytest.mark.parametrize("prompt_tokens", [1, 400])
def test_an_engine_reads_the_probe_however_short_prompts_and_completions_are(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt_tokens: int
) -> None:
    started: list[int] = []

    def start(folder: Path, settings: Any, max_length: int, **_: Any) -> Engine:
        started.append(max_length)
        return Engine()

    monkeypatch.setattr(actors.rollout, "start_engine", start)
    memory = str(tmp_path / "memory")
    actor = RolloutActor(str(tiny_model), RolloutSection(), prompt_tokens, 2, memory, "r", "e")
    asyncio.run(actor.shutdown())
    probe = ChatTokenizer(tiny_model).reply_ids(PROBE_TEXT, finished=False)
    assert started == [max(prompt_tokens + 2, len(probe) + 1)]
    assert len(probe) + 1 < 402
