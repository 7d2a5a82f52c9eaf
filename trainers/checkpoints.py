"""When a run's checkpoints are made: every so many steps, and once more where it ends early.

What ends a run need not have hurt the learner: a step whose groups all failed, a reward function
that did, a signal. Then what was learnt since the last checkpoint is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from cluster.files import RunFolder
from rlhf.config import RLConfig
from rlhf.errors import ActorLostError, RunError
from trainers.fleet import Fleet

_KEEP_S = 600.0
"""At most, for the end of the step that the learner has begun and the checkpoint after it."""
_STOP_S = 60.0
"""The same after a signal: somebody waits."""


class Steps(Protocol):
    """What is asked of the loop; `trainers.loop.Loop`."""

    begun: int

    async def settle(self, timeout_s: float) -> None: ...


class Checkpoints:
    """The checkpoints of one attempt.

    Args:
        state: what every one says of the run that it belongs to.
        first_step: steps before it are in a checkpoint.
    """

    def __init__(
        self,
        config: RLConfig,
        folder: RunFolder,
        fleet: Fleet,
        state: Mapping[str, Any],
        first_step: int,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._folder = folder
        self._fleet = fleet
        self._state = state
        self._done = self._saved = first_step
        self._version = first_step
        self._say = say

    async def recorded(self, step: int, metrics: dict[str, Any]) -> None:
        """The metrics of this step are on disk; makes a checkpoint where one is due."""
        self._done, self._version = step + 1, metrics["weight_version"]
        due = self._done % self._config.run.checkpoint_every == 0
        if due or self._done == self._config.rl.num_steps:
            await self._save(in_turn=True)

    async def at_early_end(self, loop: Steps, error: BaseException, cause: BaseException) -> None:
        """Keep the last recorded step, if the learner is sound and no checkpoint has it.

        A step that the learner has begun comes to its end first: its weights are then neither those
        before it nor has anybody recorded what they have learnt. All this in bounded time; what
        goes wrong is said, and nothing is raised but by another signal.

        Args:
            error: as it left the loop.
            cause: the first of what failed.
        """
        by_signal = not isinstance(error, Exception)
        limit_s = min(_STOP_S if by_signal else _KEEP_S, self._config.cluster.call_timeout_s)
        sound = self._fleet.learner_is_sound and not isinstance(cause, ActorLostError)
        try:
            if by_signal and sound and loop.begun > self._saved:
                self._say("stopping: what was learnt is kept first; a second signal ends at once")
            async with asyncio.timeout(limit_s):
                await loop.settle(limit_s if sound else 0.0)
                if not sound or self._done == self._saved:
                    return
                if loop.begun != self._done:
                    raise RunError("the learner has begun another one that was not recorded")
                await self._save(in_turn=False)
            self._say(f"kept: all {self._done} steps that were recorded; go on with --resume")
        except Exception as failure:
            reason = str(failure) or f"it took more than {limit_s:.0f} s"
            with contextlib.suppress(Exception):
                self._say(f"{self._done - self._saved} recorded steps could not be kept: {reason}")

    async def _save(self, *, in_turn: bool) -> None:
        state = {**self._state, "weight_version": self._version}
        keep = self._config.run.keep_checkpoints
        with self._folder.new_checkpoint(self._done, state, keep) as beside:
            await self._fleet.save_checkpoint(beside, in_turn=in_turn)
        self._saved = self._done


@contextlib.contextmanager
def cancelled_by_sigterm() -> Iterator[None]:
    """The first SIGTERM cancels the task that is in this block, and leaves it as SystemExit; the
    second does what SIGTERM did before. (SIGINT is treated so by `asyncio.run`.)

    Else SIGTERM would cancel every task there is, and with them the step that is waited for.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGTERM)
    if task is None or before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped, again, inside = False, False, True

    def cancel() -> None:
        if inside:
            task.cancel()

    def stop(number: int, frame: object) -> None:
        nonlocal stopped, again
        stopped, again = True, stopped
        if again:
            signal.signal(number, before)
            os.kill(os.getpid(), number)
        else:
            # Not at once: the task may be about to leave.
            loop.call_soon_threadsafe(cancel)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except asyncio.CancelledError:
        # After the second the whole loop has ended already.
        if again or not stopped:
            raise
    finally:
        inside = False
        signal.signal(signal.SIGTERM, before)
    if stopped:
        raise SystemExit(128 + signal.SIGTERM)
