"""Rollouts as Parquet: a row for each completion, with its versions, rewards and flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from rlhf.records import FailedGroup, Prompt, ScoredGroup
from rlhf.text_checks import text_flags

SCORE_FIELDS = [
    ("rewards", pa.list_(pa.float32())),
    ("reward", pa.float32()),
    ("parts", pa.map_(pa.string(), pa.float32())),
    ("disagreement", pa.float32()),
    ("distance", pa.float32()),
    ("shift", pa.float32()),
    ("domain_shift", pa.bool_()),
    ("text_flags", pa.list_(pa.string())),
]
"""What is said of a reply: `rewards` by every member, `reward` aggregated, `parts` by criterion."""

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
"""A conversation."""

VERSION_SPANS = pa.list_(pa.struct([("version", pa.int32()), ("tokens", pa.int32())]))
"""Which weights sampled which tokens, in their order."""

ROLLOUT_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("group", pa.int32()),
        ("sibling", pa.int32()),
        ("prompt_id", pa.string()),
        ("epoch", pa.int32()),
        ("prompt", pa.string()),
        ("messages", MESSAGES),
        ("completion", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("reference_logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
        ("oldest_version", pa.int32()),
        ("newest_version", pa.int32()),
        ("version_spans", VERSION_SPANS),
        ("learner_version", pa.int32()),
        *SCORE_FIELDS,
        ("data_shift", pa.bool_()),
        ("own", pa.map_(pa.string(), pa.float32())),
        ("kl", pa.float32()),
        ("reward_version", pa.string()),
        ("failure", pa.string()),
    ]
)


def _of(prompt: Prompt) -> dict[str, Any]:
    """Its columns: the last turn to read, the whole conversation to go on with."""
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    return {"prompt_id": prompt.id, "prompt": prompt.messages[-1].content, "messages": turns}


def rollout_table(
    step: int, learner_version: int, groups: Sequence[ScoredGroup | FailedGroup]
) -> pa.Table:
    """The groups of one step as a table with `ROLLOUT_SCHEMA`; a failed group is one row."""
    rows = []
    for index, group in enumerate(groups):
        if isinstance(group, FailedGroup):
            rows.append(
                {
                    "step": step,
                    "group": index,
                    "epoch": group.epoch,
                    **_of(group.prompt),
                    "learner_version": learner_version,
                    "failure": group.reason,
                }
            )
            continue
        for sibling, completion in enumerate(group.rollout.completions):
            rows.append(
                {
                    "step": step,
                    "group": index,
                    "sibling": sibling,
                    "epoch": group.rollout.epoch,
                    **_of(group.rollout.prompt),
                    "completion": completion.text,
                    "token_ids": completion.token_ids,
                    "rollout_logprobs": completion.rollout_logprobs_T,
                    "reference_logprobs": group.reference_logprobs_GT[sibling],
                    "finish_reason": completion.finish_reason,
                    "seed": completion.seed,
                    "oldest_version": completion.oldest_version,
                    "newest_version": completion.newest_version,
                    "version_spans": [
                        {"version": version, "tokens": tokens}
                        for version, tokens in completion.version_spans
                    ],
                    "learner_version": learner_version,
                    "rewards": [member[sibling] for member in group.scores.rewards_KG],
                    "reward": group.scores.rewards_G[sibling],
                    "parts": [
                        (name, part_G[sibling]) for name, part_G in group.scores.parts_G.items()
                    ],
                    "disagreement": group.scores.disagreement_G[sibling],
                    "distance": group.scores.distance_G[sibling],
                    "shift": group.scores.shift_G[sibling],
                    "data_shift": group.scores.data_shift_G[sibling],
                    "domain_shift": group.scores.domain_shift_G[sibling],
                    "text_flags": text_flags(completion.text),
                    "own": [(name, own_G[sibling]) for name, own_G in group.scores.own_G.items()],
                    "kl": group.kl_G[sibling],
                    "reward_version": group.scores.reward_version,
                }
            )
    return pa.Table.from_pylist(rows, schema=ROLLOUT_SCHEMA)
