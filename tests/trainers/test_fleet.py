"""The fleet against handles in memory: what is asked again, and of whom. No cluster is started."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.rollout import GroupRequest
from cluster.spawn import Role
from cluster.weights import WeightManifest
from cluster.weights.probe import Probe
from rlhf.config import RLConfig, parse_config
from rlhf.errors import (
    ActorLostError,
    GenerationError,
    RunError,
    StaleWeightsError,
    WeightUpdateError,
)
from rlhf.records import (
    Completion,
    GroupScores,
    Message,
    Prompt,
    RolloutGroup,
    StepReport,
    TrainingBatch,
)
from trainers.fleet import Fleet, Models

ray = pytest.importorskip("ray", reason="ray is not installed")

PROBE = Probe((1, 2), (-1.0,), "float32")
REQUEST = GroupRequest(Prompt("p", (Message("user", "Why?"),)), 0, (1, 2), 4, 1.0)


def manifest(version: int, transport: str = "shared_memory") -> WeightManifest:
    return WeightManifest(version, transport, f"/dev/shm/version-{version}", {})


def group(*texts: str) -> RolloutGroup:
    completions = tuple(Completion((3,), text, (-0.5,), "stop", 0, 0, 1) for text in texts)
    return RolloutGroup(REQUEST.prompt, 0, (1, 2), completions)


@dataclass
class Method:
    """`handle.method.remote(...)`, answered by a plain function; what it raises is raised."""

    answer: Callable[..., Any]

    def remote(self, *arguments: Any, **named: Any) -> Any:
        async def call() -> Any:
            await asyncio.sleep(0)
            result = self.answer(*arguments, **named)
            return await result if asyncio.iscoroutine(result) else result

        return call()


@dataclass
class Engine:
    """A rollout actor that dies when told to, and comes back without weights."""

    holds: int | None = 0
    dies: int = 0
    asked: list[str] = field(default_factory=list)
    refuses: Callable[[WeightManifest], None] = lambda manifest: None
    dies_updating: int = 0
    gap: float = 1e-5

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self, f"on_{name}"))

    def on_generate(self, requests: Any, version: int, *, together: bool) -> Any:
        self.asked.append("generate")
        if self.holds is None:
            raise ray.exceptions.RayTaskError(
                "generate", "", StaleWeightsError("no weights yet")
            ).as_instanceof_cause()
        if self.dies:
            self.dies, self.holds = self.dies - 1, None
            raise ray.exceptions.ActorDiedError()
        return [group("a", "b") for _ in requests]

    def on_version(self) -> int | None:
        self.asked.append("version")
        return self.holds

    def on_update_weights(self, manifest: WeightManifest, probe: Probe) -> float:
        self.asked.append(f"update {manifest.version}")
        self.refuses(manifest)
        if self.dies_updating:
            self.dies_updating, self.holds = self.dies_updating - 1, None
            raise ray.exceptions.ActorDiedError()
        self.holds = manifest.version
        return self.gap


@dataclass
class Rank:
    """A rank of the learner; `step` as told."""

    step_once: Callable[[], Any] = lambda: StepReport()
    exported: WeightManifest = field(default_factory=lambda: manifest(4))

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self, f"on_{name}"))

    def on_step(self, batch: Any, step: int) -> Any:
        return self.step_once()

    def on_export_weights(self, version: int) -> WeightManifest:
        return self.exported

    def on_probe(self) -> Probe:
        return PROBE

    def on_transmit_weights(self) -> None:
        pass


def fleet(
    engine: Engine, published: WeightManifest, learners: Sequence[Rank] = (), **cluster: Any
) -> Fleet:
    config = parse_config(
        RLConfig,
        {
            "reward": {"model": "r"},
            "data": {"prompts": ["p"]},
            "cluster": {"call_timeout_s": 5, "start_timeout_s": 2, **cluster},
        },
        "test",
    )
    handles: dict[str, list[Any]] = {"rollout": [engine], "learner": list(learners)}
    made = Fleet({"reward": [], "reference": [], **handles}, config)
    made._published = (published, PROBE)
    return made


def generate(made: Fleet) -> list[Any]:
    return asyncio.run(made.generate([REQUEST], 0, together=False))


def test_an_engine_that_died_gets_the_weights_before_it_is_asked_again() -> None:
    engine = Engine(dies=1)
    [answer] = generate(fleet(engine, manifest(3)))
    assert isinstance(answer, RolloutGroup)
    assert engine.asked == ["generate", "version", "update 3", "version", "generate"]


def test_a_prompt_whose_engine_dies_twice_is_an_error_of_its_group() -> None:
    engine = Engine(dies=2)
    made = fleet(engine, manifest(3))
    assert isinstance(generate(made)[0], GenerationError)
    # Of its own group only: who asks next gets an answer, by the current weights.
    assert isinstance(generate(made)[0], RolloutGroup)
    assert engine.holds == 3


def test_what_the_learner_published_meanwhile_is_what_an_engine_recovers_to() -> None:
    """Version 3 was dropped for version 4 while the engine was starting again."""
    engine = Engine(dies=1)
    made = fleet(engine, manifest(3))

    def refuse(announced: WeightManifest) -> None:
        if announced.version == 3:
            asyncio.get_running_loop().call_later(
                0.05, lambda: setattr(made, "_published", (manifest(4), PROBE))
            )
            raise ray.exceptions.RayTaskError(
                "update", "", WeightUpdateError("version", "version 3 is no longer there")
            ).as_instanceof_cause()

    engine.refuses = refuse
    [answer] = generate(made)
    assert isinstance(answer, RolloutGroup)
    assert engine.holds == 4


def test_other_refusals_of_a_recovering_engine_end_the_run_by_their_check() -> None:
    def refuse(announced: WeightManifest) -> None:
        raise ray.exceptions.RayTaskError(
            "update", "", WeightUpdateError("probe", "too far")
        ).as_instanceof_cause()

    with pytest.raises(WeightUpdateError, match="probe"):
        generate(fleet(Engine(dies=1, refuses=refuse), manifest(3)))


def test_an_engine_that_nccl_cannot_take_back_is_lost_at_once() -> None:
    with pytest.raises(ActorLostError, match="cannot join a running NCCL group"):
        generate(fleet(Engine(dies=1), manifest(3, "nccl")))


def test_an_engine_that_never_comes_back_is_lost_in_the_end() -> None:
    engine = Engine(dies=1)
    engine.on_version = lambda: asyncio.sleep(60)  # type: ignore[method-assign]
    with pytest.raises((ActorLostError, RunError), match="rollout-0"):
        generate(fleet(engine, manifest(3), start_timeout_s=0.05, call_timeout_s=1))


def test_a_timeout_inside_an_actor_is_told_as_its_own() -> None:
    engine = Engine()

    def fails(*arguments: Any, **named: Any) -> None:
        raise ray.exceptions.RayTaskError(
            "generate", "", TimeoutError("the group did not meet")
        ).as_instanceof_cause()

    engine.on_generate = fails  # type: ignore[method-assign]
    with pytest.raises(RunError, match="rollout-0 failed: TimeoutError: the group did not meet"):
        generate(fleet(engine, manifest(0)))


@pytest.mark.parametrize("dead", [0, 1])
def test_a_lost_rank_is_told_as_lost_though_the_others_fail_before(dead: int) -> None:
    """Under gloo a survivor fails at once, before Ray has told of the death."""

    async def dies() -> None:
        await asyncio.sleep(0.1)
        raise ray.exceptions.ActorDiedError()

    def closed() -> None:
        raise ray.exceptions.RayTaskError(
            "step", "", RuntimeError("Connection closed by peer")
        ).as_instanceof_cause()

    ranks = [Rank(dies if rank == dead else closed) for rank in range(2)]
    made = fleet(Engine(), manifest(3), ranks, cpu_layout="threads")
    with pytest.raises(ActorLostError, match=f"learner-{dead} died"):
        asyncio.run(made.learn(TrainingBatch((), 4, 1.0), 0))


def test_the_gap_of_an_engine_that_was_lost_in_the_update_is_its_probes_after_it() -> None:
    made = fleet(Engine(dies_updating=1, gap=3e-5), manifest(3), [Rank()], cpu_layout="threads")
    assert asyncio.run(made.publish(4)) == 3e-5


def test_who_recovered_the_engine_meanwhile_has_measured_the_gap() -> None:
    engine = Engine(dies_updating=1, gap=3e-5)
    made = fleet(engine, manifest(3), [Rank()], cpu_layout="threads")

    async def both() -> float | None:
        made._published = (manifest(4), PROBE)
        engine.holds = None
        _, gap = await asyncio.gather(made._recover(0), made._update(0))
        return gap

    assert asyncio.run(both()) == 3e-5


def test_without_a_probe_there_is_no_gap() -> None:
    """The engine died after the probe, whose answer was lost with the call."""
    engine = Engine()
    made = fleet(engine, manifest(3), [Rank()], cpu_layout="threads")

    def dies(announced: WeightManifest, probe: Probe) -> float:
        engine.holds = announced.version
        raise ray.exceptions.ActorDiedError()

    engine.on_update_weights = dies  # type: ignore[method-assign]
    assert asyncio.run(made.publish(4)) is None


def scores(shift_G: tuple[float, ...]) -> GroupScores:
    size = len(shift_G)
    zeros, flags = (0.0,) * size, (True,) * size
    return GroupScores((zeros,), zeros, zeros, zeros, shift_G, flags, flags, "r1")


def test_flags_go_by_the_runs_own_threshold_and_empty_text_is_always_flagged() -> None:
    made = fleet(Engine(), manifest(0))
    three = group("one", "two", " \n")
    given = scores((0.5, 2.0, -1.0))
    assert made._flagged(three, given) == given
    made.shift_threshold = 1.0
    wanted = replace(given, domain_shift_G=(False, True, True))
    assert made._flagged(three, given) == wanted
    made.shift_threshold = float("inf")
    assert made._flagged(three, given).domain_shift_G == (False, False, True)


@pytest.mark.parametrize(("deterministic", "threads"), [(False, "4"), (True, "1")])
def test_actors_share_the_cores_but_for_a_run_that_must_repeat(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool, threads: str
) -> None:
    environments: list[dict[str, str]] = []

    class Started(Exception):
        pass

    def placed(*arguments: Any, **named: Any) -> None:
        """In the place of waiting for Ray's placement group."""

    def remote(cls: type) -> Any:
        def options(**given: Any) -> Any:
            environments.append(given["runtime_env"]["env_vars"])
            raise Started

        return SimpleNamespace(options=options)

    monkeypatch.setattr("cluster.layout.usable_cores", lambda: 16)
    monkeypatch.setattr("cluster.spawn._wait_for_placement", placed)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}])
    monkeypatch.setattr("ray.remote", remote)
    groups = importlib.import_module("ray.util.placement_group")
    monkeypatch.setattr(groups, "placement_group", placed)
    monkeypatch.setattr(groups, "remove_placement_group", placed)
    values: dict[str, Any] = {"reward": {"model": "r"}, "data": {"prompts": ["p"]}}
    exact = {"dtype": "float32"}
    if deterministic:
        values |= dict.fromkeys(("policy", "reference", "rollout"), exact)
        values["deterministic"] = True
    config = parse_config(RLConfig, values, "test")
    with pytest.raises(Started):
        asyncio.run(Fleet.start(config, Models("p", "p", Path()), "run", Path(), lambda text: None))
    [environment] = environments
    assert environment["OMP_NUM_THREADS"] == threads


