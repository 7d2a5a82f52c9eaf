"""The reward model's long proofs, on the HH validation files, which nothing was chosen by."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from rich.console import Console
from torch import Tensor

from models.embedded import cache_folder
from models.feature_store import FeatureStore
from models.head_fitting import Comparisons, ProbeGroup
from models.heads import fit_members
from models.preferences import folds_by_first_user_turn, read_pairs
from models.probes import FLUENT, SEPARABLE, probe_rows
from models.reward_model import Answers, RewardModel, RowFeatures, Scores
from models.sources import resolve_model
from models.trunk import Family, TokenRow, Trunk, layers_at
from rlhf.calibration import calibrated_ece, expected_calibration_error
from rlhf.config import RewardConfig, data_path, load_config
from rlhf.ensemble import aggregate
from rlhf.losses import bradley_terry_loss
from rlhf.records import PreferencePair
from rlhf.statistics import wilson_interval
from tests.proofs.runner import hold, pavlov, prove, rows, start
from trainers.reward import train_reward_model
from trainers.reward_card import longer_wins, margins, probe_report

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
_PARTS = 7
"""Of the training pairs, each about as large as the validation files."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What a criterion's own head says of pairs that it never saw, all of one source."""

    source: str
    log_odds_N: Tensor
    margins_N: Tensor
    """Of the standardised reward."""
    tempered_N: Tensor
    longer_N: Tensor
    """Tokens by which the chosen reply is the longer one."""


def judged(
    model: RewardModel, source: str, pairs: Sequence[PreferencePair], rows: Sequence[TokenRow]
) -> Judged:
    """`rows` are of the chosen replies first, then of the rejected ones."""
    [heads], [features_NFH] = model.banks, features(model, rows)
    criterion = _SOURCES[source]
    place = model.criterion(criterion)
    margins_N, log_odds_N = (
        aggregate(margins(said_KCN[:, place]))
        for said_KCN in (heads.criteria(features_NFH), heads.raw(features_NFH))
    )
    lengths_N = torch.tensor([len(reply) for _, reply in rows])
    longer_N = lengths_N[: len(pairs)] - lengths_N[len(pairs) :]
    tempered_N = margins_N / model.card.temperature[criterion]
    return Judged(source, log_odds_N, margins_N, tempered_N, longer_N)


def held_to_bars(every: Sequence[Judged], name: str) -> tuple[dict[str, bool], dict[str, Any]]:
    """The bars of accuracy and calibration on all that was judged, and the figures."""
    bars: dict[str, bool] = {}
    figures: dict[str, Any] = {}
    for source in _SOURCES:
        own = [each for each in every if each.source == source]
        margins_N = torch.cat([each.margins_N for each in own])
        longer_N = torch.cat([each.longer_N for each in own])
        right = float((margins_N > 0).float().sum())
        share, low, _ = wilson_interval(right, len(margins_N), z=_Z_90)
        length = longer_wins(longer_N, torch.ones(len(longer_N)), torch.ones(len(longer_N)))
        assert length is not None
        bars[f"{source} above length, {name}"] = low > length
        figures[f"{source}, {name}"] = (
            f"{share:.3f}, 90 % bound {low:.3f}, longer wins {length:.3f}, {len(margins_N)} pairs"
        )
    for criterion, least in (("helpful", 0.62), ("harmless", 0.60)):
        own = [each for each in every if _SOURCES[each.source] == criterion]
        log_odds_N, margins_N, tempered_N = (
            torch.cat([getattr(each, kind) for each in own])
            for kind in ("log_odds_N", "margins_N", "tempered_N")
        )
        labels_N = torch.ones(len(margins_N))
        probabilities_N = torch.sigmoid(tempered_N)
        share = float((margins_N > 0).float().mean())
        ece = expected_calibration_error(probabilities_N, labels_N)
        band = calibrated_ece(probabilities_N)
        raw, standardised, cooled = (
            float(bradley_terry_loss(each_N, labels_N))
            for each_N in (log_odds_N, margins_N, tempered_N)
        )
        bars[f"{criterion} at least {least}, {name}"] = share >= least
        bars[f"{criterion} ECE in the band, {name}"] = ece <= band
        bars[f"{criterion} temperature helps, {name}"] = cooled < min(raw, standardised)
        temperature = float((margins_N / tempered_N).nanmean())
        figures[f"{criterion}, {name}"] = (
            f"{share:.3f} on {len(margins_N)} pairs, ECE {ece:.3f} (band {band:.3f}), "
            f"temperature {temperature:.2f}, cross-entropy of the log-odds {raw:.4f}, of the "
            f"standardised reward {standardised:.4f}, after the temperature {cooled:.4f}"
        )
    return bars, figures


