"""How a run of fine-tuning is set up. No cluster is started."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.spawn import Role
from models.chat import ChatTokenizer
from rlhf.config import SFTConfig, parse_config
from rlhf.errors import ActorLostError, DataError, ModelError, RunError
from rlhf.records import Message, Prompt
from trainers.prompts import reasons_of
from trainers.sft import _reason, layout_of, start_job, threads_of
from trainers.sft_data import asked, prepare, prompted


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
    monkeypatch.setattr("ray.is_initialized", lambda: True)
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

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}] * 2)
    monkeypatch.setattr("trainers.sft.require_room", lambda roles: None)
    monkeypatch.setattr("trainers.sft.spawn", spawn)
    prepared: Any = SimpleNamespace(
        model="m", reward=tmp_path, longest_prompt=9, train=(), held_out=(), prompts=(), prompted=()
    )
    job = start_job(config(), prepared, tmp_path, "run", Console(quiet=True), resume=False)
    assert [*told, job.config.cluster.weight_transport] == ["object_store"] * 2


def test_prompts_behind_the_first_ones_open_otherwise(tmp_path: Path, tiny_model: Path) -> None:
    def talk(opening: str, more: str) -> dict[str, Any]:
        texts = [("user", opening), ("assistant", "Yes."), ("user", more)]
        return {"prompt": [{"role": role, "content": text} for role, text in texts]}

    rows = [{"prompt": "Rice?"}, {"prompt": "Bread?"}, talk("Rice?", "And now?"), talk("Tea?", "?")]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config()
    answers = settings.answers.model_copy(update={"prompts": [str(path)], "limit": 2})
    settings = settings.model_copy(update={"answers": answers})
    ensemble: Any = SimpleNamespace(tokenise=lambda reply: None)
    console = Console(record=True, quiet=False, width=200, file=(tmp_path / "said").open("w"))
    found = asked(settings, ChatTokenizer(tiny_model), ensemble, set(), console, more=1)
    assert [p.messages[0].content for p in found] == ["Rice?", "Bread?", "Tea?"]
    assert "1 prompts: prompts that are answered on the way open with them" in console.export_text()


def test_a_prompts_own_system_turn_stands_below_the_baselines() -> None:
    own = Prompt("p", (Message("system", "In French."), Message("user", "Rice?")))
    [made] = prompted(config(), [own], [])
    assert made.messages[0].role == "system"
    assert made.messages[0].content.endswith("\n\nIn French.")
    assert [m.role for m in made.messages] == ["system", "user"]


def test_what_the_policy_cannot_read_is_refused_and_a_baseline_that_it_cannot_left_out(
    tmp_path: Path, tiny_model: Path, tiny_reward_model: Path
) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(tiny_model, policy)
    written = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(written | {"max_position_embeddings": 128}))
    talk, prompts = tmp_path / "talk.jsonl", tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Rice {n}?", "completion": "It is rice. " * 8} for n in range(6)]
    talk.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts.write_text("".join(json.dumps({"prompt": f"{w}?"}) + "\n" for w in ("Tea", "Nets")))

    def prepared(**answers: Any) -> tuple[Any, str]:
        values = {
            "policy": {"model": str(policy)},
            "data": {"conversations": [str(talk)], "max_tokens": 500},
            "reward": {"model": str(tiny_reward_model)},
            "answers": {"prompts": [str(prompts)], **answers},
        }
        console = Console(record=True, quiet=False, width=300, file=(tmp_path / "said").open("w"))
        return prepare(parse_config(SFTConfig, values, "test"), console), console.export_text()

    found, said = prepared(max_tokens=60)
    assert not found.prompted and len(found.prompts) == 2
    assert "no baseline by prompting: tokens of the longest prompt and answers.max_tokens" in said
    with pytest.raises(ModelError, match=r"answers.max_tokens = 1\d\d, but .* at most 128"):
        prepared(max_tokens=127)
    rows[0]["completion"] *= 4
    talk.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ModelError, match=r"longest conversation \(data.max_tokens\) = "):
        prepared(max_tokens=60)


def test_answers_that_the_reward_model_would_not_read_to_their_end_are_refused(
    tmp_path: Path, tiny_model: Path, tiny_reward_model: Path
) -> None:
    reward = tmp_path / "reward"
    shutil.copytree(tiny_reward_model, reward)
    card = json.loads((reward / "reward.json").read_text())
    (reward / "reward.json").write_text(json.dumps(card | {"max_tokens": 64}))
    talk, prompts = tmp_path / "talk.jsonl", tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Rice {n}?", "completion": "It is rice."} for n in range(6)]
    talk.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"prompt": f"{word} " * 20} for word in ("Tea", "Nets")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked))

    def prepared(answer_tokens: int) -> None:
        values = {
            "policy": {"model": str(tiny_model)},
            "data": {"conversations": [str(talk)]},
            "reward": {"model": str(reward)},
            "answers": {"prompts": [str(prompts)], "max_tokens": answer_tokens},
        }
        prepare(parse_config(SFTConfig, values, "test"), Console(quiet=True))

    # Of a row of 64 tokens a long prompt keeps 21.
    prepared(43)
    with pytest.raises(ModelError, match=r"answers.max_tokens = 44, but .* at most 43 tokens"):
        prepared(44)


def test_a_dead_worker_is_a_loss_whatever_those_say_that_waited_for_it() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import (
        WorkerGroupStartupFailedError,
        WorkerHealthCheckFailedError,
    )

    died = WorkerHealthCheckFailedError("no answer", ActorDiedError())
    waited = RuntimeError("Connection closed by peer")
    found = _reason(WorkerGroupError("both", {0: waited, 1: died}))
    assert isinstance(found, ActorLostError)
    starting = ControllerError(WorkerGroupStartupFailedError("failed to initialize"))
    assert isinstance(_reason(starting), ActorLostError)
    assert not isinstance(_reason(ControllerError(ValueError("odd"))), ActorLostError)
    found = _reason(WorkerGroupError("one", {0: waited}))
    assert not isinstance(found, ActorLostError) and "Connection closed by peer" in str(found)
    found = _reason(WorkerGroupError("both", {0: RunError("no answer from learner-1"), 1: died}))
    assert isinstance(found, ActorLostError)
    own = _reason(WorkerGroupError("both", {0: died, 1: DataError("row 7 is empty")}))
    assert isinstance(own, DataError)


def test_what_is_left_out_for_rare_reasons_is_counted_too() -> None:
    why = Counter(a=5, b=4, c=3, d=1, e=1)
    assert reasons_of(why) == [("a", 5), ("b", 4), ("c", 3), ("other reasons", 2)]
    assert reasons_of(Counter(a=1)) == [("a", 1)]
