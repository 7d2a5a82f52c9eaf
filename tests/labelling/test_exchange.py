"""Work and judgements in files: what is read, what is left out and why, and what is written."""

from __future__ import annotations

import csv
import gzip
import json
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labelling.comparison import Comparison, WinMatrix
from labelling.exchange import (
    JUDGEMENT_SCHEMA,
    read_judgements,
    read_work,
    write_judgements,
)
from labelling.records import (
    CRITERIA,
    PREFERS_A,
    VERDICTS,
    Answer,
    Honeypot,
    Judgement,
    Work,
)
from models.preferences import read_pairs
from rlhf.errors import DataError
from rlhf.records import OVERALL, Message

Row = dict[str, Any]
WORK: Row = {"prompt": "Is tea healthy?", "answer_a": "In moderation.", "answer_b": "Go away."}
PAIR: Row = {"prompt": "Is tea healthy?", "chosen": "In moderation.", "rejected": "Go away."}
LLMBAR: Row = {"input": "Is tea healthy?", "output_1": "Go.", "output_2": "It can be.", "label": 2}
NUL = "text with a NUL character"
TEA = Work(
    (Message("user", "Is tea healthy?"),),
    Answer("In moderation.", "big", "step-40"),
    Answer("Go away.", "small", finished=False),
    source="kitchen",
)


