"""From what judges said to the pairs that a reward model learns from, with where they come from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from labelling.records import Judgement, Kind, SoftLabel
from models.preferences import write_pairs
from rlhf.errors import DataError
from rlhf.records import OVERALL, PreferencePair

PROVENANCE_SCHEMA = pa.schema(
    [
        ("pair", pa.string()),
        ("project", pa.string()),
        ("method", pa.string()),
        ("kind", pa.string()),
        ("assessors", pa.list_(pa.string())),
        ("judgements", pa.int64()),
        ("judges", pa.int64()),
        ("chosen_model", pa.string()),
        ("rejected_model", pa.string()),
        ("chosen_checkpoint", pa.string()),
        ("rejected_checkpoint", pa.string()),
    ]
)
"""The columns beside those of `models.preferences.PAIR_SCHEMA`."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a learned pair comes from: `judgements` counts what `assessors` said of it, `method` is
    how one label was made of that, and `judges` how many the method rests it on."""

    pair: str
    project: str
    method: str
    kind: Kind
    assessors: tuple[str, ...]
    judgements: int
    judges: int
    chosen_model: str
    rejected_model: str
    chosen_checkpoint: str
    rejected_checkpoint: str


def preference_rows(
    judgements: Sequence[Judgement],
    labels: Mapping[str, SoftLabel],
    *,
    project: str,
    method: str,
    criterion: str = OVERALL,
    kind: Kind = "person",
) -> list[tuple[PreferencePair, Provenance]]:
    """A preference for every labelled pair, in the order of `labels`, and where it comes from.

    Chosen is the answer that is better with a probability of at least one half, a at exactly one
    half; that probability is the label. Judgements count that are of this kind, judged by this
    criterion, and not in doubt.

    Raises:
        DataError: nothing that counts is known of a labelled pair, or its texts are not.
    """
    counted: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        if judgement.kind == kind and criterion in judgement.verdicts and not judgement.doubt:
            counted[judgement.pair].append(judgement)
    rows: list[tuple[PreferencePair, Provenance]] = []
    without: list[str] = []
    for pair, label in labels.items():
        said = counted.get(pair, [])
        work = next((judgement.work for judgement in said if judgement.work), None)
        if work is None:
            without.append(pair)
            continue
        a_chosen = label.a_better >= 0.5
        chosen, rejected = (work.a, work.b) if a_chosen else (work.b, work.a)
        preference = PreferencePair(
            work.prompt,
            chosen.text,
            rejected.text,
            label=label.a_better if a_chosen else 1 - label.a_better,
            weight=label.weight,
            source=work.source,
            criterion="" if criterion == OVERALL else criterion,
            chosen_finished=chosen.finished,
            rejected_finished=rejected.finished,
        )
        provenance = Provenance(
            pair=pair,
            project=project,
            method=method,
            kind=kind,
            assessors=tuple(sorted({judgement.assessor for judgement in said})),
            judgements=len(said),
            judges=label.judges,
            chosen_model=chosen.model,
            rejected_model=rejected.model,
            chosen_checkpoint=chosen.checkpoint,
            rejected_checkpoint=rejected.checkpoint,
        )
        rows.append((preference, provenance))
    if without:
        raise DataError(
            f"{len(without)} of {len(labels)} labelled pairs have no texts from a judgement that "
            f"counts (kind {kind}, criterion {criterion}), first {without[0]!r}; label those pairs "
            "alone whose judgements hold the work"
        )
    return rows


def write_preferences(rows: Sequence[tuple[PreferencePair, Provenance]], path: Path) -> None:
    """Write pairs for `models.preferences.read_pairs`, with `PROVENANCE_SCHEMA`'s columns beside.

    Raises:
        DataError: `path` does not end in ``.parquet`` or cannot be written.
    """
    provenance = [asdict(provenance) for _, provenance in rows]
    further = pa.Table.from_pylist(provenance, schema=PROVENANCE_SCHEMA)
    write_pairs([pair for pair, _ in rows], path, further)