def test_actors_on_several_nodes_are_told_a_transport_that_reaches_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[dict[str, Any]] = []

    async def spawn(roles: list[Role], *arguments: Any, **named: Any) -> dict[str, list[Any]]:
        started.extend(role.arguments(0) for role in roles if role.name in ("rollout", "learner"))
        raise RunError("enough seen")

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}] * 2)
    monkeypatch.setattr("trainers.fleet.spawn_in_thread", spawn)
    config = parse_config(RLConfig, {"reward": {"model": "r"}, "data": {"prompts": ["p"]}}, "test")
    with pytest.raises(RunError, match="enough seen"):
        asyncio.run(Fleet.start(config, Models("p", "p", Path()), "run", Path(), lambda text: None))
    assert [each["weight_transport"] for each in started] == ["object_store"] * 2


@pytest.mark.parametrize("role", ["rollout", "reward", "reference", "learner"])
def test_several_actors_of_a_role_compute_with_a_thread_each_on_few_cores(
    monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.setattr("cluster.layout.usable_cores", lambda: 2)
    assert fleet(Engine(), manifest(0)).turns.enabled
    several = fleet(Engine(), manifest(0), **{role: {"actors": 2}})
    assert not several.turns.enabled


def test_folders_are_told_to_every_node_by_absolute_paths(tmp_path: Path, monkeypatch: Any) -> None:
    from models.sources import portable_name

    (tmp_path / "policy").mkdir()
    monkeypatch.chdir(tmp_path)
    assert portable_name("policy") == str(tmp_path / "policy")
    monkeypatch.chdir("/")
    monkeypatch.setenv("PAVLOV_RUNS", str(tmp_path))
    assert portable_name("policy") == str(tmp_path / "policy")
    assert portable_name("embedded") == "embedded"
    assert portable_name("owner/name") == "owner/name"
