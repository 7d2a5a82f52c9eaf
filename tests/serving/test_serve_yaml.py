from pathlib import Path
from typing import Any

import pytest
import yaml

from models.reward_model import RewardModel
from rlhf.config import DemoConfig, ServeConfig, load_config
from rlhf.errors import ConfigError, ModelError
from rlhf.rows import reply_room
from serving.chat_server import from_arguments
from tests.conftest import ROOT


def test_the_shipped_file_is_what_serve_takes_and_what_pavlov_builds(tiny_model: Path):
    from ray.serve.schema import ServeDeploySchema

    file = yaml.safe_load((ROOT / "configs" / "serve.yaml").read_text())
    [application] = ServeDeploySchema.model_validate(file).applications
    assert application.import_path == "serving.chat_server:from_arguments"
    arguments = {**application.args, "policy": {"model": str(tiny_model)}}
    with pytest.raises(ModelError, match=r"= 1280, but .* reads at most 1024 tokens"):
        from_arguments(arguments)
    arguments["serve"]["max_prompt_tokens"] = 512
    assert from_arguments(arguments) is not None
    # Serve finds its deployments by the application's name.
    assert application.name == arguments["serve"]["name"]


def threads_of(deployment: Any) -> int:
    environment = deployment._bound_deployment.ray_actor_options["runtime_env"]["env_vars"]
    return int(environment["OMP_NUM_THREADS"])


@pytest.mark.parametrize(("cores", "threads"), [(2, (2, 2)), (12, (1, 3)), (5, (1, 1))])
def test_engines_and_backbones_share_the_cores(
    tiny_model: Path,
    tiny_reward_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    threads: tuple[int, int],
):
    monkeypatch.setattr("cluster.layout.usable_cores", lambda: cores)
    ingress = from_arguments(
        {
            "policy": {"model": str(tiny_model)},
            "reward": str(tiny_reward_model),
            "serve": {
                "keys": [],
                "max_prompt_tokens": 512,
                "engine": {"most": 2},
                "scorer": {"most": 2},
            },
        }
    )
    engine, scorer = ingress._bound_deployment.init_args
    found = tuple(threads_of(deployment) for deployment in (ingress, engine, scorer))
    assert found == (threads[0], threads[1], threads[1])


def test_who_is_let_in_is_said_in_the_file(tiny_model: Path):
    policy = {"model": str(tiny_model)}
    serve = {"max_prompt_tokens": 512}
    for arguments in ({"policy": policy}, {"policy": policy, "serve": serve}):
        with pytest.raises(ConfigError, match=r"serve\.keys is not given.* say `keys: \[\]`"):
            from_arguments(arguments)
    for keys in ([], ["0" * 64]):
        assert from_arguments({"policy": policy, "serve": {**serve, "keys": keys}}) is not None


def test_answers_longer_than_the_ensemble_reads_are_warned_of(
    tiny_model: Path, tiny_reward_model: Path, caplog: pytest.LogCaptureFixture
):
    room = reply_room(RewardModel.load(tiny_reward_model).card.max_tokens, 512)
    for length in (room, room + 1):
        serve = {"keys": [], "max_prompt_tokens": 512, "max_tokens": length}
        policy = {"model": str(tiny_model)}
        from_arguments({"policy": policy, "reward": str(tiny_reward_model), "serve": serve})
        told = [each for each in caplog.messages if "serve.max_tokens" in each]
        assert len(told) == (length > room)
    assert f"serve.max_tokens = {length}, but the reward model reads at most {room}" in told[0]


def test_the_demos_ensemble_reads_what_the_shipped_server_writes():
    demo = load_config(DemoConfig, ROOT / "configs" / "demo.toml", [])
    serve = load_config(ServeConfig, ROOT / "configs" / "serve.toml", []).serve
    room = reply_room(demo.ensemble.max_tokens, serve.max_prompt_tokens)
    assert serve.max_tokens <= room


def test_a_wrong_key_is_refused_as_in_a_toml_file():
    with pytest.raises(ConfigError, match=r"serve\.max_token is not a known key"):
        from_arguments({"serve": {"max_token": 3}})
