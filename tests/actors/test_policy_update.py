"""From records to a gradient: batches as the loop makes them, through the learner's own assembly of
the loss, on the policy of `tests.tabular`. Every group of completions is enumerated, so that what
is added up is the expected update; it is that of the stated objective, to 1e-6 (float32 inside)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.policy_update import PolicyUpdate
from models.packing import PackedBatch
from rlhf.algorithms import algorithm_of
from rlhf.config import RLSection
from rlhf.losses import entropy_from_logits
from rlhf.records import Completion, GroupScores, Message, Prompt, RolloutGroup, ScoredGroup
from rlhf.steps import rewards_ask_the_learner, training_batch
from tests.tabular import (
    COMPLETIONS,
    ENGINE,
    LOGITS,
    REFERENCE,
    REWARDS,
    TOKENS,
    exactly,
    gradient,
    kl_to_the_reference,
    mean_reward,
    probabilities,
    token_logprobs,
)

NEVER = 1e9
VALUES = torch.tensor([0.7, -1.1], dtype=torch.float64)
"""What the critic believes of the prefixes () and (1)."""
RLOO = {"type": "rloo", "normalisation": "constant"}


class TabularEngine:
    """In the place of DeepSpeed's: a row of logits and a value for each prefix. A step keeps the
    gradients and changes nothing."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.logits = LOGITS.clone().requires_grad_()
        self.values = VALUES.clone().requires_grad_()
        self.gradients: list[tuple[Tensor, Tensor]] = []

    def run(self, packed: PackedBatch, temperature: float, _: bool = False) -> tuple[Tensor, ...]:
        ids_NT = packed.reply_ids_NT
        prefixes_T = torch.arange(ids_NT.shape[1])
        table = torch.log_softmax(self.logits / temperature, dim=1)
        entropies_T = entropy_from_logits(self.logits / temperature)[prefixes_T]
        return (
            table[prefixes_T, ids_NT],
            entropies_T.expand(ids_NT.shape),
            self.values[prefixes_T].expand(ids_NT.shape),
        )

    def step(self, losses: Sequence[Callable[[], Tensor]], step: int) -> float:
        total = sum((loss() for loss in losses), torch.zeros(()))
        over = (self.logits, self.values)
        logits, values = torch.autograd.grad(total, over, allow_unused=True, materialize_grads=True)
        self.gradients.append((logits, values))
        return float(logits.norm())


def scored(drawn: Sequence[int], sampler: Tensor) -> ScoredGroup:
    (sampled, _), (reference, _) = token_logprobs(sampler), token_logprobs(REFERENCE)
    lengths = [len(COMPLETIONS[n]) for n in drawn]
    completions = tuple(
        Completion(COMPLETIONS[n], "text", tuple(sampled[n, :length].tolist()), "stop", 0, 0, 1)
        for n, length in zip(drawn, lengths, strict=True)
    )
    rewards, zeros = tuple(REWARDS[list(drawn)].tolist()), (0.0,) * len(drawn)
    no = (False,) * len(drawn)
    return ScoredGroup(
        RolloutGroup(Prompt("p", (Message("user", "?"),)), 0, (7, 8), completions),
        GroupScores((rewards,), rewards, zeros, zeros, zeros, no, no, "r1"),
        tuple(
            tuple(reference[n, :length].tolist()) for n, length in zip(drawn, lengths, strict=True)
        ),
    )


def asked(group: ScoredGroup, update: PolicyUpdate) -> ScoredGroup:
    """As the fleet asks the learner."""
    completions = group.rollout.completions
    found = update.evaluate(
        [group.rollout.prompt_token_ids] * len(completions),
        [completion.token_ids for completion in completions],
        1.0,
    )
    logprobs_GT, entropies_GT = zip(*found, strict=True)
    return ScoredGroup(
        group.rollout, group.scores, group.reference_logprobs_GT, entropies_GT, logprobs_GT
    )


def expected_update(sampler: Tensor = LOGITS, **settings: Any) -> tuple[Tensor, Tensor]:
    """Minus the loss's gradient by logits and values, averaged over all groups with their chances;
    times TOKENS, by which the constant normalisation divides."""
    defaults = {
        "algorithm": RLOO,
        "kl": {"coefficient": 0.0},
        "prompts_per_step": 1,
        "completions_per_prompt": 2,
        "max_tokens": TOKENS,
    }
    rl = RLSection.model_validate(defaults | settings)
    engine = TabularEngine()
    update = PolicyUpdate(
        engine,  # type: ignore[arg-type]
        algorithm_of(rl.algorithm),
        rl,
        pad_id=0,
        batch_tokens=4,  # a completion of two to a micro-batch
        rank=0,
        world_size=1,
    )
    chances = probabilities(sampler)
    total = torch.zeros_like(LOGITS), torch.zeros_like(VALUES)
    for drawn in product(range(len(COMPLETIONS)), repeat=rl.completions_per_prompt):
        group = scored(drawn, sampler)
        if rewards_ask_the_learner(rl):
            group = asked(group, update)
        batch = training_batch([group], rl)
        if not batch.sequences:
            continue
        engine.gradients.clear()
        update.step(batch, 0)
        [found] = engine.gradients
        for sums, each in zip(total, found, strict=True):
            sums -= TOKENS * chances[list(drawn)].prod() * each
    return total


