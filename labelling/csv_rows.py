"""CSV files row by row, as `models.data_files` reads JSON lines and Parquet."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from models.data_files import BadRow, Row, check_is_file
from rlhf.errors import DataError

_CELL_CHARACTERS = 1 << 24
_NUMBERS = {"priority", "label", "weight", "margin", "turn", "tstamp"}
_FLAGS = {"finished_a", "finished_b", "chosen_finished", "rejected_finished"}


def csv_rows(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    """Line and row of a CSV file in UTF-8 with a header; a row's line is that it begins at.

    An empty cell is a field that is not given. Cells are text but for those of the columns that
    are known to be numbers, or true and false. Where quotes do not match, one row is bad and the
    rest of the file is not read: nobody can tell where its rows begin.

    Raises:
        DataError: the file is missing or unreadable, or has no header or one that names a column
            twice.
    """
    check_is_file(path)
    # Python's own limit is 128 KiB a cell, for the whole process.
    csv.field_size_limit(max(csv.field_size_limit(), _CELL_CHARACTERS))
    try:
        # What is not UTF-8 spoils its own row alone: surrogates are refused where text is checked.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header: list[str] | None = None
            line = 1
            try:
                for cells in reader:
                    if any(cell.strip() for cell in cells):
                        if header is None:
                            header = _header(path, cells)
                        else:
                            yield line, _row(line, header, cells)
                    line = reader.line_num + 1
            except csv.Error as error:
                reason = f"broken CSV, and nothing after it was read ({error})"
                yield line, BadRow(line, reason)
            else:
                if header is None:
                    raise DataError(f"{path} has no header; its first line names the columns")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _header(path: Path, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise DataError(f"{path} has two columns {twice[0][:40]!r}; rename or remove one")
    return header


def _row(line: int, header: list[str], cells: list[str]) -> Row | BadRow:
    if len(cells) > len(header):
        return BadRow(line, "more cells than the header has columns")
    return {
        name: _value(name, cell)
        for name, cell in zip_longest(header, cells, fillvalue="")
        if cell != ""
    }


def _value(name: str, cell: str) -> object:
    """The cell as what its column holds, or as text for whoever checks it to refuse."""
    if name in _FLAGS and cell.strip().lower() in ("true", "false"):
        return cell.strip().lower() == "true"
    if name in _NUMBERS:
        try:
            return float(cell)
        except ValueError:
            return cell
    return cell
