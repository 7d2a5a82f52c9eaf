"""What a search tries, without trying it."""

import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import trainers.tune
from actors.sft_worker import SFTJob
from rlhf.config import LoRASection, TuneConfig, parse_config
from rlhf.config.actors import PolicySection
from rlhf.config.tune import TuneSection
from rlhf.errors import ConfigError
from rlhf.stopping import Evaluation
from trainers.tune import drawn, run_tune, settings_of, start_known


def config(**tune: Any) -> TuneConfig:
    values = {
        "seed": 3,
        "data": {"conversations": ["c"]},
        "reward": {"model": "r"},
        "answers": {"prompts": ["p"]},
        "learner": {"learning_rate": 0.5, "warmup_steps": 4},
        "tune": tune,
    }
    return parse_config(TuneConfig, values, "test")


def test_rates_are_spread_over_their_decades_one_in_each_part():
    trials = drawn(config(trials=8, learning_rate=[1e-6, 1e-2]))
    parts = sorted(math.floor((math.log10(t.learning_rate) + 6) / 4 * 8) for t in trials)
    assert parts == list(range(8))
    assert [trial.number for trial in trials] == list(range(8))


def test_trials_follow_from_the_seed_so_that_a_search_can_go_on():
    settings = config(trials=5, lora_rank=[0, 8], batch_conversations=[4, 8], epochs=[1, 2])
    assert drawn(settings) == drawn(settings)
    assert drawn(settings) != drawn(settings.model_copy(update={"seed": 4}))
    assert {trial.lora_rank for trial in drawn(config(trials=40, lora_rank=[0, 8]))} == {0, 8}


def test_a_trial_is_the_configuration_with_its_own_settings():
    settings = config(trials=6, lora_rank=[8], batch_conversations=[4], epochs=[2])
    trial = drawn(settings)[0]
    found = settings_of(settings, trial)
    assert found.learner.learning_rate == trial.learning_rate
    assert found.learner.warmup_steps == 4
    assert (found.sft.epochs, found.sft.batch_conversations) == (2, 4)
    assert found.policy.lora is not None
    assert (found.policy.lora.rank, found.policy.lora.alpha) == (8, 16)
    plain = config(trials=2, lora_rank=[0])
    assert settings_of(plain, drawn(plain)[0]).policy.lora is None


def test_an_adapter_that_the_policy_asks_for_is_what_every_trial_trains():
    lora = LoRASection(rank=16, alpha=8, layers=["q_proj"])
    plain = config(trials=2)
    own = plain.model_copy(update={"policy": PolicySection(lora=lora)})
    assert [settings_of(own, trial).policy.lora for trial in drawn(own)] == [lora, lora]
    assert settings_of(plain, drawn(plain)[0]).policy.lora is None
    # Of other ranks, the user's share of the difference stays.
    other = own.model_copy(update={"tune": TuneSection(lora_rank=[32])})
    assert settings_of(other, drawn(other)[0]).policy.lora == lora.model_copy(
        update={"rank": 32, "alpha": 16}
    )


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ({"learning_rate": [1e-3, 1e-4]}, "the first must be the smaller"),
        ({"trials": 1}, "tune.trials = 1"),
        ({"epochs": []}, "tune.epochs = []"),
    ],
)
def test_a_search_that_is_none_is_refused(tune, said):
    with pytest.raises(ConfigError) as refused:
        config(**tune)
    assert said in str(refused.value)


def test_what_one_trial_measured_before_its_first_step_is_not_measured_again(tmp_path):
    trials = tmp_path / "trials"
    for number in range(3):
        (trials / f"{number:03d}").mkdir(parents=True)
    assert start_known(tmp_path) is None
    rows = [
        {"step": step, "loss": loss, "rewards_P": [1.0, loss], "disagreement_P": [0.1, 0.2]}
        for step, loss in ((0, 2.5), (4, 2.25))
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (trials / "001" / "evaluations.jsonl").write_text(lines)
    found = start_known(tmp_path)
    assert found is not None
    assert (found.step, found.loss, found.rewards_P) == (0, 2.5, (1.0, 2.5))


def test_a_trial_that_diverged_leaves_a_summary_that_any_reader_of_json_understands(
    tmp_path, tiny_model, monkeypatch
):
    settings = config(trials=3)
    for number, objective in enumerate((0.5, None, 0.25)):
        folder = tmp_path / "trials" / f"{number:03d}"
        (folder / "policy").mkdir(parents=True)
        mark: dict[str, Any] = {"objective": objective, "ended": "failed: probe"}
        if objective is not None:
            mark |= {"best_step": 4, "reward": 0.5, "disagreement": 0.1, "steps": 8}
        (folder / "finished.json").write_text(json.dumps(mark))
    job = SFTJob(settings, "m", str(tmp_path), "", (), (), (), 8, None, None, resume=False)
    found = [
        Evaluation(0, math.nan, (1.0, 2.0), (0.0, 0.0)),
        Evaluation(0, math.nan, (0.0,) * 2, ()),
    ]
    doubles = {
        "prepare": SimpleNamespace(model=str(tiny_model), train=(), prompts=()),
        "claim": SimpleNamespace(path=tmp_path, release=lambda: None),
        "ray_session": contextlib.nullcontext("namespace"),
        "start_job": job,
        "side_by_side": found,
    }
    for name, result in doubles.items():
        monkeypatch.setattr(trainers.tune, name, lambda *_, _result=result, **__: _result)
    run_tune(settings, Path("test.toml"), Console(quiet=True))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert [trial["objective"] for trial in summary["trials"]] == [0.5, None, 0.25]
    assert summary["trials"][1]["reward"] is None
    assert summary["winner"]["trial"]["number"] == 0
