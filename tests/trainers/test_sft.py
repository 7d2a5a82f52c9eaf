"""How a run of fine-tuning is set up. No cluster is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.spawn import Role
from rlhf.config import SFTConfig, parse_config
from trainers.sft import layout_of, start_job, threads_of


def config(**cluster: Any) -> SFTConfig:
    values = {
        "data": {"conversations": ["c"]},
        "reward": {"model": "r"},
        "answers": {"prompts": ["p"]},
        "cluster": cluster,
    }
    return parse_config(SFTConfig, values, "test")


def test_workers_and_trials_side_by_side_compute_with_a_thread_each_on_few_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.layout.usable_cores", lambda: 2)
    assert layout_of(config(), 1) == "turns"
    assert layout_of(config(), 2) == "threads"
    assert layout_of(config(learner={"actors": 2}), 1) == "threads"


def test_engine_ensemble_and_the_workers_of_all_trials_share_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.layout.usable_cores", lambda: 16)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}])
    assert threads_of(config(), 1) == 16 // 3
    assert threads_of(config(learner={"actors": 2}), 3) == 16 // 8
    assert threads_of(config(learner={"actors": 2, "gpus": 1}), 3) == 16 // 2


def test_engine_and_workers_on_several_nodes_are_told_a_transport_that_reaches_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []

    def spawn(roles: list[Role], *arguments: Any, **named: Any) -> dict[str, list[Any]]:
        told.append(roles[0].arguments(0)["weight_transport"])
        return {"rollout": [None], "reward": [None]}

    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}] * 2)
    monkeypatch.setattr("trainers.sft.require_room", lambda roles: None)
    monkeypatch.setattr("trainers.sft.spawn", spawn)
    prepared: Any = SimpleNamespace(
        model="m", reward=tmp_path, longest_prompt=9, train=(), held_out=(), prompts=(), prompted=()
    )
    job = start_job(config(), prepared, tmp_path, "run", Console(quiet=True), resume=False)
    assert [*told, job.config.cluster.weight_transport] == ["object_store"] * 2
