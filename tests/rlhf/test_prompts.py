import dataclasses

import pytest

from rlhf.errors import DataError
from rlhf.prompts import PromptCursor
from rlhf.records import Message


def walk(cursor, count):
    return [(prompt.id, epoch) for prompt, epoch in (cursor.next() for _ in range(count))]


@pytest.fixture
def prompts(make):
    return [make.prompt(f"p{i}", f"Question {i}?") for i in range(7)]


@pytest.mark.parametrize("stop", range(0, 22))
def test_a_resumed_walk_goes_on_as_the_unbroken_one(prompts, stop):
    unbroken = walk(PromptCursor(prompts, seed=3), 25)
    first = PromptCursor(prompts, seed=3)
    walk(first, stop)
    assert first.position == stop
    resumed = PromptCursor(prompts, seed=3, position=first.position)
    assert walk(resumed, 25 - stop) == unbroken[stop:]


def test_every_epoch_visits_each_prompt_once(prompts):
    visits = walk(PromptCursor(prompts, seed=0), 21)
    for epoch in range(3):
        part = visits[7 * epoch : 7 * (epoch + 1)]
        assert sorted(part) == [(f"p{i}", epoch) for i in range(7)]


def test_epochs_and_seeds_have_orders_of_their_own(make):
    prompts = [make.prompt(f"p{i}") for i in range(30)]
    visits = [name for name, _ in walk(PromptCursor(prompts, seed=0), 60)]
    other = [name for name, _ in walk(PromptCursor(prompts, seed=1), 30)]
    in_file_order = [prompt.id for prompt in prompts]
    orders = [in_file_order, visits[:30], visits[30:], other]
    assert len(set(map(tuple, orders))) == 4


def test_the_fingerprint_is_that_of_prompts_and_seed_wherever_the_walk_stands(prompts):
    fingerprint = PromptCursor(prompts, seed=3).fingerprint
    assert PromptCursor(list(prompts), seed=3, position=5).fingerprint == fingerprint


def test_the_fingerprint_changes_with_whatever_changes_the_walk(prompts):
    first, *rest = prompts
    changed = {
        "seed": PromptCursor(prompts, seed=4),
        "fewer": PromptCursor(rest, seed=3),
        "order": PromptCursor([*rest, first], seed=3),
        "id": PromptCursor([dataclasses.replace(first, id="x"), *rest], seed=3),
        "text": PromptCursor(
            [dataclasses.replace(first, messages=(Message("user", "x"),)), *rest], seed=3
        ),
        "role": PromptCursor(
            [dataclasses.replace(first, messages=(Message("system", "Question 0?"),)), *rest],
            seed=3,
        ),
    }
    prints = {cursor.fingerprint for cursor in [PromptCursor(prompts, seed=3), *changed.values()]}
    assert len(prints) == 1 + len(changed)


def test_the_order_never_changes_between_releases(prompts):
    # Recorded: a change here would silently change every deterministic run and break resumes.
    names = [name for name, _ in walk(PromptCursor(prompts, seed=0), 7)]
    assert names == ["p0", "p2", "p4", "p5", "p3", "p1", "p6"]


def test_no_prompts_are_refused():
    with pytest.raises(DataError, match="no prompts"):
        PromptCursor([], seed=0)
