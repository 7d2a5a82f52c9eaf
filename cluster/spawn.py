"""Actors of a run: the one place where `ray.remote` is applied.

All actors of a run are placed together, in one placement group, so that two jobs cannot each hold
half of what the other waits for. They are named by role and number (``rollout-0``) in the run's
namespace, and start in parallel.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.layout import CpuLayout, actor_environment, share_of_cores
from rlhf import errors
from rlhf.config import RolePlacement
from rlhf.errors import ActorLostError, PavlovError, ResourceError, RunError, UserError

Result = TypeVar("Result")
Failure = TypeVar("Failure", bound=BaseException)

_SAY_EVERY_S = 30.0
_GRACE_S = 30.0
"""Ray tells of a process's death within a second or two, of a node's within some twenty."""
_CALLS_AT_ONCE = 10_000
"""Of an asynchronous actor: a call that waits for its completions must not keep out a pause."""


@dataclass(frozen=True, slots=True)
class Role:
    """One kind of actor.

    Args:
        name: first part of the actors' names.
        cls: a plain class; its constructor's work is its start-up.
        placement: how many, and what each takes.
        arguments: constructor arguments of the actor with the given number.
        restarts: how often a dead actor is started again with the same arguments.
    """

    name: str
    cls: type
    placement: RolePlacement
    arguments: Callable[[int], dict[str, Any]]
    restarts: int = 0


def wanted_resources(roles: Sequence[Role]) -> dict[str, float]:
    """CPUs and GPUs of all roles together."""
    return {
        "CPU": sum(role.placement.actors * role.placement.cpus for role in roles),
        "GPU": sum(role.placement.actors * role.placement.gpus for role in roles),
    }


async def spawn_in_thread(*arguments: Any, **named: Any) -> dict[str, list[Any]]:
    """`spawn`, while the event loop goes on. Who is cancelled ends the thread before he goes on:
    one that still asked a Ray that has been shut down would never come back."""
    stopped = threading.Event()
    # No task: a loop that is interrupted cancels every task, and the thread would go on unseen.
    work = asyncio.get_running_loop().run_in_executor(
        None, functools.partial(spawn, *arguments, stopped=stopped, **named)
    )
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stopped.set()
        await asyncio.wait([work])
        # Seen, so that nobody is told of it later.
        work.exception()
        raise


def spawn(
    roles: Sequence[Role],
    layout: CpuLayout,
    *,
    timeout_s: float,
    say: Callable[[str], None],
    threads: int | None = None,
    stopped: threading.Event | None = None,
) -> dict[str, list[Any]]:
    """Start every actor of every role; returns handles by role name, once all are ready.

    Args:
        threads: of each CPU actor with the layout ``threads``; default: its share of the cores,
            where no others compute.

    Raises:
        ResourceError: the resources cannot be had, or were not free in time.
        RunError: an actor failed to start; the first line of its reason is in the message. Or
            `stopped` was set meanwhile.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundles = [
        {key: value for key, value in resources.items() if value}
        for role in roles
        for resources in [{"CPU": role.placement.cpus, "GPU": role.placement.gpus}]
        for _ in range(role.placement.actors)
    ]
    if not all(bundles):
        raise ResourceError("every role needs some CPU or GPU: set cluster.<role>.cpus above 0")
    if threads is None:
        threads = share_of_cores(role.placement for role in roles)
    group = placement_group(bundles, strategy="PACK")
    try:
        _wait_for_placement(group, roles, timeout_s, say, stopped)
        handles: dict[str, list[Any]] = {}
        bundle = 0
        for role in roles:
            handles[role.name] = []
            for number in range(role.placement.actors):
                environment = actor_environment(layout, role.placement.gpus, threads)
                options = {
                    "name": f"{role.name}-{number}",
                    "num_cpus": role.placement.cpus,
                    "num_gpus": role.placement.gpus,
                    "max_restarts": role.restarts,
                    "max_concurrency": _CALLS_AT_ONCE if _is_async(role.cls) else 1,
                    "runtime_env": {"env_vars": environment},
                    "scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle),
                }
                remote: Any = ray.remote(role.cls).options(**options)
                handles[role.name].append(remote.remote(**role.arguments(number)))
                bundle += 1
        _wait_until_ready(handles, timeout_s, say, stopped)
    except BaseException:
        remove_placement_group(group)
        raise
    return handles


def require_room(roles: Sequence[Role]) -> None:
    """Refuse roles that a cluster of one node can never hold.

    Raises:
        ResourceError: names what is wanted and what is there.
    """
    import ray

    if len(ray.nodes()) == 1 and (missing := _missing(roles, ray.cluster_resources())):
        raise ResourceError(f"this machine is too small: {missing}")


def _is_async(cls: type) -> bool:
    return any(asyncio.iscoroutinefunction(member) for member in vars(cls).values())


def _require_wanted(stopped: threading.Event | None) -> None:
    if stopped is not None and stopped.is_set():
        raise RunError("stopped while its actors were starting")


def _wait_for_placement(
    group: Any,
    roles: Sequence[Role],
    timeout_s: float,
    say: Callable[[str], None],
    stopped: threading.Event | None,
) -> None:
    import ray

    started = time.monotonic()
    while not group.wait(timeout_seconds=min(_SAY_EVERY_S, 5.0)):
        _require_wanted(stopped)
        free, total = ray.available_resources(), ray.cluster_resources()
        missing = _missing(roles, free)
        waited_s = time.monotonic() - started
        if len(ray.nodes()) == 1 and _missing(roles, total):
            raise ResourceError(f"this machine is too small: {_missing(roles, total)}")
        if waited_s > timeout_s:
            raise ResourceError(f"not free after {waited_s:.0f} s: {missing or 'a suitable node'}")
        say(f"waiting for resources, {waited_s:.0f} s: {missing or 'a suitable node'}")


