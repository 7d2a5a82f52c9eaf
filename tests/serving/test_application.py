import socket
import threading
import time

import pytest

from rlhf.errors import ResourceError
from serving.application import choose_port, last_said


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
