"""What the tests of streams run in Ray: a reader and actors that misbehave on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from rlhf.errors import DataError, ModelError

TABLE_ROWS = 32
SCHEMA = pa.schema([("line", pa.int64()), ("text", pa.string())])


def read(tables: int, damaged: bool = False) -> Iterator[pa.Table]:
    """Tables of rows of 3 KB, numbered from 0."""
    for begin in range(0, tables * TABLE_ROWS, TABLE_ROWS):
        lines = range(begin, begin + TABLE_ROWS)
        yield pa.Table.from_pylist([{"line": n, "text": "x" * 3000} for n in lines], schema=SCHEMA)
    if damaged:
        raise DataError("rows.jsonl is cut short; fetch it again")


class Echo:
    """Gives each line back, with the process and the threads that it has."""

    def __init__(self, gpus: float) -> None:
        pass

    def __call__(self, table: pa.Table) -> pa.Table:
        here = {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}
        rows = [{"line": line, **here} for line in table["line"].to_pylist()]
        return pa.Table.from_pylist(rows)


class Refusing(Echo):
    """Cannot load its model."""

    def __call__(self, table: pa.Table) -> pa.Table:
        raise ModelError("trained on another backbone")


class Broken(Echo):
    """Has a fault of its own."""

    def __call__(self, table: pa.Table) -> pa.Table:
        raise ZeroDivisionError("of all things")


class DyingOnce(Echo):
    """Dies in its third batch, the first time."""

    def __init__(self, mark: str, gpus: float) -> None:
        self._mark = Path(mark)
        self._batches = 0

    def __call__(self, table: pa.Table) -> pa.Table:
        self._batches += 1
        if self._batches == 3 and not self._mark.exists():
            self._mark.touch()
            os._exit(1)
        return super().__call__(table)
