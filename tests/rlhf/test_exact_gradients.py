"""Expected updates, with nothing sampled: on a policy so small that every group of completions can
be enumerated, each with its probability. What an algorithm claims to climb is climbed, to 1e-9, and
what is biased is biased by the number that docs/algorithms.md derives."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from rlhf.algorithms import Share, algorithm_of
from rlhf.algorithms.rloo import leave_one_out
from rlhf.config import (
    CEMSection,
    GRPOSection,
    GSPOSection,
    OffPolicySection,
    PPOSection,
    ReinforcePPSection,
    RLOOSection,
)
from rlhf.importance import importance_weights
from rlhf.kl import kl_in_the_loss, token_penalties
from rlhf.losses import BatchSize, entropy_from_logits, reduce_tokens
from tests.tabular import (
    COMPLETIONS,
    ENGINE,
    LOGITS,
    REFERENCE,
    REWARDS,
    STOP,
    TOKENS,
    exactly,
    gradient,
    kl_to_the_reference,
    mean_reward,
    probabilities,
    token_logprobs,
)


@pytest.fixture
def logits() -> Tensor:
    return LOGITS.clone().requires_grad_()


def expected_update(
    logits: Tensor,
    settings: object,
    group_size: int,
    rewards: Tensor = REWARDS,
    terms: Tensor | None = None,
) -> Tensor:
    """Mean over all groups, with their probabilities, of minus the loss's gradient."""
    algorithm = algorithm_of(settings)  # type: ignore[arg-type]
    padded, mask = token_logprobs(logits)
    chances = probabilities(logits).detach()
    total = torch.zeros_like(logits)
    for drawn in product(range(len(COMPLETIONS)), repeat=group_size):
        chosen = torch.tensor(drawn)
        added = torch.zeros_like(rewards) if terms is None else terms
        credit = algorithm.credit(rewards[chosen].unsqueeze(0), added[chosen].unsqueeze(0))
        live = credit.trained_PG[0]
        if not live.any():
            continue
        kept = chosen[live]
        size = BatchSize(len(kept), int(mask[kept].sum()), TOKENS)
        values = credit.values_PG[0][live].unsqueeze(1).expand_as(padded[kept])
        share = Share(padded[kept], padded[kept].detach(), values, mask[kept], size)
        loss = algorithm.loss(share).loss
        total -= chances[chosen].prod() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    return total


