"""`pavlov reward`: train the reward-model ensemble from preference pairs.

::

    pairs ─► rows (tokens) ─► trunk pass, kept ─► Comparisons ─┬─► L2 for each group and criterion,
                                                               │   what criteria tell of each other
                                                               ├─► cross-validation ─► temperatures,
                                                               │   threshold, figures
                                                               └─► final heads, on all pairs
    validation pairs ──────────► the same pass ─────────────────────► scored once, for figures

What is chosen is chosen by cross-validation over first user turns: every pair trains the final
heads, and still is scored once by heads that never saw its prompt.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from actors.features import stream_features
from cluster.files import RunFolder, folder_beside, resolve_run_folder, write_atomically
from cluster.progress import Progressing
from cluster.session import cluster_address, ray_session
from models.data_files import ReadReport
from models.embedded import cache_folder
from models.feature_store import Compute, FeatureStore
from models.head_fitting import Comparisons
from models.heads import fit_members
from models.preferences import folds_by_first_user_turn, read_pairs
from models.probes import probe_rows
from models.reward_model import (
    COMBINED,
    RewardCard,
    RewardModel,
    RowFeatures,
    version_of,
)
from models.sources import require_context, resolve_model
from models.trunk import TokenRow
from rlhf.config import (
    EnsembleSection,
    PairFile,
    RewardConfig,
    data_path,
)
from rlhf.ensemble import false_alarm_interval, quantile_threshold, shift_score
from rlhf.errors import DataError, ModelError
from rlhf.records import OVERALL, PreferencePair
from trainers.reward_banks import (
    Bank,
    backbones,
    bank_card,
    plan_banks,
    trunk_arguments,
    with_trained_members,
)
from trainers.reward_card import describe, pair_report, probe_report, report
from trainers.reward_choices import (
    choose_correlation,
    choose_groups,
    cross_validate,
    pair_name,
    temperatures,
)

_LEAST_TURNS = 16
_PROBES = 32
"""Prompts that the card's probes are made from."""
_SAY_REASONS = 3


def run_reward(config: RewardConfig, config_path: Path, console: Console) -> Path:
    """Train and write ``<run>/reward``; returns the run folder."""
    folder_path = resolve_run_folder(config.run.dir, config_path)
    for name in backbones(config.ensemble):
        require_context(resolve_model(name), config.ensemble.max_tokens, "ensemble.max_tokens")
    train, reports = _read(config.data.train, config.data.limit)
    validation: list[PreferencePair] = []
    if config.data.validation:
        validation, more = _read(config.data.validation)
        reports += more
    for each in reports:
        console.print(each.sentence())
    require_pairs(train, config.ensemble)
    read = len(validation)
    validation = _unseen(validation, train, console)
    folder = RunFolder.claim(folder_path, config, resume=None)
    try:
        # Left by a start is what begins with a dot, so a killed one can be run again.
        own = folder.path / ".own"
        model = train_reward_model(config.ensemble, train, validation, config.seed, console, own)
        of_files = {
            "files": [each.sentence() for each in reports],
            "pairs_validation_seen": read - len(validation),
        }
        card = model.card.model_copy(update={"data": {**model.card.data, **of_files}})
        with folder_beside(folder.path / "reward") as beside:
            RewardModel(card, model.banks, own).save(beside)
            write_atomically(beside / "card.md", report(card))
        shutil.rmtree(own, ignore_errors=True)
        console.print(describe(card))
        console.print(f"the whole card: {folder.path / 'reward' / 'card.md'}")
    finally:
        folder.release()
    return folder.path


def _read(
    files: Sequence[PairFile], limit: int | None = None
) -> tuple[list[PreferencePair], list[ReadReport]]:
    return read_pairs(
        [data_path(file.path) for file in files], limit, [file.criterion for file in files]
    )


