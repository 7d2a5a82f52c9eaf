import json
import re
import typing
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlhf.config import (
    DemoConfig,
    LoopConfig,
    RewardConfig,
    RLConfig,
    Section,
    data_path,
    known_keys,
    load_config,
    parse_config,
    runs_path,
)
from rlhf.errors import ConfigError

MINIMAL = """
[reward]
model = "runs/reward/reward"
[data]
prompts = ["prompts.jsonl"]
"""


@pytest.fixture
def load(tmp_path):
    """An RLConfig from the minimal file, or another text, and overrides."""

    def load(*overrides: str, text: str = MINIMAL) -> RLConfig:
        path = tmp_path / "rl.toml"
        path.write_text(text)
        return load_config(RLConfig, path, overrides)

    return load


@pytest.fixture
def refusal(load):
    """The sentence with which a configuration is refused."""

    def refusal(*overrides: str, text: str = MINIMAL) -> str:
        with pytest.raises(ConfigError) as caught:
            load(*overrides, text=text)
        return str(caught.value)

    return refusal


def test_a_minimal_file_gets_the_defaults(load):
    config = load()
    assert config.reward.model == "runs/reward/reward"
    assert config.data.prompts == ["prompts.jsonl"]
    assert (config.rl.num_steps, config.rl.max_staleness, config.policy.model) == (
        16,
        0,
        "embedded",
    )


