import http.server
import os
import signal
import socket
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

import pytest
from rich.console import Console

from cluster.session import free_port, ray_session
from rlhf.errors import ResourceError, RunError
from serving.application import (
    _answers,
    choose_port,
    last_said,
    run_application,
    serve_until_stopped,
)


def test_a_port_that_is_taken_is_waited_for_and_then_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match="choose another, or 0"):
            choose_port("127.0.0.1", port, patience_s=0.3)
        threading.Timer(0.5, taken.close).start()
        assert choose_port("127.0.0.1", port, patience_s=10) == port


def test_no_such_address_is_refused_at_once():
    began = time.monotonic()
    with pytest.raises(ResourceError, match="cannot be listened on"):
        choose_port("192.0.2.77", 8000)
    assert time.monotonic() - began < 5


def test_nought_is_a_port_that_the_system_hands_out():
    assert choose_port("127.0.0.1", 0) > 0


def test_of_a_traceback_its_error_is_said():
    trace = """The deployment failed to start 2 times in a row. Error:
ray::ServeReplica:a:A.initialize() (pid=1)
  File "replica.py", line 3521, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "a.py", line 6, in __init__
ValueError: the model
has no weights
"""
    assert last_said(trace) == "ValueError: the model has no weights"
    assert last_said("no room") == "no room"
    assert last_said("") == ""


def test_whether_a_server_of_this_machine_answers_no_proxy_is_asked(monkeypatch):
    class Fine(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Fine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert _answers(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert not _answers(f"http://127.0.0.1:{server.server_port}")


def application(said: str) -> Any:
    from ray import serve

    # Here, so that it travels by value.
    class Says:
        async def __call__(self) -> str:
            return said

    return serve.deployment(ray_actor_options={"num_cpus": 0})(Says).bind()


class One:
    """One application as `serve_until_stopped` takes it; it ends once it is ready."""

    def __init__(self, name: str, broken: bool = False, left: bool = False) -> None:
        self.name, self.broken, self.left = name, broken, left
        self.started = self.stopped = self.was_ready = False

    def left_behind(self, there: Collection[str]) -> bool:
        return self.left

    def start(self) -> None:
        self.started = True
        run_application(application(self.name), self.name, "/", 60)
        if self.broken:
            raise RunError("the second one did not start")

    def ready(self, address: str) -> str:
        self.was_ready = True
        os.kill(os.getpid(), signal.SIGTERM)
        return "ready"

    def stop(self) -> None:
        from ray import serve

        self.stopped = True
        serve.delete(self.name)


def names() -> set[str]:
    from ray import serve

    return set(serve.status().applications)


@pytest.fixture(scope="module")
def joined() -> Iterator[pytest.MonkeyPatch]:
    """A cluster that this process joins."""
    with ray_session("application", num_cpus=2), pytest.MonkeyPatch.context() as patched:
        import ray

        patched.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield patched


def served(one: One, port: int) -> None:
    serve_until_stopped(one, one.name, "127.0.0.1", port, Console(quiet=True))


def test_on_a_cluster_where_serve_runs_a_server_leaves_other_applications_alone(joined):
    from ray import serve

    port = free_port()
    quiet = {"log_level": "ERROR"}
    serve.start("HeadOnly", {"host": "127.0.0.1", "port": port}, logging_config=quiet)
    run_application(application("other"), "other", "/other", 60)
    try:
        # It would be heard elsewhere than its settings say.
        elsewhere = One("mine")
        told = rf"listens on 127\.0\.0\.1:{port}, so that mine cannot listen on 127\.0\.0\.1:"
        with pytest.raises(ResourceError, match=told):
            served(elsewhere, free_port())
        assert not elsewhere.started
        # The port is Serve's own, and no other program's.
        assert choose_port("127.0.0.1", port, patience_s=0) == port
        one = One("mine")
        served(one, port)
        assert one.was_ready and one.stopped and names() == {"other"}

        broken = One("mine", broken=True)
        with pytest.raises(RunError, match="the second one did not start"):
            served(broken, port)
        assert broken.stopped and names() == {"other"}

        run_application(application("label"), "label", "/", 60)
        for name in ("mine", "label"):
            second = One(name)
            with pytest.raises(ResourceError, match=r"has the application 'label' on this clus"):
                served(second, port)
            assert not second.started and names() == {"other", "label"}
        # What a killed server of that name left is replaced.
        served(One("label", left=True), port)
        assert names() == {"other"}
    finally:
        serve.shutdown()


def test_who_started_serve_ends_it_unless_others_have_come_to_use_it(joined):
    from ray import serve
    from ray.serve.context import _get_global_client

    class Joined(One):
        def ready(self, address: str) -> str:
            run_application(application("other"), "other", "/other", 60)
            return super().ready(address)

    port = free_port()
    served(Joined("mine"), port)
    assert names() == {"other"}
    serve.shutdown()
    served(One("mine"), port)
    assert _get_global_client(raise_if_no_controller_running=False) is None
