from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.chat_scorer import ChatScorer
from actors.reward import EMPTY_REWARD
from rlhf.records import Message

ASK = (Message("user", "What is a cat?"),)


@pytest.fixture
def scorer(tiny_reward_model):
    found = ChatScorer(str(tiny_reward_model))
    yield found
    found._guard.close()


def test_many_threads_get_what_one_gets(scorer):
    texts = [f"A cat is number {n} of many animals." for n in range(24)]
    alone = [scorer.judge(ASK, text, True) for text in texts]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda text: scorer.judge(ASK, text, True), texts))
    for one, other in zip(alone, together, strict=True):
        assert other.reward == pytest.approx(one.reward, abs=1e-5)
    assert len({round(each.reward, 6) for each in alone}) > 20


def test_an_answer_without_text_gets_what_training_gives_it(scorer):
    found = scorer.judge(ASK, "  ", True)
    assert found.reward == EMPTY_REWARD and found.domain_shift


def test_the_lower_bound_is_less_by_disagreement(scorer):
    found = scorer.judge(ASK, "A cat is an animal.", True)
    assert len(found.rewards_K) == 4
    assert found.lower_bound(2.0) == pytest.approx(found.reward - 2 * found.disagreement)
