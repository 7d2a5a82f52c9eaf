"""The assistant over HTTP: does best-of-N pay, and does the server stand what may happen to it?"""

from __future__ import annotations

import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml

from cluster.session import free_port
from labelling.simulated import rule
from models.sources import weights_fingerprint
from rlhf.config import DemoConfig, load_config
from rlhf.statistics import paired_interval
from tests.conftest import build_tiny_model, build_tiny_reward_model
from tests.proofs.chat_load import (
    Asked,
    ask_server,
    at_once,
    engine_seconds,
    memory_gib,
    metric,
    replicas,
    under_load,
)
from tests.proofs.chat_pictures import page
from tests.proofs.ray_cluster import cluster
from tests.proofs.runner import ROOT, hold, pavlov, prove, until
from tests.servers import Server, running
from trainers.demo import demo_prompts

CONFIG = "configs/serve.toml"
_HELD_OUT = 100
_CLIENTS, _SECONDS = 32, 120
_DROPPED = 1000


def best_of_eight(folder: Path) -> dict[str, Any]:
    """With the demo's reward model, `best_of = 8` against 1 on 100 held-out prompts, by the demo's
    rule, which did not choose. Of the policy before it was tuned the paired interval lies above 0;
    of the tuned one, which has most of what the rule gives, it is reported and lies not below."""
    figures: dict[str, Any] = {"prompts": _HELD_OUT}
    gains = {}
    for name, policy in (("untuned", ("policy.model=embedded",)), ("tuned", ())):
        with _demo(folder, *policy) as server:
            one, eight = _answered(server, 1), _answered(server, 8)
        mean, low, high = gains[name] = paired_interval(_less(eight.rules, one.rules))
        figures |= {
            f"{name}: rule, best of 1": statistics.fmean(one.rules),
            f"{name}: rule, best of 8": statistics.fmean(eight.rules),
            f"{name}: difference": f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]",
            f"{name}: mean reward of one, of the chosen": f"{statistics.fmean(one.rewards):.2f}, "
            f"{statistics.fmean(eight.rewards):.2f}",
            f"{name}: chosen out of domain": eight.shifted / len(eight.rules),
        }
    bars = {
        "untuned: best of 8 is surely better by the rule": gains["untuned"][1] > 0,
        "tuned: best of 8 is not surely worse by the rule": gains["tuned"][2] >= 0,
    }
    return hold(bars, figures)


def given_up(folder: Path) -> dict[str, Any]:
    """The same with candidates that are far behind given up after 10 tokens (`serve.reject_after`)
    and with all written, on the same prompts and seeds: tokens, time, and what it does to the
    answers by the rule and by the ensemble. Reported, not judged: by default it is off."""
    with _demo(folder) as server:
        whole = _answered(server, 8)
    with _demo(folder, "serve.reject_after=10") as server:
        early = _answered(server, 8)
    figures: dict[str, Any] = {
        "given up, of eight": early.rejected / len(early.rules),
        "tokens, of those of all written": early.tokens / whole.tokens,
        "seconds, of those of all written": early.seconds / whole.seconds,
    }
    for name in ("rules", "rewards"):
        mean, low, high = paired_interval(_less(getattr(early, name), getattr(whole, name)))
        figures[f"difference by {name}"] = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    return hold({"some are given up": early.rejected > 0}, figures)


@dataclass(slots=True)
class Answered:
    """What came of the held-out prompts."""

    rules: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    shifted: int = 0
    rejected: int = 0
    tokens: int = 0
    seconds: float = 0.0


def _answered(server: Server, best_of: int) -> Answered:
    """The demo's held-out prompts, answered as the demo samples and scored by its rule."""
    config = load_config(DemoConfig, ROOT / "configs" / "demo.toml", [])
    client, found = _client(server), Answered()
    for number, prompt in enumerate(demo_prompts("heldout", _HELD_OUT)):
        turns: list[Any] = [
            {"role": turn.role, "content": turn.content} for turn in prompt.messages
        ]
        began = time.monotonic()
        answer = client.chat.completions.create(
            model="pavlov",
            messages=turns,
            max_tokens=config.rl.max_tokens,
            temperature=config.rl.temperature,
            seed=1000 * number,
            extra_body={"best_of": best_of, "score": True, "candidates": True},
        )
        found.seconds += time.monotonic() - began
        [choice], own = answer.choices, _own(answer)
        finished = choice.finish_reason == "stop"
        text = choice.message.content or ""
        found.rules.append(rule(turns[-1]["content"], text, finished=finished))
        found.rewards.append(own["reward"])
        found.shifted += own["domain_shift"]
        found.rejected += sum(each["finish_reason"] == "rejected" for each in own["candidates"])
        assert answer.usage is not None
        found.tokens += answer.usage.completion_tokens
    return found


