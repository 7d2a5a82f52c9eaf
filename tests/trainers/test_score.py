"""`pavlov score` but for Ray: its figures, recomputed from the reward model and from its rows."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from actors.scoring import SCORES_SCHEMA, ScoringActor, read_tables
from models.reward_model import RewardModel
from rlhf.calibration import pair_figures
from rlhf.errors import DataError, ModelError
from rlhf.records import Message
from tests.conftest import CHATML, build_tiny_model
from tests.two_criteria import TEMPERATURE, build_two_criteria
from trainers.score import ROW_GROUP, Summary, collect, run_score

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


def score(
    reward: Path,
    rows: list[Row],
    folder: Path,
    criterion: str | None = None,
    console: Console | None = None,
) -> tuple[Row, list[Row]]:
    """Score rows as `pavlov score` does, in this process; the summary and what was written."""
    data, out = folder / "rows.jsonl", folder / "out.parquet"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = Summary(RewardModel.load(reward).card, data, criterion)
    scores = map(ScoringActor(str(reward), criterion), read_tables(data))
    collect(scores, summary, out, console or Console(file=io.StringIO()), len(rows))
    assert {path.name for path in folder.iterdir()} == {"rows.jsonl", "out.parquet"}
    return json.loads(json.dumps(summary.figures())), pq.read_table(out).to_pylist()


@pytest.fixture
def scored(tmp_path: Path, tiny_reward_model: Path):
    return partial(score, tiny_reward_model, folder=tmp_path)


@pytest.fixture(scope="module")
def two_criteria(tmp_path_factory: pytest.TempPathFactory, tiny_reward_model: Path) -> Path:
    return build_two_criteria(tmp_path_factory.mktemp("two") / "reward", tiny_reward_model)


def test_figures_of_pairs_are_those_of_the_written_rows(scored):
    summary, rows = scored([*PAIRS, EQUAL])
    assert (summary["pairs"], summary["skipped"], summary["members"]) == (4, 1, 4)
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    # The tiny model's members are standardised by 0 and 1: written rewards are raw ones.
    margins = [row["reward_chosen"] - row["reward_rejected"] for row in rows]
    assert summary["accuracy"] == statistics.fmean(margin > 0 for margin in margins)
    assert summary["member_accuracy"] == [
        statistics.fmean(r["rewards_chosen"][k] > r["rewards_rejected"][k] for r in rows)
        for k in range(4)
    ]
    assert {source: figures["pairs"] for source, figures in summary["per_source"].items()} == {
        "tea": 2,
        "food": 2,
    }
    assert summary["per_source"]["tea"]["accuracy"] == statistics.fmean(m > 0 for m in margins[:2])
    for row in rows:
        for side in ("chosen", "rejected"):
            rewards = row[f"rewards_{side}"]
            assert len(rewards) == 4
            assert row[f"reward_{side}"] == pytest.approx(statistics.fmean(rewards), abs=1e-5)
            # Two members on either family of features.
            within = [statistics.pstdev(rewards[:2]), statistics.pstdev(rewards[2:])]
            assert row[f"disagreement_{side}"] == pytest.approx(statistics.fmean(within), abs=1e-5)
            assert row[f"domain_shift_{side}"] is False


def margins_of(model: RewardModel, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Margins by the reward (K, N) and by every criterion (K, C, N)."""
    replies = [
        ((Message("user", row["prompt"]),), row[side], row.get(f"{side}_finished", True))
        for side in ("chosen", "rejected")
        for row in rows
    ]
    said = model.score(replies)
    (chosen_KN, rejected_KN), (chosen_KCN, rejected_KCN) = (
        values.chunk(2, dim=-1) for values in (said.rewards_KN, said.criteria_KCN)
    )
    return chosen_KN - rejected_KN, chosen_KCN - rejected_KCN


def assert_same_figures(found: Row, wanted: Row) -> None:
    assert found["pairs"] == wanted["pairs"]
    for name in ("accuracy", "accuracy_low", "accuracy_high", "ece", "member_accuracy"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-4), name


