r"""The raw HH-RLHF form: a whole conversation as one string.

::

    \n\nHuman: Is tea healthy?\n\nAssistant: It can be.\n\nHuman: And coffee?\n\nAssistant: Yes.

Only ``\n\nHuman:`` and ``\n\nAssistant:`` begin a turn; "Human:" inside a line is text. Contents
are stripped of surrounding white space. Lines may end as on Windows; they end in ``\n`` afterwards.

Consecutive turns of one role are merged, joined by a blank line: annotators now and then sent two
messages in a row, and chat templates want roles to alternate. One boundary is never merged over,
the last ``\n\nAssistant:``: what follows it is the reply, in `split_reply`. A reply in which the
model wrote that marker itself therefore lengthens the prompt, so that the pair's prompts differ
and the pair is reported, not learned from with its flaw edited away.
"""

from __future__ import annotations

import re

from rlhf.records import Message

_START = "\n\nHuman:"
_REPLY = "\n\nAssistant:"
_MARKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
    r"""Whether `text` is in the raw HH-RLHF form: it starts with ``\n\nHuman:``."""
    return _plain_lines(text).startswith(_START)


def is_nearly_prompt(text: str) -> bool:
    """Whether `text` waits for the assistant as a transcript does, but is none: its last line is
    ``Assistant:``, or it begins with ``Human:`` and ends in that."""
    if is_transcript(text) or not text.rstrip().endswith("Assistant:"):
        return False
    return (
        text.lstrip().startswith("Human:") or text.rstrip().splitlines()[-1].strip() == "Assistant:"
    )


def parse_transcript(text: str) -> tuple[Message, ...]:
    r"""The conversation in `text`, turns of one role in a row merged.

    Example: ``parse_transcript("\n\nHuman: Hi\n\nAssistant: Hello")`` gives
    ``(Message("user", "Hi"), Message("assistant", "Hello"))``.

    Raises:
        ValueError: `text` is no transcript, a turn is empty, or the last assistant's turn is
            ("empty reply").
    """
    turns = _turns(text)
    if turns[-1] == Message("assistant", ""):
        raise ValueError("empty reply")
    if not all(turn.content for turn in turns):
        raise ValueError("empty turn in the transcript")
    return _merge(turns)


def parse_prompt(text: str) -> tuple[Message, ...]:
    r"""A transcript that waits for a reply, with or without a closing ``\n\nAssistant:``.

    Raises:
        ValueError: as in `parse_transcript`.
    """
    return parse_transcript(_plain_lines(text).rstrip().removesuffix(_REPLY))


def reply_to_prompt(text: str) -> str:
    """A reply that stands apart from its prompt, a transcript: as `split_reply` gives it."""
    return _plain_lines(text).strip()


def split_reply(text: str) -> tuple[tuple[Message, ...], str]:
    """The conversation up to the last reply, and that reply, which may be empty.

    Turns may be empty too: whoever reads a pair has its prompts and replies to compare first.

    Raises:
        ValueError: `text` is no transcript or does not end in an assistant's turn.
    """
    *prompt, reply = _turns(text)
    if reply.role != "assistant":
        raise ValueError("transcript that does not end in an assistant turn")
    return _merge(prompt), reply.content


def _plain_lines(text: str) -> str:
    return text.replace("\r\n", "\n")


def _turns(text: str) -> list[Message]:
    if not is_transcript(text):
        raise ValueError("transcript that does not start with a blank line and Human:")
    _, *parts = _MARKER.split(_plain_lines(text))
    return [
        Message(_ROLES[speaker], content.strip())
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _merge(turns: list[Message]) -> tuple[Message, ...]:
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            merged[-1] = Message(turn.role, f"{merged[-1].content}\n\n{turn.content}")
        else:
            merged.append(turn)
    return tuple(merged)
