"""One Ray Serve application, from its start to the signal that ends it."""

from __future__ import annotations

import errno
import logging
import math
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from typing import Any, Protocol

from rich.console import Console

from cluster.files import in_ray_job
from cluster.session import free_port
from rlhf.errors import ConfigError, ResourceError, RunError

READY_S = 180.0
_GONE_S = 20.0
_QUIET = {"log_level": "ERROR", "enable_access_log": False}


def choose_port(host: str, port: int, patience_s: float = _GONE_S) -> int:
    """The port to listen on; 0 becomes one that the system hands out. A server that was killed
    leaves its port taken for some seconds: it is waited for.

    Raises:
        ResourceError: it is taken, or there is no such address here.
    """
    if port == 0:
        return free_port()
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
            return port
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

    def start(self) -> None:
        """Deploy them; returns when they run."""

    def ready(self, address: str) -> str:
        """What is said once they answer."""

    def stop(self) -> None:
        """End them; what they have accepted they finish."""


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
    """Serve on this cluster until SIGTERM or SIGINT; what was accepted by then is finished.

    Raises:
        RunError: it did not come up, or does not answer any more.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config=_QUIET,
        )
        failed: list[Exception] = []

        def begin() -> None:
            try:
                applications.start()
            except Exception as error:
                failed.append(error)

        beginning = threading.Thread(target=begin, daemon=True)
        beginning.start()
        address = f"http://{'127.0.0.1' if host in ('', '0.0.0.0') else host}:{port}"
        # Each application has its own time to start; this is what the address has after them.
        deadline = math.inf
        while not stop.is_set() and (beginning.is_alive() or not _answers(address)):
            if failed:
                raise failed[0]
            if not beginning.is_alive():
                deadline = min(deadline, time.monotonic() + READY_S)
            if time.monotonic() > deadline:
                raise RunError(f"{name} did not answer at {address} within {READY_S:g} s")
            stop.wait(0.2)
        if not stop.is_set():
            console.print(applications.ready(address))
        stop.wait()
        console.print(f"{name}: stopping")
        applications.stop()
        serve.shutdown()  # type: ignore[no-untyped-call]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
