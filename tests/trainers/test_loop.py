"""The loop against actors in memory: who waits for whom, what is tried again, what is resumed."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from actors.rollout import GroupRequest
from rlhf.config import RLConfig, parse_config
from rlhf.errors import ActorLostError, GenerationError
from rlhf.prompts import PromptCursor
from rlhf.records import (
    Completion,
    FailedGroup,
    GroupScores,
    Message,
    Prompt,
    RolloutGroup,
    ScoredGroup,
    StepReport,
    TrainingBatch,
)
from trainers.loop import Loop

pytestmark = pytest.mark.timeout(60)

GROUPS, SIBLINGS = 3, 2
PROMPTS = [Prompt(f"p{i}", (Message("user", f"question {i}"),)) for i in range(8)]
IMPATIENT = {"call_timeout_s": 0.02, "start_timeout_s": 0.02}
Groups = Sequence[ScoredGroup | FailedGroup]
Event = tuple[Any, ...]


def config(*, steps: int = 4, staleness: int = 0, **changes: Any) -> RLConfig:
    values: dict[str, Any] = {
        "seed": 7,
        "reward": {"model": "r", **changes.pop("reward", {})},
        "data": {"prompts": ["p"]},
        "rl": {
            "num_steps": steps,
            "max_staleness": staleness,
            "prompts_per_step": GROUPS,
            "completions_per_prompt": SIBLINGS,
            "max_tokens": 4,
            **changes.pop("rl", {}),
        },
    }
    if changes.get("deterministic"):
        values |= {name: {"dtype": "float32"} for name in ("policy", "reference", "rollout")}
    return parse_config(RLConfig, values | changes, "test")


@dataclass
class FakeActors:
    """Actors that answer after a random number of turns of the event loop, and say what they did.

    `fails` tells how often a prompt cannot be generated before it can, `unscored` the same for
    scoring. A completion carries the version that the engine held when it began and ended.
    """

    latency: int = 8
    seed: int = 0
    fails: dict[str, int] = field(default_factory=dict)
    unscored: dict[str, int] = field(default_factory=dict)
    shifted: bool = False
    breaks: Callable[[GroupRequest], Exception | None] = lambda request: None
    version: int = -1
    events: list[Event] = field(default_factory=list)
    requests: list[GroupRequest] = field(default_factory=list)
    batches: list[TrainingBatch] = field(default_factory=list)
    recorded: list[tuple[int, dict[str, Any], Groups]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)
        self._attempts: Counter[str] = Counter()
        self._scorings: Counter[str] = Counter()

    async def _work(self) -> None:
        for _ in range(self._draw.randint(0, self.latency)):
            await asyncio.sleep(0)

    async def generate(
        self, requests: Sequence[GroupRequest], version: int, *, together: bool
    ) -> list[RolloutGroup | GenerationError]:
        begun = self.version
        assert begun >= version, "asked for a version that was not published"
        names = [request.prompt.id for request in requests]
        self.events.append(("generate", names, version, together))
        self.requests += requests
        for request in requests:
            if error := self.breaks(request):
                raise error
        await self._work()
        self.events.append(("generated", names))
        return [self._group(request, begun) for request in requests]

    def _group(self, request: GroupRequest, begun: int) -> RolloutGroup | GenerationError:
        name = request.prompt.id
        self._attempts[name] += 1
        if self._attempts[name] <= self.fails.get(name, 0):
            return GenerationError(f"{name} failed for the {self._attempts[name]}. time")
        completions = tuple(
            Completion((3, 4), f"answer {seed}", (-0.5, -0.5), "stop", begun, self.version, seed)
            for seed in request.seeds
        )
        return RolloutGroup(request.prompt, request.epoch, (1, 2), completions)

    async def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup | GenerationError]:
        self.events.append(("score", [group.prompt.id for group in groups]))
        await self._work()
        return [self._scored(group) for group in groups]

    def _scored(self, group: RolloutGroup) -> ScoredGroup | GenerationError:
        name = group.prompt.id
        self._scorings[name] += 1
        if self._scorings[name] <= self.unscored.get(name, 0):
            return GenerationError(f"{name} cannot be scored")
        size = len(group.completions)
        rewards = tuple(float(i) for i in range(size))
        shifted = tuple(self.shifted and i == 0 for i in range(size))
        zeros = (0.0,) * size
        scores = GroupScores((rewards,), rewards, zeros, zeros, zeros, shifted, shifted, "r1")
        return ScoredGroup(group, scores, ((-0.6, -0.6),) * size)

    async def evaluated(self, groups: Groups) -> list[ScoredGroup | FailedGroup]:
        self.events.append(("evaluated", len(groups)))
        await self._work()
        own = {
            "entropies_GT": ((0.5, 1.5),) * SIBLINGS,
            "learner_logprobs_GT": ((-0.2, -0.6),) * SIBLINGS,
        }
        return [
            replace(group, **own) if isinstance(group, ScoredGroup) else group for group in groups
        ]

    async def learn(self, batch: TrainingBatch, step: int) -> StepReport:
        self.events.append(("learn", step))
        self.batches.append(batch)
        await self._work()
        self.events.append(("learnt", step))
        return StepReport({"entropy/mean": 1.5})

    async def publish(self, version: int) -> float:
        self.events.append(("publish", version))
        await self._work()
        self.version = version
        self.events.append(("published", version))
        return 1e-6

    async def record(self, step: int, metrics: dict[str, Any], groups: Groups) -> None:
        self.events.append(("record", step))
        await self._work()
        self.recorded.append((step, metrics, groups))
        self.events.append(("recorded", step))


def run(
    settings: RLConfig, actors: FakeActors | None = None, first_step: int = 0, **changes: Any
) -> FakeActors:
    """A whole run; what happened stands in the actors."""
    actors = actors or FakeActors(**changes)
    cursor = PromptCursor(PROMPTS, settings.seed, first_step * settings.rl.prompts_per_step)
    asyncio.run(Loop(settings, cursor, actors, actors.record, first_step).run())
    return actors


def kinds(events: Sequence[Event]) -> list[str]:
    return [event[0] for event in events]


def staleness_of(actors: FakeActors) -> list[int]:
    """Of every completion trained on, in learner versions."""
    return [
        step - completion.oldest_version
        for step, _, groups in actors.recorded
        for group in groups
        if isinstance(group, ScoredGroup)
        for completion in group.rollout.completions
    ]


ONE_PASS = {"type": "ppo", "epochs": 1}


def asked_for_before_every_step(actors):
    asked = [place for place, event in enumerate(actors.events) if event[0] == "evaluated"]
    learnt = [place for place, event in enumerate(actors.events) if event[0] == "learn"]
    assert len(asked) == len(learnt) == 4
    return all(before < after for before, after in zip(asked, learnt, strict=True))


def test_the_learner_is_asked_only_where_its_own_is_in_the_reward():
    assert "evaluated" not in kinds(run(config()).events)
    entropy = {"place": "reward", "coefficient": 0.5}
    actors = run(config(rl={"entropy": entropy, "algorithm": ONE_PASS}))
    assert asked_for_before_every_step(actors)
    # Half of 0.5 and 1.5, less the KL of 0.02 times 0.1, plus rewards of 0 and 1 at the end.
    rewards = [sequence.rewards_T for sequence in actors.batches[0].sequences[:2]]
    assert rewards == [pytest.approx((0.248, 0.748)), pytest.approx((0.248, 1.748))]
    # With weights the KL is the learner's own: 0.02 times 0.4 and 0.
    actors = run(config(rl={"off_policy": {"weights": "token"}, "algorithm": ONE_PASS}))
    assert asked_for_before_every_step(actors)
    rewards = [sequence.rewards_T for sequence in actors.batches[0].sequences[:2]]
    assert rewards == [pytest.approx((-0.008, 0.0)), pytest.approx((-0.008, 1.0))]
    without = {"off_policy": {"weights": "token"}, "kl": {"coefficient": 0.0}}
    assert "evaluated" not in kinds(run(config(rl=without | {"algorithm": ONE_PASS})).events)


# The dial


@pytest.mark.parametrize("seed", range(5))
def test_without_staleness_a_step_generates_learns_and_publishes_before_the_next_begins(seed):
    actors = run(config(), seed=seed)
    assert actors.events[:2] == [("publish", 0), ("published", 0)]
    rest = actors.events[2:]
    for step in range(4):
        end = rest.index(("recorded", step)) + 1
        mine, rest = rest[:end], rest[end:]
        assert kinds(mine[-6:]) == ["learn", "learnt", "publish", "published", "record", "recorded"]
        assert mine[-6] == ("learn", step)
        assert mine[-4] == ("publish", step + 1)
        assert Counter(kinds(mine[:-6])) == dict.fromkeys(
            ("generate", "generated", "score"), GROUPS
        )
        assert {event[2] for event in mine if event[0] == "generate"} == {step}
    assert rest == []
    assert set(staleness_of(actors)) == {0}
    assert all(metrics["staleness/max"] == 0 for _, metrics, _ in actors.recorded)


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_with_staleness_steps_overlap_and_the_bound_holds(staleness, seed):
    actors = run(config(steps=12, staleness=staleness), seed=seed, latency=30)
    while_learning = [
        event
        for step in range(12)
        for event in actors.events[
            actors.events.index(("learn", step)) : actors.events.index(("published", step + 1))
        ]
        if event[0] in ("generate", "generated")
    ]
    assert while_learning
    assert max(staleness_of(actors)) == staleness
    assert max(m["staleness/max"] for _, m, _ in actors.recorded) == staleness


@pytest.mark.parametrize("seed", range(5))
def test_one_slow_prompt_makes_nothing_older_than_the_bound(seed):
    """A group that takes many steps' time: everybody waits for it at the head of the queue."""

    class OneSlow(FakeActors):
        async def generate(
            self, requests: Sequence[GroupRequest], *args: Any, **kwargs: Any
        ) -> Any:
            if requests[0].prompt.id == "p3":
                for _ in range(300):
                    await asyncio.sleep(0)
            return await super().generate(requests, *args, **kwargs)

    actors = run(config(steps=8, staleness=2), OneSlow(seed=seed, latency=3))
    assert max(staleness_of(actors)) <= 2


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_the_learner_gets_the_prompts_in_the_order_of_admission(staleness):
    settings = config(steps=6, staleness=staleness)
    cursor = PromptCursor(PROMPTS, settings.seed)
    wanted = [cursor.next() for _ in range(6 * GROUPS)]
    actors = run(settings, seed=3, latency=40)
    found = [
        (group.rollout.prompt, group.rollout.epoch)
        for _, _, groups in actors.recorded
        for group in groups
    ]
    assert found == wanted
    assert len(actors.requests) == len(wanted)


