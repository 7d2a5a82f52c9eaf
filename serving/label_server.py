"""`pavlov label serve`: the labelling service as a Ray Serve application."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rich.console import Console

from cluster.layout import usable_cores
from cluster.session import node_address, ray_session
from labelling.database import Database
from labelling.store import Store
from rlhf.config import data_path
from rlhf.config.label import LabelConfig
from rlhf.errors import DataError
from serving.application import (
    READY_S,
    choose_port,
    refuse_temporary_file,
    run_application,
    serve_until_stopped,
)

_AT_ONCE = 64
_WAITING = 2000


def serve_labels(config: LabelConfig, console: Console, project: str | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        project: whose assessors alone are let in.
    """
    settings = config.label
    guidelines = _guidelines(settings.guidelines)
    refuse_temporary_file("label.database", settings.database)
    database = Database(settings.url)
    if project is not None:
        Store(database).project(project)
    # This process holds the file, whichever replica writes it: a replica that dies is replaced.
    held = database.hold()
    try:
        port = choose_port(settings.host, settings.port)
        with ray_session("label", num_cpus=usable_cores()):
            serve_until_stopped(
                Labelling(_application(config, guidelines, project), database.name),
                "label",
                settings.host,
                port,
                console,
            )
    finally:
        if held is not None:
            held.release()
        database.close()


class Labelling:
    """The one application, as `serve_until_stopped` takes it."""

    def __init__(self, application: Any, database: str) -> None:
        self._application, self._database = application, database
        self._deployed = False

    def left_behind(self, there: Collection[str]) -> bool:
        """See `Applications`."""
        return False

    def start(self) -> None:
        """See `Applications`."""
        self._deployed = True
        run_application(self._application, "label", "/", READY_S)

    def ready(self, address: str) -> str:
        """See `Applications`."""
        return f"labelling: {address}/  database {self._database}"

    def stop(self) -> None:
        """See `Applications`."""
        from ray import serve

        if self._deployed:
            serve.delete("label")


def _guidelines(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return data_path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"label.guidelines = {path!r} cannot be read: {error}") from None


def _application(config: LabelConfig, guidelines: str | None, project: str | None) -> Any:
    from ray import serve

    def build() -> Any:
        from serving.labelling import labelling_app

        return labelling_app(config, guidelines, project)

    served: Any = serve.ingress(build)()
    # SQLite's file is on this node.
    sqlite = config.label.url.startswith("sqlite")
    here = {f"node:{node_address()}": 0.001} if sqlite else {}
    deployment = serve.deployment(
        name="labelling",
        num_replicas=config.label.replicas,
        ray_actor_options={"num_cpus": 0, "resources": here},
        max_ongoing_requests=_AT_ONCE,
        max_queued_requests=_WAITING,
        graceful_shutdown_timeout_s=20.0,
        health_check_period_s=5.0,
    )(served)
    return deployment.bind()
