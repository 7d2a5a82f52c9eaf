"""The actors of a run under Ray: names, metrics, staleness, an adapter, a killed engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.session import ray_session, shared_memory_folder
from rlhf.config import RLConfig, parse_config
from rlhf.errors import ResourceError
from rlhf.prompts import PromptCursor
from rlhf.records import FailedGroup, Message, Prompt, ScoredGroup
from trainers.fleet import Fleet, Models, run_roles
from trainers.loop import Loop

pytestmark = pytest.mark.engine

PROMPTS = [Prompt(word, (Message("user", f"Tell me about {word}."),)) for word in "abcdefgh"]


@dataclass
class Bench:
    """A fleet that trains an adapter of the tiny model, sent through Ray's object store."""

    runner: asyncio.Runner
    fleet: Fleet
    config: RLConfig
    models: Models
    namespace: str

    def train(self, recorded: list[dict[str, Any]], killed_after: int | None = None) -> None:
        async def record(
            step: int, metrics: dict[str, Any], groups: Sequence[ScoredGroup | FailedGroup]
        ) -> None:
            recorded.append(metrics | {"groups": list(groups)})
            if step == killed_after:
                [engine] = [pid for pid, name in actors_of_this_test() if "RolloutActor" in name]
                os.kill(engine, signal.SIGKILL)

        loop = Loop(self.config, PromptCursor(PROMPTS, 0), self.fleet, record)
        self.runner.run(loop.run())


def actors_of_this_test() -> Iterator[tuple[int, str]]:
    for process in psutil.Process().children(recursive=True):
        # Others end meanwhile.
        with contextlib.suppress(psutil.Error):
            if (command := process.cmdline()) and command[0].startswith("ray::"):
                yield process.pid, command[0]


@pytest.fixture(scope="module")
def bench(tiny_model: Path, tiny_reward_model: Path) -> Iterator[Bench]:
    config = parse_config(
        RLConfig,
        {
            "policy": {"model": str(tiny_model), "dtype": "float32", "lora": {"rank": 4}},
            "reward": {"model": str(tiny_reward_model)},
            "data": {"prompts": ["unused"], "max_prompt_tokens": 64},
            "rl": {
                "num_steps": 6,
                "prompts_per_step": 2,
                "completions_per_prompt": 3,
                "max_tokens": 24,
                "max_staleness": 2,
            },
            "rollout": {"dtype": "float32", "max_sequences": 8},
            "learner": {"learning_rate": 1e-3},
            "cluster": {"weight_transport": "object_store"},
        },
        "test",
    )
    models = Models(tiny_model, tiny_model, tiny_reward_model)
    with asyncio.Runner() as runner, ray_session("fleet", num_cpus=2) as namespace:
        memory = shared_memory_folder(namespace)
        fleet = runner.run(Fleet.start(config, models, namespace, memory, lambda text: None))
        yield Bench(runner, fleet, config, models, namespace)
        runner.run(fleet.close())


def test_actors_are_named_by_role_and_number_in_a_namespace_of_the_run(bench: Bench) -> None:
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    # A learner that trains an adapter is the reference with it off.
    assert {actor["name"] for actor in named} == {"rollout-0", "reward-0", "learner-0"}
    assert {actor["namespace"] for actor in named} == {bench.namespace}
    assert bench.namespace.startswith("fleet-")


def test_staleness_two_stays_within_two_and_survives_a_killed_engine(bench: Bench) -> None:
    recorded: list[dict[str, Any]] = []
    bench.train(recorded, killed_after=1)
    assert [row["step"] for row in recorded] == list(range(6))
    assert [row["weight_version"] for row in recorded] == list(range(1, 7))
    assert max(row["staleness/max"] for row in recorded) <= 2
    assert any(row["staleness/max"] > 0 for row in recorded)
    assert sum(row["groups/failed"] for row in recorded) == 0
    completions = [c for row in recorded for g in row["groups"] for c in g.rollout.completions]
    assert len(completions) == 6 * 2 * 3
    # Both engines merged what the learner has, and the adapter, zero at first, moves the policy.
    assert all(row["weights/probe_gap"] < 1e-3 for row in recorded)
    assert abs(recorded[0]["kl/mean"]) < 1e-2
    assert abs(recorded[-1]["kl/mean"]) > 1e-2


def test_actors_export_gauges_that_prometheus_can_scrape(bench: Bench) -> None:
    import ray

    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {
        "pavlov_weight_version",
        "pavlov_reward_mean",
        "pavlov_ensemble_disagreement",
        "pavlov_ensemble_flagged_share",
        "pavlov_entropy_mean",
        "pavlov_rollout_tokens_per_s",
        "pavlov_rollout_queue_depth",
        "pavlov_learner_tokens_per_s",
    }
    missing = wanted
    for _ in range(30):
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        missing = {name for name in wanted if name not in text}
        if not missing:
            break
        bench.runner.run(asyncio.sleep(1))
    assert not missing
    assert f'run="{bench.namespace}"' in text


def test_more_than_the_machine_has_is_refused_by_name(bench: Bench) -> None:
    from cluster.spawn import spawn

    greedy = bench.config.cluster.model_copy(
        update={"learner": bench.config.cluster.learner.model_copy(update={"gpus": 2.0})}
    )
    config = bench.config.model_copy(update={"cluster": greedy})
    roles = run_roles(config, bench.models, "x", Path("/dev/shm/unused"))
    with pytest.raises(ResourceError, match="2 GPUs wanted for learner, 0 there"):
        spawn(roles, "turns", timeout_s=30, say=lambda text: None)