@pytest.mark.parametrize("staleness", [0, 2])
def test_slots_are_free_only_after_publish_and_record(staleness):
    """Nothing more is admitted between a step's learning and its record."""
    actors = run(config(steps=8, staleness=staleness), seed=1, latency=20)
    admitted = 0
    for event in actors.events:
        if event[0] == "generate":
            admitted += 1
        if event[0] in ("published", "record", "recorded"):
            step = event[1] - 1 if event[0] == "published" else event[1]
            assert admitted <= (step + 1 + staleness) * GROUPS
    assert admitted == 8 * GROUPS
    assert all(m["buffer/depth"] <= (staleness + 1) * GROUPS for _, m, _ in actors.recorded)


def test_a_version_is_a_publish_and_every_step_makes_one():
    actors = run(config(steps=3))
    assert [event[1] for event in actors.events if event[0] == "published"] == [0, 1, 2, 3]
    assert [metrics["weight_version"] for _, metrics, _ in actors.recorded] == [1, 2, 3]


# Failures


def failures(actors: FakeActors) -> list[FailedGroup]:
    return [
        group
        for _, _, groups in actors.recorded
        for group in groups
        if isinstance(group, FailedGroup)
    ]


def attempts_at(actors: FakeActors, name: str) -> list[GroupRequest]:
    return [request for request in actors.requests if request.prompt.id == name]


