"""One Ray Serve application, from its start to the signal that ends it."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Collection
from typing import Any, Protocol

from rich.console import Console

from cluster.files import in_ray_job
from cluster.session import cluster_address, free_port
from rlhf.errors import ConfigError, ResourceError, RunError

READY_S = 180.0
_GONE_S = 20.0
_SETTLE_S = 3.0
_QUIET = {"log_level": "ERROR", "enable_access_log": False}


def choose_port(host: str, port: int, patience_s: float = _GONE_S) -> int:
    """The port to listen on; 0 becomes one that the system hands out. A server that was killed
    leaves its port taken for some seconds: it is waited for. On a cluster that is joined, Serve may
    listen on it already: `serve_until_stopped` looks.

    Raises:
        ResourceError: it is taken, or there is no such address here.
    """
    if port == 0:
        return free_port()
    if cluster_address() is None:
        _require_port(host, port, patience_s)
    return port


def _require_port(host: str, port: int, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise ResourceError(
                    f"port {port} of {host} cannot be listened on ({error.strerror}); choose "
                    "another, or 0 for one that is free"
                ) from None
        time.sleep(0.2)


def refuse_temporary_file(setting: str, database: str) -> None:
    """Of a submitted Ray job only absolute files outlive it.

    Raises:
        ConfigError: `database`, an SQLAlchemy URL, is of a relative one.
    """
    if database.startswith("sqlite") and in_ray_job() and not database.startswith("sqlite:////"):
        raise ConfigError(
            f"{setting} = {database!r} inside a Ray job would lie in Ray's temporary copy of the "
            "code; give an absolute path (sqlite:////…) or a PostgreSQL URL"
        )


class Applications(Protocol):
    """What is served: one Serve application or several."""

    def left_behind(self, there: Collection[str]) -> bool:
        """Whether the application of its name that is on this cluster already was left by a server
        that was killed, so that it may be replaced.

        Args:
            there: names of all applications on it.
        """

    def start(self) -> None:
        """Deploy them; returns when they run."""

    def ready(self, address: str) -> str:
        """What is said once they answer."""

    def stop(self) -> None:
        """End those that were deployed; what they have accepted they finish. May be called again,
        and while `start` runs in another thread: nothing may be deployed from then on."""


def run_application(application: Any, name: str, prefix: str | None, patience_s: float) -> None:
    """Deploy a Serve application and wait until it runs.

    Args:
        prefix: its path over HTTP; None: it has none.

    Raises:
        RunError: it did not come up in time; nothing is left of it.
    """
    from ray import serve

    failed: list[str] = []

    def run() -> None:
        try:
            serve.run(application, name=name, route_prefix=prefix, logging_config=_QUIET)
        except Exception as error:
            said = str(error).strip() or type(error).__name__
            failed.append(said.splitlines()[-1][:300])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(patience_s)
    if thread.is_alive():
        failed.append(f"it does not run after {patience_s:g} s; is there room for it?")
    if failed:
        reason = _cause(name) or failed[0]
        serve.delete(name)
        raise RunError(f"{name} did not start: {reason}")


def _cause(name: str) -> str:
    """What the first deployment that failed said at the end of its traceback."""
    from ray import serve

    application = serve.status().applications.get(name)
    for deployment in application.deployments.values() if application else ():
        if deployment.status == "DEPLOY_FAILED":
            return last_said(deployment.message)
    return ""


def last_said(trace: str) -> str:
    """The error at the end of a traceback, in one line."""
    lines = trace.strip().splitlines()
    first = max((at + 1 for at, line in enumerate(lines) if line.startswith("  ")), default=0)
    return " ".join(line.strip() for line in lines[first:])[:300]


def serve_until_stopped(
    applications: Applications, name: str, host: str, port: int, console: Console
) -> None:
    """Serve on this cluster until SIGTERM or SIGINT; what was accepted by then is finished. However
    it ends, of its applications nothing is left, and other applications on the cluster go on.

    Raises:
        ResourceError: Serve is there already, and listens elsewhere or has another application.
        RunError: it did not come up.
    """
    # Its import sets the level, which is why it comes first.
    import ray.serve  # noqa: F401

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        own = _start_serve(applications, name, host, port)
        beginning = _Beginning(applications)
        address = f"http://{'127.0.0.1' if host in ('', '0.0.0.0') else host}:{port}"
        try:
            _until_stopped(applications, beginning, name, address, stop, console)
        except Exception:
            # What failed first is what is told.
            with contextlib.suppress(Exception):
                _end(applications, beginning, own)
            raise
        _end(applications, beginning, own)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Beginning(threading.Thread):
    """Applications as they start; `failed` is why they did not."""

    def __init__(self, applications: Applications) -> None:
        super().__init__(daemon=True)
        self._applications = applications
        self.failed: Exception | None = None

    def run(self) -> None:
        try:
            self._applications.start()
        except Exception as error:
            self.failed = error


def _start_serve(applications: Applications, name: str, host: str, port: int) -> bool:
    """Start Serve where this cluster has none. Returns whether it had none.

    Raises:
        ResourceError: see `serve_until_stopped`.
    """
    from ray import serve

    # Serve's public interface does not say where it listens.
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        if cluster_address() is not None:
            _require_port(host, port, _GONE_S)
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config=_QUIET,
        )
        return True
    listens = client.http_config
    if (listens.host, listens.port) != (host, port):
        raise ResourceError(
            f"Ray Serve runs on this cluster already and listens on {listens.host}:{listens.port}, "
            f"so that {name} cannot listen on {host}:{port}: set host and port to these, or end it "
            "with `serve shutdown`"
        )
    there = client.get_serve_details()["applications"]
    for other, details in there.items():
        taken = details["status"] != "DELETING" and (
            other == name or details["route_prefix"] == "/"
        )
        if taken and not (other == name and applications.left_behind(there)):
            raise ResourceError(
                f"Ray Serve has the application {other!r} on this cluster already, in the place of "
                f"{name}: end its server first, or with `serve shutdown` what a killed one left"
            )
    return False


def _until_stopped(
    applications: Applications,
    beginning: _Beginning,
    name: str,
    address: str,
    stop: threading.Event,
    console: Console,
) -> None:
    beginning.start()
    # Each application has its own time to start; this is what the address has after them.
    deadline = math.inf
    while not stop.is_set() and (beginning.is_alive() or not _answers(address)):
        if beginning.failed:
            raise beginning.failed
        if not beginning.is_alive():
            deadline = min(deadline, time.monotonic() + READY_S)
        if time.monotonic() > deadline:
            raise RunError(f"{name} did not answer at {address} within {READY_S:g} s")
        stop.wait(0.2)
    if beginning.failed and not stop.is_set():
        raise beginning.failed
    if not stop.is_set():
        console.print(applications.ready(address))
    stop.wait()
    console.print(f"{name}: stopping")


def _end(applications: Applications, beginning: _Beginning, own: bool) -> None:
    """End the applications, and Serve where this process started it and nobody else uses it."""
    from ray import serve

    applications.stop()
    if beginning.is_alive():
        # It may have deployed one more meanwhile.
        beginning.join(_SETTLE_S)
        applications.stop()
    others = [each for each in serve.status().applications.values() if each.status != "DELETING"]
    if own and not others:
        serve.shutdown()  # type: ignore[no-untyped-call]


def _answers(address: str) -> bool:
    """Of this machine, so never by way of a proxy (`http_proxy`)."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