def climbs(objective: Callable[[Tensor], Tensor], found: Tensor) -> None:
    logits = LOGITS.clone().requires_grad_()
    exactly(found, gradient(objective(logits), logits), 1e-6)


@pytest.mark.parametrize("kind", ["rloo", "ppo"])
@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_the_kl_in_the_reward(coefficient, kind):
    ppo = {"type": "ppo", "epochs": 1, "gae_lambda": 1.0, "whiten": False}
    algorithm = RLOO if kind == "rloo" else ppo | {"normalisation": "constant"}
    found, _ = expected_update(algorithm=algorithm, kl={"coefficient": coefficient})
    climbs(lambda logits: mean_reward(logits) - coefficient * kl_to_the_reference(logits), found)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_in_the_loss(estimator):
    kl = {"coefficient": 0.5, "place": "loss", "estimator": estimator}
    found, _ = expected_update(kl=kl)
    climbs(lambda logits: mean_reward(logits) - 0.5 * kl_to_the_reference(logits), found)


def test_the_entropy_in_the_reward():
    found, _ = expected_update(entropy={"coefficient": 0.7, "place": "reward"})

    def objective(logits: Tensor) -> Tensor:
        chances = probabilities(logits)
        return mean_reward(logits) - 0.7 * (chances * chances.log()).sum()

    climbs(objective, found)


def test_the_entropy_in_the_loss_is_that_of_all_tokens_also_where_rewards_are_equal():
    found, _ = expected_update(entropy={"coefficient": 0.7})
    held = probabilities(LOGITS)

    def objective(logits: Tensor) -> Tensor:
        each_T, bonus = entropy_from_logits(logits), torch.zeros(())
        for drawn in product(range(3), repeat=2):
            lengths = [len(COMPLETIONS[n]) for n in drawn]
            inside = sum(each_T[:length].sum() for length in lengths) / sum(lengths)
            bonus = bonus + held[list(drawn)].prod() * inside
        return mean_reward(logits) + TOKENS * 0.7 * bonus

    climbs(objective, found)


def test_weights_of_completions_make_up_for_another_sampler_in_the_reward_and_in_the_kl():
    found, _ = expected_update(
        ENGINE,
        kl={"coefficient": 0.5},
        off_policy={"weights": "sequence", "truncate": NEVER},
        max_staleness=1,
    )
    climbs(lambda logits: mean_reward(logits) - 0.5 * kl_to_the_reference(logits), found)


def test_the_bare_ratio_of_completions_makes_up_for_another_sampler():
    whole = {"ratio": "completion", "clip_low": 0.999, "clip_high": NEVER}
    found, _ = expected_update(ENGINE, algorithm=RLOO | whole, max_staleness=1)
    climbs(mean_reward, found)


def leaving_the_prefixes(rewards: Tensor) -> Callable[[Tensor], Tensor]:
    """Tokens are the learner's; how often a prefix is met, and what follows is worth, is not."""

    def objective(logits: Tensor) -> Tensor:
        table, sampler = torch.softmax(logits, dim=1), torch.softmax(ENGINE, dim=1)
        worth = (sampler[1] * rewards[1:]).sum()
        first = table[0, 0] * rewards[0] + table[0, 1] * worth
        return first + sampler[0, 1] * (table[1] * rewards[1:]).sum()

    return objective


@pytest.mark.parametrize("weights", [None, "token"])
def test_weights_of_tokens_and_the_bare_ratio_leave_the_prefixes_to_the_sampler(weights):
    off_policy = {"weights": weights, "truncate": NEVER} if weights else {}
    wide = {"clip_low": 0.999, "clip_high": NEVER}
    found, _ = expected_update(
        ENGINE, algorithm=RLOO | wide, off_policy=off_policy, max_staleness=1
    )
    climbs(leaving_the_prefixes(REWARDS), found)


@pytest.mark.parametrize("weights", [None, "token"])
def test_the_kl_in_the_reward_is_the_samplers_without_weights_and_the_learners_with_them(weights):
    off_policy = {"weights": weights, "truncate": NEVER} if weights else {}
    wide = {"clip_low": 0.999, "clip_high": NEVER}
    found, _ = expected_update(
        ENGINE,
        algorithm=RLOO | wide,
        kl={"coefficient": 0.5},
        off_policy=off_policy,
        max_staleness=1,
    )
    whose, reference = probabilities(LOGITS if weights else ENGINE), probabilities(REFERENCE)
    climbs(leaving_the_prefixes(REWARDS - 0.5 * (whose.log() - reference.log())), found)


