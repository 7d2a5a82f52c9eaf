"""The reward model's long proofs, on the HH validation files, which nothing was chosen by."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from models.embedded import cache_folder
from models.feature_store import FeatureStore
from models.preferences import read_pairs
from models.probes import FLUENT, SEPARABLE, probe_rows
from models.reward_model import Answers, RewardModel, RowFeatures, Scores
from models.trunk import TokenRow
from rlhf.calibration import calibrated_ece, expected_calibration_error
from rlhf.config import data_path
from rlhf.ensemble import aggregate
from rlhf.losses import bradley_terry_loss
from rlhf.records import PreferencePair
from rlhf.statistics import wilson_interval
from tests.proofs.runner import hold, pavlov, prove
from trainers.reward_card import longer_wins, probe_report

SEEDS = (0, 1, 2)
CONFIG = "configs/reward_hh_cpu.toml"
EVERY_PAIR = "data.limit=100000"
_SOURCES = {
    "helpful-base": "helpful",
    "helpful-online": "helpful",
    "helpful-rejection-sampled": "helpful",
    "harmless-base": "harmless",
}
_Z_90 = statistics.NormalDist().inv_cdf(0.95)
_PROBE_PROMPTS = 150


def accuracy(folder: Path) -> dict[str, Any]:
    """On every seed, on validation pairs: the helpful head is right at least 62 % of the time
    (all three sources together), the harmless head 60 %; on every source the lower 90 % bound lies
    above what length alone gives (longer wins); the ECE lies within the 95 % band of a calibrated
    model; the temperature lowers the cross-entropy."""
    figures: dict[str, Any] = {}
    bars: dict[str, bool] = {}
    for seed in SEEDS:
        model = trained(folder, seed)
        margins: dict[str, list[torch.Tensor]] = {}
        for source, criterion in _SOURCES.items():
            pairs, rows = validation(source)
            scores = model.score_features(features(model, rows))
            chosen_KN, rejected_KN = scores.criteria_KCN[:, model.criterion(criterion)].chunk(2, 1)
            margins_N = aggregate(chosen_KN - rejected_KN)
            margins.setdefault(criterion, []).append(margins_N)
            right = float((margins_N > 0).float().sum())
            share, low, _ = wilson_interval(right, len(pairs), z=_Z_90)
            lengths_N = torch.tensor([len(reply) for _, reply in rows])
            longer_N = lengths_N[: len(pairs)] - lengths_N[len(pairs) :]
            length = longer_wins(longer_N, torch.ones(len(pairs)), torch.ones(len(pairs)))
            assert length is not None
            bars[f"{source} above length, seed {seed}"] = low > length
            figures[f"{source}, seed {seed}"] = (
                f"{share:.3f}, 90 % bound {low:.3f}, longer wins {length:.3f}, {len(pairs)} pairs"
            )
        for criterion, least in (("helpful", 0.62), ("harmless", 0.60)):
            margins_N = torch.cat(margins[criterion])
            temperature = model.card.temperature[criterion]
            labels_N = torch.ones(len(margins_N))
            probabilities_N = torch.sigmoid(margins_N / temperature)
            share = float((margins_N > 0).float().mean())
            ece = expected_calibration_error(probabilities_N, labels_N)
            band = calibrated_ece(probabilities_N)
            raw = float(bradley_terry_loss(margins_N, labels_N))
            cooled = float(bradley_terry_loss(margins_N / temperature, labels_N))
            bars[f"{criterion} at least {least}, seed {seed}"] = share >= least
            bars[f"{criterion} ECE in the band, seed {seed}"] = ece <= band
            bars[f"{criterion} temperature helps, seed {seed}"] = cooled < raw
            figures[f"{criterion}, seed {seed}"] = (
                f"{share:.3f} on {len(margins_N)} pairs, ECE {ece:.3f} (band {band:.3f}), "
                f"temperature {temperature:.2f}, cross-entropy {raw:.4f} to {cooled:.4f}"
            )
    return hold(bars, figures)


def domain_shift(folder: Path) -> dict[str, Any]:
    """Told from validation replies with K = 32: the mean AUROC over eight probes is at least 0.90
    for disagreement and 0.95 combined, none is below 0.80 combined; 3 to 7 % of validation replies
    are flagged. What is not separable is listed."""
    figures: dict[str, Any] = {}
    bars: dict[str, bool] = {}
    every: dict[str, list[dict[str, float]]] = {}
    alarms: list[float] = []
    for seed in SEEDS:
        model = trained(folder.parent / "accuracy", seed)
        pairs = [pair for source in _SOURCES for pair in validation(source)[0]]
        rows = [row for source in _SOURCES for row in validation(source)[1]]
        inside = model.score_features(features(model, rows))
        [trunk] = model.trunks()
        probes = probe_rows(trunk, pairs, _PROBE_PROMPTS, 0)
        flat = [row for rows in probes.values() for row in rows]
        outside = model.score_features(features(model, flat))
        sizes = {name: len(rows) for name, rows in probes.items()}
        report = probe_report(outside, sizes, answers(inside), inside.shift_N)
        for name, found in report.items():
            every.setdefault(name, []).append(found)
        alarms.append(float(inside.shifted_N.float().mean()))
    means = {
        name: {signal: statistics.fmean(f[signal] for f in found) for signal in found[0]}
        for name, found in every.items()
    }
    for signal, title, least in (
        ("auroc_disagreement", "disagreement", 0.90),
        ("auroc_distance", "distance", 0.0),
        ("auroc", "combined", 0.95),
    ):
        mean = statistics.fmean(means[name][signal] for name in SEPARABLE)
        figures[f"mean AUROC of the eight, {title}"] = mean
        bars[f"mean AUROC, {title}, at least {least}"] = mean >= least
    for name in (*SEPARABLE, *FLUENT):
        found = means[name]
        figures[name] = (
            f"combined {found['auroc']:.2f}, disagreement {found['auroc_disagreement']:.2f}, "
            f"distance {found['auroc_distance']:.2f}, flagged {found['flagged_share']:.0%}, "
            f"reward {found['reward']:+.1f}"
        )
    for name in SEPARABLE:
        bars[f"{name} at least 0.80 combined"] = means[name]["auroc"] >= 0.80
    figures["false alarms on validation replies"] = [round(share, 3) for share in alarms]
    bars["false alarms between 3 and 7 %"] = all(0.03 <= share <= 0.07 for share in alarms)
    return hold(bars, figures)


def trained(folder: Path, seed: int) -> RewardModel:
    """The shipped configuration on all training pairs; trained once."""
    run = folder / f"seed-{seed}"
    if not (run / "reward" / "reward.json").is_file():
        shutil.rmtree(run, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        done = pavlov(
            *("reward", CONFIG, EVERY_PAIR, "data.validation=[]"),
            *(f"seed={seed}", f"run.dir={run}"),
            runs=folder,
        )
        print(done.stdout, flush=True)
    return RewardModel.load(run)


@cache
def validation(source: str) -> tuple[list[PreferencePair], list[TokenRow]]:
    """A source's validation pairs, and their rows: chosen replies first, then the rejected ones."""
    pairs, _ = read_pairs([data_path(f"hh/{source}/validation.jsonl.gz")])
    [trunk] = trained_any().trunks()
    return pairs, [
        *(trunk.tokenise(pair.prompt, pair.chosen) for pair in pairs),
        *(trunk.tokenise(pair.prompt, pair.rejected) for pair in pairs),
    ]


