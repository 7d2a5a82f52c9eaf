"""A run goes on after a loss, a few times, and says so; its time is that of all attempts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.errors import ActorLostError, RunError
from trainers.attempts import Clock, until_done


class Attempts:
    """Fails as told, then is done."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.resumed: list[bool] = []

    def __call__(self, resume: bool) -> None:
        self.resumed.append(resume)
        if self._errors:
            raise self._errors.pop(0)


def test_what_is_lost_begins_another_attempt_that_resumes() -> None:
    attempts, said = Attempts(ActorLostError("a died"), ActorLostError("b died")), []
    until_done(attempts, 2, said.append, resume=False)
    assert attempts.resumed == [False, True, True]
    assert said == [f"{name} died; going on from the newest checkpoint" for name in "ab"]


def test_the_last_loss_ends_the_run_as_does_anything_else_at_once() -> None:
    attempts, said = Attempts(ActorLostError("a died"), ActorLostError("b died")), []
    with pytest.raises(ActorLostError, match="b died"):
        until_done(attempts, 1, said.append, resume=False)
    assert len(said) == 1
    attempts = Attempts(RunError("wrong"))
    with pytest.raises(RunError, match="wrong"):
        until_done(attempts, 5, said.append, resume=True)
    assert attempts.resumed == [True] and len(said) == 1


def test_a_clock_goes_on_where_it_was_last_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("trainers.attempts.time.monotonic", lambda: now)
    clock = Clock(tmp_path)
    now = 107.0
    assert clock.save() == 7
    now = 200.0
    again = Clock(tmp_path)
    now = 203.0
    assert again.save() == 10
