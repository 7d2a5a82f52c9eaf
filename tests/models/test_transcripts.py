"""Raw HH-RLHF transcripts: turns by their markers, or why not."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.transcripts import (
    is_nearly_prompt,
    is_transcript,
    parse_prompt,
    parse_transcript,
    split_reply,
)
from rlhf.records import Message


def test_a_transcript_becomes_turns() -> None:
    text = "\n\nHuman: Hi\n there \n\nAssistant:Hello.\n\nHuman: Bye\n\nAssistant:  Bye."
    assert parse_transcript(text) == (
        Message("user", "Hi\n there"),
        Message("assistant", "Hello."),
        Message("user", "Bye"),
        Message("assistant", "Bye."),
    )
    assert split_reply(text) == (parse_transcript(text)[:-1], "Bye.")


def test_only_markers_after_a_blank_line_begin_a_turn() -> None:
    reply = "She said\nHuman: no.  Assistant: yes\nAssistant: maybe\n\n Human: x\n\nHumans: y"
    assert parse_transcript(f"\n\nHuman: a Human: b\n\nAssistant: {reply}") == (
        Message("user", "a Human: b"),
        Message("assistant", reply),
    )


def test_turns_of_one_role_in_a_row_are_merged_but_the_last_reply_stands_alone() -> None:
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d"
    assert parse_transcript(text) == (Message("user", "a\n\nb"), Message("assistant", "c\n\nd"))
    assert split_reply(text) == ((Message("user", "a\n\nb"), Message("assistant", "c")), "d")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not start with"),
        ("Human: a\n\nAssistant: b", "does not start with"),
        ("\n\nAssistant: b", "does not start with"),
        ("\n\nHuman: a\n\nAssistant: ", "empty reply"),
        ("\n\nHuman: \n\nAssistant: b", "empty turn"),
        ("\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant: c", "empty turn"),
    ],
)
def test_a_transcript_that_cannot_be_used_says_why(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_transcript(text)


def test_a_prompt_transcript_may_close_with_the_assistants_marker() -> None:
    expected = (Message("user", "a"),)
    for text in ("\n\nHuman: a", "\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: \n"):
        assert parse_prompt(text) == expected


def test_lines_that_end_as_on_windows_are_the_same_transcript() -> None:
    text = "\n\nHuman: Hi\nthere\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: Bye.\nBye."
    windows = text.replace("\n", "\r\n")
    assert is_transcript(windows)
    assert parse_transcript(windows) == parse_transcript(text)
    assert split_reply(windows) == split_reply(text)
    waiting = "\n\nHuman: Hi\n\nAssistant:"
    assert parse_prompt(waiting.replace("\n", "\r\n")) == parse_prompt(waiting)


@pytest.mark.parametrize(
    ("text", "nearly"),
    [
        ("Human: a\n\nAssistant:", True),
        ("\nHuman: a\n\nAssistant: \n", True),
        ("Human:a Assistant:", True),
        ("Be brief.\r\n\r\nHuman: a\r\n\r\nAssistant:", True),
        ("\n\nHuman: a\n\nAssistant:", False),
        ("\r\n\r\nHuman: a\r\n\r\nAssistant:", False),
        ("Write an advertisement for a Research Assistant:", False),
        ("Human: what is that?", False),
        ("What does Assistant: mean?", False),
        ("", False),
    ],
)
def test_a_prompt_that_is_nearly_a_transcript_is_told_from_text(text: str, nearly: bool) -> None:
    assert is_nearly_prompt(text) is nearly


@given(st.text())
def test_any_text_is_a_transcript_or_says_why_not(text: str) -> None:
    assert is_transcript(text) == text.startswith("\n\nHuman:")
    try:
        messages = parse_transcript("\n\nHuman:" + text)
    except ValueError:
        return
    roles = [message.role for message in messages]
    assert roles[0] == "user"
    assert all(one != other for one, other in pairwise(roles))
