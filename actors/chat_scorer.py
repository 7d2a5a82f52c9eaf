"""A bank of the ensemble that chooses among candidates."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from actors.gauges import in_ray_actor
from cluster.guard import Guard
from models.reward_model import BankAnswers, RewardModel, ask_bank
from models.trunk import TokenRow
from rlhf.records import Message


class ChatScorer:
    """One bank of a reward model. What comes while a pass runs is read in the next one together, so
    that candidates of one conversation share their reading of it."""

    def __init__(self, model: str, bank: int, gpus: float = 0) -> None:
        self._guard = Guard(with_parent=in_ray_actor())
        self._model = RewardModel.load(Path(model)).part(bank)
        self._model.trunks("cuda" if gpus else "cpu")
        self._waiting: list[tuple[tuple[TokenRow, ...], asyncio.Future[BankAnswers]]] = []
        self._reading: asyncio.Task[None] | None = None

    def version(self) -> str:
        """The reward model's version."""
        return self._model.card.version

    async def judge(self, messages: Sequence[Message], text: str, finished: bool) -> BankAnswers:
        """What the bank's members say of one answer.

        Raises:
            ModelError: the answer cannot be tokenised.
        """
        row = self._model.tokenise((messages, text, finished))
        cut = not self._model.reads_to_its_end((messages, text, finished), row)
        said = asyncio.get_running_loop().create_future()
        self._waiting.append((row, said))
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        return replace(await said, cut=cut)

    async def _read(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                batch = [(row, said) for row, said in batch if not said.done()]
                try:
                    found = await asyncio.to_thread(self._judge, [row for row, _ in batch])
                    for (_, said), answers in zip(batch, found, strict=True):
                        if not said.done():
                            said.set_result(answers)
                except Exception as error:
                    for _, said in batch:
                        if not said.done():
                            said.set_exception(error)
        finally:
            self._reading = None

    def _judge(self, rows: Sequence[tuple[TokenRow, ...]]) -> list[BankAnswers]:
        if not rows:
            return []
        (features_NFH,) = self._model.features(rows)
        [heads] = self._model.banks
        return [ask_bank(heads, features_NFH[at : at + 1]) for at in range(len(rows))]