@pytest.mark.parametrize(("staleness", "deterministic"), [(0, False), (2, False), (0, True)])
@pytest.mark.parametrize("where", ["fails", "unscored"])
def test_a_prompt_that_keeps_failing_becomes_a_failure_in_its_place_and_blocks_nobody(
    staleness, deterministic, where
):
    settings = config(steps=2, staleness=staleness, deterministic=deterministic)
    cursor = PromptCursor(PROMPTS, settings.seed)
    order = [cursor.next()[0].id for _ in range(2 * GROUPS)]
    actors = run(settings, **{where: {order[1]: 99}})
    [failure] = failures(actors)
    assert failure.prompt.id == order[1]
    assert failure.attempts == settings.rl.max_attempts == 3
    assert order[1] in failure.reason
    assert len(attempts_at(actors, order[1])) == 3
    (_, metrics, groups), (_, later, _) = actors.recorded
    assert groups.index(failure) == 1
    assert (metrics["groups/failed"], later["groups/failed"]) == (1, 0)
    assert [batch.num_sequences for batch in actors.batches] == [
        (GROUPS - 1) * SIBLINGS,
        GROUPS * SIBLINGS,
    ]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("where", ["fails", "unscored"])
def test_a_retry_that_succeeds_is_trained_on_with_the_same_seeds(deterministic, where):
    name = PROMPTS[2].id
    settings = config(steps=3, deterministic=deterministic)
    actors = run(settings, **{where: {name: 2}})
    assert failures(actors) == []
    first_three = attempts_at(actors, name)[:3]
    assert first_three == [first_three[0]] * 3
    trained = [
        group
        for _, _, groups in actors.recorded
        for group in groups
        if group.rollout.prompt.id == name and group.rollout.epoch == 0
    ]
    assert len(trained) == 1
    assert tuple(c.seed for c in trained[0].rollout.completions) == first_three[0].seeds


