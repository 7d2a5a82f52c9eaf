"""`pavlov reward`: train the reward-model ensemble from preference pairs."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from cluster.files import RunFolder, folder_beside, resolve_run_folder
from models.preferences import ReadReport, read_pairs, split_by_first_user_turn
from models.reward_model import (
    Heads,
    RewardCard,
    RewardModel,
    fit_heads,
    fit_temperature,
)
from models.sources import resolve_model, weights_fingerprint
from models.trunk import Trunk
from rlhf.config import EnsembleSection, RewardConfig, data_path
from rlhf.ensemble import (
    aggregate,
    disagreement,
    expected_calibration_error,
    quantile_threshold,
    standardise,
)
from rlhf.errors import DataError
from rlhf.losses import bradley_terry_loss
from rlhf.records import PreferencePair
from rlhf.statistics import wilson_interval
from trainers.recording import Progressing

_MIN_HELD_OUT = 8


def run_reward(config: RewardConfig, config_path: Path, console: Console) -> Path:
    """Train and write ``<run>/reward``; returns the run folder."""
    folder_path = resolve_run_folder(config.run.dir, config_path)
    resolve_model(config.ensemble.model)
    train, reports = read_pairs([data_path(path) for path in config.data.train], config.data.limit)
    validation: list[PreferencePair] = []
    if config.data.validation:
        paths = [data_path(path) for path in config.data.validation]
        validation, more = read_pairs(paths)
        reports += more
    for report in reports:
        console.print(report.sentence())
    fit, held = split_by_first_user_turn(train, config.data.holdout, config.seed)
    check_split(fit, held)
    folder = RunFolder.claim(folder_path, config.model_dump(mode="json"), resume=False)
    try:
        model = train_reward_model(config.ensemble, fit, held, validation, config.seed, console)
        card = model.card.model_copy(update={"data": {**model.card.data, **_left_out(reports)}})
        with folder_beside(folder.path / "reward") as beside:
            RewardModel(card, model.heads).save(beside)
        console.print(describe(card))
    finally:
        folder.release()
    return folder.path


def check_split(fit: Sequence[PreferencePair], held: Sequence[PreferencePair]) -> None:
    """Refuse data that is too small to train on and to calibrate with."""
    if len(held) < _MIN_HELD_OUT or len(fit) < _MIN_HELD_OUT:
        raise DataError(
            f"{len(fit)} pairs to train on and {len(held)} held out are too few: at least "
            f"{_MIN_HELD_OUT} of each are needed"
        )


def train_reward_model(
    settings: EnsembleSection,
    fit: Sequence[PreferencePair],
    held: Sequence[PreferencePair],
    validation: Sequence[PreferencePair],
    seed: int,
    console: Console,
) -> RewardModel:
    """An ensemble from pairs that are already split.

    What is chosen (L2, temperature, standardisation, threshold) is chosen on `held`;
    `validation` is scored once, for the figures on the card.
    """
    started = time.monotonic()
    folder = resolve_model(settings.model)
    trunk = Trunk(
        folder,
        depth=settings.depth,
        dtype=settings.dtype,
        max_tokens=settings.max_tokens,
        batch_tokens=settings.batch_tokens,
    )
    total = 2 * (len(fit) + len(held) + len(validation))
    with Progressing(console, "features", total) as progress:
        fit_chosen, fit_rejected = _features(trunk, fit, progress)
        held_chosen, held_rejected = _features(trunk, held, progress)
        validation_features = _features(trunk, validation, progress)
    features_s = time.monotonic() - started
    both_ND = torch.cat([fit_chosen, fit_rejected])
    base = Heads(
        torch.empty(0), both_ND.mean(dim=0), both_ND.std(dim=0) + 1e-6, torch.zeros(1), torch.ones(1)
    )
    difference_ND = base.standardised(fit_chosen) - base.standardised(fit_rejected)
    held_difference_ND = base.standardised(held_chosen) - base.standardised(held_rejected)
    fit_labels, held_labels = _labels(fit), _labels(held)
    candidates = []
    for l2 in settings.l2:
        weights_KD = fit_heads(
            difference_ND, *fit_labels, members=settings.members, l2=l2, seed=seed
        )
        margins_N = aggregate(weights_KD @ held_difference_ND.T)
        temperature = fit_temperature(margins_N, *held_labels)
        loss = float(bradley_terry_loss(margins_N / temperature, *held_labels))
        candidates.append((loss, l2, temperature, weights_KD))
    loss, l2, temperature, weights_KD = min(candidates, key=lambda candidate: candidate[0])
    held_both_ND = base.standardised(torch.cat([held_chosen, held_rejected]))
    raw_KN = weights_KD @ held_both_ND.T
    heads = Heads(
        weights_KD,
        base.feature_mean_D,
        base.feature_deviation_D,
        raw_KN.mean(dim=1),
        raw_KN.std(dim=1) + 1e-6,
    )
    spread_N = disagreement(standardise(raw_KN, heads.member_mean_K, heads.member_deviation_K))
    threshold = quantile_threshold(spread_N, settings.false_alarm_rate)
    card = RewardCard(
        version=_version(weights_KD),
        model=settings.model if settings.model == "embedded" else str(folder),
        model_fingerprint=weights_fingerprint(folder),
        tokenizer_fingerprint=trunk.tokenizer.fingerprint,
        dtype=settings.dtype,
        depth=settings.depth,
        layers=trunk.layers,
        max_tokens=settings.max_tokens,
        members=settings.members,
        l2=l2,
        temperature=temperature,
        threshold=threshold if math.isfinite(threshold) else None,
        false_alarm_rate=settings.false_alarm_rate,
        seed=seed,
        data={
            "pairs_trained": len(fit),
            "pairs_held_out": len(held),
            "pairs_validation": len(validation),
            "hash": _data_hash([*fit, *held]),
        },
        metrics={},
    )
    model = RewardModel(card, heads)
    metrics: dict[str, Any] = {
        "held_out": pair_metrics(model, held_chosen, held_rejected),
        "held_out_loss": loss,
        "features_s": round(features_s, 1),
        "total_s": round(time.monotonic() - started, 1),
    }
    if validation:
        metrics["validation"] = pair_metrics(model, *validation_features)
    return RewardModel(card.model_copy(update={"metrics": metrics}), heads)


def pair_metrics(model: RewardModel, chosen_ND: Tensor, rejected_ND: Tensor) -> dict[str, Any]:
    """Accuracy with its 95 % interval, calibration and flags over pairs of features."""
    probability_N = model.probability(chosen_ND, rejected_ND)
    right_N = (probability_N > 0.5).double() + 0.5 * (probability_N == 0.5).double()
    accuracy, low, high = wilson_interval(float(right_N.sum()), len(right_N))
    margins_KN = model.heads.raw(chosen_ND) - model.heads.raw(rejected_ND)
    _, _, shift_N = model.score_features(torch.cat([chosen_ND, rejected_ND]))
    return {
        "pairs": len(right_N),
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "ece": expected_calibration_error(probability_N, torch.ones_like(probability_N)),
        "member_accuracy": (margins_KN > 0).double().mean(dim=1).tolist(),
        "flagged_share": float(shift_N.double().mean()),
    }


def describe(card: RewardCard) -> str:
    """The card in a few lines of text."""
    lines = [
        f"reward model {card.version}: {card.members} members on {card.layers} layers of "
        f"{Path(card.model).name}, {card.data['pairs_trained']} pairs, l2 {card.l2:g}, "
        f"temperature {card.temperature:.2f}, features {card.metrics['features_s']:.0f} s"
    ]
    for name in ("held_out", "validation"):
        if name in card.metrics:
            m = card.metrics[name]
            lines.append(
                f"{name.replace('_', '-')}: accuracy {m['accuracy']:.3f} "
                f"[{m['accuracy_low']:.3f}, {m['accuracy_high']:.3f}] on {m['pairs']} pairs, "
                f"ECE {m['ece']:.3f}, flagged {m['flagged_share']:.1%} of replies"
            )
    return "\n".join(lines)


def _features(
    trunk: Trunk, pairs: Sequence[PreferencePair], progress: Progressing
) -> tuple[Tensor, Tensor]:
    rows = []
    for pair in pairs:
        rows.append(trunk.tokenise(pair.prompt, pair.chosen, finished=pair.chosen_finished))
        rows.append(trunk.tokenise(pair.prompt, pair.rejected, finished=pair.rejected_finished))
    features_ND = trunk.features(rows, progress.advance)
    return features_ND[0::2], features_ND[1::2]


def _labels(pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
    """Labels and weights of pairs, each of shape (N,)."""
    return (
        torch.tensor([pair.label for pair in pairs]),
        torch.tensor([pair.weight for pair in pairs]),
    )


def _version(weights_KD: Tensor) -> str:
    return hashlib.sha256(weights_KD.numpy().tobytes()).hexdigest()[:12]


def _data_hash(pairs: Sequence[PreferencePair]) -> str:
    digest = hashlib.sha256()
    for line in sorted(json.dumps([repr(p.prompt), p.chosen, p.rejected]) for p in pairs):
        digest.update(line.encode())
    return digest.hexdigest()[:16]


def _left_out(reports: Sequence[ReadReport]) -> dict[str, Any]:
    return {"files": [report.sentence() for report in reports]}
