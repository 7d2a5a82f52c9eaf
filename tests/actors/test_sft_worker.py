"""The fine-tuning worker but for its engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.rollout import GroupRequest
from actors.sft_worker import Judge, SFTJob, SFTWorker
from cluster.files import RunFolder
from rlhf.config import SFTConfig, parse_config
from rlhf.errors import ActorLostError
from rlhf.records import Completion, GroupScores, Message, Prompt, RolloutGroup


class Resuming(SFTWorker):
    """Rank 0, without a model."""

    def __init__(self, folder: Path) -> None:
        self._run, self._rank = RunFolder(folder), 0

    def load_checkpoint(self, folder: str) -> None:
        assert folder.endswith("step-000002")


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "\0\0\0", "\udcff", "3"])
def test_a_run_goes_on_from_its_checkpoint_whatever_a_crash_did_to_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: str
) -> None:
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    with RunFolder(tmp_path).new_checkpoint(2, {"evaluations": []}, keep=1):
        pass
    rows = [{"step": step, "loss/train": 1.0 / (1 + step)} for step in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(lines + torn, errors="surrogateescape")
    assert Resuming(tmp_path)._resume() == 2
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == rows[:2]


class Remote:
    """A method of an actor."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def remote(self, *arguments: Any) -> Any:
        return self._answer(*arguments)


def answer(manifest: Any, probe: Any, requests: Sequence[GroupRequest]) -> list[RolloutGroup]:
    said = Completion((7,), "Yes.", (-1.0,), "stop", 0, 0, 0)
    return [RolloutGroup(request.prompt, 0, (1, 2), (said,)) for request in requests]


def score(groups: Sequence[RolloutGroup]) -> list[GroupScores]:
    """The longer the prompt the better."""
    sizes = [float(sum(len(m.content) for m in group.prompt.messages)) for group in groups]
    zero, no = (0.0,), (False,)
    return [GroupScores(((x,),), (x,), zero, zero, zero, no, no, "r1") for x in sizes]


def judge(folder: Path, rollout: Any, reward: Any, prompting: Sequence[Message] = ()) -> Judge:
    """Of two prompts, and of the same ones behind `prompting`."""
    values = {
        "data": {"conversations": ["c"]},
        "reward": {"model": "r"},
        "answers": {"prompts": ["p"]},
    }
    prompts = [Prompt(word, (Message("user", f"Tell me about {word}."),)) for word in ("a", "bcd")]
    job = SFTJob(
        config=parse_config(SFTConfig, values, "test"),
        model="m",
        folder=str(folder),
        shared_memory="",
        held_out=(),
        prompts=prompts,
        prompted=[Prompt(p.id, (*prompting, *p.messages)) for p in prompts if prompting],
        steps=1,
        rollout=rollout,
        reward=reward,
        resume=False,
    )
    return Judge(job)


NOTHING: Any = None


def test_a_prompted_answer_is_judged_as_an_answer_to_the_prompt_as_it_is(tmp_path: Path) -> None:
    rollout = SimpleNamespace(answer=Remote(answer))
    reward = SimpleNamespace(score=Remote(score))
    system = Message("system", "Be helpful. " * 20)
    judged = judge(tmp_path, rollout, reward, [system])
    found = judged.evaluate(0, 1.0, NOTHING, NOTHING)
    baseline = json.loads((tmp_path / "baseline.json").read_text())
    assert baseline["rewards_P"] == list(found.rewards_P) == [16.0, 18.0]
    [first, _] = (tmp_path / "answers" / "baseline.jsonl").read_text().splitlines()
    assert json.loads(first)["prompt"][0]["role"] == "system"


def test_an_engine_or_ensemble_that_dies_is_waited_for_and_asked_once_more(tmp_path: Path) -> None:
    dying = {"answer": 1, "score": 1, "ready": 1}

    def dies(name: str, then: Any) -> Remote:
        def call(*arguments: Any) -> Any:
            dying[name] -= 1
            if dying[name] >= 0:
                raise ActorLostError(f"{name} died")
            return then(*arguments)

        return Remote(call)

    rollout = SimpleNamespace(answer=dies("answer", answer), version=Remote(lambda: 0))
    ready = dies("ready", lambda: True)
    reward = SimpleNamespace(score=dies("score", score), __ray_ready__=ready)
    found = judge(tmp_path, rollout, reward).evaluate(0, 1.0, NOTHING, NOTHING)
    assert found.rewards_P == (16.0, 18.0)
    # Once more, and no oftener.
    dying["answer"] = 2
    with pytest.raises(ActorLostError, match="answer died"):
        judge(tmp_path, rollout, reward).evaluate(1, 1.0, NOTHING, NOTHING)
