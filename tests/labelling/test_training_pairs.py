"""What is learned from judgements, and where it comes from."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq
import pytest

from labelling.records import (
    Answer,
    Judgement,
    SoftLabel,
    Work,
)
from labelling.training_pairs import preference_rows, write_preferences
from models.preferences import read_pairs
from rlhf.errors import DataError
from rlhf.records import OVERALL, Message, PreferencePair

TEA = Work(
    (Message("user", "Is tea healthy?"),),
    Answer("In moderation.", "big", "step-40"),
    Answer("Go away.", "small", finished=False),
    source="kitchen",
)


def told(assessor: str, verdict: str, **more: Any) -> Judgement:
    return Judgement("p1", assessor, {OVERALL: verdict, "honest": "a"}, work=TEA, **more)


def test_learned_pairs_prefer_the_likelier_answer_and_say_where_they_come_from(tmp_path):
    said = [told("ben", "b"), told("ann", "b"), told("ann", "a", repeat=True)]
    said += [told("cat", "a", doubt="paused"), told("gpt", "a", kind="model")]
    rows = preference_rows(
        said, {"p1": SoftLabel(0.25, 0.5, judges=2)}, project="tea", method="dawid-skene"
    )
    write_preferences(rows, tmp_path / "learn.parquet")
    pairs, (report,) = read_pairs([tmp_path / "learn.parquet"])
    assert not report.bad
    assert pairs == [
        PreferencePair(
            TEA.prompt,
            chosen="Go away.",
            rejected="In moderation.",
            label=0.75,
            weight=0.5,
            source="kitchen",
            chosen_finished=False,
        )
    ]
    (row,) = pq.read_table(tmp_path / "learn.parquet").to_pylist()
    assert {name: row[name] for name in list(row)[10:]} == {
        "pair": "p1",
        "project": "tea",
        "method": "dawid-skene",
        "kind": "person",
        "assessors": ["ann", "ben"],
        "judgements": 3,
        "judges": 2,
        "chosen_model": "small",
        "rejected_model": "big",
        "chosen_checkpoint": "",
        "rejected_checkpoint": "step-40",
    }


def test_at_one_half_a_is_chosen_and_a_criterion_is_named():
    label = {"p1": SoftLabel(0.5)}
    ((pair, _),) = preference_rows(
        [told("ann", "b")], label, project="tea", method="majority", criterion="honest"
    )
    assert (pair.chosen, pair.label, pair.criterion) == ("In moderation.", 0.5, "honest")


def test_a_labelled_pair_of_which_nothing_counts_is_refused():
    labels = {"p1": SoftLabel(0.9), "p2": SoftLabel(0.1)}
    with pytest.raises(DataError, match=r"1 of 2 labelled pairs .* first 'p2'"):
        preference_rows([told("ann", "a")], labels, project="tea", method="majority")
    with pytest.raises(DataError, match="kind model"):
        preference_rows(
            [told("ann", "a")], {"p1": SoftLabel(1)}, project="tea", method="m", kind="model"
        )
    with pytest.raises(ValueError, match=r"probability 1\.5 outside 0 to 1"):
        SoftLabel(1.5)
