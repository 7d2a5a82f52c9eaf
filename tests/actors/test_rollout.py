"""The rollout actor but for its engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import actors.rollout
from actors.rollout import RolloutActor
from cluster.weights.probe import PROBE_TEXT
from models.chat import ChatTokenizer
from rlhf.config import RolloutSection


class Engine:
    errored = False

    def shutdown(self) -> None:
        pass


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
