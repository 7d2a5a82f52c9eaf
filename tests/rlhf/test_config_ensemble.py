"""What pairs and members may be, and what is said of others."""

import pytest

from rlhf.config import PairFile, RewardConfig, TrainedMembers, known_keys, parse_config
from rlhf.errors import ConfigError


@pytest.fixture
def parse():
    """A RewardConfig from its two sections."""

    def parse(*, data: dict | None = None, **ensemble: object) -> RewardConfig:
        values = {"data": data or {"train": ["pairs.jsonl"]}, "ensemble": ensemble}
        return parse_config(RewardConfig, values, "reward.toml")

    return parse


def test_a_pair_file_is_a_path_or_a_path_and_a_criterion(parse):
    named = {"path": "b.jsonl", "criterion": "harmless"}
    data = parse(data={"train": ["a.jsonl", named], "validation": [{"path": "c.jsonl"}]}).data
    assert data.train == [PairFile(path="a.jsonl"), PairFile(path="b.jsonl", criterion="harmless")]
    assert data.validation == [PairFile(path="c.jsonl", criterion="")]


@pytest.mark.parametrize(
    "file",
    [
        {"criterion": "helpful"},
        {"path": "a.jsonl", "criterion": "x" * 41},
        {"path": "a.jsonl", "criteria": "helpful"},
    ],
)
def test_a_pair_file_without_path_or_with_a_strange_criterion_is_refused(parse, file):
    with pytest.raises(ConfigError, match=r"^reward\.toml: data\.train\.1"):
        parse(data={"train": ["a.jsonl", file]})


def test_members_are_groups_with_defaults(parse):
    groups = parse(members=[{"count": 3}, {"count": 2, "pooling": "mean", "l2": [1.0]}]).ensemble
    assert [(g.count, g.pooling, g.kind, g.model) for g in groups.members] == [
        (3, "last", "probe", None),
        (2, "mean", "probe", None),
    ]
    assert groups.members[1].l2 == [1.0]
    assert sum(group.count for group in parse().ensemble.members) == 32


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"depth": 0.0},
        {"depth": 1.1},
        {"pooling": "first"},
        {"kind": "tree"},
        {"l2": []},
        {"l2": [0.0]},
        {"centring": -0.1},
        {"centring": float("inf")},
    ],
)
def test_a_group_of_members_beyond_its_limits_is_refused_by_key(parse, wrong):
    [key] = wrong
    with pytest.raises(ConfigError, match=rf"reward\.toml: ensemble\.members\.0\.{key}"):
        parse(members=[{"count": 8} | wrong])


def test_a_setting_of_another_kind_of_members_is_refused_with_both(parse):
    for kind, wrong, shown in (
        ("probe", "layers", 2),
        ("top", "l2", [1.0]),
        ("full", "l2", [1.0]),
        ("full", "layers", 3),
    ):
        with pytest.raises(ConfigError) as refused:
            parse(members=[{"count": 8, "kind": kind, wrong: shown}])
        assert f"ensemble.members.0.{wrong} = {shown} with ensemble.members.0.kind = " in str(
            refused.value
        )
        assert f'"{kind}"' in str(refused.value)


def test_members_that_train_layers_have_an_optimiser_of_their_own(parse):
    top = {"kind": "top", "count": 3, "learner": {"zero_stage": 2}}
    [group] = parse(members=[top]).ensemble.members
    assert isinstance(group, TrainedMembers)
    # One setting of the optimiser leaves the others what they are for members.
    learner = group.learner
    assert (learner.learning_rate, learner.warmup_steps, learner.weight_decay) == (1e-4, 10, 0.01)
    with pytest.raises(ConfigError, match=r"GPUs are whole or a fraction below 1, got 1\.5"):
        parse(members=[top | {"gpus_per_worker": 1.5}])
    assert (group.layers, group.learner.zero_stage, group.workers) == (1, 2, 1)
    with pytest.raises(ConfigError, match=r"ensemble\.members\.0\.learner\.zero_stage = 7"):
        parse(members=[{"kind": "full", "count": 3, "learner": {"zero_stage": 7}}])


def test_an_unknown_key_of_a_group_is_refused_with_the_nearest_one(parse):
    with pytest.raises(ConfigError, match=r"did you mean ensemble\.members\.pooling\?$"):
        parse(members=[{"count": 8, "poolng": "mean"}])


@pytest.mark.parametrize("counts", [[1], [2], [1, 1]])
def test_fewer_than_three_members_are_refused_in_all_groups_together(parse, counts):
    with pytest.raises(ConfigError, match=f"gives {sum(counts)} members: at least 3 are needed"):
        parse(members=[{"count": count} for count in counts])


def test_three_members_are_enough_in_whatever_groups(parse):
    for counts in ([3], [2, 1], [1, 1, 1]):
        parse(members=[{"count": count} for count in counts])
    with pytest.raises(ConfigError, match=r"ensemble\.members"):
        parse(members=[])


@pytest.mark.parametrize("combination", [{}, {"helpful": 0.0}, {"helpful": 0, "harmless": 0}])
def test_a_combination_that_weighs_nothing_is_refused(parse, combination):
    with pytest.raises(ConfigError, match=r"ensemble\.combination gives no criterion any weight"):
        parse(combination=combination)


@pytest.mark.parametrize(
    ("candidates", "why"),
    [([], "correlations"), ([1.0], "0.95"), ([-0.5, 0, -0.5], "names a candidate twice")],
)
def test_correlations_that_cannot_be_tried_are_refused(parse, candidates, why):
    with pytest.raises(ConfigError, match=why):
        parse(correlations=candidates)


def test_a_combination_may_weigh_a_criterion_against_another(parse):
    for combination in (None, {"helpful": 1.0, "long": -0.5}, {"helpful": 1.0, "harmless": 0.0}):
        assert parse(combination=combination).ensemble.combination == combination


def test_keys_of_groups_are_known_keys():
    keys = known_keys(RewardConfig)
    assert {"ensemble.members", "ensemble.members.pooling", "data.train.criterion"} <= set(keys)
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_no_weight_of_a_combination_is_infinite_or_none_at_all(parse, value):
    with pytest.raises(ConfigError, match=r"ensemble\.combination"):
        parse(combination={"helpful": 1.0, "harmless": float(value)})


def test_a_misspelt_key_of_a_pair_file_is_named_with_the_one_that_exists(parse):
    with pytest.raises(
        ConfigError, match=r"train\.0\.criteria .* did you mean data\.train\.criterion"
    ):
        parse(data={"train": [{"path": "a.jsonl", "criteria": "helpful"}]})
