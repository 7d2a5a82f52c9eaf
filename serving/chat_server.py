"""`pavlov serve`: ingress, engine and ensemble under Ray Serve, and the change of version."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from actors.chat_engine import ChatEngine, Piece, Sampling
from actors.chat_scorer import ChatScorer
from cluster.layout import actor_environment, choose_layout, share_of_cores, usable_cores
from cluster.session import node_address, ray_session
from cluster.spawn import find_cause
from models.chat import ChatTokenizer
from models.reward_model import BankAnswers, RewardCard, RewardModel
from models.sources import (
    portable_name,
    require_context,
    resolve_model,
    resolve_reward_model,
    weights_fingerprint,
)
from rlhf.config import RolePlacement, parse_config
from rlhf.config.serve import ReplicasSection, ServeConfig, ServeSection
from rlhf.errors import ConfigError, ModelError, RunError
from rlhf.records import Message
from serving.application import (
    READY_S,
    choose_port,
    refuse_temporary_file,
    run_application,
    serve_until_stopped,
)
from serving.ensemble import Ensemble
from serving.feedback import Feedback
from serving.promotion import Live, Promotion, Served

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.5
_SETTLE_S = 3.0
_STARTS = 2
"""How often a replica is started before its version is given up."""


def serve_chat(config: ServeConfig, console: Console) -> None:
    """Serve until SIGTERM or SIGINT: what was promoted under this name (`pavlov promote`), the
    version before it where that does not come up, or `policy.model` where nothing was ever
    promoted; a promotion while it runs is followed.

    Raises:
        ModelError: policy or reward model cannot be used, or the policy's context is too short.
        DataError, ResourceError: `serve.feedback` cannot be used.
        ResourceError: another process serves under this name.
    """
    settings = config.serve
    _try_feedback(settings)
    served = Served(settings.name)
    newest = served.newest()
    if newest:
        live = _promoted(config, served, newest)
    else:
        model = resolve_model(config.policy.model)
        live = Live(weights_fingerprint(model), str(model))
    judges = _Judges.of(config)
    _checked_length(config, live.model)
    port = choose_port(settings.host, settings.port)
    # After what may be refused, which leaves no folder. This process ends the applications and says
    # so: as long as it lives they are its own.
    with served.held():
        if newest:
            console.print(
                f"serving version {live.version}, not version {newest.version}, which was promoted "
                f"from {newest.source} and could not be served: {live.failed}"
                if live.failed
                else f"serving version {newest.version}, promoted from {newest.source}, not "
                f"policy.model = {config.policy.model}"
            )
        if unread := _unread(settings, live.model, judges):
            console.print(f"warning: {unread}")
        if newest is None:
            live = _kept(config, served, live)
        with ray_session("serve", num_cpus=usable_cores()):
            assistant = Assistant(config, served, live, judges, console)
            serve_until_stopped(assistant, settings.name, settings.host, port, console)


def _kept(config: ServeConfig, served: Served, live: Live) -> Live:
    """`policy.model`, before anything was promoted. A folder of the user's may be trained anew
    under its name, so its weights are kept and served from there; caches stay as they are."""
    if not Path(portable_name(config.policy.model)).is_absolute():
        return live
    return replace(live, model=str(served.keep(live.version, Path(live.model))))


def _promoted(config: ServeConfig, served: Served, newest: Promotion) -> Live:
    """What was promoted last, or what is served in its place where that cannot be."""
    version, live = served.current(), served.live()
    failed = "" if live is None or version == newest.version else live.failed
    try:
        model = str(served.model(version))
        _checked_length(config, model)
    except ModelError as error:
        if version != newest.version:
            raise
        version, failed = newest.before, str(error)
        model = str(served.model(version))
    return Live(version, model, newest.at, failed)


class Assistant:
    """Ingress and ensemble as one Serve application, and an engine for each version as one of its
    own: a promoted version's answers before the one before it is told to finish, so that nobody
    waits and every answer is of one version. For that time there is room needed for both."""

    def __init__(
        self,
        config: ServeConfig,
        served: Served,
        live: Live,
        judges: _Judges | None,
        console: Console,
    ) -> None:
        self._config, self._served, self._console = config, served, console
        self._judges, self._live = judges, live
        self._name = config.serve.name
        self._started = 0
        self._deployed: list[str] = []
        self._ran: set[str] = set()
        self._said: Live | None = None
        self._stopping = threading.Event()
        self._following = threading.Thread(target=self._follow, daemon=True)

    def left_behind(self, there: Collection[str]) -> bool:
        """See `Applications`."""
        live = self._served.live()
        if live is None or live.stopped or live.engine not in there:
            return False
        # Its engine may be of another version, and ends with this server.
        self._deployed.append(live.engine)
        return True

    def start(self) -> None:
        """See `Applications`."""
        try:
            self._live = self._start_engine(self._live)
        except RunError as error:
            if self._stopping.is_set():
                raise
            self._live = self._start_engine(self._before(error))
        self._say(self._live)
        served = self._served
        ingress = _ingress(
            self._config,
            self._judges,
            lambda: Path(_live(served).model),
            lambda: _live(served).engine,
        )
        bound = ingress.bind(*_scorers(self._config, self._judges))
        self._run(bound, self._name, "/")

    def ready(self, address: str) -> str:
        """See `Applications`."""
        self._following.start()
        return f"serving {self._name}: {address}/v1/chat/completions"

    def stop(self) -> None:
        """See `Applications`."""
        self._stopping.set()
        if self._following.is_alive():
            # An engine that is only starting is not waited for.
            self._following.join(_SETTLE_S)
        # The ingress first: what it has accepted asks the engines.
        self._end([name for name in self._deployed if name == self._name])
        self._end([name for name in self._deployed if name != self._name])
        if self._said is not None:
            self._say(replace(self._said, stopped=True))

    def _end(self, names: Collection[str]) -> None:
        """End Serve applications; those that ran finish what they were asked."""
        from ray import serve

        for name in names:
            serve.delete(name, _blocking=False)
        waited = self._ran.intersection(names)
        # Serve's own patience is a minute, which an answer may take longer than.
        deadline = time.monotonic() + self._config.serve.timeout_s + _SETTLE_S
        while waited & set(serve.status().applications) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)

    def _say(self, live: Live) -> None:
        self._served.say_live(live)
        self._said = live

    def _follow(self) -> None:
        while not self._stopping.wait(_LOOK_EVERY_S):
            try:
                newest = self._served.newest()
                # A record from before `at` was kept in order may hold an earlier time last.
                if newest is not None and newest.at != self._live.seen:
                    self._switch(newest)
            except Exception as error:
                self._console.print(f"the record of promotions was not followed: {error}")

    def _switch(self, to: Promotion) -> None:
        """Serve another version; go on with this one if it does not come up. Whoever still waits
        for the old engine's answers does not hold up the next promotion."""
        from ray import serve

        old = replace(self._live, seen=to.at, failed="")
        try:
            self._live = old
            if to.version != old.version:
                live = replace(old, version=to.version, model=str(self._served.model(to.version)))
                self._live = self._start_engine(live)
        except Exception as error:
            self._live = replace(old, failed=str(error) or type(error).__name__)
        if self._stopping.is_set():
            # What was not said is done by the next server.
            return
        if self._live.failed:
            self._console.print(f"version {to.version} is not served: {self._live.failed}")
        self._say(self._live)
        if self._live.version != old.version:
            self._console.print(f"version {to.version} is served, not {old.version}")
            # An ingress that had just asked which one is live has begun its request by then.
            self._stopping.wait(_SETTLE_S)
            serve.delete(old.engine, _blocking=False)

    def _before(self, error: RunError) -> Live:
        """What was served before the promotion whose version did not come up at the start."""
        newest = self._served.newest()
        if newest is None or (newest.version, newest.at) != (self._live.version, self._live.seen):
            raise error
        self._console.print(f"version {newest.version} is not served: {error}")
        model = self._served.model(newest.before)
        return Live(newest.before, str(model), newest.at, failed=str(error))

    def _start_engine(self, live: Live) -> Live:
        """An engine for a version, under a name of its own: one of the same version may be there
        still, to finish what it was asked."""
        self._started += 1
        name = f"{self._name}-{live.version}-{self._started}"
        engine = _engine(self._config, self._judges, live.model)
        self._run(engine, name, None)
        return replace(live, engine=name)

    def _run(self, application: Any, name: str, prefix: str | None) -> None:
        if self._stopping.is_set():
            raise RunError(f"{name} is not started: the server is stopping")
        self._deployed.append(name)
        run_application(application, name, prefix, READY_S)
        self._ran.add(name)


