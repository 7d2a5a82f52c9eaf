"""What a run leaves behind step by step: metrics, TensorBoard events, rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.files import as_json, keep_steps_before
from rlhf.records import FailedGroup, ScoredGroup
from rlhf.tables import rollout_table


class Recorder:
    """Writes ``metrics.jsonl``, ``rollouts/*.parquet`` and TensorBoard events into a run folder.

    Args:
        first_step: steps from here on were not kept by a checkpoint: what an earlier attempt
            recorded of them is dropped, so that a resumed run reads as an unbroken one.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._metrics = folder / "metrics.jsonl"
        self._rollouts = folder / "rollouts"
        self._rollouts.mkdir(exist_ok=True)
        self.last: dict[str, Any] | None = keep_steps_before(self._metrics, first_step)
        """The metrics of the step before the first."""
        for path in self._rollouts.glob("step-*.parquet"):
            if int(path.stem.removeprefix("step-")) >= first_step:
                path.unlink()
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def record(
        self, metrics: Mapping[str, Any], groups: Sequence[ScoredGroup | FailedGroup]
    ) -> None:
        """One step."""
        step = int(metrics["step"])
        table = rollout_table(step, int(metrics["weight_version"]) - 1, groups)
        path = self._rollouts / f"step-{step:06d}.parquet"
        beside = path.with_suffix(".part")
        pq.write_table(table, beside)
        beside.rename(path)
        with self._metrics.open("a") as file:
            file.write(as_json(metrics) + "\n")
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the events."""
        self._events.close()
