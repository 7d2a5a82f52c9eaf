"""What choosing among four candidates costs, and what a crowd waits for, beside vLLM's own server.

    python -m benchmarks.serving [--policy embedded] [--reward runs/demo/reward]

Both servers run the same weights on this machine and are asked in turns, so that ratios stand on a
noisy one. A conversation has about 100 tokens; only answers that were written to their full 64
tokens count, so a policy is needed that goes on. Pavlov's are scored by the ensemble, vLLM's by
nobody.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from cluster.session import free_port
from models.chat import ChatTokenizer
from models.sources import resolve_model
from rlhf.records import Message
from tests.servers import running

TOKENS = 64
PROMPT_TOKENS = 100
ROUNDS = 10
CLIENTS, CROWD_S = 32, 60
LARGEST = 4


@contextlib.contextmanager
def vllm_server(model: Path) -> Iterator[str]:
    """vLLM's own, as it comes, with the length, sequences and cache of Pavlov's engine."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    # Its command line asks for the package's name, which is another one on CPU.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--port", str(port), "--dtype", "bfloat16", "--enforce-eager"]
    command += ["--max-model-len", "1280", "--max-num-seqs", "64", "--served-model-name", "pavlov"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 300
            while not _healthy(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise RuntimeError(said.read().decode()[-2000:])
                time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def conversation(tokenizer: ChatTokenizer, number: int) -> str:
    """A question of `PROMPT_TOKENS` tokens with its template, of which no two begin alike."""
    text = f"Story {number}: write a very long story about a river and the towns along it."
    while len(tokenizer.prompt_ids([Message("user", text)])) < PROMPT_TOKENS:
        text += " Go on and on."
    return text


def asked(address: str, text: str, **more: Any) -> tuple[float, dict[str, Any]]:
    """Seconds, and the answer."""
    body = {"model": "pavlov", "messages": [{"role": "user", "content": text}], **more}
    body |= {"max_tokens": TOKENS, "temperature": 1.0}
    began = time.perf_counter()
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300)
    answer.raise_for_status()
    return time.perf_counter() - began, answer.json()


def latencies(servers: dict[str, tuple[str, dict[str, Any]]], tokenizer: ChatTokenizer) -> None:
    """Print the medians at one client, and how they compare with one candidate."""
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for number in range(3 * ROUNDS):
        for place, (name, (address, more)) in enumerate(servers.items()):
            text = conversation(tokenizer, len(servers) * number + place)
            took, answer = asked(address, text, **more)
            candidates = max(more.get("best_of", 1), more.get("n", 1))
            if answer["usage"]["completion_tokens"] == candidates * TOKENS and number:
                seconds[name].append(took)
        if min(map(len, seconds.values())) >= ROUNDS:
            break
    table = Table("one client", "median, s", "of one candidate", "answers")
    for name, found in seconds.items():
        single = statistics.median(seconds[f"{name.split(':')[0]}: 1"])
        middle = statistics.median(found)
        table.add_row(name, f"{middle:.2f}", f"{middle / single:.2f}", str(len(found)))
    Console(width=100).print(table)


def crowd(servers: dict[str, tuple[str, dict[str, Any]]], tokenizer: ChatTokenizer) -> None:
    """Print what `CLIENTS` at once wait for."""
    table = Table(f"{CLIENTS} clients, {CROWD_S} s", "p50, s", "p95, s", "tokens/s", "failed")
    for name, (address, more) in servers.items():
        began = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as pool:
            ask = partial(_keep_asking, address, more, tokenizer, began + CROWD_S)
            found = list(pool.map(ask, range(CLIENTS)))
        took = time.monotonic() - began
        waits = sorted(seconds for answers, _ in found for seconds, _ in answers)
        tokens = sum(written for answers, _ in found for _, written in answers)
        table.add_row(
            name,
            f"{statistics.median(waits):.1f}",
            f"{waits[int(0.95 * len(waits))]:.1f}",
            f"{tokens / took:.0f}",
            str(sum(failed for _, failed in found)),
        )
    Console(width=100).print(table)


def _keep_asking(
    address: str, more: dict[str, Any], tokenizer: ChatTokenizer, over: float, client: int
) -> tuple[list[tuple[float, int]], int]:
    """Seconds and tokens of each answer to one client, and how many there were not."""
    answers, failed = [], 0
    number = 10_000 * (client + 1)
    while time.monotonic() < over:
        number += 1
        try:
            took, answer = asked(address, conversation(tokenizer, number), **more)
            answers.append((took, answer["usage"]["completion_tokens"]))
        except httpx.HTTPError:
            failed += 1
    return answers, failed


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="embedded")
    parser.add_argument("--reward", default="runs/demo/reward")
    arguments = parser.parse_args()
    model = resolve_model(arguments.policy)
    reward = Path(arguments.reward).resolve()
    tokenizer = ChatTokenizer(model)
    command = ("serve", "configs/serve.toml", "serve.port=0", f"policy.model={model}")
    more = (f"reward={reward}", "serve.requests_per_minute=1000000")
    with (
        tempfile.TemporaryDirectory() as runs,
        running(*command, *more, runs=Path(runs)) as server,
        vllm_server(model) as other,
    ):
        own = server.address
        latencies(
            {
                "pavlov: 1": (own, {}),
                "pavlov: 1, scored": (own, {"score": True}),
                f"pavlov: best of {LARGEST}": (own, {"best_of": LARGEST}),
                "vllm: 1": (other, {}),
                f"vllm: n = {LARGEST}": (other, {"n": LARGEST}),
            },
            tokenizer,
        )
        crowd({"pavlov": (own, {}), "vllm": (other, {})}, tokenizer)


if __name__ == "__main__":
    main()
