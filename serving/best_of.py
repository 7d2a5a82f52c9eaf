"""Best-of-N: candidates drawn, judged while others are still written, and the best of them chosen.

Ranked by the lower bound: the ensemble's mean reward less `disagreement_penalty` times its
disagreement. Candidates that it rates far behind when only their beginning is written can be given
up then (`serve.reject_after`); each is a request of its own to the engine for that, which reads the
conversation from its cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from actors.chat_engine import Piece, Sampling
from rlhf.config.serve import ServeSection
from serving.candidates import Candidate, Engine, Plan, Scorer
from serving.ensemble import Verdict

_SHORT_STOP = 16
"""Characters."""


class BestOf:
    """Draws and chooses by an engine and an ensemble; `written` is told of tokens."""

    def __init__(
        self,
        settings: ServeSection,
        engine: Engine,
        scorer: Scorer | None,
        written: Callable[[int], None],
    ) -> None:
        self._settings, self._engine, self._scorer = settings, engine, scorer
        self._written = written

    async def pieces(self, plan: Plan, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """Pieces as they are written."""
        async with aclosing(self._engine.write(plan.prompt_ids, sampling)) as pieces:
            async for piece in pieces:
                self._written(piece.tokens)
                yield piece

    async def judge(self, plan: Plan, candidate: Candidate) -> None:
        """Have the ensemble judge a candidate as it stands."""
        candidate.verdict = await self._judged(plan, candidate)

    async def _judged(self, plan: Plan, candidate: Candidate) -> Verdict:
        assert self._scorer is not None
        finished = candidate.ended == "stop"
        return await self._scorer.judge(plan.messages, candidate.text, finished)

    async def draw(self, plan: Plan) -> list[Candidate]:
        """All candidates, whole but for those that were given up."""
        drawn = [Candidate(at) for at in range(plan.sampling.candidates)]
        settings = self._settings
        # Text that may be the start of a stop is held back by the engine.
        held_back = max(map(len, plan.sampling.stop), default=0)
        apart = (
            plan.chooses
            and 0 < settings.reject_after < plan.sampling.max_tokens
            and held_back <= _SHORT_STOP
        )
        async with asyncio.TaskGroup() as group:
            if apart:
                for candidate in drawn:
                    group.create_task(self._write_apart(plan, candidate, drawn, group))
            else:
                await self._write_together(plan, drawn, group)
        if plan.chooses:
            await self._judge_evenly(plan, [each for each in drawn if not each.rejected])
        return drawn

    async def _judge_evenly(self, plan: Plan, drawn: Sequence[Candidate]) -> None:
        """Candidates that not the same members have judged are not comparable: judge them again."""
        verdicts = [each.verdict for each in drawn]
        if len({each and (each.members_missing, each.banks_missing) for each in verdicts}) > 1:
            await asyncio.gather(*(self.judge(plan, each) for each in drawn))

    async def _write_together(
        self, plan: Plan, drawn: Sequence[Candidate], group: asyncio.TaskGroup
    ) -> None:
        async with aclosing(self.pieces(plan, plan.sampling)) as pieces:
            async for piece in pieces:
                candidate = drawn[piece.candidate]
                candidate.add(piece)
                if piece.ended and plan.judged:
                    group.create_task(self.judge(plan, candidate))

    async def _write_apart(
        self,
        plan: Plan,
        candidate: Candidate,
        drawn: Sequence[Candidate],
        group: asyncio.TaskGroup,
    ) -> None:
        begun = False
        async with aclosing(self.pieces(plan, plan.sampling.one(candidate.index))) as pieces:
            async for piece in pieces:
                candidate.add(piece)
                if candidate.rejected:
                    return
                long = candidate.tokens >= self._settings.reject_after
                if long and candidate.text.strip() and not begun:
                    begun = True
                    group.create_task(self._begin(plan, candidate, drawn))
        await self.judge(plan, candidate)
        self._give_up(plan, drawn)

    async def _begin(self, plan: Plan, candidate: Candidate, drawn: Sequence[Candidate]) -> None:
        candidate.beginning = await self._judged(plan, candidate)
        self._give_up(plan, drawn)

    def _give_up(self, plan: Plan, drawn: Sequence[Candidate]) -> None:
        """Once all are judged, as they stand or whole, give up those that are far behind."""
        penalty, margin = self._settings.disagreement_penalty, self._settings.reject_margin
        running = [each for each in drawn if not each.rejected]
        verdicts = [each.verdict or each.beginning for each in running]
        known = [verdict for verdict in verdicts if verdict is not None]
        if len(known) < len(running):
            return
        last = sorted((each.lower_bound(penalty) for each in known), reverse=True)[plan.n - 1]
        for candidate, verdict in zip(running, known, strict=True):
            # Never one of the n best: the most it may be is less than the least the n-th may be.
            if candidate.ended is None and verdict.lower_bound(-penalty) < last - margin:
                candidate.rejected, candidate.verdict = True, verdict

    def chosen(self, plan: Plan, drawn: Sequence[Candidate]) -> list[Candidate]:
        """The n that are sent: with the highest lower bound, or those there are."""
        if not plan.chooses:
            return list(drawn)
        penalty = self._settings.disagreement_penalty

        def bound(candidate: Candidate) -> float:
            assert candidate.verdict is not None
            return candidate.verdict.lower_bound(penalty)

        whole = [candidate for candidate in drawn if not candidate.rejected]
        return sorted(whole, key=bound, reverse=True)[: plan.n]