@cache
def trained_any() -> RewardModel:
    return trained(Path("runs/proofs/reward/accuracy").absolute(), SEEDS[0])


def features(model: RewardModel, rows: Sequence[TokenRow]) -> RowFeatures:
    """Kept features, so that seeds share one pass."""
    [trunk] = model.trunks()
    by_pairs = sorted(range(len(rows)), key=lambda n: (rows[n][0], n))
    ordered_NFH = FeatureStore(cache_folder() / "features", trunk).features(
        [rows[n] for n in by_pairs]
    )
    features_NFH = torch.empty_like(ordered_NFH)
    features_NFH[by_pairs] = ordered_NFH
    return (features_NFH,)


def answers(scores: Scores) -> Answers:
    return Answers(scores.rewards_KN, scores.criteria_KCN, scores.disagreement_N, scores.distance_N)


def card(folder: Path) -> dict[str, Any]:
    """`pavlov reward` on the shipped configuration prints and writes its card, and `pavlov score`
    gives the same validation accuracy through Ray Data."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    printed = pavlov("reward", CONFIG, f"run.dir={folder / 'run'}", runs=folder).stdout
    (folder / "printed.txt").write_text(printed)
    made = RewardModel.load(folder / "run").card
    own = made.metrics["validation"]["per_source"]["harmless-base/validation"]
    scored = json.loads(
        pavlov(
            *("score", "--reward", str(folder / "run"), "--criterion", "harmless", "--json"),
            *("--data", str(data_path("hh/harmless-base/validation.jsonl.gz"))),
            runs=folder,
        ).stdout
    )
    figures = {
        "pairs": made.data["pairs"],
        "seconds, features": made.metrics["features_s"],
        "seconds, all": made.metrics["total_s"],
        "harmless accuracy on the card": own["accuracy"],
        "harmless accuracy by pavlov score": scored["accuracy"],
    }
    # bfloat16 in other micro-batches: a pair on the edge may fall to the other side.
    bars = {"card and score agree": abs(own["accuracy"] - scored["accuracy"]) <= 0.01}
    return hold(bars, figures)


PROOFS = [accuracy, domain_shift, card]


if __name__ == "__main__":
    sys.exit(prove("reward", PROOFS, sys.argv[1:]))
