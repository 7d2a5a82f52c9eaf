"""Files of Label Studio: tasks and annotations that are read, and those that are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from labelling.exchange import (
    read_judgements,
    read_work,
)
from labelling.records import (
    Honeypot,
    Judgement,
)
from rlhf.errors import DataError
from rlhf.records import OVERALL
from tests.labelling.test_exchange import Row, write


def pairwise(side: str, **more: Any) -> Row:
    result = {"from_name": "pw", "to_name": "pw", "type": "pairwise", "value": {"selected": side}}
    return {"completed_by": 3, "result": [result], **more}


LEFT = pairwise("left")["result"]


def choices(**said: str) -> Row:
    results = [
        {"from_name": name, "to_name": "prompt", "type": "choices", "value": {"choices": [choice]}}
        for name, choice in said.items()
    ]
    return {"completed_by": {"id": 7, "email": "ann@example.org"}, "result": results}


def task(*annotations: Row, **data: Any) -> Row:
    texts = {"prompt": "Is tea healthy?", "answer1": "In moderation.", "answer2": "Go away."}
    return {"id": 12, "data": {**texts, **data}, "annotations": list(annotations)}


def studio(tmp_path: Path, *tasks: Any) -> tuple[list[Judgement], list[tuple[int, str]]]:
    path = write(tmp_path / "project" / "export.json", tasks)
    found, report = read_judgements(path, "label-studio")
    assert report.rows == report.kept + len(report.bad) and report.kept == len(found)
    return found, [(bad.line, bad.reason) for bad in report.bad]


def test_tasks_of_label_studio_are_work_and_their_ground_truth_makes_honeypots(tmp_path):
    known = pairwise("right", ground_truth=True)
    path = write(
        tmp_path / "t.json",
        [task(), {"text1": "x", "text2": "y", "question": "Q?"}, task(known), {"data": 3}, "no"],
    )
    works, report = read_work(path)
    assert [work.a.text for work in works] == ["In moderation.", "x", "In moderation."]
    assert [work.honeypot for work in works] == [None, None, Honeypot("b")]
    assert [(bad.line, bad.reason) for bad in report.bad] == [
        (4, "data that is no JSON object"),
        (5, "no JSON object"),
    ]
    for content, said in [("{}", "no array of tasks"), ("{}\n{}", "rows of one line each")]:
        path.write_text(content)
        with pytest.raises(DataError, match=said):
            read_work(path)


def test_left_of_a_pairwise_tag_is_the_first_answer(tmp_path):
    found, bad = studio(
        tmp_path,
        task(
            pairwise("left", lead_time=4.5, created_at="1970-01-02T00:00:00Z"),
            pairwise("right", completed_by={"id": 7, "email": "ann@example.org"}),
        ),
    )
    assert not bad
    assert [each.verdicts for each in found] == [{OVERALL: "a"}, {OVERALL: "b"}]
    assert [each.assessor for each in found] == ["3", "ann@example.org"]
    assert found[0].work.a.text == "In moderation."
    assert (found[0].seconds, found[0].at, found[0].pair) == (4.5, 86400, "project/export/12")
    assert (found[0].first, found[0].kind) == ("", "person")


@pytest.mark.parametrize(
    ("choice", "verdict"),
    [
        ("left", "a"),
        ("Answer 1", "a"),
        ("response_b", "b"),
        ("answer2", "b"),
        ("Model A is better", "a"),
        ("Tie", "tie"),
        ("About the same", "tie"),
        ("Both are equally good", "tie"),
        ("Both bad", "bad"),
    ],
)
def test_a_lone_choice_is_the_overall_verdict_whatever_its_name(tmp_path, choice, verdict):
    (found,), _ = studio(tmp_path, task(choices(preference=choice, language="English")))
    assert found.verdicts == {OVERALL: verdict}


def test_choices_named_by_criteria_stand_beside_the_overall_verdict(tmp_path):
    annotation = choices(overall="tie", helpful="Answer 1", clarity="b", errors="2")
    text = {"from_name": "why", "type": "textarea", "value": {"text": ["Short.", "Fine."]}}
    annotation["result"].append(text)
    (found,), _ = studio(tmp_path, task(annotation))
    assert found.verdicts == {OVERALL: "tie", "helpful": "a", "clarity": "b"}
    assert found.comment == "Short.\nFine."
    mixed = pairwise("left")
    mixed["result"] += choices(honest="bad")["result"]
    (found,), _ = studio(tmp_path, task(mixed))
    assert found.verdicts == {OVERALL: "a", "honest": "bad"}


def test_ground_truth_is_the_known_verdict_and_no_judgement(tmp_path):
    found, bad = studio(tmp_path, task(pairwise("left"), pairwise("right", ground_truth=True)))
    assert [(each.truth, each.verdicts[OVERALL]) for each in found] == [("b", "a")]
    assert bad == [(1, "ground truth, which is no judgement")]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (task(pairwise("left", was_cancelled=True)), "task skipped"),
        (task(pairwise("none")), "no verdict"),
        (task({"completed_by": 1, "result": []}), "no verdict"),
        (task({"completed_by": 1}), "annotation without a list of results"),
        (task("left"), "annotation that is no JSON object"),
        (task(pairwise("left", completed_by=None)), "annotation without completed_by"),
        (task(pairwise("left", completed_by={})), "no assessor"),
        (task(pairwise("left", ground_truth=True, result=[])), "no verdict"),
        (task(pairwise("left", lead_time="long")), "seconds that is not a number"),
        (task(choices(preference="Neither")), "choice that names no verdict: 'Neither'"),
        (task(choices(overall="a", helpful="so so")), "choice that names no verdict: 'so so'"),
        (task(choices(helpful="a")), "no verdict"),
        (
            task({**pairwise("left"), "result": [*LEFT, *choices(overall="tie")["result"]]}),
            "two verdicts that differ by one criterion",
        ),
        (task(pairwise("left"), answer2="In moderation."), "equal replies"),
        ({"data": {}, "annotations": 3}, "annotations that are no list"),
        (7, "no JSON object"),
    ],
)
def test_a_bad_annotation_is_left_out_with_its_task_and_the_reason(tmp_path, wrong, reason):
    found, bad = studio(tmp_path, task(pairwise("left")), wrong)
    assert len(found) == 1
    assert bad == [(2, reason)]


def test_annotations_without_texts_are_judgements_without_work(tmp_path):
    wanted = {"id": 5, "data": {"image": "a.png"}, "annotations": [pairwise("left")]}
    (found,), _ = studio(tmp_path, wanted)
    assert found.work is None and found.verdicts == {OVERALL: "a"}
