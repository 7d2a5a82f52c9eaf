"""The ensemble as it is asked for a verdict: its banks stand apart, and the others go on without
one that is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from actors.reward import EMPTY_REWARD
from models.reward_model import BankAnswers, RewardCard, join, scored
from rlhf.ensemble import lower_bound
from rlhf.errors import ModelError, RunError
from rlhf.records import Message

Said = TypeVar("Said")
_ASK_AGAIN_S = 0.5
_DOUBLED = 7
"""How often at most: then a bank that is away is asked about once a minute."""
_PROBE = (Message("user", "Are you there?"),), "Yes.", True
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the ensemble says of a candidate, in deviations over its training replies: the mean over
    members, each member's reward, their disagreement, whether it is out of their domain, the reward
    model's version, the mean by criterion, how many members did not answer, and the banks whose
    members did not, by their place."""

    reward: float
    rewards_K: tuple[float, ...]
    disagreement: float
    domain_shift: bool
    version: str
    criteria: Mapping[str, float] = field(default_factory=dict)
    members_missing: int = 0
    banks_missing: frozenset[int] = frozenset()

    def lower_bound(self, penalty: float) -> float:
        """What candidates are ranked by: reward less `penalty` times disagreement."""
        return lower_bound(self.reward, self.disagreement, penalty)


def verdict(card: RewardCard, banks: Sequence[BankAnswers]) -> Verdict:
    """Of one answer, by the banks that spoke of it: at least one. The threshold of domain shift is
    that of all; an answer that was not read to its end is out of the domain whatever it begins
    with."""
    scores = scored(card, join(banks))
    criteria_C = scores.criteria_KCN[:, :, 0].mean(dim=0).tolist()
    return Verdict(
        float(scores.rewards_KN[:, 0].mean()),
        tuple(scores.rewards_KN[:, 0].tolist()),
        float(scores.disagreement_N[0]),
        bool(scores.shifted_N[0]) or any(bank.cut for bank in banks),
        card.version,
        dict(zip(card.criteria, criteria_C, strict=True)),
        card.members - len(scores.rewards_KN),
    )


def empty_verdict(card: RewardCard) -> Verdict:
    """Of an answer without visible text: what training gives it."""
    rewards_K = (EMPTY_REWARD,) * card.members
    criteria = dict.fromkeys(card.criteria, EMPTY_REWARD)
    return Verdict(EMPTY_REWARD, rewards_K, 0.0, True, card.version, criteria)


class Bank(Protocol):
    """The members on one backbone: `actors.chat_scorer.ChatScorer`, here or elsewhere."""

    async def judge(self, messages: Sequence[Message], text: str, finished: bool) -> BankAnswers:
        """See `ChatScorer.judge`."""

    async def version(self) -> str:
        """See `ChatScorer.version`."""


class Ensemble:
    """All banks of a reward model. One that fails or is slow is left out until it has judged a
    short answer in time; each time that it is missed before it has judged again it is left out for
    twice as long before it is asked, up to a minute.

    Args:
        patience_s: how long the others wait for a bank when one has answered, and in how much it
            must judge before it counts again.
    """

    def __init__(self, card: RewardCard, banks: Sequence[Bank], patience_s: float) -> None:
        self._card, self._banks, self._patience_s = card, banks, patience_s
        self._away: dict[Bank, asyncio.Task[None]] = {}
        self._missed: dict[Bank, int] = {}

    async def version(self) -> str:
        """The reward model's version, if a bank answers.

        Raises:
            RunError: none does.
        """
        said = await self._asked(lambda bank: bank.version())
        return next(iter(said.values()))

    async def judge(self, messages: Sequence[Message], text: str, finished: bool) -> Verdict:
        """What the members that answer say of an answer.

        Raises:
            ModelError: none can tokenise it.
            RunError: none answers.
        """
        if not text.strip():
            return empty_verdict(self._card)
        said = await self._asked(lambda bank: bank.judge(messages, text, finished))
        for bank in said:
            self._missed.pop(bank, None)
        missing = frozenset(at for at, bank in enumerate(self._banks) if bank not in said)
        return replace(verdict(self._card, list(said.values())), banks_missing=missing)

    async def _asked(self, call: Callable[[Bank], Coroutine[Any, Any, Said]]) -> dict[Bank, Said]:
        """What those that answer say, in the order of the banks."""
        banks = [bank for bank in self._banks if bank not in self._away] or self._banks
        asked = {bank: asyncio.ensure_future(call(bank)) for bank in banks}
        try:
            pending, patience = set(asked.values()), None
            while pending:
                done, pending = await asyncio.wait(
                    pending, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                if any(not each.cancelled() and each.exception() is None for each in done):
                    patience = self._patience_s
        finally:
            for each in asked.values():
                each.cancel()
        said, errors = dict[Bank, Said](), list[BaseException]()
        for bank, each in asked.items():
            known = each.done() and not each.cancelled()
            error = each.exception() if known else TimeoutError()
            if error is None:
                said[bank] = each.result()
                continue
            errors.append(error)
            if not isinstance(error, ModelError):
                self._miss(bank)
        if not said:
            if refused := next((each for each in errors if isinstance(each, ModelError)), None):
                raise refused
            raise RunError(f"no member of the ensemble answers: {errors[0]}")
        return said

    def _miss(self, bank: Bank) -> None:
        if bank not in self._away:
            _log.warning("a part of the ensemble does not answer; the others go on")
            # Not in the context of the request that missed it, with which Serve would end it.
            self._away[bank] = asyncio.create_task(self._back(bank), context=Context())

    async def _back(self, bank: Bank) -> None:
        """Wait until a bank judges in time again. What a request asked is not kept to ask anew, so
        one that is too slow for long answers alone comes back, and then ever more rarely."""
        try:
            while True:
                missed = self._missed[bank] = self._missed.get(bank, 0) + 1
                await asyncio.sleep(_ASK_AGAIN_S * 2 ** min(missed - 1, _DOUBLED))
                try:
                    async with asyncio.timeout(self._patience_s):
                        await bank.judge(*_PROBE)
                    return
                except ModelError:
                    return
                except Exception:
                    continue
        finally:
            del self._away[bank]
