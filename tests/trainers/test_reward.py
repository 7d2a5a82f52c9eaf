"""`pavlov reward` on a tiny backbone: what is planted is learned, and the card says so."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from models.reward_model import RewardModel
from rlhf.config import RewardConfig, parse_config
from rlhf.errors import DataError, ModelError, RunFolderError
from rlhf.records import Message, PreferencePair
from trainers.reward import _data_hash, run_reward

NOUNS = ["bread", "rice", "nets", "school", "river", "town", "hill", "pasta", "fox", "dog"]


def pair(number: int, **changes: Any) -> dict[str, Any]:
    """The answer about water is preferred to the one that was cut off."""
    noun = NOUNS[number % len(NOUNS)]
    return {
        "prompt": f"Question {number}: what about {noun}?",
        "chosen": f"Use less water for the {noun} and stir it once.",
        "rejected": f"The {noun} is lazy and the",
        "rejected_finished": False,
        **changes,
    }


@pytest.fixture
def train(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PAVLOV_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PAVLOV_CACHE", str(tmp_path / "cache"))
    said = io.StringIO()

    def train(
        rows: list[dict[str, Any]],
        validation: list[dict[str, Any]],
        model: Path = tiny_model,
        l2: Sequence[float] | None = (0.1,),
        **ensemble: Any,
    ) -> tuple[Path, str]:
        """With l2 = None, by the default's candidates."""
        members = {} if l2 is None else {"l2": list(l2)}
        for name, some in (("train", rows), ("validation", validation)):
            text = "".join(json.dumps(row) + "\n" for row in some)
            (tmp_path / f"{name}.jsonl").write_text(text)
        config = parse_config(
            RewardConfig,
            {
                "data": {
                    "train": [str(tmp_path / "train.jsonl")],
                    "validation": [str(tmp_path / "validation.jsonl")] if validation else [],
                },
                "ensemble": {
                    "model": str(model),
                    "max_tokens": 64,
                    "members": [
                        {"count": 3, "depth": 1.0, "pooling": "last", **members},
                        {"count": 3, "depth": 0.5, "pooling": "mean", **members},
                    ],
                    **ensemble,
                },
            },
            "test",
        )
        run = run_reward(config, tmp_path / "tiny.toml", Console(file=said, width=200))
        return run, said.getvalue()

    return train


def test_a_planted_preference_is_learned_and_the_card_has_the_figures(train):
    rows, held = [pair(n) for n in range(40)], [pair(n) for n in range(100, 130)]
    run, said = train(rows, held, l2=None)
    model = RewardModel.load(run)
    figures = model.card.metrics["validation"]
    assert (figures["pairs"], figures["accuracy"]) == (30, 1.0)
    assert model.card.metrics["cross_validation"]["accuracy"] > 0.9
    assert model.card.threshold is not None
    low, high = model.card.false_alarm_interval
    assert low < model.card.false_alarm_rate < high
    assert "accuracy 1.000" in said
    prompt = (Message("user", "Question 200: what about town?"),)
    scores = model.score(
        [(prompt, "Use less water for the town.", True), (prompt, "The town is lazy", False)]
    )
    assert (scores.rewards_KN[:, 0] > scores.rewards_KN[:, 1]).all()


def test_the_label_decides_which_reply_is_preferred(train):
    rows = [pair(n, label=0.0) for n in range(40)]
    run, _ = train(rows, [pair(n, label=0.0) for n in range(100, 120)])
    assert RewardModel.load(run).card.metrics["validation"]["accuracy"] == 1.0
    prompt = (Message("user", "Question 200: what about town?"),)
    scores = RewardModel.load(run).score(
        [(prompt, "Use less water for the town.", True), (prompt, "The town is lazy", False)]
    )
    assert (scores.rewards_KN[:, 0] < scores.rewards_KN[:, 1]).all()


