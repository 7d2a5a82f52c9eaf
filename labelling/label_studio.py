"""Label Studio's JSON: tasks to judge, and annotations as judgements, in and out.

An export (JSON, not JSON-MIN) is an array of tasks; a file to import may hold bare `data`::

    {"id": 7, "data": {"prompt": …, "answer1": …, "answer2": …},
     "annotations": [{"completed_by": 3, "lead_time": 4.2, "was_cancelled": false,
                      "ground_truth": false, "created_at": "2026-01-05T10:00:00Z",
                      "result": [{"from_name": "pw", "to_name": "pw", "type": "pairwise",
                                  "value": {"selected": "left"}}]}]}

(labelstud.io/guide/task_format; the editor's Pairwise tag: `selected` is "left" or "right", and
what is selected twice leaves no result.) Left is taken to be the first of the two answers: the
tag's `toName` has to name them in that order. Verdicts come from results of type "pairwise", and
of type "choices" for what a Pairwise tag cannot say. A result's name is its criterion; "overall"
is the overall verdict, and so is a lone Pairwise tag, or without one a lone choice that names a
verdict, unless it bears a criterion's name. Other choices are criteria where they are literally a,
b, tie or bad, and else something else, which is ignored. An annotation marked as ground truth is
the known verdict on its task, and no judgement.

What `tasks_of` writes is read back whole. Label Studio itself knows assessors by email and keeps
the verdicts, the times and the comment; `data` comes through it too, the "pavlov" part does not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from labelling.forms import judgement_of, judgement_row, work_of, work_row
from labelling.records import CRITERIA, VERDICTS, Honeypot, Judgement, Verdict, Work
from models.data_files import BadRow, Row, check_is_file
from rlhf.errors import DataError
from rlhf.records import OVERALL

_PROMPTS = ("prompt", "question", "instruction", "input")
_ANSWERS = (
    ("answer_a", "answer_b"),
    ("answer1", "answer2"),
    ("answer_1", "answer_2"),
    ("response1", "response2"),
    ("response_1", "response_2"),
    ("response_a", "response_b"),
    ("text1", "text2"),
)
_FILLERS = {"about", "answer", "are", "better", "equally", "is", "model", "option", "response"}
_SAID: tuple[tuple[Verdict, tuple[str, ...]], ...] = (
    ("a", ("a", "1", "first", "left")),
    ("b", ("b", "2", "second", "right")),
    ("tie", ("tie", "draw", "equal", "same", "the same", "both", "both good", "no preference")),
    ("bad", ("bad", "both bad")),
)
_WORDS = {frozenset(words.split()): verdict for verdict, said in _SAID for words in said}
_YEAR_9999 = 253_370_764_800
_OWN = ("first", "at", "kind", "repeat", "words_a", "words_b", "doubt")
"""What Label Studio has no place for."""


def read_tasks(path: Path) -> list[Any]:
    """The array of tasks in a file.

    Raises:
        DataError: the file cannot be read, or is no JSON array.
    """
    check_is_file(path)
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not Label Studio's JSON ({error}); rows of one line each belong in *.jsonl"
        ) from None
    if not isinstance(found, list):
        raise DataError(f"{path} is no array of tasks; export it from Label Studio as JSON")
    return found


def work_of_task(task: object, source: str, *, honeypots: bool = False) -> Work:
    """The pair that a task shows; its ground truth, if it has any, makes it a honeypot.

    Raises:
        ValueError: with the reason.
    """
    data = _data(task)
    work = work_of(_labelling_form(data), source, honeypots=honeypots)
    if work.honeypot is None and (truth := _ground_truth(_annotations(task))):
        return replace(work, honeypot=truth)
    return work


def judgements_of_task(task: object, source: str, place: int) -> Iterator[Judgement | BadRow]:
    """What each annotation of a task says; `place` is the task's in the file, from 1.

    A pair's id is the task's `data.pair`, or ``<source>/<id of the task>``. Where the data holds no
    prompt or no two answers, judgements have no work.
    """
    try:
        data, annotations = _data(task), _annotations(task)
        row = _labelling_form(data)
        has_texts = row.get("prompt") is not None and row.get("answer_a") is not None
        work = work_of(row, source) if has_texts else None
        pair = data.get("pair")
        if pair is None:
            own_id = task.get("id") if isinstance(task, Mapping) else None
            pair = f"{source}/{place if own_id is None else own_id}"
        known = work.honeypot if work and work.honeypot else _ground_truth(annotations)
        truth = data.get("truth", known.verdict if known else None)
    except ValueError as error:
        yield BadRow(place, str(error))
        return
    task_row = {
        "pair": pair,
        "truth": truth,
        "model_a": data.get("model_a"),
        "model_b": data.get("model_b"),
    }
    for annotation in annotations:
        try:
            found = judgement_of({**task_row, **_judgement_form(annotation)}, source)
            yield replace(found, work=work)
        except ValueError as error:
            yield BadRow(place, str(error))


def tasks_of(judgements: Sequence[Judgement]) -> list[Row]:
    """Tasks with an annotation for each judgement, in the order in which pairs come up first."""
    tasks: dict[tuple[object, ...], Row] = {}
    ids = count(1)
    for judgement in judgements:
        key = (judgement.pair, judgement.work, judgement.models, judgement.truth)
        row = judgement_row(judgement)
        if key not in tasks:
            data = {
                "pair": judgement.pair,
                "truth": judgement.truth,
                "model_a": judgement.models[0],
                "model_b": judgement.models[1],
                **(work_row(judgement.work) if judgement.work else {}),
            }
            tasks[key] = {"id": len(tasks) + 1, "data": data, "annotations": []}
        tasks[key]["annotations"].append(
            {
                "id": next(ids),
                "completed_by": {"email": judgement.assessor},
                "created_at": _timestamp(judgement.at),
                "lead_time": row["seconds"],
                "was_cancelled": False,
                "ground_truth": False,
                "result": [*_results(judgement)],
                "pavlov": {name: row[name] for name in _OWN},
            }
        )
    return list(tasks.values())


def _data(task: object) -> Row:
    if not isinstance(task, dict):
        raise ValueError("no JSON object")
    data = task.get("data", task)
    if not isinstance(data, dict):
        raise ValueError("data that is no JSON object")
    return data


def _labelling_form(data: Row) -> Row:
    """The data under the names that `labelling.forms` knows."""
    names = next((pair for pair in _ANSWERS if pair[0] in data and pair[1] in data), None)
    if names is None:
        return data
    prompt = next((data[name] for name in _PROMPTS if data.get(name) is not None), None)
    return {**data, "prompt": prompt, "answer_a": data[names[0]], "answer_b": data[names[1]]}


def _annotations(task: object) -> list[Any]:
    found = task.get("annotations", []) if isinstance(task, Mapping) else []
    if not isinstance(found, list):
        raise ValueError("annotations that are no list")
    return found


def _ground_truth(annotations: Sequence[Any]) -> Honeypot | None:
    for annotation in annotations:
        if isinstance(annotation, Mapping) and annotation.get("ground_truth") is True:
            results = _results_of(annotation)
            return Honeypot(_verdicts(results)[OVERALL], _comment(results))
    return None


def _judgement_form(annotation: object) -> Row:
    """An annotation as a row of the Pavlov form, without what is its task's."""
    if not isinstance(annotation, Mapping):
        raise ValueError("annotation that is no JSON object")
    if annotation.get("was_cancelled") is True:
        raise ValueError("task skipped")
    if annotation.get("ground_truth") is True:
        raise ValueError("ground truth, which is no judgement")
    results = _results_of(annotation)
    own = annotation.get("pavlov")
    return {
        "at": _seconds_since_1970(annotation.get("created_at")),
        **({name: own.get(name) for name in _OWN} if isinstance(own, Mapping) else {}),
        "assessor": _assessor(annotation.get("completed_by")),
        "seconds": annotation.get("lead_time"),
        "verdicts": _verdicts(results),
        "comment": _comment(results),
    }


