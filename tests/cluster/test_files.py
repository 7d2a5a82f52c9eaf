"""The run folder: who may have it, and what of it survives a crash."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.files import (
    RunFolder,
    as_json,
    folder_beside,
    in_ray_job,
    resolve_run_folder,
    write_atomically,
)
from rlhf.config import Section
from rlhf.errors import CheckpointError, RunFolderError

ROOT = Path(__file__).parents[2]


class Adapter(Section):
    rank: int = 8


class Policy(Section):
    lora: Adapter | None = None


class Stage(Section):
    path: str
    weight: float = 1.0


class Steps(Section):
    num_steps: int = 3
    prompts_per_step: int = 8
    stages: tuple[Stage, ...] = (Stage(path="a"),)


class Run(Section):
    dir: str | None = None


class Settings(Section):
    seed: int = 1
    rl: Steps = Steps()
    run: Run = Run()
    policy: Policy = Policy()


CONFIG = Settings()


def test_what_is_no_number_is_null_in_a_file_that_any_reader_of_json_understands():
    values = {"a": math.nan, "b": [1, (-math.inf, 0.5)], "c": {"d": math.inf, "e": "NaN"}}
    assert as_json(values) == '{"a": null, "b": [1, [null, 0.5]], "c": {"d": null, "e": "NaN"}}'


# Where it stands


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAVLOV_RUNS", str(tmp_path))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    return tmp_path


@pytest.fixture
def ray_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")


def test_a_run_stands_under_the_configs_name_or_its_own_below_pavlov_runs(runs):
    config = Path("configs/rl_hh_cpu.toml")
    assert resolve_run_folder(None, config) == runs / "rl_hh_cpu"
    assert resolve_run_folder("mine/first", config) == runs / "mine" / "first"
    assert resolve_run_folder("/elsewhere/run", config) == Path("/elsewhere/run")
    assert not in_ray_job()


@pytest.mark.parametrize("uri", ["s3://bucket/run", "gs://b/r", "file:///tmp/run"])
def test_a_uri_is_refused_with_the_remedy(runs, uri):
    with pytest.raises(RunFolderError, match="mount the storage and give its path"):
        resolve_run_folder(uri, Path("rl.toml"))


@pytest.mark.parametrize("variable", [None, "", "runs"])
def test_inside_a_ray_job_a_relative_folder_is_refused_with_the_remedy(
    ray_job, variable, monkeypatch
):
    if variable is None:
        monkeypatch.delenv("PAVLOV_RUNS", raising=False)
    else:
        monkeypatch.setenv("PAVLOV_RUNS", variable)
    assert in_ray_job()
    for directory in (None, "mine"):
        with pytest.raises(RunFolderError, match=r"inside a Ray job .*PAVLOV_RUNS"):
            resolve_run_folder(directory, Path("rl.toml"))


def test_inside_a_ray_job_an_absolute_folder_is_accepted(runs, ray_job):
    assert resolve_run_folder(None, Path("rl.toml")) == runs / "rl"
    assert resolve_run_folder("/shared/run", Path("rl.toml")) == Path("/shared/run")


# Who has it


HOLD = """
import sys
from pathlib import Path
from cluster.files import RunFolder
from rlhf.config import Section
from rlhf.errors import PavlovError
try:
    folder = RunFolder.claim(Path(sys.argv[1]), Section(), resume=sys.argv[2] == "resume")
except PavlovError as error:
    print(f"refused: {error}", flush=True)
    sys.exit(2)
print("held", flush=True)
sys.stdin.read()
if sys.argv[3] == "release":
    folder.release()
    sys.stdout.write("released\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""


@contextmanager
def another_process(folder: Path, *, resume: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process that claims the folder and keeps it until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), "resume" if resume else "new", "keep"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_refused_to_another_process_until_that_dies(tmp_path, resume):
    run = tmp_path / "run"
    with another_process(run) as process:
        assert says(process) == "held"
        with pytest.raises(RunFolderError, match=f"{run} is in use by another process"):
            RunFolder.claim(run, CONFIG, resume=resume)
    RunFolder.claim(run, CONFIG, resume=resume).release()


def test_a_folder_held_here_is_refused_there_until_it_is_released(tmp_path):
    run = tmp_path / "run"
    folder = RunFolder.claim(run, CONFIG, resume=False)
    with another_process(run, resume=True) as process:
        assert says(process) == f"refused: {run} is in use by another process"
    folder.release()
    with another_process(run, resume=True) as process:
        assert says(process) == "held"


def test_a_claim_makes_the_folder_and_records_the_configuration(tmp_path):
    run = tmp_path / "new" / "run"
    folder = RunFolder.claim(run, CONFIG, resume=False)
    assert folder.path == run
    assert recorded(run) == CONFIG
    assert {path.name for path in run.iterdir()} == {"config.json", "run.lock"}
    folder.release()


def test_a_folder_that_holds_a_run_is_only_resumed(tmp_path):
    RunFolder.claim(tmp_path, CONFIG, resume=False).release()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RunFolderError, match=f"{tmp_path} already holds a run; .*--resume"):
        RunFolder.claim(tmp_path, CONFIG, resume=False)
    with pytest.raises(RunFolderError, match="already holds a run; choose another"):
        RunFolder.claim(tmp_path, CONFIG, resume=None)
    RunFolder.claim(tmp_path, CONFIG, resume=True).release()


