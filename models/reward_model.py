"""The reward-model ensemble: linear Bradley-Terry heads on a shared frozen trunk.

A reward model is a folder: ``heads.safetensors`` and ``reward.json``. Shapes: K members, D
features, N replies or pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.sources import resolve_model, weights_fingerprint
from models.trunk import Trunk
from rlhf.ensemble import disagreement, distance, shift_score, standardise
from rlhf.errors import DataError, ModelError
from rlhf.losses import bradley_terry_loss
from rlhf.records import Message
from rlhf.seeding import derive_seed

_BATCH_TOKENS = 4096
"""Padded tokens a scoring pass may hold."""


class RewardCard(BaseModel):
    """``reward.json``: what the heads were trained on, and what they may be used with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    dtype: str
    depth: float
    layers: int
    max_tokens: int
    members: int
    l2: float
    temperature: float
    signal_mean: tuple[float, float]
    """Disagreement and distance on held-out replies."""
    signal_deviation: tuple[float, float]
    threshold: float | None
    """Of the shift score, on held-out replies; None where they are too few to promise the rate."""
    false_alarm_rate: float
    false_alarm_interval: tuple[float, float]
    seed: int
    data: dict[str, Any]
    metrics: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Heads:
    """K linear heads on standardised features, the scale of each member's output, and how the
    training replies lie: a whitening matrix for each of the F families that the features are made
    of (last token, mean), D = F x H."""

    weights_KD: Tensor
    feature_mean_D: Tensor
    feature_deviation_D: Tensor
    member_mean_K: Tensor
    member_deviation_K: Tensor
    whitening_FHH: Tensor

    def fit_together(self) -> bool:
        """Whether the tensors agree on K and D."""
        if self.weights_KD.ndim != 2:
            return False
        members, features = self.weights_KD.shape
        if self.whitening_FHH.ndim != 3:
            return False
        families, width, again = self.whitening_FHH.shape
        if width != again or families * width != features:
            return False
        return {self.feature_mean_D.shape, self.feature_deviation_D.shape} == {(features,)} and {
            self.member_mean_K.shape,
            self.member_deviation_K.shape,
        } == {(members,)}

    def rewards(self, features_ND: Tensor) -> Tensor:
        """Standardised rewards, shape (K, N)."""
        raw_KN = self.raw(features_ND)
        return standardise(raw_KN, self.member_mean_K, self.member_deviation_K)

    def raw(self, features_ND: Tensor) -> Tensor:
        """Rewards on the Bradley-Terry scale (differences are log-odds), shape (K, N)."""
        return self.weights_KD @ self.standardised(features_ND).T

    def distance(self, features_ND: Tensor) -> Tensor:
        """Mahalanobis distance from the training replies, the mean over families; shape (N,)."""
        families, width, _ = self.whitening_FHH.shape
        parts_NFH = self.standardised(features_ND).reshape(-1, families, width)
        distances_FN = [
            distance(parts_NFH[:, family], self.whitening_FHH[family]) for family in range(families)
        ]
        return torch.stack(distances_FN).mean(dim=0)

    def standardised(self, features_ND: Tensor) -> Tensor:
        """Features by the training set's mean and deviation, shape (N, D)."""
        return (features_ND - self.feature_mean_D) / self.feature_deviation_D


@dataclass(frozen=True, slots=True)
class Scores:
    """What an ensemble says of N replies. `shifted_N`: by the threshold of held-out replies."""

    rewards_KN: Tensor
    disagreement_N: Tensor
    distance_N: Tensor
    shift_N: Tensor
    shifted_N: Tensor


def fit_heads(
    difference_ND: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    *,
    members: int,
    l2: float,
    seed: int,
) -> Tensor:
    """Weights (K, D) of bootstrap members on standardised features, by L-BFGS.

    `difference_ND` is chosen minus rejected; `labels_N` the probability that chosen is preferred.
    Each member minimises its Bradley-Terry cross-entropy over a bootstrap draw of the weighted
    pairs plus ``l2 * |w|^2``. The members are independent problems solved side by side.

    Raises:
        DataError: no pair has any weight.
    """
    live_N = weights_N > 0
    if not live_N.any():
        raise DataError("every pair has weight 0: there is nothing to train on")
    # Drawn from pairs that count: a draw of pairs without weight would have no mean.
    difference_ND, labels_N, weights_N = difference_ND[live_N], labels_N[live_N], weights_N[live_N]
    pairs = difference_ND.shape[0]
    counts_KN = torch.zeros(members, pairs)
    for member in range(members):
        generator = torch.Generator().manual_seed(derive_seed(seed, "bootstrap", member))
        drawn = torch.randint(pairs, (pairs,), generator=generator)
        counts_KN[member] = torch.bincount(drawn, minlength=pairs).float()
    labels_KN = labels_N.expand(members, pairs)
    weights_KN = counts_KN * weights_N
    # Each member's mean over its own draw: its weights sum to 1.
    weights_KN = weights_KN / weights_KN.sum(dim=1, keepdim=True)
    weights_KD = torch.zeros(members, difference_ND.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weights_KD], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        margins_KN = weights_KD @ difference_ND.T
        # A weighted mean over all members' pairs, times K, is the sum of the members' losses.
        loss = members * bradley_terry_loss(
            margins_KN.flatten(), labels_KN.flatten(), weights_KN.flatten()
        )
        loss = loss + l2 * weights_KD.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return weights_KD.detach()


