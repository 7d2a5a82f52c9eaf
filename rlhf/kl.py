"""The KL penalty that holds the policy near the frozen reference."""

from __future__ import annotations

from collections.abc import Sequence


def penalised_rewards(
    rewards_G: Sequence[float], kl_G: Sequence[float], coefficient: float
) -> tuple[float, ...]:
    """Reward minus `coefficient` times the completion's KL estimate (nats per completion).

    The estimate is k1, the sum over tokens of log(policy/reference) at the sampled tokens
    (Schulman, 2020, "Approximating KL divergence"). In the reward its expected gradient is that
    of the KL itself; as a loss term it would be zero in expectation, so it is not offered there.
    """
    return tuple(reward - coefficient * kl for reward, kl in zip(rewards_G, kl_G, strict=True))