def test_labels_weights_and_ties_count_as_in_the_figures_of_a_card(scored, tiny_reward_model):
    rows = [
        {**PAIRS[0], "label": 0.2},
        {**PAIRS[1], "weight": 3.0},
        {**PAIRS[2], "label": 0.5},
        {**PAIRS[3], "weight": 0.0},
        {**PAIRS[3], "label": 0.9, "weight": 0.5},
    ]
    summary, _ = scored(rows)
    margins_KN, _ = margins_of(RewardModel.load(tiny_reward_model), rows)
    wanted = pair_figures(
        margins_KN,
        1.0,
        torch.tensor([row.get("label", 1.0) for row in rows]),
        torch.tensor([row.get("weight", 1.0) for row in rows]),
    )
    assert summary["ties"] == 1
    assert_same_figures(summary, wanted)


def test_where_every_pair_is_a_tie_nobody_is_right_or_wrong(scored):
    summary, _ = scored([{**PAIRS[0], "label": 0.5}])
    assert (summary["pairs"], summary["accuracy"], summary["member_accuracy"]) == (1, None, [])
    assert summary["ece"] is not None


def test_a_file_that_names_criteria_is_judged_by_the_reward_and_each_by_its_own_heads(
    tmp_path, two_criteria
):
    asked = ["helpful", "harmless", "harmless", "another"]
    rows = [{**row, "criterion": name} for row, name in zip(PAIRS, asked, strict=True)]
    summary, written = score(two_criteria, rows, tmp_path)
    rewards_KN, criteria_KCN = margins_of(RewardModel.load(two_criteria), rows)
    ones_N = torch.ones(4)
    assert summary["criterion"] == "reward"
    assert_same_figures(summary, pair_figures(rewards_KN, TEMPERATURE["reward"], ones_N, ones_N))
    assert {name: own["pairs"] for name, own in summary["per_criterion"].items()} == {
        "helpful": 1,
        "harmless": 2,
    }
    own_KN = criteria_KCN[:, 1, 1:3]
    assert_same_figures(
        summary["per_criterion"]["harmless"],
        pair_figures(own_KN, TEMPERATURE["harmless"], torch.ones(2), torch.ones(2)),
    )
    for row in written:
        assert row["reward_chosen"] == pytest.approx(
            statistics.fmean(row["rewards_chosen"]), abs=1e-5
        )


def test_with_a_criterion_rewards_and_figures_are_of_its_heads_at_its_temperature(
    tmp_path, two_criteria
):
    summary, written = score(two_criteria, PAIRS, tmp_path, "harmless")
    _, criteria_KCN = margins_of(RewardModel.load(two_criteria), PAIRS)
    ones_N = torch.ones(4)
    wanted = pair_figures(criteria_KCN[:, 1], TEMPERATURE["harmless"], ones_N, ones_N)
    assert summary["criterion"] == "harmless"
    assert_same_figures(summary, wanted)
    assert sum(own["pairs"] for own in summary["per_source"].values()) == 4
    for row, margins in zip(written, criteria_KCN[:, 1].T.tolist(), strict=True):
        given = zip(row["rewards_chosen"], row["rewards_rejected"], strict=True)
        assert [a - b for a, b in given] == pytest.approx(margins, abs=1e-4)
        assert row["reward_chosen"] == pytest.approx(
            dict(row["parts_chosen"])["harmless"], abs=1e-5
        )


def test_the_rewards_figures_leave_out_pairs_of_criteria_without_weight_in_it(
    tmp_path, two_criteria
):
    given = RewardModel.load(two_criteria)
    weights = {"helpful": 1.0, "harmless": 0.0}
    banks = [
        replace(bank, combination_C=torch.tensor(list(weights.values()))) for bank in given.banks
    ]
    card = given.card.model_copy(update={"combination": weights})
    model = RewardModel(card, banks)
    (tmp_path / "helpful").mkdir()
    model.save(tmp_path / "helpful")
    asked = ["helpful", "harmless", "harmless", "another"]
    rows = [{**row, "criterion": name} for row, name in zip(PAIRS, asked, strict=True)]
    folder = tmp_path / "scores"
    folder.mkdir()
    summary, written = score(tmp_path / "helpful", rows, folder)
    assert (len(written), summary["replies"]) == (4, 8)
    about = [rows[0], rows[3]]
    wanted = pair_figures(
        margins_of(model, about)[0], TEMPERATURE["reward"], torch.ones(2), torch.ones(2)
    )
    assert_same_figures(summary, wanted)
    assert {name: own["pairs"] for name, own in summary["per_source"].items()} == {
        "tea": 1,
        "food": 1,
    }
    # Where there are no others they are all that can be said.
    alone, _ = score(tmp_path / "helpful", rows[1:3], folder)
    assert alone["pairs"] == 2
    # Whoever asks for one criterion's heads is told of all pairs.
    own, _ = score(tmp_path / "helpful", rows, folder, "harmless")
    assert own["pairs"] == 4


