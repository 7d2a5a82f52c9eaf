"""The ensemble that chooses among candidates, and says what it does not know."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.gauges import in_ray_actor
from actors.reward import EMPTY_REWARD
from cluster.guard import Guard
from models.reward_model import RewardModel
from rlhf.records import Message


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the ensemble says of a candidate, in deviations over its training replies: the mean over
    members, each member's reward, their disagreement, whether it is out of their domain, and the
    reward model's version."""

    reward: float
    rewards_K: tuple[float, ...]
    disagreement: float
    domain_shift: bool
    version: str

    def lower_bound(self, penalty: float) -> float:
        """What candidates are ranked by: reward less `penalty` times disagreement."""
        return self.reward - penalty * self.disagreement


class ChatScorer:
    """One reward model."""

    def __init__(self, model: str, gpus: float = 0) -> None:
        self._guard = Guard(with_parent=in_ray_actor())
        self._model = RewardModel.load(Path(model))
        self._model.trunks("cuda" if gpus else "cpu")
        # Serve calls from several threads, and a trunk reads one batch at a time.
        self._turn = threading.Lock()

    def version(self) -> str:
        """The reward model's version."""
        return self._model.card.version

    def judge(self, messages: Sequence[Message], text: str, finished: bool) -> Verdict:
        """What is said of one answer. One without visible text gets what training gives it.

        Raises:
            ModelError: the answer cannot be tokenised.
        """
        members = self._model.card.members
        if not text.strip():
            return Verdict(EMPTY_REWARD, (EMPTY_REWARD,) * members, 0.0, True, self.version())
        with self._turn:
            scores = self._model.score([(messages, text, finished)])
        return Verdict(
            float(scores.rewards_KN[:, 0].mean()),
            tuple(scores.rewards_KN[:, 0].tolist()),
            float(scores.disagreement_N[0]),
            bool(scores.shifted_N[0]),
            self.version(),
        )
