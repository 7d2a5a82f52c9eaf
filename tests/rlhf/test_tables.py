import pyarrow.parquet as pq
import pytest

from rlhf.records import FailedGroup
from rlhf.tables import ROLLOUT_SCHEMA, rollout_table

TEXT = "What a great question, naïve 🐈!\n"


@pytest.fixture
def table(make, tmp_path):
    """A scored and a failed group, written to Parquet and read back."""
    completions = (
        make.completion(
            length=3,
            text=TEXT,
            seed=2**31 - 1,
            newest_version=2,
            version_spans=((0, 1), (2, 2)),
        ),
        make.completion(
            length=1, text="", finish_reason="length", oldest_version=2, newest_version=2
        ),
    )
    scored = make.scored(
        (0.5, -1.5),
        completions,
        kl_G=(0.75, -0.25),
        shifted_G=(False, True),
        disagreement_G=(0.25, 2.0),
        parts_G={"helpful": (0.5, 1.0), "harmless": (0.25, 2.0)},
    )
    failed = FailedGroup(make.prompt("p1", "Too long?"), epoch=1, reason="too long", attempts=3)
    path = tmp_path / "rollouts.parquet"
    pq.write_table(rollout_table(4, 3, [scored, failed]), path)
    return pq.read_table(path)


def test_the_schema_survives_parquet(table):
    assert table.schema.equals(ROLLOUT_SCHEMA)


def test_a_completion_survives_parquet_with_its_versions_rewards_and_flags(table):
    first, second, _ = table.to_pylist()
    assert first == {
        "step": 4,
        "group": 0,
        "sibling": 0,
        "prompt_id": "p0",
        "epoch": 0,
        "prompt": "Hello?",
        "messages": [{"role": "user", "content": "Hello?"}],
        "completion": TEXT,
        "token_ids": [0, 1, 2],
        "rollout_logprobs": [-0.5, -0.5, -0.5],
        "reference_logprobs": [-0.75, -0.75, -0.75],
        "finish_reason": "stop",
        "seed": 2**31 - 1,
        "oldest_version": 0,
        "newest_version": 2,
        "version_spans": [{"version": 0, "tokens": 1}, {"version": 2, "tokens": 2}],
        "learner_version": 3,
        "rewards": [0.5, 0.5],
        "reward": 0.5,
        "parts": [("helpful", 0.5), ("harmless", 0.25)],
        "disagreement": 0.25,
        "distance": 2.5,
        "shift": -0.25,
        "data_shift": True,
        "domain_shift": False,
        "text_flags": ["flattery"],
        "own": [],
        "kl": 0.75,
        "reward_version": "r1",
        "failure": None,
    }
    assert (second["sibling"], second["finish_reason"], second["domain_shift"]) == (
        1,
        "length",
        True,
    )
    assert second["rewards"] == [-1.5, -1.5]
    assert (second["parts"], second["text_flags"]) == ([("helpful", 1.0), ("harmless", 2.0)], [])
    assert (second["oldest_version"], second["reward"], second["kl"]) == (2, -1.5, -0.25)


def test_a_failed_group_is_one_row_with_its_reason(table):
    *_, failed = table.to_pylist()
    given = {key: value for key, value in failed.items() if value is not None}
    assert given == {
        "step": 4,
        "group": 1,
        "prompt_id": "p1",
        "epoch": 1,
        "prompt": "Too long?",
        "messages": [{"role": "user", "content": "Too long?"}],
        "learner_version": 3,
        "failure": "too long",
    }


def test_a_step_without_groups_still_has_the_schema():
    table = rollout_table(0, 0, [])
    assert table.num_rows == 0
    assert table.schema.equals(ROLLOUT_SCHEMA)
