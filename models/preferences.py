"""Preference pairs, prompts and rows to score: read from files row by row, written as Parquet.

A bad row is data, not a crash: it is left out, and the file's `ReadReport` names its line and the
reason. A file that cannot be read, or files without any usable row, are a `DataError`.

What rows may look like: `models/row_forms.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from models.data_files import (
    BadRow,
    ReadReport,
    Row,
    Tally,
    iter_rows,
    short_name,
    source_of,
    written_beside,
)
from models.row_forms import (
    FIELDS,
    DistinctPrompts,
    SingleCompletion,
    conversation_of,
    conversational,
    pair_of,
    scoring_row_of,
)
from rlhf.errors import DataError
from rlhf.records import Conversation, PreferencePair, Prompt
from rlhf.seeding import derive_seed
from rlhf.tables import MESSAGES

PAIR_SCHEMA = pa.schema(
    [
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("label", pa.float64()),
        ("weight", pa.float64()),
        ("margin", pa.float64()),
        ("criterion", pa.string()),
        ("source", pa.string()),
        ("chosen_finished", pa.bool_()),
        ("rejected_finished", pa.bool_()),
    ]
)

Item = TypeVar("Item")


def read_pairs(
    paths: Sequence[Path], limit: int | None = None, criteria: Sequence[str] = ()
) -> tuple[list[PreferencePair], list[ReadReport]]:
    """The usable pairs of all files in the order of the files, and one report a file.

    `criteria`, one a file, is what its rows were judged by where they do not say it. At most
    `limit` pairs are read, taken from the files in turns, so that a small limit is not spent on the
    first file alone.

    Raises:
        DataError: a file cannot be read, or no usable row is left in all of them together.
    """
    files = _read_files(paths, limit, pair_of)
    pairs = [
        pair if pair.criterion else replace(pair, criterion=criterion)
        for file, criterion in zip(files, criteria or [""] * len(files), strict=True)
        for _, pair in file.kept
    ]
    return pairs, [file.report() for file in files]


def read_prompts(
    paths: Sequence[Path], limit: int | None = None
) -> tuple[list[Prompt], list[ReadReport]]:
    """The distinct prompts of all files in the order of the files, and one report a file.

    A conversation that was read before, from any of the files, is dropped and counted as
    `repeated`: real sets repeat prompts, so that is no fault of the row. An id is the row's own
    `id` or ``<source>/<line>``; one that is taken gets ``#2``, ``#3``, and so on. `limit` works as
    in `read_pairs`.

    Raises:
        DataError: a file cannot be read, or no usable row is left in all of them together.
    """
    files = _read_files(paths, limit, DistinctPrompts())
    return [prompt for file in files for _, prompt in file.kept], [file.report() for file in files]


def read_conversations(
    paths: Sequence[Path], limit: int | None = None
) -> tuple[list[tuple[int, Path, Conversation]], list[ReadReport]]:
    """The usable conversations of all files with the line and file each stands in, in the order of
    the files, and one report a file; `limit` works as in `read_pairs`.

    Raises:
        DataError: a file cannot be read, or no usable row is left in all of them together.
    """
    files = _read_files(paths, limit, conversation_of)
    found = [(line, file.path, item) for file in files for line, item in file.kept]
    return found, [file.report() for file in files]


def iter_scoring_rows(
    path: Path,
) -> Iterator[tuple[int, PreferencePair | SingleCompletion | BadRow]]:
    """Line and row of a file of pairs and single completions, one at a time.

    Raises:
        DataError: the file cannot be read.
    """
    rows: Iterator[tuple[int, PreferencePair | SingleCompletion | BadRow | None]]
    rows = _parsed_rows(path, scoring_row_of)
    for line, row in rows:
        assert row is not None
        yield line, row


def require_scoring_row(path: Path) -> None:
    """Read until the first usable pair or single completion.

    Raises:
        DataError: the file cannot be read or holds no usable row.
    """
    tally = Tally(path)
    for _, row in iter_scoring_rows(path):
        if not isinstance(row, BadRow):
            return
        tally.add(row)
    raise DataError(_nothing_usable([path], tally.rows, path, tally.first))


def folds_by_first_user_turn(pairs: Sequence[PreferencePair], folds: int, seed: int) -> list[int]:
    """A fold, 0 to `folds` - 1, for every pair.

    Real sets repeat prompts: all pairs that open with the same user turn get the same fold. Turns
    are dealt out in the order of a hash, so that folds differ by at most one turn and the order of
    the rows has no say.

    Raises:
        ValueError: there are fewer different first user turns than folds.
    """
    turns = sorted(
        {pair.first_user_turn for pair in pairs}, key=lambda turn: (derive_seed(seed, turn), turn)
    )
    if len(turns) < folds:
        raise ValueError(f"{len(turns)} different first user turns cannot make {folds} folds")
    fold_of = {turn: index % folds for index, turn in enumerate(turns)}
    return [fold_of[pair.first_user_turn] for pair in pairs]


def write_pairs(
    pairs: Sequence[PreferencePair], path: Path, further: pa.Table | None = None
) -> None:
    """Write pairs as Parquet in the conversational format, `PAIR_SCHEMA`, for `read_pairs`.

    `further` has columns to stand after these, a row for each pair; `read_pairs` ignores them. The
    file is written beside and renamed: a reader sees the old one or the whole new one.

    Raises:
        DataError: `path` does not end in ``.parquet`` or cannot be written.
    """
    if path.suffix.lower() != ".parquet":
        raise DataError(f"pairs are written as Parquet: name the file *.parquet, not {path}")
    table = pa.Table.from_pylist([conversational(pair) for pair in pairs], schema=PAIR_SCHEMA)
    if further is not None:
        for column in further.schema:
            table = table.append_column(column, further[column.name])
    with written_beside(path) as beside:
        pq.write_table(table, beside)


def _parsed_rows(
    path: Path, parse: Callable[[Row, str, int], Item | None]
) -> Iterator[tuple[int, Item | BadRow | None]]:
    """Line and item of every row of a file; `parse` is as in `_read_files`."""
    source = source_of(path)
    for line, row in iter_rows(path, FIELDS):
        item: Item | BadRow | None
        try:
            item = row if isinstance(row, BadRow) else parse(row, source, line)
        except ValueError as error:
            item = BadRow(line, str(error))
        yield line, item


class _DataFile(Generic[Item]):
    """One file as it is being read: the rows kept so far, and what became of the others."""

    def __init__(self, path: Path, parse: Callable[[Row, str, int], Item | None]) -> None:
        self.path = path
        self.kept: list[tuple[int, Item]] = []
        self.bad: list[BadRow] = []
        self._repeated = 0
        self._rows = _parsed_rows(path, parse)

    def read_on(self) -> bool:
        """Read until one more row is kept; False when the file has ended."""
        for line, item in self._rows:
            if isinstance(item, BadRow):
                self.bad.append(item)
            elif item is None:
                self._repeated += 1
            else:
                self.kept.append((line, item))
                return True
        return False

    def report(self) -> ReadReport:
        return ReadReport(
            self.path,
            len(self.kept) + len(self.bad) + self._repeated,
            len(self.kept),
            tuple(self.bad),
            self._repeated,
        )


def _read_files(
    paths: Sequence[Path], limit: int | None, parse: Callable[[Row, str, int], Item | None]
) -> list[_DataFile[Item]]:
    """Read all files in turns, a kept row each, until they end or `limit` rows are kept.

    `parse` takes a row, the file's source and the line. It returns None for a repeat and raises
    ValueError with the reason for a bad row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is at least 1, got {limit}")
    files = [_DataFile(path, parse) for path in paths]
    unfinished, kept = list(files), 0
    while unfinished and (limit is None or kept < limit):
        turns = unfinished if limit is None else unfinished[: limit - kept]
        ended = [file for file in turns if not file.read_on()]
        kept += len(turns) - len(ended)
        unfinished = [file for file in unfinished if file not in ended]
    if not kept:
        path, first = next(((file.path, file.bad[0]) for file in files if file.bad), (Path(), None))
        rows = sum(file.report().rows for file in files)
        raise DataError(_nothing_usable(paths, rows, path, first))
    return files


def _nothing_usable(paths: Sequence[Path], rows: int, path: Path, first: BadRow | None) -> str:
    """Why there is nothing to work on; `first` is the first bad row, in the file `path`."""
    if not paths:
        return "no data file was given"
    names = ", ".join(map(str, paths))
    if first is None:
        return f"there are no rows in {names}"
    return (
        f"none of the {rows} rows in {names} can be used; line {first.line} of "
        f"{short_name(path)}: {first.reason}"
    )