def penalties(logits: Tensor, coefficient: float) -> Tensor:
    """The KL penalty of every completion's tokens, (3, T)."""
    (policy, mask), (reference, _) = token_logprobs(logits.detach()), token_logprobs(REFERENCE)
    rows = [
        token_penalties(own, held, coefficient)
        for own, held in zip(policy.tolist(), reference.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64) * mask


def share_of_wins(logits: Tensor, rewards: Tensor) -> Tensor:
    """Gradient of the mean sign of a completion's reward less a sibling's, over sqrt(2)."""
    held = probabilities(logits).detach()
    wins = torch.sign(rewards.unsqueeze(1) - rewards.unsqueeze(0))
    return gradient((probabilities(logits) * (wins @ held)).sum() / 2**0.5, logits)


def kl_gradient(logits: Tensor) -> Tensor:
    return gradient(kl_to_the_reference(logits), logits)


# A group of equal rewards is left out; its credit would be zero, so the sum is the same. The
# constant normalisation divides by completions times TOKENS.
CONSTANT = {"normalisation": "constant"}


@pytest.mark.parametrize("group_size", [2, 3])
def test_rloo_climbs_the_mean_reward(logits, group_size):
    settings = RLOOSection(type="rloo", **CONSTANT)
    found = TOKENS * expected_update(logits, settings, group_size)
    exactly(found, gradient(mean_reward(logits), logits))


@pytest.mark.parametrize("group_size", [2, 3])
def test_dr_grpo_climbs_it_by_a_share_since_its_baseline_holds_the_sample(logits, group_size):
    settings = GRPOSection(divide_by_deviation=False, **CONSTANT)
    found = TOKENS * expected_update(logits, settings, group_size)
    exactly(found, (group_size - 1) / group_size * gradient(mean_reward(logits), logits))


def test_grpo_with_two_completions_climbs_the_share_of_wins(logits):
    # (r - mean) / deviation of two is the sign of their difference over sqrt(2), whatever the size
    # of the difference (but for the epsilon): the chance to win, not the reward.
    settings = GRPOSection(**CONSTANT)
    found = TOKENS * expected_update(logits, settings, 2, 1e6 * REWARDS)
    exactly(found, share_of_wins(logits, REWARDS))


@pytest.mark.parametrize("coefficient", [0.1, 1.0])
def test_k1_in_the_reward_climbs_reward_minus_kl(logits, coefficient):
    terms = -penalties(logits, coefficient).sum(dim=1)
    settings = RLOOSection(type="rloo", **CONSTANT)
    found = TOKENS * expected_update(logits, settings, 2, terms=terms)
    wanted = mean_reward(logits) - coefficient * kl_to_the_reference(logits)
    exactly(found, gradient(wanted, logits))


@pytest.mark.parametrize("coefficient", [0.1, 1.0])
@pytest.mark.parametrize("rewards", [1e6 * REWARDS, torch.zeros_like(REWARDS)])
def test_grpo_divides_the_reward_and_not_the_kl(logits, coefficient, rewards):
    terms = -penalties(logits, coefficient).sum(dim=1)
    settings = GRPOSection(**CONSTANT)
    found = TOKENS * expected_update(logits, settings, 2, rewards, terms)
    exactly(found, share_of_wins(logits, rewards) - coefficient / 2 * kl_gradient(logits))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_in_the_loss_descends_the_kl(logits, estimator):
    reference, _ = token_logprobs(REFERENCE)
    padded, mask = token_logprobs(logits)
    held = probabilities(logits).detach()
    found, value = torch.zeros_like(logits), 0.0
    for a, b in product(range(3), repeat=2):
        drawn = [a, b]
        term = kl_in_the_loss(
            padded[drawn],
            reference[drawn],
            mask[drawn],
            estimator=estimator,
            normalisation="constant",
            size=BatchSize(2, int(mask[drawn].sum()), TOKENS),
        )
        found += held[a] * held[b] * TOKENS * gradient(term, logits)
        padded, mask = token_logprobs(logits)
        value += float(held[a] * held[b] * term.detach())
    wanted, kl = probabilities(REFERENCE), kl_to_the_reference(logits)
    exactly(found, gradient(kl, logits))
    if estimator == "k3":
        # Its mean is the KL itself, token by token.
        assert value == pytest.approx(float(kl.detach()), abs=1e-9)
    else:
        squares = (held * (held.log() - wanted.log()).square()).sum() / 2
        assert value == pytest.approx(float(squares), abs=1e-9)


def test_what_is_refused_has_another_gradient(logits):
    # k1 as a loss: the mean of its own gradient is zero. k3 as a loss: that of the reverse KL.
    reference = probabilities(REFERENCE)
    chances = probabilities(logits)
    held = chances.detach()
    log_ratios = chances.log() - reference.log()
    nothing = gradient((held * log_ratios).sum(), logits)
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-12)
    chances = probabilities(logits)
    log_ratios = chances.log() - reference.log()
    k3 = gradient((held * (torch.exp(-log_ratios) - 1 + log_ratios)).sum(), logits)
    chances = probabilities(logits)
    exactly(k3, gradient((reference * (reference.log() - chances.log())).sum(), logits))


@pytest.mark.parametrize(("group_size", "share"), [(2, 0.5), (3, 0.34), (4, 0.5)])
def test_cem_climbs_the_likelihood_of_what_wins(logits, group_size, share):
    # The elite's distribution q by enumeration of order statistics; the update is the gradient of
    # sum q log pi, times the share of groups that have an elite at all.
    settings = CEMSection(type="cem", elite_share=share, normalisation="constant")
    kept = max(1, round(share * group_size))
    held = probabilities(logits).detach()
    elite = torch.zeros(3, dtype=torch.float64)
    for drawn in product(range(3), repeat=group_size):
        if len({float(REWARDS[n]) for n in drawn}) > 1:
            for n in sorted(drawn, key=lambda n: -float(REWARDS[n]))[:kept]:
                elite[n] += held[list(drawn)].prod() / kept
    found = TOKENS * expected_update(logits, settings, group_size)
    exactly(found, gradient((elite * probabilities(logits).log()).sum(), logits))