def recorded(run: Path) -> Settings:
    return Settings.model_validate_json((run / "config.json").read_text())


@pytest.mark.parametrize(
    ("new", "refused"),
    [
        (Settings(rl=Steps(num_steps=6)), ""),
        (Settings(run=Run(dir="x")), ""),
        (Settings(seed=2), "started with seed = 1 and cannot go on with 2"),
        (
            Settings(policy=Policy(lora=Adapter(rank=4))),
            "started with policy.lora.rank = null and cannot go on with 4",
        ),
        (
            Settings(rl=Steps(prompts_per_step=16)),
            "started with rl.prompts_per_step = 8 and cannot go on with 16",
        ),
    ],
)
def test_a_run_is_resumed_with_its_own_settings_and_says_which_it_has(tmp_path, new, refused):
    RunFolder.claim(tmp_path, CONFIG, resume=False).release()
    if refused:
        with pytest.raises(RunFolderError, match=refused):
            RunFolder.claim(tmp_path, new, resume=True)
        new = CONFIG
    RunFolder.claim(tmp_path, new, resume=True).release()
    assert recorded(tmp_path) == new


def test_a_run_of_an_earlier_version_goes_on_with_the_defaults_of_what_is_new_alone(tmp_path):
    RunFolder.claim(tmp_path, CONFIG, resume=False).release()
    older = {
        "seed": 1,
        "a_setting_that_is_gone": 3,
        "rl": {"num_steps": 3, "gone": {"x": 1}, "stages": [{"path": "a", "gone": None}]},
        # Refused today, and may change.
        "run": {"dir": 3},
    }
    text = json.dumps(older)
    (tmp_path / "config.json").write_text(text)
    for new, what in (
        (Settings(rl=Steps(prompts_per_step=16)), "prompts_per_step = 8"),
        (Settings(rl=Steps(stages=(Stage(path="a", weight=2.0),))), '"weight": 1.0'),
        (Settings(policy=Policy(lora=Adapter())), "policy.lora.rank = null"),
    ):
        with pytest.raises(RunFolderError, match=f"was started with .*{what}"):
            RunFolder.claim(tmp_path, new, resume=True)
        assert (tmp_path / "config.json").read_text() == text
    RunFolder.claim(tmp_path, CONFIG, resume=True).release()
    assert recorded(tmp_path) == CONFIG


@pytest.mark.parametrize("text", ['{"seed": ', "[]", '{"seed": "one"}'])
def test_a_damaged_configuration_is_one_sentence_and_lets_the_folder_go(tmp_path, text):
    RunFolder.claim(tmp_path, CONFIG, resume=False).release()
    (tmp_path / "config.json").write_text(text)
    for _ in range(2):
        with pytest.raises(RunFolderError, match="is damaged"):
            RunFolder.claim(tmp_path, CONFIG, resume=True)
    assert (tmp_path / "config.json").read_text() == text


def test_what_a_killed_write_left_is_no_reason_to_refuse_either(tmp_path):
    (tmp_path / ".reward.part").mkdir()
    RunFolder.claim(tmp_path, CONFIG, resume=None).release()