def sections_in(annotation) -> list[type[Section]]:
    """The sections in an annotation, in lists and unions too."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for each in typing.get_args(annotation) for found in sections_in(each)]


@pytest.mark.parametrize("root", [RLConfig, RewardConfig, DemoConfig])
def test_a_sentence_stands_under_every_field(root):
    def fields(section: type[Section]):
        for name, field in section.model_fields.items():
            yield f"{section.__name__}.{name}", field.description
            for below in sections_in(field.annotation):
                yield from fields(below)

    described = dict(fields(root))
    assert not [name for name, description in described.items() if not description]
    if root is RewardConfig:
        assert {"PairFile.criterion", "ProbeMembers.pooling"} <= described.keys()


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("rl.num_step=3", "rl.num_steps"),
        ("num_steps=3", "rl.num_steps"),
        ("rl.kl.coeficient=0.1", "rl.kl.coefficient"),
        ("rl.clip_high=0.3", "rl.algorithm.clip_high"),
        ("lerner.learning_rate=0.1", "learner"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(refusal, override, nearest):
    message = refusal(override)
    assert "is not a known key" in message
    assert message.endswith(f"did you mean {nearest}?")


def test_an_unknown_key_like_no_other_is_refused_without_a_guess(refusal):
    assert refusal("zzzzqqq=1").endswith("rl.toml: zzzzqqq is not a known key")


def test_an_unknown_key_in_the_file_is_refused_too(refusal):
    message = refusal(text=f"{MINIMAL}\n[rl]\ntemprature = 0.5")
    assert "rl.temprature is not a known key; did you mean rl.temperature?" in message


def test_every_known_key_stands_in_the_configuration():
    keys = known_keys(RLConfig)
    assert len(keys) == len(set(keys))
    assert {"seed", "rl", "rl.kl", "rl.kl.coefficient", "cluster.rollout.gpus"} <= set(keys)


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("rl.num_steps=many", "rl.num_steps = 'many'"),
        ("rl.num_steps=3.5", "rl.num_steps = 3.5"),
        ("rl.num_steps=true", "rl.num_steps = True"),
        ('rl.temperature="1"', "rl.temperature = '1'"),
        ("deterministic=1", "deterministic = 1"),
        ("policy.model=3", "policy.model = 3"),
        ("data.prompts=a.jsonl", "data.prompts = 'a.jsonl'"),
        ("data.prompts=[1]", "data.prompts.0 = 1"),
        ("rl=5", "rl = 5"),
        ("rl.algorithm.type=dpo", "rl.algorithm.type = 'dpo'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_key_and_value(refusal, override, shown):
    assert f"rl.toml: {shown}: input should be " in refusal(override)


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        "rl.num_steps=0",
        "rl.completions_per_prompt=0",
        "rl.max_staleness=-1",
        "rl.temperature=0",
        "rl.temperature=0.009",
        "rl.temperature=nan",
        "rl.top_p=0",
        "rl.algorithm.clip_low=1",
        "rl.kl.coefficient=-0.1",
        "data.prompts=[]",
        "learner.zero_stage=4",
        "cluster.rollout.gpus=-1",
        "cluster.rollout.gpus=1.5",
        "cluster.rollout.gpus=inf",
    ],
)
def test_a_value_beyond_its_limits_is_refused_by_key(refusal, override):
    assert override.partition("=")[0] in refusal(override)


FLOATS = [
    "cluster.call_timeout_s",
    "cluster.learner.cpus",
    "cluster.rollout.gpus",
    "learner.learning_rate",
    "learner.weight_decay",
    "reward.domain_shift.disagreement_penalty",
    "rl.algorithm.clip_high",
    "rl.entropy.coefficient",
    "rl.kl.coefficient",
    "rl.temperature",
    "rollout.kv_cache_gib",
]


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_no_number_is_infinite_or_none_at_all(refusal, key, value):
    assert f"rl.toml: {key} = {value}: " in refusal(f"{key}={value}")


@pytest.mark.parametrize("gpus", [0, 0.5, 1, 4])
def test_gpus_are_whole_or_a_fraction_below_one(load, gpus):
    assert load(f"cluster.reward.gpus={gpus}").cluster.reward.gpus == gpus


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=f"there is no configuration file {path}$"):
            load_config(RLConfig, path)


@pytest.mark.parametrize("content", [b"rl = [", b"seed = \xff"])
def test_what_is_not_toml_is_refused_by_file(tmp_path, content):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{path} is not valid TOML"):
        load_config(RLConfig, path)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[data]\nprompts = ["a"]', "reward.model"),
        ('[reward]\n[data]\nprompts = ["a"]', "reward.model"),
        ('[reward]\nmodel = "r"', "data.prompts"),
    ],
)
def test_what_is_required_is_named_down_to_the_key(refusal, text, key):
    assert refusal(text=text).endswith(f"rl.toml: {key} is required")


def test_more_mistakes_than_one_are_counted(refusal):
    message = refusal("rl.num_steps=0", "rl.max_tokens=0", "zzzzqqq=1")
    assert "rl.num_steps = 0" in message
    assert message.endswith("(and 2 more)")


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("rl.num_steps=5", lambda c: c.rl.num_steps, 5),
        (" rl.num_steps = 5 ", lambda c: c.rl.num_steps, 5),
        ("rl.temperature=0.5", lambda c: c.rl.temperature, 0.5),
        ("rl.temperature=1", lambda c: c.rl.temperature, 1.0),
        ("learner.learning_rate=1e-6", lambda c: c.learner.learning_rate, 1e-6),
        ("rollout.enforce_eager=false", lambda c: c.rollout.enforce_eager, False),
        ("policy.model=org/name-1.5B", lambda c: c.policy.model, "org/name-1.5B"),
        ("policy.model=/a b/c=d#e", lambda c: c.policy.model, "/a b/c=d#e"),
        ('policy.model="5"', lambda c: c.policy.model, "5"),
        ('data.prompts=["a", "b"]', lambda c: c.data.prompts, ["a", "b"]),
        ("rl.algorithm.type=rloo", lambda c: c.rl.algorithm.type, "rloo"),
        ("cluster.cpu_layout=turns", lambda c: c.cluster.cpu_layout, "turns"),
        ("rl.algorithm.type=ppo", lambda c: c.rl.algorithm.epochs, 4),
        (
            "rl.rewards=[{name='short', function='mine.rewards:short', weight=-0.5}]",
            lambda c: (c.rl.rewards[0].name, c.rl.rewards[0].weight),
            ("short", -0.5),
        ),
    ],
)
def test_an_override_replaces_a_value(load, override, read, value):
    assert read(load(override)) == value


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(load):
    text = f"{MINIMAL}\n[rl]\nnum_steps = 2\nmax_tokens = 3"
    config = load("rl.num_steps=4", "rl.num_steps=5", text=text)
    assert (config.rl.num_steps, config.rl.max_tokens) == (5, 3)


def test_an_override_into_a_value_is_refused(refusal):
    message = refusal("reward.model.name=x")
    assert message == "override 'reward.model.name=x': model is a value, not a section"


@pytest.mark.parametrize("override", ["rl.num_steps", "=5", ""])
def test_an_override_without_key_or_value_is_refused(refusal, override):
    assert refusal(override) == f"an override is written key=value, got {override!r}"


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        (["rl.top_p=0.9"], ["rl.top_p = 0.9", "ratio loss"]),
        (["rollout.keep_cache=true"], ["rollout.keep_cache = true", "rl.max_staleness = 0"]),
        (
            ["rollout.tensor_parallel=2", "cluster.rollout.gpus=1"],
            ["rollout.tensor_parallel = 2", "cluster.rollout.gpus = 1"],
        ),
        (["deterministic=true"], ["deterministic = true", 'policy.dtype = "float32"']),
        *(
            (
                ['cluster.weight_transport="nccl"', "cluster.rollout.gpus=1", *more],
                ['cluster.weight_transport = "nccl"', "cluster.learner.gpus"],
            )
            for more in ([], ["cluster.learner.gpus=0.5"])
        ),
        (
            ["rl.algorithm.type=rloo", "rl.algorithm.divide_by_deviation=false"],
            ['rl.algorithm.type = "rloo"', "rl.algorithm.divide_by_deviation = false"],
        ),
        (
            ["rl.algorithm.type=cem", "rl.algorithm.clip_low=0.1"],
            ['rl.algorithm.type = "cem"', "rl.algorithm.clip_low = 0.1"],
        ),
        (
            ["rl.algorithm.elite_share=0.5"],
            ['rl.algorithm.type = "grpo"', "rl.algorithm.elite_share = 0.5"],
        ),
        (
            ["rl.algorithm.type=gspo", "rl.algorithm.dual_clip=3"],
            ['rl.algorithm.type = "gspo"', "rl.algorithm.dual_clip = 3"],
        ),
        (
            ["rl.kl.estimator=k3"],
            ['rl.kl.estimator = "k3"', 'rl.kl.place = "reward"', "gradient"],
        ),
        (
            ["rl.kl.estimator=k1", "rl.kl.place=loss"],
            ['rl.kl.estimator = "k1"', 'rl.kl.place = "loss"', "zero"],
        ),
        (
            ["rl.kl.place=loss", "rl.max_staleness=2"],
            ['rl.kl.place = "loss"', "rl.max_staleness = 2"],
        ),
        (
            ["rl.kl.place=loss", "reward.domain_shift.response=mask"],
            ['rl.kl.place = "loss"', 'reward.domain_shift.response = "mask"'],
        ),
        (
            ["rl.top_p=0.9", "rl.algorithm.type=cem"],
            ["rl.top_p = 0.9", "the KL to the reference"],
        ),
        (
            ["rl.kl.place=loss", "rl.algorithm.type=cem"],
            ['rl.kl.place = "loss"', 'rl.algorithm.type = "cem"'],
        ),
        (
            ["rl.entropy.target=2"],
            ["rl.entropy.target = 2", "rl.entropy.coefficient = 0"],
        ),
        (
            ["rl.kl.target=5", "rl.kl.coefficient=0"],
            ["rl.kl.target = 5", "rl.kl.coefficient = 0"],
        ),
        (
            ["rl.shaping.length_target=20"],
            ["rl.shaping.length_target = 20", "rl.shaping.length_penalty = 0"],
        ),
        (
            ["rl.kl.place=loss", "rl.algorithm.epochs=2"],
            ['rl.kl.place = "loss"', "rl.algorithm.epochs = 2", "optimiser step"],
        ),
        (
            ["rl.kl.place=loss", "rl.algorithm.mini_batches=2"],
            ['rl.kl.place = "loss"', "rl.algorithm.mini_batches = 2"],
        ),
        (
            ["rl.kl.place=loss", "rl.algorithm.type=ppo"],
            ['rl.kl.place = "loss"', "rl.algorithm.epochs = 4"],
        ),
        *(
            (
                ["rl.completions_per_prompt=1", f"rl.algorithm.type={kind}"],
                ["rl.completions_per_prompt = 1", f'rl.algorithm.type = "{kind}"'],
            )
            for kind in ("grpo", "rloo", "gspo", "cem")
        ),
        *(
            (
                ["rl.completions_per_prompt=1", "rl.prompts_per_step=1", *kind],
                ["rl.completions_per_prompt = 1", "rl.prompts_per_step = 1"],
            )
            for kind in (
                ["rl.algorithm.type=reinforce_pp"],
                ["rl.algorithm.type=cem", "rl.algorithm.elite_of=batch"],
            )
        ),
        (
            ["rl.algorithm.type=rloo", "rl.algorithm.ratio=completion"],
            ['rl.algorithm.ratio = "completion"', 'rl.algorithm.normalisation = "token"'],
        ),
        (
            [
                "rl.algorithm.type=rloo",
                "rl.algorithm.ratio=completion",
                "rl.algorithm.normalisation=constant",
                "rl.off_policy.weights=token",
            ],
            ['rl.off_policy.weights = "token"', 'rl.algorithm.ratio = "completion"'],
        ),
        (
            ["rl.entropy.place=reward", "rl.max_staleness=2"],
            ['rl.entropy.place = "reward"', "rl.max_staleness = 2"],
        ),
        (
            ["rl.entropy.place=reward", "rl.algorithm.type=ppo"],
            ['rl.entropy.place = "reward"', "rl.algorithm.epochs = 4"],
        ),
        (
            ["rl.entropy.place=reward", "reward.domain_shift.response=mask"],
            ['rl.entropy.place = "reward"', 'reward.domain_shift.response = "mask"'],
        ),
        (
            ["rl.entropy.place=reward", "rl.algorithm.type=cem"],
            ['rl.entropy.place = "reward"', 'rl.algorithm.type = "cem"'],
        ),
        (
            ["policy.lora.rank=4", "learner.zero_stage=3"],
            ["policy.lora", "learner.zero_stage = 3"],
        ),
        (
            [
                "policy.lora.rank=4",
                'cluster.weight_transport="nccl"',
                "cluster.rollout.gpus=1",
                "cluster.learner.gpus=1",
            ],
            ["policy.lora", 'cluster.weight_transport = "nccl"'],
        ),
        (
            ["rl.off_policy.weights=token", "rl.algorithm.type=cem"],
            ['rl.off_policy.weights = "token"', 'rl.algorithm.type = "cem"'],
        ),
        (
            ["rl.off_policy.weights=token", "rl.algorithm.type=gspo"],
            ['rl.off_policy.weights = "token"', 'rl.algorithm.type = "gspo"'],
        ),
        (
            ["rl.off_policy.truncate=3"],
            ["rl.off_policy.truncate = 3", "rl.off_policy.weights"],
        ),
        (
            ["rl.off_policy.mask_outside=[0.5, 2]"],
            ["rl.off_policy.mask_outside = [0.5, 2]", "rl.off_policy.weights"],
        ),
        (
            ["rl.off_policy.weights=token", "rl.off_policy.mask_outside=[1.5, 2.0]"],
            ["rl.off_policy.mask_outside = [1.5, 2]", "inside"],
        ),
        (
            ["rl.algorithm.type=ppo", "rl.algorithm.critic.learning_rate=1e-5"],
            ["rl.algorithm.critic.learning_rate = 1e-05", "rl.algorithm.critic.model"],
        ),
        (
            ["rl.shaping.ensemble_weight=0"],
            ["rl.shaping.ensemble_weight = 0", "rl.rewards"],
        ),
        (
            [
                "rl.rewards=[{name='a', function='m:f'}, {name='a', function='m:g'}]",
            ],
            ["rl.rewards", "'a'"],
        ),
        (
            ["rl.algorithm.dual_clip=1.1"],
            ["rl.algorithm.dual_clip = 1.1", "rl.algorithm.clip_high = 0.2"],
        ),
        *(
            ([f"rl.{term}.rate=0.3"], [f"rl.{term}.rate = 0.3", f"without rl.{term}.target"])
            for term in ("kl", "entropy")
        ),
        *(
            (
                ["policy.lora.rank=4", f"{key}={value}"],
                [f"{key} = {value}", "policy.lora", "reference.model"],
            )
            for key, value in (
                ("reference.dtype", '"float32"'),
                ("cluster.reference.actors", 2),
                ("cluster.reference.gpus", 1.0),
            )
        ),
        (
            [
                "reward.domain_shift.calibration_completions=0",
                "reward.domain_shift.false_alarm_rate=0.01",
            ],
            [
                "reward.domain_shift.false_alarm_rate = 0.01",
                "reward.domain_shift.calibration_completions = 0",
            ],
        ),
        (
            ["reward.domain_shift.calibration_completions=18"],
            [
                "reward.domain_shift.calibration_completions = 18",
                "reward.domain_shift.false_alarm_rate = 0.05",
                "at least 19",
            ],
        ),
        (
            ["reward.domain_shift.false_alarm_rate=0.001"],
            ["reward.domain_shift.calibration_completions = 128", "at least 999"],
        ),
        *(
            (
                [
                    "rl.rewards=[{name='a', function='m:f'}]",
                    "rl.shaping.ensemble_weight=0",
                    f"rl.shaping.{name}={value}",
                ],
                [f"rl.shaping.{name} = {value}", "rl.shaping.ensemble_weight = 0"],
            )
            for name, value in (("clip", 2.0), ("whiten", "true"))
        ),
    ],
)
def test_a_clash_names_both_settings(refusal, overrides, settings):
    message = refusal(*overrides)
    for setting in settings:
        assert setting in message


@pytest.mark.parametrize("role", ["rollout", "reward", "reference", "learner"])
def test_several_actors_of_a_role_cannot_take_turns_on_the_cpu(refusal, load, role):
    several = f"cluster.{role}.actors=2"
    message = refusal("cluster.cpu_layout=turns", several)
    assert f'cpu_layout = "turns" with cluster.{role}.actors = 2' in message
    assert load(several).cluster.side_by_side == role
    on_gpus = load("cluster.cpu_layout=turns", several, f"cluster.{role}.gpus=1")
    assert on_gpus.cluster.side_by_side is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster.rollout.gpus=1"],
        ["cluster.learner.gpus=1"],
        ["cluster.rollout.gpus=1", "cluster.learner.gpus=0.5"],
    ],
)
def test_nccl_needs_a_whole_gpu_on_both_ends(refusal, overrides):
    message = refusal("cluster.weight_transport=nccl", *overrides)
    assert 'cluster.weight_transport = "nccl"' in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["rl.top_p=1.0"],
        ["rl.algorithm.type=rloo"],
        ["rl.algorithm.type=reinforce_pp", "rl.algorithm.dual_clip=3"],
        ["rl.algorithm.type=gspo", "rl.algorithm.divide_by_deviation=false"],
        ["rl.algorithm.type=cem", "rl.algorithm.elite_of=batch"],
        ["rl.kl.place=loss", "rl.kl.estimator=k3"],
        ["rl.kl.place=loss", "rl.algorithm.type=gspo"],
        ["rl.algorithm.elite_share=0.5", "rl.algorithm.type=cem"],
        ["rl.top_p=0.9", "rl.algorithm.type=cem", "rl.kl.coefficient=0"],
        [
            "rl.algorithm.type=rloo",
            "rl.algorithm.ratio=completion",
            "rl.algorithm.normalisation=constant",
            "rl.off_policy.weights=sequence",
        ],
        ["rl.completions_per_prompt=1", "rl.algorithm.type=reinforce_pp"],
        ["rl.completions_per_prompt=1", "rl.prompts_per_step=1", "rl.algorithm.type=ppo"],
        ["rl.kl.rate=0.3", "rl.kl.target=5"],
        ["policy.lora.rank=4", "reference.dtype=float32", "reference.model=other"],
        ["reward.domain_shift.calibration_completions=19"],
        ["reward.domain_shift.calibration_completions=0"],
        ["rl.temperature=0.01"],
        ["rl.entropy.place=reward", "rl.algorithm.type=ppo", "rl.algorithm.epochs=1"],
        ["rl.algorithm.type=grpo", "rl.algorithm.divide_by_deviation=false"],
        ["cluster.learner.actors=2"],
        ["rollout.keep_cache=true", "rl.max_staleness=1"],
        ["rollout.tensor_parallel=2", "cluster.rollout.gpus=2"],
        ["cluster.weight_transport=nccl", "cluster.rollout.gpus=1", "cluster.learner.gpus=1"],
        [
            "deterministic=true",
            "policy.dtype=float32",
            "reference.dtype=float32",
            "rollout.dtype=float32",
        ],
    ],
)
def test_settings_that_do_not_clash_are_accepted(load, overrides):
    load(*overrides)


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["rl.top_p=0.9"], "rl.top_p"),
        (["rollout.keep_cache=true"], "rollout.keep_cache"),
        (["rollout.tensor_parallel=2"], "rollout.tensor_parallel"),
        (["cluster.weight_transport=nccl"], "cluster.weight_transport"),
        (["ensemble.max_tokens=96", "rl.max_tokens=65"], "reads at most 64 tokens"),
        (
            ["rl.algorithm.type=rloo", "rl.algorithm.divide_by_deviation=false"],
            "rl.algorithm.divide_by_deviation",
        ),
    ],
)
def test_the_demo_refuses_what_reinforcement_learning_refuses(tmp_path, overrides, setting):
    path = tmp_path / "demo.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match=re.escape(setting)):
        load_config(DemoConfig, path, overrides)


# Both commands with a loop


@pytest.mark.parametrize("root", [RLConfig, DemoConfig])
def test_every_command_with_a_loop_has_the_same_sections_for_it(root):
    assert issubclass(root, LoopConfig)
    shared = set(known_keys(LoopConfig))
    assert {"seed", "policy.model", "rl.kl.coefficient", "cluster.learner.actors"} <= shared
    assert shared <= set(known_keys(root))


def test_deterministic_lists_all_that_stands_in_its_way(refusal):
    wrong = {
        "rl.max_staleness": (0, 2),
        "cluster.rollout.actors": (1, 3),
        "cluster.learner.actors": (1, 2),
        "policy.dtype": ("float32", "bfloat16"),
        "reference.dtype": ("float32", "bfloat16"),
        "rollout.dtype": ("float32", "bfloat16"),
    }
    overrides = [f"{key}={is_}" for key, (_, is_) in wrong.items()]
    message = refusal("deterministic=true", *overrides)
    for key, (needed, is_) in wrong.items():
        assert f"{key} = {json.dumps(needed)} (it is {json.dumps(is_)})" in message


def test_deterministic_lists_nothing_that_is_right(refusal):
    message = refusal(
        "deterministic=true",
        "policy.dtype=float32",
        "reference.dtype=bfloat16",
        "rollout.dtype=float32",
    )
    assert message.endswith('needs reference.dtype = "float32" (it is "bfloat16")')


def test_a_configuration_is_frozen_at_every_depth(load):
    config = load()
    for section, name in [
        (config, "seed"),
        (config.rl, "num_steps"),
        (config.rl.kl, "coefficient"),
    ]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)


def test_errors_name_where_the_values_came_from():
    with pytest.raises(ConfigError, match=r"^the run's config\.json: "):
        parse_config(RLConfig, {}, "the run's config.json")


def test_a_resolved_configuration_reads_back_the_same(load):
    config = load("rl.max_staleness=2", "run.dir=here")
    values = json.loads(config.model_dump_json())
    assert parse_config(RLConfig, values, "config.json") == config


@pytest.mark.parametrize(
    ("function", "variable", "default"),
    [(data_path, "PAVLOV_DATA", "../shared/data"), (runs_path, "PAVLOV_RUNS", "runs")],
)
def test_paths_are_made_absolute_against_their_variable(
    function, variable, default, tmp_path, monkeypatch
):
    tmp_path = tmp_path.resolve()
    here = tmp_path / "repository"
    here.mkdir()
    monkeypatch.chdir(here)

    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    assert function("a/b") == tmp_path / "elsewhere" / "a" / "b"
    assert function("/a/b") == Path("/a/b")
    assert function("~/b") == Path.home().resolve() / "b"

    monkeypatch.setenv(variable, "relative")
    assert function("a") == here / "relative" / "a"

    for unset in (lambda: monkeypatch.delenv(variable), lambda: monkeypatch.setenv(variable, "")):
        unset()
        assert function("a") == (here / default / "a").resolve()


def test_the_two_variables_are_not_mixed_up(monkeypatch):
    monkeypatch.setenv("PAVLOV_DATA", "/data")
    monkeypatch.setenv("PAVLOV_RUNS", "/runs")
    assert (data_path("a"), runs_path("a")) == (Path("/data/a"), Path("/runs/a"))
