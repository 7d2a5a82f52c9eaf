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
    # As expressions: a newline of the template's own right after a block is trimmed.
    "{{ message.role | capitalize }}{{ ':\\n' }}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""Used where a tokenizer brings no template of its own, as raw base models do not.

A turn begins on a line of its own: after a marker in the same line a reply would begin with the
space that it is written with in some turns and not in others. `_WITH_BOS` stands in front where the
tokenizer itself puts a beginning-of-sequence token before a text.
"""
_WITH_BOS = "{{ bos_token }}"
_MARK = "\ue000reply\ue001"
"""A reply that no template writes by itself."""


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
        if self._tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer in {folder} has no end-of-sequence token")
        if self.uses_default_template:
            bos = _WITH_BOS if self._begins_texts() else ""
            self._tokenizer.chat_template = bos + DEFAULT_TEMPLATE

    def _begins_texts(self) -> bool:
        """Whether the tokenizer puts a beginning-of-sequence token before a text by itself."""
        bos = self._tokenizer.bos_token_id
        return bos is not None and self._tokenizer("a")["input_ids"][0] == bos

    @cached_property
    def end_id(self) -> int:
        """The token that ends an assistant's turn: the first control token that the template
        writes after a reply (Gemma's ``<end_of_turn>``), else the end-of-sequence token."""
        try:
            messages = (Message("user", "?"), Message("assistant", _MARK))
            contents = [message.content for message in messages]
            text = self._rendered(messages, contents, answering=False)
        except ModelError:
            text = ""
        _, reply, after = text.rpartition(_MARK)
        end = self._control.search(after) if reply else None
        return self._eos_id if end is None else int(self._tokenizer.get_vocab()[end[0]])

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that a sampled reply may end with: `end_id`, and the end-of-sequence token where
        that is another one. With either the reply is finished."""
        return tuple(dict.fromkeys((self.end_id, self._eos_id)))

    @property
    def _eos_id(self) -> int:
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
        ends = "\x1f".join(map(str, self.end_ids))
        text = f"{self._vocabulary()}\x1f{self._tokenizer.chat_template}\x1f{ends}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of the conversation, up to where the assistant's next turn begins.

        Control tokens are those of the template alone: what spells one in a message is text, for a
        user who could end the turn and open another one would speak as the system.

        Raises:
            ModelError: the template refuses the conversation, e.g. for its system turn.
        """
        # A saved model brings it as its own; a tokenizer may also bring several templates by name.
        if self._tokenizer.chat_template in (DEFAULT_TEMPLATE, _WITH_BOS + DEFAULT_TEMPLATE):
            return self._by_default_template(messages)
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

    def _by_default_template(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """What `DEFAULT_TEMPLATE` writes, with replies as the tokens of `reply_ids`: what was
        sampled, or learnt, reads the same in the turns after it."""
        with_bos = self._tokenizer.chat_template.startswith(_WITH_BOS)
        token_ids: tuple[int, ...] = (int(self._tokenizer.bos_token_id),) if with_bos else ()
        text = ""
        for message in messages:
            text += f"{message.role.capitalize()}:\n"
            if message.role == "assistant":
                token_ids += self._encode(text, split_special_tokens=True)
                token_ids += self.reply_ids(message.content, finished=True)
                text = "\n\n"
            else:
                text += f"{message.content}\n\n"
        return token_ids + self._encode(f"{text}Assistant:\n", split_special_tokens=True)

    def _rendered(
        self, messages: Sequence[Message], contents: Sequence[str], *, answering: bool = True
    ) -> str:
        """The conversation by the template, with these contents for the messages' own and, if
        `answering`, up to where the assistant's next turn begins."""
        from jinja2 import TemplateError

        turns = [
            {"role": message.role, "content": content}
            for message, content in zip(messages, contents, strict=True)
        ]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, add_generation_prompt=answering, tokenize=False
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