@pytest.fixture
def strict(tiny_model: Path, tmp_path: Path) -> Path:
    """A model whose template refuses a system turn, by its text."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "strict"))
    template = (folder / "chat_template.jinja").read_text()
    refusal = (
        "{% if messages[0].role == 'system' %}"
        "{{ raise_exception('no system: ' + messages[0].content) }}"
        "{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(refusal + template)
    return folder


def under_system(number: int, system: str) -> dict[str, Any]:
    turns = [{"role": "system", "content": system}]
    return pair(number, prompt=[*turns, {"role": "user", "content": f"Question {number}?"}])


def test_pairs_that_the_template_refuses_are_left_out_and_said(train, strict):
    systems = [*["Be brief."] * 3, *["Be kind."] * 2, *["Be calm."] * 2, "Be slow.", "Be quick."]
    refused = [under_system(n, system) for n, system in enumerate(systems, start=30)]
    run, said = train([*(pair(n) for n in range(30)), *refused], [], strict)
    assert RewardModel.load(run).card.data["pairs"] == 30
    refusal = "pairs: the chat template refuses this conversation: no system: "
    for count, system in ((3, "Be brief."), (2, "Be kind."), (2, "Be calm.")):
        assert f"left out: {count} {refusal}{system}" in said
    assert "left out: 2 pairs more, for 2 other reasons" in said


@pytest.mark.parametrize("combination", [None, {"overall": 1.0}])
def test_where_the_template_refuses_every_pair_its_reason_is_said(train, strict, combination):
    refused = [under_system(n, "Be brief.") for n in range(20)]
    with pytest.raises(DataError, match=r"none of the 20 pairs can be tokenised: .* no system"):
        train(refused, [], strict, combination=combination)


def test_validation_pairs_that_the_template_refuses_are_not_passed_over(train, strict):
    refused = [under_system(n, "Be brief.") for n in range(100, 103)]
    with pytest.raises(DataError, match=r"none of the 3 pairs can be tokenised: .* no system"):
        train([pair(n) for n in range(20)], refused, strict)


def test_too_few_pairs_are_refused_before_anything_is_written(train, tmp_path):
    with pytest.raises(
        DataError,
        match="15 pairs judged by 'overall' with 15 different first user turns are too few",
    ):
        train([pair(n) for n in range(15)], [])
    assert not (tmp_path / "runs").exists()


def test_rows_longer_than_a_backbone_reads_are_refused_before_anything_is_written(train, tmp_path):
    with pytest.raises(ModelError, match=r"ensemble.max_tokens = 1025, but .* at most 1024 tokens"):
        train([pair(n) for n in range(20)], [], max_tokens=1025)
    assert not (tmp_path / "runs").exists()


def test_a_reward_run_is_not_overwritten(train):
    rows = [pair(n) for n in range(20)]
    run, _ = train(rows, [])
    version = RewardModel.load(run).card.version
    with pytest.raises(RunFolderError, match="already holds a run; choose another"):
        train(rows, [])
    assert RewardModel.load(run).card.version == version


def test_criteria_that_oppose_each_other_are_kept_apart(train):
    """Helpful wants water, harmless wants the other: each head is right by its own pairs."""
    rows = [pair(n, criterion="helpful", source="a") for n in range(40)]
    rows += [pair(n, criterion="harmless", label=0.0, source="b") for n in range(40, 80)]
    held = [pair(n, criterion="helpful", source="a") for n in range(100, 120)]
    held += [pair(n, criterion="harmless", label=0.0, source="b") for n in range(120, 140)]
    run, said = train(rows, held, combination={"helpful": 1.0, "harmless": 0.25})
    card = RewardModel.load(run).card
    assert card.criteria == ("harmless", "helpful")
    assert card.combination == {"harmless": 0.25, "helpful": 1.0}
    figures = card.metrics["validation"]
    # The reward follows the heavier criterion, which half of the pairs contradict.
    assert figures["accuracy"] == 0.5
    assert {name: own["accuracy"] for name, own in figures["per_criterion"].items()} == {
        "harmless": 1.0,
        "helpful": 1.0,
    }
    assert {name: own["accuracy"] for name, own in figures["per_source"].items()} == {
        "a": 1.0,
        "b": 1.0,
    }
    assert "reward = 0.25 harmless + helpful" in said
    text = (run / "reward" / "card.md").read_text()
    for expected in ("harmless, own head", "source b", "sentence loop", "mean of layer 1"):
        assert expected in text


def test_what_criteria_tell_of_each_other_is_tried_and_stands_on_the_card(train):
    rows = [pair(n, criterion="helpful") for n in range(20)]
    rows += [pair(n, criterion="honest", label=0.0) for n in range(20, 40)]
    run, _ = train(rows, [], correlations=[-0.5, 0.0])
    tried = RewardModel.load(run).card
    assert set(tried.metrics["correlation_losses"]["helpful ~ honest"]) == {"-0.5", "0"}
    versions = {tried.correlation["helpful ~ honest"]: {tried.version}}
    for correlation in (-0.5, 0.0):
        shutil.rmtree(run)
        run, _ = train(rows, [], correlations=[correlation])
        card = RewardModel.load(run).card
        assert card.correlation == {"helpful ~ honest": correlation}
        assert f"helpful ~ honest {correlation:g}" in (run / "reward" / "card.md").read_text()
        versions.setdefault(correlation, set()).add(card.version)
    # The chosen one is what the heads were fitted with.
    assert sorted(map(len, versions.values())) == [1, 1]
    assert versions[-0.5] != versions[0.0]


def test_a_criterion_without_pairs_or_with_too_few_is_refused(train, tmp_path):
    rows = [pair(n) for n in range(40)]
    with pytest.raises(DataError, match=r"names 'honest', but no pair .* the data has overall"):
        train(rows, [], combination={"honest": 1.0})
    rows += [pair(50, criterion="honest")]
    with pytest.raises(DataError, match="1 pairs judged by 'honest' with 1 different"):
        train(rows, [])
    assert not (tmp_path / "runs").exists()


def test_validation_pairs_do_not_touch_the_model(train, tmp_path):
    rows = [pair(n) for n in range(40)]
    first = RewardModel.load(train(rows, [])[0]).card
    shutil.rmtree(tmp_path / "runs")
    held = [pair(n, label=0.0) for n in range(100, 120)]
    second = RewardModel.load(train(rows, held)[0]).card
    assert second.metrics["validation"]["accuracy"] == 0.0
    assert (first.version, first.temperature, first.threshold) == (
        second.version,
        second.temperature,
        second.threshold,
    )


def test_all_that_decides_a_model_is_in_the_hash_of_its_data():
    one = PreferencePair((Message("user", "Why?"),), "Because.", "No.")
    other = replace(one, chosen="For a reason.")
    changes = [
        {"prompt": (Message("user", "How?"),)},
        {"chosen": "So."},
        {"rejected": "Go away."},
        {"label": 0.5},
        {"weight": 2.0},
        {"margin": 1.0},
        {"criterion": "helpful"},
        {"chosen_finished": False},
        {"rejected_finished": False},
    ]
    hashes = {_data_hash([replace(one, **change), other]) for change in changes}
    assert len(hashes | {_data_hash([one, other])}) == len(changes) + 1
    # The order of the rows and what a source is called decide nothing.
    assert _data_hash([other, replace(one, source="a")]) == _data_hash([one, other])
    assert _data_hash([replace(one, criterion="overall")]) == _data_hash([one])


def test_a_prompt_of_the_training_data_is_no_validation(train, tmp_path):
    rows = [pair(n) for n in range(20)]
    # The same first user turn, in a conversation of its own.
    turns = [("user", rows[3]["prompt"]), ("assistant", "What about it?"), ("user", "Well?")]
    longer = [{"role": role, "content": content} for role, content in turns]
    seen = [pair(100, prompt=longer), rows[5]]
    with pytest.raises(DataError, match=r"all 2 validation pairs open with .* the training data"):
        train(rows, seen)
    assert not (tmp_path / "runs").exists()
    run, said = train(rows, [*seen, *(pair(n) for n in range(100, 110))])
    card = RewardModel.load(run).card
    assert card.metrics["validation"]["pairs"] == card.data["pairs_validation"] == 10
    assert "left out: 2 validation pairs: their first user turn is in the training data" in said
    text = (run / "reward" / "card.md").read_text()
    assert "10 pairs, without 2 whose first user turn is in the training data" in text
    # The data of either figure is told by its hash.
    assert card.data["hash_validation"] != card.data["hash"]
    assert all(card.data[name] in text for name in ("hash", "hash_validation"))


def test_members_on_two_backbones_stand_in_one_model(train, tmp_path):
    from tests.conftest import build_tiny_model

    other = build_tiny_model(tmp_path / "other", seed=1)
    members = [{"count": 3, "depth": 1.0}, {"count": 2, "depth": 1.0, "model": str(other)}]
    run, _ = train(
        [pair(n) for n in range(40)], [pair(n) for n in range(100, 120)], members=members
    )
    model = RewardModel.load(run)
    assert [heads.members for heads in model.banks] == [3, 2]
    assert model.card.metrics["validation"]["accuracy"] == 1.0
    assert model.card.banks[1].model == str(other)


def test_a_criterion_cannot_take_the_name_of_what_they_make_together(train, tmp_path):
    with pytest.raises(DataError, match="a criterion cannot be called 'reward'"):
        train([pair(n, criterion="reward") for n in range(40)], [])
    assert not (tmp_path / "runs").exists()
