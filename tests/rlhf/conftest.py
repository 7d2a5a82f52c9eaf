from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.records import Completion, GroupScores, Message, Prompt, RolloutGroup, ScoredGroup


class Make:
    """Small complete records; every keyword overrides one value."""

    @staticmethod
    def prompt(name: str = "p0", text: str = "Hello?") -> Prompt:
        return Prompt(name, (Message("user", text),))

    @staticmethod
    def completion(length: int = 2, **values: Any) -> Completion:
        defaults: dict[str, Any] = {
            "token_ids": tuple(range(length)),
            "text": "answer",
            "rollout_logprobs_T": (-0.5,) * length,
            "finish_reason": "stop",
            "oldest_version": 0,
            "newest_version": 0,
            "seed": 1,
        }
        return Completion(**defaults | values)

    @classmethod
    def rollout(cls, *completions: Completion, name: str = "p0") -> RolloutGroup:
        return RolloutGroup(cls.prompt(name), 0, (7, 8), completions)

    @classmethod
    def scored(
        cls,
        rewards_G: tuple[float, ...],
        completions: tuple[Completion, ...] | None = None,
        *,
        kl_G: tuple[float, ...] | None = None,
        shifted_G: tuple[bool, ...] | None = None,
        disagreement_G: tuple[float, ...] | None = None,
        parts_G: dict[str, tuple[float, ...]] | None = None,
        name: str = "p0",
    ) -> ScoredGroup:
        completions = completions or tuple(cls.completion() for _ in rewards_G)
        kl_G = kl_G or (0.0,) * len(rewards_G)
        reference = tuple(
            tuple(logprob - kl / c.length for logprob in c.rollout_logprobs_T)
            for c, kl in zip(completions, kl_G, strict=True)
        )
        scores = GroupScores(
            rewards_KG=(rewards_G, rewards_G),
            rewards_G=rewards_G,
            disagreement_G=disagreement_G or (0.0,) * len(rewards_G),
            distance_G=tuple(10 * d for d in disagreement_G or (0.0,) * len(rewards_G)),
            shift_G=tuple(-d for d in disagreement_G or (0.0,) * len(rewards_G)),
            data_shift_G=(True,) * len(rewards_G),
            domain_shift_G=shifted_G or (False,) * len(rewards_G),
            reward_version="r1",
            parts_G=parts_G or {},
        )
        return ScoredGroup(cls.rollout(*completions, name=name), scores, reference)


@pytest.fixture(scope="session")
def make() -> type[Make]:
    return Make


@pytest.fixture(scope="session")
def trl() -> dict[str, Any]:
    """What TRL's own trainers computed; see tests/fixtures/make_trl_policy_losses.py."""
    path = Path(__file__).parents[1] / "fixtures" / "trl_policy_losses.json"
    record: dict[str, Any] = json.loads(path.read_text())
    record["cases"] = {case["name"]: case for case in record["cases"]}
    return record
