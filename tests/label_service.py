"""`pavlov label serve` as a user starts it, and a person at a keyboard in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from labelling.records import Answer, Honeypot, Work
from rlhf.records import Message
from tests import servers
from tests.servers import Server

CONFIG = "configs/label.toml"
HOSTILE = (
    '<script>document.title = "run"</script>\n\n<img src=x onerror="document.title = \'run\'">\n\n'
    "[a link](javascript:document.title='run') and ![a picture](https://elsewhere.example/x.png)"
    "\n\n" + "long " * 4000 + "\n\n\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627"
)


def start(database: str, *overrides: str, runs: Path) -> Server:
    """Start the service on a port that the system hands out, and wait until it answers."""
    return servers.start(*_command(database, *overrides), runs=runs)


def service(database: str, *overrides: str, runs: Path) -> AbstractContextManager[Server]:
    """A service that ends with the block."""
    return servers.running(*_command(database, *overrides), runs=runs)


def _command(database: str, *overrides: str) -> list[str]:
    return ["label", "serve", CONFIG, f"label.database={database}", "label.port=0", *overrides]


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