def _results_of(annotation: Mapping[str, Any]) -> list[Any]:
    found = annotation.get("result")
    if not isinstance(found, list):
        raise ValueError("annotation without a list of results")
    return found


def _assessor(completed_by: object) -> object:
    """The email where the export has it, else the id."""
    if isinstance(completed_by, Mapping):
        return completed_by.get("email") or completed_by.get("id")
    if completed_by is None:
        raise ValueError("annotation without completed_by")
    return completed_by


def _verdicts(results: Sequence[Any]) -> dict[str, Verdict]:
    """Verdicts by criterion, the overall one among them."""
    pairwise: list[tuple[str, Verdict]] = []
    choices: list[tuple[str, str, Verdict | None]] = []
    for result in results:
        match result:
            case {"type": "pairwise", "value": {"selected": "left" | "right" as side}}:
                pairwise.append((str(result.get("from_name")), "a" if side == "left" else "b"))
            case {"type": "choices", "value": {"choices": [*chosen]}}:
                choice = ", ".join(map(str, chosen))
                verdict = _WORDS.get(_words(choice))
                choices.append((str(result.get("from_name")), choice, verdict))
    if len({name for name, _ in pairwise}) == 1 and pairwise[0][0] not in CRITERIA:
        pairwise = [(OVERALL, verdict) for _, verdict in pairwise]
    said = dict.fromkeys(pairwise)
    told = [(name, verdict) for name, _, verdict in choices if verdict and name not in CRITERIA]
    if not pairwise and len(told) == 1:
        said[OVERALL, told[0][1]] = None
        choices = [choice for choice in choices if choice[0] != told[0][0]]
    for name, choice, verdict in choices:
        if name in (OVERALL, *CRITERIA) and verdict is None:
            raise ValueError(f"choice that names no verdict: {choice[:40]!r}")
        if verdict is not None and (name in (OVERALL, *CRITERIA) or choice in VERDICTS):
            said[name, verdict] = None
    verdicts = dict(list(said))
    if len(verdicts) < len(said):
        raise ValueError("two verdicts that differ by one criterion")
    if OVERALL not in verdicts:
        strange = [choice for _, choice, verdict in choices if verdict is None]
        raise ValueError(
            f"choice that names no verdict: {strange[0][:40]!r}" if strange else "no verdict"
        )
    return verdicts


