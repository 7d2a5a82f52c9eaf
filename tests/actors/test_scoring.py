"""The scoring actor, built directly: what it says of rows is what the reward model says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors.scoring import READ_ROWS, ROWS_SCHEMA, SCORES_SCHEMA, ScoringActor, read_tables
from models.reward_model import RewardModel
from rlhf.errors import DataError, ModelError
from rlhf.records import Message
from tests.two_criteria import COMBINATION, build_two_criteria

Row = dict[str, Any]
PAIR: Row = {"prompt": "Is tea healthy?", "chosen": "It can be.", "rejected": "No.", "weight": 2}
CUT_OFF: Row = {**PAIR, "rejected_finished": False, "criterion": "harmless"}
SINGLE: Row = {"prompt": "Rice?", "completion": "What a great question! Use less water."}
EQUAL: Row = {"prompt": "Same?", "chosen": "Yes.", "rejected": "Yes."}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_reward_model: Path) -> Path:
    return build_two_criteria(tmp_path_factory.mktemp("two") / "reward", tiny_reward_model)


def tables(folder: Path, rows: list[Row]) -> Iterator[pa.Table]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_tables(path)


def scored(actor: ScoringActor, folder: Path, rows: list[Row]) -> list[Row]:
    [table] = tables(folder, rows)
    said = actor(table)
    assert said.schema == SCORES_SCHEMA
    return said.to_pylist()


def test_rows_are_read_a_few_at_a_time_and_bad_ones_keep_their_place(tmp_path):
    parts = list(tables(tmp_path, [PAIR, EQUAL] * READ_ROWS))
    assert [part.num_rows for part in parts] == [READ_ROWS, READ_ROWS]
    assert all(part.schema == ROWS_SCHEMA for part in parts)
    rows = [row for part in parts for row in part.to_pylist()]
    assert [row["line"] for row in rows] == list(range(1, 2 * READ_ROWS + 1))
    assert [row["bad"] for row in rows] == [None, "equal replies"] * READ_ROWS
    assert rows[0]["replies"] == [
        {"text": "It can be.", "finished": True},
        {"text": "No.", "finished": True},
    ]


def test_a_damaged_file_is_an_error_where_it_is_read(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be unpacked"):
        list(read_tables(tmp_path / "rows.jsonl.gz"))


def test_every_reply_gets_what_the_reward_model_says_of_it_in_the_files_order(tmp_path, model):
    rows = scored(ScoringActor(str(model)), tmp_path, [CUT_OFF, EQUAL, SINGLE, PAIR])
    assert [(row["line"], row["bad"]) for row in rows] == [
        (1, None),
        (2, "equal replies"),
        (3, None),
        (4, None),
    ]
    assert [len(row["replies"]) for row in rows] == [2, 0, 1, 2]
    tea, rice = (Message("user", PAIR["prompt"]),), (Message("user", SINGLE["prompt"]),)
    wanted = RewardModel.load(model).score(
        [
            (tea, "It can be.", True),
            (tea, "No.", False),
            (rice, SINGLE["completion"], True),
            (tea, "It can be.", True),
            (tea, "No.", True),
        ]
    )
    replies = [reply for row in rows for reply in row["replies"]]
    for n, reply in enumerate(replies):
        assert reply["rewards"] == pytest.approx(wanted.rewards_KN[:, n].tolist(), abs=1e-5)
        assert reply["reward"] == pytest.approx(float(wanted.rewards_KN[:, n].mean()), abs=1e-5)
        assert reply["disagreement"] == pytest.approx(float(wanted.disagreement_N[n]), abs=1e-5)
        assert reply["distance"] == pytest.approx(float(wanted.distance_N[n]), rel=1e-5)
        assert reply["shift"] == pytest.approx(float(wanted.shift_N[n]), rel=1e-5)
        assert dict(reply["parts"]) == pytest.approx(
            dict(zip(COMBINATION, wanted.criteria_KCN[:, :, n].mean(dim=0).tolist(), strict=True)),
            abs=1e-5,
        )
    # A reply that was cut off is another one than the same reply finished.
    assert replies[1]["rewards"] != pytest.approx(replies[4]["rewards"], abs=1e-3)
    assert [reply["text_flags"] for reply in replies] == [[], [], ["flattery"], [], []]


def test_the_reward_is_the_stated_combination_of_the_parts(tmp_path, model):
    [row] = scored(ScoringActor(str(model)), tmp_path, [PAIR])
    for reply in row["replies"]:
        parts = dict(reply["parts"])
        # Combined deviations are 1 in this model: nothing is standardised again.
        assert reply["reward"] == pytest.approx(
            sum(weight * parts[name] for name, weight in COMBINATION.items()), abs=1e-5
        )


def test_a_criterion_gives_the_rewards_and_the_combination_all_the_rest(tmp_path, model):
    [combined] = scored(ScoringActor(str(model)), tmp_path, [PAIR])
    [harmless] = scored(ScoringActor(str(model), "harmless"), tmp_path, [PAIR])
    prompt = (Message("user", PAIR["prompt"]),)
    own = RewardModel.load(model).score([(prompt, "It can be.", True)]).criteria_KCN[:, 1, 0]
    first, other = harmless["replies"][0], combined["replies"][0]
    assert first["rewards"] == pytest.approx(own.tolist(), abs=1e-5)
    assert first["reward"] == pytest.approx(dict(other["parts"])["harmless"], abs=1e-5)
    assert first["reward"] != pytest.approx(other["reward"], abs=1e-3)
    for name in ("parts", "disagreement", "distance", "shift", "domain_shift"):
        assert first[name] == other[name]


def test_a_pairs_own_margins_are_by_the_heads_of_its_criterion(tmp_path, model):
    rows = scored(ScoringActor(str(model)), tmp_path, [CUT_OFF, PAIR, {**PAIR, "criterion": "x"}])
    prompt = (Message("user", PAIR["prompt"]),)
    wanted = (
        RewardModel.load(model)
        .score([(prompt, "It can be.", True), (prompt, "No.", False)])
        .criteria_KCN
    )
    margins = (wanted[:, 1, 0] - wanted[:, 1, 1]).tolist()
    assert rows[0]["own_margins"] == pytest.approx(margins, abs=1e-5)
    # Pairs that name no criterion are `overall`, which this model has no heads for.
    assert [row["own_margins"] for row in rows[1:]] == [None, None]


def test_a_pair_that_names_no_criterion_is_overall(tmp_path, tiny_reward_model):
    [row] = scored(ScoringActor(str(tiny_reward_model)), tmp_path, [PAIR])
    chosen, rejected = (reply["rewards"] for reply in row["replies"])
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    assert row["own_margins"] == pytest.approx(margins, abs=1e-5)


def test_a_threshold_flags_what_lies_beyond_it(tmp_path, tiny_reward_model, model):
    rows = scored(ScoringActor(str(model)), tmp_path, [PAIR, SINGLE])
    shifts = [reply["shift"] for row in rows for reply in row["replies"]]
    assert not any(reply["domain_shift"] for row in rows for reply in row["replies"])
    between = (sorted(shifts)[0] + sorted(shifts)[1]) / 2
    strict = build_two_criteria(tmp_path / "strict", tiny_reward_model, threshold=between)
    again = scored(ScoringActor(str(strict)), tmp_path, [PAIR, SINGLE])
    flags = [reply["domain_shift"] for row in again for reply in row["replies"]]
    assert flags == [shift > between for shift in shifts]
    assert sum(flags) == 2


def test_a_row_that_cannot_be_tokenised_is_refused_and_the_others_are_scored(tmp_path, model):
    [table] = tables(tmp_path, [PAIR, SINGLE])
    rows = table.to_pylist()
    rows[0]["replies"][1]["text"] = ""
    said = ScoringActor(str(model))(pa.Table.from_pylist(rows, schema=ROWS_SCHEMA)).to_pylist()
    assert [row["refused"] for row in said] == ["an empty reply cannot be scored", None]
    assert [len(row["replies"]) for row in said] == [0, 1]
    [alone] = scored(ScoringActor(str(model)), tmp_path, [SINGLE])
    assert said[1]["replies"][0]["reward"] == pytest.approx(alone["replies"][0]["reward"], abs=1e-5)


def test_a_batch_of_bad_rows_alone_is_no_error(tmp_path, model):
    [row] = scored(ScoringActor(str(model)), tmp_path, [EQUAL])
    assert (row["bad"], row["replies"], row["refused"]) == ("equal replies", [], None)


def test_another_backbone_than_in_training_is_refused_by_the_first_batch(
    tmp_path, tiny_reward_model
):
    folder = build_two_criteria(tmp_path / "other", tiny_reward_model)
    card = json.loads((folder / "reward.json").read_text())
    card["banks"][0]["model_fingerprint"] = "another"
    (folder / "reward.json").write_text(json.dumps(card))
    [table] = tables(tmp_path, [PAIR])
    actor = ScoringActor(str(folder))
    with pytest.raises(ModelError, match="with fingerprint another, but the model there now has"):
        actor(table)