def _less(many: list[float], few: list[float]) -> list[float]:
    return [more - less for more, less in zip(many, few, strict=True)]


@contextmanager
def _demo(folder: Path, *overrides: str) -> Iterator[Server]:
    """A server of the demo's policy and reward model; the demo is run once."""
    demo = folder.parent / "demo"
    if not (demo / "summary.json").is_file():
        pavlov("demo", "--out", str(demo), runs=folder.parent)
    command = ("serve", CONFIG, "serve.port=0", f"policy.model={demo / 'rl' / 'policy'}")
    with running(*command, f"reward={demo / 'reward'}", *overrides, runs=folder) as server:
        yield server


def crowd(folder: Path) -> dict[str, Any]:
    """32 clients for two minutes, every second one streaming (a random tiny model): no answer is
    lost, mixed or cut, and memory is bounded; then 100 at once: the surplus is told to come back by
    429, and the server recovers. Latencies are reported, not judged."""
    done: list[Asked] = []
    with _tiny(folder, "serve.at_once=32", "serve.waiting=32") as server:
        expected = {n: ask_server(server.address, n) for n in range(_CLIENTS)}
        over = time.monotonic() + _SECONDS
        early: list[float] = []

        def one(client: int) -> None:
            while time.monotonic() < over:
                done.append(ask_server(server.address, client))

        def watch() -> None:
            time.sleep(_SECONDS / 4)
            early.append(memory_gib(server))

        at_once([*(lambda n=n: one(n) for n in range(_CLIENTS)), watch])
        late = memory_gib(server)

        burst: list[Asked] = []
        at_once(
            [lambda n=n: burst.append(ask_server(server.address, n % _CLIENTS)) for n in range(100)]
        )
        refused = [each for each in burst if each.status == 429]
        after = ask_server(server.address, 0)
    answered = [each for each in done if each.status == 200]
    texts = {each.text: n for n, each in expected.items()}
    same = [each for each in answered if each.text == expected[each.client].text]
    mixed = [
        each for each in answered if texts.get(each.text, each.client) != each.client and each.text
    ]
    seconds = sorted(each.seconds for each in answered)
    figures = {
        "requests": len(done),
        "answered": len(answered),
        "word for word as when asked alone": len(same) / max(1, len(answered)),
        "answers of another's request": len(mixed),
        "seconds, median": statistics.median(seconds),
        "seconds, 95th percentile": seconds[int(0.95 * len(seconds))],
        "memory after a quarter, GiB": early[0],
        "memory at the end, GiB": late,
        "of 100 at once, refused with 429": len(refused),
    }
    bars = {
        "no request was lost": len(answered) == len(done) > 0,
        "none was cut": all(each.whole for each in answered),
        "each read its own question": all(
            each.read == expected[each.client].read for each in answered
        ),
        "none has another's answer": not mixed and len(texts) == _CLIENTS,
        "nearly all say what they say alone": len(same) >= 0.9 * len(answered),
        "memory is bounded": late <= 1.1 * early[0],
        "the surplus is told when to come back": bool(refused)
        and all(each.retry_after for each in refused),
        "the others of the burst are answered": all(each.status in (200, 429) for each in burst),
        "the server has recovered": after.status == 200,
    }
    return hold(bars, figures)


def dropped(folder: Path) -> dict[str, Any]:
    """1,000 clients ask for long answers and go away, half of them in the middle of an
    answer: two seconds later nothing is written for them any more."""
    with _tiny(folder, "serve.at_once=32", "serve.waiting=1000") as server:
        alone = ask_server(server.address, 3)
        host, port = re.findall(r"//([\w.]+):(\d+)", server.address)[0]
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": "What is a cat?"}],
                "max_tokens": 500,
                "temperature": 2.0,
                "n": 4,
                "stream": True,
            }
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        left = Counter[str]()

        def leave(number: int) -> None:
            for place in range(number, _DROPPED, 20):
                with socket.create_connection((host, int(port)), timeout=60) as connection:
                    connection.sendall(head + body)
                    if place % 2:
                        # In the middle of the answer; the others before it has begun.
                        read = b""
                        while not re.search(rb'"delta": {"content": "[^"]', read):
                            read += (some := connection.recv(4096))
                            assert some, read[:300]
                        left["in the middle"] += 1
                    else:
                        left["before any"] += 1

        at_once([lambda n=n: leave(n) for n in range(20)])
        began = time.monotonic()
        while metric(server, "pavlov_chat_requests_inside") and time.monotonic() - began < 60:
            time.sleep(0.2)
        settled = time.monotonic() - began
        inside = metric(server, "pavlov_chat_requests_inside")
        # An engine hears of it when its step ends.
        time.sleep(2)
        tokens = metric(server, "pavlov_chat_tokens_total")
        busy = engine_seconds(server)
        time.sleep(5)
        written = metric(server, "pavlov_chat_tokens_total") - tokens
        busy = engine_seconds(server) - busy
        after = ask_server(server.address, 3)
    figures = {
        **left,
        "seconds until nothing was inside": settled,
        "tokens written in 5 s after that": written,
        "CPU seconds of the engine in 5 s after that": busy,
    }
    bars = {
        "all have left": left.total() == _DROPPED,
        "none is inside": inside == 0,
        "nothing is written": written == 0,
        "the engine rests": busy < 0.5,
        "the next one is answered as before": after.text == alone.text,
    }
    return hold(bars, figures)


