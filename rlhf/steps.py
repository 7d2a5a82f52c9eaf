"""The numbers of one step, from its groups and the learner's report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf.algorithms import algorithm_of
from rlhf.config import PPOSection, RLSection
from rlhf.kl import token_penalties
from rlhf.records import (
    Completion,
    FailedGroup,
    ScoredGroup,
    StepReport,
    TrainingBatch,
    TrainingSequence,
)
from rlhf.shaping import penalties_of, shaped_rewards
from rlhf.text_checks import TEXT_CHECKS, text_flags


def training_batch(
    groups: Sequence[ScoredGroup | FailedGroup], settings: RLSection, *, mask_shifted: bool = False
) -> TrainingBatch:
    """What a step trains on: completions with credit, from penalised rewards.

    Failed groups, completions that the algorithm gives no credit (unless the loss has a term of
    its own for them) and, with `mask_shifted`, those flagged for domain shift are left out; nothing
    is refilled. Credit is given over all first, so that leaving a completion out does not change
    its siblings' baseline.
    """
    scored = [group for group in groups if isinstance(group, ScoredGroup)]
    empty = TrainingBatch(
        (),
        settings.max_tokens,
        settings.temperature,
        kl_coefficient=settings.kl.coefficient if settings.kl.place == "loss" else 0.0,
        entropy_coefficient=settings.entropy.coefficient,
    )
    if not scored:
        return empty
    shaped_PG = shaped_rewards(scored, settings)
    terms_PGT = [_token_terms(group, settings) for group in scored]
    credit = algorithm_of(settings.algorithm).credit(shaped_PG, _sums(terms_PGT))
    by_token = isinstance(settings.algorithm, PPOSection)
    trained_PG = credit.trained_PG | _loss_has_a_term_beside(settings)
    sequences = [
        TrainingSequence(
            group.rollout.prompt_token_ids,
            completion.token_ids,
            completion.rollout_logprobs_T,
            value,
            reference_T if settings.kl.place == "loss" else (),
            (*terms_T[:-1], terms_T[-1] + reward) if by_token else (),
        )
        for group, values_G, trained_G, shaped_G, terms_GT in zip(
            scored,
            credit.values_PG.tolist(),
            trained_PG.tolist(),
            shaped_PG.tolist(),
            terms_PGT,
            strict=True,
        )
        for completion, reference_T, terms_T, reward, value, trained, shifted in zip(
            group.rollout.completions,
            group.reference_logprobs_GT,
            terms_GT,
            shaped_G,
            values_G,
            trained_G,
            group.scores.domain_shift_G,
            strict=True,
        )
        if trained and not (mask_shifted and shifted)
    ]
    return replace(empty, sequences=tuple(sequences))


def _loss_has_a_term_beside(settings: RLSection) -> bool:
    """A KL or an entropy beside the algorithm's own loss: a mean over all of the policy's
    completions, with credit or without. `cem` takes its entropy over the elite alone."""
    kl = settings.kl.place == "loss" and settings.kl.coefficient > 0
    entropy = settings.entropy.coefficient > 0 and settings.algorithm.type != "cem"
    return kl or entropy


def rewards_ask_the_learner(settings: RLSection) -> bool:
    """Whether something in the reward is the learner's own, before the step: its entropies, or,
    where weights make completions those of the learner, the KL of the learner."""
    entropy = settings.entropy.place == "reward" and settings.entropy.coefficient > 0
    weighed = settings.off_policy.weights is not None
    return entropy or (weighed and settings.kl.place == "reward" and settings.kl.coefficient > 0)


def step_metrics(
    step: int,
    learner_version: int,
    groups: Sequence[ScoredGroup | FailedGroup],
    batch: TrainingBatch,
    report: StepReport,
    settings: RLSection,
    times_s: Mapping[str, float],
) -> dict[str, float | int | None]:
    """One line of ``metrics.jsonl``. `learner_version` is the version that was trained on.

    Means are over completions; `kl/mean` is in nats per completion, entropies in nats per token,
    times in seconds. A mean over nothing is None, never a number.

    `entropy/mean` is the learner's, exact, over the tokens that it trained on; `entropy/sampled`
    that of whoever sampled, over all tokens, by minus their logprobs.
    """
    scored = [group for group in groups if isinstance(group, ScoredGroup)]
    completions = [c for group in scored for c in group.rollout.completions]
    rewards = [r for group in scored for r in group.scores.rewards_G]
    shifted = [s for group in scored for s in group.scores.domain_shift_G]
    staleness = [learner_version - completion.oldest_version for completion in completions]
    row: dict[str, float | int | None] = {
        "step": step,
        "weight_version": learner_version + 1,
        "reward/mean": _mean(rewards),
        "reward/std": statistics.pstdev(rewards) if rewards else None,
        "ensemble/disagreement": _mean([d for g in scored for d in g.scores.disagreement_G]),
        "ensemble/distance": _mean([d for g in scored for d in g.scores.distance_G]),
        "ensemble/shift": _mean([s for g in scored for s in g.scores.shift_G]),
        "ensemble/flagged_share": _mean(shifted),
        "ensemble/flagged_share_data": _mean([s for g in scored for s in g.scores.data_shift_G]),
        "reward/cut_share": _mean([c for group in scored for c in group.scores.cut_G]),
        "reward/trained_mean": float(_penalised(scored, settings).mean()) if scored else None,
        **_penalties(completions, settings),
        **_means("criterion", [group.scores.parts_G for group in scored]),
        **_means("reward/own", [group.scores.own_G for group in scored]),
        **text_shares([completion.text for completion in completions]),
        "kl/mean": _mean([value for group in scored for value in group.kl_G]),
        "kl/coefficient": settings.kl.coefficient,
        "entropy/mean": report.metrics.get("entropy/mean"),
        "entropy/sampled": _mean([-x for c in completions for x in c.rollout_logprobs_T]),
        "entropy/coefficient": settings.entropy.coefficient,
        "staleness/mean": _mean(staleness),
        "staleness/max": max(staleness, default=None),
        "completion/length_mean": _mean([completion.length for completion in completions]),
        "completion/finished_share": _mean([c.finish_reason == "stop" for c in completions]),
        "groups/failed": len(groups) - len(scored),
        "groups/without_signal": _without_signal(scored, settings),
        "sequences/trained": batch.num_sequences,
        "tokens/step": sum(completion.length for completion in completions),
    }
    row |= {f"time/{name}_s": seconds for name, seconds in times_s.items()}
    row |= {name: value for name, value in report.metrics.items() if name not in row}
    return row


def _penalised(scored: Sequence[ScoredGroup], settings: RLSection) -> Tensor:
    """Shaped rewards with all that is added by the token; shape (P, G)."""
    terms_PGT = [_token_terms(group, settings) for group in scored]
    return shaped_rewards(scored, settings) + _sums(terms_PGT)


def _sums(terms_PGT: Sequence[Sequence[Sequence[float]]]) -> Tensor:
    """What the tokens of each completion add together, float64, shape (P, G)."""
    sums = [[sum(terms_T) for terms_T in terms_GT] for terms_GT in terms_PGT]
    return torch.tensor(sums, dtype=torch.float64)


def _token_terms(group: ScoredGroup, settings: RLSection) -> list[list[float]]:
    """What is added to the reward of every token of every completion: less the KL penalty, plus the
    entropy, each where it is in the reward."""
    terms_GT = [[0.0] * completion.length for completion in group.rollout.completions]
    if settings.kl.place == "reward" and settings.kl.coefficient:
        # Of whom the completions count for: the engine that sampled, with weights the learner.
        policy_GT = group.learner_logprobs_GT
        if settings.off_policy.weights is None:
            policy_GT = tuple(c.rollout_logprobs_T for c in group.rollout.completions)
        for terms_T, policy_T, reference_T in zip(
            terms_GT, policy_GT, group.reference_logprobs_GT, strict=True
        ):
            coefficient = settings.kl.coefficient
            terms_T[:] = [
                -penalty for penalty in token_penalties(policy_T, reference_T, coefficient)
            ]
    if settings.entropy.place == "reward" and settings.entropy.coefficient:
        for terms_T, entropies_T in zip(terms_GT, group.entropies_GT, strict=True):
            bonus = settings.entropy.coefficient
            terms_T[:] = [
                term + bonus * entropy for term, entropy in zip(terms_T, entropies_T, strict=True)
            ]
    return terms_GT


def _without_signal(scored: Sequence[ScoredGroup], settings: RLSection) -> int:
    """Groups of several completions whose rewards are all equal, before what their tokens add."""
    if not scored or settings.completions_per_prompt == 1:
        return 0
    rewards_PG = shaped_rewards(scored, settings)
    return int((rewards_PG == rewards_PG[:, :1]).all(dim=1).sum())


def _penalties(completions: Sequence[Completion], settings: RLSection) -> dict[str, float | None]:
    """Means of what shaping subtracts, by name."""
    each = [penalties_of(completion, settings.shaping) for completion in completions]
    return {
        f"reward/penalty_{name}": _mean([penalties[name] for penalties in each])
        for name in (each[0] if each else ())
    }


def _means(prefix: str, named: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float | None]:
    """Means over all completions, by name."""
    names = dict.fromkeys(name for values_G in named for name in values_G)
    return {
        f"{prefix}_{name}" if "/" in prefix else f"{prefix}/{name}": _mean(
            [value for values_G in named for value in values_G.get(name, ())]
        )
        for name in names
    }


def text_shares(texts: Sequence[str]) -> dict[str, float | None]:
    """Share of texts that fail each named check of `rlhf.text_checks`."""
    flags = [text_flags(text) for text in texts]
    return {
        f"text/{check.name}_share": _mean([check.name in flagged for flagged in flags])
        for check in TEXT_CHECKS
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