def test_means_and_shares_are_over_replies(tmp_path, two_criteria):
    flattering = {"prompt": "Rice?", "completion": "Great question! Use less water."}
    summary, written = score(two_criteria, [PAIRS[0], SINGLES[1], flattering], tmp_path)
    replies = [
        {name: row[f"{name}{suffix}"] for name in ("reward", "parts")}
        for row, suffixes in zip(written, (("_chosen", "_rejected"), ("",), ("",)), strict=True)
        for suffix in suffixes
    ]
    assert summary["replies"] == len(replies) == 4
    assert summary["reward_mean"] == pytest.approx(
        statistics.fmean(reply["reward"] for reply in replies), abs=1e-5
    )
    for name in ("helpful", "harmless"):
        assert summary["parts_mean"][name] == pytest.approx(
            statistics.fmean(dict(reply["parts"])[name] for reply in replies), abs=1e-5
        )
    assert summary["text_flags"] == {"sentence_loop": 0, "repetition": 0, "flattery": 0.25}
    assert written[2]["text_flags"] == ["flattery"]


def test_the_flagged_share_is_over_replies(tmp_path, tiny_reward_model):
    lenient = build_two_criteria(tmp_path / "reward", tiny_reward_model)
    (tmp_path / "first").mkdir()
    _, written = score(lenient, [PAIRS[0], *SINGLES], tmp_path / "first")
    shifts = sorted(
        [
            written[0]["shift_chosen"],
            written[0]["shift_rejected"],
            *(r["shift"] for r in written[1:]),
        ]
    )
    strict = build_two_criteria(
        tmp_path / "strict", tiny_reward_model, threshold=(shifts[0] + shifts[-1]) / 2
    )
    (tmp_path / "second").mkdir()
    summary, written = score(strict, [PAIRS[0], *SINGLES], tmp_path / "second")
    flags = [
        *(written[0]["domain_shift_chosen"], written[0]["domain_shift_rejected"]),
        *(row["domain_shift"] for row in written[1:]),
    ]
    assert 0 < sum(flags) < 4
    assert summary["flagged_share"] == sum(flags) / 4


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


def test_a_file_of_one_kind_has_the_columns_of_that_kind_alone(scored):
    _, singles = scored(SINGLES)
    assert not [name for name in singles[0] if name.endswith(("_chosen", "_rejected"))]
    _, pairs = scored(PAIRS)
    assert "reward" not in pairs[0]
    assert {f"{name}_chosen" for name in singles[0] if name not in ("line", "source")} <= set(
        pairs[0]
    )


def test_pairs_and_single_completions_in_one_file_all_keep_their_scores(scored):
    for mixed in ([SINGLES[0], PAIRS[0]], [PAIRS[0], SINGLES[0]]):
        summary, rows = scored(mixed)
        assert (summary["pairs"], summary["replies"]) == (1, 3)
        for given, row in zip(mixed, rows, strict=True):
            names = ["reward_chosen", "reward_rejected"] if "chosen" in given else ["reward"]
            assert [name for name in names if row.get(name) is None] == []


def said(line: int, replies: int, reward: float) -> Row:
    """A row as the actor gives it."""
    reply = {
        "rewards": [reward] * 4,
        "reward": reward,
        "parts": [("overall", reward)],
        "disagreement": 0.0,
        "distance": 1.0,
        "shift": 1.0,
        "domain_shift": False,
        "text_flags": [],
    }
    return {"line": line, "source": "s", "label": 1.0, "weight": 1.0, "replies": [reply] * replies}


def test_the_other_kind_of_row_late_in_a_long_file_loses_nothing(tmp_path, tiny_reward_model):
    kinds = [1] * (ROW_GROUP + 500) + [2] * 3 + [1] * (2 * ROW_GROUP)
    rows = [said(line, kind, line / 8) for line, kind in enumerate(kinds, start=1)]
    parts = [rows[begin : begin + 300] for begin in range(0, len(rows), 300)]
    summary = Summary(RewardModel.load(tiny_reward_model).card, tmp_path / "rows.jsonl")
    collect(
        [pa.Table.from_pylist(part, schema=SCORES_SCHEMA) for part in parts],
        summary,
        tmp_path / "out.parquet",
        Console(file=io.StringIO()),
        len(rows),
    )
    written = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["line"] for row in written] == list(range(1, len(rows) + 1))
    for row, kind in zip(written, kinds, strict=True):
        own, other = ("reward", "reward_chosen") if kind == 1 else ("reward_chosen", "reward")
        assert (row[own], row[other]) == (row["line"] / 8, None)
        assert row["parts" if kind == 1 else "parts_rejected"] == [("overall", row[own])]
    assert summary.figures()["pairs"] == 3


