"""The actor that runs a frozen trunk over a stream of rows: tokens in, features out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from actors.gauges import in_ray_actor
from cluster.guard import Guard
from cluster.streaming import stream_through_actors
from models.trunk import TokenRow

if TYPE_CHECKING:
    from models.trunk import Trunk

_READ_ROWS = 32
_SCHEMA = pa.schema([("prompt", pa.list_(pa.int32())), ("reply", pa.list_(pa.int32()))])


class FeatureActor:
    """One trunk over a stream of tokenised rows.

    Args:
        trunk: what `models.reward_model.trunk_of` takes.
        gpus: of this actor.
    """

    def __init__(self, trunk: Mapping[str, Any], gpus: float = 0) -> None:
        self._guard = Guard(with_parent=in_ray_actor())
        self._arguments = trunk
        self._device = "cuda" if gpus else "cpu"

    # Loaded by the first batch: Ray keeps the kind of an error in a call, not in a constructor.
    @cached_property
    def _trunk(self) -> Trunk:
        from models.reward_model import trunk_of

        return trunk_of(self._arguments, self._device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """``features``, flat lists of F x H float32, of rows with ``prompt`` and ``reply``."""
        given = list(zip(rows["prompt"].to_pylist(), rows["reply"].to_pylist(), strict=True))
        features_NFH = self._trunk.features(given)
        flat = pa.array(features_NFH.reshape(-1).numpy())
        width = features_NFH[0].numel()
        return pa.table({"features": pa.FixedSizeListArray.from_arrays(flat, width)})


def stream_features(
    rows: Sequence[TokenRow],
    trunk: Mapping[str, Any],
    families: int,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """As `Trunk.stream`, by the actors of the cluster that this process has joined.

    Raises:
        PavlovError: as `cluster.streaming.stream_through_actors` does.
    """
    tables = stream_through_actors(
        partial(_tables, rows),
        FeatureActor,
        {"trunk": trunk},
        use_gpus=torch.version.cuda is not None,
        say=say,
    )
    done = 0
    with closing(tables):
        for table in tables:
            flat = table["features"].combine_chunks().flatten().to_numpy()
            features_NFH = torch.from_numpy(np.array(flat)).reshape(len(table), families, -1)
            yield range(done, done + len(table)), features_NFH
            done += len(table)


def _tables(rows: Sequence[TokenRow]) -> Iterator[pa.Table]:
    for at in range(0, len(rows), _READ_ROWS):
        prompts, replies = zip(*rows[at : at + _READ_ROWS], strict=True)
        columns = [list(map(list, prompts)), list(map(list, replies))]
        yield pa.table(columns, schema=_SCHEMA)
