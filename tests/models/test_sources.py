"""From a name to a model folder: what is found, and the sentence where nothing is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from models import sources
from models.sources import (
    check_folder,
    require_context,
    resolve_model,
    resolve_reward_model,
    weights_fingerprint,
)
from rlhf.errors import ModelError


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that cannot be reached, and nothing in its cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_model_folder_is_found_by_path_absolute_relative_or_at_home(model_copy, monkeypatch):
    assert resolve_model(str(model_copy)) == model_copy.resolve()
    monkeypatch.chdir(model_copy.parent)
    assert resolve_model("model") == resolve_model("./model") == model_copy.resolve()
    monkeypatch.setenv("HOME", str(model_copy.parent))
    assert resolve_model("~/model") == model_copy.resolve()


def test_the_embedded_model_is_asked_for_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "embedded_model", lambda: tmp_path)
    assert resolve_model("embedded") == tmp_path


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/nope", "model", "a/b/c", "../x"])
def test_a_missing_folder_is_refused_with_the_ways_to_name_a_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="there is no model folder") as caught:
        resolve_model(name)
    assert name in str(caught.value)
    assert "hub id (owner/name) or 'embedded'" in str(caught.value)


def test_a_folder_without_a_config_is_refused(model_copy):
    (model_copy / "config.json").unlink()
    for find in (resolve_model, lambda name: check_folder(Path(name))):
        with pytest.raises(ModelError, match=f"{model_copy} is not a model folder: .*config.json"):
            find(str(model_copy))


def test_pickled_weights_are_no_weights(model_copy):
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=f"{model_copy} has no weights: .*safetensors"):
        resolve_model(str(model_copy))


def test_a_hub_id_that_cannot_be_had_is_one_sentence(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match="nobody/nothing is neither a folder nor a model"
    ) as caught:
        resolve_model("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_name_the_hub_would_refuse_is_one_sentence(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="neither a folder nor a model") as caught:
        resolve_model("bad--/..name")
    assert "\n" not in str(caught.value)


def test_the_fingerprint_is_of_config_and_weights_wherever_they_lie(tiny_model, model_copy):
    fingerprint = weights_fingerprint(tiny_model)
    assert weights_fingerprint(model_copy) == fingerprint
    (model_copy / "README.md").write_text("anything")
    assert weights_fingerprint(model_copy) == fingerprint
    for name in ("config.json", "model.safetensors"):
        original = (model_copy / name).read_bytes()
        (model_copy / name).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        assert weights_fingerprint(model_copy) != fingerprint
        (model_copy / name).write_bytes(original)
    assert weights_fingerprint(model_copy) == fingerprint


def test_a_reward_model_is_found_from_here_or_else_below_pavlov_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PAVLOV_RUNS", str(tmp_path / "runs"))
    assert resolve_reward_model("mine") == tmp_path / "runs" / "mine"
    assert resolve_reward_model("/elsewhere/reward") == Path("/elsewhere/reward")
    (tmp_path / "mine").mkdir()
    assert resolve_reward_model("mine") == (tmp_path / "mine").resolve()


def test_a_trained_policy_is_found_below_the_runs_folder(model_copy, monkeypatch, tmp_path):
    monkeypatch.setenv("PAVLOV_RUNS", str(model_copy.parent))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resolve_model(model_copy.name) == model_copy.resolve()


def test_more_than_the_config_says_is_refused_unless_positions_are_scaled(model_copy):
    config = model_copy / "config.json"
    said = json.loads(config.read_text())
    most = said.pop("max_position_embeddings")

    def write(**more: object) -> None:
        config.write_text(json.dumps(said | more))

    for more in (
        {"max_position_embeddings": most},
        {"text_config": {"max_position_embeddings": most}},
    ):
        write(**more)
        require_context(model_copy, most, "asked")
        with pytest.raises(ModelError, match=f"asked = {most + 1}, but .* at most {most} tokens"):
            require_context(model_copy, most + 1, "asked")
    write()
    require_context(model_copy, 10**6, "asked")
    for name in ("rope_scaling", "rope_parameters"):
        write(max_position_embeddings=most, **{name: {"rope_type": "yarn", "factor": 4.0}})
        require_context(model_copy, most + 1, "asked")
