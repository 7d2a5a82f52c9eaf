"""`pavlov reward`: train the reward-model ensemble from preference pairs."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from cluster.files import RunFolder, folder_beside, resolve_run_folder
from models.embedded import cache_folder
from models.feature_store import FeatureStore, TokenRow
from models.preferences import ReadReport, folds_by_first_user_turn, read_pairs
from models.reward_model import (
    Heads,
    RewardCard,
    RewardModel,
    fit_heads,
    fit_temperature,
)
from models.sources import portable_name, resolve_model, weights_fingerprint
from models.trunk import FAMILIES, Trunk
from rlhf.calibration import pair_figures
from rlhf.config import EnsembleSection, RewardConfig, data_path
from rlhf.ensemble import (
    aggregate,
    disagreement,
    false_alarm_interval,
    quantile_threshold,
    shift_score,
    whitening,
)
from rlhf.errors import DataError, ModelError
from rlhf.losses import bradley_terry_loss
from rlhf.records import PreferencePair
from trainers.recording import Progressing

_LEAST_TURNS = 16
_FIGURES = {
    "cross_validation": "cross-validation, by which L2, temperature and threshold were chosen",
    "validation": "validation",
}


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
    require_pairs(train, config.ensemble)
    folder = RunFolder.claim(folder_path, config.model_dump(mode="json"), resume=None)
    try:
        model = train_reward_model(config.ensemble, train, validation, config.seed, console)
        card = model.card.model_copy(update={"data": {**model.card.data, **_files(reports)}})
        with folder_beside(folder.path / "reward") as beside:
            RewardModel(card, model.heads).save(beside)
        console.print(describe(card))
    finally:
        folder.release()
    return folder.path


def require_pairs(pairs: Sequence[PreferencePair], settings: EnsembleSection) -> None:
    """Refuse data that is too small to train on and to calibrate with."""
    turns, least = len({pair.first_user_turn for pair in pairs}), max(_LEAST_TURNS, settings.folds)
    if turns < least:
        raise DataError(
            f"{len(pairs)} pairs with {turns} different first user turns are too few: at least "
            f"{least} are needed"
        )


def train_reward_model(
    settings: EnsembleSection,
    pairs: Sequence[PreferencePair],
    validation: Sequence[PreferencePair],
    seed: int,
    console: Console,
) -> RewardModel:
    """An ensemble from preference pairs.

    L2, temperature and threshold are chosen by cross-validation over first user turns, so that
    every pair trains the final heads and still is scored once by heads that never saw its prompt.
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
    pairs, rows = _tokenised(trunk, pairs, console)
    validation, validation_rows = _tokenised(trunk, validation, console)
    require_pairs(pairs, settings)
    with Progressing(console, "features", 2 * (len(pairs) + len(validation))) as progress:
        store = FeatureStore(cache_folder() / "features", trunk)
        chosen_ND, rejected_ND = _features(store, rows, progress)
        validation_features = _features(store, validation_rows, progress)
    features_s = time.monotonic() - started
    labels_N, weights_N = _labels(pairs)
    folds_N = torch.tensor(folds_by_first_user_turn(pairs, settings.folds, seed))
    candidates = [
        cross_validate(
            chosen_ND, rejected_ND, labels_N, weights_N, folds_N, settings.members, l2, seed
        )
        for l2 in settings.l2
    ]
    best = min(candidates, key=lambda candidate: candidate.loss)
    heads = _fit(chosen_ND, rejected_ND, labels_N, weights_N, settings.members, best.l2, seed)
    signals_SN = torch.stack([best.disagreement_N, best.distance_N])
    signal_mean_S, signal_deviation_S = signals_SN.mean(dim=1), signals_SN.std(dim=1) + 1e-6
    shift_N = shift_score(signals_SN, signal_mean_S, signal_deviation_S)
    threshold = quantile_threshold(shift_N, settings.false_alarm_rate)
    card = RewardCard(
        version=hashlib.sha256(heads.weights_KD.numpy().tobytes()).hexdigest()[:12],
        model=portable_name(settings.model),
        model_fingerprint=weights_fingerprint(folder),
        tokenizer_fingerprint=trunk.tokenizer.fingerprint,
        dtype=settings.dtype,
        depth=settings.depth,
        layers=trunk.layers,
        max_tokens=settings.max_tokens,
        members=settings.members,
        l2=best.l2,
        temperature=best.temperature,
        signal_mean=tuple(signal_mean_S.tolist()),
        signal_deviation=tuple(signal_deviation_S.tolist()),
        threshold=threshold if math.isfinite(threshold) else None,
        false_alarm_rate=settings.false_alarm_rate,
        false_alarm_interval=false_alarm_interval(len(shift_N), settings.false_alarm_rate),
        seed=seed,
        data={
            "pairs": len(pairs),
            "pairs_validation": len(validation),
            "hash": _data_hash(pairs),
        },
        metrics={},
    )
    model = RewardModel(card, heads)
    flagged_N = shift_N > threshold
    metrics: dict[str, Any] = {
        "cross_validation": {
            **pair_figures(best.margins_KN, best.temperature, labels_N, weights_N),
            "flagged_share": float(flagged_N.double().mean()),
        },
        "loss": {str(candidate.l2): candidate.loss for candidate in candidates},
        "features_s": round(features_s, 1),
        "total_s": round(time.monotonic() - started, 1),
    }
    if validation:
        scores = model.score_features(torch.cat(validation_features))
        chosen_KN, rejected_KN = scores.rewards_KN.chunk(2, dim=1)
        metrics["validation"] = {
            **pair_figures(chosen_KN - rejected_KN, best.temperature, *_labels(validation)),
            "flagged_share": float(scores.shifted_N.double().mean()),
        }
    return RewardModel(card.model_copy(update={"metrics": metrics}), heads)