def _unseen(
    validation: Sequence[PreferencePair], train: Sequence[PreferencePair], console: Console
) -> list[PreferencePair]:
    """The validation pairs whose first user turn is not in the training data; the others, which
    would make the figures too good, are counted and said.

    Raises:
        DataError: none is left.
    """
    seen = {pair.first_user_turn for pair in train}
    unseen = [pair for pair in validation if pair.first_user_turn not in seen]
    if validation and not unseen:
        raise DataError(
            f"all {len(validation)} validation pairs open with a first user turn of the training "
            "data and would prove nothing; give others in data.validation, or none"
        )
    if repeated := len(validation) - len(unseen):
        console.print(
            f"left out: {repeated} validation pairs: their first user turn is in the training data"
        )
    return unseen


def combination_of(criteria: Sequence[str], settings: EnsembleSection) -> dict[str, float]:
    """The weights of the criteria in the reward, as configured or by default."""
    if settings.combination is not None:
        return {criterion: settings.combination.get(criterion, 0.0) for criterion in criteria}
    if OVERALL in criteria:
        return {criterion: float(criterion == OVERALL) for criterion in criteria}
    return dict.fromkeys(criteria, 1 / len(criteria))


def require_pairs(pairs: Sequence[PreferencePair], settings: EnsembleSection) -> None:
    """Refuse data that is too small to train on and to calibrate with, for every criterion."""
    found: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        found.setdefault(pair.judged_by, []).append(pair)
    if COMBINED in found:
        raise DataError(
            f"a criterion cannot be called {COMBINED!r}: that is what they make together"
        )
    for criterion in settings.combination or {}:
        if criterion not in found:
            raise DataError(
                f"ensemble.combination names {criterion!r}, but no pair was judged by it; the data "
                f"has {', '.join(sorted(found))}"
            )
    least = max(_LEAST_TURNS, settings.folds)
    for criterion, own in sorted(found.items()):
        live = [pair for pair in own if pair.weight > 0]
        turns = len({pair.first_user_turn for pair in live})
        if turns < least:
            raise DataError(
                f"{len(live)} pairs judged by {criterion!r} with {turns} different first user "
                f"turns are too few: at least {least} are needed"
            )


