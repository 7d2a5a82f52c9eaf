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
from rlhf.ensemble import aggregate, expected_calibration_error
from rlhf.errors import DataError
from rlhf.records import Message, PreferencePair
from trainers.recording import Progressing

_ONE_SUFFIX = [""]
_PAIR_SUFFIXES = ["_chosen", "_rejected"]


def run_score(reward: str, data: Path, out: Path | None, console: Console) -> dict[str, Any]:
    """Score every usable row; returns the summary, writes rows to `out` where it is given.

    Raises:
        DataError: no usable row, or `out` is not a Parquet file that can be written.
    """
    if out is not None and (out.suffix != ".parquet" or not out.absolute().parent.is_dir()):
        raise DataError(f"--out {out} must be a .parquet file in a folder that exists")
    model = RewardModel.load(resolve_reward_model(reward))
    rows, report = read_scoring_rows(data)
    console.print(report.sentence())
    trunk = model.trunk()
    texts = [
        trunk.tokenise(messages, reply, finished=finished)
        for _, row in rows
        for messages, reply, finished in _replies(row)
    ]
    with Progressing(console, "scoring", len(texts)) as progress:
        features_ND = trunk.features(texts, progress.advance)
    scores = model.score_features(features_ND)
    rewards_KN = scores.rewards_KN
    raw_KN = model.heads.raw(features_ND)
    rewards_N = aggregate(rewards_KN)
    pairs: dict[str, list[int]] = {}
    table: list[dict[str, Any]] = []
    index = 0
    for line, row in rows:
        suffixes = _PAIR_SUFFIXES if isinstance(row, PreferencePair) else _ONE_SUFFIX
        if isinstance(row, PreferencePair):
            pairs.setdefault(row.source, []).append(index)
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
        beside = out.with_name(f".{out.name}.part")
        # Pairs and single completions have columns of their own; the table has all of them.
        names = dict.fromkeys(name for values in table for name in values)
        pq.write_table(pa.table({name: [v.get(name) for v in table] for name in names}), beside)
        beside.rename(out)
    every = [first for firsts in pairs.values() for first in firsts]
    summary = _figures(model, raw_KN, every)
    return summary | {
        "skipped": len(report.bad),
        "members": model.card.members,
        "flagged_share": float(scores.shifted_N.double().mean()),
        "per_source": {
            source: _figures(model, raw_KN, firsts) for source, firsts in sorted(pairs.items())
        },
        "reward_version": model.card.version,
        "replies": len(texts),
    }


def _figures(model: RewardModel, raw_KN: torch.Tensor, firsts: list[int]) -> dict[str, Any]:
    """Accuracy and calibration of pairs, given the column of each pair's chosen reply."""
    if not firsts:
        return {"pairs": 0, "accuracy": None, "ece": None, "member_accuracy": []}
    chosen = torch.tensor(firsts)
    margins_KN = raw_KN[:, chosen] - raw_KN[:, chosen + 1]
    probability_N = torch.sigmoid(aggregate(margins_KN) / model.card.temperature)
    return {
        "pairs": len(firsts),
        "accuracy": float((probability_N > 0.5).double().mean()),
        "ece": expected_calibration_error(probability_N, torch.ones_like(probability_N)),
        "member_accuracy": (margins_KN > 0).double().mean(dim=1).tolist(),
    }


def _replies(row: PreferencePair | SingleCompletion) -> list[tuple[tuple[Message, ...], str, bool]]:
    if isinstance(row, SingleCompletion):
        return [(row.prompt, row.completion, True)]
    return [
        (row.prompt, row.chosen, row.chosen_finished),
        (row.prompt, row.rejected, row.rejected_finished),
    ]