def _missing(roles: Sequence[Role], have: dict[str, float]) -> str:
    parts = []
    for kind, wanted in wanted_resources(roles).items():
        if wanted > have.get(kind, 0.0) + 1e-6:
            who = ", ".join(
                role.name for role in roles if getattr(role.placement, f"{kind.lower()}s")
            )
            parts.append(f"{wanted:g} {kind}s wanted for {who}, {have.get(kind, 0.0):g} there")
    return "; ".join(parts)


def _wait_until_ready(
    handles: dict[str, list[Any]],
    timeout_s: float,
    say: Callable[[str], None],
    stopped: threading.Event | None,
) -> None:
    import ray

    pending = {
        actor.__ray_ready__.remote(): f"{role}-{number}"
        for role, actors in handles.items()
        for number, actor in enumerate(actors)
    }
    started = said = time.monotonic()
    while pending:
        _require_wanted(stopped)
        done, _ = ray.wait(list(pending), num_returns=1, timeout=2.0)
        for reference in done:
            name = pending.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                raise _start_error(name, error) from None
        now = time.monotonic()
        if pending and now - started > timeout_s:
            raise RunError(
                f"not ready after {timeout_s:.0f} s: {', '.join(sorted(pending.values()))}"
            )
        if pending and now - said > _SAY_EVERY_S:
            said = now
            say(f"starting, {now - started:.0f} s: {', '.join(sorted(pending.values()))}")


def _start_error(name: str, error: BaseException) -> PavlovError:
    cause = find_cause(error)
    if isinstance(cause, PavlovError):
        return cause
    # An error in a constructor reaches the driver as text only.
    line = first_line(cause)
    kind, _, message = line.partition(": ")
    own = getattr(errors, kind.removeprefix("rlhf.errors."), None)
    if kind.startswith("rlhf.errors.") and own is not None and own is not errors.WeightUpdateError:
        return own(message)
    return RunError(f"{name} did not start: {line}")


async def call(reference: Awaitable[Result], name: str, timeout_s: float) -> Result:
    """Await a call to the actor `name`. Errors of Pavlov's own come out as they were raised.

    Raises:
        ActorLostError: the actor died.
        RunError: it did not answer in time, or anything else went wrong inside it.
    """
    import ray

    try:
        async with asyncio.timeout(timeout_s):
            return await reference
    # Before TimeoutError: what an actor raised is of its own kind and of Ray's at once.
    except ray.exceptions.RayTaskError as error:
        cause = find_cause(error)
        if isinstance(cause, PavlovError):
            raise cause from None
        raise RunError(f"{name} failed: {type(cause).__name__}: {first_line(cause)}") from error
    except ray.exceptions.RayActorError as error:
        raise ActorLostError(f"{name} died: {first_line(error)}") from None
    except ray.exceptions.RayError as error:
        raise RunError(f"Ray failed under {name}: {first_line(error)}") from None
    except TimeoutError:
        raise RunError(f"{name} did not answer within {timeout_s:.0f} s") from None


async def together(calls: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Results of calls to several actors at once, in the order of the calls.

    Who loses a peer in the middle of a collective fails at once or waits for it for ever, while
    Ray tells of the death a little later. So where one call fails, the others have some seconds to
    fail too before they are given up, and what is raised is the cause and not its consequence.

    Raises:
        PavlovError: the `first_cause` of what had failed by then.
    """
    tasks = [asyncio.ensure_future(each) for each in calls]
    loop = asyncio.get_running_loop()
    pending, deadline = set(tasks), None
    try:
        while pending:
            left_s = None if deadline is None else max(0.0, deadline - loop.time())
            done, pending = await asyncio.wait(
                pending, timeout=left_s, return_when=asyncio.FIRST_EXCEPTION
            )
            failed = [error for each in done if (error := each.exception()) is not None]
            if not done or any(isinstance(error, ActorLostError | UserError) for error in failed):
                break
            if failed and deadline is None:
                deadline = loop.time() + _GRACE_S
        errors = [each.exception() for each in tasks if each.done()]
        if failures := [error for error in errors if error is not None]:
            raise first_cause(failures)
        return [each.result() for each in tasks]
    finally:
        for each in tasks:
            each.cancel()


def first_cause(errors: Sequence[Failure]) -> Failure:
    """Of what failed at once, in any order, that which the others follow from: what the user gave,
    which another attempt would meet again; a lost actor, whom others miss; any error of ours."""
    for kind in (UserError, ActorLostError, PavlovError):
        for error in errors:
            if isinstance(error, kind):
                return error
    return errors[0]


def find_cause(error: BaseException) -> BaseException:
    """The exception that was raised inside an actor's method, unwrapped from Ray's."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        return find_cause(error.cause)
    return error


def first_line(error: BaseException) -> str:
    """The last non-empty line of an error's message: where Ray and vLLM put the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


async def until_alive(handle: Any, name: str, call_timeout_s: float, patience_s: float) -> Any:
    """What an actor that Ray starts again says of its version (None where it has none), as soon as
    it answers.

    Raises:
        ActorLostError: it is not back in time.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_s
    while True:
        try:
            method = getattr(handle, "version", None) or handle.__ray_ready__
            return await call(method.remote(), name, call_timeout_s)
        except ActorLostError:
            if loop.time() > deadline:
                raise
            await asyncio.sleep(1.0)
