"""`pavlov score`: what a reward model says of pairs or single completions in a file of any length.

::

    read the file ──► ScoringActor (one a GPU, or one a node) ──► figures, and rows to Parquet
      one task               in batches of 256 rows                    here, in the file's order
"""

from __future__ import annotations

import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from operator import sub
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console

from actors.scoring import ScoringActor, read_tables
from cluster.guard import Guard
from cluster.layout import usable_cores
from cluster.progress import Progressing
from cluster.session import ray_session
from cluster.streaming import stream_through_actors
from models.data_files import BadRow, Tally, count_rows
from models.preferences import require_scoring_row
from models.reward_model import COMBINED, RewardCard, RewardModel, in_combination
from models.sources import resolve_reward_model
from rlhf.calibration import pair_figures
from rlhf.errors import DataError
from rlhf.tables import SCORE_FIELDS
from rlhf.text_checks import TEXT_CHECKS

_SUFFIXES = {1: ("",), 2: ("_chosen", "_rejected")}
"""Of the columns of a row with so many replies."""
_SAY_REFUSED = 5
ROW_GROUP = 4096

Row = dict[str, Any]


def run_score(
    reward: str, data: Path, out: Path | None, console: Console, criterion: str | None = None
) -> Row:
    """Score every usable row; returns the summary, writes rows to `out` where it is given.

    With a `criterion` rewards and figures are of that criterion's heads, on all pairs; else of the
    reward, on the pairs that it is about (`in_combination`), or all where there are none.

    Raises:
        DataError: no usable row, or `out` is not a Parquet file that can be written, or is `data`.
        ModelError: `reward` is no reward model, or has no such criterion.
    """
    if out is not None and (
        out.suffix != ".parquet" or not out.absolute().parent.is_dir() or out.is_dir()
    ):
        raise DataError(f"--out {out} must be a .parquet file in a folder that exists")
    if out is not None and out.resolve() == data.resolve():
        raise DataError(f"--out {out} is the data file; scores need a file of their own")
    folder = resolve_reward_model(reward).absolute()
    model = RewardModel.load(folder)
    if criterion is not None:
        model.criterion(criterion)
    total = count_rows(data)
    require_scoring_row(data)
    scores = stream_through_actors(
        partial(read_tables, data.absolute()),
        ScoringActor,
        {"model": str(folder), "criterion": criterion},
        use_gpus=torch.version.cuda is not None,
        say=console.print,
    )
    summary = Summary(model.card, data, criterion)
    with ray_session("score", num_cpus=usable_cores()), closing(scores):
        collect(scores, summary, out, console, total)
    return summary.figures()


def collect(
    scores: Iterable[pa.Table], summary: Summary, out: Path | None, console: Console, total: int
) -> None:
    """Take in tables of `actors.scoring.SCORES_SCHEMA` as they come, `total` rows.

    Raises:
        DataError: no row could be tokenised, or `out` cannot be written.
    """
    with (
        nullcontext() if out is None else _Table(out) as table,
        Progressing(console, "scoring", total) as progress,
    ):
        for part in scores:
            rows = part.to_pylist()
            for row in rows:
                summary.add(row)
                if row["refused"] is not None and summary.refused <= _SAY_REFUSED:
                    console.print(f"line {row['line']} left out: {row['refused']}")
            if table is not None:
                table.add(row for row in rows if row["replies"])
            progress.advance(len(rows))
        if not summary.replies:
            raise DataError(
                f"none of the {summary.refused} rows in {summary.read.path} can be tokenised"
            )
    if summary.refused > _SAY_REFUSED:
        console.print(f"{summary.refused - _SAY_REFUSED} more left out that cannot be tokenised")
    console.print(summary.read.sentence())


class Summary:
    """What is kept of the rows that went by.

    Args:
        data: the file that they stand in.
        criterion: whose heads gave the rewards; None for the stated combination.
    """

    def __init__(self, card: RewardCard, data: Path, criterion: str | None = None) -> None:
        self.read = Tally(data)
        self.refused = 0
        self.replies = 0
        self._card = card
        self._criterion = criterion or COMBINED
        self._combination = card.combination if criterion is None else {}
        self._pairs = _ByRelevance(card.members)
        self._by_source = defaultdict[str, _ByRelevance](partial(_ByRelevance, card.members))
        self._by_criterion = {name: _Pairs(card.members) for name in card.criteria}
        self._flagged = 0
        self._rewards = 0.0
        self._parts: defaultdict[str, float] = defaultdict(float)
        self._text_flags: Counter[str] = Counter()

    def add(self, row: Row) -> None:
        """A row of `actors.scoring.SCORES_SCHEMA`."""
        self.read.add(None if row["bad"] is None else BadRow(row["line"], row["bad"]))
        self.refused += row["refused"] is not None
        for reply in row["replies"]:
            self.replies += 1
            self._flagged += reply["domain_shift"]
            self._rewards += reply["reward"]
            self._text_flags.update(reply["text_flags"])
            for name, value in reply["parts"]:
                self._parts[name] += value
        if len(row["replies"]) == 2:
            chosen, rejected = (reply["rewards"] for reply in row["replies"])
            margins_K = list(map(sub, chosen, rejected))
            about = in_combination(row["criterion"], self._combination)
            for pairs in (self._pairs, self._by_source[row["source"]]):
                pairs.of[about].add(margins_K, row["label"], row["weight"])
            if row["own_margins"] is not None:
                own = self._by_criterion[row["criterion"]]
                own.add(row["own_margins"], row["label"], row["weight"])

    def figures(self) -> Row:
        """What `score --json` prints; at least one reply was scored."""
        temperature = self._card.temperature
        per_criterion = {
            name: pairs.figures(temperature[name]) for name, pairs in self._by_criterion.items()
        }
        return {
            **self._pairs.figures(temperature[self._criterion]),
            "criterion": self._criterion,
            "skipped": self.read.bad + self.refused,
            "members": self._card.members,
            "flagged_share": self._flagged / self.replies,
            "per_source": {
                source: pairs.figures(temperature[self._criterion])
                for source, pairs in sorted(self._by_source.items())
            },
            "per_criterion": {name: own for name, own in per_criterion.items() if own["pairs"]},
            "reward_version": self._card.version,
            "replies": self.replies,
            "reward_mean": self._rewards / self.replies,
            "parts_mean": {name: total / self.replies for name, total in self._parts.items()},
            "text_flags": {
                check.name: self._text_flags[check.name] / self.replies for check in TEXT_CHECKS
            },
        }


