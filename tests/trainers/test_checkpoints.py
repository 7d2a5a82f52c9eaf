"""What is kept of a run that ends early, and that a resumed one goes on from there."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console

from actors.rollout import GroupRequest
from cluster.files import RunFolder
from rlhf.config import Section
from rlhf.errors import ActorLostError, GenerationError, RewardFunctionError, RunError
from rlhf.prompts import PromptCursor
from rlhf.records import RolloutGroup, ScoredGroup, StepReport, TrainingBatch
from tests.trainers.test_loop import GROUPS, PROMPTS, FakeActors, config
from trainers import rl

pytestmark = pytest.mark.timeout(60)

_TOO_LONG_S = 600.0
"""Of a step: a test of this file has a minute."""
WRONG = RewardFunctionError("rewards:length returned no numbers")


@dataclass
class FakeFleet(FakeActors):
    """Its weights are the count of what it has learnt. `learning` is awaited in every step."""

    learner_is_sound: bool = True
    learnt: int = 0
    saves: int = 0
    learning: Callable[[int], Any] = lambda step: asyncio.sleep(0)
    saving: Callable[[], Any] = lambda: asyncio.sleep(0)
    scoring: Callable[[RolloutGroup], Any] = lambda group: asyncio.sleep(0)
    said: io.StringIO = field(default_factory=io.StringIO)

    async def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup | GenerationError]:
        for group in groups:
            await self.scoring(group)
        return await super().score(groups)

    async def learn(self, batch: TrainingBatch, step: int) -> StepReport:
        await self.learning(step)
        self.learnt += 1
        return await super().learn(batch, step)

    async def save_checkpoint(self, folder: Path, *, in_turn: bool = True) -> None:
        self.saves += 1
        await self.saving()
        (folder / "weights").write_text(str(self.learnt))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder.claim(tmp_path / "run", Section(), resume=False)
    yield folder
    folder.release()


def run(
    folder: RunFolder, fleet: FakeFleet, *, first_step: int = 0, every: int = 20, **changes: Any
) -> None:
    settings = config(steps=5, run={"checkpoint_every": every}, **changes)
    cursor = PromptCursor(PROMPTS, settings.seed, first_step * GROUPS)
    said = Console(file=fleet.said, width=200)
    asyncio.run(
        rl._steps(settings, fleet, cursor, folder, said, "test", first_step, {})  # type: ignore[arg-type]
    )


def breaks_at(fleet: FakeFleet, version: int, error: Exception) -> None:
    def breaks(request: GroupRequest) -> Exception | None:
        return error if fleet.version >= version else None

    fleet.breaks = breaks


def kept(folder: RunFolder) -> tuple[int, int] | None:
    """Steps and weights of the newest checkpoint."""
    newest = folder.newest_checkpoint()
    if newest is None:
        return None
    path, state = newest
    assert state["weight_version"] == state["step"]
    return state["step"], int((path / "weights").read_text())


def recorded(folder: RunFolder) -> list[dict[str, Any]]:
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_what_a_sound_learner_has_learnt_is_kept_and_the_run_goes_on_from_there(
    folder: RunFolder, tmp_path: Path
) -> None:
    fleet = FakeFleet()
    breaks_at(fleet, 3, WRONG)
    with pytest.raises(ExceptionGroup) as caught:
        run(folder, fleet)
    assert rl._first_cause(caught.value) is WRONG
    assert kept(folder) == (3, 3)
    assert "kept: all 3 steps that were recorded; go on with --resume" in fleet.said.getvalue()
    run(folder, FakeFleet(learnt=3), first_step=3)
    whole = RunFolder.claim(tmp_path / "whole", Section(), resume=False)
    run(whole, FakeFleet())
    rows = [
        [{key: row[key] for key in ("step", "reward/mean", "kl/mean")} for row in recorded(each)]
        for each in (folder, whole)
    ]
    assert rows[0] == rows[1]
    assert kept(folder) == kept(whole) == (5, 5)
    whole.release()


def test_a_step_whose_groups_all_failed_is_recorded_and_kept(folder: RunFolder) -> None:
    fleet = FakeFleet()
    fleet.learning = lambda step: fleet_fails(fleet, step)
    with pytest.raises(ExceptionGroup) as caught:
        run(folder, fleet)
    assert str(rl._first_cause(caught.value)).startswith("every group of step 2 failed")
    assert kept(folder) == (3, 3)
    assert [row["groups/failed"] for row in recorded(folder)] == [0, 0, GROUPS]


async def fleet_fails(fleet: FakeFleet, step: int) -> None:
    """From the step after the second on."""
    if step == 1:
        fleet.fails = {prompt.id: 99 for prompt in PROMPTS}


def test_what_a_checkpoint_has_is_not_saved_again(folder: RunFolder) -> None:
    fleet = FakeFleet()
    breaks_at(fleet, 3, WRONG)
    with pytest.raises(ExceptionGroup):
        run(folder, fleet, every=1)
    assert fleet.saves == 3
    fleet = FakeFleet()
    breaks_at(fleet, 0, WRONG)
    with pytest.raises(ExceptionGroup):
        run(folder, fleet, first_step=3)
    assert fleet.saves == 0 and kept(folder) == (3, 3)


@pytest.mark.parametrize("lost", [True, False])
def test_nothing_is_kept_of_a_learner_that_may_be_wrong_or_gone(
    folder: RunFolder, lost: bool
) -> None:
    fleet = FakeFleet(learner_is_sound=lost)
    breaks_at(fleet, 3, ActorLostError("rollout-0 died") if lost else RunError("learner-0 failed"))
    with pytest.raises(ExceptionGroup):
        run(folder, fleet)
    assert kept(folder) is None and fleet.saves == 0


def breaks_while_learning(fleet: FakeFleet, lasts_s: float) -> None:
    """Scoring a group of step 3 fails while the learner is in step 2."""
    settings, begun = config(), asyncio.Event()
    cursor = PromptCursor(PROMPTS, settings.seed)
    last = [cursor.next() for _ in range(3 * GROUPS + 1)][-1]

    async def learning(step: int) -> None:
        if step == 2:
            begun.set()
            await asyncio.sleep(lasts_s)

    async def scoring(group: RolloutGroup) -> None:
        if (group.prompt, group.epoch) == last:
            await begun.wait()
            raise WRONG

    fleet.learning, fleet.scoring = learning, scoring


def test_a_step_that_the_learner_has_begun_ends_first_and_is_recorded(folder: RunFolder) -> None:
    """Else the checkpoint would have the weights of a step that nobody has recorded."""
    fleet = FakeFleet()
    breaks_while_learning(fleet, 0.2)
    with pytest.raises(ExceptionGroup):
        run(folder, fleet, staleness=1)
    assert kept(folder) == (3, 3) and len(recorded(folder)) == fleet.learnt == 3


def test_a_step_that_does_not_end_in_time_leaves_the_last_checkpoint(folder: RunFolder) -> None:
    fleet = FakeFleet()
    breaks_while_learning(fleet, _TOO_LONG_S)
    with pytest.raises(ExceptionGroup) as caught:
        run(folder, fleet, staleness=1, cluster={"call_timeout_s": 0.5})
    assert rl._first_cause(caught.value) is WRONG
    assert kept(folder) is None and len(recorded(folder)) == 2
    assert "2 recorded steps could not be kept: it took more than" in fleet.said.getvalue()


@pytest.mark.parametrize("hangs", [True, False])
def test_a_checkpoint_that_fails_or_hangs_hides_nothing(folder: RunFolder, hangs: bool) -> None:
    fleet = FakeFleet()
    breaks_at(fleet, 3, WRONG)

    async def fails() -> None:
        await asyncio.sleep(60 if hangs else 0)
        raise RunError("the disk is full")

    fleet.saving = fails
    with pytest.raises(ExceptionGroup) as caught:
        run(folder, fleet, cluster={"call_timeout_s": 0.5})
    assert rl._first_cause(caught.value) is WRONG
    assert kept(folder) is None
    reason = "it took more than" if hangs else "the disk is full"
    assert f"3 recorded steps could not be kept: {reason}" in fleet.said.getvalue()


# Signals


@pytest.fixture
def as_pavlov() -> Iterator[None]:
    """SIGTERM as the command line has it, and SIGINT as Python does: a process that a shell
    started in the background ignores it."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGTERM) is stop
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGINT, interrupted)


