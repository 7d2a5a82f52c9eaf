from pathlib import Path

import pytest

from rlhf.config import RewardFunction, RLSection, ShapingSection
from rlhf.errors import RewardFunctionError
from rlhf.records import StepReport
from rlhf.reward_functions import RewardFunctions
from rlhf.shaping import shaped_rewards
from rlhf.steps import step_metrics, training_batch

MODULE = """
def length(prompts, completions):
    assert len(prompts) == len(completions)
    return [
        len(completion.text) + (prompt.id == "p1")
        for prompt, completion in zip(prompts, completions)
    ]

def fails(prompts, completions):
    return [1 / 0]

def too_few(prompts, completions):
    return [1.0]

def not_finite(prompts, completions):
    return [float("nan")] * len(completions)

def words(prompts, completions):
    return ["good"] * len(completions)

NUMBER = 3
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is called from a folder that holds the module."""
    (tmp_path / "own_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_that_name")
    monkeypatch.chdir(tmp_path)


def own(function: str, name: str = "mine", weight: float = 1.0) -> RewardFunction:
    return RewardFunction(name=name, function=function, weight=weight)


def test_every_function_is_asked_once_for_all_and_answers_by_name(make):
    functions = RewardFunctions([own("own_rewards:length"), own("own_rewards:length", "again")])
    completions = [make.completion(text=text) for text in ("a", "bcd")]
    found = functions([make.prompt("p0"), make.prompt("p1")], completions)
    assert found == {"mine": [1.0, 4.0], "again": [1.0, 4.0]}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("own_rewards:nothing", "cannot be loaded: AttributeError"),
        ("no_such_module_here:f", "cannot be loaded: ModuleNotFoundError"),
        ("broken_rewards:f", "cannot be loaded: ModuleNotFoundError: .*nothing_of_that_name"),
        ("own_rewards:NUMBER", "is no function but 3"),
    ],
)
def test_what_cannot_be_loaded_is_named(function, reason):
    with pytest.raises(RewardFunctionError, match=f"reward function {function} {reason}"):
        RewardFunctions([own(function)])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("fails", "failed: ZeroDivisionError: division by zero"),
        ("too_few", "returned 1 rewards for 2 completions"),
        ("not_finite", "returned nan for 'answer'; a finite number is needed"),
        ("words", "returned 'good' for 'answer'"),
    ],
)
def test_what_returns_no_numbers_is_named(make, function, reason):
    functions = RewardFunctions([own(f"own_rewards:{function}")])
    with pytest.raises(RewardFunctionError, match=f"own_rewards:{function} {reason}"):
        functions([make.prompt()] * 2, [make.completion()] * 2)


def test_rewards_add_up_with_their_weights_and_are_logged_without(make):
    settings = RLSection(
        shaping=ShapingSection(clip=2.0, ensemble_weight=0.5, cut_off_penalty=1.0),
        rewards=[own("m:f", "short", -0.1), own("m:g", "polite", 2.0)],
    )
    completions = (make.completion(finish_reason="length"), make.completion())
    group = make.scored((4.0, 1.0), completions)
    group.scores.own_G.update(short=(10.0, 20.0), polite=(0.0, 1.0))
    # 0.5 * 2 - 1 + 0 - 1 and 0.5 * 1 - 2 + 2: whatever the clip, one's own are not cut.
    assert shaped_rewards([group], settings).tolist() == [[-1.0, 0.5]]
    batch = training_batch([group], settings)
    row = step_metrics(0, 0, [group], batch, StepReport(), settings, {})
    assert (row["reward/own_short"], row["reward/own_polite"]) == (15.0, 0.5)
    assert (row["reward/mean"], row["reward/trained_mean"]) == (2.5, -0.25)
