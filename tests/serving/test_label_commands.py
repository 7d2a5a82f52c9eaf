"""`pavlov label`, from files in to labels and figures out."""

import gzip
import io
import json
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path

import httpx
import pytest
import uvicorn
from rich.console import Console

from cluster.session import free_port
from labelling.judges import judge_over_http, require_service
from labelling.records import Judgement
from models.preferences import read_pairs
from rlhf.config import LabelConfig, parse_config
from rlhf.errors import DataError, ResourceError, RunError
from rlhf.records import OVERALL
from serving.label_commands import (
    as_lines,
    export,
    import_judgements,
    import_work,
    invite,
    judge,
    open_store,
    show_report,
)
from serving.labelling import labelling_app

VOTES = Path(os.environ.get("PAVLOV_DATA", "../shared/data")) / "mt_bench_votes/votes.jsonl.gz"


@pytest.fixture
def config(tmp_path: Path) -> LabelConfig:
    label = {
        "database": f"sqlite:///{tmp_path}/labels.db",
        "requests_per_minute": 100_000,
        # Who judges when differs from time to time: nobody is to be paused by chance.
        "attention": {"false_pause_rate": 1e-6, "false_break_rate": 1e-6, "honeypot_share": 0.3},
    }
    return parse_config(LabelConfig, {"label": {**label, "criteria": ["helpful"]}}, "test")