def write(path: Path, rows: Sequence[Row | str]) -> Path:
    """JSON lines, Parquet or an array, by the name; a string is written as it stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        columns = dict.fromkeys(name for row in rows for name in row)
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        content = "".join(f"{line}\n" for line in lines).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def only_work(tmp_path: Path, row: Row, **options: bool) -> Work:
    works, report = read_work(write(tmp_path / "one.jsonl", [row]), **options)
    assert not report.bad
    return works[0]


# Work that is read


def test_the_labelling_form_says_everything_about_a_pair(tmp_path):
    row = {
        **WORK,
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tea?"}],
        **{"model_a": "big", "checkpoint_a": "step-40", "model_b": "small", "finished_b": False},
        **{"source": "kitchen", "priority": 2, "honeypot": "a", "explanation": "It is polite."},
    }
    assert only_work(tmp_path, row) == Work(
        (Message("system", "Be kind."), Message("user", "Tea?")),
        Answer("In moderation.", "big", "step-40"),
        Answer("Go away.", "small", finished=False),
        source="kitchen",
        priority=2.0,
        honeypot=Honeypot("a", "It is polite."),
    )


@pytest.mark.parametrize("name", ["work.jsonl", "work.jsonl.gz", "work.parquet", "work.json"])
def test_every_kind_of_file_gives_the_same_work(tmp_path, name):
    works, report = read_work(write(tmp_path / "kitchen" / name, [WORK, PAIR]))
    assert works[0].a.text == "In moderation." and works[0].source == "kitchen/work"
    assert {works[1].a.text, works[1].b.text} == {"In moderation.", "Go away."}
    assert (report.rows, report.kept, report.bad) == (2, 2, ())


def test_csv_is_read_by_its_columns(tmp_path):
    path = tmp_path / "kitchen" / "work.csv"
    path.parent.mkdir()
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file)
        rows.writerow([*WORK, "finished_b", "priority", "honeypot", "model_a"])
        rows.writerow(["Tea?", 'Yes,\n"always".', "No.", "False", "1.5", "b", ""])
        rows.writerow(["Tea?", "Yes.", "", "", "", "", ""])
        rows.writerow(["Tea?", "Yes.", "No.", "", "soon", "", ""])
        rows.writerow(["Tea?", "Ja.", "Nö.", "", "", "", "", "one too many"])
    works, report = read_work(path)
    assert works == [
        Work(
            (Message("user", "Tea?"),),
            Answer('Yes,\n"always".'),
            Answer("No.", finished=False),
            "kitchen/work",
            1.5,
            Honeypot("b"),
        )
    ]
    assert [(bad.line, bad.reason) for bad in report.bad] == [
        (4, "no answer_b"),
        (5, "priority that is not a number"),
        (6, "more cells than the header has columns"),
    ]


def test_of_a_broken_csv_what_stood_before_is_kept(tmp_path):
    path = tmp_path / "work.csv"
    path.write_bytes(
        b"prompt,answer_a,answer_b\nTea?,Yes.,No.\nTea\xff?,Yes.,No.\n"
        b'Tea?,"Yes.,No.\nTea?,Yes.,No.\n'
    )
    works, report = read_work(path)
    assert len(works) == 1
    assert [(bad.line, bad.reason.partition(" (")[0]) for bad in report.bad] == [
        (3, "prompt that is not valid Unicode"),
        (4, "broken CSV, and nothing after it was read"),
    ]
    long = write(tmp_path / "long.csv", ["prompt,answer_a,answer_b", f"Tea?,{'y' * 200_000},No."])
    assert len(read_work(long)[0]) == 1
    with pytest.raises(DataError, match="no header"):
        read_work(write(tmp_path / "empty.csv", []))


def test_a_csv_with_two_columns_of_one_name_is_refused(tmp_path):
    path = write(tmp_path / "work.csv", ["prompt,answer_a, answer_a,answer_b,,", "q,x,y,z,,"])
    with pytest.raises(DataError, match="two columns 'answer_a'"):
        read_work(path)


def test_neither_the_file_nor_its_order_says_which_answer_was_chosen(tmp_path):
    rows = [{"prompt": "Q", "chosen": f"yes {at}", "rejected": f"no {at}"} for at in range(400)]
    works, _ = read_work(write(tmp_path / "pairs.jsonl", rows))
    first = [work.a.text.startswith("yes") for work in works]
    assert 150 < sum(first) < 250
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    again, _ = read_work(write(tmp_path / "pairs.jsonl", turned[::-1]))
    assert again[::-1] == works


def test_a_known_answer_makes_a_honeypot_only_where_that_is_asked(tmp_path):
    for row in (PAIR, LLMBAR):
        assert only_work(tmp_path, row).honeypot is None
    work = only_work(tmp_path, PAIR, honeypots=True)
    assert getattr(work, work.honeypot.verdict).text == "In moderation."
    turned = only_work(tmp_path, {**PAIR, "label": 0}, honeypots=True)
    assert {work.honeypot.verdict, turned.honeypot.verdict} == {"a", "b"}
    assert only_work(tmp_path, {**PAIR, "label": 0.5}, honeypots=True).honeypot.verdict == "tie"
    assert only_work(tmp_path, {**PAIR, "label": 0.9}, honeypots=True).honeypot is None
    assert only_work(tmp_path, LLMBAR, honeypots=True).honeypot == Honeypot("b")
    one = {**LLMBAR, "label": 1, "explanation": "Brief."}
    assert only_work(tmp_path, one, honeypots=True).honeypot == Honeypot("a", "Brief.")


def test_models_of_a_pair_follow_their_answers(tmp_path):
    row = {**PAIR, "chosen_model": "big", "rejected_model": "small", "rejected_finished": False}
    work = only_work(tmp_path, row)
    by_text = {answer.text: answer for answer in (work.a, work.b)}
    assert by_text["In moderation."] == Answer("In moderation.", "big")
    assert by_text["Go away."] == Answer("Go away.", "small", finished=False)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{broken", "broken JSON"),
        ("[1]", "no JSON object"),
        ({"prompt": "Q"}, "no two answers"),
        ({"answer_a": "x", "answer_b": "y"}, "no prompt"),
        ({**WORK, "answer_b": None}, "no answer_b"),
        ({**WORK, "answer_b": " "}, "empty reply"),
        ({**WORK, "answer_b": "In moderation. "}, "equal replies"),
        ({**WORK, "answer_b": 7}, "answer_b that is not text"),
        ({**WORK, "prompt": [{"role": "judge", "content": "x"}]}, "unknown role 'judge'"),
        ({**WORK, "honeypot": "c"}, "unknown honeypot verdict 'c'"),
        ({**WORK, "honeypot": ["a"]}, "unknown honeypot verdict \"['a']\""),
        ({**WORK, "priority": "high"}, "priority that is not a number"),
        ({**WORK, "priority": math.nan}, "priority that is not finite"),
        ({**WORK, "finished_a": 1}, "finished_a that is neither true nor false"),
        ({**PAIR, "rejected": ""}, "empty reply"),
        ({**PAIR, "rejected": PAIR["chosen"]}, "equal replies"),
        ({"chosen": "\n\nHuman: x\n\nAssistant: y"}, "no rejected"),
        (
            {
                "chosen": "\n\nHuman: x\n\nAssistant: y",
                "rejected": "\n\nHuman: z\n\nAssistant: v",
            },
            "different prompts",
        ),
        ({**LLMBAR, "output_1": None}, "no output_1"),
        ({**LLMBAR, "label": 3}, "label that is neither 1 nor 2"),
        *(
            ({**WORK, name: "x\0"}, NUL)
            for name in ("answer_a", "model_a", "checkpoint_b", "source")
        ),
        ({**WORK, "honeypot": "a", "explanation": "\0"}, NUL),
        ({**PAIR, "chosen_model": "\0"}, NUL),
    ],
)
def test_a_bad_row_is_left_out_with_its_line_and_the_reason(tmp_path, row, reason):
    works, report = read_work(write(tmp_path / "w.jsonl", [WORK, row, WORK]), honeypots=True)
    assert len(works) == 2
    assert (report.rows, report.kept) == (3, 2)
    assert [(bad.line, bad.reason) for bad in report.bad] == [(2, reason)]


def test_real_pairs_are_read_and_their_better_answers_are_known(hh_data: Path):
    path = hh_data / "hh" / "helpful-base" / "validation.jsonl.gz"
    works, report = read_work(path, honeypots=True)
    pairs, (same,) = read_pairs([path])
    assert (report.kept, report.bad) == (same.kept, same.bad)
    for work, pair in zip(works, pairs, strict=True):
        assert work.prompt == pair.prompt
        assert getattr(work, work.honeypot.verdict).text == pair.chosen
    share = sum(work.honeypot.verdict == "a" for work in works) / len(works)
    assert 0.4 < share < 0.6
    bar, report = read_work(hh_data / "llmbar" / "natural.jsonl.gz", honeypots=True)
    assert len(bar) == 100 and not report.bad
    assert set(Counter(work.honeypot.verdict for work in bar)) == {"a", "b"}


# Judgements that are read


def test_the_votes_of_mt_bench_compare_models_without_texts(hh_data: Path):
    path = hh_data / "mt_bench_votes" / "votes.jsonl.gz"
    votes, report = read_judgements(path, "mt-bench")
    assert len(votes) == report.rows == 1821
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    outcome = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}
    expected = WinMatrix(Comparison(r["model_a"], r["model_b"], outcome[r["winner"]]) for r in rows)
    found = WinMatrix(Comparison(*vote.models, PREFERS_A[vote.verdicts[OVERALL]]) for vote in votes)
    assert found.models == expected.models
    for one in found.models:
        for other in found.models:
            assert found.record(one, other) == expected.record(one, other)
    assert len({vote.pair for vote in votes}) == len(
        {(r["question_id"], r["turn"], *sorted((r["model_a"], r["model_b"]))) for r in rows}
    )
    assert all(vote.work is None and math.isnan(vote.seconds) for vote in votes)


def test_votes_on_two_models_are_on_one_pair_whichever_is_named_first(tmp_path):
    vote = {"judge": "j", "question_id": 81, "turn": 2, "model_a": "x", "model_b": "y"}
    path = write(
        tmp_path / "arena" / "v.jsonl",
        [
            {**vote, "winner": "model_b"},
            {**vote, "model_a": "y", "model_b": "x", "winner": "model_a"},
            {**vote, "winner": "tie (bothbad)"},
            {**vote, "winner": "nobody"},
            {**vote, "model_b": "x", "winner": "tie"},
            {**vote, "judge": ["gpt-4", "pair"], "winner": "tie"},
            {**vote, "winner": "tie", "tstamp": math.nan},
        ],
    )
    votes, report = read_judgements(path, "mt-bench")
    assert {vote.pair for vote in votes} == {"arena/v/81/2/x/y"}
    assert [vote.verdicts[OVERALL] for vote in votes] == ["b", "b", "bad"]
    assert [bad.reason for bad in report.bad] == [
        "unknown winner 'nobody'",
        "a model compared with itself",
        "judge that is not text",
        "tstamp that is not finite",
    ]
    lines = ["judge,question_id,turn,model_a,model_b,winner", "j,81,2,y,x,model_a"]
    again, _ = read_judgements(write(tmp_path / "arena" / "v.csv", lines), "mt-bench")
    assert again == votes[:1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pair": None}, "no pair"),
        ({"assessor": " "}, "empty assessor"),
        ({"verdicts": {"helpful": "a"}}, "no overall verdict"),
        ({"verdicts": {OVERALL: "x"}}, "unknown verdict 'x'"),
        ({"verdicts": "a"}, "verdicts that are not given by criterion"),
        ({"first": "left"}, "unknown first 'left'"),
        ({"kind": "robot"}, "unknown kind 'robot'"),
        ({"truth": "yes"}, "unknown truth 'yes'"),
        ({"at": math.nan}, "at that is not finite"),
        ({"at": math.inf}, "at that is not finite"),
        ({"repeat": 1}, "repeat that is neither true nor false"),
        ({"words_a": 1.5}, "words_a that is not a whole number"),
        ({**WORK, "answer_b": ""}, "empty reply"),
        *(
            ({name: "x\0"}, NUL)
            for name in ("pair", "assessor", "id", "model_a", "model_b", "comment", "doubt")
        ),
        ({"verdicts": {OVERALL: "a", "\0": "a"}}, NUL),
    ],
)
def test_a_bad_judgement_is_left_out_with_its_line_and_the_reason(tmp_path, change, reason):
    good = {"pair": 4, "assessor": "ann", "verdicts": {OVERALL: "a"}}
    path = write(tmp_path / "j.jsonl", [good, {**good, **change}])
    found, report = read_judgements(path, "pavlov")
    assert found == [Judgement("4", "ann", {OVERALL: "a"})]
    assert [(bad.line, bad.reason) for bad in report.bad] == [(2, reason)]


def test_an_annotation_by_somebody_known_as_another_kind_is_left_out_alone(tmp_path):
    given = [Judgement(f"{n}", "ann", {OVERALL: "a"}, models=("x", "y")) for n in range(2)]
    path = tmp_path / "j.json"
    write_judgements([*given, replace(given[0], pair="2", kind="model")], path)
    found, report = read_judgements(path, "label-studio", {})
    assert found == given
    assert [(bad.line, bad.reason) for bad in report.bad] == [
        (3, "'ann' is a model, but known as a person")
    ]


def test_a_file_that_is_not_of_the_form_is_refused(tmp_path):
    path = write(tmp_path / "j.jsonl", [WORK])
    with pytest.raises(DataError, match="is no form of judgements: pavlov, mt-bench"):
        read_judgements(path, "csv")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"\*\.json is what Label Studio exports"):
        read_judgements(path, "label-studio")
    with pytest.raises(DataError, match="there is no data file"):
        read_judgements(tmp_path / "none.json", "label-studio")


# Judgements that are written

texts = st.text(st.characters(exclude_characters="\x00", codec="utf-8"), max_size=8)
replies = st.text(
    st.characters(exclude_characters="\x00", codec="utf-8"), min_size=1, max_size=8
).filter(str.strip)
finite = st.floats(allow_nan=False, allow_infinity=False)
verdicts = st.sampled_from(VERDICTS)


def same_text(answers: tuple[Answer, Answer]) -> bool:
    return answers[0].text.strip() == answers[1].text.strip()


works = st.builds(
    lambda turn, answers, source, priority, honeypot: Work(
        (Message("user", turn),), *answers, source, priority, honeypot
    ),
    replies,
    st.tuples(*[st.builds(Answer, replies, texts, texts, st.booleans())] * 2).filter(
        lambda answers: not same_text(answers)
    ),
    texts,
    finite,
    st.none() | st.builds(Honeypot, verdicts, texts),
)
judgements = st.builds(
    lambda overall, criteria, seconds, work, **more: Judgement(
        verdicts={OVERALL: overall, **criteria},
        work=work,
        **({"seconds": seconds} if seconds is not None else {}),
        **more,
    ),
    pair=replies,
    assessor=replies,
    overall=verdicts,
    criteria=st.dictionaries(st.sampled_from((*CRITERIA, "clarity")), verdicts),
    first=st.sampled_from(("a", "b", "")),
    seconds=st.none() | finite,
    at=finite,
    kind=st.sampled_from(("person", "simulated", "model")),
    truth=st.none() | verdicts,
    repeat=st.booleans(),
    words=st.tuples(st.integers(0, 9999), st.integers(0, 9999)),
    models=st.tuples(texts, texts),
    comment=texts,
    doubt=texts,
    work=st.none() | works,
)
FORMS = {
    "j.jsonl": "pavlov",
    "j.jsonl.gz": "pavlov",
    "j.parquet": "pavlov",
    "j.json": "label-studio",
}


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=40)
@given(given=st.lists(judgements, max_size=4))
def test_judgements_come_back_as_they_were_written(name, given):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / name
        write_judgements(given, path)
        assert [file.name for file in path.parent.iterdir()] == [name]
        found, report = read_judgements(path, FORMS[name])
    assert not report.bad
    if name == "j.json":
        # Those of a pair stand together in a task.
        keys = [(each.pair, each.work, each.models, each.truth) for each in given]
        given = [given[at] for at in sorted(range(len(given)), key=lambda at: keys.index(keys[at]))]
    assert found == given


def test_what_label_studio_gets_is_a_task_for_a_pair_with_an_annotation_for_a_judgement(tmp_path):
    told = Judgement("p1", "ann@example.org", {OVERALL: "b", "honest": "tie"}, work=TEA)
    told = replace(told, seconds=4.5, at=86400.0, comment="Rude.")
    write_judgements(
        [told, replace(told, assessor="ben", verdicts={OVERALL: "tie"}, comment="")],
        tmp_path / "j.json",
    )
    (only,) = json.loads((tmp_path / "j.json").read_text())
    assert only["data"]["answer_a"] == "In moderation." and only["data"]["model_b"] == "small"
    first, second = only["annotations"]
    assert first["completed_by"] == {"email": "ann@example.org"}
    assert (first["lead_time"], first["created_at"]) == (4.5, "1970-01-02T00:00:00Z")
    said = {each["from_name"]: (each["type"], each["value"]) for each in first["result"]}
    assert said == {
        "pairwise": ("pairwise", {"selected": "right"}),
        "honest": ("choices", {"choices": ["tie"]}),
        "comment": ("textarea", {"text": ["Rude."]}),
    }
    assert [each["value"] for each in second["result"]] == [{"choices": ["tie"]}]
    # What Label Studio drops on the way through it costs nothing that it shows.
    for annotation in only["annotations"]:
        del annotation["pavlov"]
    path = write(tmp_path / "back.json", [only])
    found, _ = read_judgements(path, "label-studio")
    assert found[0] == told


def test_parquet_has_the_stated_columns_also_without_rows(tmp_path):
    write_judgements([], tmp_path / "j.parquet")
    assert pq.read_schema(tmp_path / "j.parquet").equals(JUDGEMENT_SCHEMA)
    assert read_judgements(tmp_path / "j.parquet", "pavlov")[0] == []


def test_an_export_that_fails_leaves_the_old_file_as_it_was(tmp_path):
    path = tmp_path / "j.jsonl"
    write_judgements([Judgement("p", "ann", {OVERALL: "a"})], path)
    before = path.read_bytes()
    bad = Judgement("p", "ann", {OVERALL: "a"}, comment="\ud800")
    for name in ("j.jsonl", "j.parquet", "j.json"):
        with pytest.raises(DataError, match="not valid Unicode"):
            write_judgements([bad], tmp_path / name)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["j.jsonl"]
    with pytest.raises(DataError, match=r"name the file \*\.jsonl"):
        write_judgements([], tmp_path / "j.csv")
    with pytest.raises(DataError, match="cannot be written"):
        write_judgements([], path / "j.jsonl")


def test_models_of_a_judgement_are_those_of_its_work():
    told = Judgement("p", "ann", {OVERALL: "a"}, models=("x", "y"))
    assert told.models == ("x", "y")
    assert replace(told, work=TEA).models == ("big", "small")
    assert replace(replace(told, work=TEA), work=None).models == ("big", "small")
