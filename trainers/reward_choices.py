"""What the training of a reward model chooses by cross-validation over first user turns.

Each group's L2, what criteria tell of each other, temperatures. No validation file comes near it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import combinations

import torch
from torch import Tensor

from models.head_fitting import (
    Comparisons,
    ProbeGroup,
    choose_l2,
    correlation_losses,
    correlation_matrix,
    fit_temperature,
)
from models.heads import Heads, TrainedHead
from models.reward_model import COMBINED, Answers, ask, of_the_combination
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
                asked = pairs.of_family(family)[own]
                l2, tried = choose_l2(asked, 0, members.l2, folds_N[own], centring=members.centring)
                chosen.append(l2)
                losses[f"{bank.name} {bank.trunk.families[family]} {criterion}"] = tried
            own_groups.append(ProbeGroup(family, members.count, tuple(chosen), members.centring))
        groups.append([*own_groups, *(head for head, _ in bank.heads)])
    return groups, losses


def choose_correlation(
    data: Sequence[Comparisons],
    groups: Sequence[Sequence[ProbeGroup | TrainedHead]],
    folds_N: Tensor,
    criteria: Sequence[str],
    candidates: Sequence[float],
) -> tuple[Tensor, dict[str, dict[str, float]]]:
    """What the heads of criteria tell of each other before they are fitted, shape (C, C), and what
    the candidates for every two lost: nats over all pairs, the mean over the groups of probes.

    Criteria stay as far apart as the candidates allow unless another one gains a nat: of few pairs,
    chance alone prefers some correlation. So do more than two unless all correlations together
    gain one. Trained heads were trained apart.
    """
    probes = [
        (pairs, group)
        for pairs, own_groups in zip(data, groups, strict=True)
        for group in own_groups
        if isinstance(group, ProbeGroup)
    ]
    apart = min(candidates, key=abs)
    names = [f"{candidate:g}" for candidate in candidates]
    two_LCC = torch.stack([correlation_matrix(2, {(0, 1): each}) for each in candidates])
    chosen: dict[tuple[int, int], float] = {}
    losses: dict[str, dict[str, float]] = {}

    def lost(asked: Sequence[int], correlation_LCC: Tensor) -> Tensor:
        every = []
        for pairs, group in probes:
            own_N = torch.isin(pairs.criterion_N, torch.tensor(asked))
            l2_C = tuple(group.l2_C[criterion] for criterion in asked)
            own = replace(group, family=0, l2_C=l2_C)
            theirs = pairs.of_family(group.family).between(asked)
            every.append(correlation_losses(theirs, own, correlation_LCC, folds_N[own_N]))
        return torch.stack(every).mean(dim=0)

    if not probes:
        return torch.eye(len(criteria)), losses
    for pair in combinations(range(len(criteria)), 2):
        chosen[pair] = apart
        if len(candidates) > 1:
            lost_L = lost(pair, two_LCC)
            best = int(lost_L.argmin())
            if float(lost_L[candidates.index(apart)] - lost_L[best]) > _LEAST_GAIN:
                chosen[pair] = candidates[best]
            losses[pair_name(criteria, pair)] = dict(zip(names, lost_L.tolist(), strict=True))
    correlation_CC = correlation_matrix(len(criteria), chosen)
    if len(criteria) > 2 and len(candidates) > 1:
        apart_CC = correlation_matrix(len(criteria), dict.fromkeys(chosen, apart))
        apart_lost, together_lost = lost(
            range(len(criteria)), torch.stack([apart_CC, correlation_CC])
        ).tolist()
        if apart_lost - together_lost <= _LEAST_GAIN:
            return apart_CC, losses
    return correlation_CC, losses


def pair_name(criteria: Sequence[str], pair: tuple[int, int]) -> str:
    """Of two criteria, on a card."""
    return " ~ ".join(criteria[criterion] for criterion in pair)


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
    held_out: Answers,
    pairs: Sequence[PreferencePair],
    criteria: Sequence[str],
    combination: Mapping[str, float],
) -> dict[str, float]:
    """One for the combination on the pairs that it is about (`of_the_combination`), one for each
    criterion on its own."""
    labels_N = torch.tensor([pair.label for pair in pairs])
    weights_N = torch.tensor([pair.weight for pair in pairs])
    chosen_KN, rejected_KN = held_out.rewards_KN.chunk(2, dim=1)
    about_N = of_the_combination(pairs, combination)
    margins_N = aggregate(chosen_KN - rejected_KN)[about_N]
    temperatures = {COMBINED: fit_temperature(margins_N, labels_N[about_N], weights_N[about_N])}
    for index, criterion in enumerate(criteria):
        own_N = torch.tensor([pair.judged_by == criterion for pair in pairs])
        chosen_KN, rejected_KN = held_out.criteria_KCN[:, index].chunk(2, dim=1)
        margins_N = aggregate(chosen_KN - rejected_KN)[own_N]
        temperatures[criterion] = fit_temperature(margins_N, labels_N[own_N], weights_N[own_N])
    return temperatures
