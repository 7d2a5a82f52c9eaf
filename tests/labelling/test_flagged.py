import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from labelling.flagged import flagged_work
from rlhf.errors import DataError
from rlhf.tables import ROLLOUT_SCHEMA


def row(step, group, text, reward=0.0, shift=0.0, flagged=False, ended="stop"):
    turns = [{"role": "user", "content": f"question {group}"}]
    return {
        "step": step,
        "group": group,
        "messages": turns,
        "completion": text,
        "finish_reason": ended,
        "newest_version": step,
        "reward": reward,
        "shift": shift,
        "domain_shift": flagged,
    }


def run(folder, *steps):
    (folder / "rollouts").mkdir(parents=True)
    for step, rows in enumerate(steps):
        table = pa.Table.from_pylist(rows, schema=ROLLOUT_SCHEMA)
        pq.write_table(table, folder / "rollouts" / f"step-{step:06d}.parquet")
    return folder


def test_a_flagged_completion_stands_beside_its_best_sibling_furthest_out_first(tmp_path):
    folder = run(
        tmp_path / "rl",
        [
            row(0, 0, "odd", shift=2.0, flagged=True, ended="length"),
            row(0, 0, "good", reward=1.0),
            row(0, 0, "better", reward=2.0),
            row(0, 1, "fine"),
        ],
        [
            row(1, 2, "far", shift=5.0, flagged=True),
            row(1, 2, "further", shift=7.0, flagged=True),
            row(1, 2, "   "),
        ],
    )
    found, _ = flagged_work(folder)
    assert [(w.a.text, w.b.text, w.priority) for w in found] == [
        ("further", "far", 7.0),
        ("far", "further", 5.0),
        ("odd", "better", 2.0),
    ]
    assert found[2].prompt[0].content == "question 0"
    assert not found[2].a.finished and found[2].a.checkpoint == "version 0"
    assert found[2].source == "rl, flagged in step 0"
    assert flagged_work(folder, 1) == (found[:1], 0)


def test_a_completion_that_no_database_keeps_costs_itself_alone(tmp_path):
    rows = [row(0, 0, "a\x00b", flagged=True), row(0, 0, "fine"), row(0, 1, "odd", flagged=True)]
    works, left_out = flagged_work(run(tmp_path / "rl", [*rows, row(0, 1, "good")]))
    assert ([work.a.text for work in works], left_out) == (["odd"], 1)


def test_a_run_without_anything_flagged_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no rollouts"):
        flagged_work(tmp_path)
    alike = [row(0, 0, "same", flagged=True), row(0, 0, "same"), row(0, 1, "x"), row(0, 1, "y")]
    with pytest.raises(DataError, match="nothing was flagged"):
        flagged_work(run(tmp_path / "rl", alike))
