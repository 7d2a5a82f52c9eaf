"""The one door: a user's mistake is one sentence and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import pavlov
from rlhf.config import DemoConfig, RewardConfig, RLConfig, load_config, read_again
from rlhf.errors import ConfigError
from rlhf.rows import reply_room

ROOT = Path(__file__).parents[1]
COMMANDS = [command.callback.__name__ for command in pavlov.app.registered_commands]


@dataclass(frozen=True)
class Outcome:
    """What a call answered."""

    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


class Place:
    """An empty folder to stand in, with runs beside it."""

    def __init__(self, folder: Path) -> None:
        self.here, self.runs, self.cache = folder / "here", folder / "runs", folder / "cache"
        self.here.mkdir()
        self.environment = {
            **os.environ,
            "PAVLOV_RUNS": str(self.runs),
            "PAVLOV_CACHE": str(self.cache),
            "PAVLOV_DATA": str(self.here),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
            self.environment.pop(name, None)

    def call(self, *arguments: object) -> Outcome:
        done = subprocess.run(
            [sys.executable, str(ROOT / "pavlov.py"), *map(str, arguments)],
            cwd=self.here,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def call_here(self, *arguments: object) -> Outcome:
        """The same in this process, where what is imported stays so."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        before = signal.getsignal(signal.SIGTERM)
        with (
            contextlib.chdir(self.here),
            mock.patch.dict(os.environ, self.environment, clear=True),
            mock.patch.object(sys, "argv", ["pavlov", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                pavlov.main()
            except SystemExit as ended:
                code = int(ended.code or 0)
            finally:
                signal.signal(signal.SIGTERM, before)
        return Outcome(code, out.getvalue(), err.getvalue())

    def write(self, name: str, text: str) -> Path:
        (self.here / name).write_text(text)
        return self.here / name

    def everything(self) -> set[str]:
        roots = [self.here, self.runs, self.cache]
        return {str(path) for root in roots if root.exists() for path in [root, *root.rglob("*")]}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def refused(place: Place) -> Callable[..., str]:
    """The sentence with which a call is refused; nothing is written by it."""

    def refused(*arguments: object, call: Call = place.call_here) -> str:
        before = place.everything()
        outcome = call(*arguments)
        assert outcome.code == 2, outcome.err
        assert "Traceback" not in outcome.err + outcome.out
        [sentence] = [line for line in outcome.err.splitlines() if line.startswith("pavlov: ")]
        assert outcome.err.splitlines()[-1] == sentence
        assert place.everything() == before
        return sentence.removeprefix("pavlov: ")

    return refused


RL = """
[policy]
model = "{model}"
[reward]
model = "{reward}"
[data]
prompts = ["prompts.jsonl"]
[rl]
num_steps = 1
[rollout]
kv_cache_gib = 1.0
"""


@pytest.fixture
def rl_file(place: Place, tiny_model: Path, tiny_reward_model: Path) -> Path:
    """A configuration with nothing wrong in it; it would start the actors."""
    place.write("prompts.jsonl", '{"prompt": "What is a good name for a cat?"}\n')
    return place.write("rl.toml", RL.format(model=tiny_model, reward=tiny_reward_model))


# A configuration that is wrong


def test_a_missing_file_is_named(place, refused):
    for command in ("rl", "reward"):
        sentence = "there is no configuration file missing.toml"
        assert refused(command, "missing.toml") == sentence
        assert refused(command, "missing.toml", call=place.call) == sentence


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rl.num_step=3"], "rl.num_step is not a known key; did you mean rl.num_steps?"),
        (["rl.num_steps=many"], "rl.num_steps = 'many': input should be"),
        (["rl.top_p=0.9"], "rl.top_p = 0.9 with a ratio loss"),
        (["rl.num_steps"], "an override is written key=value, got 'rl.num_steps'"),
        (["rl.num_steps=3\nseed = 1"], "rl.num_steps = '3\\nseed = 1': input should be"),
        (["rl.num_steps=" + "9" * 5000], "input should be"),
        (["rl.num_steps=" + "[" * 3000], "input should be"),
        (["data.prompts=['~nobody-here/p.jsonl']"], "~nobody-here/p.jsonl: there is no such user"),
        (["run.dir=a\0b"], "'a\\x00b' is no path: it holds a NUL character"),
        (["rl.max_tokens=2000"], "data.max_prompt_tokens + rl.max_tokens = 2256, but"),
        (["rl.max_tokens=87"], "rl.max_tokens = 87, but the reward model reads at most 86 tokens"),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_its_key(place, rl_file, refused, arguments, says):
    assert says in refused("rl", rl_file, *arguments)


def test_a_file_that_is_not_toml_is_named(place, refused):
    place.write("broken.toml", "[rl\n")
    assert refused("rl", "broken.toml").startswith("broken.toml is not valid TOML")


def test_a_file_with_a_byte_order_mark_is_read(place, rl_file, refused):
    rl_file.write_bytes(b"\xef\xbb\xbf" + rl_file.read_bytes())
    assert "rl.num_step is not a known key" in refused("rl", rl_file, "rl.num_step=3")


# Models and data that cannot be used


def test_a_model_folder_without_weights_is_refused(place, rl_file, refused, tiny_model):
    bare = place.here / "bare"
    bare.mkdir()
    shutil.copy(tiny_model / "config.json", bare)
    assert f"{bare} has no weights" in refused("rl", rl_file, f"policy.model={bare}")


def test_a_model_folder_whose_config_says_nothing_is_refused(place, rl_file, refused, tiny_model):
    odd = Path(shutil.copytree(tiny_model, place.here / "odd"))
    for text in ("{}", "[1]", "no json"):
        (odd / "config.json").write_text(text)
        message = refused("rl", rl_file, f"policy.model={odd}")
        assert message == f"{odd / 'config.json'} is damaged: it names no model_type"


def test_a_column_that_python_has_no_value_for_is_one_sentence(place, rl_file, refused):
    days = pa.array([2**31 - 1], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"prompt": ["Hi"], "id": days}), place.here / "p.parquet")
    message = refused("rl", rl_file, "data.prompts=['p.parquet']")
    assert message.startswith("none of the 1 rows in ")
    assert message.endswith("p.parquet: id that cannot be read")


def test_a_missing_reward_model_is_refused(place, rl_file, refused):
    message = refused("rl", rl_file, "reward.model=/no/such/reward")
    assert message.startswith("/no/such/reward is not a reward model")
    message = refused("score", "--reward", "/no/such/reward", "--data", "pairs.jsonl", "--json")
    assert message.startswith("/no/such/reward is not a reward model")


def test_data_that_cannot_be_read_is_refused(place, rl_file, refused):
    assert "there is no data file" in refused("rl", rl_file, 'data.prompts=["none.jsonl"]')
    place.write("prompts.jsonl", "no json\n{}\n")
    message = refused("rl", rl_file)
    assert "none of the 2 rows" in message
    assert "line 1" in message


def test_a_run_folder_that_holds_something_is_refused(place, rl_file, refused):
    run = place.runs / "rl"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    assert f"{run} already holds a run; go on with --resume" in refused("rl", rl_file)


def test_a_reward_function_that_is_not_there_is_refused(rl_file, refused):
    own = "rl.rewards=[{name='own', function='nowhere:f'}]"
    assert "reward function nowhere:f cannot be loaded" in refused("rl", rl_file, own)


@pytest.fixture
def busy(place: Place) -> Iterator[Path]:
    """A run folder that another process holds."""
    run = place.runs / "busy"
    code = (
        "import sys; from pathlib import Path; from cluster.files import RunFolder; "
        "from rlhf.config import Section; "
        f"folder = RunFolder.claim(Path({str(run)!r}), Section(), resume=False); "
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        env=place.environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    yield run
    holder.kill()
    holder.communicate(timeout=30)


def test_a_run_folder_in_use_is_refused(place, rl_file, refused, busy):
    recorded = (busy / "config.json").read_text()
    message = refused("rl", rl_file, "run.dir=busy", call=place.call)
    assert message == f"{busy} is in use by another process"
    assert (busy / "config.json").read_text() == recorded


def test_a_demo_does_not_move_into_a_folder_of_something_else(place, refused):
    place.write("thesis.tex", "years of work")
    message = refused("demo", "--out", place.here)
    assert f"{place.here} is not empty and holds no demo" in message


def test_a_demo_does_not_move_into_a_file(place, refused):
    path = place.write("notes.txt", "mine")
    assert f"{path} is not empty and holds no demo" in refused("demo", "--out", path)


def test_inside_a_ray_job_a_demo_wants_a_folder_that_lasts(place, refused):
    place.environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = "{}"
    assert "temporary copy" in refused("demo")


REWARD = """
[data]
train = ["pairs.jsonl"]
[ensemble]
model = "{model}"
"""


def test_what_a_bad_row_says_is_quoted_and_not_obeyed(place, refused, tiny_model):
    """Text in brackets is markup to a terminal library."""
    place.write("reward.toml", REWARD.format(model=tiny_model))
    rows = [
        {"prompt": [{"role": "[/INST]", "content": "x"}], "chosen": "a", "rejected": "b"},
        {"prompt": "Why [red]?", "chosen": "a", "rejected": "b"},
    ]
    place.write("pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert "1 pairs judged by 'overall' with 1 different first user turns are too few" in refused(
        "reward", "reward.toml"
    )


def test_a_reference_that_reads_other_tokens_is_refused(place, rl_file, refused, tiny_model):
    other = Path(shutil.copytree(tiny_model, place.here / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "reads other tokens" in refused("rl", rl_file, f"reference.model={other}")


def test_a_critic_that_reads_less_than_the_policy_writes_is_refused(
    place, rl_file, refused, tiny_model
):
    critic = Path(shutil.copytree(tiny_model, place.here / "critic"))
    written = json.loads((critic / "config.json").read_text())
    (critic / "config.json").write_text(json.dumps(written | {"max_position_embeddings": 128}))
    options = ("rl.algorithm.type=ppo", f"rl.algorithm.critic.model={critic}")
    said = f"data.max_prompt_tokens + rl.max_tokens = 320, but {critic} reads at most 128 tokens"
    assert refused("rl", rl_file, *options) == said


def test_truncated_weights_are_one_sentence(place, rl_file, refused, tiny_model):
    cut = Path(shutil.copytree(tiny_model, place.here / "cut"))
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "is damaged" in refused("rl", rl_file, f"policy.model={cut}", f"reference.model={cut}")


def test_a_longer_conversation_than_the_model_reads_is_refused(refused, tiny_model):
    options = (f"policy.model={tiny_model}", "serve.max_tokens=100000")
    assert "reads at most" in refused("serve", ROOT / "configs" / "serve.toml", *options)


# Help and output


def test_settings_that_a_promotion_would_not_read_are_refused(refused):
    said = refused("promote", "runs/x", "label.redundancy=2", "--without-evidence", "a test")
    assert said.startswith("label.redundancy=2 sets the configuration of the labels")


IMPORT = ("import", "--pairs", "x.jsonl")
FLAGGED, JUDGEMENTS = ("import", "--flagged", "x"), ("import", "--judgements", "x.jsonl")
EXPORT = ("export", "--out", "x.jsonl", "--judgements")


@pytest.mark.parametrize(
    ("command", "option", "when"),
    [
        (IMPORT, ("--limit", "3"), "with --pairs"),
        (IMPORT, ("--format", "pavlov"), "with --pairs"),
        (FLAGGED, ("--honeypots",), "with --flagged"),
        (FLAGGED, ("--format", "mt-bench"), "with --flagged"),
        (JUDGEMENTS, ("--honeypots",), "with --judgements"),
        (JUDGEMENTS, ("--limit", "3"), "with --judgements"),
        (EXPORT, ("--kind", "person"), "with --judgements"),
        (EXPORT, ("--criterion", "overall"), "with --judgements"),
        (EXPORT, ("--method", "majority"), "with --judgements"),
        (("invite", "--name", "ann", "--again"), ("--role", "owner"), "with --again"),
        (("invite", "--name", "ann", "--again"), ("--kind", "model"), "with --again"),
        (("judge", "--reward", "x"), ("--truth", "x.jsonl"), "with --reward"),
    ],
)
def test_an_option_of_labelling_that_would_change_nothing_is_refused(
    refused, command, option, when
):
    name, *further = command
    config = ROOT / "configs/label.toml"
    said = refused("label", name, config, "--project", "x", *further, *option)
    assert said == f"{option[0]} changes nothing {when}: leave it out"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--rollback", "--project", "x"), "--project changes nothing with --rollback"),
        (("--rollback", "--kind", "model"), "--kind changes nothing with --rollback"),
        (("--rollback", "--labels", "x.toml"), "--labels changes nothing with --rollback"),
        (("--rollback", "--without-evidence", "a test"), "--without-evidence changes nothing with"),
        (
            ("x", "--without-evidence", "a test", "--kind", "model"),
            "--kind changes nothing without",
        ),
        (
            ("x", "--without-evidence", "a test", "--labels", "y"),
            "--labels changes nothing without",
        ),
    ],
)
def test_an_option_of_a_promotion_that_would_change_nothing_is_refused(refused, arguments, says):
    assert refused("promote", *arguments).startswith(says)


def test_a_promotion_that_is_refused_leaves_nothing(place, refused, tiny_model):
    assert "nothing is served" in refused("promote", "--rollback")
    place.runs.mkdir()
    said = refused("promote", tiny_model, "--without-evidence", "tried by hand")
    assert said.startswith("nothing is served under the name pavlov")


@pytest.fixture(scope="module")
def helped() -> dict[str, str]:
    """The help of every command, in this process."""
    runner = CliRunner()
    outcomes = {name: runner.invoke(pavlov.app, [name, "--help"]) for name in COMMANDS}
    assert {outcome.exit_code for outcome in outcomes.values()} == {0}
    return {name: outcome.output for name, outcome in outcomes.items()}


def example(text: str) -> list[str]:
    found = re.search(r"Example: (pavlov [^\n]*(?:\n +[^\n]+)*)", text)
    assert found, text
    return shlex.split(found.group(1))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_shows_an_example_of_it(helped, name):
    words = example(helped[name])
    assert words[:2] == ["pavlov", name]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_names_files_options_and_keys_that_exist(helped, name):
    words = example(helped[name])[2:]
    for option in (word for word in words if word.startswith("--")):
        assert option in helped[name].partition("Example:")[0]
    configs = [ROOT / word for word in words if word.endswith(".toml")]
    overrides = [word for word in words if "=" in word]
    assert all(path.is_file() for path in configs)
    assert not overrides or configs
    for path in configs:
        read(path, overrides)


def test_help_in_a_shell_lists_the_commands(place):
    outcome = place.call("--help")
    assert outcome.code == 0
    assert all(re.search(rf"^ +{name} ", outcome.out, re.MULTILINE) for name in COMMANDS)
    without = place.call()
    assert "Usage" in without.out + without.err


def test_an_unknown_command_or_a_missing_argument_is_a_usage_error(place):
    for arguments in (["train"], ["rl"], ["score"]):
        outcome = place.call(*arguments)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err


def test_an_interrupt_is_said(place, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.doctor.examine", interrupted)
    outcome = place.call_here("doctor")
    assert (outcome.code, outcome.err.strip()) == (130, "pavlov: interrupted")


def test_a_full_disk_behind_the_output_is_one_sentence(place):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "pavlov.py"), "doctor", "--json"],
            env=place.environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr


def test_doctor_says_where_the_cache_cannot_be(place):
    place.environment["PAVLOV_CACHE"] = str(place.write("file", "") / "cache")
    [problem] = [
        each
        for each in json.loads(place.call_here("doctor", "--json").out)["problems"]
        if "cache" in each
    ]
    assert "PAVLOV_CACHE" in problem


def test_doctor_in_json_prints_one_object_and_nothing_else(place):
    outcome = place.call("doctor", "--json")
    findings = json.loads(outcome.out)
    assert {"ok", "problems", "versions", "cpus", "gpus", "memory_gib"} <= set(findings)
    assert outcome.code == (0 if findings["ok"] else 1)
    assert not place.cache.exists()


# The configurations that are shipped


def read(path: Path, overrides: list[str]) -> object:
    """The configuration by the class of its command, told by the file's name where it can be."""
    by_name = {"rl": RLConfig, "gpu": RLConfig, "reward": RewardConfig, "demo": DemoConfig}
    if root := by_name.get(path.stem.partition("_")[0]):
        return load_config(root, path, overrides)
    import rlhf.config

    roots = [
        value
        for name, value in vars(rlhf.config).items()
        if name.endswith("Config") and isinstance(value, type) and name != "LoopConfig"
    ]
    reasons = []
    for root in roots:
        try:
            return load_config(root, path, overrides)
        except ConfigError as error:
            reasons.append(str(error))
    pytest.fail(f"{path.name} is of no command: {reasons}")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_configuration_is_valid_and_comes_back_from_what_a_run_records(path):
    config = read(path, [])
    recorded = json.loads(config.model_dump_json()) | {"a_setting_that_is_gone": 1}
    assert read_again(type(config), recorded) == config


@pytest.mark.parametrize("name", ["rl_hh_cpu", "gpu_8x", "sft_hh_cpu", "tune_hh_cpu"])
def test_the_shipped_reward_model_reads_what_the_shipped_configurations_write(name):
    rows = load_config(RewardConfig, ROOT / "configs" / "reward_hh_cpu.toml").ensemble.max_tokens
    config = read(ROOT / "configs" / f"{name}.toml", [])
    asked, answer = (
        (config.data, config.rl) if isinstance(config, RLConfig) else (config.answers,) * 2
    )
    assert answer.max_tokens <= reply_room(rows, asked.max_prompt_tokens)


def test_configurations_are_shipped_for_every_command_that_takes_one():
    names = {path.name for path in (ROOT / "configs").glob("*.toml")}
    commands = ("demo", "rl_hh_cpu", "reward_hh_cpu", "sft_hh_cpu", "tune_hh_cpu", "label", "serve")
    assert {*(f"{name}.toml" for name in commands), "gpu_8x.toml"} <= names
