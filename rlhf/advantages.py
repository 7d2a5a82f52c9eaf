"""Advantages: how much better a completion is than its siblings.

Each function maps rewards of shape (P, G), P prompts by G completions, to advantages of the same
shape. Groups never mix: every row is normalised by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _check(rewards_PG: Tensor, minimum: int) -> None:
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < minimum:
        raise ValueError(
            f"rewards need the shape (prompts, completions) with at least {minimum} completions, "
            f"got {tuple(rewards_PG.shape)}"
        )


def group_relative(
    rewards_PG: Tensor, *, divide_by_deviation: bool = True, epsilon: float = 1e-4
) -> Tensor:
    """Reward minus the group's mean, over the group's (unbiased) standard deviation.

    Shao et al. (2024), DeepSeekMath, section 4.1.2; without the division it is the form of
    Liu et al. (2025), Dr. GRPO. A group of equal rewards gets zeros.
    """
    _check(rewards_PG, 2)
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if not divide_by_deviation:
        return centred_PG
    return centred_PG / (rewards_PG.std(dim=1, keepdim=True) + epsilon)


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """Reward minus the mean of the *other* completions of its group.

    Ahmadian et al. (2024), Back to Basics, equation 8; Kool et al. (2019). Unbiased, since the
    baseline does not contain the sample. Equals the centred reward times G / (G - 1).
    """
    _check(rewards_PG, 2)
    group_size = rewards_PG.shape[1]
    others_PG = (rewards_PG.sum(dim=1, keepdim=True) - rewards_PG) / (group_size - 1)
    return rewards_PG - others_PG


def advantages(rewards_PG: Tensor, algorithm: str, *, divide_by_deviation: bool = True) -> Tensor:
    """The advantages of the named algorithm: ``"grpo"`` or ``"rloo"``."""
    if algorithm == "grpo":
        return group_relative(rewards_PG, divide_by_deviation=divide_by_deviation)
    if algorithm == "rloo":
        return leave_one_out(rewards_PG)
    raise ValueError(f"unknown algorithm {algorithm!r}; known are grpo and rloo")


def without_signal(rewards_G: Tensor) -> bool:
    """Whether all rewards of a group are equal, so that its advantages are all zero."""
    return bool(torch.all(rewards_G == rewards_G[0]))