def test_work_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path, tiny_reward_model):
    out = tmp_path / "out.parquet"
    out.write_text("of an earlier run")

    def failing() -> Iterator[pa.Table]:
        rows = [said(line, 2, 1.0) for line in range(ROW_GROUP)]
        yield pa.Table.from_pylist(rows, schema=SCORES_SCHEMA)
        raise ModelError("another backbone")

    summary = Summary(RewardModel.load(tiny_reward_model).card, tmp_path / "rows.jsonl")
    with pytest.raises(ModelError, match="another backbone"):
        collect(failing(), summary, out, Console(file=io.StringIO()), 9000)
    assert out.read_text() == "of an earlier run"
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


@pytest.fixture(scope="module")
def no_system(tmp_path_factory: pytest.TempPathFactory, tiny_reward_model: Path) -> Path:
    """A reward model whose chat template refuses system turns."""
    folder = tmp_path_factory.mktemp("no-system")
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    )
    model = build_tiny_model(folder / "model", chat_template=refusing + CHATML)
    return build_two_criteria(folder / "reward", tiny_reward_model, model=model)


REFUSED: Row = {
    "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Rice?"}],
    "completion": "Use less water.",
}


def test_rows_that_cannot_be_tokenised_are_counted_and_the_first_are_named(tmp_path, no_system):
    console = Console(file=io.StringIO(), width=200)
    rows = [REFUSED, SINGLES[0], *[REFUSED] * 6, EQUAL]
    summary, written = score(no_system, rows, tmp_path, console=console)
    assert [row["line"] for row in written] == [2]
    assert (summary["skipped"], summary["replies"]) == (8, 1)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    named = [line.split()[1] for line in text.splitlines() if line.startswith("line ")]
    assert named == ["1", "3", "4", "5", "6"]
    assert "no system turn" in text
    assert "2 more left out that cannot be tokenised" in text
    assert "9 rows, 1 left out (1 with equal replies; first at line 9)" in text


def test_where_no_row_can_be_tokenised_one_sentence_says_so(tmp_path, no_system):
    with pytest.raises(DataError, match=r"none of the 2 rows in .*rows.jsonl can be tokenised"):
        score(no_system, [REFUSED, REFUSED], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_criterion_that_the_model_lacks_is_refused_before_any_work(tmp_path, two_criteria):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(PAIRS[0]))
    with pytest.raises(ModelError, match="no criterion 'honest'; it has helpful, harmless"):
        run_score(str(two_criteria), data, None, Console(file=io.StringIO()), "honest")


@pytest.mark.parametrize("name", ["out.json", "missing/out.parquet"])
def test_rows_are_written_only_as_parquet_into_a_folder_that_exists(
    tmp_path, tiny_reward_model, name
):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(PAIRS[0]))
    with pytest.raises(DataError, match=r"must be a .parquet file in a folder that exists"):
        run_score(str(tiny_reward_model), data, tmp_path / name, Console(file=io.StringIO()))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_scores_never_take_the_place_of_the_data(tmp_path, tiny_reward_model):
    data, link = tmp_path / "rows.parquet", tmp_path / "link.parquet"
    pq.write_table(pa.Table.from_pylist(PAIRS), data)
    link.symlink_to(data)
    for read, out in ((data, data), (link, data), (data, tmp_path / "." / "rows.parquet")):
        with pytest.raises(DataError, match=r"--out .* is the data file; scores need a file of"):
            run_score(str(tiny_reward_model), read, out, Console(file=io.StringIO()))
    assert pq.read_table(data).to_pylist() == pa.Table.from_pylist(PAIRS).to_pylist()


def test_a_file_without_usable_rows_writes_nothing(tmp_path, tiny_reward_model):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(EQUAL))
    with pytest.raises(DataError, match="equal replies"):
        run_score(str(tiny_reward_model), data, tmp_path / "o.parquet", Console(file=io.StringIO()))
    assert not (tmp_path / "o.parquet").exists()
