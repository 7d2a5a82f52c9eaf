"""How prompt and reply share a row of the reward model."""

from __future__ import annotations


def prompt_room(row_tokens: int) -> int:
    """Tokens that a prompt keeps at most, its last ones: a third, whatever the reply, so that
    replies to one prompt share its pass."""
    return row_tokens // 3


def reply_room(row_tokens: int, prompt_tokens: int) -> int:
    """Tokens of a reply that are read behind a prompt of `prompt_tokens`; what stands beyond is cut
    off, with the token that ends the turn."""
    return row_tokens - min(prompt_tokens, prompt_room(row_tokens))
