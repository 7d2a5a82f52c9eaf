"""Tokenizer and chat template: how a conversation becomes tokens, and back."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from rlhf.errors import ModelError
from rlhf.records import Message

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    # As an expression: a newline of the template's own right after a block is trimmed.
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""Used where a tokenizer brings no template of its own, as raw base models do not."""


class ChatTokenizer:
    """A Hugging Face tokenizer with a chat template, its own or `DEFAULT_TEMPLATE`."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # a damaged tokenizer fails in many ways
            raise ModelError(
                f"{folder} has no tokenizer that can be read: {_first_line(error)}"
            ) from None
        self.uses_default_template = not self._tokenizer.chat_template
        if self.uses_default_template:
            self._tokenizer.chat_template = DEFAULT_TEMPLATE
        if self._tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer in {folder} has no end-of-sequence token")

    @property
    def end_id(self) -> int:
        """The token that ends an assistant's turn."""
        return int(self._tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """A token for padding; never attended to, so any will do."""
        pad = self._tokenizer.pad_token_id
        return self.end_id if pad is None else int(pad)

    @property
    def size(self) -> int:
        """How many token ids there are."""
        return len(self._tokenizer)

    @property
    def vocabulary(self) -> str:
        """Hash of what token ids mean: two models with the same one read the same tokens."""
        return hashlib.sha256(self._vocabulary().encode()).hexdigest()[:16]

    def _vocabulary(self) -> str:
        return json.dumps(self._tokenizer.get_vocab(), sort_keys=True)

    @property
    def fingerprint(self) -> str:
        """Hash of vocabulary and template: what must agree for token ids to mean the same."""
        text = f"{self._vocabulary()}\x1f{self._tokenizer.chat_template}\x1f{self.end_id}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of the conversation, up to where the assistant's next turn begins.

        Control tokens are those of the template alone: what spells one in a message is text, for a
        user who could end the turn and open another one would speak as the system.

        Raises:
            ModelError: the template refuses the conversation, e.g. for its system turn.
        """
        contents = [message.content for message in messages]
        if not any(map(self._control.search, contents)):
            return self._encode(self._rendered(messages, contents))
        # Numbered stand-ins while the template writes, so that what spells a control token then is
        # the template's; it may leave out a message, or write one twice. Drawn, since a message
        # that knew them could spell them; of one length, whatever it spells.
        mark = f"\ue000{secrets.token_hex(8)}-"
        spelt: list[str] = []

        def stand_in(found: re.Match[str]) -> str:
            spelt.append(found[0])
            return f"{mark}{len(spelt) - 1}\ue001"

        text = self._rendered(messages, [self._control.sub(stand_in, each) for each in contents])
        token_ids: tuple[int, ...] = ()
        for place, part in enumerate(re.split(f"({self._control.pattern})", text)):
            said = re.sub(f"{mark}(\\d+)\ue001", lambda found: spelt[int(found[1])], part)
            token_ids += self._encode(said, split_special_tokens=place % 2 == 0)
        return token_ids

    def reply_ids(self, text: str, *, finished: bool) -> tuple[int, ...]:
        """Token ids of an assistant's reply; a finished one ends with the end-of-turn token.

        No other control token is in it: what spells one is text, for a reply that could end its
        turn and go on as the user would write its own praise.
        """
        token_ids = self._encode(text, split_special_tokens=True)
        return token_ids + ((self.end_id,) if finished else ())

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of completion tokens, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write tokenizer and template beside a model."""
        self._tokenizer.save_pretrained(folder)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Finds what spells a control token, the longest one where several would do."""
        added = self._tokenizer.added_tokens_decoder.values()
        spellings = {token.content for token in added if token.special}
        spellings |= set(self._tokenizer.all_special_tokens)
        return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))))

    def _rendered(self, messages: Sequence[Message], contents: Sequence[str]) -> str:
        """The conversation by the template, with these contents for the messages' own."""
        from jinja2 import TemplateError

        turns = [
            {"role": message.role, "content": content}
            for message, content in zip(messages, contents, strict=True)
        ]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=False
                )
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise ModelError(
                f"the chat template refuses this conversation: {_first_line(error)}"
            ) from None

    def _encode(self, text: str, *, split_special_tokens: bool = False) -> tuple[int, ...]:
        try:
            encoded = self._tokenizer(
                text, add_special_tokens=False, split_special_tokens=split_special_tokens
            )
            return tuple(encoded["input_ids"])
        except (UnicodeError, TypeError, ValueError) as error:
            raise ModelError(f"this text cannot be tokenised: {text[:60]!r} ({error})") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
