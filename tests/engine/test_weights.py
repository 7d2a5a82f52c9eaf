"""Weight updates on the real engine, in float32: what was sent arrives, or is refused."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from actors.learner import LearnerActor
from actors.rollout import GroupRequest, RolloutActor
from cluster.weights.shared_memory import read_tensors, write_tensors
from rlhf.config import LearnerSection, RLSection, RolloutSection
from rlhf.errors import GenerationError, StaleWeightsError, WeightUpdateError
from rlhf.records import Message, Prompt, TrainingBatch, TrainingSequence

pytestmark = pytest.mark.engine

PROMPT = Prompt("p", (Message("user", "How do I keep pasta from sticking?"),))
ENGINE = RolloutSection(dtype="float32", max_sequences=8, kv_cache_gib=1.0)


@dataclass
class Bench:
    """A learner and an engine in this process, and the loop that the engine lives in."""

    runner: asyncio.Runner
    learner: LearnerActor
    engine: RolloutActor
    version: int = 0

    def train(self) -> None:
        """One step on a made-up sequence: enough to move every tensor."""
        sequence = TrainingSequence(tuple(range(5, 20)), tuple(range(30, 50)), (-6.0,) * 20, 1.0)
        self.learner.step(TrainingBatch((sequence,), 32, 1.0), self.version)
        self.version += 1

    def publish(self) -> float:
        return self.update(self.learner.export_weights(self.version))

    def update(self, manifest: Any) -> float:
        return self.runner.run(self.engine.update_weights(manifest, self.learner.probe()))

    def plant(self, fault: str) -> None:
        self.runner.run(self.engine._engine.collective_rpc("plant", args=(fault,)))


@pytest.fixture(scope="module")
def bench(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    here = str(Path(__file__).parent)
    sys.path.insert(0, here)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, str(Path(__file__).parents[2])])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    memory = Path("/dev/shm") / tmp_path_factory.mktemp("pavlov-test").name
    learner = LearnerActor(
        str(tiny_model),
        "float32",
        LearnerSection(learning_rate=1e-3),
        RLSection(max_tokens=64),
        "float32",
        "shared_memory",
        str(memory),
        "test",
        "learner-0",
    )
    learner.start(learner.address())
    with asyncio.Runner() as runner:

        async def start() -> RolloutActor:
            return RolloutActor(
                str(tiny_model),
                ENGINE,
                64,
                64,
                str(memory),
                "test",
                "rollout-0",
                worker_extension="faulty_loader.FaultyLoader",
            )

        engine = runner.run(start())
        bench = Bench(runner, learner, engine)
        yield bench
        runner.run(engine.shutdown())
        learner.shutdown()
    assert not memory.exists()


def request(*seeds: int, max_tokens: int = 12, temperature: float = 1.0) -> GroupRequest:
    return GroupRequest(PROMPT, 0, seeds, max_tokens, temperature)


def generate(bench: Bench, *requests: GroupRequest, together: bool = False) -> list[Any]:
    coroutine = bench.engine.generate(requests, bench.version, together=together)
    return bench.runner.run(coroutine)


def test_an_engine_serves_nothing_before_it_has_the_weights(bench: Bench) -> None:
    with pytest.raises(StaleWeightsError):
        generate(bench, request(1))


def test_after_an_update_engine_and_learner_agree_to_float32_rounding(bench: Bench) -> None:
    assert bench.publish() < 1e-4
    before = bench.learner.probe()
    bench.train()
    after = bench.learner.probe()
    moved = [abs(a - b) for a, b in zip(before.logprobs, after.logprobs, strict=True)]
    assert max(moved) > 0.05
    assert bench.publish() < 1e-4


@pytest.mark.parametrize(
    ("fault", "check"),
    [("skip", "version"), ("stale", "probe"), ("swap", "probe"), ("bit", "probe")],
)
def test_a_fault_in_loading_is_caught_by_the_named_check(
    bench: Bench, fault: str, check: str
) -> None:
    bench.train()
    bench.plant(fault)
    with pytest.raises(WeightUpdateError) as caught:
        bench.publish()
    assert caught.value.check == check
    with pytest.raises(StaleWeightsError):
        generate(bench, request(1))
    bench.plant("")
    assert bench.publish() < 1e-4


def test_a_tensor_changed_on_the_way_is_caught_by_its_checksum(bench: Bench) -> None:
    bench.train()
    manifest = bench.learner.export_weights(bench.version)
    assert manifest is not None
    path = Path(manifest.location)
    tensors = dict(read_tensors(path))
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.0001
    changed = write_tensors(tensors, path.parent, "changed")
    with pytest.raises(WeightUpdateError) as caught:
        bench.update(replace(manifest, location=str(changed)))
    changed.unlink()
    assert caught.value.check == "checksum"
    assert bench.update(manifest) < 1e-4


def test_a_version_that_is_gone_is_refused(bench: Bench) -> None:
    manifest = bench.learner.export_weights(bench.version)
    assert manifest is not None
    with pytest.raises(WeightUpdateError) as caught:
        bench.update(replace(manifest, location="/dev/shm/nowhere.safetensors"))
    assert caught.value.check == "version"
    bench.publish()


def test_a_seed_decides_a_completion(bench: Bench) -> None:
    bench.publish()
    (first,), (again,) = generate(bench, request(3)), generate(bench, request(3))
    (other,) = generate(bench, request(4))
    assert first.completions[0].token_ids == again.completions[0].token_ids
    assert first.completions[0].token_ids != other.completions[0].token_ids


def test_an_engine_on_cpu_is_one_process_that_compiles_nothing(bench: Bench) -> None:
    bench.publish()
    generate(bench, request(1))
    # What has ended has no command line.
    lines = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    assert [line.strip() for line in lines if "VLLM" in line] == ["VLLM::EngineCore"]
    compiled = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert [path for path in compiled.rglob("*") if path.is_file()] == []


def test_rollout_logprobs_are_of_the_distribution_at_the_sampling_temperature(
    bench: Bench,
) -> None:
    from models.logprobs import reply_logprobs

    bench.publish()
    (group,) = generate(bench, request(5, temperature=0.5))
    completion = group.completions[0]
    (expected,) = reply_logprobs(
        bench.learner._engine.module,
        [group.prompt_token_ids],
        [completion.token_ids],
        temperature=0.5,
        pad_id=0,
        budget_tokens=1000,
    )
    gaps = [abs(a - b) for a, b in zip(expected, completion.rollout_logprobs_T, strict=True)]
    assert max(gaps) < 1e-3


def test_a_prompt_that_is_too_long_is_an_error_of_its_group_only(bench: Bench) -> None:
    bench.publish()
    long = Prompt("long", (Message("user", "bread " * 200),))
    bad, good = generate(bench, replace(request(1), prompt=long), request(1), together=True)
    assert isinstance(bad, GenerationError)
    assert "more than 64" in str(bad)
    assert len(good.completions) == 1


def test_a_request_that_the_engine_refuses_is_an_error_of_its_group_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.publish()
    engine = bench.engine._engine
    add = engine.add_request

    async def spoilt(name: str, prompt: Any, parameters: Any) -> Any:
        beyond = {"prompt_token_ids": [10**6]}
        return await add(name, beyond if parameters.seed == 2 else prompt, parameters)

    monkeypatch.setattr(engine, "add_request", spoilt)
    bad, good = generate(bench, request(1, 2), request(3), together=True)
    assert isinstance(bad, GenerationError)
    assert "out of vocabulary" in str(bad)
    assert len(good.completions) == 1
    assert not engine.output_processor.has_unfinished_requests()


def test_requests_in_flight_go_on_with_the_new_weights_and_say_so(bench: Bench) -> None:
    bench.publish()
    # On a fast machine all is written before the update comes: then it comes sooner.
    for wait in (0.15, 0.08, 0.04, 0.02, 0.01):
        old = bench.version
        bench.train()
        manifest, probe = bench.learner.export_weights(bench.version), bench.learner.probe()

        async def update_while_generating(
            wait: float = wait, old: int = old, manifest: Any = manifest, probe: Any = probe
        ) -> Any:
            sampling = asyncio.create_task(
                bench.engine.generate([request(*range(8), max_tokens=60)], old)
            )
            await asyncio.sleep(wait)
            await bench.engine.update_weights(manifest, probe)
            return (await sampling)[0]

        group = bench.runner.run(update_while_generating())
        spans = {(c.oldest_version, c.newest_version) for c in group.completions}
        if (old, bench.version) in spans:
            break
    assert (old, bench.version) in spans
    assert group.oldest_version == old
    for completion in group.completions:
        versions = [version for version, _ in completion.version_spans]
        assert versions == sorted({completion.oldest_version, completion.newest_version})
        assert sum(tokens for _, tokens in completion.version_spans) == completion.length


def test_an_updated_engine_gives_what_a_fresh_engine_with_those_weights_gives(
    bench: Bench, tmp_path: Path
) -> None:
    bench.train()
    bench.publish()
    bench.learner.save_policy(str(tmp_path / "policy"))
    greedy = request(0, max_tokens=24, temperature=0.0)
    (updated,) = generate(bench, greedy)

    async def ask_fresh() -> Any:
        fresh = RolloutActor(
            str(tmp_path / "policy"), ENGINE, 64, 64, str(tmp_path / "shm"), "test", "rollout-1"
        )
        await fresh.serve_start_weights()
        try:
            return (await fresh.generate([greedy], 0))[0]
        finally:
            await fresh.shutdown()

    fresh = bench.runner.run(ask_fresh())
    assert fresh.completions[0].token_ids == updated.completions[0].token_ids
    torch.testing.assert_close(
        torch.tensor(fresh.completions[0].rollout_logprobs_T),
        torch.tensor(updated.completions[0].rollout_logprobs_T),
        atol=1e-4,
        rtol=0,
    )
