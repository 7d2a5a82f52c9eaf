"""Candidates that are far behind when they have begun are given up, and never one of the best."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

import pytest

from actors.chat_engine import Piece, Sampling
from rlhf.config.serve import ServeSection
from rlhf.records import Message
from serving.best_of import BestOf
from serving.candidates import Candidate, Plan
from serving.ensemble import Verdict

TOKENS = 12
ASK = (Message("user", "What is a cat?"),)


class Engine:
    """Candidate i, told by its seed, writes its number token by token, each when it may."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.asked: list[Sampling] = []
        self.wrote = [0] * len(lengths)
        self.left = 0

    async def write(
        self, prompt_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Piece, None]:
        self.asked.append(sampling)
        assert sampling.seed is not None
        numbers = [sampling.seed + n for n in range(sampling.candidates)]
        over = False
        try:
            for token in range(max(self.lengths[number] for number in numbers)):
                for place, number in enumerate(numbers):
                    if token < self.lengths[number]:
                        self.wrote[number] += 1
                        last = token + 1 == self.lengths[number]
                        yield Piece(place, str(number), 1, "v1", "stop" if last else None)
                # Longer than a verdict takes.
                await asyncio.sleep(0.01)
            over = True
        finally:
            self.left += not over

    async def version(self) -> str:
        return "v1"


class Scorer:
    """Rates candidate i by the i-th pair of (reward of its beginning, of the whole)."""

    def __init__(self, rewards: Sequence[tuple[float, float]], disagreement: float = 0.0) -> None:
        self.rewards, self.disagreement = rewards, disagreement
        self.asked: list[tuple[str, bool]] = []

    async def judge(self, messages: Sequence[Message], text: str, finished: bool) -> Verdict:
        self.asked.append((text, finished))
        reward = self.rewards[int(text[0])][finished]
        return Verdict(reward, (reward,), self.disagreement, False, "r1")

    async def version(self) -> str:
        return "r1"


def drawn(
    rewards: Sequence[tuple[float, float]],
    *,
    n: int = 1,
    lengths: Sequence[int] | None = None,
    disagreement: float = 0.0,
    reject_after: int = 4,
    stop: tuple[str, ...] = (),
    scorer: Scorer | None = None,
) -> tuple[list[Candidate], list[Candidate], Engine, Scorer]:
    engine = Engine(lengths or [TOKENS] * len(rewards))
    scorer = scorer or Scorer(rewards, disagreement)
    settings = ServeSection(reject_after=reject_after, reject_margin=0.5)
    written: list[int] = []
    best = BestOf(settings, engine, scorer, written.append)
    sampling = Sampling(len(rewards), TOKENS, stop=stop, seed=0)
    plan = Plan("chatcmpl-1", ASK, (1, 2, 3), sampling, n, True, True, 0)
    all_of_them = asyncio.run(best.draw(plan))
    assert sum(written) == sum(engine.wrote)
    return all_of_them, best.chosen(plan, all_of_them), engine, scorer


def test_who_is_far_behind_is_given_up_and_what_it_would_have_cost_is_saved():
    candidates, [chosen], engine, scorer = drawn([(1.0, 1.0), (0.6, 2.0), (0.3, 9.0), (-1.0, 9.0)])
    assert [each.rejected for each in candidates] == [False, False, True, True]
    assert chosen.index == 1 and chosen.outcome == "stop"
    assert engine.wrote[:2] == [TOKENS, TOKENS] and max(engine.wrote[2:]) < TOKENS
    assert engine.left == 2
    assert [each.outcome for each in candidates] == ["stop", "stop", "rejected", "rejected"]
    # The verdict of one that was given up is that on its beginning, and it is not judged again.
    assert candidates[2].verdict is not None and candidates[2].verdict.reward == 0.3
    assert ("2" * TOKENS, True) not in scorer.asked


def test_doubt_keeps_a_candidate():
    candidates, _, _, _ = drawn([(1.0, 1.0), (0.3, 2.0)], disagreement=0.2)
    assert not any(each.rejected for each in candidates)


def test_candidates_that_as_many_but_not_the_same_members_judged_are_judged_again():
    class Divided(Scorer):
        """At first each candidate is judged by the other bank alone."""

        async def judge(self, messages: Sequence[Message], text: str, finished: bool) -> Verdict:
            found = await super().judge(messages, text, finished)
            if self.asked.count((text, finished)) > 1:
                return found
            missing = frozenset({int(text[0])})
            return replace(found, reward=-found.reward, members_missing=2, banks_missing=missing)

    scorer = Divided([(0.0, 1.0), (0.0, 2.0)])
    _, [chosen], _, _ = drawn(scorer.rewards, scorer=scorer, reject_after=0)
    assert chosen.index == 1 and len(scorer.asked) == 4


@pytest.mark.parametrize("n", [1, 2, 3])
def test_there_are_always_as_many_as_are_sent(n):
    rewards = [(9.0, -9.0), (5.0, -5.0), (2.0, -1.0), (-3.0, 4.0)]
    candidates, chosen, _, _ = drawn(rewards, n=n)
    assert len(chosen) == n and not any(each.rejected for each in chosen)
    assert sum(each.rejected for each in candidates) == 4 - n


def test_one_that_has_ended_before_is_measured_by_its_whole():
    candidates, [chosen], _, _ = drawn([(0.0, 3.0), (1.0, 1.0), (2.8, 2.8)], lengths=[2, 12, 12])
    assert [each.rejected for each in candidates] == [False, True, False]
    assert chosen.index == 0


@pytest.mark.parametrize(
    ("reject_after", "n", "stop"), [(0, 1, ""), (TOKENS, 1, ""), (4, 2, ""), (4, 1, "x" * 17)]
)
def test_where_nothing_is_to_be_given_up_all_are_written_together(reject_after, n, stop):
    candidates, _, engine, scorer = drawn(
        [(1.0, 1.0), (-9.0, 2.0)], n=n, reject_after=reject_after, stop=(stop,)
    )
    assert [each.candidates for each in engine.asked] == [2]
    assert not any(each.rejected for each in candidates)
    assert sorted(scorer.asked) == [("0" * TOKENS, True), ("1" * TOKENS, True)]


def test_each_alone_is_drawn_as_it_is_among_all():
    sampling = Sampling(4, 8, temperature=0.5, stop=("x",), seed=2**63 - 1, logprobs=2)
    assert sampling.one(1) == Sampling(1, 8, temperature=0.5, stop=("x",), seed=0, logprobs=2)
    assert Sampling(4, 8).one(3).seed is None
