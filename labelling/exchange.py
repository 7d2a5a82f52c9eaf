"""Work and judgements in files: read row by row, written whole.

| name of the file   | work                              | judgements                             |
|--------------------|-----------------------------------|----------------------------------------|
| *.jsonl, *.jsonl.gz| every form of `labelling/forms.py`| "pavlov" in and out, "mt-bench" in     |
| *.parquet          | the same                          | the same, out as `JUDGEMENT_SCHEMA`    |
| *.csv              | the same, in text                 | "mt-bench" in                          |
| *.json             | Label Studio's tasks              | "label-studio" in and out              |

A bad row is data, not a crash: the `ReadReport` names its line (in Label Studio's JSON: the task's
place, from 1) and the reason. A file that cannot be read is a `DataError`; one without any usable
row is not: the report says so.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from labelling.csv_rows import csv_rows
from labelling.forms import judgement_of, judgement_row, vote_of, work_of
from labelling.label_studio import judgements_of_task, read_tasks, tasks_of, work_of_task
from labelling.records import Judgement, Kind, Work
from models.data_files import BadRow, ReadReport, Row, iter_rows, source_of, written_beside
from rlhf.errors import DataError
from rlhf.tables import MESSAGES

Form = Literal["pavlov", "mt-bench", "label-studio"]
"""What a file of judgements holds."""

JUDGEMENT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("pair", pa.string()),
        ("assessor", pa.string()),
        ("kind", pa.string()),
        ("verdicts", pa.map_(pa.string(), pa.string())),
        ("first", pa.string()),
        ("seconds", pa.float64()),
        ("at", pa.float64()),
        ("truth", pa.string()),
        ("repeat", pa.bool_()),
        ("words_a", pa.int64()),
        ("words_b", pa.int64()),
        ("comment", pa.string()),
        ("doubt", pa.string()),
        # The pair itself, in the labelling form; null where its texts are not at hand.
        ("prompt", MESSAGES),
        ("answer_a", pa.string()),
        ("answer_b", pa.string()),
        ("model_a", pa.string()),
        ("model_b", pa.string()),
        ("checkpoint_a", pa.string()),
        ("checkpoint_b", pa.string()),
        ("finished_a", pa.bool_()),
        ("finished_b", pa.bool_()),
        ("source", pa.string()),
        ("priority", pa.float64()),
        ("honeypot", pa.string()),
        ("explanation", pa.string()),
    ]
)

Item = TypeVar("Item")
Kept = TypeVar("Kept")


def read_work(path: Path, *, honeypots: bool = False) -> tuple[list[Work], ReadReport]:
    """The pairs to judge in a file, and what became of its rows.

    Args:
        honeypots: whether pairs whose better answer is known become honeypots, see
            `labelling.forms.work_of`.

    Raises:
        DataError: the file cannot be read.
    """
    source = _source(path)
    if _is_json(path):
        return _kept(
            path,
            _parsed(
                enumerate(read_tasks(path), start=1),
                lambda task: work_of_task(task, source, honeypots=honeypots),
            ),
        )
    return _kept(path, _parsed(_rows(path), lambda row: work_of(row, source, honeypots=honeypots)))


def read_judgements(
    path: Path, form: Form, kinds: Mapping[str, Kind] | None = None
) -> tuple[list[Judgement], ReadReport]:
    """The judgements in a file, and what became of its rows; Label Studio's are annotations.

    Args:
        kinds: where given, of assessors who are known. A row that has one as another kind is bad,
            and so is one that has somebody as another kind than a row before it.

    Raises:
        DataError: the file cannot be read, or its name is not that of a file of this form.
    """
    if form not in get_args(Form):
        raise DataError(f"{form!r} is no form of judgements: {', '.join(get_args(Form))}")
    if _is_json(path) != (form == "label-studio"):
        raise DataError(
            f"{path} is read as {form!r}, but *.json is what Label Studio exports, and nothing "
            "else is; say which form the judgements have, or name the file by it"
        )
    source = _source(path)
    known = None if kinds is None else dict(kinds)

    def of_one_kind(given: Judgement) -> Judgement:
        kind = given.kind if known is None else known.setdefault(given.assessor, given.kind)
        if kind != given.kind:
            raise ValueError(f"{given.assessor[:40]!r} is a {given.kind}, but known as a {kind}")
        return given

    if form == "label-studio":
        found = (
            (place, item)
            for place, task in enumerate(read_tasks(path), start=1)
            for item in judgements_of_task(task, source, place)
        )
        return _kept(path, _parsed(found, of_one_kind))
    parse = judgement_of if form == "pavlov" else vote_of
    return _kept(path, _parsed(_rows(path), lambda row: of_one_kind(parse(row, source))))


def write_judgements(judgements: Sequence[Judgement], path: Path) -> None:
    """Write judgements in the form that the file's name says: see the table above.

    The file is written beside and renamed: a reader sees the old one or the whole new one.

    Raises:
        DataError: the name has none of the endings, the file cannot be written, or a text is not
            valid Unicode.
    """
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            rows = [judgement_row(judgement) for judgement in judgements]
            table = pa.Table.from_pylist(rows, schema=JUDGEMENT_SCHEMA)
            with written_beside(path) as beside:
                pq.write_table(table, beside)
            return
        if name.endswith(".json"):
            text = json.dumps(tasks_of(judgements), ensure_ascii=False, indent=1)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            lines = (json.dumps(judgement_row(each), ensure_ascii=False) for each in judgements)
            text = "".join(f"{line}\n" for line in lines)
        else:
            raise DataError(
                f"judgements are not written as {path.name}: name the file *.jsonl, *.jsonl.gz, "
                "*.parquet, or *.json for Label Studio"
            )
        content = text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path} was not written: a text is not valid Unicode ({error})") from None
    with written_beside(path) as beside:
        # Without a time of writing: the same judgements give the same bytes.
        beside.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)


def _rows(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    return csv_rows(path) if path.suffix.lower() == ".csv" else iter_rows(path)


def _parsed(
    rows: Iterator[tuple[int, Item | BadRow]], parse: Callable[[Item], Kept]
) -> Iterator[Kept | BadRow]:
    for line, row in rows:
        try:
            yield row if isinstance(row, BadRow) else parse(row)
        except ValueError as error:
            yield BadRow(line, str(error))


def _kept(path: Path, found: Iterator[Item | BadRow]) -> tuple[list[Item], ReadReport]:
    kept: list[Item] = []
    bad: list[BadRow] = []
    for item in found:
        if isinstance(item, BadRow):
            bad.append(item)
        else:
            kept.append(item)
    return kept, ReadReport(path, len(kept) + len(bad), len(kept), tuple(bad))


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def _source(path: Path) -> str:
    source = source_of(path)
    ending = next((end for end in (".csv", ".json") if source.lower().endswith(end)), "")
    return source[: -len(ending) or None]