@dataclass(frozen=True, slots=True)
class CrossValidation:
    """What heads with one L2 say of pairs whose prompts they did not see.

    `loss` is the cross-entropy after `temperature`; `disagreement_N` and `distance_N` are of all
    replies, chosen ones first.
    """

    l2: float
    loss: float
    temperature: float
    margins_KN: Tensor
    disagreement_N: Tensor
    distance_N: Tensor


def cross_validate(
    chosen_ND: Tensor,
    rejected_ND: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    folds_N: Tensor,
    members: int,
    l2: float,
    seed: int,
) -> CrossValidation:
    """Fit on all folds but one, score that one; for every fold."""
    margins_KN = torch.empty(members, len(labels_N))
    spread_2N = torch.empty(2, len(labels_N))
    distance_2N = torch.empty(2, len(labels_N))
    for fold in sorted(set(folds_N.tolist())):
        held, fit = folds_N == fold, folds_N != fold
        heads = _fit(
            chosen_ND[fit], rejected_ND[fit], labels_N[fit], weights_N[fit], members, l2, seed
        )
        margins_KN[:, held] = heads.rewards(chosen_ND[held]) - heads.rewards(rejected_ND[held])
        for side, features_ND in enumerate((chosen_ND[held], rejected_ND[held])):
            spread_2N[side, held] = disagreement(heads.rewards(features_ND))
            distance_2N[side, held] = heads.distance(features_ND)
    margins_N = aggregate(margins_KN)
    temperature = fit_temperature(margins_N, labels_N, weights_N)
    loss = float(bradley_terry_loss(margins_N / temperature, labels_N, weights_N))
    return CrossValidation(
        l2, loss, temperature, margins_KN, spread_2N.flatten(), distance_2N.flatten()
    )


def _fit(
    chosen_ND: Tensor,
    rejected_ND: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    members: int,
    l2: float,
    seed: int,
) -> Heads:
    """Heads with the feature scale and the member scale of the replies they were fitted on."""
    both_ND = torch.cat([chosen_ND, rejected_ND])
    mean_D, deviation_D = both_ND.mean(dim=0), both_ND.std(dim=0) + 1e-6
    difference_ND = (chosen_ND - rejected_ND) / deviation_D
    weights_KD = fit_heads(difference_ND, labels_N, weights_N, members=members, l2=l2, seed=seed)
    standardised_ND = (both_ND - mean_D) / deviation_D
    raw_KN = weights_KD @ standardised_ND.T
    parts_NFH = standardised_ND.reshape(len(both_ND), FAMILIES, -1)
    return Heads(
        weights_KD,
        mean_D,
        deviation_D,
        raw_KN.mean(dim=1),
        raw_KN.std(dim=1) + 1e-6,
        torch.stack([whitening(parts_NFH[:, family]) for family in range(FAMILIES)]),
    )


def describe(card: RewardCard) -> str:
    """The card in a few lines of text."""
    lines = [
        f"reward model {card.version}: {card.members} members on {card.layers} layers of "
        f"{Path(card.model).name}, {card.data['pairs']} pairs, l2 {card.l2:g}, "
        f"temperature {card.temperature:.2f}, features {card.metrics['features_s']:.0f} s"
    ]
    for name in _FIGURES:
        if name in card.metrics:
            m = card.metrics[name]
            lines.append(
                f"{_FIGURES[name]}: accuracy {m['accuracy']:.3f} "
                f"[{m['accuracy_low']:.3f}, {m['accuracy_high']:.3f}] on {m['pairs']} pairs, "
                f"ECE {m['ece']:.3f}, flagged {m['flagged_share']:.1%} of replies"
            )
    return "\n".join(lines)


def _tokenised(
    trunk: Trunk, pairs: Sequence[PreferencePair], console: Console
) -> tuple[list[PreferencePair], list[TokenRow]]:
    """The pairs that the backbone's chat template takes, and two rows for each, chosen first; the
    others are counted and said."""
    kept: list[PreferencePair] = []
    rows: list[TokenRow] = []
    why: Counter[str] = Counter()
    for pair in pairs:
        try:
            rows += [
                trunk.tokenise(pair.prompt, pair.chosen, finished=pair.chosen_finished),
                trunk.tokenise(pair.prompt, pair.rejected, finished=pair.rejected_finished),
            ]
        except ModelError as error:
            why[str(error)] += 1
        else:
            kept.append(pair)
    for reason, count in why.most_common(3):
        console.print(f"left out: {count} pairs: {reason}")
    return kept, rows


def _features(
    store: FeatureStore, rows: Sequence[TokenRow], progress: Progressing
) -> tuple[Tensor, Tensor]:
    features_ND = store.features(rows, progress.advance)
    return features_ND[0::2], features_ND[1::2]


def _labels(pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
    """Labels and weights of pairs, each of shape (N,)."""
    return (
        torch.tensor([pair.label for pair in pairs]),
        torch.tensor([pair.weight for pair in pairs]),
    )


def _data_hash(pairs: Sequence[PreferencePair]) -> str:
    digest = hashlib.sha256()
    for line in sorted(json.dumps([repr(p.prompt), p.chosen, p.rejected]) for p in pairs):
        digest.update(line.encode())
    return digest.hexdigest()[:16]


def _files(reports: Sequence[ReadReport]) -> dict[str, Any]:
    return {"files": [report.sentence() for report in reports]}