def test_a_step_of_which_every_group_failed_is_learnt_from_as_empty():
    actors = run(config(steps=1), fails={prompt.id: 99 for prompt in PROMPTS})
    assert [batch.num_sequences for batch in actors.batches] == [0]
    assert actors.recorded[0][1]["groups/failed"] == GROUPS
    assert actors.recorded[0][1]["reward/mean"] is None


@pytest.mark.parametrize("staleness", [0, 2])
def test_an_actor_that_is_lost_ends_the_run_instead_of_hanging_it(staleness):
    def breaks(request: GroupRequest) -> Exception | None:
        return ActorLostError("rollout-0 died") if request.prompt.id == "p5" else None

    with pytest.raises(ExceptionGroup) as caught:
        run(config(staleness=staleness), breaks=breaks)
    assert caught.group_contains(ActorLostError, match="rollout-0 died")


class LosesAnActor(FakeActors):
    """The engine dies while it generates for one prompt."""

    async def generate(self, requests: Sequence[GroupRequest], *args: Any, **kwargs: Any) -> Any:
        groups = await super().generate(requests, *args, **kwargs)
        if requests[0].prompt.id == "p0":
            raise ActorLostError("rollout-0 died")
        return groups


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_lost_actor_ends_the_run_even_if_a_step_becomes_complete_in_that_moment(staleness):
    """The learner must not miss that the run is over, and wait for groups that nobody makes."""
    for seed in range(12):
        actors = LosesAnActor(seed=seed, latency=1)
        with pytest.raises(ExceptionGroup) as caught:
            run(
                config(staleness=staleness, cluster=IMPATIENT),
                actors,
            )
        assert caught.group_contains(ActorLostError)
        assert not caught.group_contains(TimeoutError), f"waited in vain under seed {seed}"


def never(actors: FakeActors) -> Coroutine[Any, Any, Any]:
    return asyncio.sleep(3600)


