"""The labelling service's long proofs on real servers; the others: `tests/proofs/labelling.py`."""

from __future__ import annotations

import json
import shutil
import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.session import free_port
from labelling.database import Database
from labelling.judges import as_person, judge_over_http
from labelling.store import Store
from labelling.worlds import SimulatedPerson
from rlhf.config import LabelSection, data_path
from tests.browser import new_page
from tests.label_service import judge, service, sign_in, start, works
from tests.postgres import postgresql
from tests.proofs.runner import PICTURES, hold, pavlov

CONFIG = "configs/label.toml"
_CLIENTS, _JUDGEMENTS, _KILLS = 20, 5000, 5


def _killed(database: str, folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    url = LabelSection(database=database).url
    store = Store(Database(url))
    project = store.make_project("killed", ["helpful"])
    store.add_work(project, works(_JUDGEMENTS // 3 + 1, hostile=False), 3)
    acknowledged: list[str] = []
    failures: list[Exception] = []
    port = free_port()
    overrides = (
        f"label.port={port}",
        "label.requests_per_minute=1000000",
        "label.attention.review_every=1000000",
        "label.attention.honeypot_share=0",
        "label.attention.repeat_share=0",
    )

    def client(number: int) -> None:
        person = SimulatedPerson(f"client-{number}")
        token = store.invite(project, person.name, "simulated")
        decide = as_person(person, {}, seed=0)
        tasks: list[str] = []

        def noted(task: dict[str, Any], count: int) -> Any:
            tasks.append(task["id"])
            return decide(task, count)

        try:
            judge_over_http(
                f"http://127.0.0.1:{port}",
                token,
                noted,
                told=lambda: acknowledged.append(tasks[-1]),
                patience_s=300,
            )
        except Exception as error:
            failures.append(error)

    running = start(database, *overrides, runs=folder)
    threads = [threading.Thread(target=client, args=(n,), daemon=True) for n in range(_CLIENTS)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    at_kill = []
    for kill in range(1, _KILLS + 1):
        while len(acknowledged) < kill * _JUDGEMENTS // (_KILLS + 1) and not failures:
            time.sleep(0.05)
        at_kill.append(len(acknowledged))
        running.stop(9)
        running = start(database, *overrides, runs=folder)
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    code = running.stop()
    stored = Counter(each.id for each in store.judgements(project))
    pairs = Counter(each.pair for each in store.judgements(project))
    store.database.close()
    figures = {
        "acknowledged": len(acknowledged),
        "stored": stored.total(),
        "acknowledged at each kill": at_kill,
        "seconds, restarts included": round(seconds),
        "clients that failed": [str(each)[:200] for each in failures],
    }
    bars = {
        "no client failed": not failures,
        "5,000 were acknowledged": len(acknowledged) >= _JUDGEMENTS,
        "every acknowledged judgement is stored": set(acknowledged) <= stored.keys(),
        "each is stored once": max(stored.values()) == 1,
        "none was acknowledged twice": len(set(acknowledged)) == len(acknowledged),
        "no pair has more judges than wanted": max(pairs.values()) <= 3,
        "SIGTERM ends it with 0": code == 0,
    }
    return hold(bars, figures)


def killed_on_sqlite(folder: Path) -> dict[str, Any]:
    """Twenty clients post 5,000 judgements to the service on SQLite while it is killed with SIGKILL
    five times: every acknowledged judgement is stored exactly once."""
    return _killed(f"sqlite:///{folder}/labels.db", folder)


def killed_on_postgresql(folder: Path) -> dict[str, Any]:
    """The same on a PostgreSQL server that the proof starts."""
    with postgresql() as url:
        return _killed(url, folder)


def five_hundred_pairs(folder: Path) -> dict[str, Any]:
    """500 pairs of HH (helpful), judged by three simulated assessors over HTTP, end as a Parquet
    file that `pavlov reward` trains on, weights and all."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    database = f"sqlite:///{folder}/labels.db"
    truth = data_path("hh/helpful-base/train.jsonl.gz")
    pairs = folder / "pairs.jsonl"
    lines = _lines(truth, 500)
    pairs.write_text("".join(lines))
    common = ("--project", "hh", f"label.database={database}")
    imported = pavlov("label", "import", CONFIG, *common, "--pairs", str(pairs), runs=folder)
    with service(database, "label.requests_per_minute=100000", runs=folder) as running:
        judged = pavlov(
            *("label", "judge", CONFIG, *common, "--url", running.address),
            *("--truth", str(pairs)),
            runs=folder,
        )
    out = folder / "labelled.parquet"
    options = ("--kind", "simulated", "--out", str(out))
    pavlov("label", "export", CONFIG, *common, *options, runs=folder)
    report = pavlov(
        "label", "report", CONFIG, *common, "--kind", "simulated", "--json", runs=folder
    )
    found = json.loads(report.stdout)
    table = pq.read_table(out)
    weights = table["weight"].to_pylist()
    known = {json.loads(line)["chosen"].rsplit("\n\nAssistant:", 1)[1].strip() for line in lines}
    right = sum(row[0]["content"].strip() in known for row in table["chosen"].to_pylist())
    pavlov(
        *("reward", "configs/reward_hh_cpu.toml", "run.dir=reward", f"data.train=['{out}']"),
        "data.validation=[]",
        "ensemble.combination={overall = 1.0}",
        runs=folder,
    )
    figures = {
        "imported": imported.stdout.strip().splitlines()[-1],
        "judged": judged.stdout.strip().splitlines()[-1],
        "rows exported": table.num_rows,
        "columns": ", ".join(table.column_names),
        "mean weight": statistics.fmean(weights),
        "share of labels that are the planted one": right / table.num_rows,
        "alpha": found["alpha"],
    }
    bars = {
        "all pairs came out": table.num_rows >= 490,
        "weights differ from nothing": 0 < statistics.fmean(weights) <= 1,
        "labels are better than one judge": right / table.num_rows > 0.8,
        "a reward model stands": (folder / "reward" / "reward" / "reward.json").is_file(),
    }
    return hold(bars, figures)


def pages(folder: Path) -> dict[str, Any]:
    """The page in Chromium at 1280 and 390 pixels: docs/pictures/label_*.png."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    database = f"sqlite:///{folder}/labels.db"
    store = Store(Database(database))
    project = store.make_project("assistant", LabelSection().criteria)
    store.add_work(project, works(24, honeypots=range(20, 24), hostile=False), 3)
    token = store.invite(project, "ann", role="owner")
    shares = ("label.attention.honeypot_share=0.5", "label.attention.repeat_share=0")
    figures = {}
    with service(database, *shares, runs=folder) as running:
        for width in (1280, 390):
            with new_page(width) as page:
                sign_in(page, running.address, token)
                page.screenshot(path=PICTURES / f"label_task_{width}.png", full_page=True)
                while "A second look" not in page.content():
                    judge(page, "4444")
                page.screenshot(path=PICTURES / f"label_missed_{width}.png", full_page=True)
                page.goto(f"{running.address}/project")
                page.screenshot(path=PICTURES / f"label_project_{width}.png", full_page=True)
                figures[f"errors at {width}"] = len(page.errors) + len(page.elsewhere)
    return hold({"no errors": not any(figures.values())}, figures)


def _lines(path: Path, count: int) -> list[str]:
    import gzip
    from itertools import islice

    with gzip.open(path, "rt") as file:
        return list(islice(file, count))
