"""Conversations as tokens to learn from: the assistant's turns are, the others are read only.

Every assistant turn is tokenised as the engine would have sampled it: the prompt up to it by the
chat template, then the reply and, unless it was cut off, the end-of-turn token. A template under
which an earlier turn reads the same later on makes one example of the whole conversation; one that
rewrites the past (as those do that drop reasoning) makes an example of every turn. Shapes as in
`models.packing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.chat import ChatTokenizer
from models.packing import MAX_ROW_TOKENS, PackedBatch, Row
from rlhf.records import Conversation


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, and which of them are learnt: the assistant's, with their end-of-turn tokens."""

    token_ids: tuple[int, ...]
    learnt: tuple[bool, ...]

    @property
    def count(self) -> int:
        """How many tokens are learnt."""
        return sum(self.learnt)


def examples_of(conversation: Conversation, tokenizer: ChatTokenizer) -> list[Example]:
    """One example, or one for every assistant turn.

    Raises:
        ModelError: the template refuses the conversation.
    """
    turns: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    last = len(conversation.messages) - 1
    for place, message in enumerate(conversation.messages):
        if message.role == "assistant":
            prompt = tokenizer.prompt_ids(conversation.messages[:place])
            finished = conversation.finished or place < last
            turns.append((prompt, tokenizer.reply_ids(message.content, finished=finished)))
    examples: list[Example] = []
    for prompt, reply in turns:
        before = examples[-1] if examples else Example((), ())
        size = len(before.token_ids)
        if prompt[:size] == before.token_ids:
            learnt = (*before.learnt, *[False] * (len(prompt) - size), *[True] * len(reply))
            examples[-1:] = [Example((*prompt, *reply), learnt)]
        else:
            learnt = (*[False] * len(prompt), *[True] * len(reply))
            examples.append(Example((*prompt, *reply), learnt))
    return examples


def rows_of(examples: Sequence[Example], *, packing: bool, budget_tokens: int) -> list[Row]:
    """Rows for `models.packing`; `indices` are places among the examples.

    Packed, whole examples stand in a row of at most `budget_tokens` as replies to an empty prompt,
    so that each sees itself alone. Else an example is a row: what stands before its first learnt
    token is the prompt.
    """
    if not packing:
        return [
            Row(one.token_ids[:start], (one.token_ids[start:],), (place,))
            for place, one in enumerate(examples)
            for start in [one.learnt.index(True)]
        ]
    rows: list[Row] = []
    limit = min(MAX_ROW_TOKENS, budget_tokens)
    # Longest first fills rows well: the first that has room takes it.
    for place in sorted(range(len(examples)), key=lambda n: -len(examples[n].token_ids)):
        token_ids = examples[place].token_ids
        for at, row in enumerate(rows):
            if row.length + len(token_ids) <= limit:
                rows[at] = Row((), (*row.replies, token_ids), (*row.indices, place))
                break
        else:
            rows.append(Row((), (token_ids,), (place,)))
    return rows


def learnt_mask(examples: Sequence[Example], batch: PackedBatch) -> Tensor:
    """1 where a reply token of the batch is learnt, float32, shape (N, T)."""
    mask_NT = torch.zeros(batch.reply_ids_NT.shape, dtype=torch.float32)
    lengths = batch.reply_mask_NT.sum(dim=1).tolist()
    for n, (place, length) in enumerate(zip(batch.indices, lengths, strict=True)):
        # A prompt of its own row is cut off in front.
        mask_NT[n, :length] = torch.tensor(examples[place].learnt[-length:], dtype=torch.float32)
    return mask_NT.to(batch.reply_ids_NT.device)
