"""Data files row by row: JSON lines, compressed or not, and Parquet; and what became of the rows.

A bad row is data, not a crash: it comes as a `BadRow` with its line and the reason. A file that
cannot be read is a `DataError`.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf.errors import DataError

SUFFIXES = (".jsonl.gz", ".jsonl", ".parquet")
"""What data files are called."""
_SAY_REASONS = 5

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out. `line` counts from 1 (in Parquet: the row)."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What became of the rows of one file: ``rows == kept + len(bad) + repeated``.

    Blank lines are no rows. Where a limit ended the reading early, `rows` counts those read.
    """

    path: Path
    rows: int
    kept: int
    bad: tuple[BadRow, ...]
    repeated: int = 0

    def sentence(self) -> str:
        """One line for people, with the five most frequent reasons.

        Example: ``helpful.jsonl.gz: 1600 rows, 3 left out (2 with equal replies, 1 with empty
        reply; first at line 17)``
        """
        reasons = Counter(row.reason for row in self.bad)
        first = self.bad[0] if self.bad else None
        return _sentence(self.path, self.rows, reasons, first, self.repeated)


class Tally:
    """What became of the rows of one file so far: a `ReadReport` of a file that is streamed.

    Reasons are counted, not listed, so that it stays small whatever the file's size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self.reasons: Counter[str] = Counter()
        self.first: BadRow | None = None

    @property
    def bad(self) -> int:
        """Rows that were left out."""
        return self.reasons.total()

    def add(self, bad: BadRow | None = None) -> None:
        """One row more, a bad one or not."""
        self.rows += 1
        if bad is not None:
            self.first = self.first or bad
            self.reasons[bad.reason] += 1

    def sentence(self) -> str:
        """One line for people, as `ReadReport.sentence`."""
        return _sentence(self.path, self.rows, self.reasons, self.first)


def iter_rows(
    path: Path, fields: Collection[str] | None = None
) -> Iterator[tuple[int, Row | BadRow]]:
    """Line number and row of a data file; a line that is no JSON object, or a row of Parquet with a
    value that Python cannot hold, comes as a `BadRow`.

    Args:
        fields: what is wanted of a row; other columns of Parquet are not read.

    Raises:
        DataError: the file is missing, unreadable, damaged, or of another kind.
    """
    if _checked_suffix(path) == ".parquet":
        yield from _parquet_rows(path, fields)
    else:
        yield from _json_rows(path)


def count_rows(path: Path) -> int:
    """Rows of a data file, good or bad, without parsing them.

    Raises:
        DataError: as `iter_rows`.
    """
    if _checked_suffix(path) != ".parquet":
        return sum(1 for _ in _lines(path))
    with _reading_parquet(path), pq.ParquetFile(path) as file:
        return int(file.metadata.num_rows)


def _checked_suffix(path: Path) -> str:
    check_is_file(path)
    if suffix := _suffix(path):
        return suffix
    raise DataError(
        f"{path} is not a data file that can be read; convert it to JSON lines or Parquet and "
        f"name it {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    )


def check_is_file(path: Path) -> None:
    """Refuse what is missing or no file.

    Raises:
        DataError: it says why, and what to do.
    """
    try:
        if path.is_file():
            return
        exists = path.exists()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions") from None
    if exists:
        raise DataError(f"{path} is not a file; name files one by one ({', '.join(SUFFIXES)})")
    raise DataError(f"there is no data file {path}; a relative path is taken against PAVLOV_DATA")


def _json_rows(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    for line, content in _lines(path):
        yield line, _json_row(line, content)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, each with its number."""
    try:
        with gzip.open(path) if _suffix(path) == ".jsonl.gz" else path.open("rb") as file:
            for line, content in enumerate(file, start=1):
                if line == 1 and content.startswith(b"\x1f\x8b"):
                    raise DataError(f"{path} is compressed; name it *.jsonl.gz or unpack it")
                if content.strip():
                    yield line, content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} cannot be unpacked: it is cut short, damaged or not gzip; fetch it again "
            f"({error})"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _json_row(line: int, content: bytes) -> Row | BadRow:
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return BadRow(line, "text that is not UTF-8")
    except (ValueError, RecursionError):
        return BadRow(line, "broken JSON")
    return row if isinstance(row, dict) else BadRow(line, "no JSON object")


_UNREADABLE = (pa.ArrowException, ValueError, OverflowError)
"""What Arrow raises for values that Python cannot hold, and for damaged files."""


def _parquet_rows(path: Path, fields: Collection[str] | None) -> Iterator[tuple[int, Row | BadRow]]:
    line = 0
    with _reading_parquet(path), pq.ParquetFile(path) as file:
        names = None
        if fields is not None:
            names = [name for name in file.schema_arrow.names if name in fields]
        for batch in file.iter_batches(batch_size=1024, columns=names):
            for row in _rows_of_batch(batch):
                line += 1
                yield line, BadRow(line, row) if isinstance(row, str) else row


def _rows_of_batch(batch: pa.RecordBatch) -> Sequence[Row | str]:
    """Its rows; why it cannot be read in the place of one that cannot."""
    try:
        rows: list[Row] = batch.to_pylist()
    except _UNREADABLE:
        return [_row_of_batch(batch.slice(at, 1)) for at in range(batch.num_rows)]
    return rows


def _row_of_batch(batch: pa.RecordBatch) -> Row | str:
    row: Row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            [row[name]] = column.to_pylist()
        except UnicodeDecodeError:
            return f"{name} that is not UTF-8"
        except _UNREADABLE:
            return f"{name} that cannot be read"
    return row


@contextmanager
def _reading_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except (*_UNREADABLE, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read as Parquet; write it again ({reason})") from None


def _suffix(path: Path) -> str:
    """Which of `SUFFIXES` the file has, empty if none."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the name `path` when the block ends without an error: a
    reader sees the old one or the whole new one.

    Raises:
        DataError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def short_name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}".lstrip("/")


def source_of(path: Path) -> str:
    """Parent folder and name of a file, e.g. ``helpful-base/train``."""
    return short_name(path.absolute())[: -len(_suffix(path)) or None]


def _sentence(
    path: Path, rows: int, reasons: Mapping[str, int], first: BadRow | None, repeated: int = 0
) -> str:
    text = f"{short_name(path)}: {rows} row{'' if rows == 1 else 's'}"
    if repeated:
        text += f", {repeated} repeated"
    if first is None:
        return f"{text}, none left out"
    total = sum(reasons.values())
    most = Counter(reasons).most_common(_SAY_REASONS)
    counts = [f"{count} with {reason}" for reason, count in most]
    if others := total - sum(count for _, count in most):
        counts.append(f"{others} with other reasons")
    return f"{text}, {total} left out ({', '.join(counts)}; first at line {first.line})"
