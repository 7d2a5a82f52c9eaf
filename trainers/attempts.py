"""A run in several attempts: what is lost ends one, and the next goes on from what is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cluster.files import write_atomically
from rlhf.errors import ActorLostError


def until_done(
    attempt: Callable[[bool], None],
    restarts: int,
    say: Callable[[str], None],
    *,
    resume: bool,
    where: str = "from the newest checkpoint",
) -> None:
    """Call `attempt` with whether to resume, again if it lost an actor that Ray cannot replace,
    `restarts` times at most.

    Raises:
        ActorLostError: the last attempt lost one too.
    """
    for left in range(restarts, -1, -1):
        try:
            return attempt(resume)
        except ActorLostError as error:
            if not left:
                raise
            say(f"{error}; going on {where}")
            resume = True


class Clock:
    """Seconds spent on what a folder holds, over all attempts, up to what each last saved."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "spent_s"
        self._earlier = float(self._path.read_text()) if self._path.is_file() else 0.0
        self._started = time.monotonic()

    def save(self) -> float:
        """Seconds so far, kept for the next attempt."""
        total = self._earlier + time.monotonic() - self._started
        write_atomically(self._path, str(total))
        return total
