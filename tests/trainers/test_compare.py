"""`pavlov compare` but for its engine: which pairs are written, and which are not."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import trainers.compare
from actors.rollout import GroupRequest
from labelling.exchange import read_work
from models.sources import weights_fingerprint
from rlhf.errors import DataError, ModelError
from rlhf.records import Completion
from tests.conftest import build_tiny_model
from trainers.compare import write_pairs

SETTINGS = {"limit": 6, "max_tokens": 12, "max_prompt_tokens": 64, "seed": 3}
ROWS = [{"prompt": f"What about water number {n}?"} for n in range(8)]
TOO_LONG = {"prompt": "word " * 400}


@contextlib.contextmanager
def no_session(name: str, **_: Any) -> Iterator[str]:
    yield name


class Engines:
    """Answer as `say` says, and remember what they were asked."""

    def __init__(self, say: Any) -> None:
        self.say = say
        self.seeds: dict[str, list[int]] = {}

    async def __call__(
        self,
        model: str,
        settings: Any,
        cluster: Any,
        requests: Sequence[GroupRequest],
        run: str,
        *,
        done: Any,
        **_: Any,
    ) -> list[tuple[Completion, ...]]:
        self.seeds[model] = [request.seeds[0] for request in requests]
        drawn = []
        for number, request in enumerate(requests):
            text = self.say(model, number)
            reason = "length" if number == 1 else "stop"
            tokens = tuple(range(1, 1 + max(1, len(text))))
            logprobs = (-1.0,) * len(tokens)
            drawn.append((Completion(tokens, text, logprobs, reason, 0, 0, request.seeds[0]),))
            done(1)
        return drawn


@pytest.fixture
def policies(tmp_path: Path, tiny_model: Path) -> tuple[str, str]:
    shutil.copytree(tiny_model, tmp_path / "first" / "policy")
    other = build_tiny_model(tmp_path / "second" / "policy", seed=1)
    return str(tmp_path / "first"), str(other)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [*ROWS[:2], TOO_LONG, *ROWS[2:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    made = Engines(lambda model, number: f"{Path(model).parent.name} says {number}")
    monkeypatch.setattr(trainers.compare, "ray_session", no_session)
    monkeypatch.setattr(trainers.compare, "sample_with_engine", made)
    return made


def test_each_answer_names_the_weights_that_wrote_it(
    policies, prompts, engines, tmp_path, tiny_model
):
    out = tmp_path / "made" / "pairs.jsonl"
    write_pairs(policies, prompts, out, Console(quiet=True), **SETTINGS)
    works, read = read_work(out)
    assert len(works) == read.rows == 6
    second = weights_fingerprint(Path(policies[1]))
    for number, work in enumerate(works):
        answers = {work.a.checkpoint: work.a, work.b.checkpoint: work.b}
        assert answers[weights_fingerprint(tiny_model)].text == f"first says {number}"
        assert answers[second].text == f"second says {number}"
        assert {work.a.model, work.b.model} == {"first", "second"}
        assert work.a.finished == work.b.finished == (number != 1)
        assert len(work.prompt[-1].content) < 100
    # Either is sampled with the same seeds, so that only the weights differ.
    one, other = engines.seeds.values()
    assert one == other and len(set(one)) == 6


def test_equal_and_empty_answers_are_left_out_and_counted(policies, prompts, engines, tmp_path):
    engines.say = lambda model, number: ("", "same", f"{model} differs")[min(number, 2)]
    console = Console(record=True, width=200, quiet=False, file=(tmp_path / "said").open("w"))
    out = tmp_path / "pairs.jsonl"
    write_pairs(policies, prompts, out, console, **SETTINGS)
    assert len(read_work(out)[0]) == 4
    assert "4 pairs, 2 left out" in console.export_text()


def test_nothing_to_compare_is_said_and_writes_nothing(policies, prompts, engines, tmp_path):
    engines.say = lambda *_: "same"
    out = tmp_path / "pairs.jsonl"
    with pytest.raises(DataError, match="no pair to compare"):
        write_pairs(policies, prompts, out, Console(quiet=True), **SETTINGS)
    assert not out.exists()


def test_pairs_never_take_the_place_of_the_prompts(policies, prompts, engines):
    before = prompts.read_bytes()
    with pytest.raises(DataError, match="is the file of prompts"):
        write_pairs(policies, prompts, prompts, Console(quiet=True), **SETTINGS)
    assert prompts.read_bytes() == before


def test_pairs_that_could_not_be_written_are_refused_before_anybody_is_asked(
    policies, prompts, engines, tmp_path
):
    for out in (tmp_path, tmp_path / "pairs.parquet", prompts / "pairs.jsonl"):
        with pytest.raises(DataError, match="--out"):
            write_pairs(policies, prompts, out, Console(quiet=True), **SETTINGS)
    assert not engines.seeds


def test_two_runs_of_one_name_are_told_apart(prompts, engines, tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "one" / "rl" / "policy")
    build_tiny_model(tmp_path / "two" / "rl" / "policy", seed=1)
    names = str(tmp_path / "one" / "rl"), str(tmp_path / "two" / "rl")
    engines.say = lambda model, number: f"{Path(model).parent.parent.name} says {number}"
    out = tmp_path / "pairs.jsonl"
    write_pairs(names, prompts, out, Console(quiet=True), **SETTINGS)
    for work in read_work(out)[0]:
        assert work.a.model != work.b.model
        assert work.a.model == f"rl {work.a.checkpoint}"


def test_the_same_weights_twice_are_refused(tiny_model, prompts, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    names = str(tiny_model), str(copy)
    with pytest.raises(ModelError, match="the same weights"):
        write_pairs(names, prompts, tmp_path / "out", Console(quiet=True), **SETTINGS)
