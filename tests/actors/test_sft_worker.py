"""The fine-tuning worker but for its engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from actors.sft_worker import SFTWorker
from cluster.files import RunFolder


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
