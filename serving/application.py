"""One Ray Serve application, from its start to the signal that ends it."""

from __future__ import annotations

import errno
import logging
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from rich.console import Console

from cluster.session import free_port
from rlhf.errors import ResourceError, RunError

_READY_S = 180.0
_GONE_S = 20.0


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


def serve_until_stopped(
    application: Any, name: str, host: str, port: int, console: Console, ready: Callable[[str], str]
) -> None:
    """Run a Serve application on this cluster until SIGTERM or SIGINT; what it has accepted by then
    it finishes.

    Args:
        ready: what is said once it answers, from its address.

    Raises:
        RunError: it did not come up, or does not answer any more.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config=quiet,
        )
        failed: list[str] = []
        threading.Thread(
            target=_start, args=(application, name, quiet, failed), daemon=True
        ).start()
        address = f"http://{'127.0.0.1' if host in ('', '0.0.0.0') else host}:{port}"
        deadline = time.monotonic() + _READY_S
        while not stop.is_set() and not _answers(address):
            if failed:
                raise RunError(f"{name} did not start: {failed[0]}")
            if time.monotonic() > deadline:
                raise RunError(f"{name} did not answer at {address} within {_READY_S:g} s")
            stop.wait(0.2)
        if not stop.is_set():
            console.print(ready(address))
        stop.wait()
        console.print(f"{name}: stopping")
        serve.delete(name)
        serve.shutdown()  # type: ignore[no-untyped-call]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(application: Any, name: str, quiet: dict[str, Any], failed: list[str]) -> None:
    from ray import serve

    try:
        serve.run(application, name=name, route_prefix="/", logging_config=quiet)
    except Exception as error:
        failed.append(str(error).strip().splitlines()[-1][:300])


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
