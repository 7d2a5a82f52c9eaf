"""The demo's figures, recomputed by hand, and the prompts that are shipped with it."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import pytest

from rlhf.config import DemoConfig, load_config
from trainers.demo import demo_prompts, rl_config, summarise

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "trainers" / "demo_prompts.jsonl"


def row(rule_base: float, rule_tuned: float, *rewards: float | None, **values: object) -> dict:
    reward_base, reward_tuned = rewards or (0.0, 0.0)
    return {
        "rule_base": rule_base,
        "rule_tuned": rule_tuned,
        "reward_base": reward_base,
        "reward_tuned": reward_tuned,
        "finished_base": False,
        "finished_tuned": True,
    } | values


ROWS = [
    row(1.0, 2.0, -1.0, 1.0),
    row(2.0, 2.0, 0.0, 0.5, finished_base=True),
    row(3.0, 2.0, None, None, finished_tuned=False),
    row(0.0, 2.0, 1.0, 3.0),
]


def test_the_win_rate_counts_a_tie_as_half_with_wilsons_interval():
    figures = summarise(ROWS)
    assert figures["win_rate"] == 2.5 / 4
    # Wilson (1927): centre and half-width for 2.5 of 4 at z = 1.96.
    z = statistics.NormalDist().inv_cdf(0.975)
    centre = (2.5 + z**2 / 2) / (4 + z**2)
    half = z * math.sqrt(2.5 * 1.5 / 4 + z**2 / 4) / (4 + z**2)
    assert figures["win_rate_low"] == pytest.approx(centre - half)
    assert figures["win_rate_high"] == pytest.approx(centre + half)


def test_the_rule_is_compared_pair_by_pair():
    figures = summarise(ROWS)
    assert (figures["rule_base"], figures["rule_tuned"]) == (1.5, 2.0)
    # Differences 1, 0, -1, 2: mean 1/2, deviation sqrt(5/3).
    half = 1.959964 * math.sqrt(5 / 3) / 2
    assert figures["rule_difference"] == 0.5
    assert figures["rule_low"] == pytest.approx(0.5 - half, rel=1e-6)
    assert figures["rule_high"] == pytest.approx(0.5 + half, rel=1e-6)


def test_rewards_are_means_over_the_answers_that_could_be_scored():
    figures = summarise(ROWS)
    assert figures["prompts"] == 4
    assert (figures["reward_base"], figures["reward_tuned"]) == (0.0, 1.5)
    assert (figures["finished_base"], figures["finished_tuned"]) == (0.25, 0.75)


def test_figures_are_those_of_the_written_rows():
    again = [json.loads(json.dumps(row)) for row in ROWS]
    assert summarise(again) == summarise(ROWS)


def test_no_change_is_no_win():
    figures = summarise([row(1.0, 1.0)] * 20)
    assert figures["win_rate"] == 0.5
    assert figures["win_rate_low"] < 0.5 < figures["win_rate_high"]
    assert figures["rule_low"] == figures["rule_high"] == 0


# The shipped prompts


@pytest.fixture(scope="module")
def shipped() -> list[dict[str, str]]:
    return [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]


def plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_150_prompts_train_and_100_are_held_out(shipped):
    splits = [row["split"] for row in shipped]
    assert {split: splits.count(split) for split in set(splits)} == {"train": 150, "heldout": 100}
    assert {frozenset(row) for row in shipped} == {frozenset({"id", "split", "category", "prompt"})}


def test_every_shipped_prompt_is_another_one(shipped):
    assert len({row["id"] for row in shipped}) == 250
    assert len({plain(row["prompt"]) for row in shipped}) == 250
    assert all(row["id"].startswith(row["split"]) for row in shipped)


def test_no_held_out_prompt_is_a_training_prompt_in_other_words(shipped):
    """No pair across the two sets shares four fifths of its words."""
    words = [(row["split"], set(plain(row["prompt"]).split())) for row in shipped]
    train = [found for split, found in words if split == "train"]
    held = [found for split, found in words if split == "heldout"]
    closest = max(len(a & b) / len(a | b) for a in train for b in held)
    assert closest < 0.8


def test_shipped_prompts_are_single_lines_of_plain_text(shipped):
    for row in shipped:
        assert row["prompt"] == row["prompt"].strip()
        assert row["prompt"].isascii()
        assert row["prompt"].isprintable()
        assert 10 < len(row["prompt"]) < 200


def test_the_first_so_many_prompts_of_a_split_are_used(shipped):
    prompts = demo_prompts("heldout", 3)
    held = [row for row in shipped if row["split"] == "heldout"]
    assert [prompt.id for prompt in prompts] == [row["id"] for row in held[:3]]
    assert [prompt.messages[-1].content for prompt in prompts] == [r["prompt"] for r in held[:3]]
    assert {prompt.messages[-1].role for prompt in prompts} == {"user"}


def test_the_demos_own_settings_fit_the_shipped_prompts():
    config = load_config(DemoConfig, ROOT / "configs" / "demo.toml")
    assert len(demo_prompts("train", config.train_prompts)) == config.train_prompts
    assert len(demo_prompts("heldout", config.heldout_prompts)) == config.heldout_prompts


def test_the_demos_reinforcement_learning_is_what_pavlov_rl_would_run(tmp_path):
    config = load_config(DemoConfig, ROOT / "configs" / "demo.toml", ["rl.num_steps=3", "seed=9"])
    settings = rl_config(config, tmp_path)
    assert (settings.seed, settings.rl) == (9, config.rl)
    assert settings.cluster == config.cluster
    assert settings.cluster.model_fields_set == config.cluster.model_fields_set
    assert settings.reward.model == str(tmp_path / "reward")
    assert Path(settings.run.dir).is_relative_to(tmp_path)
