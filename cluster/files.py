"""The run folder: claimed once, written beside and renamed, resumed from its newest checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.config import Section, expanded, read_again, runs_path
from rlhf.errors import CheckpointError, RunFolderError

_CLAIM = {"run.lock", "config.json"}
"""What a run leaves that ended before its first step: no reason to refuse the next one."""


_MAY_CHANGE = (
    *("rl.num_steps", "run", "cluster"),
    *("learner.micro_batch_tokens", "rollout.max_sequences", "rollout.kv_cache_gib"),
    "rollout.gpu_memory_utilization",
)
"""Settings that a resumed run may be given anew: how long, where, and in how much memory."""


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside and rename it: a reader sees the old one or the new one, whole."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    beside.rename(path)


def as_json(values: Any, indent: int | None = None) -> str:
    """JSON of plain data. NaN and infinity, which JSON does not have, are null."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_steps_before(path: Path, first_step: int) -> dict[str, Any] | None:
    """Drop the rows of steps from `first_step` on, and what a crash has torn; returns the last row
    that is left."""
    if not path.is_file():
        return None
    lines = path.read_text(errors="replace").splitlines()
    kept = [line for line in lines if _step_of(line) < first_step]
    write_atomically(path, "".join(f"{line}\n" for line in kept))
    return json.loads(kept[-1]) if kept else None


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 60


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A new folder that takes the name `target` when the block ends without an error."""
    beside = target.with_name(f".{target.name}.part")
    old = target.with_name(f".{target.name}.old")
    if old.is_dir() and not target.exists():
        # Killed between the two renames below.
        old.rename(target)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            beside.rename(target)
            shutil.rmtree(old)
        else:
            beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def in_ray_job() -> bool:
    """Whether this process is the entrypoint of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def resolve_run_folder(directory: str | None, config_path: Path) -> Path:
    """Where a run stands: `run.dir`, or the config's name, below PAVLOV_RUNS.

    Raises:
        RunFolderError: inside a Ray job it would lie in Ray's temporary copy of the code.
    """
    name = directory or config_path.stem
    if "://" in name:
        raise RunFolderError(
            f"run.dir = {name!r} is a URI; runs need a folder: mount the storage and give its path"
        )
    if in_ray_job() and not expanded(name).is_absolute():
        runs = os.environ.get("PAVLOV_RUNS", "")
        if not Path(runs).is_absolute():
            raise RunFolderError(
                f"inside a Ray job the run folder {name!r} would lie in Ray's temporary copy of "
                "the code and be lost; give an absolute run.dir=/… on storage that all nodes "
                "share, or set PAVLOV_RUNS to such a folder"
            )
    return runs_path(name)


def _left_by_a_start(path: Path) -> bool:
    """Whether a run that ended before its first step leaves this behind too."""
    return path.name in _CLAIM or path.name.startswith(".")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _take_over(old: dict[str, Any], new: dict[str, Any], key: Sequence[str]) -> None:
    """Put a setting of `new`, if it is there, into `old`."""
    name, *below = key
    if name not in new:
        return
    if below and isinstance(old.get(name), dict):
        _take_over(old[name], new[name], below)
    elif not below:
        old[name] = new[name]


def _refuse_other_settings(recorded: Path, config: Section) -> None:
    values = config.model_dump(mode="json")
    try:
        started = json.loads(recorded.read_text())
        if not isinstance(started, dict):
            raise ValueError("it holds no settings")
        for key in _MAY_CHANGE:
            _take_over(started, values, key.split("."))
        started = read_again(type(config), started).model_dump(mode="json")
    except ValueError as error:
        raise RunFolderError(f"{recorded} is damaged or of another version: {error}") from None
    old, new = _flat(started), _flat(values)
    # A section that is not there at all is null: then its settings count as null too.
    absent = {key for values in (old, new) for key, value in values.items() if value is None}
    for key in {**old, **new}:
        if any(key.startswith(f"{section}.") for section in absent):
            old.setdefault(key, None)
            new.setdefault(key, None)
    for key in new:
        if key in old and old[key] != new[key]:
            raise RunFolderError(
                f"{recorded.parent} was started with {key} = {json.dumps(old[key])} and cannot go "
                f"on with {json.dumps(new[key])}; resume with the same or choose another run.dir"
            )


class RunFolder:
    """A run's folder, held by one process at a time.

    Layout: ``config.json``, ``metrics.jsonl``, ``checkpoints/step-000010/``, ``rollouts/``,
    ``policy/`` or ``reward/``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    @classmethod
    def claim(cls, path: Path, config: Section, *, resume: bool | None) -> RunFolder:
        """Take the folder for this process; the lock goes with the process.

        A run is resumed with the settings it was started with, but for those in `_MAY_CHANGE`. Of
        settings that there were not yet when it started, it has had the defaults.

        Args:
            resume: None for a command that has no --resume.

        Raises:
            RunFolderError: another process holds it, it holds a run and `resume` was not given,
                there is nothing to resume, or the settings are others.
        """
        from filelock import FileLock, Timeout

        folder = cls(path)
        recorded = path / "config.json"
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file, not a run folder")
        if resume and not recorded.is_file():
            raise RunFolderError(f"{path} holds no run to resume")
        if not resume and path.is_dir() and not all(map(_left_by_a_start, path.iterdir())):
            way_on = "" if resume is None else "go on with --resume or "
            raise RunFolderError(f"{path} already holds a run; {way_on}choose another run.dir")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be made: {error.strerror}") from None
        folder._lock = FileLock(path / "run.lock")
        try:
            folder._lock.acquire(timeout=0)
        except Timeout:
            raise RunFolderError(f"{path} is in use by another process") from None
        if resume:
            try:
                _refuse_other_settings(recorded, config)
            except RunFolderError:
                folder.release()
                raise
        write_atomically(recorded, config.model_dump_json(indent=2) + "\n")
        return folder

    def release(self) -> None:
        """Let another process have it."""
        if self._lock is not None:
            self._lock.release()

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    @contextlib.contextmanager
    def new_checkpoint(self, step: int, state: dict[str, Any], keep: int) -> Iterator[Path]:
        """A checkpoint folder, written beside and renamed; then all but the newest are removed.

        Those of later steps are removed too: the run went on from before them, as they are damaged.
        `state` goes into ``state.json`` together with every file's size, so that a truncated
        checkpoint is noticed before it is loaded.
        """
        target = self.path / "checkpoints" / f"step-{step:06d}"
        with folder_beside(target) as beside:
            yield beside
            sizes = {
                str(path.relative_to(beside)): path.stat().st_size
                for path in sorted(beside.rglob("*"))
                if path.is_file()
            }
            write_atomically(
                beside / "state.json", json.dumps({**state, "step": step, "files": sizes}, indent=2)
            )
        there = self.checkpoints
        end = there.index(target) + 1
        for old in (*there[end:], *there[: max(0, end - keep)]):
            shutil.rmtree(old, ignore_errors=True)

    def newest_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest good checkpoint and its state; damaged ones are passed over.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        damaged = []
        for path in reversed(self.checkpoints):
            try:
                state = json.loads((path / "state.json").read_text())
                wrong = [
                    name
                    for name, size in state["files"].items()
                    if not (path / name).is_file() or (path / name).stat().st_size != size
                ]
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                wrong = ["state.json"]
            if not wrong:
                return path, state
            damaged.append(f"{path.name} ({wrong[0]})")
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.path} is damaged: {', '.join(damaged)}"
            )
        return None
