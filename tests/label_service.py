"""`pavlov label serve` as a user starts it, and a person at a keyboard in front of it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from labelling.records import Answer, Honeypot, Work
from rlhf.records import Message
from tests.conftest import ROOT

CONFIG = "configs/label.toml"
HOSTILE = (
    '<script>document.title = "run"</script>\n\n<img src=x onerror="document.title = \'run\'">\n\n'
    "[a link](javascript:document.title='run') and ![a picture](https://elsewhere.example/x.png)"
    "\n\n" + "long " * 4000 + "\n\n\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627"
)


class Service:
    """A running service; `address` is where it answers."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process, self.address = process, address

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """End it; returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=seconds)


def start(database: str, *overrides: str, runs: Path, seconds: float = 120) -> Service:
    """Start the service on a port that the system hands out, and wait until it answers."""
    command = ["label", "serve", CONFIG, f"label.database={database}", "label.port=0", *overrides]
    process = subprocess.Popen(
        [sys.executable, "pavlov.py", *command],
        cwd=ROOT,
        env={**os.environ, "PAVLOV_RUNS": str(runs), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    deadline = time.monotonic() + seconds
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"labelling: (http://\S+)/", line):
            return Service(process, found.group(1))
        if time.monotonic() > deadline:
            break
    process.kill()
    raise AssertionError(f"the service did not start: {''.join(said)[-2000:]}")


@contextlib.contextmanager
def service(database: str, *overrides: str, runs: Path) -> Iterator[Service]:
    """A service that ends with the block."""
    running = start(database, *overrides, runs=runs)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


def works(count: int, honeypots: Sequence[int] = (), hostile: bool = True) -> list[Work]:
    """Pairs to judge, the first of them with an answer that means harm."""
    return [
        Work(
            (Message("user", f"How do I keep pasta from sticking together? ({number})"),),
            Answer(
                HOSTILE
                if hostile and number == 0
                else f"Use **plenty of water**, stir in the first minute, and:\n\n- do not rinse\n"
                f"- serve at once ({number})",
                "tuned",
            ),
            Answer(f"Pasta is a popular dish in many countries. ({number})", "base"),
            priority=float(number == 0),
            honeypot=Honeypot("a", "It says what to do.") if number in honeypots else None,
        )
        for number in range(count)
    ]


def sign_in(page: Any, address: str, token: str) -> None:
    """By keyboard: the field has the focus."""
    page.goto(address)
    page.locator("input[name=token]:focus").wait_for()
    page.keyboard.type(token)
    page.keyboard.press("Enter")
    page.wait_for_url("**/task")


def judge(page: Any, keys: str) -> None:
    """Judge the task on the page by pressing keys, and send it."""
    for key in keys:
        page.keyboard.press(key)
    with page.expect_navigation():
        page.keyboard.press("Enter")
