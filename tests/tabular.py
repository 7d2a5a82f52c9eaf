"""A policy so small that every completion can be enumerated with its probability: expected updates
are sums, and nothing is sampled."""

from __future__ import annotations

import torch
from torch import Tensor

VOCABULARY, TOKENS = 2, 2
STOP = 0
"""Ends a completion, so that they differ in length: (0), (1, 0), (1, 1)."""
COMPLETIONS = [(STOP,), (1, STOP), (1, 1)]
REWARDS = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
LOGITS = torch.tensor([[0.5, -0.3], [-0.2, 0.9]], dtype=torch.float64)
"""A row of logits for each prefix: () and (1)."""
REFERENCE = torch.tensor([[0.1, -0.2], [0.4, 0.0]], dtype=torch.float64)
ENGINE = torch.tensor([[-0.4, 0.3], [0.8, 0.1]], dtype=torch.float64)
"""The policy that sampled, where it is another one."""


def token_logprobs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logprobs (3, T) of every completion's tokens, padded, and their mask."""
    table = torch.log_softmax(logits, dim=1)
    zero = torch.zeros((), dtype=torch.float64)
    rows = [[table[t, token] for t, token in enumerate(tokens)] for tokens in COMPLETIONS]
    padded = torch.stack([torch.stack([*row, zero][:TOKENS]) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (TOKENS - len(row)) for row in rows])
    return padded, mask.double()


def probabilities(logits: Tensor) -> Tensor:
    """Of every completion, (3,)."""
    padded, mask = token_logprobs(logits)
    return (padded * mask).sum(dim=1).exp()


def mean_reward(logits: Tensor, rewards: Tensor = REWARDS) -> Tensor:
    """J."""
    return (probabilities(logits) * rewards).sum()


def kl_to_the_reference(logits: Tensor) -> Tensor:
    """Of whole completions, in nats."""
    held, reference = probabilities(logits), probabilities(REFERENCE)
    return (held * (held.log() - reference.log())).sum()


def gradient(objective: Tensor, logits: Tensor) -> Tensor:
    """Of a scalar."""
    [found] = torch.autograd.grad(objective, logits)
    return found


def exactly(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    """Equal, and not since both are nothing."""
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
