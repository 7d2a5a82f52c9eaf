import asyncio
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.chat_scorer import ChatScorer
from actors.reward import EMPTY_REWARD
from models.reward_model import BankAnswers, RewardModel
from rlhf.errors import ModelError
from rlhf.records import Message
from serving.ensemble import Verdict, empty_verdict, verdict
from tests.conftest import build_tiny_model, build_tiny_reward_model

ASK = (Message("user", "What is a cat?"),)
TEXTS = [f"A cat is number {n} of many animals." for n in range(24)]


@pytest.fixture(scope="module")
def two_banks(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("banks")
    return build_tiny_reward_model(
        folder / "reward", tiny_model, build_tiny_model(folder / "other", seed=1)
    )


@pytest.fixture
def scorers(two_banks: Path) -> Iterator[list[ChatScorer]]:
    found = [ChatScorer(str(two_banks), bank) for bank in range(2)]
    yield found
    for scorer in found:
        scorer._guard.close()


async def asked(scorers: list[ChatScorer], text: str) -> list[BankAnswers]:
    return await asyncio.gather(*(scorer.judge(ASK, text, True) for scorer in scorers))


def test_banks_apart_say_what_the_reward_model_says(scorers, two_banks):
    whole = RewardModel.load(two_banks)
    scores = whole.score([(ASK, text, True) for text in TEXTS])

    async def all_at_once() -> list[list[BankAnswers]]:
        return await asyncio.gather(*(asked(scorers, text) for text in TEXTS))

    for number, said in enumerate(asyncio.run(all_at_once())):
        found = verdict(whole.card, said)
        assert found.rewards_K == pytest.approx(scores.rewards_KN[:, number].tolist(), abs=1e-5)
        assert found.disagreement == pytest.approx(float(scores.disagreement_N[number]), abs=1e-5)
        assert found.criteria == {"overall": pytest.approx(found.reward, abs=1e-5)}
        assert found.version == whole.card.version
        assert found.members_missing == 0
    assert len({round(float(each), 6) for each in scores.rewards_KN[0]}) > 20


def test_what_comes_while_a_pass_runs_is_read_in_the_next_together(scorers, monkeypatch):
    [scorer, _] = scorers
    passes = []
    judge = scorer._judge
    monkeypatch.setattr(scorer, "_judge", lambda rows: (passes.append(len(rows)), judge(rows))[1])

    async def crowd() -> list[BankAnswers]:
        first = asyncio.create_task(scorer.judge(ASK, TEXTS[0], True))
        await asyncio.sleep(0)
        gone = asyncio.create_task(scorer.judge(ASK, TEXTS[1], True))
        rest = [asyncio.create_task(scorer.judge(ASK, text, True)) for text in TEXTS[2:]]
        await asyncio.sleep(0)
        gone.cancel()
        return await asyncio.gather(first, *rest)

    assert len(asyncio.run(crowd())) == 23
    # Two passes, or three where the first had ended before the others came; nobody's is not read.
    assert len(passes) in (2, 3) and sum(passes) in (23, 24)
    assert asyncio.run(scorer.judge(ASK, TEXTS[0], True)).rewards_KN.shape == (4, 1)


def test_what_cannot_be_read_is_refused_alone(scorers):
    [scorer, _] = scorers

    async def both() -> list[BankAnswers | BaseException]:
        calls = (scorer.judge(ASK, text, True) for text in ("", TEXTS[0]))
        return await asyncio.gather(*calls, return_exceptions=True)

    refused, answered = asyncio.run(both())
    assert isinstance(refused, ModelError) and isinstance(answered, BankAnswers)


def test_of_one_bank_the_verdict_says_how_many_members_are_missing(scorers, two_banks):
    card = RewardModel.load(two_banks).card
    [one, _] = asyncio.run(asked(scorers, TEXTS[0]))
    found = verdict(card, [one])
    assert found.members_missing == 4 and len(found.rewards_K) == 4
    assert found.reward == pytest.approx(float(one.rewards_KN.mean()))


def test_an_answer_that_was_not_read_to_its_end_is_out_of_the_domain(scorers, two_banks):
    card = RewardModel.load(two_banks).card
    assert card.threshold is None
    for text, cut in ((TEXTS[0], False), ("water " * 200, True)):
        assert verdict(card, asyncio.run(asked(scorers, text))).domain_shift == cut


def test_an_answer_without_text_gets_what_training_gives_it(two_banks):
    found = empty_verdict(RewardModel.load(two_banks).card)
    assert found.reward == EMPTY_REWARD and found.domain_shift
    assert found.rewards_K == (EMPTY_REWARD,) * 8


def test_the_lower_bound_is_less_by_disagreement():
    found = Verdict(1.0, (0.5, 1.5), 0.5, False, "v")
    assert math.isclose(found.lower_bound(2.0), 0.0)