def killed(folder: Path) -> dict[str, Any]:
    """Under load by 8 clients one of two replicas of the engine and of the ingress, and one of the
    ensemble's two backbones, are killed with SIGKILL, one after the other: what fails had begun
    before the kill and says so cleanly (a stream may break off, without its end), the ensemble goes
    on with the members it has and says how many are missing, and the service returns by itself."""
    figures: dict[str, Any] = {}
    bars: dict[str, bool] = {}
    two = [f"serve.{part}.{end}=2" for part in ("ingress", "engine") for end in ("least", "most")]
    with _tiny(folder, "engine.kv_cache_gib=0.25", *two, backbones=2) as server:
        for part in ("engine", "ensemble", "chat"):
            done, at, back = _kill(server, part)
            failed = [each for each in done if each.status != 200]
            late = [each for each in failed if each.began > at + 1]
            figures[part] = {
                "requests": len(done),
                "failed": len(failed),
                "how": dict(Counter(f"{each.status} {each.error}" for each in failed)),
                "of them begun later than a second after": len(late),
                "judged without all members": sum(bool(each.missing) for each in done),
                "seconds until another stands in its place": round(back, 1),
            }
            bars[f"{part}: no more fail than were there"] = len(failed) <= 8
            bars[f"{part}: none fails that came later"] = not late
            bars[f"{part}: errors are clean"] = all(
                each.status in (500, 502, 503) or each.broke_off for each in failed
            )
            bars[f"{part}: it answers"] = ask_server(server.address, 1).status == 200
            bars[f"{part}: members are missing only where theirs was killed"] = any(
                each.missing for each in done
            ) == (part == "ensemble")
    return hold(bars, figures)


def _kill(server: Server, part: str) -> tuple[list[Asked], float, float]:
    """Kill a replica under load: what was asked, when it was killed, seconds until one stands in
    its place."""
    with under_load(server) as done:
        time.sleep(8)
        [victim, *others] = replicas(server, part)
        at = time.monotonic()
        victim.kill()
        victim.wait(30)
        until(lambda: len(replicas(server, part)) > len(others), part, 120)
        back = time.monotonic() - at
        if part == "ensemble":
            until(lambda: not ask_server(server.address, 1, best_of=2).missing, "all members", 60)
        time.sleep(8)
    return done, at, back


def promoted(folder: Path) -> dict[str, Any]:
    """Under load by 8 clients another version is promoted, and the one before it rolled back to: no
    request fails, and every answer is of a version that was served at its time."""
    with _tiny(folder) as server:
        run = build_tiny_model(folder / "run" / "policy", seed=7).parent
        old = weights_fingerprint(folder / "model")
        new = weights_fingerprint(run / "policy")
        with under_load(server) as done:
            time.sleep(5)
            up = _promote(folder, str(run), "--without-evidence", "a proof of the server")
            time.sleep(5)
            back = _promote(folder, "--rollback")
            time.sleep(5)
    failed = [each for each in done if each.status != 200]
    served = {
        "before": {each.version for each in done if each.began + each.seconds < up[0]},
        "between": {
            each.version
            for each in done
            if each.began > up[1] and each.began + each.seconds < back[0]
        },
        "after": {each.version for each in done if each.began > back[1]},
    }
    figures = {
        "requests": len(done),
        "failed": len(failed),
        "of the promoted version": sum(each.version == new for each in done),
        "seconds to promote": up[1] - up[0],
        "seconds to roll back": back[1] - back[0],
    }
    bars = {
        "none has failed": not failed,
        "all are of the one or the other": {each.version for each in done} == {old, new},
        "each is of what was served": [*served.values()] == [{old}, {new}, {old}],
    }
    return hold(bars, figures)


def _promote(runs: Path, *arguments: str) -> tuple[float, float]:
    """When it was begun, and when the server had followed."""
    began = time.monotonic()
    said = pavlov("promote", *arguments, runs=runs).stdout
    assert said.rstrip().endswith("is served"), said
    return began, time.monotonic()


