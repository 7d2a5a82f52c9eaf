"""`pavlov serve`: ingress, engine and ensemble as one Ray Serve application."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.chat_engine import ChatEngine, Piece, Sampling
from actors.chat_scorer import ChatScorer, Verdict
from cluster.layout import actor_environment, choose_layout, usable_cores
from cluster.session import ray_session
from models.reward_model import RewardModel
from models.sources import resolve_model, resolve_reward_model
from rlhf.config import parse_config
from rlhf.config.serve import ReplicasSection, ServeConfig
from rlhf.records import Message
from serving.application import choose_port, serve_until_stopped


def serve_chat(config: ServeConfig, console: Console) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ModelError: policy or reward model cannot be used.
    """
    model = resolve_model(config.policy.model)
    reward = None if config.reward is None else resolve_reward_model(config.reward).absolute()
    if reward is not None:
        RewardModel.load(reward)
    settings = config.serve
    port = choose_port(settings.host, settings.port)
    with ray_session("serve", num_cpus=usable_cores()):
        serve_until_stopped(
            application(config, model, reward),
            settings.name,
            settings.host,
            port,
            console,
            lambda address: f"serving {settings.name}: {address}/v1/chat/completions",
        )


def from_arguments(arguments: dict[str, Any]) -> Any:
    """The application for `serve deploy` (`configs/serve.yaml`); `arguments` are the sections of a
    configuration of `pavlov serve`.

    Raises:
        ConfigError: as the TOML file of the same content.
    """
    config = parse_config(ServeConfig, arguments, "serve.yaml")
    reward = None if config.reward is None else resolve_reward_model(config.reward).absolute()
    return application(config, resolve_model(config.policy.model), reward)


def application(config: ServeConfig, model: Path, reward: Path | None) -> Any:
    """The Serve application, for `serve.run`."""
    from ray import serve

    settings = config.serve
    length = settings.max_prompt_tokens + settings.max_tokens
    engine = _deployed(ChatEngine, "engine", settings.engine, 4 * settings.at_once).bind(
        str(model), config.engine, length, settings.engine.gpus
    )
    scorer = None
    if reward is not None:
        scorer = _deployed(ChatScorer, "ensemble", settings.scorer, 4 * settings.at_once).bind(
            str(reward), settings.scorer.gpus
        )

    def build() -> Any:
        from models.chat import ChatTokenizer
        from serving.chat import chat_app

        return chat_app(
            config,
            ChatTokenizer(model),
            EngineElsewhere(serve.get_deployment_handle("engine", settings.name)),
            None
            if reward is None
            else ScorerElsewhere(serve.get_deployment_handle("ensemble", settings.name)),
        )

    served: Any = serve.ingress(build)()
    ingress = _deployed(
        served, "chat", settings.ingress, 2 * (settings.at_once + settings.waiting) + 8
    )
    return ingress.bind(*filter(None, (engine, scorer)))


def _deployed(target: Any, name: str, replicas: ReplicasSection, at_once: int) -> Any:
    from ray import serve

    options: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        options = {
            "autoscaling_config": {
                "min_replicas": replicas.least,
                "max_replicas": replicas.most,
                "target_ongoing_requests": max(1, at_once // 4),
            }
        }
    layout = choose_layout(None)
    return serve.deployment(
        name=name,
        max_ongoing_requests=at_once,
        graceful_shutdown_timeout_s=60.0,
        health_check_period_s=5.0,
        ray_actor_options={
            "num_cpus": replicas.cpus,
            "num_gpus": replicas.gpus,
            "runtime_env": {"env_vars": actor_environment(layout, replicas.gpus)},
        },
        **options,
    )(target)


class EngineElsewhere:
    """A `ChatEngine` behind a Serve handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def write(
        self, prompt_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Piece, None]:
        """See `ChatEngine.write`."""
        pieces = self._handle.options(stream=True).write.remote(prompt_ids, sampling)
        try:
            async for piece in pieces:
                yield piece
        finally:
            pieces.cancel()

    async def version(self) -> str:
        """See `ChatEngine.version`."""
        return str(await self._handle.version.remote())


class ScorerElsewhere:
    """A `ChatScorer` behind a Serve handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def judge(self, messages: Sequence[Message], text: str, finished: bool) -> Verdict:
        """See `ChatScorer.judge`."""
        verdict: Verdict = await self._handle.judge.remote(messages, text, finished)
        return verdict

    async def version(self) -> str:
        """See `ChatScorer.version`."""
        return str(await self._handle.version.remote())
