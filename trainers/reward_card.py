"""What stands on a reward model's card: its figures, for machines and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.reward_model import (
    COMBINED,
    Answers,
    FamilyCard,
    RewardCard,
    Scores,
    in_combination,
    of_the_combination,
)
from rlhf.calibration import pair_figures
from rlhf.ensemble import aggregate
from rlhf.records import PreferencePair
from rlhf.statistics import auroc


def _titles(card: RewardCard) -> dict[str, str]:
    """Of the sets of pairs that a card has figures for."""
    by_folds = card.data["pairs_held_out"] == card.data["pairs"]
    return {
        "cross_validation": ("Cross-validation" if by_folds else "The held-out fold")
        + ", by which L2, temperatures and threshold were chosen",
        "validation": "Validation, opened once",
    }


def pair_report(
    card: RewardCard,
    said: Answers,
    pairs: Sequence[PreferencePair],
    lengths: Sequence[int],
) -> dict[str, Any]:
    """Figures of pairs: by the reward, of the pairs that it is about (`of_the_combination`), by
    each criterion's own head, and by source.

    Args:
        said: of both replies to each pair, chosen ones first.
        lengths: tokens of the replies, chosen and rejected in turns.
    """
    labels_N = torch.tensor([pair.label for pair in pairs])
    weights_N = torch.tensor([pair.weight for pair in pairs])
    longer_N = torch.tensor(lengths[0::2]) - torch.tensor(lengths[1::2])

    def figures(margins_KN: Tensor, temperature: float, which_N: Tensor) -> dict[str, Any]:
        return {
            **pair_figures(
                margins_KN[:, which_N], temperature, labels_N[which_N], weights_N[which_N]
            ),
            "longer_wins": longer_wins(longer_N[which_N], labels_N[which_N], weights_N[which_N]),
        }

    rewards_KN = margins(said.rewards_KN)
    about_N = of_the_combination(pairs, card.combination)
    whole = figures(rewards_KN, card.temperature[COMBINED], about_N)
    per_criterion: dict[str, Any] = {}
    own_KN = rewards_KN.clone()
    asked = [pair.judged_by for pair in pairs]
    for index, criterion in enumerate(card.criteria):
        which_N = torch.tensor([name == criterion for name in asked])
        if which_N.any():
            margins_KN = margins(said.criteria_KCN[:, index])
            own_KN[:, which_N] = margins_KN[:, which_N] / card.temperature[criterion]
            per_criterion[criterion] = figures(margins_KN, card.temperature[criterion], which_N)
    others_N = torch.tensor([name not in card.criteria for name in asked])
    own_KN[:, others_N] /= card.temperature[COMBINED]
    sources = [pair.source for pair in pairs]
    per_source = {
        source: figures(own_KN, 1.0, torch.tensor([name == source for name in sources]))
        for source in sorted(set(sources))
    }
    every_reward_N = aggregate(said.rewards_KN)
    every_length_N = torch.cat([torch.tensor(lengths[0::2]), torch.tensor(lengths[1::2])])
    return {
        **whole,
        "per_criterion": per_criterion,
        "per_source": per_source,
        "length_correlation": _correlation(every_reward_N, every_length_N.float()),
    }


def longer_wins(longer_N: Tensor, labels_N: Tensor, weights_N: Tensor) -> float | None:
    """How often the longer reply is the preferred one: what length alone gives. Equal lengths count
    half, ties not."""
    decided_N = (labels_N != 0.5) & (weights_N > 0)
    if not decided_N.any():
        return None
    sides_N = torch.sign(labels_N[decided_N] - 0.5)
    right_N = 0.5 + 0.5 * torch.sign(longer_N[decided_N]) * sides_N
    counts_N = weights_N[decided_N]
    return float((right_N * counts_N).sum() / counts_N.sum())


def probe_report(
    scores: Scores, sizes: Mapping[str, int], held_out: Answers, held_out_shift_N: Tensor
) -> dict[str, dict[str, float]]:
    """How well each probe (`models.probes`) is told from held-out replies, by each signal and by
    both: the area under the ROC curve; the share flagged; and the mean reward."""
    report: dict[str, dict[str, float]] = {}
    begin = 0
    rewards_N = aggregate(scores.rewards_KN)
    for name, size in sizes.items():
        part = slice(begin, begin + size)
        begin += size
        if not size:
            continue
        signals = {
            "auroc": (held_out_shift_N, scores.shift_N),
            "auroc_disagreement": (held_out.disagreement_N, scores.disagreement_N),
            "auroc_distance": (held_out.distance_N, scores.distance_N),
        }
        report[name] = {
            **{
                signal: auroc(inside_N.tolist(), outside_N[part].tolist())
                for signal, (inside_N, outside_N) in signals.items()
            },
            "flagged_share": float(scores.shifted_N[part].double().mean()),
            "reward": float(rewards_N[part].mean()),
        }
    return report


def describe(card: RewardCard) -> str:
    """The card in a few lines of text."""
    backbones = ", ".join(
        f"{max(family.layers for family in bank.families)} layers of {Path(bank.model).name}"
        for bank in card.banks
    )
    lines = [
        f"reward model {card.version}: {card.members} members on {backbones}, "
        f"{card.data['pairs']} pairs, reward = {_combination(card)}, features "
        f"{card.metrics['features_s']:.0f} s of {card.metrics['total_s']:.0f} s"
    ]
    for name, title in _titles(card).items():
        if name in card.metrics:
            figures = card.metrics[name]
            lines.append(
                f"{title.split(',')[0].lower()}: {_accuracy(figures)}, "
                f"ECE {_number(figures['ece'])}, flagged {figures['flagged_share']:.1%} of replies"
            )
            if len(figures["per_criterion"]) > 1:
                lines += [
                    f"  {criterion}, by its own head: {_accuracy(own)}, ECE {_number(own['ece'])}"
                    for criterion, own in figures["per_criterion"].items()
                ]
    return "\n".join(lines)


def _layers(family: FamilyCard) -> str:
    if family.own is None:
        return str(family.layers)
    return f"{family.own.end}, its own above {family.layers}"


def report(card: RewardCard) -> str:
    """The whole card as Markdown."""
    threshold = "none: too few replies" if card.threshold is None else f"{card.threshold:.2f}"
    low, high = card.false_alarm_interval
    parts = [
        f"# Reward model {card.version}\n",
        f"- reward: {_combination(card)}, each criterion in deviations over the training replies",
        f"- prior correlation of criteria's heads: {_listed(card.correlation, '{:g}') or 'none'}",
        f"- temperatures: {_listed(card.temperature, '{:.2f}')}",
        *_left_out_line(card),
        f"- domain shift: threshold {threshold} on disagreement + distance (each in deviations "
        f"over held-out replies), for {card.false_alarm_rate:.0%} false alarms "
        f"[{low:.1%}, {high:.1%}]",
        f"- data: {card.data['pairs']} pairs ({_listed(card.data['pairs_by_criterion'], '{}')}), "
        f"hash {card.data['hash']}, seed {card.seed}",
        *_validation_line(card),
        f"- ancestry: {' → '.join(card.ancestry) or 'none'}",
        f"- time: {card.metrics['members_s']:.0f} s for members with layers of their own, "
        f"{card.metrics['features_s']:.0f} s for features, {card.metrics['total_s']:.0f} s "
        "in all\n",
        "## Members\n",
        "| backbone | kind | members | family | L2 |\n|---|---|---|---|---|",
    ]
    for bank in card.banks:
        for group in bank.groups:
            family = bank.families[group.family]
            parts.append(
                f"| {Path(bank.model).name} | {group.kind} | {group.count} | {family.pooling} of "
                f"layer {_layers(family)} | {_listed(group.l2, '{:g}')} |"
            )
    for name, title in _titles(card).items():
        if name in card.metrics:
            parts += ["", *_pairs_section(title, card.metrics[name])]
    parts += ["", *_probes_section(card.metrics["probes"])]
    return "\n".join(parts) + "\n"


def _left_out_line(card: RewardCard) -> list[str]:
    without = [name for name in card.criteria if not in_combination(name, card.combination)]
    if not without:
        return []
    return [
        "- the reward's temperature and figures leave out pairs judged by a criterion without "
        f"weight in it ({', '.join(without)}), where there are others"
    ]


def _validation_line(card: RewardCard) -> list[str]:
    if "validation" not in card.metrics:
        return []
    return [
        f"- validation data: {card.data['pairs_validation']} pairs, without "
        f"{card.data['pairs_validation_seen']} whose first user turn is in the training data, hash "
        f"{card.data['hash_validation']}"
    ]


def _pairs_section(title: str, figures: Mapping[str, Any]) -> list[str]:
    rows = {"the reward": figures}
    rows |= {f"{name}, own head": own for name, own in figures["per_criterion"].items()}
    rows |= {f"source {name or '(none)'}": own for name, own in figures["per_source"].items()}
    lines = [
        f"## {title}\n",
        "| pairs of | pairs | ties | accuracy [95 %] | longer wins | ECE | ECE by chance (95 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in rows.items():
        cells = [
            name,
            *(str(own["pairs"]), str(own["ties"])),
            _accuracy(own, ""),
            _number(own["longer_wins"]),
            _number(own["ece"]),
            _number(own["ece_band"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Flagged for domain shift: {figures['flagged_share']:.1%} of replies. Correlation of "
        f"reward and length: {figures['length_correlation']:+.2f}. How sure, how often right "
        "(bins of equal count):\n",
        "| " + " | ".join(f"{bin['confidence']:.2f}" for bin in figures["reliability"]) + " |",
        "|" + "---|" * len(figures["reliability"]),
        "| " + " | ".join(f"{bin['right']:.2f}" for bin in figures["reliability"]) + " |",
    ]
    return lines


def _probes_section(probes: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = [
        "## Probes: told from held-out replies (area under the ROC curve)\n",
        "| probe | both | disagreement | distance | flagged | reward |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in probes.items():
        lines.append(
            f"| {name} | {found['auroc']:.2f} | {found['auroc_disagreement']:.2f} | "
            f"{found['auroc_distance']:.2f} | {found['flagged_share']:.0%} | "
            f"{found['reward']:+.1f} |"
        )
    return lines


def margins(values_KM: Tensor) -> Tensor:
    """Chosen less rejected, shape (K, N), of values of both, chosen ones first; M = 2 N."""
    chosen_KN, rejected_KN = values_KM.chunk(2, dim=1)
    return chosen_KN - rejected_KN


def _correlation(first_N: Tensor, second_N: Tensor) -> float:
    """Pearson's; 0 where either is constant."""
    both = torch.corrcoef(torch.stack([first_N, second_N]))[0, 1]
    return float(torch.nan_to_num(both))


def _combination(card: RewardCard) -> str:
    live = {name: weight for name, weight in card.combination.items() if weight}
    return " + ".join(
        name if weight == 1 else f"{weight:g} {name}" for name, weight in live.items()
    )


def _accuracy(figures: Mapping[str, Any], prefix: str = "accuracy ") -> str:
    if figures["accuracy"] is None:
        return "no decided pair"
    interval = f"[{figures['accuracy_low']:.3f}, {figures['accuracy_high']:.3f}]"
    text = f"{prefix}{figures['accuracy']:.3f} {interval}"
    ties = f", {figures['ties']} ties beside" if figures["ties"] else ""
    return f"{text} on {figures['pairs'] - figures['ties']} pairs{ties}" if prefix else text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _listed(values: Mapping[str, Any], form: str) -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in values.items())