def test_cem_with_one_elite_of_n_imitates_best_of_n(logits):
    # Of n draws the best is y with chance F(y)^n - F(y-)^n; n equal draws are left out.
    held = probabilities(logits).detach()
    order = torch.argsort(REWARDS)
    below = torch.cat([torch.zeros(1, dtype=torch.float64), held[order].cumsum(0)])
    best = torch.zeros(3, dtype=torch.float64)
    best[order] = below[1:] ** 3 - below[:-1] ** 3 - held[order] ** 3
    settings = CEMSection(type="cem", elite_share=0.34, normalisation="constant")
    found = TOKENS * expected_update(logits, settings, 3)
    exactly(found, gradient((best * probabilities(logits).log()).sum(), logits))


def test_gspo_on_policy_weighs_completions_by_one_over_their_length(logits):
    # The ratio is a geometric mean over tokens: so is its gradient.
    settings = GSPOSection(type="gspo", divide_by_deviation=False)
    found = expected_update(logits, settings, 2)
    held = probabilities(logits).detach()
    _, mask = token_logprobs(logits)
    weights = held * (REWARDS - (held * REWARDS).sum()) / mask.sum(dim=1)
    exactly(found, gradient((weights * probabilities(logits).log()).sum() / 2, logits))


def test_reinforce_pp_leans_towards_what_the_batch_lacks(logits):
    # Dividing by the batch's deviation makes a batch of small differences as loud as one of large
    # ones: by enumeration, the credit of y averaged over the batches that it stands in.
    found = TOKENS * expected_update(
        logits, ReinforcePPSection(type="reinforce_pp", **CONSTANT), 3, 1e6 * REWARDS
    )
    held = probabilities(logits).detach()
    weights = torch.zeros(3, dtype=torch.float64)
    for others in product(range(3), repeat=2):
        for n in range(3):
            batch = REWARDS[[n, *others]]
            if batch.std() > 0:
                z = (REWARDS[n] - batch.mean()) / batch.std(correction=0)
                weights[n] += held[n] * held[list(others)].prod() * z
    exactly(found, gradient((weights * probabilities(logits).log()).sum(), logits))


# What a critic believes before each token, the same for all completions with this prefix. A critic
# that is wrong only adds noise, as long as advantages look ahead to the end.
BELIEFS = torch.tensor([[0.7, 0.0], [0.7, -1.1], [0.7, -1.1]], dtype=torch.float64)


def expected_ppo_update(logits: Tensor, rewards: Tensor, **settings: object) -> Tensor:
    algorithm = algorithm_of(PPOSection(type="ppo", whiten=False, **CONSTANT, **settings))
    padded, mask = token_logprobs(logits)
    chances = probabilities(logits).detach()
    total = torch.zeros_like(logits)
    for n in range(3):
        one = slice(n, n + 1)
        advantages, _ = algorithm.advantages(rewards[one], BELIEFS[one], mask[one])
        size = BatchSize(1, int(mask[one].sum()), TOKENS)
        share = Share(padded[one], padded[one].detach(), advantages, mask[one], size)
        total -= chances[n] * gradient(algorithm.loss(share).loss, logits)
        padded, mask = token_logprobs(logits)
    return TOKENS * total


def at_the_end(rewards: Tensor) -> Tensor:
    """Rewards of completions as those of their last tokens, (3, T)."""
    found = torch.zeros(3, TOKENS, dtype=torch.float64)
    for n, completion in enumerate(COMPLETIONS):
        found[n, len(completion) - 1] = rewards[n]
    return found


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_ppo_that_looks_ahead_to_the_end_climbs_reward_minus_kl_whatever_its_critic_believes(
    logits, coefficient
):
    rewards = at_the_end(REWARDS) - penalties(logits, coefficient)
    found = expected_ppo_update(logits, rewards, gae_lambda=1.0)
    wanted = mean_reward(logits) - coefficient * kl_to_the_reference(logits)
    exactly(found, gradient(wanted, logits))


