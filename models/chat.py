"""Tokenizer and chat template: how a conversation becomes tokens, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
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

        The template's control tokens are real ones, and so are those that a message's text spells:
        messages are not escaped.

        Raises:
            ModelError: the template refuses the conversation, e.g. for its system turn.
        """
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=True,
                tokenize=False,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise ModelError(
                f"the chat template refuses this conversation: {_first_line(error)}"
            ) from None
        return self._encode(str(text))

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
