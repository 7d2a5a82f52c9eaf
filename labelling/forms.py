"""What a row of a file says of a pair to judge, or of a judgement: every form that is recognised.

Each function returns what the row says or raises `ValueError` with the reason.

| form of a row | fields                                                            | gives      |
|---------------|-------------------------------------------------------------------|------------|
| labelling     | prompt, answer_a, answer_b                                        | work       |
| pair          | prompt, chosen, rejected and its kin, see `models/row_forms.py`   | work       |
| LLMBar        | input, output_1, output_2, label (1 or 2: the better one)         | work       |
| Pavlov        | pair, assessor, verdicts; the labelling form where texts are kept | judgement  |
| MT-Bench      | judge, model_a, model_b, question_id, turn, winner                | judgement  |

The labelling form may carry model_a, checkpoint_a and finished_a, the same of b, source, priority,
honeypot (the known verdict) and explanation; a pair chosen_model, chosen_checkpoint and
chosen_finished, the same of rejected. The Pavlov form may carry every other field of `Judgement`.
Any other field is ignored.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

from labelling.records import (
    VERDICTS,
    Answer,
    Honeypot,
    Judgement,
    Kind,
    Verdict,
    Work,
    flipped,
)
from models.data_files import Row
from models.row_forms import checked_text, flag, number, optional_text, pair_of, prompt_of
from rlhf.records import OVERALL, Message
from rlhf.seeding import derive_seed

_WINNERS: dict[str, Verdict] = {
    "model_a": "a",
    "model_b": "b",
    "tie": "tie",
    "tie (bothbad)": "bad",
    "bothbad": "bad",
}


def work_of(row: Row, source: str, *, honeypots: bool = False) -> Work:
    """A pair to judge; `source` is the file's, for rows that name none.

    Args:
        honeypots: whether pairs and LLMBar rows, whose better answer is known, become honeypots.
            A pair does where its label is 1, 0 or 0.5: no soft label is a known answer.
    """
    honeypot: Honeypot | None
    if row.get("answer_a") is not None or row.get("answer_b") is not None:
        prompt = _prompt(row, "prompt")
        a, b = _answer(row, "a"), _answer(row, "b")
        honeypot = _honeypot(row)
    elif row.get("output_1") is not None or row.get("output_2") is not None:
        prompt = _prompt(row, "input")
        a, b = (Answer(_text(row, name)) for name in ("output_1", "output_2"))
        honeypot = _known(row, _llmbar_verdict(row)) if honeypots else None
    elif row.get("chosen") is not None or row.get("rejected") is not None:
        prompt, a, b, verdict = _shuffled(row)
        honeypot = _known(row, verdict) if honeypots and verdict else None
    else:
        raise ValueError("no two answers")
    source = optional_text(row, "source", source)
    return Work(prompt, a, b, source, _finite(row, "priority"), honeypot)


def work_row(work: Work) -> Row:
    """A pair to judge in the labelling form; `work_of` gives the same pair back."""
    honeypot = work.honeypot
    return {
        "prompt": [{"role": turn.role, "content": turn.content} for turn in work.prompt],
        "answer_a": work.a.text,
        "answer_b": work.b.text,
        "model_a": work.a.model,
        "model_b": work.b.model,
        "checkpoint_a": work.a.checkpoint,
        "checkpoint_b": work.b.checkpoint,
        "finished_a": work.a.finished,
        "finished_b": work.b.finished,
        "source": work.source,
        "priority": work.priority,
        "honeypot": honeypot.verdict if honeypot else None,
        "explanation": honeypot.explanation if honeypot else None,
    }


def judgement_of(row: Row, source: str) -> Judgement:
    """A judgement in the Pavlov form, as `judgement_row` writes it."""
    return Judgement(
        pair=_id(row, "pair"),
        assessor=_id(row, "assessor"),
        verdicts=_verdicts(row.get("verdicts")),
        first=cast(Literal["a", "b", ""], _one_of(row, "first", ("a", "b", ""), "")),
        seconds=number(row, "seconds", default=math.nan),
        at=_finite(row, "at"),
        kind=cast(Kind, _one_of(row, "kind", get_args(Kind), "person")),
        truth=verdict_of(row["truth"], "truth") if row.get("truth") is not None else None,
        repeat=flag(row, "repeat", default=False),
        words=(_whole(row, "words_a"), _whole(row, "words_b")),
        models=(optional_text(row, "model_a"), optional_text(row, "model_b")),
        comment=optional_text(row, "comment"),
        doubt=optional_text(row, "doubt"),
        work=work_of(row, source) if row.get("answer_a") is not None else None,
        id=optional_text(row, "id"),
    )


def judgement_row(judgement: Judgement) -> Row:
    """A judgement in the Pavlov form; a time that is not known is null."""
    seconds = judgement.seconds
    texts = work_row(judgement.work) if judgement.work else {}
    return {
        "id": judgement.id,
        "pair": judgement.pair,
        "assessor": judgement.assessor,
        "kind": judgement.kind,
        "verdicts": dict(judgement.verdicts),
        "first": judgement.first,
        "seconds": None if math.isnan(seconds) else seconds,
        "at": judgement.at,
        "truth": judgement.truth,
        "repeat": judgement.repeat,
        "words_a": judgement.words[0],
        "words_b": judgement.words[1],
        "comment": judgement.comment,
        "doubt": judgement.doubt,
        "model_a": judgement.models[0],
        "model_b": judgement.models[1],
        **texts,
    }


def vote_of(row: Row, source: str) -> Judgement:
    """A judgement in the form of MT-Bench's and Chatbot Arena's votes: models, and no texts.

    Whichever of the two models a row names first, answer a is that of the alphabetically first: so
    all votes on two models' answers to a question are votes on one pair.
    """
    models = [_text(row, name) for name in ("model_a", "model_b")]
    if models[0] == models[1]:
        raise ValueError("a model compared with itself")
    winner = _text(row, "winner")
    if winner not in _WINNERS:
        raise ValueError(f"unknown winner {winner[:20]!r}")
    verdict = _WINNERS[winner]
    if models[0] > models[1]:
        models.reverse()
        verdict = flipped(verdict)
    question, turn = _id(row, "question_id"), _whole(row, "turn", default=1)
    return Judgement(
        pair="/".join([source, question, str(turn), *models]),
        assessor=_id(row, "judge"),
        verdicts={OVERALL: verdict},
        at=_finite(row, "tstamp"),
        models=(models[0], models[1]),
    )


def verdict_of(value: object, name: str) -> Verdict:
    """A verdict; `name` is what it is of, for the reason."""
    for verdict in VERDICTS:
        if value == verdict:
            return verdict
    raise ValueError(f"unknown {name} {str(value)[:20]!r}")


def _shuffled(row: Row) -> tuple[tuple[Message, ...], Answer, Answer, Verdict | None]:
    """Prompt, answers a and b, and the known verdict: a hash of the texts says which reply is a, so
    that neither the file nor its order gives the better one away."""
    pair = pair_of(row, "", 0)
    chosen = Answer(
        pair.chosen,
        optional_text(row, "chosen_model"),
        optional_text(row, "chosen_checkpoint"),
        pair.chosen_finished,
    )
    rejected = Answer(
        pair.rejected,
        optional_text(row, "rejected_model"),
        optional_text(row, "rejected_checkpoint"),
        pair.rejected_finished,
    )
    texts = sorted((pair.chosen, pair.rejected))
    chosen_is_a = texts[derive_seed("answer a", *texts) % 2] == pair.chosen
    a, b = (chosen, rejected) if chosen_is_a else (rejected, chosen)
    known: dict[float, Verdict] = {
        1.0: "a" if chosen_is_a else "b",
        0.0: "b" if chosen_is_a else "a",
        0.5: "tie",
    }
    return pair.prompt, a, b, known.get(pair.label)


def _prompt(row: Row, name: str) -> tuple[Message, ...]:
    if row.get(name) is None:
        raise ValueError("no prompt")
    return prompt_of(row[name])


def _answer(row: Row, side: str) -> Answer:
    return Answer(
        _text(row, f"answer_{side}"),
        optional_text(row, f"model_{side}"),
        optional_text(row, f"checkpoint_{side}"),
        flag(row, f"finished_{side}", default=True),
    )


def _honeypot(row: Row) -> Honeypot | None:
    if row.get("honeypot") is None:
        return None
    return _known(row, verdict_of(row["honeypot"], "honeypot verdict"))


def _known(row: Row, verdict: Verdict) -> Honeypot:
    return Honeypot(verdict, optional_text(row, "explanation"))


def _llmbar_verdict(row: Row) -> Verdict:
    label = number(row, "label", default=math.nan)
    if label not in (1, 2):
        raise ValueError("label that is neither 1 nor 2")
    return "a" if label == 1 else "b"


def _verdicts(value: object) -> dict[str, Verdict]:
    """Verdicts by criterion: an object in JSON, pairs in what pyarrow makes of a map."""
    try:
        said: dict[Any, Any] = dict(cast(Any, value))
    except (TypeError, ValueError):
        raise ValueError("verdicts that are not given by criterion") from None
    if OVERALL not in said:
        raise ValueError("no overall verdict")
    return {
        checked_text(name, "criterion"): verdict_of(verdict, "verdict")
        for name, verdict in said.items()
    }


def _text(row: Row, name: str) -> str:
    if row.get(name) is None:
        raise ValueError(f"no {name}")
    return checked_text(row[name], name)


def _id(row: Row, name: str) -> str:
    """Text that is not empty, or a whole number as text."""
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not (text := _text(row, name)).strip():
        raise ValueError(f"empty {name}")
    return text


def _one_of(row: Row, name: str, known: tuple[str, ...], default: str) -> str:
    value = optional_text(row, name, default)
    if value not in known:
        raise ValueError(f"unknown {name} {value[:20]!r}")
    return value


def _whole(row: Row, name: str, default: int = 0) -> int:
    value = float(number(row, name, default=default))
    if not value.is_integer():
        raise ValueError(f"{name} that is not a whole number")
    return int(value)


def _finite(row: Row, name: str) -> float:
    value = number(row, name, default=0.0)
    if not math.isfinite(value):
        raise ValueError(f"{name} that is not finite")
    return value
