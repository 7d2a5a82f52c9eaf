"""A run that is resumed goes on with what it had steered itself to, and with the same models."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.files import RunFolder
from models.reward_model import RewardModel
from rlhf.config import RLConfig, Section, parse_config
from rlhf.errors import CheckpointError, GenerationError
from rlhf.prompts import PromptCursor
from rlhf.records import RolloutGroup, ScoredGroup
from tests.conftest import build_tiny_model
from tests.trainers.test_loop import GROUPS, PROMPTS, FakeActors, config
from trainers import rl


class FakeFleet(FakeActors):
    learner_is_sound = True

    async def save_checkpoint(self, folder: Path, *, in_turn: bool = True) -> None:
        (folder / "weights").write_text("w")


def run(
    folder: RunFolder, first_step: int, steps: int, fleet: FakeFleet | None = None
) -> list[dict[str, Any]]:
    kl = {"target": 0.4, "coefficient": 0.1, "rate": 0.5}
    settings = config(steps=steps, rl={"kl": kl})
    cursor = PromptCursor(PROMPTS, settings.seed, first_step * GROUPS)
    said = Console(file=io.StringIO())
    asyncio.run(
        rl._steps(
            settings,
            fleet or FakeFleet(),
            cursor,
            folder,
            said,
            "test",
            first_step,
            {"reward.model": "r1"},
        )  # type: ignore[arg-type]
    )
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_resumed_run_steers_on_from_the_step_before_it(tmp_path: Path) -> None:
    folders = [
        RunFolder.claim(tmp_path / name, Section(), resume=False) for name in ("whole", "resumed")
    ]
    whole = run(folders[0], 0, 4)
    run(folders[1], 0, 2)
    resumed = run(folders[1], 2, 4)
    coefficients = [[row["kl/coefficient"] for row in rows] for rows in (whole, resumed)]
    assert coefficients[0] == coefficients[1]
    assert len(set(coefficients[0])) == 4
    for folder in folders:
        folder.release()


def test_a_checkpoint_says_what_its_models_are(tmp_path: Path) -> None:
    folder = RunFolder.claim(tmp_path / "run", Section(), resume=False)
    run(folder, 0, 1)
    found = folder.newest_checkpoint()
    assert found is not None and found[1]["made_with"] == {"reward.model": "r1"}
    folder.release()


def test_the_share_of_completions_that_were_cut_is_a_metric_of_every_step(tmp_path: Path) -> None:
    class Cutting(FakeFleet):
        def _scored(self, group: RolloutGroup) -> ScoredGroup | GenerationError:
            found = super()._scored(group)
            assert isinstance(found, ScoredGroup)
            return replace(found, scores=replace(found.scores, cut_G=(True, False)))

    for name, fleet, share in (("some", Cutting(), 0.5), ("unknown", FakeFleet(), None)):
        folder = RunFolder.claim(tmp_path / name, Section(), resume=False)
        assert run(folder, 0, 1, fleet)[0]["reward/cut_share"] == share
        folder.release()


class Started(Exception):
    """Where a run would start its actors."""


@pytest.fixture
def begun(
    tmp_path: Path, tiny_model: Path, tiny_reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Resumes a run behind its first checkpoint, whose models stand in ``policy``, ``critic`` and
    ``reward``, as far as to where the actors start."""

    def start(*_: object, **__: object) -> None:
        raise Started

    monkeypatch.setattr(rl, "ray_session", start)
    monkeypatch.setenv("PAVLOV_RUNS", str(tmp_path / "runs"))
    for source, name in (
        (tiny_model, "policy"),
        (tiny_model, "critic"),
        (tiny_reward_model, "reward"),
    ):
        shutil.copytree(source, tmp_path / name)
    critic = {"model": str(tmp_path / "critic")}
    settings = parse_config(
        RLConfig,
        {
            "policy": {"model": str(tmp_path / "policy")},
            "reference": {"model": str(tiny_model)},
            "reward": {"model": str(tmp_path / "reward")},
            "data": {"prompts": ["unused"]},
            "rl": {"algorithm": {"type": "ppo", "critic": critic}},
        },
        "test",
    )
    models = rl.resolve_models(settings)
    made_with = rl._made_with(models, RewardModel.load(models.reward).card.version)
    assert set(made_with) == {
        *("policy.model", "reference.model", "reward.model", "rl.algorithm.critic.model")
    }
    folder = RunFolder.claim(tmp_path / "runs" / "run", settings, resume=False)
    state = {"prompts": PromptCursor(PROMPTS, settings.seed).fingerprint, "made_with": made_with}
    with folder.new_checkpoint(1, state, 1):
        pass
    folder.release()

    def resume() -> None:
        said = Console(file=io.StringIO())
        rl.run_rl(settings, tmp_path / "run.toml", said, resume=True, prompts=PROMPTS)

    return resume


def test_a_run_goes_on_with_the_models_it_was_made_with(begun: Callable[[], None]) -> None:
    with pytest.raises(Started):
        begun()


@pytest.mark.parametrize(
    ("changed", "setting"),
    [
        ("policy", "policy.model"),
        ("critic", "rl.algorithm.critic.model"),
        ("reward", "reward.model"),
    ],
)
def test_another_model_behind_the_same_path_is_refused_by_its_setting(
    begun: Callable[[], None], tmp_path: Path, changed: str, setting: str
) -> None:
    if changed == "reward":
        card = tmp_path / "reward" / "reward.json"
        card.write_text(card.read_text().replace('"tiny"', '"other"'))
    else:
        shutil.rmtree(tmp_path / changed)
        build_tiny_model(tmp_path / changed, seed=1)
    with pytest.raises(CheckpointError, match=rf"was made with another {setting} \(") as caught:
        begun()
    named = ("policy.model", "critic.model", "reward.model", "reference.model")
    assert sum(name in str(caught.value) for name in named) == 1


def test_a_checkpoint_of_an_earlier_pavlov_does_not_say_and_is_gone_on_from(
    begun: Callable[[], None], tmp_path: Path
) -> None:
    [path] = (tmp_path / "runs" / "run" / "checkpoints").glob("*/state.json")
    state = json.loads(path.read_text())
    del state["made_with"]
    path.write_text(json.dumps(state))
    card = tmp_path / "reward" / "reward.json"
    card.write_text(card.read_text().replace('"tiny"', '"other"'))
    with pytest.raises(Started):
        begun()
    # Unless the threshold was set by the scores of the former.
    shift = tmp_path / "runs" / "run" / "domain_shift.json"
    shift.write_text(json.dumps({"threshold": 1.0, "reward_version": "tiny"}))
    with pytest.raises(CheckpointError, match="set by version tiny of the reward model"):
        begun()
