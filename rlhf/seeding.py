"""Seeds that depend on what is sampled, never on when or where."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**31) from names and numbers, e.g. ``(run, prompt, epoch, sibling)``.

    SHA-256 of the parts, so that it is the same on every machine and in every process.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
