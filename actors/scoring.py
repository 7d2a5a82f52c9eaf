"""The scoring actor: rows of a file in, what a reward model says of them out, as Arrow tables.

Ray Data feeds it (`cluster.streaming`). A table is what crosses between the process that reads the
file, the actors that score and the driver that writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from actors.gauges import in_ray_actor
from cluster.guard import Guard
from models.data_files import BadRow
from models.preferences import iter_scoring_rows
from models.row_forms import SingleCompletion
from rlhf.errors import ModelError
from rlhf.records import Message, PreferencePair
from rlhf.tables import MESSAGES, SCORE_FIELDS
from rlhf.text_checks import text_flags

if TYPE_CHECKING:
    from models.reward_model import RewardModel

READ_ROWS = 32
"""Rows of a table as it is read: small, so that Ray Data can cut its blocks anywhere."""

ROWS_SCHEMA = pa.schema(
    [
        ("line", pa.int64()),
        ("bad", pa.string()),
        ("source", pa.string()),
        ("criterion", pa.string()),
        ("label", pa.float64()),
        ("weight", pa.float64()),
        ("prompt", MESSAGES),
        ("replies", pa.list_(pa.struct([("text", pa.string()), ("finished", pa.bool_())]))),
    ]
)
"""Rows to score: a pair has two replies, chosen first. `bad` is why a row was left out."""

SCORES_SCHEMA = pa.schema(
    [
        *(ROWS_SCHEMA.field(name) for name in ("line", "bad", "source", "criterion")),
        *(ROWS_SCHEMA.field(name) for name in ("label", "weight")),
        ("refused", pa.string()),
        ("replies", pa.list_(pa.struct(SCORE_FIELDS))),
        ("own_margins", pa.list_(pa.float32())),
    ]
)
"""A row each, in their order. `refused` is why it cannot be tokenised; `own_margins` are a pair's
by every member's head for the pair's own criterion, where the model has such heads."""


def read_tables(path: Path) -> Iterator[pa.Table]:
    """The rows of a data file as tables with `ROWS_SCHEMA`.

    Raises:
        DataError: the file cannot be read.
    """
    rows = (_as_row(line, row) for line, row in iter_scoring_rows(path))
    while part := list(islice(rows, READ_ROWS)):
        yield pa.Table.from_pylist(part, schema=ROWS_SCHEMA)


class ScoringActor:
    """One reward model over a stream of rows.

    Args:
        model: a reward-model folder.
        criterion: whose heads give `rewards` and `reward`; None for the stated combination. All
            other figures are of the combination in any case: the thresholds belong to it.
        gpus: of this actor.
    """

    def __init__(self, model: str, criterion: str | None = None, gpus: float = 0) -> None:
        self._guard = Guard(with_parent=in_ray_actor())
        self._folder = Path(model)
        self._criterion = criterion
        self._device = "cuda" if gpus else "cpu"

    # Loaded by the first batch: Ray keeps the kind of an error in a call, not in a constructor.
    @cached_property
    def _model(self) -> RewardModel:
        from models.reward_model import RewardModel

        model = RewardModel.load(self._folder)
        model.trunks(self._device)
        return model

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Scores (`SCORES_SCHEMA`) of rows (`ROWS_SCHEMA`).

        Raises:
            ModelError: the reward model does not fit its backbones, or lacks the criterion.
        """
        model = self._model
        given = rows.to_pylist()
        tokenised: list[Any] = []
        for row in given:
            row["texts"], row["replies"] = row["replies"], []
            if row["bad"] is not None:
                continue
            messages = [Message(**turn) for turn in row["prompt"]]
            try:
                tokenised += [
                    model.tokenise((messages, text["text"], text["finished"]))
                    for text in row["texts"]
                ]
            except ModelError as error:
                row["refused"] = str(error)
        if tokenised:
            self._score(model, given, tokenised)
        return pa.Table.from_pylist(given, schema=SCORES_SCHEMA)

    def _score(self, model: RewardModel, rows: list[dict[str, Any]], tokenised: list[Any]) -> None:
        """Fill in `replies` and `own_margins`."""
        from rlhf.ensemble import aggregate

        scores = model.score_features(model.features(tokenised))
        criteria_KCN = scores.criteria_KCN
        rewards_KN = scores.rewards_KN
        if self._criterion is not None:
            rewards_KN = criteria_KCN[:, model.criterion(self._criterion)]
        rewards_N = aggregate(rewards_KN)
        parts_CN = criteria_KCN.mean(dim=0)
        end = 0
        for row in rows:
            if row["bad"] is not None or row.get("refused") is not None:
                continue
            begin, end = end, end + len(row["texts"])
            row["replies"] = [
                {
                    "rewards": rewards_KN[:, n].tolist(),
                    "reward": float(rewards_N[n]),
                    "parts": list(zip(model.card.criteria, parts_CN[:, n].tolist(), strict=True)),
                    "disagreement": float(scores.disagreement_N[n]),
                    "distance": float(scores.distance_N[n]),
                    "shift": float(scores.shift_N[n]),
                    "domain_shift": bool(scores.shifted_N[n]),
                    "text_flags": text_flags(text["text"]),
                }
                for n, text in enumerate(row["texts"], start=begin)
            ]
            asked = row["criterion"]
            if len(row["texts"]) == 2 and asked in model.card.criteria:
                own_KN = criteria_KCN[:, model.criterion(asked), begin:end]
                row["own_margins"] = (own_KN[:, 0] - own_KN[:, 1]).tolist()


def _as_row(line: int, row: PreferencePair | SingleCompletion | BadRow) -> dict[str, Any]:
    if isinstance(row, BadRow):
        return {"line": line, "bad": row.reason}
    shared = {
        "line": line,
        "source": row.source,
        "prompt": [{"role": turn.role, "content": turn.content} for turn in row.prompt],
    }
    if isinstance(row, SingleCompletion):
        return {**shared, "replies": [{"text": row.completion, "finished": row.finished}]}
    return {
        **shared,
        "criterion": row.judged_by,
        "label": row.label,
        "weight": row.weight,
        "replies": [
            {"text": row.chosen, "finished": row.chosen_finished},
            {"text": row.rejected, "finished": row.rejected_finished},
        ],
    }