def test_a_group_that_never_comes_ends_the_run_with_what_was_waited_for(monkeypatch):
    monkeypatch.setattr(FakeActors, "_work", never)
    monkeypatch.setattr(FakeActors, "publish", lambda self, version: asyncio.sleep(0))
    actors = FakeActors(version=0)
    with pytest.raises(ExceptionGroup) as caught:
        run(config(cluster=IMPATIENT), actors)
    assert caught.group_contains(TimeoutError, match=f"for {GROUPS} of {GROUPS} groups; the oldest")


def test_completions_flagged_for_domain_shift_are_masked_only_where_that_is_asked_for():
    masked = config(steps=1, reward={"domain_shift": {"response": "mask"}})
    assert run(masked, shifted=True).batches[0].num_sequences == GROUPS * (SIBLINGS - 1)
    marked = config(steps=1)
    actors = run(marked, shifted=True)
    assert actors.batches[0].num_sequences == GROUPS * SIBLINGS
    assert actors.recorded[0][1]["ensemble/flagged_share"] == 1 / SIBLINGS


# The same again


def test_a_request_asks_for_every_sibling_under_a_seed_of_its_own():
    settings = config(steps=4, rl={"temperature": 0.7, "max_tokens": 9})
    requests = run(settings).requests
    seeds = [seed for request in requests for seed in request.seeds]
    assert len(set(seeds)) == len(seeds) == 4 * GROUPS * SIBLINGS
    assert {(r.max_tokens, r.temperature, r.top_p) for r in requests} == {(9, 0.7, 1.0)}
    # 12 groups of 8 prompts: the second epoch asks again, with other seeds.
    assert {request.epoch for request in requests} == {0, 1}


def test_the_latency_of_actors_does_not_change_what_is_asked_for():
    def asked(seed: int, latency: int) -> set[GroupRequest]:
        return set(run(config(steps=5, staleness=1), seed=seed, latency=latency).requests)

    assert asked(0, 0) == asked(1, 50)
    assert len(asked(0, 0)) == 5 * GROUPS


def test_another_run_seed_asks_for_other_completions():
    one, other = (
        set(run(config(steps=2) if not s else config(steps=2, seed=s)).requests) for s in (0, 8)
    )
    assert not {seed for r in one for seed in r.seeds} & {seed for r in other for seed in r.seeds}


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("first_step", [1, 3, 4])
def test_a_resumed_loop_asks_for_what_the_unbroken_one_would_have(staleness, first_step):
    settings = config(steps=5, staleness=staleness)
    unbroken, resumed = run(settings), run(settings, first_step=first_step)

    def trained(actors: FakeActors) -> list[tuple[int, list[tuple[Prompt, int, tuple[int, ...]]]]]:
        return [
            (
                step,
                [
                    (
                        g.rollout.prompt,
                        g.rollout.epoch,
                        tuple(c.seed for c in g.rollout.completions),
                    )
                    for g in groups
                    if isinstance(g, ScoredGroup)
                ],
            )
            for step, _, groups in actors.recorded
        ]

    assert trained(resumed) == trained(unbroken)[first_step:]
    assert set(resumed.requests) <= set(unbroken.requests)
    assert resumed.events[:2] == [("publish", first_step), ("published", first_step)]
    assert [e[1] for e in resumed.events if e[0] == "learn"] == list(range(first_step, 5))
    assert [m["weight_version"] for _, m, _ in resumed.recorded] == list(range(first_step + 1, 6))


def test_a_run_that_was_complete_learns_nothing_more():
    actors = run(config(steps=3), first_step=3)
    assert kinds(actors.events) == ["publish", "published"]


# Deterministic


def test_deterministic_sends_the_whole_step_in_one_call_in_the_order_of_admission():
    settings = config(deterministic=True)
    cursor = PromptCursor(PROMPTS, settings.seed)
    wanted = [[cursor.next()[0].id for _ in range(GROUPS)] for _ in range(4)]
    actors = run(settings)
    calls = [event for event in actors.events if event[0] == "generate"]
    assert [(names, together) for _, names, _, together in calls] == [(w, True) for w in wanted]
    assert [event[1] for event in actors.events if event[0] == "score"] == wanted