def accuracy(folder: Path) -> dict[str, Any]:
    """On every seed, on validation pairs: the helpful head is right at least 62 % of the time
    (all three sources together), the harmless head 60 %; on every source the lower 90 % bound lies
    above what length alone gives (longer wins); the ECE lies within the 95 % band of a calibrated
    model; the temperature lowers the cross-entropy, of the standardised reward as it is and of the
    heads' own log-odds."""
    figures: dict[str, Any] = {}
    bars: dict[str, bool] = {}
    for seed in SEEDS:
        model = trained(folder, seed)
        every = [judged(model, source, *validation(source)) for source in _SOURCES]
        more_bars, more = held_to_bars(every, f"seed {seed}")
        bars |= more_bars
        figures |= {f"prior correlation, seed {seed}": model.card.correlation, **more}
    return hold(bars, figures)


def parts(folder: Path) -> dict[str, Any]:
    """The bars of `accuracy` once more, by seven models on the seventh of the training pairs that
    each of them did not see: together they are ten times as many pairs, and one by one, each about
    as many as the validation files have, they say how often such bars hold by chance."""
    config = load_config(RewardConfig, Path(CONFIG))
    pairs, _ = read_pairs(
        [data_path(file.path) for file in config.data.train],
        None,
        [file.criterion for file in config.data.train],
    )
    parts_N = folds_by_first_user_turn(pairs, _PARTS, 99)
    every: list[Judged] = []
    bars_held: Counter[str] = Counter()
    figures: dict[str, Any] = {}
    for part in range(_PARTS):
        fit = [pair for pair, own in zip(pairs, parts_N, strict=True) if own != part]
        model = train_reward_model(config.ensemble, fit, [], 0, Console(quiet=True), folder / "own")
        [trunk] = model.trunks()
        own_part: list[Judged] = []
        for source in _SOURCES:
            held = [
                pair
                for pair, own in zip(pairs, parts_N, strict=True)
                if own == part and pair.source.startswith(source)
            ]
            own_part.append(judged(model, source, held, rows_of(trunk, held)))
        bars, own_figures = held_to_bars(own_part, f"part {part}")
        bars_held.update(name.rsplit(",", 1)[0] for name, held in bars.items() if held)
        figures |= own_figures
        every += own_part
    bars, together = held_to_bars(every, "all parts")
    held_in = {
        f"{name}, held in parts": f"{bars_held[name]} of {_PARTS}"
        for name in (bar.rsplit(",", 1)[0] for bar in bars)
    }
    return hold(bars, {**together, **held_in, **figures})


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
    return pairs, rows_of(trunk, pairs)