def _try_feedback(settings: ServeSection) -> None:
    """Open where feedback goes, so that what is wrong with it is said at the start."""
    if settings.feedback is not None:
        refuse_temporary_file("serve.feedback", settings.feedback)
        Feedback(settings, b"").close()


def _live(served: Served) -> Live:
    live = served.live()
    assert live is not None, "an engine is started before the ingress"
    return live


def from_arguments(arguments: dict[str, Any]) -> Any:
    """The application for `serve deploy` (`configs/serve.yaml`); `arguments` are the sections of a
    configuration of `pavlov serve`. Promotions are not followed: deploy the file anew.

    Raises:
        ConfigError: as the TOML file of the same content; or `serve.keys` is left out: Serve's own
            host decides who reaches it, and not `serve.host`.
        DataError, ResourceError: `serve.feedback` cannot be used.
    """
    config = parse_config(ServeConfig, arguments, "serve.yaml")
    if "keys" not in config.serve.model_fields_set:
        raise ConfigError(
            "serve.yaml: serve.keys is not given, and http_options.host may let everybody in reach "
            "ask: list the SHA-256 of your keys, or say `keys: []`, by which only programs of the "
            "node that listens are let in"
        )
    _try_feedback(config.serve)
    model = resolve_model(config.policy.model)
    judges = _Judges.of(config)
    if unread := _unread(config.serve, str(model), judges):
        _log.warning(unread)
    name = config.serve.name
    ingress = _ingress(config, judges, lambda: model, lambda: name)
    return ingress.bind(_engine(config, judges, str(model)), *_scorers(config, judges))


