"""The reward actor: scores groups by every ensemble member it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from actors.gauges import Gauges, in_ray_actor
from cluster.guard import Guard
from models.reward_model import RewardModel
from rlhf.config import RewardFunction
from rlhf.ensemble import aggregate, lower_bound
from rlhf.errors import GenerationError, PavlovError
from rlhf.records import GroupScores, RolloutGroup
from rlhf.reward_functions import RewardFunctions

EMPTY_REWARD = -3.0
"""What a completion without visible text gets, in deviations. There is nothing to judge, and a head
that likes finished answers would like the empty one best: trained on human comparisons heads put it
2.5 to 5 deviations down, trained on 150 simulated ones 1.9 up (docs/log.md)."""

_PLACEHOLDER = "."


class RewardActor:
    """One reward model.

    Args:
        model: a reward-model folder.
        disagreement_penalty: times the disagreement is subtracted from the mean over members.
        functions: rewards of the run's own, named beside the ensemble's.
    """

    def __init__(
        self,
        model: str,
        disagreement_penalty: float,
        run: str,
        name: str,
        gpus: float = 0,
        functions: Sequence[RewardFunction] = (),
    ) -> None:
        self._guard = Guard(with_parent=in_ray_actor())
        self._gauges = Gauges(run, name)
        self._model = RewardModel.load(Path(model))
        self._model.trunks("cuda" if gpus else "cpu")
        self._penalty = disagreement_penalty
        self._functions = RewardFunctions(functions)

    def version(self) -> str:
        """The reward model's version; rewards of two versions never mix in one group."""
        return self._model.card.version

    def score(self, groups: Sequence[RolloutGroup]) -> list[GroupScores | GenerationError]:
        """Scores of every group, in one batch. Unscorable text comes back as an error."""
        results: list[GroupScores | GenerationError | None] = [None] * len(groups)
        rows, owners, empty, cut = [], [], [], list[bool]()
        for index, group in enumerate(groups):
            replies = [
                (group.prompt.messages, c.text or _PLACEHOLDER, c.finish_reason == "stop")
                for c in group.completions
            ]
            try:
                tokenised = [self._model.tokenise(reply) for reply in replies]
            except PavlovError as error:
                results[index] = GenerationError(f"prompt {group.prompt.id}: {error}")
                continue
            rows += tokenised
            cut += [
                not self._model.reads_to_its_end(reply, made)
                for reply, made in zip(replies, tokenised, strict=True)
            ]
            empty += [not c.text.strip() for c in group.completions]
            owners.append((index, len(tokenised)))
        scores = self._model.score_features(self._model.features(rows))
        parts_CN = scores.criteria_KCN.mean(dim=0)
        rewards_KN, disagreement_N = scores.rewards_KN, scores.disagreement_N
        empty_N = torch.tensor(empty, dtype=torch.bool)
        rewards_KN[:, empty_N] = EMPTY_REWARD
        parts_CN[:, empty_N] = EMPTY_REWARD
        disagreement_N[empty_N] = 0.0
        shifted_N = scores.shifted_N | empty_N
        rewards_N = lower_bound(aggregate(rewards_KN), disagreement_N, self._penalty)
        prompts = [groups[index].prompt for index, count in owners for _ in range(count)]
        completions = [c for index, _ in owners for c in groups[index].completions]
        own = self._functions(prompts, completions) if completions else {}
        begin = 0
        for index, count in owners:
            part = slice(begin, begin + count)
            results[index] = GroupScores(
                rewards_KG=tuple(map(tuple, rewards_KN[:, part].tolist())),
                rewards_G=tuple(rewards_N[part].tolist()),
                disagreement_G=tuple(disagreement_N[part].tolist()),
                distance_G=tuple(scores.distance_N[part].tolist()),
                shift_G=tuple(scores.shift_N[part].tolist()),
                data_shift_G=tuple(shifted_N[part].tolist()),
                domain_shift_G=tuple(shifted_N[part].tolist()),
                reward_version=self._model.card.version,
                parts_G={
                    criterion: tuple(parts_CN[place, part].tolist())
                    for place, criterion in enumerate(self._model.card.criteria)
                },
                own_G={name: tuple(values[part]) for name, values in own.items()},
                cut_G=tuple(cut[part]),
            )
            begin += count
        if begin:
            self._gauges.set(
                {
                    "reward/mean": float(rewards_N.mean()),
                    "ensemble/disagreement": float(disagreement_N.mean()),
                    "ensemble/flagged_share_data": float(shifted_N.float().mean()),
                }
            )
        return [result for result in results if result is not None]
