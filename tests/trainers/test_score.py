"""`pavlov score`: its figures, recomputed from the rows that it writes."""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from models.reward_model import RewardModel
from rlhf.errors import DataError
from rlhf.records import Message
from trainers.score import run_score

Row = dict[str, Any]
PAIRS: list[Row] = [
    {"prompt": "Is tea healthy?", "chosen": "It can be.", "rejected": "No.", "source": "tea"},
    {"prompt": "And coffee?", "chosen": "In moderation.", "rejected": "Go away.", "source": "tea"},
    {"prompt": "Rice?", "chosen": "Use less water.", "rejected": "Stir it.", "source": "food"},
    {
        "prompt": "Pasta?",
        "chosen": "Salt the water.",
        "rejected": "The water",
        "rejected_finished": False,
        "source": "food",
    },
]
SINGLES: list[Row] = [
    {"prompt": "Is tea healthy?", "completion": "It can be."},
    {"prompt": "Rice?", "completion": "Use less water."},
]
EQUAL: Row = {"prompt": "Same?", "chosen": "Yes.", "rejected": "Yes."}


@pytest.fixture
def scored(tmp_path: Path, tiny_reward_model: Path):
    """Score rows; returns the summary and the rows that were written."""

    def scored(rows: list[Row]) -> tuple[Row, list[Row]]:
        data, out = tmp_path / "rows.jsonl", tmp_path / "out.parquet"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary = run_score(str(tiny_reward_model), data, out, Console(file=io.StringIO()))
        assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out.parquet"}
        return json.loads(json.dumps(summary)), pq.read_table(out).to_pylist()

    return scored


def test_figures_of_pairs_are_those_of_the_written_rows(scored):
    summary, rows = scored([*PAIRS, EQUAL])
    assert (summary["pairs"], summary["skipped"], summary["members"]) == (4, 1, 3)
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    # The tiny model's members are standardised by 0 and 1: written rewards are raw ones.
    margins = [row["reward_chosen"] - row["reward_rejected"] for row in rows]
    assert summary["accuracy"] == statistics.fmean(margin > 0 for margin in margins)
    assert summary["member_accuracy"] == [
        statistics.fmean(r["rewards_chosen"][k] > r["rewards_rejected"][k] for r in rows)
        for k in range(3)
    ]
    assert {source: figures["pairs"] for source, figures in summary["per_source"].items()} == {
        "tea": 2,
        "food": 2,
    }
    assert summary["per_source"]["tea"]["accuracy"] == statistics.fmean(m > 0 for m in margins[:2])
    for row in rows:
        for side in ("chosen", "rejected"):
            rewards = row[f"rewards_{side}"]
            assert len(rewards) == 3
            assert row[f"reward_{side}"] == pytest.approx(statistics.fmean(rewards), abs=1e-5)
            assert row[f"disagreement_{side}"] == pytest.approx(
                statistics.pstdev(rewards), abs=1e-5
            )
            assert row[f"domain_shift_{side}"] is False


def test_a_reply_that_was_cut_off_is_scored_as_such(scored, tiny_reward_model):
    _, rows = scored(PAIRS)
    prompt = (Message("user", "Pasta?"),)
    model = RewardModel.load(tiny_reward_model)
    as_finished, as_cut_off = model.score(
        [(prompt, "The water", True), (prompt, "The water", False)]
    ).rewards_KN.T.tolist()
    assert rows[3]["rewards_rejected"] == pytest.approx(as_cut_off, abs=1e-4)
    assert rows[3]["rewards_rejected"] != pytest.approx(as_finished, abs=1e-3)


def test_single_completions_have_scores_and_no_accuracy(scored):
    summary, rows = scored(SINGLES)
    assert (summary["pairs"], summary["accuracy"], summary["ece"]) == (0, None, None)
    assert summary["replies"] == 2
    assert summary["flagged_share"] == 0
    assert {"line", "rewards", "reward", "disagreement", "domain_shift"} <= set(rows[0])
    _, pairs = scored(PAIRS)
    assert rows[0]["reward"] == pytest.approx(pairs[0]["reward_chosen"], abs=1e-4)


def test_pairs_and_single_completions_in_one_file_all_keep_their_scores(scored):
    for mixed in ([SINGLES[0], PAIRS[0]], [PAIRS[0], SINGLES[0]]):
        summary, rows = scored(mixed)
        assert (summary["pairs"], summary["replies"]) == (1, 3)
        for given, row in zip(mixed, rows, strict=True):
            names = ["reward_chosen", "reward_rejected"] if "chosen" in given else ["reward"]
            assert [name for name in names if row.get(name) is None] == []


@pytest.mark.parametrize("name", ["out.json", "missing/out.parquet"])
def test_rows_are_written_only_as_parquet_into_a_folder_that_exists(
    tmp_path, tiny_reward_model, name
):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(PAIRS[0]))
    with pytest.raises(DataError, match=r"must be a .parquet file in a folder that exists"):
        run_score(str(tiny_reward_model), data, tmp_path / name, Console(file=io.StringIO()))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_file_without_usable_rows_writes_nothing(tmp_path, tiny_reward_model):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(EQUAL))
    with pytest.raises(DataError, match="equal replies"):
        run_score(str(tiny_reward_model), data, tmp_path / "o.parquet", Console(file=io.StringIO()))
    assert not (tmp_path / "o.parquet").exists()
