"""What training has flagged, as work: completions out of the ensemble's domain, beside a sibling.

A run leaves every completion in ``rollouts/*.parquet`` (`rlhf.tables.ROLLOUT_SCHEMA`). A flagged
one is put beside the sibling of the same prompt with the highest reward that is not flagged, or
else the least far out: what people say of the two is what the ensemble does not know. The further
out, the higher the priority.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from labelling.records import Answer, Work
from rlhf.errors import DataError
from rlhf.records import Message

_COLUMNS = [
    *("step", "group", "messages", "completion", "finish_reason", "newest_version"),
    *("reward", "shift", "domain_shift"),
]


def flagged_work(run: Path, limit: int | None = None) -> tuple[list[Work], int]:
    """The pairs of a run's folder, the furthest out first, at most `limit`; and how many were left
    out because no database keeps their text.

    Raises:
        DataError: there are no rollouts, they are of an older Pavlov, or nothing was flagged.
    """
    files = sorted((run / "rollouts").glob("*.parquet"))
    if not files:
        raise DataError(f"{run} has no rollouts: name the folder of a `pavlov rl` run")
    found: dict[tuple[Any, ...], Work] = {}
    left_out = 0
    for file in files:
        try:
            rows = pq.read_table(file, columns=_COLUMNS).to_pylist()
        except (pa.ArrowException, KeyError) as error:
            raise DataError(f"{file} cannot be read as rollouts: {error}") from None
        groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            if row["completion"] and row["completion"].strip():
                groups[row["step"], row["group"]].append(row)
        for siblings in groups.values():
            for work in _pairs(siblings, run.name):
                if work is None:
                    left_out += 1
                    continue
                # The same words may have been said in several steps.
                found.setdefault((work.prompt, work.a.text, work.b.text), work)
    if not found:
        unfit = f"; {left_out} pairs have a NUL character in their text" if left_out else ""
        raise DataError(
            f"nothing was flagged in {run}, or nothing that a sibling differs from{unfit}"
        )
    ordered = sorted(found.values(), key=lambda work: -work.priority)
    return ordered[:limit], left_out


def _pairs(siblings: Sequence[dict[str, Any]], run: str) -> Iterator[Work | None]:
    """None for a pair that cannot be work."""
    for row in siblings:
        if not row["domain_shift"]:
            continue
        text = row["completion"].strip()
        others = [each for each in siblings if each["completion"].strip() != text]
        if not others:
            continue
        other = min(others, key=_doubtful)
        try:
            work = Work(
                tuple(Message(turn["role"], turn["content"]) for turn in row["messages"]),
                _answer(row, run),
                _answer(other, run),
                source=f"{run}, flagged in step {row['step']}",
                priority=float(row["shift"]),
            )
        except ValueError:
            work = None
        yield work


def _doubtful(row: dict[str, Any]) -> tuple[float, float]:
    """Flagged ones last, and of those the furthest out; of the others the best first."""
    return (1.0, row["shift"]) if row["domain_shift"] else (0.0, -row["reward"])


def _answer(row: dict[str, Any], run: str) -> Answer:
    finished = row["finish_reason"] == "stop"
    return Answer(row["completion"], run, f"version {row['newest_version']}", finished)