@pytest.fixture
def address(config: LabelConfig) -> Iterator[str]:
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(labelling_app(config), host="127.0.0.1", port=port, log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def pairs(path: Path, count: int, honeypots: int = 0) -> Path:
    rows = [
        {
            "prompt": f"question {n}",
            "chosen": f"a good answer to {n}",
            "rejected": f"no {n}",
            "chosen_model": "tuned",
            "rejected_model": "base",
        }
        for n in range(count)
    ]
    rows += [
        {
            "prompt": f"known {n}",
            "answer_a": f"right {n}",
            "answer_b": f"wrong {n}",
            "honeypot": "a",
            "explanation": "It is right.",
        }
        for n in range(honeypots)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_simulated_judges_turn_pairs_into_labels_that_a_reward_model_reads(
    config, address, tmp_path
):
    console = Console(quiet=True)
    file = pairs(tmp_path / "pairs.jsonl", 60, honeypots=30)
    import_work(config, "chat", file, console)
    judge(config, "chat", address, console, reward=None, truth=[file])
    found = show_report(config, "chat", "simulated")
    assert found["progress"] == {"pairs": 60, "wanted": 180, "taken": 180}
    assert {each["state"] for each in found["assessors"]} == {"active"}
    assert found["win_matrix"]["tuned"]["base"]["share"] > 0.6
    # Some 25 honeypots each, judged right with 0.92: a mean of 0.75 is five deviations away.
    assert sum(each["honeypot"]["share"] for each in found["assessors"]) / 3 > 0.75
    assert show_report(config, "chat", "person")["judgements"] == 0

    out = tmp_path / "labels.parquet"
    with pytest.raises(DataError, match="no judgements by people"):
        export(config, "chat", out, console)
    export(config, "chat", out, console, kind="simulated")
    labelled, _ = read_pairs([out])
    assert len(labelled) == 60
    assert {pair.weight for pair in labelled} != {1.0}
    right = sum(pair.chosen.startswith("a good") for pair in labelled)
    assert right > 40
    assert len(as_lines(found)) > 6


def test_a_reward_model_judges_as_a_model_and_not_as_a_person(
    config, address, tmp_path, tiny_reward_model
):
    console = Console(quiet=True)
    import_work(config, "chat", pairs(tmp_path / "pairs.jsonl", 8), console)
    judge(config, "chat", address, console, reward=str(tiny_reward_model), truth=[])
    judge(config, "chat", address, console, reward=str(tiny_reward_model), truth=[])
    found = show_report(config, "chat", "model")
    assert found["judgements"] == 16
    # It says the same at any time, whichever stood first; nobody reviews it.
    assert found["agreement"] == 1.0
    assert {each["state"] for each in found["assessors"]} == {"active"}
    assert show_report(config, "chat", "person")["judgements"] == 0
    store = open_store(config)
    for each in store.judgements(store.project("chat")):
        assert each.verdicts["helpful"] == each.verdicts["overall"] in ("a", "b")


def test_judgements_come_out_as_they_went_in_and_count_once(config, address, tmp_path):
    console = Console(quiet=True)
    file = pairs(tmp_path / "pairs.jsonl", 12)
    import_work(config, "chat", file, console)
    judge(config, "chat", address, console, reward=None, truth=[file])
    for name in ("judgements.jsonl", "judgements.parquet"):
        out = tmp_path / name
        export(config, "chat", out, console, judgements=True)
        import_judgements(config, f"again {name}", out, "pavlov", console)
        import_judgements(config, f"again {name}", out, "pavlov", console)
        store = open_store(config)
        old, new = (
            [
                (each.pair, each.assessor, each.verdicts, each.first, each.seconds, each.kind)
                for each in store.judgements(store.project(project))
            ]
            for project in ("chat", f"again {name}")
        )
        assert old == new and len(old) >= 36


@pytest.mark.skipif(not VOTES.is_file(), reason="no MT-Bench votes below PAVLOV_DATA")
def test_the_report_on_mt_bench_says_what_the_votes_say(config):
    import_judgements(config, "mt", VOTES, "mt-bench", Console(quiet=True))
    found = show_report(config, "mt", "person")
    with gzip.open(VOTES, "rt") as file:
        votes = [json.loads(line) for line in file]
    said: dict[tuple[object, ...], dict[str, str]] = defaultdict(dict)
    for vote in votes:
        models = sorted((vote["model_a"], vote["model_b"]))
        won = {"model_a": vote["model_a"], "model_b": vote["model_b"]}.get(vote["winner"], "tie")
        said[(vote["question_id"], vote["turn"], *models)].setdefault(vote["judge"], won)
    assert found["judgements"] == sum(map(len, said.values()))
    agreed = [
        one == other for each in said.values() for one, other in combinations(each.values(), 2)
    ]
    assert found["agreement"] == pytest.approx(sum(agreed) / len(agreed))
    # By pair: each is won by the model that more judges preferred.
    record = Counter()
    for (_, _, one, other), each in said.items():
        if (one, other) == ("claude-v1", "gpt-4"):
            votes_for = Counter(each.values())
            ahead = votes_for[one] - votes_for[other]
            record["wins" if ahead > 0 else "losses" if ahead < 0 else "ties"] += 1
    row = found["win_matrix"]["claude-v1"]["gpt-4"]
    assert {name: row[name] for name in ("wins", "losses", "ties")} == record
    assert found["condorcet_winner"] == "gpt-4" and found["cycles"] == []


def test_a_cycle_is_not_told_as_an_order(config):
    # a beats c, c beats b, b beats a.
    said = [("a", "c"), ("c", "b"), ("b", "a")]
    store = open_store(config)
    store.add_judgements(
        store.make_project("chat", []),
        [
            Judgement(f"{models}", "ann", {OVERALL: "a"}, at=float(n), models=models)
            for n, models in enumerate(said)
        ],
    )
    lines = as_lines(show_report(config, "chat", "person"))
    assert [line for line in lines if line.startswith("cycle")] == ["cycle          among a, b, c"]
    assert not any(">" in line for line in lines)


def test_a_report_by_another_criterion_tells_what_was_said_of_that(config):
    store = open_store(config)
    # Overall x wins all ten, and both judges say so; by the other they disagree, and y wins.
    given = [
        Judgement(
            f"{n}",
            who,
            {OVERALL: "a", "helpful": "b" if n < 8 or who == "ann" else "tie"},
            first="a",
            at=n + 100.0 * (who == "bob"),
            models=("x", "y"),
        )
        for n in range(10)
        for who in ("ann", "bob")
    ]
    # Who was not asked has said nothing.
    given.append(Judgement("10", "ann", {OVERALL: "a"}, at=300.0, models=("x", "y")))
    store.add_judgements(store.make_project("chat", ["helpful"]), given)
    overall = show_report(config, "chat", "person")
    helpful = show_report(config, "chat", "person", "helpful")
    assert (overall["criterion"], helpful["criterion"]) == (OVERALL, "helpful")
    assert (overall["agreement"], helpful["agreement"]) == (1.0, 0.8)
    assert overall["alpha"] is None and helpful["alpha"] < 0
    assert (overall["position_bias"]["share"], helpful["position_bias"]["share"]) == (1.0, 0.0)
    assert (overall["position_bias"]["count"], helpful["position_bias"]["count"]) == (20, 18)
    assert overall["win_matrix"]["x"]["y"]["wins"] == 11
    assert helpful["win_matrix"]["x"]["y"]["losses"] == 10
    assert (overall["sure_winner"], helpful["sure_winner"]) == ("x", "y")
    # The figures of assessors are of what they said overall.
    assert overall["assessors"] == helpful["assessors"]
    assert "criterion      helpful" in as_lines(helpful)
    with pytest.raises(DataError, match="does not ask about 'polite'; it asks about helpful, over"):
        show_report(config, "chat", "person", "polite")


def test_a_server_that_is_away_is_waited_for(config, address, tmp_path):
    import_work(config, "chat", pairs(tmp_path / "p.jsonl", 3), Console(quiet=True))
    token = invite(config, "chat", "ann", "simulated", "assessor")
    answer = httpx.get(f"{address}/health")
    assert answer.status_code == 200
    seen: list[str] = []

    def decide(task, number):
        seen.append(task["id"])
        return dict.fromkeys(task["criteria"], "first"), 3.0

    assert judge_over_http(address, token, decide) == len(seen) == 3
    with pytest.raises(Exception, match="did not take /api/next"):
        judge_over_http("http://127.0.0.1:9", token, decide, patience_s=0.6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"prompt": "q", "chosen": "same", "rejected": "same"}\n', "no usable pairs"),
        ("not json\n", "no usable pairs"),
        ("", "no usable pairs"),
    ],
)
def test_a_file_without_work_is_refused_and_makes_no_project(config, tmp_path, rows, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(rows)
    with pytest.raises(DataError, match=message):
        import_work(config, "chat", file, Console(quiet=True))
    with pytest.raises(DataError, match="no project chat"):
        open_store(config).project("chat")


@pytest.mark.parametrize(
    "rows", ["", "not json\n", '{"prompt": "q", "answer_a": "x", "answer_b": "y"}\n']
)
def test_a_file_without_truths_is_refused_before_anybody_is_invited(config, tmp_path, rows):
    import_work(config, "chat", pairs(tmp_path / "p.jsonl", 1), Console(quiet=True))
    file = tmp_path / "truths.jsonl"
    file.write_text(rows)
    with pytest.raises(DataError, match="no usable pairs whose better answer is known"):
        judge(config, "chat", "http://127.0.0.1:9", Console(quiet=True), reward=None, truth=[file])
    store = open_store(config)
    assert store.assessors(store.project("chat")) == []


def test_one_row_of_an_assessor_who_is_another_kind_is_left_out_alone(config, tmp_path):
    invite(config, "chat", "bob", "person", "assessor")
    rows = [
        {"pair": "1", "assessor": "ann"},
        {"pair": "2", "assessor": "ann", "kind": "model"},
        {"pair": "3", "assessor": "bob", "kind": "simulated"},
        {"pair": "4", "assessor": "bob"},
    ]
    said = {"verdicts": {OVERALL: "a"}, "model_a": "x", "model_b": "y"}
    file = tmp_path / "judgements.jsonl"
    file.write_text("".join(json.dumps(row | said) + "\n" for row in rows))
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    import_judgements(config, "chat", file, "pavlov", console)
    told = console.export_text()
    assert "line 2 left out: 'ann' is a model, but known as a person" in told
    assert "line 3 left out: 'bob' is a simulated, but known as a person" in told
    assert "2 new judgements" in told


def test_labels_of_judgements_without_texts_are_refused_for_that(config, tmp_path):
    store = open_store(config)
    given = [Judgement("1", "ann", {OVERALL: "a"}, models=("x", "y"))]
    store.add_judgements(store.make_project("chat", []), given)
    with pytest.raises(DataError, match="1 judgements by people, but not the texts"):
        export(config, "chat", tmp_path / "labels.parquet", Console(quiet=True))


def test_names_of_others_move_no_terminals_cursor(config):
    store = open_store(config)
    given = [Judgement("1", "\x1b[2J" + "z" * 999, {OVERALL: "a"}, models=("\x1b]0;x\a", "y\r"))]
    store.add_judgements(store.make_project("chat", []), given)
    lines = as_lines(show_report(config, "chat", "person"))
    assert all(line.isprintable() and len(line) < 300 for line in lines)
    assert any(r"\x1b[2Jzzz" in line for line in lines)
    assert any(r"\x1b]0;x\x07 against y\r" in line for line in lines)


def test_a_misspelt_database_is_not_made_to_be_read(config, tmp_path):
    for read in (
        lambda: show_report(config, "chat", "person"),
        lambda: export(config, "chat", tmp_path / "labels.parquet", Console(quiet=True)),
        lambda: judge(config, "chat", None, Console(quiet=True), reward=None, truth=[]),
    ):
        with pytest.raises(DataError, match="there is no database"):
            read()
    assert not (tmp_path / "labels.db").exists()


class Other(BaseHTTPRequestHandler):
    """A server of something else: what it answers is set by the test."""

    said: tuple[int, dict[str, str], bytes] = 200, {}, b""

    def do_GET(self):
        status, headers, body = self.said
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def other() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


HTML = {"content-type": "text/html"}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ((200, HTML, b"<html>\n<p>It works!"), "is no labelling service .*It works!"),
        ((200, {}, b"[1]"), "is no labelling service"),
        ((200, {}, b'{"status": "sad"}'), "does not say that it is well"),
        ((401, HTML, b"<p>\nwho?"), "refused /health"),
        ((404, {}, b"nothing"), "did not take /health for 0.6 s"),
        ((503, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, b""), "did not take /health"),
    ],
)
def test_another_server_is_no_labelling_service(other, monkeypatch, said, message):
    monkeypatch.setattr(Other, "said", said)
    with pytest.raises(ResourceError, match=message) as told:
        require_service(other, patience_s=0.6)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("url", ["http://[::1", "localhost:8100", "http://127.0.0.1:9", "ftp://x"])
def test_an_address_without_a_service_is_refused_in_a_sentence(url):
    with pytest.raises(ResourceError, match="there is no labelling service at"):
        require_service(url, patience_s=0.6)


@pytest.mark.parametrize("body", [b"<p>", b"[]", b'{"task": 3}', b'{"task": {"id": "x"}}'])
def test_what_is_no_task_is_refused_in_a_sentence(other, monkeypatch, body):
    monkeypatch.setattr(Other, "said", (200, {}, body))
    with pytest.raises(RunError, match=r"no labelling service|no task of a labelling service"):
        judge_over_http(other, "token", lambda task, number: ({}, None), patience_s=0.6)


def test_nobody_is_invited_where_no_service_answers(config, other, tmp_path, monkeypatch):
    import_work(config, "chat", pairs(tmp_path / "p.jsonl", 1), Console(quiet=True))
    monkeypatch.setattr(Other, "said", (200, HTML, b"<p>"))
    with pytest.raises(ResourceError, match="is no labelling service"):
        judge(config, "chat", other, Console(quiet=True), reward=None, truth=[])
    store = open_store(config)
    assert store.assessors(store.project("chat")) == []
