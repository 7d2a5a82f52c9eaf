"""Which members a run trains on which backbone, and those with layers of their own once trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from actors.reward_member import MemberJob, PairRow, TrainedMember
from cluster.session import cluster_address
from models.head_fitting import ProbeGroup
from models.heads import TrainedHead
from models.precision import local_device, resolve_dtype
from models.reward_model import BankCard, FamilyCard, GroupCard, OwnLayersCard, trunk_of
from models.sources import portable_name, resolve_model, weights_fingerprint
from models.trunk import Family, TokenRow, Trunk, layers_at
from rlhf.config import EnsembleSection, OwnLayers, ProbeMembers, TopMembers
from rlhf.errors import ConfigError
from rlhf.records import PreferencePair
from trainers.reward_members import train_members


@dataclass(frozen=True, slots=True)
class Bank:
    """What a run trains on one backbone: its trunk, and the members that read its families.

    `probes` and `heads` come with the place of their family; `trained` are the groups whose
    members have layers of their own, and `heads` those members once they are trained.
    """

    name: str
    trunk: Trunk
    families: tuple[FamilyCard, ...]
    probes: tuple[tuple[ProbeMembers, int], ...]
    trained: tuple[OwnLayers, ...] = ()
    heads: tuple[tuple[TrainedHead, GroupCard], ...] = ()


def backbones(settings: EnsembleSection) -> list[str]:
    """The models that members stand on, by names that mean the same in every process."""
    return list(dict.fromkeys(_backbone(group, settings) for group in settings.members))


def _backbone(group: ProbeMembers | OwnLayers, settings: EnsembleSection) -> str:
    return portable_name(group.model or settings.model)


def plan_banks(settings: EnsembleSection) -> list[Bank]:
    """Groups of members by backbone; the members of one share its pass."""
    banks = []
    for name in backbones(settings):
        folder = resolve_model(name)
        own = [group for group in settings.members if _backbone(group, settings) == name]
        probes = [group for group in own if isinstance(group, ProbeMembers)]
        trained = tuple(group for group in own if not isinstance(group, ProbeMembers))
        wanted = [Family(layers_at(folder, group.depth), group.pooling) for group in probes]
        families = sorted(set(wanted))
        cards = tuple(FamilyCard(layers=f.layers, pooling=f.pooling) for f in families)
        # Without probes it only tokenises.
        read = cards or [FamilyCard(layers=1, pooling="last")]
        banks.append(
            Bank(
                name,
                _trunk(trunk_arguments(name, read, settings, Path()), on_gpu=not trained),
                cards,
                tuple(zip(probes, map(families.index, wanted), strict=True)),
                trained,
            )
        )
    return banks


def _trunk(arguments: Mapping[str, Any], *, on_gpu: bool = True) -> Trunk:
    """A trunk of this process. Where it only tokenises, on a cluster whose actors run the pass or
    before members have trained layers of their own, it takes no GPU from them."""
    return trunk_of(arguments, local_device() if on_gpu and cluster_address() is None else "cpu")


def trunk_arguments(
    name: str, families: Sequence[FamilyCard], settings: EnsembleSection, own: Path
) -> dict[str, Any]:
    """What `build_trunk` takes, here or in an actor, as plain data."""
    return {
        "model": name,
        "families": [family.model_dump() for family in families],
        "own": str(own),
        # As it is here: kept features are those of one precision.
        "dtype": resolve_dtype(settings.dtype),
        "max_tokens": settings.max_tokens,
        "batch_tokens": settings.batch_tokens,
    }


def _cut(folder: Path, group: OwnLayers) -> tuple[int, int]:
    """The layers that the trunk runs for a group, and the one that its members end with.

    Raises:
        ConfigError: more layers of its own than it has.
    """
    end = layers_at(folder, group.depth)
    if not isinstance(group, TopMembers):
        return 0, end
    if group.layers > end:
        raise ConfigError(
            f"ensemble.members wants {group.layers} layers of its own for members that end after "
            f"{end}"
        )
    return end - group.layers, end


def with_trained_members(
    banks: Sequence[Bank],
    settings: EnsembleSection,
    rows: Sequence[Sequence[TokenRow]],
    pairs: Sequence[PreferencePair],
    criteria: Sequence[str],
    folds_N: Tensor,
    seed: int,
    out: Path,
    console: Console,
) -> list[Bank]:
    """The banks with the members trained that have layers of their own, on all folds but the
    first, which stays for calibration."""
    jobs: list[MemberJob] = []
    for bank, bank_rows in zip(banks, rows, strict=True):
        fit = [
            PairRow(
                bank_rows[2 * n][0],
                bank_rows[2 * n][1],
                bank_rows[2 * n + 1][1],
                pair.label,
                pair.weight,
                pair.margin,
                criteria.index(pair.judged_by),
            )
            for n, pair in enumerate(pairs)
            if folds_N[n] != 0
        ]
        for group in bank.trained:
            cut, end = _cut(resolve_model(bank.name), group)
            first = len(jobs)
            jobs += [
                MemberJob(
                    model=bank.name,
                    cut=cut,
                    end=end,
                    settings=group,
                    criteria=len(criteria),
                    pairs=fit,
                    member=member,
                    seed=seed,
                    dtype=resolve_dtype(settings.dtype),
                    max_tokens=settings.max_tokens,
                    out=str(out),
                )
                for member in range(first, first + group.count)
            ]
    made = iter(zip(jobs, train_members(jobs, console), strict=True))
    return [_with_heads(bank, settings, made, out) for bank in banks]


def _with_heads(
    bank: Bank,
    settings: EnsembleSection,
    made: Iterator[tuple[MemberJob, TrainedMember]],
    out: Path,
) -> Bank:
    """A bank with its own members from `made`, which has those of all banks in their order."""
    families = list(bank.families)
    heads = []
    total = len(families) + sum(group.count for group in bank.trained)
    for number, group in enumerate(bank.trained):
        for job, member in islice(made, group.count):
            own = OwnLayersCard(name=member.name, end=job.end)
            place = len(families)
            families.append(FamilyCard(layers=job.cut, pooling=group.pooling, own=own))
            head = TrainedHead(place, total + number, member.weights_CH)
            card = GroupCard(kind=group.kind, count=1, family=place, training=member.figures)
            heads.append((head, card))
    if not heads:
        return bank
    trunk = _trunk(trunk_arguments(bank.name, families, settings, out))
    return replace(bank, trunk=trunk, families=tuple(families), heads=tuple(heads))


def bank_card(
    bank: Bank, groups: Sequence[ProbeGroup | TrainedHead], criteria: Sequence[str]
) -> BankCard:
    return BankCard(
        model=bank.name,
        model_fingerprint=weights_fingerprint(resolve_model(bank.name)),
        tokenizer_fingerprint=bank.trunk.tokenizer.fingerprint,
        families=bank.families,
        groups=(
            *(
                GroupCard(
                    kind=members.kind,
                    count=members.count,
                    family=family,
                    l2=dict(zip(criteria, group.l2_C, strict=True)),
                )
                for (members, family), group in zip(bank.probes, groups, strict=False)
                if isinstance(group, ProbeGroup)
            ),
            *(card for _, card in bank.heads),
        ),
    )
