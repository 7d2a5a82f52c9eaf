"""The order in which prompts are admitted, resumable from one number."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from rlhf.errors import DataError
from rlhf.records import Prompt
from rlhf.seeding import derive_seed


class PromptCursor:
    """Walks the prompts epoch by epoch, each epoch in its own shuffled order.

    The whole state is `position`, the number of prompts handed out: every step takes exactly
    ``groups_per_step`` groups in admission order, so after step s a resumed run starts at
    ``s * groups_per_step`` and admits what the unbroken run would have.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, position: int = 0) -> None:
        if not prompts:
            raise DataError("no prompts are left to train on")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])
        self.position = position

    @property
    def fingerprint(self) -> str:
        """Hash of prompts and seed: a run resumes only on the same ones."""
        digest = hashlib.sha256(str(self._seed).encode())
        for prompt in self._prompts:
            digest.update(repr((prompt.id, prompt.messages)).encode())
        return digest.hexdigest()[:16]

    def next(self) -> tuple[Prompt, int]:
        """The next prompt and its epoch."""
        epoch, index = divmod(self.position, len(self._prompts))
        if self._order[0] != epoch:
            order = list(range(len(self._prompts)))
            random.Random(derive_seed(self._seed, "epoch", epoch)).shuffle(order)
            self._order = (epoch, order)
        self.position += 1
        return self._prompts[self._order[1][index]], epoch
