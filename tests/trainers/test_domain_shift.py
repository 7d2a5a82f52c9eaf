"""A run's own threshold: set on what the start policy says, once, and kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.rollout import GroupRequest
from rlhf.config import RLConfig, parse_config
from rlhf.errors import CheckpointError, GenerationError
from rlhf.records import Completion, GroupScores, Message, Prompt, RolloutGroup, ScoredGroup
from trainers.domain_shift import FILE, require_same_scores, shift_threshold

PROMPTS = [Prompt(f"p{i}", (Message("user", f"question {i}"),)) for i in range(40)]
SIBLINGS = 4


class StartPolicy:
    """A fleet whose completions have shift scores 0, 1, 2, … in the order they are asked for."""

    def __init__(self, unscored: int = 0) -> None:
        self.published: list[int] = []
        self.requests: list[GroupRequest] = []
        self.unscored = unscored

    async def publish(self, version: int) -> float:
        self.published.append(version)
        return 0.0

    async def sample(self, requests: Sequence[GroupRequest]) -> list[RolloutGroup]:
        assert self.published == [0], "asked before it had the start weights"
        self.requests += requests
        completion = Completion((3,), "text", (-0.5,), "stop", 0, 0, 1)
        return [
            RolloutGroup(r.prompt, 0, (1,), (completion,) * len(r.seeds)) for r in self.requests
        ]

    async def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup | GenerationError]:
        scored: list[ScoredGroup | GenerationError] = []
        for index, group in enumerate(groups):
            if index < self.unscored:
                scored.append(GenerationError("cannot be scored"))
                continue
            siblings = len(group.completions)
            zeros = (0.0,) * siblings
            shift_G = tuple(float(siblings * index + sibling) for sibling in range(siblings))
            flags = (True,) * siblings
            scores = GroupScores((zeros,), zeros, zeros, zeros, shift_G, flags, flags, "r7")
            scored.append(ScoredGroup(group, scores, ((-0.5,),) * siblings))
        return scored


def settings(completions: int = 99, rate: float = 0.1, **rl: Any) -> RLConfig:
    shift = {"calibration_completions": completions, "false_alarm_rate": rate}
    return parse_config(
        RLConfig,
        {
            "reward": {"model": "r", "domain_shift": shift},
            "data": {"prompts": ["p"]},
            "rl": {"completions_per_prompt": SIBLINGS, "prompts_per_step": 2} | rl,
        },
        "test",
    )


def threshold(
    folder: Path,
    fleet: StartPolicy,
    config: RLConfig,
    *,
    at_start: bool = True,
    reward_version: str = "r7",
    **said: Any,
) -> float | None:
    told: list[str] = said.get("said", [])
    return asyncio.run(
        shift_threshold(
            config,
            fleet,  # type: ignore[arg-type]
            PROMPTS,
            folder,
            told.append,
            reward_version=reward_version,
            at_start=at_start,
        )
    )


def test_the_threshold_is_the_conformal_quantile_of_the_start_policys_scores(tmp_path):
    # 40 prompts of 3: scores 0 to 119, rank ceil(121 * 0.9) = 109, the value 108.
    fleet = StartPolicy()
    assert threshold(tmp_path, fleet, settings()) == 108.0
    record = json.loads((tmp_path / FILE).read_text())
    assert (record["completions"], record["reward_version"]) == (120, "r7")
    low, high = record["false_alarm_interval"]
    assert low < 0.1 < high


def test_it_is_sampled_as_the_run_samples_with_seeds_of_its_own(tmp_path):
    config = settings(top_p=0.9, algorithm={"type": "cem"}, kl={"coefficient": 0})
    fleet = StartPolicy()
    threshold(tmp_path, fleet, config)
    assert {(r.max_tokens, r.temperature, r.top_p) for r in fleet.requests} == {
        (config.rl.max_tokens, config.rl.temperature, config.rl.top_p)
    }
    seeds = [seed for request in fleet.requests for seed in request.seeds]
    assert len(set(seeds)) == len(seeds) == 120
    again = StartPolicy()
    threshold(tmp_path / "..", again, config)
    (tmp_path / ".." / FILE).unlink()
    assert again.requests == fleet.requests


def test_it_is_set_once_and_read_by_a_resumed_run(tmp_path):
    threshold(tmp_path, StartPolicy(), settings())
    resumed = StartPolicy()
    assert threshold(tmp_path, resumed, settings(rate=0.5), at_start=False) == 108.0
    assert not resumed.published


def test_a_policy_that_has_learned_is_no_measure(tmp_path):
    said: list[str] = []
    assert threshold(tmp_path, StartPolicy(), settings(), at_start=False, said=said) is None
    assert FILE in said[0]
    assert not (tmp_path / FILE).exists()


def test_it_can_be_left_to_the_reward_model(tmp_path):
    fleet = StartPolicy()
    assert threshold(tmp_path, fleet, settings(completions=0, rate=0.05)) is None
    assert not fleet.published


@pytest.mark.parametrize("unscored", [20, 40])
def test_where_too_many_failed_to_promise_the_rate_the_reward_models_own_stays(tmp_path, unscored):
    # 60 or no scores: rank ceil(61 * 0.99) = 61 of 60.
    said: list[str] = []
    left = 120 - 3 * unscored
    assert threshold(tmp_path, StartPolicy(unscored), settings(rate=0.01), said=said) is None
    assert json.loads((tmp_path / FILE).read_text())["threshold"] is None
    assert f"{left} completions of the start policy could be scored, too few" in said[0]
    assert "0.01: the reward model's own threshold is used" in said[0]
    resumed = StartPolicy()
    again = threshold(tmp_path, resumed, settings(rate=0.01), at_start=False, said=said)
    assert again is None and not resumed.published
    assert said[1] == said[0]


def test_a_threshold_of_another_reward_model_is_set_anew_at_the_start_and_refused_later(tmp_path):
    threshold(tmp_path, StartPolicy(), settings())
    require_same_scores(settings(), tmp_path, "r7")
    with pytest.raises(CheckpointError, match="version r7 of the reward model, but "):
        require_same_scores(settings(), tmp_path, "r8")
    require_same_scores(settings(completions=0, rate=0.05), tmp_path, "r8")
    again = StartPolicy()
    assert threshold(tmp_path, again, settings(), reward_version="r8") == 108.0
    assert again.published


def test_fewer_prompts_than_wanted_are_asked_once_each(tmp_path):
    fleet = StartPolicy()
    threshold(tmp_path, fleet, settings(completions=400))
    assert sorted(request.prompt.id for request in fleet.requests) == sorted(p.id for p in PROMPTS)


def test_as_many_prompts_as_there_are_give_a_completion_each(tmp_path):
    """Siblings are alike: 30 completions of 8 prompts know less than 30 of 30."""
    fleet = StartPolicy()
    threshold(tmp_path, fleet, settings(completions=30))
    assert len({request.prompt.id for request in fleet.requests}) == 30
    assert {len(request.seeds) for request in fleet.requests} == {1}
