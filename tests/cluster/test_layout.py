"""Taking turns: never two roles at once, and the engines rest while a role computes."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from cluster import layout
from cluster.layout import (
    Turns,
    actor_environment,
    choose_layout,
    share_of_cores,
    usable_cores,
)
from rlhf.config import RolePlacement

ROOT = Path(__file__).parents[2]


class Machine:
    """What runs on it now, and everything that ever ran at once."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.computing: set[str] = set()
        self.paused = 0
        self.together: list[frozenset[str]] = []
        self.unpaused: list[str] = []
        self.turns = Turns(self.pause, self.resume, enabled=enabled)

    async def pause(self) -> None:
        await asyncio.sleep(0)
        self.paused += 1

    async def resume(self) -> None:
        await asyncio.sleep(0)
        self.paused -= 1

    async def compute(self, role: str, steps: int) -> None:
        async with self.turns.take():
            self.computing.add(role)
            for _ in range(steps):
                self.together.append(frozenset(self.computing))
                if not self.paused:
                    self.unpaused.append(role)
                await asyncio.sleep(0)
            self.computing.remove(role)


async def many_roles(machine: Machine) -> None:
    draw = random.Random(0)
    roles = ["learner", "reward", "reference", "probe"] * 5
    async with asyncio.TaskGroup() as tasks:
        for number, role in enumerate(roles):
            tasks.create_task(machine.compute(f"{role}-{number}", draw.randint(1, 5)))


def test_never_two_roles_compute_at_once():
    machine = Machine()
    asyncio.run(many_roles(machine))
    assert {len(roles) for roles in machine.together} == {1}
    assert len(machine.together) >= 20


def test_the_engines_are_paused_while_a_role_computes_and_run_after_it():
    machine = Machine()
    asyncio.run(many_roles(machine))
    assert machine.unpaused == []
    assert machine.paused == 0


def test_without_turns_everybody_computes_at_once_and_nothing_is_paused():
    machine = Machine(enabled=False)
    asyncio.run(many_roles(machine))
    assert max(len(roles) for roles in machine.together) > 10
    assert machine.paused == 0
    assert len(machine.unpaused) == len(machine.together)
    assert not machine.turns.enabled


def test_an_error_in_a_turn_lets_the_engines_and_the_next_role_go_on():
    async def scenario() -> Machine:
        machine = Machine()
        with pytest.raises(RuntimeError, match="out of memory"):
            async with machine.turns.take():
                raise RuntimeError("out of memory")
        assert machine.paused == 0
        await asyncio.wait_for(machine.compute("learner", 1), 5)
        return machine

    assert asyncio.run(scenario()).paused == 0


def test_a_cancelled_turn_lets_the_engines_and_the_next_role_go_on():
    async def scenario() -> Machine:
        machine = Machine()
        task = asyncio.create_task(machine.compute("learner", 10**9))
        waiting = asyncio.create_task(machine.compute("reward", 1))
        for _ in range(20):
            await asyncio.sleep(0)
        assert machine.computing == {"learner"}
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        machine.computing.clear()
        await asyncio.wait_for(waiting, 5)
        return machine

    assert asyncio.run(scenario()).paused == 0


def test_an_engine_that_cannot_be_paused_does_not_block_the_next_turn():
    async def scenario() -> None:
        machine = Machine()
        good = machine.pause

        async def broken() -> None:
            raise ConnectionError("engine is gone")

        machine.turns = Turns(broken, machine.resume, enabled=True)
        with pytest.raises(ConnectionError):
            await machine.compute("learner", 1)
        assert machine.computing == set()
        machine.turns._pause = good
        await asyncio.wait_for(machine.compute("learner", 1), 5)

    asyncio.run(scenario())


# Threads


@pytest.mark.parametrize(("cores", "chosen"), [(1, "turns"), (4, "turns"), (5, "threads")])
def test_few_cores_take_turns_unless_told_otherwise(monkeypatch, cores, chosen):
    monkeypatch.setattr(layout, "usable_cores", lambda: cores)
    assert choose_layout(None) == chosen
    assert choose_layout("turns") == "turns"
    assert choose_layout("threads") == "threads"
    assert choose_layout(None, side_by_side=True) == "threads"


def test_only_cores_that_this_process_may_use_are_counted():
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, mine)
    assert usable_cores() == len(mine)


def test_a_role_computes_with_all_threads_in_turns_and_with_its_own_beside_others(monkeypatch):
    monkeypatch.setattr(layout, "usable_cores", lambda: 3)
    assert actor_environment("turns", 0, 2)["OMP_NUM_THREADS"] == "3"
    assert actor_environment("threads", 0)["OMP_NUM_THREADS"] == "1"
    assert actor_environment("threads", 0, 2)["OMP_NUM_THREADS"] == "2"
    on_gpu = actor_environment("turns", 1)
    assert "OMP_NUM_THREADS" not in on_gpu
    assert "DS_ACCELERATOR" not in on_gpu


@pytest.mark.parametrize(
    ("cores", "actors", "nodes", "threads"),
    [(16, 4, 1, 4), (16, 5, 1, 3), (5, 4, 1, 1), (2, 4, 1, 1), (16, 0, 1, 16), (16, 4, 2, 1)],
)
def test_actors_on_the_cpu_share_its_cores(monkeypatch, cores, actors, nodes, threads):
    monkeypatch.setattr(layout, "usable_cores", lambda: cores)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}] * nodes + [{"Alive": False}])
    on_gpu = RolePlacement(actors=3, gpus=1)
    on_cpu = [RolePlacement()] * max(0, actors - 2) + [RolePlacement(actors=2)] * (actors > 0)
    assert share_of_cores([on_gpu, *on_cpu]) == threads


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert actor_environment("threads", 0)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert actor_environment("threads", 0)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_an_actor_finds_the_code_and_the_drivers_folders(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/extra")
    monkeypatch.setenv("PAVLOV_CACHE", "/cache")
    monkeypatch.delenv("PAVLOV_RUNS", raising=False)
    environment = actor_environment("turns", 0)
    assert environment["PYTHONPATH"] == f"{ROOT}:/extra"
    assert environment["PAVLOV_CACHE"] == "/cache"
    assert "PAVLOV_RUNS" not in environment