def test_a_run_that_ended_before_its_first_step_is_no_reason_to_refuse_the_next(tmp_path):
    RunFolder.claim(tmp_path, CONFIG, resume=False).release()
    RunFolder.claim(tmp_path, Settings(seed=2), resume=False).release()
    assert recorded(tmp_path) == Settings(seed=2)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder.claim(tmp_path, CONFIG, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_where_there_is_no_run_there_is_nothing_to_resume_and_nothing_is_made(tmp_path):
    with pytest.raises(RunFolderError, match="holds no run to resume"):
        RunFolder.claim(tmp_path / "run", CONFIG, resume=True)
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file, not a run folder"):
        RunFolder.claim(tmp_path / "file", CONFIG, resume=False)
    with pytest.raises(RunFolderError, match="cannot be made"):
        RunFolder.claim(tmp_path / "file" / "run", CONFIG, resume=False)


# Checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder.claim(tmp_path / "run", CONFIG, resume=False)
    yield folder
    folder.release()


def save(folder: RunFolder, step: int, keep: int = 10, content: str = "weights") -> Path:
    with folder.new_checkpoint(step, {"prompts": "p"}, keep) as beside:
        (beside / "deepspeed").mkdir()
        (beside / "deepspeed" / "rank0.pt").write_text(f"{content} of step {step}")
        (beside / "other.pt").write_text("other")
    return folder.path / "checkpoints" / f"step-{step:06d}"


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


def test_a_checkpoint_comes_back_with_its_state(folder):
    assert folder.newest_checkpoint() is None
    path = save(folder, 3)
    newest = folder.newest_checkpoint()
    assert newest is not None
    assert newest[0] == path
    assert (newest[1]["step"], newest[1]["prompts"]) == (3, "p")
    assert (path / "deepspeed" / "rank0.pt").read_text() == "weights of step 3"


def test_a_checkpoint_is_not_there_before_it_is_whole(folder):
    with folder.new_checkpoint(1, {}, 2) as beside:
        (beside / "part.pt").write_text("half")
        assert folder.checkpoints == []
        assert folder.newest_checkpoint() is None
    assert [path.name for path in folder.checkpoints] == ["step-000001"]
    assert not beside.exists()


def test_a_checkpoint_that_fails_leaves_nothing_and_the_one_before_it_stays(folder):
    save(folder, 1)
    with pytest.raises(OSError, match="disk full"):
        with folder.new_checkpoint(2, {}, 1) as beside:
            (beside / "part.pt").write_text("half")
            raise OSError("disk full")
    assert names(folder) == ["step-000001"]


def test_what_a_killed_process_left_beside_is_not_taken_over(folder):
    stale = folder.path / "checkpoints" / ".step-000002.part"
    stale.mkdir(parents=True)
    (stale / "old.pt").write_text("old")
    assert folder.newest_checkpoint() is None
    path = save(folder, 2)
    assert not (path / "old.pt").exists()
    assert names(folder) == ["step-000002"]


def test_only_the_newest_are_kept(folder):
    for step in (2, 4, 10, 100):
        save(folder, step, keep=2)
    assert names(folder) == ["step-000010", "step-000100"]
    assert folder.newest_checkpoint()[1]["step"] == 100


def test_the_same_step_again_replaces_the_checkpoint_whole(folder):
    save(folder, 1, content="old")
    (folder.path / "checkpoints" / "step-000001" / "leftover.pt").write_text("x")
    path = save(folder, 1, content="new")
    assert (path / "deepspeed" / "rank0.pt").read_text() == "new of step 1"
    assert not (path / "leftover.pt").exists()
    assert names(folder) == ["step-000001"]


DAMAGES = {
    "cut file": lambda path: (path / "deepspeed" / "rank0.pt").write_text("weigh"),
    "emptied file": lambda path: (path / "other.pt").write_text(""),
    "missing file": lambda path: (path / "deepspeed" / "rank0.pt").unlink(),
    "missing state": lambda path: (path / "state.json").unlink(),
    "cut state": lambda path: (path / "state.json").write_text('{"step": 2, "fi'),
    "state without sizes": lambda path: (path / "state.json").write_text('{"step": 2}'),
    "state of another kind": lambda path: (path / "state.json").write_text("[]"),
    "state that is no text": lambda path: (path / "state.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(folder, damage):
    good, newest = save(folder, 1), save(folder, 2)
    DAMAGES[damage](newest)
    found = folder.newest_checkpoint()
    assert found is not None
    assert found[0] == good
    assert found[1]["step"] == 1


@pytest.mark.parametrize(("keep", "left"), [(1, [6]), (2, [5, 6])])
def test_a_run_that_passed_over_a_damaged_checkpoint_keeps_what_it_writes(folder, keep, left):
    save(folder, 5, keep=9)
    DAMAGES["cut file"](save(folder, 10, keep=9))
    with folder.new_checkpoint(6, {}, keep):
        # Until the new one is whole, nothing goes.
        assert names(folder) == [".step-000006.part", "step-000005", "step-000010"]
    assert names(folder) == [f"step-{step:06d}" for step in left]
    assert folder.newest_checkpoint()[1]["step"] == 6


def test_where_all_checkpoints_are_damaged_each_is_named(folder):
    for step, damage in ((1, "cut file"), (2, "missing state")):
        DAMAGES[damage](save(folder, step))
    with pytest.raises(CheckpointError) as caught:
        folder.newest_checkpoint()
    assert "step-000002 (state.json), step-000001 (deepspeed/rank0.pt)" in str(caught.value)
    assert str(folder.path) in str(caught.value)


# Written beside and renamed


def test_a_reader_sees_the_old_text_or_the_new_one_whole(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def fails(self: Path, target: object) -> None:
        raise OSError("killed before the rename")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="killed"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_takes_its_name_only_when_its_block_ends_well(tmp_path):
    target = tmp_path / "policy"
    with folder_beside(target) as beside:
        (beside / "config.json").write_text("first")
        assert not target.exists()
    with pytest.raises(RuntimeError):
        with folder_beside(target) as beside:
            (beside / "config.json").write_text("second")
            raise RuntimeError
    assert (target / "config.json").read_text() == "first"
    with folder_beside(target) as beside:
        (beside / "other.json").write_text("third")
        assert (target / "config.json").read_text() == "first"
    assert [path.name for path in target.iterdir()] == ["other.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
