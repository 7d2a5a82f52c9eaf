"""The KL penalty that holds the policy near the frozen reference.

With s = log(policy/reference) of a completion sampled by the policy (Schulman, 2020, "Approximating
KL divergence"): k1 = s, k2 = s^2 / 2, k3 = exp(-s) - 1 + s. k1 and k3 have the KL as their mean.
What their *gradients* have as theirs depends on the place:

| | in the reward | in the loss |
|---|---|---|
| k1 | that of KL(policy, reference): the default | zero, since E[grad log policy] = 0: refused |
| k2 | not the KL's, its own part is missing: refused | that of KL(policy, reference) |
| k3 | likewise: refused | that of KL(reference, policy): k2's is taken, k3's value shown |

Shapes: B completions, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.losses import BatchSize, Normalisation, reduce_tokens


def token_penalties(
    policy_logprobs_T: Sequence[float], reference_logprobs_T: Sequence[float], coefficient: float
) -> list[float]:
    """`coefficient` times k1 of every token: what is subtracted from the reward; their sum is that
    of the completion.

    Raises:
        ValueError: they are not of the same tokens.
    """
    pairs = zip(policy_logprobs_T, reference_logprobs_T, strict=True)
    return [coefficient * (policy - reference) for policy, reference in pairs]


def kl_in_the_loss(
    policy_logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    estimator: str,
    normalisation: Normalisation,
    size: BatchSize,
) -> Tensor:
    """The KL as a term of the loss, a scalar: its value by `estimator`, its gradient by k2.

    The gradient is that of the completion's k2, s * grad s: on policy in expectation the same as
    that of k1 in the reward, normalised over the batch like the algorithm's own loss. The value is
    the mean over the batch's completions, summed over tokens (straight-through).
    """
    padding_BT = mask_BT == 0
    mask_BT = mask_BT.to(policy_logprobs_BT.dtype)
    policy_BT = policy_logprobs_BT.masked_fill(padding_BT, 0.0)
    log_ratio_BT = policy_BT.detach() - reference_logprobs_BT.masked_fill(padding_BT, 0.0)
    log_ratio_B1 = log_ratio_BT.sum(dim=1, keepdim=True)
    slope = reduce_tokens(policy_BT * log_ratio_B1, mask_BT, normalisation, size)
    if estimator == "k3":
        value = ((torch.exp(-log_ratio_BT) - 1 + log_ratio_BT) * mask_BT).sum() / size.sequences
    else:
        live_B = (mask_BT.sum(dim=1) > 0).to(policy_BT.dtype)
        value = (0.5 * log_ratio_B1.squeeze(1).square() * live_B).sum() / size.sequences
    return slope - slope.detach() + value
