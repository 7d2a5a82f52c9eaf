"""Pairs, prompts and rows to score: what is read, what is left out and why, and which fold."""

from __future__ import annotations

import gzip
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.data_files import BadRow, ReadReport, iter_rows
from models.preferences import folds_by_first_user_turn, read_pairs, read_prompts, write_pairs
from models.row_forms import (
    FIELDS,
    DistinctPrompts,
    conversation_of,
    pair_of,
    scoring_row_of,
)
from rlhf.errors import DataError
from rlhf.records import Message, PreferencePair, Prompt

Row = dict[str, Any]
GOOD: Row = {"prompt": "Is tea healthy?", "chosen": "In moderation.", "rejected": "Go away."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_rows(path: Path, rows: Sequence[Row | str]) -> Path:
    """A JSON-lines file, compressed if so named; a string is written as it stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def only_pair(path: Path, row: Row) -> PreferencePair:
    pairs, _ = read_pairs([write_rows(path / "set" / "one.jsonl", [row])])
    assert len(pairs) == 1
    return pairs[0]


# Rows that are read


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {**GOOD, "prompt": [user("Is tea healthy?")]},
        {**GOOD, "chosen": [assistant("In moderation.")], "rejected": [assistant("Go away.")]},
        {
            "chosen": [user("Is tea healthy?"), assistant("In moderation.")],
            "rejected": [user("Is tea healthy?"), assistant("Go away.")],
        },
        {
            "prompt": "Is tea healthy?",
            "chosen": [user("Is tea healthy?"), assistant("In moderation.")],
            "rejected": [user("Is tea healthy?"), assistant("Go away.")],
        },
        {
            "chosen": "\n\nHuman: Is tea healthy?\n\nAssistant: In moderation.",
            "rejected": "\n\nHuman: Is tea healthy?\n\nAssistant: Go away.",
        },
        {**GOOD, "prompt": "\n\nHuman: Is tea healthy?\n\nAssistant:"},
        {
            "prompt": "\n\nHuman: Is tea healthy?\n\nAssistant:",
            "chosen": " In moderation.",
            "rejected": " Go away.\r\n",
        },
        {
            "prompt": "\r\n\r\nHuman: Is tea healthy?\r\n\r\nAssistant:",
            "chosen": " In moderation.",
            "rejected": " Go away.",
        },
        {
            "chosen": "\r\n\r\nHuman: Is tea healthy?\r\n\r\nAssistant: In moderation.",
            "rejected": "\r\n\r\nHuman: Is tea healthy?\r\n\r\nAssistant: Go away.",
        },
        {**GOOD, "rank": 2, "weight": None, "score": [1, 2]},
    ],
)
def test_every_form_of_a_pair_gives_the_same_pair(tmp_path: Path, row: Row) -> None:
    expected = PreferencePair(
        (Message("user", "Is tea healthy?"),), "In moderation.", "Go away.", source="set/one"
    )
    assert only_pair(tmp_path, row) == expected


@pytest.mark.parametrize(
    ("fields", "criterion"),
    [
        ({"criterion": "honest"}, "honest"),
        ({"criteria": "helpful"}, "helpful"),
        ({"criteria": ["helpful", "harmless"]}, "helpful, harmless"),
    ],
)
def test_label_weight_source_and_criterion_are_taken_from_the_row(
    tmp_path: Path, fields: Row, criterion: str
) -> None:
    pair = only_pair(tmp_path, {**GOOD, "label": 0.5, "weight": 2, "source": "mine", **fields})
    assert (pair.label, pair.weight, pair.source, pair.criterion) == (0.5, 2.0, "mine", criterion)


@pytest.mark.parametrize(
    ("fields", "finished"),
    [
        ({}, (True, True)),
        ({"chosen_finished": None, "rejected_finished": None}, (True, True)),
        ({"chosen_finished": True, "rejected_finished": False}, (True, False)),
        ({"chosen_finished": False}, (False, True)),
    ],
)
def test_a_reply_is_finished_unless_the_row_says_that_it_was_cut_off(
    tmp_path: Path, fields: Row, finished: tuple[bool, bool]
) -> None:
    pair = only_pair(tmp_path, {**GOOD, **fields})
    assert (pair.chosen_finished, pair.rejected_finished) == finished


def test_jsonl_gzip_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{**GOOD, "prompt": f"question {index}"} for index in range(3000)]
    plain = write_rows(tmp_path / "a.jsonl", rows)
    packed = write_rows(tmp_path / "a.jsonl.gz", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(iter_rows(plain)) == list(enumerate(rows, start=1))
    assert list(iter_rows(packed)) == list(iter_rows(plain))
    assert list(iter_rows(tmp_path / "a.parquet")) == list(iter_rows(plain))


def test_line_separators_inside_a_text_do_not_break_lines(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0cfour"
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps({**GOOD, "chosen": text}, ensure_ascii=False).encode())
    assert read_pairs([path])[0][0].chosen == text


def test_blank_lines_and_a_byte_order_mark_are_no_rows_and_lines_still_count(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n \n{broken\n")
    _, [report] = read_pairs([path])
    assert report == ReadReport(path, rows=2, kept=1, bad=(BadRow(4, "broken JSON"),))


def test_a_reply_after_a_prompt_of_plain_text_keeps_its_space(tmp_path: Path) -> None:
    assert only_pair(tmp_path, {**GOOD, "chosen": " In\r\nmoderation."}).chosen == (
        " In\r\nmoderation."
    )


# Rows that are left out

BAD_PAIRS: list[tuple[Row | str, str]] = [
    ('{"prompt": "cut', "broken JSON"),
    ("[" * 100_000, "broken JSON"),
    ('["a", "list"]', "no JSON object"),
    ("null", "no JSON object"),
    ({**GOOD, "rejected": "In moderation."}, "equal replies"),
    ({**GOOD, "rejected": " In moderation.\n"}, "equal replies"),
    ({**GOOD, "chosen": " \n"}, "empty reply"),
    ({**GOOD, "rejected": [assistant("")]}, "empty reply"),
    (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b",
            "rejected": "\n\nHuman: A\n\nAssistant: c",
        },
        "different prompts",
    ),
    (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("A"), assistant("c")]},
        "different prompts",
    ),
    (
        {
            "prompt": "x",
            "chosen": [user("a"), assistant("b")],
            "rejected": [user("a"), assistant("c")],
        },
        "different prompts",
    ),
    (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: one\n\nAssistant: two",
            "rejected": "\n\nHuman: a\n\nAssistant: three",
        },
        "different prompts",
    ),
    (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b",
            "rejected": "\n\nHuman: a\n\nAssistant: c\n\nHuman: d",
        },
        "transcript that does not end in an assistant turn",
    ),
    (
        {
            "chosen": "\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant: c",
            "rejected": "\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant: d",
        },
        "empty turn in the prompt",
    ),
    ({"prompt": "a", "chosen": "b"}, "no rejected"),
    ({"chosen": "a", "rejected": "b"}, "no prompt"),
    ({**GOOD, "prompt": "  "}, "empty turn in the prompt"),
    (
        {**GOOD, "prompt": "Human: a\n\nAssistant:"},
        "prompt that ends in Assistant: but does not start with a blank line and Human:",
    ),
    (
        {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " ", "rejected": " b"},
        "empty reply",
    ),
    ({**GOOD, "prompt": []}, "prompt that does not end in a user turn"),
    (
        {**GOOD, "prompt": [user("a"), assistant("b")]},
        "prompt that does not end in a user turn",
    ),
    ({**GOOD, "prompt": [{"role": "human", "content": "a"}]}, "unknown role 'human'"),
    ({**GOOD, "prompt": [{"role": "user"}]}, "prompt with a message that lacks a role or content"),
    ({**GOOD, "prompt": [user("a"), "b"]}, "prompt with a message that lacks a role or content"),
    ({**GOOD, "prompt": 7}, "prompt that is neither text nor a list of messages"),
    ({**GOOD, "chosen": {"text": "a"}}, "chosen that is neither text nor a list of messages"),
    ({**GOOD, "chosen": [user("a")]}, "chosen that does not end in an assistant turn"),
    ({**GOOD, "chosen": []}, "chosen that does not end in an assistant turn"),
    ({**GOOD, "chosen": "half a pair \ud83d"}, "chosen that is not valid Unicode"),
    ({**GOOD, "source": 3}, "source that is not text"),
    ({**GOOD, "criteria": {"helpful": 1}}, "criteria that is not text"),
    ({**GOOD, "weight": "heavy"}, "weight that is not a number"),
    ({**GOOD, "weight": True}, "weight that is not a number"),
    ({**GOOD, "weight": -1}, "weight outside 0 to 1,000,000"),
    ({**GOOD, "weight": 1e39}, "weight outside 0 to 1,000,000"),
    ({**GOOD, "margin": 1e39}, "margin outside 0 to 1,000,000"),
    ({**GOOD, "weight": float("nan")}, "weight outside 0 to 1,000,000"),
    ({**GOOD, "weight": 10**400}, "weight that is too large"),
    ({**GOOD, "chosen_finished": 0}, "chosen_finished"),
    ({**GOOD, "rejected_finished": "no"}, "rejected_finished"),
    ({**GOOD, "label": 2}, "label outside 0 to 1"),
    ({**GOOD, "label": float("nan")}, "label outside 0 to 1"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_PAIRS)
def test_a_bad_row_is_left_out_and_reported_by_line_and_reason(
    tmp_path: Path, bad: Row | str, reason: str
) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [GOOD, bad, GOOD])
    pairs, [report] = read_pairs([path])
    assert len(pairs) == report.kept == 2
    assert report.rows == 3
    [row] = report.bad
    assert row.line == 2
    assert row.reason.startswith(reason)


def test_a_line_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "é"}\n'.encode("latin-1") + json.dumps(GOOD).encode())
    assert read_pairs([path])[1][0].bad == (BadRow(1, "text that is not UTF-8"),)


def table_of(rows: Sequence[Row], **columns: pa.Array) -> pa.Table:
    table = pa.Table.from_pylist(list(rows))
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def numbered(count: int) -> list[Row]:
    return [{**GOOD, "prompt": f"question {index}"} for index in range(count)]


@pytest.mark.parametrize("unit", ["ms", "ns"])
def test_a_column_that_no_form_knows_is_not_read(tmp_path: Path, unit: str) -> None:
    # Beyond the year 9999, or of more digits than Python's times have.
    times = pa.array([10**15 + 1] * 5, type=pa.timestamp(unit))
    path = tmp_path / "a.parquet"
    pq.write_table(table_of(numbered(5), when=times), path)
    pairs, [report] = read_pairs([path])
    assert len(pairs) == report.rows == 5 and report.bad == ()
    assert len(read_prompts([path])[0]) == 5


def test_a_value_of_parquet_that_cannot_be_read_costs_its_row_alone(tmp_path: Path) -> None:
    texts = [b"In moderation."] * 3000
    texts[0] = texts[2500] = b"\xff\xfe"
    chosen = pa.array(texts, type=pa.binary()).view(pa.string())
    times = pa.array([10**15 if n == 1030 else 0 for n in range(3000)], type=pa.timestamp("ms"))
    rows = [{"prompt": row["prompt"], "rejected": row["rejected"]} for row in numbered(3000)]
    path = tmp_path / "a.parquet"
    pq.write_table(table_of(rows, chosen=chosen), path)
    pairs, [report] = read_pairs([path])
    assert report.bad == tuple(BadRow(line, "chosen that is not UTF-8") for line in (1, 2501))
    assert [pair.prompt[0].content for pair in pairs[:2]] == ["question 1", "question 2"]
    assert len(pairs) == report.kept == 2998 and report.rows == 3000
    pq.write_table(table_of(numbered(3000), id=times), path)
    found = dict(iter_rows(path))
    assert found[1031] == BadRow(1031, "id that cannot be read")
    assert sum(isinstance(row, BadRow) for row in found.values()) == 1


EVERY_FIELD: list[tuple[Callable[[Row, str, int], object], Row]] = [
    (pair_of, {**GOOD, "label": 0.25, "weight": 2.0, "margin": 0.5, "criterion": "a"}),
    (pair_of, {**GOOD, "criteria": ["a", "b"], "source": "mine"}),
    (pair_of, {**GOOD, "chosen_finished": False, "rejected_finished": False}),
    (scoring_row_of, {"prompt": "a", "completion": "b", "finish_reason": "length"}),
    (scoring_row_of, {"prompt": "a", "completion": "b", "finished": False}),
    (conversation_of, {"messages": [user("a"), assistant("b")]}),
    *(
        (lambda *row: DistinctPrompts()(*row), row)
        for row in (
            {"turns": ["a", "b"]},
            {"question": "a", "id": "mine"},
            {"instruction": "a", "instances": [{"input": "b"}]},
            {"input": "a"},
        )
    ),
]


@pytest.mark.parametrize(("parse", "row"), EVERY_FIELD)
def test_every_field_that_a_form_reads_is_read_of_parquet(
    tmp_path: Path, parse: Callable[[Row, str, int], object], row: Row
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    [(_, found)] = iter_rows(path, FIELDS)
    assert isinstance(found, dict)
    assert parse(found, "set", 1) == parse(row, "set", 1)
    assert found.keys() == row.keys()


def test_rows_of_parquet_without_a_known_column_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"a": 1}] * 3), path)
    with pytest.raises(DataError, match=r"none of the 3 rows .*: no prompt"):
        read_prompts([path])


def test_a_report_reads_as_one_sentence() -> None:
    bad = (BadRow(17, "equal replies"), BadRow(30, "empty reply"), BadRow(90, "equal replies"))
    assert ReadReport(Path("helpful.jsonl.gz"), 1600, 1597, bad).sentence() == (
        "helpful.jsonl.gz: 1600 rows, 3 left out "
        "(2 with equal replies, 1 with empty reply; first at line 17)"
    )
    assert ReadReport(Path("/data/hh/a.jsonl"), 1, 1, ()).sentence() == (
        "hh/a.jsonl: 1 row, none left out"
    )
    assert ReadReport(Path("a.jsonl"), 5, 3, (), repeated=2).sentence() == (
        "a.jsonl: 5 rows, 2 repeated, none left out"
    )


def test_a_report_of_ever_new_reasons_stays_one_sentence() -> None:
    bad = [BadRow(line, f"unknown role {line}") for line in range(1, 1001)]
    often = [BadRow(2000, "empty reply")] * 3
    sentence = ReadReport(Path("a.jsonl"), 2000, 997, (*bad, *often)).sentence()
    assert sentence.startswith("a.jsonl: 2000 rows, 1003 left out (3 with empty reply, 1 with unkn")
    assert sentence.endswith("unknown role 4, 996 with other reasons; first at line 1)")


# Files that cannot be read


def truncated(path: Path) -> Path:
    write_rows(path, [{**GOOD, "prompt": str(random.random())} for _ in range(2000)])
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def damaged(path: Path) -> Path:
    data = bytearray(gzip.compress(json.dumps(GOOD).encode() * 100))
    data[20:30] = bytes(10)
    path.write_bytes(data)
    return path


def containing(data: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return make


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("missing.jsonl", lambda path: path, "there is no data file .* PAVLOV_DATA"),
        ("folder.jsonl", folder, "is not a file; name files one by one"),
        ("pairs.csv", containing(b"a,b\n"), "convert it to JSON lines or Parquet"),
        ("pairs.json.gz", containing(b""), "convert it to JSON lines or Parquet"),
        ("short.jsonl.gz", truncated, "cut short, damaged or not gzip; fetch it again"),
        ("damaged.jsonl.gz", damaged, "cut short, damaged or not gzip; fetch it again"),
        ("plain.jsonl.gz", containing(b'{"a": 1}\n'), "cut short, damaged or not gzip"),
        ("packed.jsonl", containing(gzip.compress(b"{}")), "is compressed; name it"),
        ("text.parquet", containing(b"no parquet"), "cannot be read as Parquet; write it again"),
        ("empty.parquet", containing(b""), "cannot be read as Parquet; write it again"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence_with_the_remedy(
    tmp_path: Path, name: str, make: Callable[[Path], Path], says: str
) -> None:
    path = make(tmp_path / name)
    good = write_rows(tmp_path / "good.jsonl", [GOOD])
    with pytest.raises(DataError, match=says) as caught:
        read_pairs([good, path])
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_usable_row_in_all_files_together_names_the_first_reason(tmp_path: Path) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", ["", "{", "{"])
    good = write_rows(tmp_path / "good.jsonl", [GOOD])
    assert len(read_pairs([bad, good])[0]) == 1
    with pytest.raises(DataError, match=r"none of the 4 rows .* line 2 of .*bad.jsonl: broken"):
        read_pairs([bad, bad])


def test_empty_files_and_no_files_are_data_errors(tmp_path: Path) -> None:
    empty = write_rows(tmp_path / "empty.jsonl.gz", [])
    with pytest.raises(DataError, match=r"there are no rows in .*empty.jsonl.gz"):
        read_pairs([empty])
    with pytest.raises(DataError, match="no data file was given"):
        read_prompts([])


# Limits


def test_a_limit_is_shared_by_the_files_and_filled_from_those_that_have_more(
    tmp_path: Path,
) -> None:
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", [{**GOOD, "prompt": f"{name}{i}"} for i in range(n)])
        for name, n in (("a", 10), ("b", 1), ("c", 10))
    ]
    pairs, reports = read_pairs(paths, limit=6)
    assert [pair.first_user_turn for pair in pairs] == ["a0", "a1", "a2", "b0", "c0", "c1"]
    assert [report.kept for report in reports] == [3, 1, 2]
    assert len(read_pairs(paths, limit=1)[0]) == 1
    assert len(read_pairs(paths, limit=100)[0]) == 21
    with pytest.raises(ValueError, match="limit is at least 1, got 0"):
        read_pairs(paths, limit=0)


# Prompts


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "a"}, "a"),
        ({"prompt": [user("a")]}, "a"),
        ({"prompt": "\n\nHuman: a\n\nAssistant:"}, "a"),
        ({"turns": ["a", "b"]}, "a"),
        ({"question": "a", "answer": "b"}, "a"),
        ({"instruction": "a"}, "a"),
        ({"instruction": "a", "input": ""}, "a"),
        ({"instruction": "a", "input": "b"}, "a\n\nb"),
        ({"instruction": "a", "instances": [{"input": "", "output": "c"}]}, "a"),
        ({"instruction": "a", "instances": [{"input": "b", "output": "c"}]}, "a\n\nb"),
        ({"input": "a", "output_1": "b", "output_2": "c"}, "a"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}, "a"),
        ({**GOOD, "prompt": "a", "rejected": GOOD["chosen"]}, "a"),
    ],
)
def test_every_form_of_a_prompt_is_read(tmp_path: Path, row: Row, text: str) -> None:
    [prompt], _ = read_prompts([write_rows(tmp_path / "set" / "file.jsonl", [row])])
    assert prompt == Prompt("set/file/1", (Message("user", text),), "set/file")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no prompt"),
        ({"turns": []}, "turns that are not a list of texts"),
        ({"turns": [1]}, "turns that is not text"),
        ({"question": ["a"]}, "question that is not text"),
        (
            {"prompt": "Human: a\n\nAssistant:"},
            "prompt that ends in Assistant: but does not start with a blank line and Human:",
        ),
        ({"prompt": [assistant("a")]}, "prompt that does not end in a user turn"),
        ({"prompt": "a", "id": ["b"]}, "id that is not text"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            "different prompts",
        ),
    ],
)
def test_a_row_without_a_usable_prompt_is_reported(tmp_path: Path, row: Row, reason: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "good"}, row])
    assert read_prompts([path])[1][0].bad == (BadRow(2, reason),)


def test_repeated_prompts_are_dropped_and_counted_apart_from_bad_rows(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", [{"prompt": "x"}, {"question": "x"}, {"prompt": "y"}])
    second = write_rows(tmp_path / "b.jsonl", [{"prompt": "x"}, {"prompt": "z"}, {}])
    prompts, reports = read_prompts([first, second])
    assert [prompt.messages[0].content for prompt in prompts] == ["x", "y", "z"]
    assert [report.repeated for report in reports] == [1, 1]
    assert reports[1].bad == (BadRow(3, "no prompt"),)


def test_prompts_keep_their_own_id_and_ids_stay_unique(tmp_path: Path) -> None:
    rows: list[Row | str] = [
        {"prompt": "a", "id": "p"},
        {"prompt": "b", "id": "p"},
        {"prompt": "c", "id": 7},
        {"prompt": "d", "source": "mine"},
    ]
    path = write_rows(tmp_path / "set" / "file.jsonl", rows)
    prompts, _ = read_prompts([path])
    assert [prompt.id for prompt in prompts] == ["p", "p#2", "7", "mine/4"]


# Written and read back

TEXTS = st.text(min_size=1).filter(str.strip)


@st.composite
def preference_pairs(draw: st.DrawFn) -> PreferencePair:
    history = draw(st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), TEXTS)))
    system = [Message("system", "Be kind.")] if draw(st.booleans()) else []
    chosen = draw(TEXTS)
    return PreferencePair(
        (*system, *history, Message("user", draw(TEXTS))),
        chosen,
        draw(TEXTS.filter(lambda text: text.strip() != chosen.strip())),
        label=draw(st.floats(0, 1)),
        weight=draw(st.floats(0, 1e6)),
        source=draw(st.text()),
        criterion=draw(st.sampled_from(["", "helpful", "honest", "harmless"])),
        chosen_finished=draw(st.booleans()),
        rejected_finished=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(preference_pairs(), min_size=1, max_size=5))
def test_pairs_read_back_exactly_as_written(pairs: list[PreferencePair]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "new" / "pairs.parquet"
        write_pairs(pairs, path)
        read, [report] = read_pairs([path])
        assert [file.name for file in path.parent.iterdir()] == ["pairs.parquet"]
    assert read == pairs
    assert report.kept == report.rows == len(pairs)


def test_written_pairs_are_in_the_conversational_format(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    write_pairs([PreferencePair((Message("user", "a"),), "b", "c", criterion="honest")], path)
    assert pq.read_table(path).to_pylist() == [
        {
            "prompt": [user("a")],
            "chosen": [assistant("b")],
            "rejected": [assistant("c")],
            "label": 1.0,
            "weight": 1.0,
            "margin": 0.0,
            "criterion": "honest",
            "source": "",
            "chosen_finished": True,
            "rejected_finished": True,
        }
    ]


def test_pairs_are_written_only_where_they_can_be_read_back(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"name the file \*\.parquet"):
        write_pairs([], tmp_path / "pairs.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_pairs([], tmp_path / "file" / "pairs.parquet")


# Folds

KEYS = st.lists(st.integers(0, 40), max_size=80)


def pairs_of(keys: Sequence[int]) -> list[PreferencePair]:
    """One pair a key; equal keys open with the same user turn and go on differently."""
    return [
        PreferencePair(
            (
                Message("system", f"s{i}"),
                Message("user", f"turn {key}"),
                Message("assistant", "go on"),
                Message("user", f"second {i}"),
            ),
            "chosen",
            "rejected",
        )
        for i, key in enumerate(keys)
    ]


@given(KEYS, st.integers(2, 6), st.integers(0, 5), st.randoms(use_true_random=False))
def test_pairs_that_open_alike_share_a_fold_and_the_order_of_rows_has_no_say(
    keys: list[int], folds: int, seed: int, shuffler: random.Random
) -> None:
    pairs = pairs_of(keys)
    if len(set(keys)) < folds:
        with pytest.raises(ValueError, match=f"cannot make {folds} folds"):
            folds_by_first_user_turn(pairs, folds, seed)
        return
    found = folds_by_first_user_turn(pairs, folds, seed)
    fold_of = dict(zip(keys, found, strict=True))
    assert [fold_of[key] for key in keys] == found
    sizes = Counter(fold_of.values())
    assert set(sizes) == set(range(folds))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    order = shuffler.sample(range(len(keys)), len(keys))
    shuffled = folds_by_first_user_turn([pairs[i] for i in order], folds, seed)
    assert shuffled == [found[i] for i in order]


def test_another_seed_deals_other_folds() -> None:
    pairs = pairs_of(range(1000))
    one, other = (folds_by_first_user_turn(pairs, 5, seed) for seed in (0, 1))
    # Independent deals agree on a fifth: standard deviation 0.013 of the share.
    assert abs(sum(a == b for a, b in zip(one, other, strict=True)) / 1000 - 0.2) < 0.06


# Records


def test_a_pair_names_its_first_user_turn_and_refuses_what_cannot_be_one() -> None:
    pair = pairs_of([3])[0]
    assert pair.first_user_turn == "turn 3"
    with pytest.raises(ValueError, match="does not end in a user turn"):
        PreferencePair((Message("assistant", "a"),), "b", "c")
    with pytest.raises(ValueError, match="label"):
        PreferencePair(pair.prompt, "b", "c", label=1.1)


# Margins and criteria


def test_a_margin_is_read_and_written(tmp_path):
    rows = [{**GOOD, "margin": 1.5}, {**GOOD, "margin": -1}]
    pairs, _ = read_pairs([write_rows(tmp_path / "rows.jsonl", rows)])
    assert [pair.margin for pair in pairs] == [1.5]
    write_pairs(pairs, tmp_path / "again.parquet")
    assert read_pairs([tmp_path / "again.parquet"])[0] == pairs


def test_a_files_criterion_is_that_of_its_rows_that_name_none(tmp_path):
    rows = [GOOD, {**GOOD, "criterion": "honest"}]
    files = [write_rows(tmp_path / name, rows) for name in ("first.jsonl", "second.jsonl")]
    pairs, _ = read_pairs(files, criteria=["helpful", ""])
    assert [pair.criterion for pair in pairs] == ["helpful", "honest", "", "honest"]
