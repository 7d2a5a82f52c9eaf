"""A step's batch as optimiser steps on one rank: shares, losses, what is measured on the way.

Shapes: B completions of the batch, N of a micro-batch, T tokens (padded on the right).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor

from actors.engine import TrainingEngine
from models.packing import Row, TokenIds, collate, packed_batches, share_of
from rlhf.algorithms import PPO, Algorithm, Share
from rlhf.config import RLSection
from rlhf.importance import effective_share, importance_weights
from rlhf.kl import kl_in_the_loss
from rlhf.losses import BatchSize, reduce_tokens
from rlhf.records import TrainingBatch, TrainingSequence

Totals = defaultdict[str, float]
"""Sums over tokens, by name."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a batch before its first update, all (B, T); None where nobody asks."""

    mask_BT: Tensor
    rollout_BT: Tensor
    credit_BT: Tensor
    reference_BT: Tensor | None = None
    start_BT: Tensor | None = None
    """The learner's own logprobs."""
    values_BT: Tensor | None = None
    returns_BT: Tensor | None = None

    def of(self, rows: slice | list[int]) -> Known:
        """The same of some completions."""
        return self._each(lambda value_BT: value_BT[rows])

    def to(self, width: int, device: torch.device) -> Known:
        """The same cut to so many tokens, on a device."""
        return self._each(lambda value_BT: value_BT[:, :width].to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Known:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        there = {name: change(value) for name, value in values.items() if value is not None}
        return Known(**there)


class PolicyUpdate:
    """One rank's part in training on batches.

    Args:
        pad_id: the token that rows are filled up with.
        batch_tokens: padded tokens a forward pass may hold.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        algorithm: Algorithm,
        rl: RLSection,
        *,
        pad_id: int,
        batch_tokens: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._engine = engine
        self._algorithm = algorithm
        self._rl = rl
        self._pad_id = pad_id
        self._batch_tokens = batch_tokens
        self._rank = rank
        self._world_size = world_size

    def step(self, batch: TrainingBatch, step: int) -> dict[str, float]:
        """All passes over a batch; returns means over its tokens. A collective."""
        settings = self._rl.algorithm
        totals: Totals = defaultdict(float)
        known = self._known(batch, totals)
        norms: list[float] = []
        for epoch in range(settings.epochs):
            for part in _parts(batch.num_sequences, settings.mini_batches):
                cut = replace(batch, sequences=batch.sequences[part])
                size = BatchSize(cut.num_sequences, cut.num_tokens, cut.max_tokens)
                ours = known.of(part)
                # What is measured against the start must be measured before it is left.
                first = not norms or (epoch == 0 and known.start_BT is not None)
                losses = [
                    self._loss(cut, ours, size, rows, live, first, totals)
                    for rows, live in self._shares(*_token_ids(cut.sequences))
                ]
                norms.append(self._engine.step(losses, step))
        metrics = self._means(totals, settings.epochs)
        return metrics | {"losses/gradient_norm": sum(norms) / len(norms)}

    def evaluate(
        self, prompts: Sequence[TokenIds], replies: Sequence[TokenIds], temperature: float
    ) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        """Logprob and exact entropy of the current policy at every reply token, in nats; two rows
        a reply. A collective."""
        logprobs_BT, entropy_BT, _ = self._evaluate(prompts, replies, temperature)
        return [
            (tuple(logprobs_T[: len(reply)]), tuple(entropies_T[: len(reply)]))
            for logprobs_T, entropies_T, reply in zip(
                logprobs_BT.tolist(), entropy_BT.tolist(), replies, strict=True
            )
        ]

    def _known(self, batch: TrainingBatch, totals: Totals) -> Known:
        """Everything about the batch that its updates do not change."""
        sequences = batch.sequences
        mask_BT = _padded([(1.0,) * len(s.completion_token_ids) for s in sequences])
        known = Known(
            mask_BT,
            _padded([s.rollout_logprobs_T for s in sequences]),
            torch.tensor([[s.advantage] for s in sequences]).expand_as(mask_BT),
        )
        if self._rl.kl.place == "loss":
            known = replace(
                known, reference_BT=_padded([s.reference_logprobs_T for s in sequences])
            )
        settings = self._rl.algorithm
        critic = isinstance(self._algorithm, PPO)
        several = settings.epochs * settings.mini_batches > 1
        if critic or (several and self._rl.off_policy.weights is not None):
            start_BT, _, values_BT = self._evaluate(*_token_ids(sequences), batch.temperature)
            known = replace(known, start_BT=start_BT)
        if isinstance(self._algorithm, PPO):
            rewards_BT = _padded([s.rewards_T for s in sequences])
            credit_BT, returns_BT = self._algorithm.advantages(rewards_BT, values_BT, mask_BT)
            known = replace(known, credit_BT=credit_BT, values_BT=values_BT, returns_BT=returns_BT)
            # Every rank knows the whole batch: each adds its share of the same sums.
            share_BT = mask_BT / self._world_size
            _count(totals, "critic/value", values_BT, share_BT)
            _count(totals, "critic/return", returns_BT, share_BT)
            _count(totals, "critic/error", (returns_BT - values_BT).square(), share_BT)
            _count(totals, "critic/return_square", returns_BT.square(), share_BT)
        return known

    def _evaluate(
        self, prompts: Sequence[TokenIds], replies: Sequence[TokenIds], temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logprobs, entropies and the critic's values (zero without one) as they are now; (B, T)
        each, on every rank."""
        width = max(map(len, replies))
        found_3BT = torch.zeros(3, len(replies), width)
        with torch.no_grad():
            for rows, live in self._shares(prompts, replies):
                packed = collate(rows, self._pad_id, self._engine.device)
                for place, out_NT in enumerate(self._engine.run(packed, temperature)):
                    if live and out_NT is not None:
                        own_NT = out_NT.float() * packed.reply_mask_NT
                        found_3BT[place, list(packed.indices), : own_NT.shape[1]] = own_NT.cpu()
        return tuple(self._summed(found_3BT))

    def _shares(
        self, prompts: Sequence[TokenIds], replies: Sequence[TokenIds]
    ) -> list[tuple[list[Row], float]]:
        batches = packed_batches(prompts, replies, self._batch_tokens)
        return share_of(batches, self._rank, self._world_size)

    def _loss(
        self,
        batch: TrainingBatch,
        known: Known,
        size: BatchSize,
        rows: list[Row],
        live: float,
        first: bool,
        totals: Totals,
    ) -> Callable[[], Tensor]:
        """The loss of one micro-batch, computed when called; adds to `totals` as it goes."""

        def compute() -> Tensor:
            packed = collate(rows, self._pad_id, self._engine.device)
            width = packed.reply_ids_NT.shape[1]
            ours = known.of(list(packed.indices)).to(width, self._engine.device)
            mask_NT = packed.reply_mask_NT * live
            rl, coefficient = self._rl, batch.entropy_coefficient
            normalisation = rl.algorithm.normalisation
            logprobs_NT, entropy_NT, values_NT = self._engine.run(
                packed, batch.temperature, coefficient > 0
            )
            start_NT = logprobs_NT.detach() if ours.start_BT is None else ours.start_BT
            weights = importance_weights(start_NT, ours.rollout_BT, mask_NT, rl.off_policy)
            policy = self._algorithm.loss(
                Share(
                    logprobs_NT,
                    ours.rollout_BT if rl.off_policy.weights is None else start_NT,
                    ours.credit_BT * weights.weights_BT,
                    mask_NT,
                    size,
                )
            )
            loss = policy.loss
            terms = {"losses/policy": policy.loss}
            if ours.reference_BT is not None:
                terms["losses/kl"] = kl_in_the_loss(
                    logprobs_NT,
                    ours.reference_BT,
                    mask_NT,
                    estimator=rl.kl.estimator or "k2",
                    normalisation=normalisation,
                    size=size,
                )
                loss = loss + batch.kl_coefficient * terms["losses/kl"]
            if coefficient:
                # In the reward its gradient has two parts: credit holds the other one, and both
                # are normalised alike.
                how = "token" if rl.entropy.place == "loss" else normalisation
                loss = loss - coefficient * reduce_tokens(entropy_NT, mask_NT, how, size)
            if isinstance(self._algorithm, PPO):
                assert ours.values_BT is not None and ours.returns_BT is not None
                terms["losses/critic"] = self._algorithm.critic_loss(
                    values_NT, ours.values_BT, ours.returns_BT, mask_NT, size
                )
                loss = loss + self._algorithm.settings.critic.coefficient * terms["losses/critic"]
            with torch.no_grad():
                log_ratio_NT = (logprobs_NT - ours.rollout_BT) * mask_NT
                # The k3 estimate of KL(rollout || policy): small, and zero on policy.
                _count(
                    totals, "losses/approx_kl", torch.exp(log_ratio_NT) - 1 - log_ratio_NT, mask_NT
                )
                _count(totals, "losses/clipfrac", policy.clipped_BT, mask_NT)
                _count(totals, "losses/ratio_mean", policy.ratio_BT, mask_NT)
                _count(totals, "entropy/mean", entropy_NT, mask_NT)
                totals["tokens"] += float(mask_NT.sum())
                for name, term in terms.items():
                    totals[name] += float(term) * size.tokens
                if first:
                    gap_NT = (start_NT - ours.rollout_BT) * mask_NT
                    _count(totals, "importance/gap", gap_NT.abs(), mask_NT)
                    _count(totals, "importance/kl", torch.exp(gap_NT) - 1 - gap_NT, mask_NT)
                    totals["importance/tokens"] += float(mask_NT.sum())
                    # As credit is multiplied, or, where it is not, as the loss's ratio is.
                    weighed = self._rl.off_policy.weights is not None
                    used_NT = weights.weights_BT if weighed else policy.ratio_BT
                    _count(totals, "importance/weight", used_NT, mask_NT)
                    _count(totals, "importance/square", used_NT.square(), mask_NT)
                    _count(totals, "importance/truncated_share", weights.truncated_BT, mask_NT)
                    _count(totals, "importance/masked_share", weights.masked_BT, mask_NT)
            return loss

        return compute

    def _means(self, totals: Totals, epochs: int) -> dict[str, float]:
        """Sums over ranks, per token that they were counted on: of all passes, for the critic of
        one, and for importance of what was seen before the weights were changed."""
        names = sorted(totals)
        sums = self._summed(torch.tensor([totals[name] for name in names], dtype=torch.float64))
        every = dict(zip(names, sums.tolist(), strict=True))
        tokens = every.pop("tokens")
        counts = {"importance": every.pop("importance/tokens"), "critic": tokens / epochs}
        means = {
            name: value / counts.get(name.partition("/")[0], tokens)
            for name, value in every.items()
        }
        square, weight = means.pop("importance/square"), means["importance/weight"]
        means["importance/effective_share"] = effective_share(weight, square, 1.0)
        if "critic/error" in means:
            variance = means.pop("critic/return_square") - means["critic/return"] ** 2
            error = means.pop("critic/error")
            means["critic/explained_variance"] = 1 - error / variance if variance > 0 else 0.0
        return means

    def _summed(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on the CPU."""
        if self._world_size == 1:
            return tensor
        tensor = tensor.to(self._engine.device)
        torch.distributed.all_reduce(tensor)
        return tensor.cpu()


def _token_ids(sequences: Sequence[TrainingSequence]) -> tuple[list[TokenIds], list[TokenIds]]:
    """Prompts and completions."""
    prompts: list[TokenIds] = [sequence.prompt_token_ids for sequence in sequences]
    return prompts, [sequence.completion_token_ids for sequence in sequences]


def _parts(count: int, parts: int) -> Iterator[slice]:
    """Cuts of about the same size, in order, so that most siblings stay together; none is empty."""
    ends = [round(count * part / parts) for part in range(parts + 1)]
    yield from (slice(begin, end) for begin, end in pairwise(ends) if end > begin)


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row] + [0.0] * (width - len(row)) for row in rows])


def _count(totals: Totals, name: str, values_NT: Tensor, mask_NT: Tensor) -> None:
    totals[name] += float((values_NT * mask_NT).sum())