def test_deterministic_tries_the_failed_ones_again_in_one_call():
    settings = config(steps=1, deterministic=True)
    cursor = PromptCursor(PROMPTS, settings.seed)
    one, two, three = (cursor.next()[0].id for _ in range(GROUPS))
    actors = run(settings, fails={one: 2, three: 1})
    calls = [event[1] for event in actors.events if event[0] == "generate"]
    assert calls == [[one, two, three], [one, three], [one]]


def test_otherwise_groups_are_asked_for_one_by_one():
    calls = [event for event in run(config()).events if event[0] == "generate"]
    assert {len(names) for _, names, _, _ in calls} == {1}
    assert {together for _, _, _, together in calls} == {False}


# What is written


PROMISED = {
    *("step", "weight_version", "tokens/step"),
    *("reward/mean", "reward/std", "ensemble/disagreement", "ensemble/flagged_share"),
    *("kl/mean", "kl/coefficient", "entropy/mean"),
    *("staleness/mean", "staleness/max", "completion/length_mean"),
    *("time/step_s", "time/rollout_s", "time/learn_s", "time/weights_s"),
}


def test_every_step_has_the_numbers_that_the_contract_promises():
    actors = run(config(steps=3, staleness=1))
    assert [step for step, _, _ in actors.recorded] == [0, 1, 2]
    for step, metrics, groups in actors.recorded:
        assert {name for name in PROMISED if metrics.get(name) is None} == set()
        assert metrics["step"] == step
        assert metrics["weights/probe_gap"] == 1e-6
        assert metrics["entropy/mean"] == 1.5
        assert metrics["tokens/step"] == GROUPS * SIBLINGS * 2
        assert metrics["kl/mean"] == pytest.approx(0.2)
        assert len(groups) == GROUPS
        assert 0 <= metrics["time/learn_s"] <= metrics["time/step_s"]


# The KL coefficient


def coefficients(actors: FakeActors) -> list[float]:
    return [metrics["kl/coefficient"] for _, metrics, _ in actors.recorded]


def test_the_kl_coefficient_is_steered_from_step_to_step_and_a_resumed_run_goes_on_with_it():
    # Every completion is at 0.2 nats: half of the target, so the error is cut to -0.2.
    kl = {"target": 0.4, "coefficient": 0.1, "rate": 0.5}
    whole = run(config(steps=4, rl={"kl": kl}))
    assert coefficients(whole) == pytest.approx([0.1 * 0.9**step for step in range(4)])
    resumed = FakeActors()
    settings = config(steps=4, rl={"kl": kl})
    cursor = PromptCursor(PROMPTS, settings.seed, 2 * GROUPS)
    loop = Loop(settings, cursor, resumed, resumed.record, 2, whole.recorded[1][1])
    asyncio.run(loop.run())
    assert coefficients(resumed) == coefficients(whole)[2:]


def test_the_steered_coefficient_is_what_a_step_is_trained_with():
    kl = {"target": 0.4, "coefficient": 0.1, "rate": 0.5, "place": "loss"}
    actors = run(config(steps=3, rl={"kl": kl}))
    assert [batch.kl_coefficient for batch in actors.batches] == coefficients(actors)
    assert len(set(coefficients(actors))) == 3


def test_the_entropy_coefficient_is_steered_too_and_reaches_the_learner():
    # The learner reports 1.5 nats, half of the target: the bonus grows.
    entropy = {"target": 3.0, "coefficient": 0.01, "rate": 0.5}
    actors = run(config(steps=3, rl={"entropy": entropy}))
    wanted = [0.01 * 1.1**step for step in range(3)]
    assert [m["entropy/coefficient"] for _, m, _ in actors.recorded] == pytest.approx(wanted)
    assert [batch.entropy_coefficient for batch in actors.batches] == pytest.approx(wanted)


def test_without_a_target_the_coefficient_stays():
    assert set(coefficients(run(config(rl={"kl": {"coefficient": 0.1}})))) == {0.1}
