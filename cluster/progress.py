"""How far something is: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import time

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