def _words(choice: object) -> frozenset[str]:
    """What tells choices apart: "Answer 1 is better" is 1, "Both are equally bad" is both bad."""
    return frozenset(re.findall(r"[a-z]+|[0-9]+", str(choice).lower())) - _FILLERS


def _comment(results: Sequence[Any]) -> str:
    for result in results:
        match result:
            case {"type": "textarea", "value": {"text": str() as text}}:
                return text
            case {"type": "textarea", "value": {"text": [*lines]}}:
                return "\n".join(map(str, lines))
    return ""


def _results(judgement: Judgement) -> Iterator[Row]:
    for criterion, verdict in judgement.verdicts.items():
        if criterion == OVERALL and verdict in ("a", "b"):
            # Within an annotation the editor takes a Pairwise tag for its own object.
            yield _result(
                "pairwise", "pairwise", "pairwise", selected="left" if verdict == "a" else "right"
            )
        else:
            yield _result(criterion, "prompt", "choices", choices=[verdict])
    if judgement.comment:
        yield _result("comment", "prompt", "textarea", text=[judgement.comment])


def _result(name: str, of: str, kind: str, **value: object) -> Row:
    return {"id": name, "from_name": name, "to_name": of, "type": kind, "value": value}


def _timestamp(at: float) -> str | None:
    """ISO 8601, where the time is known and a calendar has it."""
    if not 0 < at < _YEAR_9999:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


def _seconds_since_1970(timestamp: object) -> float:
    try:
        when = datetime.fromisoformat(str(timestamp))
    except ValueError:
        return 0.0
    found = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    return found if math.isfinite(found) else 0.0
