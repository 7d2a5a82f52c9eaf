"""What is wanted of a cluster, and how an actor's failure is told. No cluster is started."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from cluster.spawn import (
    Role,
    _missing,
    _start_error,
    find_cause,
    first_cause,
    first_line,
    spawn_in_thread,
    together,
    wanted_resources,
)
from rlhf.config import RolePlacement
from rlhf.errors import (
    ActorLostError,
    ConfigError,
    ModelError,
    PavlovError,
    RunError,
    StaleWeightsError,
    WeightUpdateError,
)

ray = pytest.importorskip("ray", reason="ray is not installed")


def role(name: str, actors: int = 1, cpus: float = 0.25, gpus: float = 0) -> Role:
    placement = RolePlacement(actors=actors, cpus=cpus, gpus=gpus)
    return Role(name, object, placement, lambda number: {})


ROLES = [
    role("rollout", actors=4, cpus=2, gpus=1),
    role("learner", actors=2, cpus=1.5, gpus=1),
    role("reward", cpus=0.25, gpus=0.5),
]


def test_wanted_is_the_sum_over_all_actors():
    assert wanted_resources(ROLES) == {"CPU": 4 * 2 + 2 * 1.5 + 0.25, "GPU": 6.5}
    assert wanted_resources([]) == {"CPU": 0, "GPU": 0}


def test_waiting_says_for_what_for_whom_and_what_is_there():
    assert _missing(ROLES, {"CPU": 64.0, "GPU": 2.0}) == (
        "6.5 GPUs wanted for rollout, learner, reward, 2 there"
    )
    assert _missing([role("reward", cpus=3)], {"CPU": 2.0}) == "3 CPUs wanted for reward, 2 there"
    assert _missing([role("a", gpus=1), role("b")], {}) == (
        "0.5 CPUs wanted for a, b, 0 there; 1 GPUs wanted for a, 0 there"
    )


def test_nothing_is_missing_where_there_is_just_enough():
    tenths = [role("reward", actors=10, cpus=0.1)]
    assert _missing(tenths, {"CPU": 1.0}) == ""
    assert _missing(ROLES, {"CPU": 11.25, "GPU": 6.5}) == ""


# How a failure is told


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("plain", "plain"),
        ("Traceback:\n  File x\n\nValueError: too long\n\n", "ValueError: too long"),
        ("", "RuntimeError"),
        (" \n\t\n", "RuntimeError"),
    ],
)
def test_the_reason_is_the_last_line_that_says_something(message, line):
    assert first_line(RuntimeError(message)) == line


def raised_in_a_task(cause: Exception) -> Exception:
    text = f"Traceback (most recent call last):\n  File ...\n{type(cause).__name__}: {cause}"
    return ray.exceptions.RayTaskError("start", text, cause)


def test_the_cause_of_a_failed_call_is_the_exception_that_was_raised():
    cause = ModelError("no weights")
    assert find_cause(raised_in_a_task(cause)) is cause
    assert find_cause(raised_in_a_task(raised_in_a_task(cause))) is cause
    assert find_cause(cause) is cause


def died_at_creation(text: str) -> Exception:
    """What the driver sees of an error in a constructor: text only, the reason last."""
    trace = f"Traceback (most recent call last):\n  File x, line 1, in __init__\n{text}"
    task = ray.exceptions.RayTaskError("RolloutActor.__init__", trace, None)
    return ray.exceptions.ActorDiedError.from_task_error(task)


def test_an_error_of_our_own_is_raised_as_it_was():
    cause = WeightUpdateError("probe", "too far apart")
    assert _start_error("rollout-0", raised_in_a_task(cause)) is cause


@pytest.mark.parametrize("kind", [ModelError, ConfigError, StaleWeightsError])
def test_an_error_of_our_own_in_a_constructor_keeps_kind_sentence_and_exit_code(kind):
    died = died_at_creation(f"rlhf.errors.{kind.__name__}: /m has no weights: a file is needed")
    error = _start_error("rollout-0", died)
    assert type(error) is kind
    assert str(error) == "/m has no weights: a file is needed"
    assert error.exit_code == kind.exit_code


@pytest.mark.parametrize(
    "text",
    [
        "ValueError: max_model_len is too small",
        "OSError: rlhf.errors.ModelError: not ours",
        "rlhf.errors.Unheard: what",
        "rlhf.errors.WeightUpdateError: weight update refused by the probe check: far",
    ],
)
def test_any_other_error_names_the_actor_and_the_reason(text):
    error = _start_error("rollout-0", died_at_creation(text))
    assert type(error) is RunError
    assert str(error) == f"rollout-0 did not start: {text}"


def test_whatever_comes_out_is_an_error_of_our_own():
    for error in (RuntimeError("x"), raised_in_a_task(KeyError("y")), RuntimeError()):
        assert isinstance(_start_error("learner-1", error), PavlovError)
        assert "learner-1" in str(_start_error("learner-1", error))


@pytest.mark.parametrize("how", ["cancelled", "interrupted"])
def test_who_stops_waiting_for_actors_goes_on_only_when_the_thread_has_ended(monkeypatch, how):
    """Else Ray is shut down under the thread, which then waits for it for ever. An interrupt
    (SIGTERM raises SystemExit in the loop) cancels every task there is."""
    told = []

    def spawn(stopped: threading.Event) -> None:
        told.append("starts")
        assert stopped.wait(10)
        time.sleep(0.1)
        told.append("ends")
        raise RunError("stopped while its actors were starting")

    def interrupt() -> None:
        raise SystemExit(143)

    async def run() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        loop.call_later(0.1, interrupt if how == "interrupted" else task.cancel)
        try:
            await spawn_in_thread()
        finally:
            told.append("goes on")

    monkeypatch.setattr("cluster.spawn.spawn", spawn)
    with pytest.raises((SystemExit, asyncio.CancelledError)):
        asyncio.run(run())
    assert told == ["starts", "ends", "goes on"]


# Calls to several actors at once


async def answers(after_s: float, answer: object) -> object:
    await asyncio.sleep(after_s)
    if isinstance(answer, Exception):
        raise answer
    return answer


CLOSED, DIED = RunError("Connection closed by peer"), ActorLostError("learner-1 died")


def test_calls_at_once_are_answered_in_the_order_of_the_calls():
    assert asyncio.run(together([answers(0.05, "slow"), answers(0, "fast")])) == ["slow", "fast"]
    assert asyncio.run(together([])) == []


@pytest.mark.parametrize("first", [0, 1])
def test_a_lost_actor_is_told_before_those_that_miss_it(first):
    calls = [answers(0, CLOSED), answers(0.1, DIED)]
    with pytest.raises(ActorLostError, match="learner-1 died"):
        asyncio.run(together([calls[first], calls[1 - first]]))


def test_who_hangs_without_its_peer_is_given_up(monkeypatch):
    given_up = []

    async def hangs() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            given_up.append(True)

    # At once, where the loss is known; a little later, where it is not.
    with pytest.raises(ActorLostError):
        asyncio.run(together([hangs(), answers(0, DIED)]))
    monkeypatch.setattr("cluster.spawn._GRACE_S", 0.05)
    with pytest.raises(RunError, match="Connection closed by peer"):
        asyncio.run(together([hangs(), answers(0, CLOSED), answers(0.02, RunError("too"))]))
    assert len(given_up) == 2


def test_of_failures_at_once_what_the_others_follow_from_is_the_cause():
    wrong = ModelError("no weights")
    assert first_cause([CLOSED, DIED]) is DIED
    assert first_cause([ValueError("x"), CLOSED]) is CLOSED
    # Another attempt would meet it again.
    assert first_cause([DIED, wrong]) is wrong