def test_ppo_that_trusts_its_critic_after_a_token_climbs_what_the_critic_believes(logits):
    # lambda = 0: the first token is worth what the critic says of its prefix, and no more is known.
    found = expected_ppo_update(logits, at_the_end(REWARDS), gae_lambda=0.0)
    table = torch.log_softmax(logits, dim=1).exp()
    first = table[0, STOP] * REWARDS[0] + table[0, 1] * BELIEFS[1, 1]
    second = table[0, 1].detach() * (table[1] * REWARDS[1:]).sum()
    exactly(found, gradient(first + second, logits))


def test_the_entropy_in_the_reward_climbs_the_entropy_of_whole_completions(logits):
    # Credit holds what is to be found further on, the bonus what is here: together the gradient of
    # reward plus the entropy of completions.
    bonus = 0.7
    _, mask = token_logprobs(logits)
    inside = (entropy_from_logits(logits).detach() * mask).sum(dim=1)
    settings = RLOOSection(type="rloo", **CONSTANT)
    found = TOKENS * expected_update(logits, settings, 2, REWARDS + bonus * inside)
    held = probabilities(logits).detach()
    for a, b in product(range(3), repeat=2):
        each_T = entropy_from_logits(logits).expand(2, TOKENS)
        there = mask[[a, b]]
        size = BatchSize(2, int(there.sum()), TOKENS)
        term = bonus * reduce_tokens(each_T, there, "constant", size)
        found += TOKENS * held[a] * held[b] * gradient(term, logits)
    chances = probabilities(logits)
    whole = -(chances * chances.log()).sum()
    exactly(found, gradient(mean_reward(logits) + bonus * whole, logits))


NEVER = 1e9


def expected_stale_update(
    logits: Tensor,
    low: float = 0.2,
    high: float = 0.2,
    ratio: str = "token",
    **off_policy_settings: object,
) -> Tensor:
    """Expected update where the engine's policy samples; weights or the ratio make up for it."""
    off_policy = OffPolicySection(**off_policy_settings)
    settings = RLOOSection(type="rloo", ratio=ratio, clip_low=low, clip_high=high, **CONSTANT)
    algorithm = algorithm_of(settings)
    padded, mask = token_logprobs(logits)
    sampled, _ = token_logprobs(ENGINE)
    chances = probabilities(ENGINE)
    total = torch.zeros_like(logits)
    for drawn in product(range(3), repeat=2):
        rows = list(drawn)
        drawn_1G = REWARDS[rows].unsqueeze(0)
        credit_1G = algorithm.credit(drawn_1G, torch.zeros_like(drawn_1G))
        values = credit_1G.values_PG[0].unsqueeze(1)
        weights = importance_weights(padded[rows], sampled[rows], mask[rows], off_policy)
        size = BatchSize(2, int(mask[rows].sum()), TOKENS)
        credit = values.expand(2, TOKENS) * weights.weights_BT
        old = sampled[rows] if off_policy.weights is None else padded[rows].detach()
        loss = algorithm.loss(Share(padded[rows], old, credit, mask[rows], size)).loss
        total -= chances[rows].prod() * gradient(loss, logits)
        padded, mask = token_logprobs(logits)
    return TOKENS * total


def test_weights_of_completions_make_up_for_another_sampler(logits):
    found = expected_stale_update(logits, weights="sequence", truncate=NEVER)
    exactly(found, gradient(mean_reward(logits), logits))


def test_weights_of_tokens_leave_the_prefixes_to_the_sampler(logits):
    # Tokens are the learner's; how often a prefix is met, and so what follows is worth, is not.
    found = expected_stale_update(logits, weights="token", truncate=NEVER)
    table, sampler = torch.log_softmax(logits, dim=1).exp(), torch.softmax(ENGINE, dim=1)
    worth = (sampler[1] * REWARDS[1:]).sum()
    # The sibling is the sampler's too: its mean is the baseline, and goes with the first token.
    first = table[0, STOP] * REWARDS[0] + table[0, 1] * worth
    second = sampler[0, 1] * (table[1] * REWARDS[1:]).sum()
    exactly(found, gradient(first + second, logits))


