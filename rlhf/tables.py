"""Rollouts as Parquet: a row for each completion, with its versions, rewards and flags."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from rlhf.records import FailedGroup, ScoredGroup
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

ROLLOUT_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("group", pa.int32()),
        ("sibling", pa.int32()),
        ("prompt_id", pa.string()),
        ("epoch", pa.int32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("reference_logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
        ("oldest_version", pa.int32()),
        ("newest_version", pa.int32()),
        ("learner_version", pa.int32()),
        *SCORE_FIELDS,
        ("data_shift", pa.bool_()),
        ("own", pa.map_(pa.string(), pa.float32())),
        ("kl", pa.float32()),
        ("reward_version", pa.string()),
        ("failure", pa.string()),
    ]
)


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
                    "prompt_id": group.prompt.id,
                    "epoch": group.epoch,
                    "prompt": group.prompt.messages[-1].content,
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
                    "prompt_id": group.rollout.prompt.id,
                    "epoch": group.rollout.epoch,
                    "prompt": group.rollout.prompt.messages[-1].content,
                    "completion": completion.text,
                    "token_ids": completion.token_ids,
                    "rollout_logprobs": completion.rollout_logprobs_T,
                    "reference_logprobs": group.reference_logprobs_GT[sibling],
                    "finish_reason": completion.finish_reason,
                    "seed": completion.seed,
                    "oldest_version": completion.oldest_version,
                    "newest_version": completion.newest_version,
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