def rows_of(trunk: Trunk, pairs: Sequence[PreferencePair]) -> list[TokenRow]:
    """The chosen replies first, then the rejected ones."""
    return [
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


def cost(folder: Path) -> dict[str, Any]:
    """Trunk and ensemble for 2,500 pairs take at most 6 minutes; a member more costs under 1 % of
    that; scoring with K = 32 costs at most 0.75 of one full forward pass of the backbone over the
    same rows, measured in turns."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copytree(cache_folder(), folder / "cache", ignore=shutil.ignore_patterns("features"))
    pavlov(
        *("reward", CONFIG, "data.limit=2500", "data.validation=[]", "run.dir=run"),
        runs=folder,
        PAVLOV_CACHE=str(folder / "cache"),
    )
    model = RewardModel.load(folder / "run")
    whole_s = model.card.metrics["total_s"]
    shutil.rmtree(folder / "cache")

    [trunk] = model.trunks()
    pairs, rows = validation("helpful-base")
    half = len(pairs)
    # Chosen and rejected in turns: neighbours share their prompt.
    sample = [rows[side * half + n] for n in range(128) for side in (0, 1)]
    family = Family(layers_at(resolve_model("embedded"), 1.0), "last")
    full = Trunk(
        resolve_model("embedded"),
        [family],
        dtype=model.card.dtype,
        max_tokens=model.card.max_tokens,
        batch_tokens=2048,
    )
    seconds: dict[str, list[float]] = {"ensemble": [], "full": [], "heads": []}
    for _ in range(3):
        seconds["full"].append(timed(lambda: full.features(sample)))
        seconds["ensemble"].append(timed(lambda: model.score_features((trunk.features(sample),))))
    features_NFH = trunk.features(sample)
    seconds["heads"] = [timed(lambda: model.score_features((features_NFH,))) for _ in range(3)]
    ratio = min(seconds["ensemble"]) / min(seconds["full"])

    def fitted(members: int) -> float:
        trained_on = Comparisons(
            features_NFH[0::2],
            features_NFH[1::2],
            *(torch.ones(128), torch.ones(128), torch.zeros(128)),
            torch.zeros(128, dtype=torch.long),
        )
        # As many pairs as the ensemble was trained on.
        many = trained_on[torch.arange(2500) % 128]
        group = ProbeGroup(0, members, (0.3,))
        return timed(lambda: fit_members(many, [group], torch.ones(1), 0))

    member_s = (fitted(32) - fitted(2)) / 30
    figures = {
        "seconds, 2,500 pairs": whole_s,
        "seconds, of that the trunk's pass": model.card.metrics["features_s"],
        "seconds, one member more on 2,500 pairs": round(member_s, 3),
        "scoring 256 replies, ensemble / full forward": round(ratio, 3),
        "seconds, scoring 256 replies, ensemble": round(min(seconds["ensemble"]), 2),
        "seconds, of that heads and signals": round(min(seconds["heads"]), 3),
    }
    bars = {
        "2,500 pairs in 360 s": whole_s <= 360,
        "a member costs under 1 %": member_s <= 0.01 * whole_s,
        "scoring at most 0.75 of a full pass": ratio <= 0.75,
    }
    return hold(bars, figures)


def timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def killed(folder: Path) -> dict[str, Any]:
    """`pavlov reward`, with a member that trains a layer of its own, is killed again and again with
    SIGKILL and run again: kept features only grow, what can be read as a model is a whole one, and
    the last run ends with what an unbroken one gives."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = [
        *("reward", CONFIG, "data.limit=160", "data.validation=[]"),
        "ensemble.members=[{count=8,pooling='mean'},"
        "{kind='top',count=1,depth=0.2,layers=1,pooling='mean'}]",
    ]
    for name in ("unbroken", "killed"):
        shutil.copytree(
            cache_folder(), folder / name / "cache", ignore=shutil.ignore_patterns("features")
        )
    caches = {name: str(folder / name / "cache") for name in ("unbroken", "killed")}
    needed_s = timed(
        lambda: pavlov(
            *settings,
            "run.dir=run",
            runs=folder / "unbroken",
            PAVLOV_CACHE=caches["unbroken"],
        )
    )
    reward, kept, after = folder / "killed" / "run" / "reward", [0], []
    for share in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
        run = start(
            *settings,
            "run.dir=run",
            runs=folder / "killed",
            log=folder / "log",
            PAVLOV_CACHE=caches["killed"],
        )
        time.sleep(share * needed_s)
        run.kill()
        run.wait()
        rows = sum(
            pq.read_metadata(path).num_rows for path in Path(caches["killed"]).rglob("*.parquet")
        )
        assert rows >= kept[-1], "features were lost"
        kept.append(rows)
        after.append(round(share * needed_s, 1))
        if reward.exists():
            break
    if not reward.exists():
        pavlov(*settings, "run.dir=run", runs=folder / "killed", PAVLOV_CACHE=caches["killed"])
    whole, other = RewardModel.load(folder / "unbroken" / "run"), RewardModel.load(reward)
    figures = {
        "seconds, unbroken": round(needed_s, 1),
        "killed after, seconds": after,
        "rows of features kept after each kill": kept[1:],
        "accuracy, unbroken and killed": [
            model.card.metrics["cross_validation"]["accuracy"] for model in (whole, other)
        ],
    }
    [one], [two] = whole.banks, other.banks
    cosine = torch.nn.functional.cosine_similarity(
        one.weights_KCH.flatten(1), two.weights_KCH.flatten(1)
    ).min()
    figures["least cosine of a member's heads in the two"] = float(cosine)
    bars = {
        "features were kept": kept[-1] > 0,
        "same pairs": whole.card.data == other.card.data,
        # bfloat16 in other micro-batches.
        "same heads": float(cosine) > 0.99,
    }
    return hold(bars, figures)


def driven_off(folder: Path) -> dict[str, Any]:
    """RL with the shipped settings on HH prompts: in step 0 at most 10 % of the completions are
    flagged, twice the false-alarm rate. With a broken reward (its sign turned), no KL penalty and a
    larger step the flagged share rises."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, combination in (
        ("sound", "{helpful=1.0,harmless=0.5}"),
        ("broken", "{helpful=-1.0,harmless=-0.5}"),
    ):
        pavlov(
            *("reward", CONFIG, "data.validation=[]", f"run.dir={name}"),
            f"ensemble.combination={combination}",
            runs=folder,
        )
    rl = ("rl", "configs/rl_hh_cpu.toml", "rl.num_steps=12", "rl.prompts_per_step=12")
    pavlov(*rl, "rl.num_steps=1", "reward.model=sound/reward", "run.dir=kept", runs=folder)
    pavlov(
        *(*rl, "reward.model=broken/reward", "run.dir=driven"),
        *("rl.kl.coefficient=0.0", "rl.entropy.coefficient=0.0", "learner.learning_rate=3e-4"),
        runs=folder,
    )
    shares = {
        name: [row["ensemble/flagged_share"] for row in rows(folder / name / "metrics.jsonl")]
        for name in ("kept", "driven")
    }
    first, last = shares["driven"][0], statistics.fmean(shares["driven"][-3:])
    figures = {
        "flagged in step 0, sound reward": shares["kept"][0],
        "flagged by step, broken reward": [round(share, 3) for share in shares["driven"]],
    }
    bars = {
        "step 0 at most 10 %": max(shares["kept"][0], first) <= 0.10,
        "rises when driven off": last > first + 0.10,
    }
    return hold(bars, figures)


PROOFS = [accuracy, parts, domain_shift, card, cost, killed, driven_off]


if __name__ == "__main__":
    sys.exit(prove("reward", PROOFS, sys.argv[1:]))
