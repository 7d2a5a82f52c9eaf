"""Rows to score, read as a stream: what comes, what is counted, and what is refused at once."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.data_files import BadRow, Tally, count_rows
from models.preferences import iter_scoring_rows, read_pairs, require_scoring_row
from models.row_forms import SingleCompletion
from rlhf.errors import DataError
from rlhf.records import Message, PreferencePair

Row = dict[str, Any]
PROMPT = (Message("user", "a"),)
GOOD: Row = {"prompt": "a", "chosen": "b", "rejected": "c"}
EQUAL: Row = {**GOOD, "rejected": "b"}


def write(path: Path, rows: list[Row | str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_pairs_and_single_completions_come_with_their_lines_and_bad_rows_in_between(tmp_path):
    rows = [
        GOOD,
        "{broken",
        {"prompt": "a", "completion": "b", "finish_reason": "length", "source": "mine"},
        "",
        EQUAL,
        {**GOOD, "completion": "the pair counts"},
        {"completion": "\n\nHuman: a\n\nAssistant: b"},
        {"prompt": "a", "completion": " "},
    ]
    assert list(iter_scoring_rows(write(tmp_path / "set" / "rows.jsonl", rows))) == [
        (1, PreferencePair(PROMPT, "b", "c", source="set/rows")),
        (2, BadRow(2, "broken JSON")),
        (3, SingleCompletion(PROMPT, "b", "mine", finished=False)),
        (5, BadRow(5, "equal replies")),
        (6, PreferencePair(PROMPT, "b", "c", source="set/rows")),
        (7, SingleCompletion(PROMPT, "b", "set/rows")),
        (8, BadRow(8, "empty reply")),
    ]


def test_a_stream_reads_no_further_than_it_is_asked(tmp_path):
    whole = write(tmp_path / "rows.jsonl.gz", [GOOD] * 50_000).read_bytes()
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(whole[:-2000])
    rows = iter_scoring_rows(path)
    assert next(rows)[0] == 1
    with pytest.raises(DataError, match="cut short"):
        list(rows)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_are_counted_good_or_bad_and_blank_lines_are_none(tmp_path, name):
    assert count_rows(write(tmp_path / name, [GOOD, "", "{broken", "  ", EQUAL])) == 3


def test_rows_of_parquet_are_counted_too(tmp_path):
    pq.write_table(pa.Table.from_pylist([GOOD, EQUAL]), tmp_path / "rows.parquet")
    assert count_rows(tmp_path / "rows.parquet") == 2


@pytest.mark.parametrize("name", ["none.jsonl", "rows.csv", "damaged.parquet", "damaged.jsonl.gz"])
def test_what_cannot_be_read_cannot_be_counted(tmp_path, name):
    if not name.startswith("none"):
        (tmp_path / name).write_bytes(b"PAR1 no more")
    with pytest.raises(DataError):
        count_rows(tmp_path / name)


def test_one_usable_row_is_enough(tmp_path):
    require_scoring_row(write(tmp_path / "rows.jsonl", ["{broken", EQUAL, GOOD]))


def test_a_file_without_a_usable_row_is_refused_as_by_the_other_readers(tmp_path):
    path = write(tmp_path / "rows.jsonl", [EQUAL, "{broken"])
    with pytest.raises(DataError) as streamed:
        require_scoring_row(path)
    with pytest.raises(DataError) as read:
        read_pairs([path])
    assert str(streamed.value) == str(read.value)
    assert "none of the 2 rows" in str(streamed.value)
    assert "line 1" in str(streamed.value)
    with pytest.raises(DataError, match="there are no rows in"):
        require_scoring_row(write(tmp_path / "empty.jsonl", [""]))


def test_a_tally_says_what_a_report_says(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD, EQUAL, "{broken", EQUAL])
    tally = Tally(path)
    for _, row in iter_scoring_rows(path):
        tally.add(row if isinstance(row, BadRow) else None)
    _, [report] = read_pairs([path])
    assert tally.sentence() == report.sentence()
    assert (tally.rows, tally.bad) == (4, 3)
