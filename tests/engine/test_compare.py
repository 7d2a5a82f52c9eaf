"""`pavlov compare` with real engines: pairs that the labelling store takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from labelling.exchange import read_work
from models.sources import weights_fingerprint
from tests.conftest import build_tiny_model
from trainers.compare import write_pairs

SETTINGS = {"limit": 6, "max_tokens": 12, "max_prompt_tokens": 64, "seed": 3}


def prompts(folder: Path) -> Path:
    rows = [{"prompt": f"What about water number {n}?"} for n in range(8)]
    rows.insert(2, {"prompt": "word " * 400})
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.engine
def test_either_policy_answers_every_prompt_and_each_answer_names_its_weights(
    tmp_path: Path, tiny_model: Path
):
    shutil.copytree(tiny_model, tmp_path / "first" / "policy")
    other = build_tiny_model(tmp_path / "second" / "policy", seed=1)
    out = tmp_path / "made" / "pairs.jsonl"
    names = str(tmp_path / "first"), str(other)
    write_pairs(names, prompts(tmp_path), out, Console(quiet=True), **SETTINGS)
    works, read = read_work(out)
    assert len(works) == read.rows == 6
    versions = {weights_fingerprint(tiny_model), weights_fingerprint(other)}
    for work in works:
        assert {work.a.checkpoint, work.b.checkpoint} == versions
        assert {work.a.model, work.b.model} == {"first", "second"}
        assert len(work.prompt[-1].content) < 100