class _Pairs:
    """Pairs so far: 12 bytes each, and sums over the members."""

    def __init__(self, members: int) -> None:
        self._margins, self._labels, self._weights = array("f"), array("f"), array("f")
        self._right_K = [0.0] * members
        self._decided = 0.0

    def add(self, margins_K: Sequence[float], label: float, weight: float) -> None:
        self._margins.append(fmean(margins_K))
        self._labels.append(label)
        self._weights.append(weight)
        if label != 0.5:
            self._decided += weight
            for k, margin in enumerate(margins_K):
                right = 0.5 if margin == 0 else float((margin > 0) == (label > 0.5))
                self._right_K[k] += weight * right

    def figures(self, temperature: float) -> Row:
        if not self._margins:
            return {"pairs": 0, "accuracy": None, "ece": None, "member_accuracy": []}
        margins_N, labels_N, weights_N = (
            torch.frombuffer(values, dtype=torch.float32)
            for values in (self._margins, self._labels, self._weights)
        )
        figures = pair_figures(margins_N.unsqueeze(0), temperature, labels_N, weights_N)
        by_member = [right / self._decided for right in self._right_K] if self._decided else []
        return {**figures, "member_accuracy": by_member}


class _ByRelevance:
    """Pairs that the reward is about (`of[True]`), and others, which count where there are none."""

    def __init__(self, members: int) -> None:
        self.of = {about: _Pairs(members) for about in (True, False)}

    def figures(self, temperature: float) -> Row:
        about = self.of[True].figures(temperature)
        return about if about["pairs"] else self.of[False].figures(temperature)


class _Table:
    """Rows into a Parquet file that appears, whole, when the block ends without an error.

    It is written in a hidden folder beside, which a guard removes should this process be killed.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._folder = out.absolute().with_name(f".{out.name}.{os.getpid()}.part")
        self._writer: pq.ParquetWriter | None = None
        self._kinds: frozenset[int] = frozenset()
        self._pending: list[Row] = []

    def __enter__(self) -> _Table:
        self._guard = Guard(self._folder)
        try:
            with self._saying_what_failed():
                self._folder.mkdir()
        except DataError:
            self._guard.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                with self._saying_what_failed():
                    self._flush()
                    self._close()
                    self._path.replace(self._out)
        finally:
            self._guard.close()

    def add(self, rows: Iterable[Row]) -> None:
        """Rows of `actors.scoring.SCORES_SCHEMA`, their replies in columns of their own."""
        for row in rows:
            values: Row = {"line": row["line"], "source": row["source"]}
            for suffix, reply in zip(_SUFFIXES[len(row["replies"])], row["replies"], strict=True):
                values |= {f"{name}{suffix}": value for name, value in reply.items()}
            self._pending.append(values)
        if len(self._pending) >= ROW_GROUP:
            with self._saying_what_failed():
                self._flush()

    @property
    def _path(self) -> Path:
        return self._folder / f"{len(self._kinds)}.parquet"

    def _flush(self) -> None:
        if not self._pending:
            return
        kinds = self._kinds | {1 if "reward" in row else 2 for row in self._pending}
        if kinds != self._kinds:
            self._widen(kinds)
        assert self._writer is not None
        self._writer.write_table(pa.Table.from_pylist(self._pending, self._writer.schema))
        self._pending.clear()

    def _widen(self, kinds: frozenset[int]) -> None:
        """Go on in a new file that has the columns of these kinds of rows."""
        before = self._path
        self._close()
        self._kinds = kinds
        self._writer = pq.ParquetWriter(self._path, _schema(kinds))
        if before.exists():
            with pq.ParquetFile(before) as file:
                for batch in file.iter_batches(ROW_GROUP):
                    rows = batch.to_pylist()
                    self._writer.write_table(pa.Table.from_pylist(rows, self._writer.schema))

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    @contextmanager
    def _saying_what_failed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self._out} cannot be written: {error.strerror or error}") from None


def _schema(kinds: Iterable[int]) -> pa.Schema:
    """Columns of a file of rows with so many replies: only those that are used."""
    return pa.schema(
        [
            ("line", pa.int64()),
            ("source", pa.string()),
            *(
                (f"{name}{suffix}", type_)
                for kind in sorted(kinds)
                for suffix in _SUFFIXES[kind]
                for name, type_ in SCORE_FIELDS
            ),
        ]
    )
