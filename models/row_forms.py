"""What a row of a data file says: every form that is recognised, and why a row is left out.

Each function returns what the row says or raises `ValueError` with the reason.

| form of a row       | fields                                                      | gives        |
|---------------------|-------------------------------------------------------------|--------------|
| conversational pair | prompt, chosen, rejected, each text or a list of messages   | pair, prompt |
| the same, implicit  | chosen, rejected: messages from the first turn to the reply | pair, prompt |
| raw HH-RLHF         | chosen, rejected: transcripts, see `models/transcripts.py`  | pair, prompt |
| single completion   | prompt, completion, each text or a list of messages         | row to score |
| conversation        | messages; also a completion, or a pair's better reply       | conversation |
| MT-Bench, Vicuna    | turns: the first one is taken                               | prompt       |
| GSM8K               | question                                                    | prompt       |
| Self-Instruct       | instruction, with its input below it where there is one     | prompt       |
| LLMBar              | input                                                       | prompt       |

A text of its own behind a prompt that is a raw HH-RLHF transcript is the reply that the whole
transcript would hold: stripped.

A pair may carry label, weight, margin, criterion (or criteria), source, chosen_finished and
rejected_finished, a single completion or conversation source and finished (or finish_reason); any
other field is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.data_files import Row
from models.transcripts import (
    is_nearly_prompt,
    is_transcript,
    parse_prompt,
    reply_to_prompt,
    split_reply,
)
from rlhf.records import Conversation, Message, PreferencePair, Prompt

FIELDS = frozenset(
    {
        *("prompt", "chosen", "rejected", "completion", "messages"),
        *("turns", "question", "instruction", "instances", "input", "id"),
        *("label", "weight", "margin", "criterion", "criteria", "source"),
        *("chosen_finished", "rejected_finished", "finished", "finish_reason"),
    }
)
"""What is read of a row, whatever its form."""


@dataclass(frozen=True, slots=True)
class SingleCompletion:
    """A reply to score that stands alone; one that was cut off at a limit is not finished."""

    prompt: tuple[Message, ...]
    completion: str
    source: str = ""
    finished: bool = True


def pair_of(row: Row, source: str, line: int) -> PreferencePair:
    """A pair; `source` is the file's, for rows that name none."""
    prompt, chosen, rejected = _prompt_and_replies(row)
    if not chosen.strip() or not rejected.strip():
        raise ValueError("empty reply")
    if chosen.strip() == rejected.strip():
        raise ValueError("equal replies")
    return PreferencePair(
        _checked_prompt(prompt),
        chosen,
        rejected,
        label=number(row, "label", default=1.0),
        weight=number(row, "weight", default=1.0),
        margin=number(row, "margin", default=0.0),
        source=optional_text(row, "source", source),
        criterion=_criterion(row),
        chosen_finished=flag(row, "chosen_finished", default=True),
        rejected_finished=flag(row, "rejected_finished", default=True),
    )


def scoring_row_of(row: Row, source: str, line: int) -> PreferencePair | SingleCompletion:
    """A pair, or a single completion."""
    if row.get("completion") is None or row.get("chosen") is not None:
        return pair_of(row, source, line)
    turns, completion = _reply(row, "completion")
    if not completion.strip():
        raise ValueError("empty reply")
    prompt = _checked_prompt(_one_prompt(row, turns))
    finished = flag(row, "finished", default=row.get("finish_reason") != "length")
    return SingleCompletion(prompt, completion, optional_text(row, "source", source), finished)


def prompt_of(value: object) -> tuple[Message, ...]:
    """A prompt given by itself: text, a raw HH-RLHF transcript, or a list of messages."""
    return _checked_prompt(_conversation(value))


def conversation_of(row: Row, source: str, line: int) -> Conversation:
    """A conversation to learn from: messages, prompt and completion, or a pair's better reply."""
    finished = flag(row, "finished", default=row.get("finish_reason") != "length")
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
        if not any(message.role == "assistant" for message in messages):
            raise ValueError("conversation without an assistant turn")
        if messages[-1].role != "assistant":
            raise ValueError("conversation that does not end in an assistant turn")
        prompt, reply = messages[:-1], messages[-1].content
    else:
        name = "completion"
        if row.get("completion") is None:
            name = _better(row)
            finished = flag(row, f"{name}_finished", default=True)
        turns, reply = _reply(row, name)
        prompt = _one_prompt(row, turns)
    if not reply.strip():
        raise ValueError("empty reply")
    whole = (*_checked_prompt(prompt), Message("assistant", reply))
    return Conversation(whole, optional_text(row, "source", source), finished)


def _better(row: Row) -> str:
    """The field of a pair's better reply."""
    label = number(row, "label", default=1.0)
    if not 0 <= label <= 1:
        raise ValueError("label that is not between 0 and 1")
    if number(row, "weight", default=1.0) == 0:
        raise ValueError("weight 0")
    if label == 0.5:
        raise ValueError("tie: neither reply is better")
    return "chosen" if label > 0.5 else "rejected"


class DistinctPrompts:
    """Parses prompts and knows those it has parsed before: None for a repeat."""

    def __init__(self) -> None:
        self._conversations: set[tuple[Message, ...]] = set()
        self._ids: set[str] = set()

    def __call__(self, row: Row, source: str, line: int) -> Prompt | None:
        messages = _checked_prompt(_prompt_of_any_form(row))
        source = optional_text(row, "source", source)
        own_id = row.get("id")
        wanted = str(own_id) if isinstance(own_id, int) else optional_text(row, "id")
        if messages in self._conversations:
            return None
        self._conversations.add(messages)
        return Prompt(self._free_id(wanted or f"{source}/{line}"), messages, source)

    def _free_id(self, wanted: str) -> str:
        free, count = wanted, 1
        while free in self._ids:
            count += 1
            free = f"{wanted}#{count}"
        self._ids.add(free)
        return free