def train_reward_model(
    settings: EnsembleSection,
    pairs: Sequence[PreferencePair],
    validation: Sequence[PreferencePair],
    seed: int,
    console: Console,
    own: Path,
) -> RewardModel:
    """An ensemble from preference pairs. `validation` is scored once, for the card's figures; the
    layers that members train go to the folder `own`."""
    started = time.monotonic()
    banks = plan_banks(settings)
    pairs, rows = _tokenised(banks, pairs, console)
    validation, validation_rows = _tokenised(banks, validation, console)
    require_pairs(pairs, settings)
    criteria = sorted({pair.judged_by for pair in pairs})
    folds_N = torch.tensor(folds_by_first_user_turn(pairs, settings.folds, seed))
    if any(bank.trained for bank in banks):
        _require_held_out(pairs, folds_N)
        banks = with_trained_members(
            banks, settings, rows, pairs, criteria, folds_N, seed, own, console
        )
    members_s = time.monotonic() - started
    probes = [probe_rows(bank.trunk, pairs, _PROBES, seed) for bank in banks]
    probe_sizes = {name: len(made) for name, made in probes[0].items()}
    probed_rows = [list(chain.from_iterable(made.values())) for made in probes]
    streams = [_stream(bank, settings, own, console) for bank in banks]
    with ray_session("reward") if cluster_address() else nullcontext():
        features, validation_features, probe_features = _features(
            banks, streams, (rows, validation_rows, probed_rows), console
        )
    features_s = time.monotonic() - started - members_s

    combination = combination_of(criteria, settings)
    combination_C = torch.tensor([combination[criterion] for criterion in criteria])
    data = [_comparisons(features_NFH, pairs, criteria) for features_NFH in features]
    groups, l2_losses = choose_groups(banks, data, folds_N, criteria)
    correlation_CC, correlation_losses = choose_correlation(
        data, groups, folds_N, criteria, settings.correlations
    )
    fit = partial(
        fit_members, combination_C=combination_C, seed=seed, correlation_CC=correlation_CC
    )
    # Trained members have seen all folds but the first.
    held_folds = [0] if any(bank.heads for bank in banks) else sorted(set(folds_N.tolist()))
    held, held_out = cross_validate(data, groups, fit, folds_N, held_folds)
    held_pairs = [pairs[n] for n in held]
    fitted = [fit(d, g) for d, g in zip(data, groups, strict=True)]

    signals_SN = torch.stack([held_out.disagreement_N, held_out.distance_N])
    signal_mean_S, signal_deviation_S = signals_SN.mean(dim=1), signals_SN.std(dim=1) + 1e-6
    shift_N = shift_score(signals_SN, signal_mean_S, signal_deviation_S)
    threshold = quantile_threshold(shift_N, settings.false_alarm_rate)
    card = RewardCard(
        version="",
        banks=tuple(bank_card(b, g, criteria) for b, g in zip(banks, groups, strict=True)),
        dtype=settings.dtype,
        max_tokens=settings.max_tokens,
        criteria=tuple(criteria),
        combination=combination,
        correlation={
            pair_name(criteria, pair): round(float(correlation_CC[pair]), 4)
            for pair in combinations(range(len(criteria)), 2)
        },
        temperature=temperatures(held_out, held_pairs, criteria, combination),
        signal_mean=tuple(signal_mean_S.tolist()),
        signal_deviation=tuple(signal_deviation_S.tolist()),
        threshold=threshold if math.isfinite(threshold) else None,
        false_alarm_rate=settings.false_alarm_rate,
        false_alarm_interval=false_alarm_interval(len(shift_N), settings.false_alarm_rate),
        seed=seed,
        data={
            "pairs": len(pairs),
            "pairs_held_out": len(held),
            "pairs_by_criterion": dict(Counter(pair.judged_by for pair in pairs)),
            "pairs_validation": len(validation),
            "hash": _data_hash(pairs),
            "hash_validation": _data_hash(validation) if validation else None,
        },
        metrics={},
    )
    card = card.model_copy(update={"version": version_of(fitted, card)})
    model = RewardModel(card, fitted, own)
    probed = model.score_features(probe_features)
    lengths = _lengths(rows)
    metrics: dict[str, Any] = {
        "cross_validation": {
            **pair_report(
                card, held_out, held_pairs, [lengths[m] for n in held for m in (2 * n, 2 * n + 1)]
            ),
            "flagged_share": float((shift_N > threshold).double().mean()),
        },
        "l2_losses": l2_losses,
        "correlation_losses": correlation_losses,
        "probes": probe_report(probed, probe_sizes, held_out, shift_N),
    }
    if validation:
        # In turns, and chosen ones first from here.
        sides = tuple(torch.cat([f_NFH[0::2], f_NFH[1::2]]) for f_NFH in validation_features)
        scores = model.score_features(sides)
        metrics["validation"] = {
            **pair_report(card, scores, validation, _lengths(validation_rows)),
            "flagged_share": float(scores.shifted_N.double().mean()),
        }
    metrics["members_s"] = round(members_s, 1) if any(bank.heads for bank in banks) else 0.0
    metrics["features_s"] = round(features_s, 1)
    metrics["total_s"] = round(time.monotonic() - started, 1)
    return RewardModel(card.model_copy(update={"metrics": metrics}), fitted, own)


def _require_held_out(pairs: Sequence[PreferencePair], folds_N: Tensor) -> None:
    """Refuse data whose first fold, which no trained member sees, has no pair of a criterion."""
    held = {
        pair.judged_by
        for pair, fold in zip(pairs, folds_N.tolist(), strict=True)
        if fold == 0 and pair.weight > 0
    }
    if missing := sorted({pair.judged_by for pair in pairs} - held):
        raise DataError(
            f"no pair judged by {missing[0]!r} falls into the fold that is held out to calibrate "
            "trained members; give more pairs, fewer ensemble.folds or another seed"
        )