def test_cut_weights_give_the_learner_no_more_than_so_many_times_what_was_sampled(logits):
    # The sampler's chance times the cut weight, in the place of the learner's chance.
    found = expected_stale_update(logits, weights="sequence", truncate=1.1)
    held, sampled = probabilities(logits).detach(), probabilities(ENGINE)
    assert (held > 1.1 * sampled).any() and (held < 1.1 * sampled).any()
    wanted = torch.zeros_like(logits)
    for a, b in product(range(3), repeat=2):
        for one, other in ((a, b), (b, a)):
            credit = REWARDS[one] - REWARDS[other]
            weight = min(held[one] / sampled[one], 1.1) * sampled[a] * sampled[b] / 2
            wanted += weight * credit * gradient(probabilities(logits).log()[one], logits)
    exactly(found, wanted)


def test_without_weights_the_ratio_of_completions_makes_up_for_another_sampler(logits):
    found = expected_stale_update(logits, 0.999, NEVER, "completion")
    exactly(found, gradient(mean_reward(logits), logits))


def test_without_weights_the_ratio_leaves_the_prefixes_to_the_sampler_as_those_of_tokens_do(logits):
    found = expected_stale_update(logits, 0.999, NEVER)
    exactly(found, expected_stale_update(logits, weights="token", truncate=NEVER))


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.6, 1.1)])
def test_clipping_leaves_out_tokens_that_are_already_beyond_where_their_credit_pushes(
    logits, low, high
):
    # The bias: less the tokens whose ratio is out of the range on that side.
    found = expected_stale_update(logits, low, high)
    (padded, _), (sampled, _) = token_logprobs(logits), token_logprobs(ENGINE)
    ratios, chances = (padded - sampled).exp().detach(), probabilities(ENGINE)
    bias, left_out = torch.zeros_like(logits), 0
    for one, other in product(range(3), repeat=2):
        credit = REWARDS[one] - REWARDS[other]
        for t in range(len(COMPLETIONS[one])):
            ratio = float(ratios[one, t])
            if (credit > 0 and ratio > 1 + high) or (credit < 0 and ratio < 1 - low):
                slope = gradient(token_logprobs(logits)[0][one, t], logits)
                bias -= chances[one] * chances[other] * credit * ratio * slope
                left_out += 1
    assert left_out
    exactly(found - expected_stale_update(logits, 0.999, NEVER), bias)


def centred_by_too_many(rewards_PG: Tensor) -> Tensor:
    return rewards_PG - rewards_PG.mean(dim=1, keepdim=True)


def with_itself_in_the_baseline(rewards_PG: Tensor) -> Tensor:
    others = rewards_PG.sum(dim=1, keepdim=True) / (rewards_PG.shape[1] - 1)
    return rewards_PG - others


FAULTS = {
    "a flipped sign of the credit": (
        "rlhf.algorithms.rloo.leave_one_out",
        lambda rewards_PG: -leave_one_out(rewards_PG),
    ),
    "G in the place of G - 1": ("rlhf.algorithms.rloo.leave_one_out", centred_by_too_many),
    "a baseline that holds the sample": (
        "rlhf.algorithms.rloo.leave_one_out",
        with_itself_in_the_baseline,
    ),
    "a flipped sign of the loss": (
        "rlhf.losses.reduce_tokens",
        lambda *arguments: -reduce_tokens(*arguments),
    ),
    "tokens in the place of completions": (
        "rlhf.losses.reduce_tokens",
        lambda values, mask, _, size: reduce_tokens(values, mask, "token", size),
    ),
    "the longest completion forgotten": (
        "rlhf.losses.reduce_tokens",
        lambda values, mask, how, size: reduce_tokens(
            values, mask, how, BatchSize(size.sequences, size.tokens, 1)
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_does_not_pass(logits, monkeypatch, fault):
    test_rloo_climbs_the_mean_reward(logits, 2)
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        test_rloo_climbs_the_mean_reward(logits, 2)
