"""Preference pairs, prompts and rows to score: read from files row by row, written as Parquet.

A bad row is data, not a crash: it is left out, and the file's `ReadReport` names its line and the
reason. A file that cannot be read, or files without any usable row, are a `DataError`.

| form of a row       | fields                                                      | gives        |
|---------------------|-------------------------------------------------------------|--------------|
| conversational pair | prompt, chosen, rejected, each text or a list of messages   | pair, prompt |
| the same, implicit  | chosen, rejected: messages from the first turn to the reply | pair, prompt |
| raw HH-RLHF         | chosen, rejected: transcripts, see `models/transcripts.py`  | pair, prompt |
| single completion   | prompt, completion, each text or a list of messages         | row to score |
| MT-Bench, Vicuna    | turns: the first one is taken                               | prompt       |
| GSM8K               | question                                                    | prompt       |
| Self-Instruct       | instruction, with its input below it where there is one     | prompt       |
| LLMBar              | input                                                       | prompt       |

A pair may carry label, weight, margin, criterion (or criteria), source, chosen_finished and
rejected_finished, a single completion source and finished (or finish_reason); any other field is
ignored.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from models.transcripts import is_transcript, parse_prompt, split_reply
from rlhf.errors import DataError
from rlhf.records import Message, PreferencePair, Prompt
from rlhf.seeding import derive_seed

SUFFIXES = (".jsonl.gz", ".jsonl", ".parquet")
"""What data files are called."""

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

PAIR_SCHEMA = pa.schema(
    [
        ("prompt", _MESSAGES),
        ("chosen", _MESSAGES),
        ("rejected", _MESSAGES),
        ("label", pa.float64()),
        ("weight", pa.float64()),
        ("margin", pa.float64()),
        ("criterion", pa.string()),
        ("source", pa.string()),
        ("chosen_finished", pa.bool_()),
        ("rejected_finished", pa.bool_()),
    ]
)

Row = dict[str, Any]
Item = TypeVar("Item")


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
        """One line for people.

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


@dataclass(frozen=True, slots=True)
class SingleCompletion:
    """A reply to score that stands alone; one that was cut off at a limit is not finished."""

    prompt: tuple[Message, ...]
    completion: str
    source: str = ""
    finished: bool = True


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
    files = _read_files(paths, limit, _pair)
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
    files = _read_files(paths, limit, _DistinctPrompts())
    return [prompt for file in files for _, prompt in file.kept], [file.report() for file in files]


def read_scoring_rows(
    path: Path,
) -> tuple[list[tuple[int, PreferencePair | SingleCompletion]], ReadReport]:
    """The pairs and single completions of one file, each with its line, and the report.

    Raises:
        DataError: the file cannot be read or holds no usable row.
    """
    files: list[_DataFile[PreferencePair | SingleCompletion]]
    files = _read_files([path], None, _scoring_row)
    [file] = files
    return file.kept, file.report()


def iter_scoring_rows(
    path: Path,
) -> Iterator[tuple[int, PreferencePair | SingleCompletion | BadRow]]:
    """Line and row of a file of pairs and single completions, one at a time.

    Raises:
        DataError: the file cannot be read.
    """
    rows: Iterator[tuple[int, PreferencePair | SingleCompletion | BadRow | None]]
    rows = _parsed_rows(path, _scoring_row)
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


def count_rows(path: Path) -> int:
    """Rows of a data file, good or bad, without parsing them.

    Raises:
        DataError: as `iter_rows`.
    """
    if _checked_suffix(path) != ".parquet":
        return sum(1 for _ in _lines(path))
    with _reading_parquet(path), pq.ParquetFile(path) as file:
        return int(file.metadata.num_rows)


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


def write_pairs(pairs: Sequence[PreferencePair], path: Path) -> None:
    """Write pairs as Parquet in the conversational format, `PAIR_SCHEMA`, for `read_pairs`.

    The file is written beside and renamed: a reader sees the old one or the whole new one.

    Raises:
        DataError: `path` does not end in ``.parquet`` or cannot be written.
    """
    if path.suffix.lower() != ".parquet":
        raise DataError(f"pairs are written as Parquet: name the file *.parquet, not {path}")
    table = pa.Table.from_pylist([_conversational(pair) for pair in pairs], schema=PAIR_SCHEMA)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, partial)
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None


