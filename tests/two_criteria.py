"""A reward model with two criteria and a threshold, made from the tiny one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from models.chat import ChatTokenizer
from models.reward_model import RewardModel
from models.sources import weights_fingerprint

COMBINATION = {"helpful": 1.0, "harmless": 0.5}
TEMPERATURE = {"reward": 1.0, "helpful": 0.5, "harmless": 2.0}


def build_two_criteria(
    folder: Path, tiny: Path, *, model: Path | None = None, threshold: float | None = None
) -> Path:
    """A reward-model folder; `helpful` has the heads of the tiny model, `harmless` has others.

    Args:
        tiny: the tiny reward model.
        model: another backbone of the same width.
    """
    given = RewardModel.load(tiny)
    [heads], [bank] = given.banks, given.card.banks
    own_KCH = heads.weights_KCH
    if model is not None:
        bank = bank.model_copy(
            update={
                "model": str(model),
                "model_fingerprint": weights_fingerprint(model),
                "tokenizer_fingerprint": ChatTokenizer(model).fingerprint,
            }
        )
    card = given.card.model_copy(
        update={
            "banks": (bank,),
            "criteria": tuple(COMBINATION),
            "combination": COMBINATION,
            "temperature": TEMPERATURE,
            "threshold": threshold,
        }
    )
    members = own_KCH.shape[0]
    both = replace(
        heads,
        weights_KCH=torch.cat([own_KCH, own_KCH.roll(1, dims=2)], dim=1),
        member_mean_KC=torch.zeros(members, 2),
        member_deviation_KC=torch.ones(members, 2),
        combination_C=torch.tensor(list(COMBINATION.values())),
    )
    folder.mkdir()
    RewardModel(card, [both]).save(folder)
    return folder
