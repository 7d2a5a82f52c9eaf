"""The ensemble goes on with the members that answer."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from models.reward_model import BankAnswers, RewardCard, RewardModel
from rlhf.errors import ModelError, RunError
from rlhf.records import Message
from serving.ensemble import Ensemble

ASK = (Message("user", "What is a cat?"),)
PATIENCE_S = 0.3


class Bank:
    """Two members that say `reward` after a while, or fail."""

    def __init__(self, reward: float, wait_s: float = 0.0, error: Exception | None = None) -> None:
        self.reward, self.wait_s, self.error = reward, wait_s, error
        self.asked = self.left = 0

    async def judge(self, messages: Sequence[Message], text: str, finished: bool) -> BankAnswers:
        self.asked += bool(text)
        try:
            await asyncio.sleep(self.wait_s)
        except asyncio.CancelledError:
            self.left += 1
            raise
        if self.error:
            raise self.error
        rewards_KN = torch.full((2, 1), self.reward)
        kin_K = torch.tensor([0, 0])
        return BankAnswers(rewards_KN, rewards_KN.unsqueeze(1), kin_K, torch.zeros(1, 1))

    async def version(self) -> str:
        await self.judge((), "", True)
        return "tiny"


@pytest.fixture
def card(tiny_reward_model: Path) -> RewardCard:
    return RewardModel.load(tiny_reward_model).card


def judged(card: RewardCard, *banks: Bank, text: str = "An animal."):
    return asyncio.run(Ensemble(card, banks, PATIENCE_S).judge(ASK, text, True))


def test_all_that_answer_count(card):
    found = judged(card, Bank(1.0, 0.05), Bank(3.0))
    assert found.rewards_K == (1.0, 1.0, 3.0, 3.0)
    assert found.reward == 2.0 and found.members_missing == 0


def test_who_fails_or_is_slow_is_left_out_and_it_is_said(card):
    slow = Bank(3.0, 60)
    for absent in (slow, Bank(3.0, error=RuntimeError("died"))):
        found = judged(card, Bank(1.0), absent)
        assert found.rewards_K == (1.0, 1.0) and found.members_missing == 2
    assert slow.left >= 1


def test_who_comes_within_patience_counts(card):
    assert judged(card, Bank(1.0), Bank(3.0, PATIENCE_S / 3)).members_missing == 0


def test_the_first_answer_is_waited_for_beyond_patience(card):
    assert judged(card, Bank(1.0, 2 * PATIENCE_S), Bank(3.0, 2 * PATIENCE_S)).reward == 2.0


def test_without_any_there_is_no_verdict(card):
    absent = Bank(1.0, error=RuntimeError("died"))
    with pytest.raises(RunError, match="no member of the ensemble answers: died"):
        judged(card, absent, absent)


def test_an_answer_that_cannot_be_read_is_nobodys_absence(card):
    cannot = Bank(1.0, error=ModelError("no token"))
    with pytest.raises(ModelError, match="no token"):
        judged(card, cannot, cannot)
    ensemble = Ensemble(card, [Bank(1.0), cannot], PATIENCE_S)

    async def judge() -> int:
        found = await ensemble.judge(ASK, "An animal.", True)
        assert not ensemble._away
        return found.members_missing

    assert asyncio.run(judge()) == 2


def test_an_empty_answer_asks_nobody(card):
    assert judged(card, Bank(1.0, error=RuntimeError("died")), text=" \n").domain_shift


def test_it_is_there_while_one_bank_is(card):
    absent = Bank(1.0, error=RuntimeError("died"))
    assert asyncio.run(Ensemble(card, [absent, Bank(1.0)], PATIENCE_S).version()) == "tiny"
    with pytest.raises(RunError, match="no member"):
        asyncio.run(Ensemble(card, [absent], PATIENCE_S).version())


def test_who_was_away_is_not_waited_for_and_counts_again_when_it_is_back(card):
    other = Bank(3.0, 60)
    ensemble = Ensemble(card, [Bank(1.0), other], PATIENCE_S)

    async def three() -> list[tuple[int, int]]:
        found = []
        for wait_s in (60, 60, 0):
            other.wait_s = wait_s
            if not wait_s:
                # What asks whether it is back was begun when it was slow.
                for task in ensemble._away.values():
                    task.cancel()
                await asyncio.sleep(0)
            other.asked = 0
            said = await ensemble.judge(ASK, "An animal.", True)
            found.append((said.members_missing, other.asked))
        return found

    # Asked, and waited for; not asked; asked again.
    assert asyncio.run(three()) == [(2, 1), (2, 0), (0, 1)]


def test_who_is_slow_to_judge_stays_away_though_it_says_that_it_is_there(card, monkeypatch):
    monkeypatch.setattr("serving.ensemble._ASK_AGAIN_S", 0.02)

    class Slow(Bank):
        """Judges in a minute, and answers at once that it is there."""

        async def version(self) -> str:
            return "tiny"

    slow = Slow(3.0, 60)
    ensemble = Ensemble(card, [Bank(1.0), slow], PATIENCE_S)

    async def judge() -> list[float]:
        loop, took = asyncio.get_running_loop(), []
        for _ in range(20):
            began = loop.time()
            assert (await ensemble.judge(ASK, "An animal.", True)).members_missing == 2
            took.append(loop.time() - began)
            await asyncio.sleep(0.1)
        asked = slow.asked
        slow.wait_s = 0.0
        async with asyncio.timeout(10):
            while (await ensemble.judge(ASK, "An animal.", True)).members_missing:
                await asyncio.sleep(0.05)
        # It was probed meanwhile, ever more rarely, and nobody was asked twice at once.
        assert 2 <= asked <= 8
        return took

    first, *others = asyncio.run(judge())
    assert first >= PATIENCE_S and max(others) < PATIENCE_S / 2


def test_who_is_missed_again_and_again_is_asked_ever_more_rarely(card, monkeypatch):
    monkeypatch.setattr("serving.ensemble._ASK_AGAIN_S", 0.01)

    class Long(Bank):
        """Too slow for all but a probe."""

        async def judge(
            self, messages: Sequence[Message], text: str, finished: bool
        ) -> BankAnswers:
            self.wait_s = 60 if text == "An animal." else 0
            return await super().judge(messages, text, finished)

    long = Long(3.0)
    ensemble = Ensemble(card, [Bank(1.0), long], 0.02)

    async def judge() -> int:
        missed = 0
        for _ in range(100):
            missed += not ensemble._away
            await ensemble.judge(ASK, "An animal.", True)
            await asyncio.sleep(0.01)
        return missed

    assert 2 <= asyncio.run(judge()) <= 8


def test_a_verdict_says_which_banks_are_missing(card):
    absent = Bank(3.0, error=RuntimeError("died"))
    assert judged(card, Bank(1.0), absent).banks_missing == {1}
    assert judged(card, absent, Bank(1.0)).banks_missing == {0}
    assert not judged(card, Bank(1.0), Bank(1.0)).banks_missing


def test_who_failed_counts_again_by_itself(card):
    other = Bank(3.0, error=RuntimeError("died"))
    ensemble = Ensemble(card, [Bank(1.0), other], PATIENCE_S)

    async def until_back() -> list[int]:
        missing = [(await ensemble.judge(ASK, "An animal.", True)).members_missing]
        await asyncio.sleep(0.01)
        other.error = None
        for _ in range(200):
            missing.append((await ensemble.judge(ASK, "An animal.", True)).members_missing)
            if not missing[-1]:
                break
            await asyncio.sleep(0.05)
        return missing

    missing = asyncio.run(until_back())
    assert missing[:2] == [2, 2] and missing[-1] == 0