def iter_rows(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    """Line number and row of a data file; a line that is no JSON object comes as a `BadRow`.

    Raises:
        DataError: the file is missing, unreadable, damaged, or of another kind.
    """
    yield from _parquet_rows(path) if _checked_suffix(path) == ".parquet" else _json_rows(path)


# Files


def _checked_suffix(path: Path) -> str:
    _check_is_file(path)
    if suffix := _suffix(path):
        return suffix
    raise DataError(
        f"{path} is not a data file that can be read; convert it to JSON lines or Parquet and "
        f"name it {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    )


def _check_is_file(path: Path) -> None:
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


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    with _reading_parquet(path), pq.ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=1024)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from enumerate(rows, start=1)


@contextmanager
def _reading_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read as Parquet; write it again ({reason})") from None


def _suffix(path: Path) -> str:
    """Which of `SUFFIXES` the file has, empty if none."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def _short_name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}".lstrip("/")


def _source(path: Path) -> str:
    """Parent folder and name of a file, e.g. ``helpful-base/train``."""
    return _short_name(path.absolute())[: -len(_suffix(path)) or None]


def _parsed_rows(
    path: Path, parse: Callable[[Row, str, int], Item | None]
) -> Iterator[tuple[int, Item | BadRow | None]]:
    """Line and item of every row of a file; `parse` is as in `_read_files`."""
    source = _source(path)
    for line, row in iter_rows(path):
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
        f"{_short_name(path)}: {first.reason}"
    )


def _sentence(
    path: Path, rows: int, reasons: Mapping[str, int], first: BadRow | None, repeated: int = 0
) -> str:
    text = f"{_short_name(path)}: {rows} row{'' if rows == 1 else 's'}"
    if repeated:
        text += f", {repeated} repeated"
    if first is None:
        return f"{text}, none left out"
    counts = ", ".join(f"{count} with {reason}" for reason, count in Counter(reasons).most_common())
    return f"{text}, {sum(reasons.values())} left out ({counts}; first at line {first.line})"


# Rows: each function returns what the row says or raises ValueError with the reason


def _pair(row: Row, source: str, line: int) -> PreferencePair:
    prompt, chosen, rejected = _prompt_and_replies(row)
    if not chosen.strip() or not rejected.strip():
        raise ValueError("empty reply")
    if chosen.strip() == rejected.strip():
        raise ValueError("equal replies")
    return PreferencePair(
        _checked_prompt(prompt),
        chosen,
        rejected,
        label=_number(row, "label", default=1.0),
        weight=_number(row, "weight", default=1.0),
        margin=_number(row, "margin", default=0.0),
        source=_optional_text(row, "source", source),
        criterion=_criterion(row),
        chosen_finished=_flag(row, "chosen_finished", default=True),
        rejected_finished=_flag(row, "rejected_finished", default=True),
    )


def _scoring_row(row: Row, source: str, line: int) -> PreferencePair | SingleCompletion:
    if row.get("completion") is None or row.get("chosen") is not None:
        return _pair(row, source, line)
    turns, completion = _reply(row, "completion")
    if not completion.strip():
        raise ValueError("empty reply")
    prompt = _checked_prompt(_one_prompt(row, turns))
    finished = _flag(row, "finished", default=row.get("finish_reason") != "length")
    return SingleCompletion(prompt, completion, _optional_text(row, "source", source), finished)


class _DistinctPrompts:
    """Parses prompts and knows those it has parsed before."""

    def __init__(self) -> None:
        self._conversations: set[tuple[Message, ...]] = set()
        self._ids: set[str] = set()

    def __call__(self, row: Row, source: str, line: int) -> Prompt | None:
        messages = _checked_prompt(_prompt_of_any_form(row))
        source = _optional_text(row, "source", source)
        own_id = row.get("id")
        wanted = str(own_id) if isinstance(own_id, int) else _optional_text(row, "id")
        if messages in self._conversations:
            return None
        self._conversations.add(messages)
        return Prompt(self._free_id(wanted or f"{source}/{line}"), messages, source)

    def _free_id(self, wanted: str) -> str:
        free, count = wanted, 1
        while free in self._ids:
            count += 1
            free = f"{wanted}#{count}"
        self._ids.add(free)
        return free


def _prompt_of_any_form(row: Row) -> tuple[Message, ...]:
    if row.get("prompt") is not None:
        return _conversation(row["prompt"])
    if row.get("turns") is not None:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError("turns that are not a list of texts")
        return (Message("user", _text(turns[0], "turns")),)
    if row.get("question") is not None:
        return (Message("user", _text(row["question"], "question")),)
    if row.get("instruction") is not None:
        return (Message("user", _instruction(row)),)
    if row.get("input") is not None:
        return (Message("user", _text(row["input"], "input")),)
    if row.get("chosen") is not None:
        return _prompt_and_replies(row)[0]
    raise ValueError("no prompt")


def _instruction(row: Row) -> str:
    """The instruction and, below it, the (first) input that it speaks of."""
    instruction = _text(row["instruction"], "instruction")
    given = row.get("input")
    match row.get("instances"):
        case [{"input": first}, *_] if given is None:
            given = first
    if given is None or not _text(given, "input").strip():
        return instruction
    return f"{instruction}\n\n{given}"


def _prompt_and_replies(row: Row) -> tuple[tuple[Message, ...], str, str]:
    chosen_turns, chosen = _reply(row, "chosen")
    rejected_turns, rejected = _reply(row, "rejected")
    if chosen_turns != rejected_turns:
        raise ValueError("different prompts")
    return _one_prompt(row, chosen_turns), chosen, rejected


def _reply(row: Row, name: str) -> tuple[tuple[Message, ...], str]:
    """The reply in a field, and the turns that the field holds before it, often none."""
    value = row.get(name)
    if value is None:
        raise ValueError(f"no {name}")
    if isinstance(value, str):
        text = _text(value, name)
        return split_reply(text) if is_transcript(text) else ((), text)
    messages = _messages(value, name)
    if not messages or messages[-1].role != "assistant":
        raise ValueError(f"{name} that does not end in an assistant turn")
    return messages[:-1], messages[-1].content


def _one_prompt(row: Row, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The row's prompt: its own field, or the turns before the reply; both must agree."""
    if row.get("prompt") is None:
        if not turns:
            raise ValueError("no prompt")
        return turns
    prompt = _conversation(row["prompt"])
    if turns and turns != prompt:
        raise ValueError("different prompts")
    return prompt


def _conversation(value: object) -> tuple[Message, ...]:
    if isinstance(value, str):
        text = _text(value, "prompt")
        return parse_prompt(text) if is_transcript(text) else (Message("user", text),)
    return _messages(value, "prompt")


def _messages(value: object, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name} that is neither text nor a list of messages")
    return tuple(_message(item, name) for item in value)


def _message(value: object, name: str) -> Message:
    match value:
        case {"role": "system" | "user" | "assistant" as role, "content": str() as content}:
            return Message(role, _text(content, name))
        case {"role": str() as role, "content": str()}:
            raise ValueError(f"unknown role {role[:20]!r}")
    raise ValueError(f"{name} with a message that lacks a role or content in text")


def _checked_prompt(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages or messages[-1].role != "user":
        raise ValueError("prompt that does not end in a user turn")
    if not all(message.content.strip() for message in messages):
        raise ValueError("empty turn in the prompt")
    return messages


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} that is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} that is not valid Unicode") from None
    return value


def _optional_text(row: Row, name: str, default: str = "") -> str:
    return default if row.get(name) is None else _text(row[name], name)


def _number(row: Row, name: str, default: float) -> float:
    """A number; whether it is in range is for `PreferencePair` to say."""
    value = row.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} that is not a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} that is too large") from None


def _flag(row: Row, name: str, default: bool) -> bool:
    value = row.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{name} that is neither true nor false")
    return value


def _criterion(row: Row) -> str:
    """`criterion`, or `criteria`: one name, or a list of names."""
    criteria = row.get("criteria")
    if row.get("criterion") is not None or not isinstance(criteria, list):
        return _optional_text(row, "criterion", _optional_text(row, "criteria"))
    return ", ".join(_text(name, "criteria") for name in criteria)


def _conversational(pair: PreferencePair) -> Row:
    return {
        "prompt": [{"role": turn.role, "content": turn.content} for turn in pair.prompt],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "label": pair.label,
        "weight": pair.weight,
        "margin": pair.margin,
        "criterion": pair.criterion,
        "source": pair.source,
        "chosen_finished": pair.chosen_finished,
        "rejected_finished": pair.rejected_finished,
    }