def _prompt_of_any_form(row: Row) -> tuple[Message, ...]:
    if row.get("prompt") is not None:
        return _conversation(row["prompt"])
    if row.get("turns") is not None:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns:
            raise ValueError("turns that are not a list of texts")
        return (Message("user", checked_text(turns[0], "turns")),)
    if row.get("question") is not None:
        return (Message("user", checked_text(row["question"], "question")),)
    if row.get("instruction") is not None:
        return (Message("user", _instruction(row)),)
    if row.get("input") is not None:
        return (Message("user", checked_text(row["input"], "input")),)
    if row.get("chosen") is not None:
        return _prompt_and_replies(row)[0]
    raise ValueError("no prompt")


def _instruction(row: Row) -> str:
    """The instruction and, below it, the (first) input that it speaks of."""
    instruction = checked_text(row["instruction"], "instruction")
    given = row.get("input")
    match row.get("instances"):
        case [{"input": first}, *_] if given is None:
            given = first
    if given is None or not checked_text(given, "input").strip():
        return instruction
    return f"{instruction}\n\n{given}"


def _prompt_and_replies(row: Row) -> tuple[tuple[Message, ...], str, str]:
    chosen_turns, chosen = _reply(row, "chosen")
    rejected_turns, rejected = _reply(row, "rejected")
    if chosen_turns != rejected_turns:
        raise ValueError("different prompts")
    return _one_prompt(row, chosen_turns), chosen, rejected


def _reply(row: Row, name: str) -> tuple[tuple[Message, ...], str]:
    """The reply in a field, and the turns that the field holds before it, often none."""
    value = row.get(name)
    if value is None:
        raise ValueError(f"no {name}")
    if isinstance(value, str):
        text = checked_text(value, name)
        if is_transcript(text):
            return split_reply(text)
        prompt = row.get("prompt")
        after_transcript = isinstance(prompt, str) and is_transcript(prompt)
        return (), reply_to_prompt(text) if after_transcript else text
    messages = _messages(value, name)
    if not messages or messages[-1].role != "assistant":
        raise ValueError(f"{name} that does not end in an assistant turn")
    return messages[:-1], messages[-1].content


def _one_prompt(row: Row, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The row's prompt: its own field, or the turns before the reply; both must agree."""
    if row.get("prompt") is None:
        if not turns:
            raise ValueError("no prompt")
        return turns
    prompt = _conversation(row["prompt"])
    if turns and turns != prompt:
        raise ValueError("different prompts")
    return prompt


def _conversation(value: object) -> tuple[Message, ...]:
    if isinstance(value, str):
        text = checked_text(value, "prompt")
        if is_nearly_prompt(text):
            raise ValueError(
                "prompt that ends in Assistant: but does not start with a blank line and Human:"
            )
        return parse_prompt(text) if is_transcript(text) else (Message("user", text),)
    return _messages(value, "prompt")


def _messages(value: object, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name} that is neither text nor a list of messages")
    return tuple(_message(item, name) for item in value)


def _message(value: object, name: str) -> Message:
    match value:
        case {"role": "system" | "user" | "assistant" as role, "content": str() as content}:
            return Message(role, checked_text(content, name))
        case {"role": str() as role, "content": str()}:
            raise ValueError(f"unknown role {role[:20]!r}")
    raise ValueError(f"{name} with a message that lacks a role or content in text")


def _checked_prompt(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages or messages[-1].role != "user":
        raise ValueError("prompt that does not end in a user turn")
    if not all(message.content.strip() for message in messages):
        raise ValueError("empty turn in the prompt")
    return messages


def checked_text(value: object, name: str) -> str:
    """A field that is text, and valid Unicode."""
    if not isinstance(value, str):
        raise ValueError(f"{name} that is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} that is not valid Unicode") from None
    return value


def optional_text(row: Row, name: str, default: str = "") -> str:
    """A field that is text where it is given."""
    return default if row.get(name) is None else checked_text(row[name], name)


def number(row: Row, name: str, default: float) -> float:
    """A number where it is given; whether it is in range is for the record to say."""
    value = row.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} that is not a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} that is too large") from None


def flag(row: Row, name: str, default: bool) -> bool:
    """True or false where it is given."""
    value = row.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{name} that is neither true nor false")
    return value


def _criterion(row: Row) -> str:
    """`criterion`, or `criteria`: one name, or a list of names."""
    criteria = row.get("criteria")
    if row.get("criterion") is not None or not isinstance(criteria, list):
        return optional_text(row, "criterion", optional_text(row, "criteria"))
    return ", ".join(checked_text(name, "criteria") for name in criteria)


def conversational(pair: PreferencePair) -> Row:
    """A pair as a row of `models.preferences.PAIR_SCHEMA`."""
    return {
        "prompt": [{"role": turn.role, "content": turn.content} for turn in pair.prompt],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "label": pair.label,
        "weight": pair.weight,
        "margin": pair.margin,
        "criterion": pair.criterion,
        "source": pair.source,
        "chosen_finished": pair.chosen_finished,
        "rejected_finished": pair.rejected_finished,
    }