def test_the_critic_descends_half_its_squared_error():
    ppo = {"type": "ppo", "epochs": 1, "gae_lambda": 1.0, "whiten": False}
    _, found = expected_update(
        algorithm=ppo | {"normalisation": "constant"},
        kl={"coefficient": 0.5},
        completions_per_prompt=1,
    )
    (policy, _), (reference, _) = token_logprobs(LOGITS), token_logprobs(REFERENCE)
    penalties, chances = 0.5 * (policy - reference), probabilities(LOGITS)
    wanted = torch.zeros_like(VALUES)
    for n, completion in enumerate(COMPLETIONS):
        for t in range(len(completion)):
            to_come = REWARDS[n] - penalties[n, t : len(completion)].sum()
            wanted[t] += chances[n] * (to_come - VALUES[t]) / len(completion)
    exactly(found, TOKENS * 0.1 * wanted, 1e-6)


UPDATE, STEPS = "actors.policy_update", "rlhf.steps"
FAULTS: dict[str, tuple[str, str, str, Callable[[], None]]] = {
    "a flipped sign of the entropy": (
        UPDATE,
        "loss - coefficient * reduce_tokens",
        "loss + coefficient * reduce_tokens",
        test_the_entropy_in_the_reward,
    ),
    "an entropy over tokens beside a credit over completions": (
        UPDATE,
        'how = "token" if rl.entropy.place == "loss" else normalisation',
        'how = "token"',
        test_the_entropy_in_the_reward,
    ),
    "a flipped sign of the KL in the loss": (
        UPDATE,
        "loss + batch.kl_coefficient * terms",
        "loss - batch.kl_coefficient * terms",
        lambda: test_the_kl_in_the_loss("k2"),
    ),
    "a flipped sign of the critic": (
        UPDATE,
        "loss + self._algorithm.settings.critic.coefficient",
        "loss - self._algorithm.settings.critic.coefficient",
        test_the_critic_descends_half_its_squared_error,
    ),
    "weights and a ratio against the sampler too": (
        UPDATE,
        "ours.rollout_BT if rl.off_policy.weights is None else start_NT",
        "ours.rollout_BT",
        test_weights_of_completions_make_up_for_another_sampler_in_the_reward_and_in_the_kl,
    ),
    "a ratio against the learner and no weights": (
        UPDATE,
        "ours.rollout_BT if rl.off_policy.weights is None else start_NT",
        "start_NT",
        lambda: test_weights_of_tokens_and_the_bare_ratio_leave_the_prefixes_to_the_sampler(None),
    ),
    "weights that are forgotten": (
        UPDATE,
        "ours.credit_BT * weights.weights_BT",
        "ours.credit_BT",
        test_weights_of_completions_make_up_for_another_sampler_in_the_reward_and_in_the_kl,
    ),
    "another completion's credit": (
        UPDATE,
        "known.of(list(packed.indices))",
        "known.of(list(range(len(packed.indices))))",
        lambda: test_the_kl_in_the_reward(0.5, "rloo"),
    ),
    "a flipped sign of the KL in the reward": (
        STEPS,
        "-penalty for penalty in",
        "penalty for penalty in",
        lambda: test_the_kl_in_the_reward(0.5, "rloo"),
    ),
    "the sampler's KL beside the learner's weights": (
        STEPS,
        "if settings.off_policy.weights is None:",
        "if True:",
        test_weights_of_completions_make_up_for_another_sampler_in_the_reward_and_in_the_kl,
    ),
    "an entropy of those with credit alone": (
        STEPS,
        "return kl or entropy",
        "return kl",
        test_the_entropy_in_the_loss_is_that_of_all_tokens_also_where_rewards_are_equal,
    ),
    "the reward with the first token": (
        STEPS,
        "(*terms_T[:-1], terms_T[-1] + reward)",
        "(terms_T[0] + reward, *terms_T[1:])",
        lambda: test_the_kl_in_the_reward(0.5, "ppo"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_does_not_pass(monkeypatch, fault):
    name, right, wrong, proof = FAULTS[fault]
    source = Path(importlib.import_module(name).__file__ or "").read_text()
    assert source.count(right) == 1
    changed = ModuleType("changed")
    monkeypatch.setitem(sys.modules, "changed", changed)
    exec(compile(source.replace(right, wrong), "changed", "exec"), vars(changed))
    for mine in ("PolicyUpdate", "training_batch"):
        if hasattr(changed, mine):
            monkeypatch.setitem(globals(), mine, getattr(changed, mine))
    with pytest.raises(AssertionError):
        proof()
