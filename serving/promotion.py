"""Which version of the assistant is served, who made it so, and upon what evidence.

::

    <PAVLOV_RUNS>/served/<name>/
        promotions.jsonl     append only: every promotion and rollback, its evidence or its override
        versions/<version>/  the weights, so that neither a rollback nor a replica that is started
                             anew needs the folder that they come from
        live.json            what the server serves now, and what it could not
        .server.lock         held by the one server of that name

`pavlov promote` writes the first two; the server of that name follows the newest line
(`serving/chat_server.py`) and writes the third.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from cluster.files import folder_beside, write_atomically
from labelling.database import Database
from labelling.evidence import Evidence, direct_evidence
from labelling.records import Kind
from labelling.store import Store
from models.chat import ChatTokenizer
from models.reward_model import RewardModel
from models.sources import (
    EMBEDDED,
    check_folder,
    in_hub_cache,
    portable_name,
    resolve_policy,
    resolve_reward_model,
    weights_fingerprint,
)
from rlhf.config import LabelConfig, runs_path
from rlhf.errors import ModelError, PavlovError, PromotionError, ResourceError

_LEAST_REASON = 10
_LOOK_EVERY_S = 0.5
_LATER_S = 0.001
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class Promotion:
    """A line of ``promotions.jsonl``: `version` is served instead of `before` from `at` (seconds
    since 1970) on, which is later than in every line before, whatever the clock says. It has
    evidence, or an `override`: why there is none. `trained_by`: see there; None where that is not
    known."""

    version: str
    before: str
    source: str
    action: Literal["promote", "rollback"]
    by: str
    at: float
    evidence: dict[str, Any] | None = None
    override: str | None = None
    trained_by: list[str] | None = None


@dataclass(frozen=True, slots=True)
class Live:
    """What a server serves, the newest promotion that it has seen (its `Promotion.at`), why it
    could not follow that one, if so, and the Serve application that holds the engine."""

    version: str
    model: str
    seen: float = 0.0
    failed: str = ""
    stopped: bool = False
    engine: str = ""


_PROMOTION, _LIVE = TypeAdapter(Promotion), TypeAdapter(Live)


class Served:
    """The record of one assistant, by its name (`serve.name`)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = runs_path("served") / (re.sub(r"[^\w.-]", "-", name).lstrip(".") or "-")
        self._lines = self.folder / "promotions.jsonl"
        self._live = self.folder / "live.json"

    def promotions(self) -> list[Promotion]:
        """All of them, oldest first.

        Raises:
            PromotionError: a line is damaged.
        """
        found: list[Promotion] = []
        standing = 0
        lines = self._lines.read_bytes().split(b"\n") if self._lines.is_file() else []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            found.append(_read(_PROMOTION, line, f"{self._lines} line {number}"))
            standing += 1 if found[-1].action == "promote" else -1
            if standing < 0:
                raise PromotionError(
                    f"{self._lines} line {number} is damaged: a rollback of no promotion"
                )
        return found

    def newest(self) -> Promotion | None:
        """What is to be served, if anything was ever promoted."""
        found = self.promotions()
        return found[-1] if found else None

    def current(self) -> str:
        """The version that is served, or will be once the server is there; "" where none is."""
        newest, live = self.newest(), self.live()
        if newest is None or (live is not None and live.failed and live.seen == newest.at):
            return live.version if live is not None else ""
        return newest.version

    def model(self, version: str) -> Path:
        """Where a version's weights are kept.

        Raises:
            ModelError: they are not there, or others are: a kept file may be a link to one that
                was written over.
        """
        folder = check_folder(self.folder / "versions" / version)
        if (found := weights_fingerprint(folder)) != version:
            raise ModelError(
                f"{folder} was written over and holds version {found} now: put the weights of "
                f"{version} back there"
            )
        return folder

    def live(self) -> Live | None:
        """What the server has said, if one was ever started.

        Raises:
            PromotionError: it is damaged.
        """
        if not self._live.is_file():
            return None
        return _read(_LIVE, self._live.read_bytes(), str(self._live))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the one server of this name for the block. The kernel gives the lock back when this
        process ends, however it does; processes that it starts do not hold it.

        Raises:
            ResourceError: another server holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".server.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ResourceError(
                f"serve.name = {self.name!r} is served by another process, from {self.folder}: "
                "end that one, or give this one another serve.name"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def say_live(self, live: Live) -> None:
        """What the server serves from now on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._live, json.dumps(asdict(live)) + "\n")

    def keep(self, version: str, model: Path) -> Path:
        """Keep the weights of a version, and say where.

        Raises:
            ModelError: `model` holds no weights, or others by now.
        """
        target = self.folder / "versions" / version
        if not target.is_dir() or weights_fingerprint(target) != version:
            check_folder(model)
            with folder_beside(target) as beside:
                shutil.copytree(model, beside, copy_function=_link_or_copy, dirs_exist_ok=True)
                if (found := weights_fingerprint(beside)) != version:
                    raise ModelError(
                        f"{model} holds version {found} now, not {version}, which is to be kept "
                        "for a rollback: put those weights back there, or start `pavlov serve` anew"
                    )
        return target

    def add(self, decide: Callable[[str], Promotion]) -> Promotion:
        """Append what is decided upon what is served, while nobody else decides.

        Raises:
            PromotionError: nothing is served under this name, or the record is damaged.
        """
        if not self.current():
            raise PromotionError(
                f"nothing is served under the name {self.name}: start `pavlov serve` first, or "
                "give the server's serve.name with --name"
            )
        with FileLock(self.folder / ".promotions.lock"):
            found = decide(self.current())
            # Hosts' clocks differ and are set back; a server tells by `at` what it has not seen.
            last = max((each.at for each in self.promotions()), default=0.0)
            found = replace(found, at=max(found.at, last + _LATER_S))
            lines = self._lines.read_text().rstrip("\n") if self._lines.is_file() else ""
            lines += "\n" * bool(lines) + json.dumps(asdict(found)) + "\n"
            write_atomically(self._lines, lines)
        return found


def promote(
    run: str,
    name: str,
    labels: LabelConfig | None,
    project: str | None,
    *,
    kind: Kind = "person",
    override: str | None = None,
) -> Promotion:
    """Make a run's policy the served one.

    Args:
        run: a run folder with ``policy/``, or a model folder, from here or below PAVLOV_RUNS.
        labels: the database of `project`, where it was compared with the version that is served.
        override: why it is promoted without evidence.

    Raises:
        PromotionError: there is no independent evidence, or it is served already.
        ModelError: there is no such policy, it reads other tokens than the served one, or the
            served one cannot be kept for a rollback.
    """
    if (project is None) == (override is None):
        raise PromotionError(
            "give --project, where judges compared it with the version that is served, or type "
            "out --without-evidence REASON"
        )
    if override is not None and len(override.strip()) < _LEAST_REASON:
        raise PromotionError(
            f"--without-evidence {override!r} is no reason: it is kept in the record, so say why"
        )
    served = Served(name)
    folder = resolve_policy(run)
    version = weights_fingerprint(folder)
    by = trained_by(folder)
    recorded = None if by is None else sorted(by)

    def decide(before: str) -> Promotion:
        if version == before:
            raise PromotionError(f"{run} is version {version}, which is served already")
        _require_same_tokens(served, folder, before)
        told: dict[str, Any] | None = None
        if labels is not None and project is not None:
            found = _evidence(labels, project, by, version, before, kind)
            told = {"project": project, **asdict(found), "sentence": found.sentence}
        live = served.live()
        # First what may not be there any more: of what is refused nothing is kept.
        if live is not None and live.version == before:
            served.keep(before, Path(live.model))
        served.keep(version, folder)
        return Promotion(
            version, before, str(folder), "promote", _who(), time.time(), told, override, recorded
        )

    return served.add(decide)


def roll_back(name: str) -> Promotion:
    """Serve again what was served before the newest promotion.

    Raises:
        PromotionError: there was none.
        ModelError: its weights are not there any more.
    """
    served = Served(name)

    def decide(before: str) -> Promotion:
        standing: list[Promotion] = []
        for each in served.promotions():
            if each.action == "promote":
                standing.append(each)
            else:
                standing.pop()
        if not standing:
            raise PromotionError(f"nothing was promoted under the name {name}")
        target = standing[-1].before
        source = str(served.model(target))
        return Promotion(target, before, source, "rollback", _who(), time.time())

    return served.add(decide)


def wait_until_followed(name: str, promotion: Promotion, patience_s: float) -> bool:
    """Whether a server that runs has followed within so many seconds.

    Raises:
        PromotionError: it could not, and goes on as before.
    """
    served = Served(name)
    deadline = time.monotonic() + patience_s
    while (live := served.live()) is not None and not live.stopped:
        if live.seen >= promotion.at:
            if live.failed:
                raise PromotionError(
                    f"the server could not take version {promotion.version} and goes on with "
                    f"{live.version}: {live.failed}"
                )
            return True
        if time.monotonic() > deadline:
            break
        time.sleep(_LOOK_EVERY_S)
    return False


def trained_by(policy: Path) -> set[str] | None:
    """Versions of the reward models that took part in training a policy or the one it started from,
    and of those that they were refreshed from.

    The way back goes from run to run, and over kept versions by what their promotion recorded, to
    `embedded`, a model of the hub, or a folder that is no run's: there training began. None where
    something on it is gone or does not say.
    """
    versions: set[str] = set()
    seen: set[Path] = set()
    while policy not in seen:
        seen.add(policy)
        if (config := _config(policy.parent)) is None:
            if policy.parent.name == "versions":
                recorded = _recorded(policy)
                return recorded and versions | recorded
            return versions or None if policy.is_dir() else None
        reward = (
            policy.parent / "reward"
            if "ensemble" in config
            else (config.get("reward") or {}).get("model")
        )
        try:
            card = RewardModel.load(resolve_reward_model(str(reward))).card
        except PavlovError:
            return None
        versions |= {card.version, *card.ancestry}
        start = portable_name(config["policy"]["model"])
        if start == EMBEDDED or in_hub_cache(start):
            break
        policy = Path(start)
    return versions


def _recorded(policy: Path) -> set[str] | None:
    """`Promotion.trained_by` of a version that is kept; None where there is none."""
    served = Served(policy.parent.parent.name)
    if policy.parent != served.folder.resolve() / "versions":
        return None
    for each in reversed(served.promotions()):
        if each.version == policy.name and each.trained_by:
            return set(each.trained_by)
    return None


def _config(run: Path) -> dict[str, Any] | None:
    """What a run was started with; None where the folder is no run."""
    try:
        config = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and "model" in config.get("policy", {}) else None


def _require_same_tokens(served: Served, folder: Path, before: str) -> None:
    live = served.live()
    now = Path(live.model) if live and live.version == before else served.model(before)
    if ChatTokenizer(folder).fingerprint != ChatTokenizer(now).fingerprint:
        raise ModelError(
            f"{folder} reads other tokens or another chat template than the version that is "
            "served: start a server of its own with policy.model"
        )


def _evidence(
    labels: LabelConfig,
    project: str,
    by: Collection[str] | None,
    version: str,
    before: str,
    kind: Kind,
) -> Evidence:
    store = Store(Database(labels.label.url, make=False))
    judgements = store.judgements(store.project(project), with_work=True)
    found = direct_evidence(judgements, version, before, kind, by)
    if not found.sure:
        raise PromotionError(
            f"no promotion: project {project} does not show that version {version} is better than "
            f"{before}: {found.sentence}"
        )
    return found


def _read(form: TypeAdapter[Read], text: bytes, where: str) -> Read:
    """What is kept as JSON; fields that are not known are passed over."""
    try:
        return form.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        what = "".join(f"{part}: " for part in first["loc"]) + first["msg"]
    raise PromotionError(f"{where} is damaged: {what}")


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