BOTH = [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]


@pytest.mark.parametrize(("number", "ended"), BOTH)
def test_a_run_that_is_stopped_in_a_step_keeps_it(
    folder: RunFolder, as_pavlov: None, number: int, ended: type[BaseException]
) -> None:
    async def stopped(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), number)
            await asyncio.sleep(0.1)

    fleet = FakeFleet(learning=stopped)
    with pytest.raises(ended) as caught:
        run(folder, fleet)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 128 + signal.SIGTERM
    assert kept(folder) == (3, 3) and len(recorded(folder)) == 3
    assert "a second signal ends at once" in fleet.said.getvalue()


@pytest.mark.parametrize("where", ["learning", "saving"])
@pytest.mark.parametrize(
    ("first", "second", "ended"),
    [
        (signal.SIGTERM, signal.SIGTERM, SystemExit),
        (signal.SIGINT, signal.SIGINT, KeyboardInterrupt),
        (signal.SIGTERM, signal.SIGINT, SystemExit),
        (signal.SIGINT, signal.SIGTERM, SystemExit),
    ],
)
def test_a_second_signal_ends_at_once(
    folder: RunFolder,
    as_pavlov: None,
    first: int,
    second: int,
    ended: type[BaseException],
    where: str,
) -> None:
    async def stopped(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), first)
            await asyncio.sleep(0.1)
            if where == "learning":
                await stopped_again()

    async def stopped_again() -> None:
        os.kill(os.getpid(), second)
        await asyncio.sleep(_TOO_LONG_S)

    fleet = FakeFleet(learning=stopped, saving=stopped_again)
    with pytest.raises(ended):
        run(folder, fleet)
    assert kept(folder) is None


def test_a_run_that_is_stopped_before_a_step_ends_without_more_ado(
    folder: RunFolder, as_pavlov: None
) -> None:
    class Publishes(FakeFleet):
        async def publish(self, version: int) -> float:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(_TOO_LONG_S)
            return 0.0

    fleet = Publishes()
    with pytest.raises(SystemExit):
        run(folder, fleet)
    assert fleet.saves == 0 and fleet.said.getvalue() == ""
