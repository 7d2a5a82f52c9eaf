"""`pavlov score` whole: through Ray Data it says what the reward model says, row by row."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from models.reward_model import RewardModel
from rlhf.records import Message
from tests.two_criteria import build_two_criteria
from trainers.score import run_score

pytestmark = pytest.mark.engine

WORDS = ["water", "rice", "bread", "pasta", "nets", "the river and the town"]


def rows() -> list[object]:
    """Pairs, single completions, and three lines that cannot be used."""
    made: list[object] = []
    for n in range(20):
        prompt, word = f"What about {WORDS[n % 6]}?", WORDS[(n + 1) % 6]
        made.append({"prompt": prompt, "chosen": f"Use {word}.", "rejected": f"No {word} {n}."})
        made.append(
            {"prompt": prompt, "completion": f"Stir the {word} {n}", "finished": n % 2 == 0}
        )
    made[7:7] = ["{broken", {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "only"}]
    return made


def test_every_usable_row_has_the_scores_of_the_model_in_the_files_order(
    tmp_path: Path, tiny_reward_model: Path
):
    reward = build_two_criteria(tmp_path / "reward", tiny_reward_model)
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.parquet"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows()]
    data.write_text("\n".join(lines) + "\n")
    said = io.StringIO()
    summary = run_score(str(reward), data, out, Console(file=said, width=200), "harmless")
    assert (summary["pairs"], summary["replies"], summary["skipped"]) == (20, 60, 3)
    assert summary["criterion"] == "harmless"
    assert "43 rows, 3 left out" in said.getvalue()
    table = pq.read_table(out).to_pylist()
    assert [row["line"] for row in table] == [*range(1, 8), *range(11, 44)]
    model = RewardModel.load(reward)
    place = model.criterion("harmless")
    for row in table:
        given = json.loads(lines[row["line"] - 1])
        prompt = (Message("user", given["prompt"]),)
        texts = (
            {"": (given["completion"], given["finished"])}
            if "completion" in given
            else {"_chosen": (given["chosen"], True), "_rejected": (given["rejected"], True)}
        )
        for suffix, (text, finished) in texts.items():
            scores = model.score([(prompt, text, finished)])
            wanted = scores.criteria_KCN[:, place, 0].tolist()
            assert row[f"rewards{suffix}"] == pytest.approx(wanted, abs=1e-4)
            assert row[f"shift{suffix}"] == pytest.approx(float(scores.shift_N[0]), abs=1e-3)
            parts = dict(row[f"parts{suffix}"])
            assert parts["harmless"] == pytest.approx(row[f"reward{suffix}"], abs=1e-4)
    assert not list(tmp_path.glob(".*"))
