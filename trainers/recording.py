"""What a run leaves behind step by step: metrics, TensorBoard events, rollouts, a progress line."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cluster.files import write_atomically
from rlhf.records import FailedGroup, ScoredGroup
from rlhf.tables import rollout_table

_SAY_EVERY_S = 30.0
_GUESS_FROM = 0.05


def progress_bar(console: Console) -> Progress:
    """A bar with count, elapsed and remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )


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
        self.last: dict[str, Any] | None = None
        """The metrics of the step before the first."""
        if self._metrics.is_file():
            lines = self._metrics.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) < first_step]
            self.last = json.loads(kept[-1]) if kept else None
            write_atomically(self._metrics, "".join(f"{line}\n" for line in kept))
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
            file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the events."""
        self._events.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 60


class Progressing:
    """A bar in a terminal; elsewhere a line for every note, and one every half minute."""

    def __init__(self, console: Console, title: str, total: int, done: int = 0) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._done = done
        self._began = (time.monotonic(), done)
        self._said = time.monotonic()
        self._progress = progress_bar(console)
        self._task: TaskID = self._progress.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Progressing:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done."""
        self._done += count
        self._progress.update(self._task, advance=count, note=note)
        now = time.monotonic()
        if not self._console.is_terminal and (note or now - self._said > _SAY_EVERY_S):
            self._said = now
            started, before = self._began
            per_item_s = (now - started) / max(1, self._done - before)
            minutes, seconds = divmod(round(per_item_s * (self._total - self._done)), 60)
            # The first items carry the start-up: no guess from too few of them.
            known = self._done - before >= _GUESS_FROM * (self._total - before)
            left = f"  {minutes}:{seconds:02d} left" if known else ""
            self._console.print(f"{self._title} {self._done}/{self._total}{left}  {note}".rstrip())
