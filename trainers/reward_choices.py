"""What the training of a reward model chooses by cross-validation over first user turns.

Each group's L2, what criteria tell of each other, temperatures. No validation file comes near it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import combinations
from statistics import fmean

import torch
from torch import Tensor

from models.head_fitting import (
    Comparisons,
    ProbeGroup,
    choose_l2,
    correlation_losses,
    fit_temperature,
)
from models.heads import Heads, TrainedHead
from models.reward_model import COMBINED, Answers, ask
from rlhf.ensemble import aggregate
from rlhf.records import PreferencePair
from trainers.reward_banks import Bank

_LEAST_GAIN = 1.0
"""Nats over all pairs that a correlation of criteria must gain to be believed."""


def choose_groups(
    banks: Sequence[Bank], data: Sequence[Comparisons], folds_N: Tensor, criteria: Sequence[str]
) -> tuple[list[list[ProbeGroup | TrainedHead]], dict[str, dict[str, float]]]:
    """Every group of probes with its L2 for each criterion, and what the candidates lost; then the
    trained members."""
    groups: list[list[ProbeGroup | TrainedHead]] = []
    losses: dict[str, dict[str, float]] = {}
    for bank, pairs in zip(banks, data, strict=True):
        own_groups: list[ProbeGroup | TrainedHead] = []
        for members, family in bank.probes:
            chosen = []
            for index, criterion in enumerate(criteria):
                own = pairs.criterion_N == index
                l2, tried = choose_l2(
                    pairs[own], family, members.l2, folds_N[own], centring=members.centring
                )
                chosen.append(l2)
                losses[f"{bank.name} {bank.trunk.families[family]} {criterion}"] = tried
            own_groups.append(ProbeGroup(family, members.count, tuple(chosen), members.centring))
        groups.append([*own_groups, *(head for head, _ in bank.heads)])
    return groups, losses


def choose_correlations(
    data: Sequence[Comparisons],
    groups: Sequence[Sequence[ProbeGroup | TrainedHead]],
    folds_N: Tensor,
    criteria: Sequence[str],
    candidates: Sequence[float],
) -> tuple[dict[tuple[int, int], float], dict[str, dict[str, float]]]:
    """What the heads of every two criteria tell of each other before they are fitted, and what the
    candidates lost: cross-entropy summed over pairs, its mean over the groups of probes.

    Criteria stay as far apart as the candidates allow unless another one gains a nat over all
    pairs: of few pairs, chance alone prefers some correlation.
    """
    chosen: dict[tuple[int, int], float] = {}
    losses: dict[str, dict[str, float]] = {}
    apart = min(candidates, key=abs)
    for one, other in combinations(range(len(criteria)), 2):
        if len(candidates) == 1:
            chosen[one, other] = apart
            continue
        lost: list[dict[str, float]] = []
        for pairs, own_groups in zip(data, groups, strict=True):
            own_N = (pairs.criterion_N == one) | (pairs.criterion_N == other)
            both = pairs.between((one, other))
            lost += [
                correlation_losses(
                    both,
                    replace(group, l2_C=(group.l2_C[one], group.l2_C[other])),
                    candidates,
                    folds_N[own_N],
                )
                for group in own_groups
                if isinstance(group, ProbeGroup)
            ]
        tried = {name: fmean(each[name] for each in lost) for name in (lost[0] if lost else {})}
        best = min(candidates, key=lambda c: tried.get(f"{c:g}", 0.0))
        gain = tried[f"{apart:g}"] - tried[f"{best:g}"] if tried else 0.0
        chosen[one, other] = best if gain > _LEAST_GAIN else apart
        losses[f"{criteria[one]}, {criteria[other]}"] = tried
    return chosen, losses


def cross_validate(
    data: Sequence[Comparisons],
    groups: Sequence[Sequence[ProbeGroup | TrainedHead]],
    fit: Callable[[Comparisons, Sequence[ProbeGroup | TrainedHead]], Heads],
    folds_N: Tensor,
    held_folds: Sequence[int],
) -> tuple[list[int], Answers]:
    """The pairs of `held_folds`, and what members that never saw their prompts say of their
    replies; chosen ones first."""
    places: list[Tensor] = []
    sides: list[tuple[Answers, int]] = []
    for fold in held_folds:
        held = folds_N == fold
        banks = [fit(d[~held], g) for d, g in zip(data, groups, strict=True)]
        places.append(torch.nonzero(held).squeeze(1))
        sides.append((ask(banks, tuple(d[held].replies_NFH for d in data)), len(places[-1])))
    order = torch.argsort(torch.cat(places))
    whole = []
    for f in fields(Answers):
        chosen = torch.cat([getattr(said, f.name)[..., :count] for said, count in sides], dim=-1)
        rejected = torch.cat([getattr(said, f.name)[..., count:] for said, count in sides], dim=-1)
        whole.append(torch.cat([chosen[..., order], rejected[..., order]], dim=-1))
    return torch.cat(places)[order].tolist(), Answers(*whole)


def temperatures(
    held_out: Answers, pairs: Sequence[PreferencePair], criteria: Sequence[str]
) -> dict[str, float]:
    """One for the combination on all pairs, one for each criterion on its own."""
    labels_N = torch.tensor([pair.label for pair in pairs])
    weights_N = torch.tensor([pair.weight for pair in pairs])
    chosen_KN, rejected_KN = held_out.rewards_KN.chunk(2, dim=1)
    temperatures = {
        COMBINED: fit_temperature(aggregate(chosen_KN - rejected_KN), labels_N, weights_N)
    }
    for index, criterion in enumerate(criteria):
        own_N = torch.tensor([pair.judged_by == criterion for pair in pairs])
        chosen_KN, rejected_KN = held_out.criteria_KCN[:, index].chunk(2, dim=1)
        margins_N = aggregate(chosen_KN - rejected_KN)[own_N]
        temperatures[criterion] = fit_temperature(margins_N, labels_N[own_N], weights_N[own_N])
    return temperatures
