"""`pavlov serve` as users start it, asked by OpenAI's own client."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from labelling.database import Database
from labelling.store import Store
from models.sources import weights_fingerprint
from tests.commands import Commands
from tests.conftest import ROOT, build_tiny_model
from tests.servers import Server, running

pytestmark = pytest.mark.engine
ASK = [{"role": "user", "content": "What is a good name for a cat?"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


def labels(runs: Path) -> str:
    return f"sqlite:///{runs / 'labels.db'}"


@pytest.fixture(scope="module")
def server(runs: Path, tiny_model: Path, tiny_reward_model: Path) -> Iterator[Server]:
    command = (
        *("serve", "configs/serve.toml", "serve.port=0", f"policy.model={tiny_model}"),
        *(f"reward={tiny_reward_model}", "serve.max_prompt_tokens=200", "serve.max_tokens=500"),
        *("engine.dtype=float32", "serve.at_once=8", "serve.waiting=8"),
        f"serve.feedback={labels(runs)}",
    )
    with running(*command, runs=runs) as found:
        yield found
        # What it had accepted it has finished; then it ends of itself.
        assert found.stop(signal.SIGTERM) == 0


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **more):
    options = {"model": "pavlov", "messages": ASK, "max_tokens": 16, **more}
    return client.chat.completions.create(**options)


def test_the_official_client_chats_streams_and_repeats_with_a_seed(client):
    whole = ask(client, seed=7, n=2, logprobs=True, top_logprobs=2)
    assert len(whole.choices) == 2
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.completion_tokens <= 32
    tokens = whole.choices[0].logprobs.content
    assert tokens and all(token.logprob <= 0 for token in tokens)
    assert len(tokens[0].top_logprobs) == 2
    again = ask(client, seed=7, n=2)
    said = [choice.message.content for choice in whole.choices]
    assert [choice.message.content for choice in again.choices] == said
    assert said[0] != said[1]

    streamed = ["", ""]
    for chunk in ask(client, seed=7, n=2, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == said
    assert whole.model_extra["pavlov"]["weight_version"]
    assert client.models.list().data == [client.models.retrieve("pavlov")]


def test_stop_ends_an_answer_before_the_text(client):
    said = ask(client, seed=7, max_tokens=40).choices[0].message.content
    stop = said[len(said) // 2 : len(said) // 2 + 3]
    cut = ask(client, seed=7, max_tokens=40, stop=stop).choices[0]
    assert cut.message.content == said[: said.index(stop)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(
    "odd",
    [
        {"temperature": 0, "n": 3, "logprobs": True},
        {"temperature": 0, "extra_body": {"best_of": 2}},
        {"temperature": 1e-9, "n": 2},
        {"temperature": 1e-3},
        {"temperature": 2, "top_p": 1e-12},
        {"seed": 2**63 - 1, "n": 2},
        {"seed": -(2**63)},
        {"logprobs": True, "top_logprobs": 20},
        {"logprobs": True, "top_logprobs": 0, "stream": True},
        {"stop": ["x" * 256] * 4},
        {"stop": ""},
        {"max_tokens": 1},
        {"max_tokens": 500, "stop": "e"},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": "\x00 🧀 \u202e"}]},
        {"messages": [{"role": "assistant", "content": "A cat"}]},
        {"messages": [{"role": "system", "content": "Be brief."}]},
    ],
)
def test_what_is_odd_and_allowed_is_answered(client, odd):
    answer = ask(client, **odd)
    if odd.get("stream"):
        assert [choice.finish_reason for chunk in answer for choice in chunk.choices][-1]
        return
    assert len(answer.choices) == odd.get("n", 1)
    assert all(choice.finish_reason in ("stop", "length") for choice in answer.choices)
    if odd.get("temperature", 1) < 1e-5:
        assert len({choice.message.content for choice in answer.choices}) == 1


def test_best_of_takes_the_highest_lower_bound_by_the_ensemble(client):
    found = ask(client, seed=3, extra_body={"best_of": 6, "candidates": True})
    own = found.model_extra["pavlov"]
    assert len(own["candidates"]) == 6
    bounds = [each["reward"] - each["disagreement"] for each in own["candidates"]]
    best = own["candidates"][bounds.index(max(bounds))]
    assert found.choices[0].message.content == best["text"]
    assert own["reward"] == best["reward"] and len(best["rewards"]) == 4
    *_, last = ask(client, seed=3, stream=True, extra_body={"best_of": 6})
    assert last.model_extra["pavlov"]["reward"] == pytest.approx(best["reward"], abs=1e-4)


def test_mistakes_come_as_the_clients_own_errors(client):
    with pytest.raises(openai.BadRequestError, match="tokens; at most"):
        ask(client, messages=[{"role": "user", "content": "word " * 400}])
    with pytest.raises(openai.NotFoundError, match="no model"):
        ask(client, model="other")
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        ask(client, tools=[{"type": "function", "function": {"name": "f"}}])


def test_each_of_many_gets_its_own_answer_and_a_crowd_is_told_to_come_back(client):
    alone = {
        number: ask(client, seed=number, temperature=1.0).choices[0].message.content
        for number in range(4)
    }
    found: dict[int, str] = {}
    refused = []

    def one(number: int) -> None:
        try:
            found[number] = ask(client, seed=number % 4).choices[0].message.content
        except openai.RateLimitError as error:
            refused.append(error.response.headers["retry-after"])

    threads = [threading.Thread(target=one, args=(n,)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) + len(refused) == 40 and len(found) >= 8
    # Sampled together with others sums may round differently; nearly all say the same.
    same = sum(text == alone[number % 4] for number, text in found.items())
    assert same >= 0.7 * len(found)
    assert ask(client).choices


def test_the_page_and_the_document_are_there(server):
    page = httpx.get(f"{server.address}/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert httpx.get(f"{server.address}/static/chat.js").status_code == 200
    paths = httpx.get(f"{server.address}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/feedback"} <= set(paths)


def test_what_a_user_says_of_two_answers_arrives_in_the_labelling_store(server, client, runs):
    answer = ask(client, n=2, temperature=1.0, seed=3)
    shown = [
        {"text": choice.message.content, "receipt": own["receipt"]}
        for choice, own in zip(answer.choices, answer.model_extra["pavlov"]["choices"], strict=True)
    ]
    body = {"messages": ASK, "answers": shown, "verdict": "second", "consent": True}
    kept = httpx.post(f"{server.address}/v1/feedback", json=body)
    assert kept.status_code == 200, kept.text
    store = Store(Database(labels(runs)))
    [judged] = store.judgements(store.project("feedback"), with_work=True)
    assert judged.work is not None
    better = {"a": judged.work.a, "b": judged.work.b}[judged.verdicts["overall"]]
    assert better.text == shown[1]["text"]
    assert better.checkpoint == answer.model_extra["pavlov"]["weight_version"]


def test_who_leaves_stops_the_writing(server, client):
    def written() -> float:
        text = httpx.get(f"{server.address}/metrics").text
        line = next(x for x in text.splitlines() if x.startswith("pavlov_chat_tokens_total"))
        return float(line.split()[1])

    body = {"messages": ASK, "max_tokens": 500, "stream": True, "n": 8, "temperature": 2.0}
    before = written()
    for _ in range(3):
        with httpx.stream("POST", f"{server.address}/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        inside = httpx.get(f"{server.address}/metrics").text
        if "pavlov_chat_requests_inside 0.0" in inside:
            break
        time.sleep(0.2)
    assert "pavlov_chat_requests_inside 0.0" in inside
    settled = written()
    time.sleep(1)
    assert written() == settled < before + 3 * 8 * 500


def test_serves_own_log_is_not_on_the_terminal(server):
    assert server.said.splitlines()[-1].startswith("serving pavlov: ")
    assert "INFO" not in server.said


def test_a_second_server_of_its_name_is_refused(server, client, runs, tiny_model):
    config = str(ROOT / "configs" / "serve.toml")
    limits = "serve.max_prompt_tokens=200", "serve.max_tokens=64"
    model = f"policy.model={tiny_model}"
    process = Commands(runs).command("serve", config, "serve.port=0", model, *limits)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "serve.name = 'pavlov' is served by another process" in error
    assert ask(client).choices


def test_without_keys_what_was_forwarded_is_refused(server):
    body = {"messages": ASK, "max_tokens": 4}
    for said in ("127.0.0.1", "203.0.113.9"):
        headers = {"X-Forwarded-For": said}
        path = f"{server.address}/v1/chat/completions"
        assert httpx.post(path, json=body, headers=headers).status_code == 403


OVERRIDE = ("--without-evidence", "a test of the server")


class Load:
    """Four clients who ask again after two seconds, until the block ends; each answer's version,
    and when it was asked for and had."""

    def __init__(self, client: openai.OpenAI) -> None:
        self.answers: list[tuple[float, float, str]] = []
        self.failures: list[Exception] = []
        self._client, self._over = client, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]

    def _ask(self) -> None:
        while not self._over.wait(2):
            began = time.monotonic()
            try:
                found = ask(self._client, max_tokens=64, extra_body={"best_of": 2})
            except Exception as error:
                self.failures.append(error)
                return
            version = found.model_extra["pavlov"]["weight_version"]
            self.answers.append((began, time.monotonic(), version))

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def promoted(runs: Path, *arguments: str) -> tuple[float, float]:
    """When `pavlov promote` was started, and when it said that the server has followed."""
    began = time.monotonic()
    process = Commands(runs).command("promote", *arguments)
    said, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert said.rstrip().endswith("is served")
    return began, time.monotonic()


def test_another_version_is_served_and_no_request_fails(server, client, runs, tiny_model, tmp_path):
    second = build_tiny_model(tmp_path / "run" / "policy", seed=1)
    old, new = weights_fingerprint(tiny_model), weights_fingerprint(second)
    with Load(client) as load:
        time.sleep(3)
        up = promoted(runs, str(tmp_path / "run"), *OVERRIDE)
        time.sleep(3)
    assert not load.failures
    assert {version for *_, version in load.answers} == {old, new}
    for began, ended, version in load.answers:
        if ended < up[0]:
            assert version == old
        if began > up[1]:
            assert version == new
    assert ask(client).model_extra["pavlov"]["weight_version"] == new


@pytest.mark.slow
def test_a_version_that_does_not_come_up_leaves_the_one_before(server, client, runs, tmp_path):
    broken = build_tiny_model(tmp_path / "run" / "policy", seed=3)
    config = broken / "config.json"
    layers = '"num_hidden_layers": 2'
    assert layers in config.read_text()
    config.write_text(config.read_text().replace(layers, layers.replace("2", "3")))
    before = ask(client).model_extra["pavlov"]["weight_version"]
    process = Commands(runs).command("promote", str(tmp_path / "run"), *OVERRIDE)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 2
    assert f"goes on with {before}" in error
    assert ask(client).model_extra["pavlov"]["weight_version"] == before
    assert client.models.list().data[0].model_extra["weight_version"] == before
