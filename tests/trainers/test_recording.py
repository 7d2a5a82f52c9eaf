"""What a run leaves behind step by step, and what it says meanwhile."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cluster.progress import Progressing
from rlhf.records import FailedGroup, Message, Prompt
from rlhf.tables import ROLLOUT_SCHEMA
from trainers.recording import Recorder


def failed(step: int) -> FailedGroup:
    return FailedGroup(Prompt(f"p{step}", (Message("user", "Why?"),)), 0, "too long", 3)


def record(folder: Path, first_step: int, *steps: int, tag: str) -> None:
    recorder = Recorder(folder, first_step)
    for step in steps:
        recorder.record({"step": step, "weight_version": step + 1, "tag": tag}, [failed(step)])
    recorder.close()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_reads_as_an_unbroken_one(tmp_path: Path) -> None:
    record(tmp_path, 0, 0, 1, 2, tag="first")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "we')  # killed while it wrote
    record(tmp_path, 2, 2, 3, tag="second")
    assert [(row["step"], row["tag"]) for row in metrics(tmp_path)] == [
        (0, "first"),
        (1, "first"),
        (2, "second"),
        (3, "second"),
    ]
    last = Recorder(tmp_path, 3).last
    assert last is not None
    assert (last["step"], last["tag"]) == (2, "second")
    assert Recorder(tmp_path, 0).last is None
    record(tmp_path, 0, 0, 1, 2, 3, tag="third")
    names = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert names == [f"step-{step:06d}.parquet" for step in range(4)]


def test_a_step_that_diverged_leaves_metrics_that_any_reader_of_json_understands(
    tmp_path: Path,
) -> None:
    recorder = Recorder(tmp_path, 0)
    recorder.record({"step": 0, "weight_version": 1, "losses/approx_kl": math.inf}, [failed(0)])
    recorder.close()
    assert metrics(tmp_path)[0]["losses/approx_kl"] is None


def test_rollouts_have_the_promised_columns_and_name_the_version_trained_on(
    tmp_path: Path,
) -> None:
    record(tmp_path, 0, 5, tag="")
    table = pq.read_table(tmp_path / "rollouts" / "step-000005.parquet")
    assert table.schema.names == ROLLOUT_SCHEMA.names
    [row] = table.to_pylist()
    assert (row["learner_version"], row["prompt_id"], row["failure"]) == (5, "p5", "too long")


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


def lines(said: io.StringIO) -> list[str]:
    return said.getvalue().splitlines()


def test_outside_a_terminal_every_note_is_a_line_with_the_time_left(said: io.StringIO) -> None:
    with Progressing(Console(file=said), "rl", 4, done=1) as progress:
        progress.advance(note="reward +1.00")
        progress.advance()
        progress.advance(note="reward +2.00")
    first, second = lines(said)
    assert re.fullmatch(r"rl 2/4  \d+:\d\d left  reward \+1\.00", first)
    assert re.fullmatch(r"rl 4/4  0:00 left  reward \+2\.00", second)


def test_long_work_without_notes_says_now_and_then_how_far_it_is(
    said: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Progressing(Console(file=said), "features", 200) as progress:
        progress.advance(50)
        assert lines(said) == []
        monkeypatch.setattr("cluster.progress._SAY_EVERY_S", 0.0)
        progress.advance(50)
        monkeypatch.setattr("cluster.progress._SAY_EVERY_S", 30.0)
    [line] = lines(said)
    assert re.fullmatch(r"features 100/200  \d+:\d\d left", line)


def test_the_first_few_items_are_no_measure_of_the_time_left(
    said: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.progress._SAY_EVERY_S", 0.0)
    with Progressing(Console(file=said), "sample", 250) as progress:
        progress.advance()
    assert lines(said) == ["sample 1/250"]
