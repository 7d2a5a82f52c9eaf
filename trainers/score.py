"""`pavlov score`: what a reward model says of pairs or single completions in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console

from models.preferences import SingleCompletion, read_scoring_rows
from models.reward_model import RewardModel
from models.sources import resolve_reward_model
from rlhf.calibration import pair_figures
from rlhf.ensemble import aggregate
from rlhf.errors import DataError, ModelError
from rlhf.records import Message, PreferencePair
from trainers.recording import Progressing

_ONE_SUFFIX = [""]
_PAIR_SUFFIXES = ["_chosen", "_rejected"]


def run_score(reward: str, data: Path, out: Path | None, console: Console) -> dict[str, Any]:
    """Score every usable row; returns the summary, writes rows to `out` where it is given.

    Raises:
        DataError: no usable row, or `out` is not a Parquet file that can be written.
    """
    if out is not None and (
        out.suffix != ".parquet" or not out.absolute().parent.is_dir() or out.is_dir()
    ):
        raise DataError(f"--out {out} must be a .parquet file in a folder that exists")
    model = RewardModel.load(resolve_reward_model(reward))
    rows, report = read_scoring_rows(data)
    console.print(report.sentence())
    trunk = model.trunk()
    texts, kept = [], []
    for line, row in rows:
        try:
            texts += [trunk.tokenise(m, reply, finished=done) for m, reply, done in _replies(row)]
        except ModelError as error:
            console.print(f"line {line} left out: {error}")
            continue
        kept.append((line, row))
    if not kept:
        raise DataError(f"none of the {len(rows)} rows in {data} can be tokenised")
    with Progressing(console, "scoring", len(texts)) as progress:
        features_ND = trunk.features(texts, progress.advance)
    scores = model.score_features(features_ND)
    rewards_KN = scores.rewards_KN
    rewards_N = aggregate(rewards_KN)
    pairs: dict[str, list[tuple[int, PreferencePair]]] = {}
    table: list[dict[str, Any]] = []
    index = 0
    for line, row in kept:
        suffixes = _PAIR_SUFFIXES if isinstance(row, PreferencePair) else _ONE_SUFFIX
        if isinstance(row, PreferencePair):
            pairs.setdefault(row.source, []).append((index, row))
        values: dict[str, Any] = {"line": line, "source": row.source}
        for suffix in suffixes:
            values |= {
                f"rewards{suffix}": rewards_KN[:, index].tolist(),
                f"reward{suffix}": float(rewards_N[index]),
                f"disagreement{suffix}": float(scores.disagreement_N[index]),
                f"distance{suffix}": float(scores.distance_N[index]),
                f"shift{suffix}": float(scores.shift_N[index]),
                f"domain_shift{suffix}": bool(scores.shifted_N[index]),
            }
            index += 1
        table.append(values)
    if out is not None:
        _write(table, out)
    every = [pair for source in pairs.values() for pair in source]
    summary = _figures(model, rewards_KN, every)
    return summary | {
        "skipped": len(report.bad) + len(rows) - len(kept),
        "members": model.card.members,
        "flagged_share": float(scores.shifted_N.double().mean()),
        "per_source": {
            source: _figures(model, rewards_KN, found) for source, found in sorted(pairs.items())
        },
        "reward_version": model.card.version,
        "replies": len(texts),
    }


def _write(rows: list[dict[str, Any]], out: Path) -> None:
    # Pairs and single completions have columns of their own; the table has all of them.
    names = dict.fromkeys(name for row in rows for name in row)
    beside = out.with_name(f".{out.name}.part")
    try:
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), beside)
        beside.rename(out)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        beside.unlink(missing_ok=True)


def _figures(
    model: RewardModel, rewards_KN: torch.Tensor, pairs: list[tuple[int, PreferencePair]]
) -> dict[str, Any]:
    """Accuracy and calibration of pairs, each with the column of its chosen reply."""
    if not pairs:
        return {"pairs": 0, "accuracy": None, "ece": None, "member_accuracy": []}
    chosen = torch.tensor([column for column, _ in pairs])
    labels_N = torch.tensor([pair.label for _, pair in pairs])
    weights_N = torch.tensor([pair.weight for _, pair in pairs])
    margins_KN = rewards_KN[:, chosen] - rewards_KN[:, chosen + 1]
    return pair_figures(margins_KN, model.card.temperature, labels_N, weights_N)


def _replies(row: PreferencePair | SingleCompletion) -> list[tuple[tuple[Message, ...], str, bool]]:
    if isinstance(row, SingleCompletion):
        return [(row.prompt, row.completion, row.finished)]
    return [
        (row.prompt, row.chosen, row.chosen_finished),
        (row.prompt, row.rejected, row.rejected_finished),
    ]