@contextmanager
def _tiny(folder: Path, *overrides: str, backbones: int = 1) -> Iterator[Server]:
    """A server of a random tiny model, and an ensemble on so many of them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = build_tiny_model(folder / "model")
    others = [build_tiny_model(folder / f"other-{n}", seed=n) for n in range(1, backbones)]
    reward = build_tiny_reward_model(folder / "reward", model, *others)
    command = (
        *("serve", CONFIG, "serve.port=0", f"policy.model={model}", f"reward={reward}"),
        *(
            "serve.max_prompt_tokens=500",
            "serve.max_tokens=500",
            "serve.requests_per_minute=1000000",
            "engine.dtype=float32",
        ),
    )
    with running(*command, *overrides, runs=folder) as server:
        yield server


def _client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=300)


def _own(answer: Any) -> dict[str, Any]:
    own: dict[str, Any] = answer.model_extra["pavlov"]
    return own


_LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI

options = {"base_url": sys.argv[1], "api_key": "none", "model": "pavlov", "max_tokens": 12}
chat = ChatOpenAI(**options, temperature=0, extra_body={"best_of": 2})
whole = chat.invoke([("system", "Be brief."), ("human", "What is a cat?")])
print(json.dumps({
    "whole": whole.content,
    "tokens": whole.usage_metadata,
    "streamed": "".join(part.content for part in chat.stream("What is a cat?")),
    "alone": chat.invoke("What is a cat?").content,
    "batch": [each.content for each in chat.batch(["What is a cat?", "What is a dog?"])],
    "logprobs": len(ChatOpenAI(**options, logprobs=True).invoke("What is a cat?")
        .response_metadata["logprobs"]["content"]),
}))
"""


def second_client(folder: Path) -> dict[str, Any]:
    """LangChain's `ChatOpenAI`, unmodified and in an environment of its own (its packages are not
    Pavlov's): a whole answer, a stream that says the same, a batch, logprobs."""
    with _tiny(folder) as server:
        python = folder / "environment" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(folder / "environment")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-qq", "langchain-openai"], check=True)
        done = subprocess.run(
            [str(python), "-c", _LANGCHAIN, f"{server.address}/v1"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        listed = [str(python), "-m", "pip", "list", "--format=json"]
        packages = json.loads(subprocess.run(listed, capture_output=True, check=True).stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    versions = {each["name"]: each["version"] for each in packages}
    figures = {
        "langchain-openai": versions["langchain-openai"],
        "openai": versions["openai"],
        "tokens": said["tokens"]["total_tokens"],
    }
    bars = {
        "the stream says what the whole answer says": said["streamed"] == said["alone"] != "",
        "each of a batch has its own": said["batch"][0] == said["alone"] != said["batch"][1],
        "tokens are counted": said["tokens"]["output_tokens"] > 0,
        "every token has its logprob": 0 < said["logprobs"] <= 12,
    }
    return hold(bars, figures)


def deployed(folder: Path) -> dict[str, Any]:
    """configs/serve.yaml with a random tiny model and ensemble in it, by `serve deploy` to a Ray
    that was started in another folder, with Pavlov installed: it answers, and `serve shutdown` ends
    it."""
    shutil.rmtree(folder, ignore_errors=True)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(parents=True)
    model = build_tiny_model(folder / "model")
    reward = build_tiny_reward_model(folder / "reward", model)
    port = free_port()
    file = yaml.safe_load((ROOT / "configs" / "serve.yaml").read_text())
    file["http_options"]["port"] = port
    [application] = file["applications"]
    arguments = application["args"]
    arguments |= {"policy": {"model": str(model)}, "reward": str(reward)}
    arguments["serve"] |= {"max_prompt_tokens": 500}
    arguments["engine"] |= {"dtype": "float32"}
    (elsewhere / "serve.yaml").write_text(yaml.safe_dump(file))
    address = f"http://127.0.0.1:{port}"
    with cluster(elsewhere) as ray:
        began = time.monotonic()
        said = ray.call("serve", "deploy", "serve.yaml", "--address", ray.address)
        assert "successfully" in said, said[-2000:]
        try:
            until(lambda: ask_server(address, 1, best_of=2).status == 200, "an answer", 180)
        except AssertionError as error:
            status = ray.call("serve", "status", "--address", ray.address)
            raise AssertionError(f"{error}: {status[-2000:]}") from None
        took = time.monotonic() - began
        health = httpx.get(f"{address}/health", timeout=30).status_code
        ray.call("serve", "shutdown", "-y", "--address", ray.address)
        until(lambda: not ask_server(address, 1).status, "the end", 60)
    return hold({"it is healthy": health == 200}, {"seconds until it answers": round(took)})


PROOFS = [best_of_eight, given_up, crowd, dropped, killed, promoted, second_client, deployed, page]


if __name__ == "__main__":
    sys.exit(prove("serving", PROOFS, sys.argv[1:]))