@dataclass(frozen=True, slots=True)
class _Judges:
    """A reward model that can be used: its folder and card."""

    folder: Path
    card: RewardCard

    @classmethod
    def of(cls, config: ServeConfig) -> _Judges | None:
        if config.reward is None:
            return None
        folder = resolve_reward_model(config.reward).absolute()
        return cls(folder, RewardModel.load(folder).card)


def _engine(config: ServeConfig, judges: _Judges | None, model: str) -> Any:
    """The deployment of one version's engine.

    Raises:
        ModelError: the model's context is shorter than what may be asked.
    """
    settings = config.serve
    length = _checked_length(config, model)
    # Given up one by one, candidates are calls of their own.
    calls = settings.best_of_limit if settings.reject_after else 1
    places, threads = _places(settings, calls), _threads(settings, judges)
    deployed = _deployed(ChatEngine, "engine", settings.engine, places, settings, threads)
    return deployed.bind(model, config.engine, length, settings.engine.gpus)


def _checked_length(config: ServeConfig, model: str) -> int:
    """Tokens of the longest conversation and answer together."""
    length = config.serve.max_prompt_tokens + config.serve.max_tokens
    require_context(Path(model), length, "serve.max_prompt_tokens + serve.max_tokens")
    return length


def _unread(settings: ServeSection, model: str, judges: _Judges | None) -> str:
    """In what answers may be longer than the ensemble reads, "" where they may not. Such an answer
    counts as out of its domain."""
    if judges is None:
        return ""
    tokenizer = ChatTokenizer(Path(model)).fingerprint
    lengths = settings.max_prompt_tokens, settings.max_tokens
    try:
        judges.card.require_room(tokenizer, *lengths, "serve.max_tokens")
    except ModelError as error:
        return str(error)
    return ""


def _scorers(config: ServeConfig, judges: _Judges | None) -> list[Any]:
    """A deployment for each of the ensemble's backbones: the others go on where one dies."""
    if judges is None:
        return []
    settings = config.serve
    places, threads = _places(settings, settings.best_of_limit), _threads(settings, judges)
    return [
        _deployed(ChatScorer, _bank(number), settings.scorer, places, settings, threads).bind(
            str(judges.folder), number, settings.scorer.gpus
        )
        for number in range(len(judges.card.banks))
    ]


def _threads(settings: ServeSection, judges: _Judges | None) -> int:
    """Threads of each engine and each of the ensemble's backbones on CPU, all replicas that there
    may be computing at once."""
    banks = len(judges.card.banks) if judges else 0
    computing = [(settings.engine, 1), (settings.scorer, banks)]
    return share_of_cores(
        RolePlacement(actors=replicas.most * each, gpus=replicas.gpus)
        for replicas, each in computing
        if each
    )