def _stream(bank: Bank, settings: EnsembleSection, own: Path, console: Console) -> Compute | None:
    """Who runs the trunk: on a cluster its actors, else None, for this process alone, which has
    all cores of the machine and need not start a Ray for it."""
    if cluster_address() is None:
        return None
    arguments = trunk_arguments(bank.name, bank.families, settings, own)
    return partial(stream_features, trunk=arguments, families=len(bank.families), say=console.print)


def _features(
    banks: Sequence[Bank],
    streams: Sequence[Compute | None],
    parts: Sequence[Sequence[Sequence[TokenRow]]],
    console: Console,
) -> list[RowFeatures]:
    """Features of every part, each with the rows of every bank, from one pass that is kept."""
    by_part: list[list[Tensor]] = [[] for _ in parts]
    with Progressing(console, "features", sum(len(rows) for p in parts for rows in p)) as progress:
        for place, (bank, stream) in enumerate(zip(banks, streams, strict=True)):
            store = FeatureStore(cache_folder() / "features", bank.trunk)
            rows = [part[place] for part in parts]
            # All at once: a stream starts its actors once.
            features_NFH = store.features(list(chain(*rows)), progress.advance, stream)
            parts_NFH = torch.split(features_NFH, [len(own) for own in rows])
            for own, part_NFH in zip(by_part, parts_NFH, strict=True):
                own.append(part_NFH)
    return [tuple(own) for own in by_part]


def _lengths(rows: Sequence[Sequence[TokenRow]]) -> list[int]:
    """Tokens of the replies, as the first backbone reads them."""
    return [len(reply) for _, reply in rows[0]]


def _tokenised(
    banks: Sequence[Bank], pairs: Sequence[PreferencePair], console: Console
) -> tuple[list[PreferencePair], list[list[TokenRow]]]:
    """The pairs that every backbone's chat template takes, and for each bank two rows a pair,
    chosen first; the others are counted and said.

    Raises:
        DataError: there are pairs, but none of them is taken.
    """
    kept: list[PreferencePair] = []
    rows: list[list[TokenRow]] = [[] for _ in banks]
    why: Counter[str] = Counter()
    for pair in pairs:
        replies = [
            (pair.chosen, pair.chosen_finished),
            (pair.rejected, pair.rejected_finished),
        ]
        try:
            own = [
                [
                    bank.trunk.tokenise(pair.prompt, text, finished=finished)
                    for text, finished in replies
                ]
                for bank in banks
            ]
        except ModelError as error:
            why[str(error)] += 1
            continue
        kept.append(pair)
        for bank_rows, more in zip(rows, own, strict=True):
            bank_rows += more
    if pairs and not kept:
        raise DataError(
            f"none of the {len(pairs)} pairs can be tokenised: {why.most_common(1)[0][0]}; choose "
            "another ensemble.model or other data"
        )
    said = why.most_common(_SAY_REASONS)
    for reason, count in said:
        console.print(f"left out: {count} pairs: {reason}")
    if others := why.total() - sum(count for _, count in said):
        console.print(f"left out: {others} pairs more, for {len(why) - len(said)} other reasons")
    return kept, rows


def _comparisons(
    features_NFH: Tensor, pairs: Sequence[PreferencePair], criteria: Sequence[str]
) -> Comparisons:
    """Pairs as tensors; features of chosen and rejected replies come in turns."""
    return Comparisons(
        features_NFH[0::2],
        features_NFH[1::2],
        torch.tensor([pair.label for pair in pairs]),
        torch.tensor([pair.weight for pair in pairs]),
        torch.tensor([pair.margin for pair in pairs]),
        torch.tensor([criteria.index(pair.judged_by) for pair in pairs]),
    )


def _data_hash(pairs: Sequence[PreferencePair]) -> str:
    """Of all that decides a model, in whatever order the pairs come."""
    digest = hashlib.sha256()
    decides = [replace(pair, source="", criterion=pair.judged_by) for pair in pairs]
    for line in sorted(map(repr, decides)):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()[:16]