def fit_temperature(margins_N: Tensor, labels_N: Tensor, weights_N: Tensor) -> float:
    """The temperature T that minimises the cross-entropy of sigmoid(margin / T) on held-out pairs.

    Guo et al. (2017), section 4.2; a grid over the logarithm, which one parameter needs no more of.
    """
    grid = torch.logspace(-2, 2, 161)
    losses = torch.stack([bradley_terry_loss(margins_N / t, labels_N, weights_N) for t in grid])
    return float(grid[losses.argmin()])


class RewardModel:
    """An ensemble that is ready to score: its card, its heads, and the trunk loaded on demand."""

    def __init__(self, card: RewardCard, heads: Heads) -> None:
        self.card = card
        self.heads = heads
        self._trunk: Trunk | None = None

    def trunk(self, device: str = "cpu") -> Trunk:
        """The trunk that the heads were trained on, loaded on first use.

        Raises:
            ModelError: the backbone or its tokenizer is another one than in training.
        """
        if self._trunk is None:
            folder = resolve_model(self.card.model)
            found = weights_fingerprint(folder)
            if found != self.card.model_fingerprint:
                raise ModelError(
                    f"the reward model was trained on {self.card.model} with fingerprint "
                    f"{self.card.model_fingerprint}, but the model there now has {found}"
                )
            trunk = Trunk(
                folder,
                depth=self.card.depth,
                dtype=self.card.dtype,
                max_tokens=self.card.max_tokens,
                batch_tokens=_BATCH_TOKENS,
                device=device,
            )
            if trunk.tokenizer.fingerprint != self.card.tokenizer_fingerprint:
                raise ModelError(
                    f"the reward model was trained with another tokenizer or chat template than "
                    f"{self.card.model} has now"
                )
            self._trunk = trunk
        return self._trunk

    def score(self, rows: Sequence[tuple[Sequence[Message], str, bool]]) -> Scores:
        """Scores of (conversation, reply, finished) rows."""
        trunk = self.trunk()
        tokenised = [trunk.tokenise(m, reply, finished=finished) for m, reply, finished in rows]
        return self.score_features(trunk.features(tokenised))

    def score_features(self, features_ND: Tensor) -> Scores:
        """Scores of trunk features."""
        rewards_KN = self.heads.rewards(features_ND)
        disagreement_N = disagreement(rewards_KN)
        distance_N = self.heads.distance(features_ND)
        shift_N = shift_score(
            torch.stack([disagreement_N, distance_N]),
            torch.tensor(self.card.signal_mean),
            torch.tensor(self.card.signal_deviation),
        )
        # Without a threshold (too few held-out replies to promise the rate) nothing is flagged.
        threshold = float("inf") if self.card.threshold is None else self.card.threshold
        return Scores(rewards_KN, disagreement_N, distance_N, shift_N, shift_N > threshold)

    def save(self, folder: Path) -> None:
        """Write ``heads.safetensors`` and ``reward.json`` into `folder`, which must exist."""
        names = Heads.__dataclass_fields__
        save_file(
            {name: getattr(self.heads, name).contiguous() for name in names},
            folder / "heads.safetensors",
        )
        (folder / "reward.json").write_text(self.card.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RewardModel:
        """Read a reward-model folder, or the one in a run's folder.

        Raises:
            ModelError: it is not one, or its files do not fit each other.
        """
        if not (folder / "reward.json").is_file():
            nested = folder / "reward"
            if (nested / "reward.json").is_file():
                return cls.load(nested)
            raise ModelError(f"{folder} is not a reward model: it has no reward.json")
        try:
            card = RewardCard.model_validate_json((folder / "reward.json").read_text())
            heads = Heads(**load_file(folder / "heads.safetensors"))
        except (ValidationError, SafetensorError, OSError, TypeError, UnicodeDecodeError) as error:
            raise ModelError(
                f"{folder} is a damaged reward model: {str(error).splitlines()[0]}"
            ) from None
        if not heads.fit_together() or heads.weights_KD.shape[0] != card.members:
            raise ModelError(f"{folder} is a damaged reward model: heads and card disagree")
        return cls(card, heads)