def _places(settings: ServeSection, calls: int) -> int:
    """For the calls of all requests that all ingress replicas answer at once, and for who asks how
    it is."""
    return settings.at_once * settings.ingress.most * calls + 8


def _bank(number: int) -> str:
    return f"ensemble-{number}"


def _ingress(
    config: ServeConfig,
    judges: _Judges | None,
    tokenizer: Callable[[], Path],
    engine: Callable[[], str],
) -> Any:
    """The deployment that requests arrive at.

    Args:
        tokenizer: the folder to load it from, asked when a replica starts.
        engine: the Serve application that holds it, asked for every request.
    """
    from ray import serve

    settings = config.serve
    key = secrets.token_bytes(32)

    def build() -> Any:
        from serving.chat import chat_app

        return chat_app(
            config,
            ChatTokenizer(tokenizer()),
            EngineElsewhere(engine),
            None if judges is None else _ensemble(settings, judges),
            None if settings.feedback is None else Feedback(settings, key),
        )

    served: Any = serve.ingress(build)()
    places = 2 * (settings.at_once + settings.waiting) + 8
    # SQLite's file is on this node.
    sqlite = (settings.feedback or "").startswith("sqlite")
    here = {f"node:{node_address()}": 0.001} if sqlite else {}
    return _deployed(served, "chat", settings.ingress, places, settings, resources=here)


def _deployed(
    target: Any,
    name: str,
    replicas: ReplicasSection,
    places: int,
    settings: ServeSection,
    threads: int = 1,
    *,
    resources: Mapping[str, float] = MappingProxyType({}),
) -> Any:
    from ray import serve

    options: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        options = {
            "autoscaling_config": {
                "min_replicas": replicas.least,
                "max_replicas": replicas.most,
                "target_ongoing_requests": max(1, min(settings.at_once, places // 4)),
            }
        }
    layout = choose_layout(None)
    return serve.deployment(
        name=name,
        max_ongoing_requests=places,
        graceful_shutdown_timeout_s=settings.timeout_s,
        max_constructor_retry_count=_STARTS,
        health_check_period_s=5.0,
        ray_actor_options={
            "num_cpus": replicas.cpus,
            "num_gpus": replicas.gpus,
            "resources": dict(resources),
            "runtime_env": {"env_vars": actor_environment(layout, replicas.gpus, threads)},
        },
        **options,
    )(target)


class EngineElsewhere:
    """A `ChatEngine` in the Serve application that `application` names, anew for every request."""

    def __init__(self, application: Callable[[], str]) -> None:
        self._application = application
        self._handles: dict[str, Any] = {}

    async def write(
        self, prompt_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Piece, None]:
        """See `ChatEngine.write`."""
        pieces = self._handle().options(stream=True).write.remote(prompt_ids, sampling)
        try:
            async for piece in pieces:
                yield piece
        finally:
            pieces.cancel()

    async def version(self) -> str:
        """See `ChatEngine.version`."""
        return str(await self._handle().version.remote())

    def _handle(self) -> Any:
        from ray import serve

        name = self._application()
        if name not in self._handles:
            self._handles = {name: serve.get_deployment_handle("engine", name)}
        return self._handles[name]


def _ensemble(settings: ServeSection, judges: _Judges) -> Ensemble:
    from ray import serve

    handles = [
        serve.get_deployment_handle(_bank(number), settings.name)
        for number in range(len(judges.card.banks))
    ]
    return Ensemble(judges.card, list(map(BankElsewhere, handles)), settings.patience_s)


class BankElsewhere:
    """A `ChatScorer` behind a Serve handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def judge(self, messages: Sequence[Message], text: str, finished: bool) -> BankAnswers:
        """See `ChatScorer.judge`."""
        said = self._handle.judge.remote(messages, text, finished)
        try:
            answers: BankAnswers = await said
        except asyncio.CancelledError:
            said.cancel()
            raise
        except Exception as error:
            # As it was raised: Ray's has a traceback in its place.
            raise find_cause(error) from None
        return answers

    async def version(self) -> str:
        """See `ChatScorer.version`."""
        return str(await self._handle.version.remote())
