"""Pairs, folds and prompts of the real files, counted a second way."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.data_files import BadRow
from models.preferences import folds_by_first_user_turn, read_pairs, read_prompts
from rlhf.records import Message

Row = dict[str, Any]
REPOSITORY = Path(__file__).parents[2]
HH = [
    (f"hh/{name}/{part}.jsonl.gz", rows)
    for name, train, validation in (
        ("harmless-base", 1700, 238),
        ("helpful-base", 1751, 261),
        ("helpful-online", 862, 128),
        ("helpful-rejection-sampled", 2112, 248),
    )
    for part, rows in (("train", train), ("validation", validation))
]


def real_file(name: str) -> Path:
    path = Path(os.environ.get("PAVLOV_DATA") or REPOSITORY / "../shared/data") / name
    if not path.exists():
        pytest.skip(f"no real data: {path} is absent; set PAVLOV_DATA")
    return path


def plain_rows(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file.read().split("\n") if line]


def reasons_by_string_operations(row: Row) -> str | None:
    """What is wrong with an HH row, told from the two strings alone."""
    marker = "\n\nAssistant:"
    chosen_head, _, chosen = row["chosen"].rpartition(marker)
    rejected_head, _, rejected = row["rejected"].rpartition(marker)
    if "\n\nHuman:" in chosen + rejected:
        return "transcript that does not end in an assistant turn"
    if chosen_head != rejected_head:
        return "different prompts"
    if not chosen.strip() or not rejected.strip():
        return "empty reply"
    return "equal replies" if row["chosen"] == row["rejected"] else None


@pytest.mark.parametrize(("name", "num_rows"), HH)
def test_real_pairs_agree_with_a_count_by_string_operations(name: str, num_rows: int) -> None:
    path = real_file(name)
    rows = plain_rows(path)
    pairs, [report] = read_pairs([path])
    found = [(line, reasons_by_string_operations(row)) for line, row in enumerate(rows, start=1)]
    assert report.bad == tuple(BadRow(line, reason) for line, reason in found if reason)
    assert report.rows == len(rows) == num_rows
    usable = [row for row, (_, reason) in zip(rows, found, strict=True) if not reason]
    assert [pair.chosen for pair in pairs] == [
        row["chosen"].rpartition("\n\nAssistant:")[2].strip() for row in usable
    ]
    for pair, row in zip(pairs, usable, strict=True):
        assert row["rejected"].endswith(pair.rejected)
        assert pair.first_user_turn.startswith(
            row["chosen"].removeprefix("\n\nHuman:").split("\n\nAssistant:")[0].strip()
        )


def test_real_pairs_of_all_sets_add_up() -> None:
    _, reports = read_pairs([real_file(name) for name, _ in HH])
    reasons = Counter(row.reason for report in reports for row in report.bad)
    assert sum(report.rows for report in reports) == 6425 + 875
    assert sum(report.kept for report in reports) == 7246
    assert reasons == {
        "equal replies": 29,
        "different prompts": 14,
        "empty reply": 10,
        "transcript that does not end in an assistant turn": 1,
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_real_folds_share_no_first_turn(seed: int) -> None:
    pairs, _ = read_pairs([real_file("hh/helpful-base/train.jsonl.gz")])
    found = folds_by_first_user_turn(pairs, 5, seed)
    # Some conversations repeat, so that pairs are not dealt out quite as evenly as turns.
    assert all(0.15 < count / len(pairs) < 0.25 for count in Counter(found).values())
    assert len({(p.first_user_turn, fold) for p, fold in zip(pairs, found, strict=True)}) == len(
        {p.first_user_turn for p in pairs}
    )


@pytest.mark.parametrize(
    ("name", "text_of"),
    [
        ("prompts/vicuna.jsonl.gz", lambda row: row["turns"][0]),
        ("prompts/mt_bench.jsonl.gz", lambda row: row["turns"][0]),
        ("gsm8k/train.jsonl.gz", lambda row: row["question"]),
        ("llmbar/natural.jsonl.gz", lambda row: row["input"]),
        (
            "self_instruct/seed_tasks.jsonl.gz",
            lambda row: "\n\n".join(
                filter(str.strip, (row["instruction"], row["instances"][0]["input"]))
            ),
        ),
    ],
)
def test_real_prompts_are_the_distinct_texts_of_the_file(
    name: str, text_of: Callable[[Row], str]
) -> None:
    path = real_file(name)
    texts = [text_of(row) for row in plain_rows(path)]
    prompts, [report] = read_prompts([path])
    assert [prompt.messages for prompt in prompts] == [
        (Message("user", text),) for text in dict.fromkeys(texts)
    ]
    assert report.rows == len(texts)
    assert report.bad == ()
    assert report.repeated == len(texts) - len(set(texts))
    assert len({prompt.id for prompt in prompts}) == len(prompts)
