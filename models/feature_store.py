"""Features of a frozen trunk, computed once and kept: a killed pass goes on, a second one is free.

A store is a folder of Parquet parts, one for each trunk (backbone, tokenizer, template, layers,
precision). A row is found by the hash of its tokens, so it does not matter which file, run or
ensemble asked for it first. Parts are written beside and renamed, and never changed: processes
that write at the same time at worst compute a row twice.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from models.packing import TokenIds
from models.trunk import Trunk

TokenRow = tuple[TokenIds, TokenIds]

_PASS_ROWS = 64
"""Rows handed to the trunk at a time: long enough to sort them by length, short enough to keep."""
_WRITE_EVERY_S = 20.0


class FeatureStore:
    """The features of one trunk's rows.

    Args:
        folder: where stores stand; the trunk gets a folder of its own in it.
    """

    def __init__(self, folder: Path, trunk: Trunk) -> None:
        self._trunk = trunk
        self.folder = folder / trunk.fingerprint

    def features(
        self, rows: Sequence[TokenRow], progress: Callable[[int], None] = lambda count: None
    ) -> Tensor:
        """As `Trunk.features`: float32, shape (N, D); known rows are read, new ones computed."""
        keys = [row_key(row) for row in rows]
        known = self._read(set(keys))
        features_ND = torch.empty(len(rows), self._trunk.width)
        missing: dict[str, int] = {}
        for index, key in enumerate(keys):
            if key in known:
                features_ND[index] = known[key]
            else:
                missing.setdefault(key, index)
        progress(len(rows) - len(missing))
        # In the order given: neighbours share a prompt, and so a pass.
        todo = list(missing.items())
        pending: list[tuple[str, Tensor]] = []
        written = time.monotonic()
        for begin in range(0, len(todo), _PASS_ROWS):
            part = todo[begin : begin + _PASS_ROWS]
            computed_ND = self._trunk.features([rows[index] for _, index in part], progress)
            pending += zip((key for key, _ in part), computed_ND, strict=True)
            last = begin + _PASS_ROWS >= len(todo)
            if last or time.monotonic() - written > _WRITE_EVERY_S:
                self._write(pending)
                known |= dict(pending)
                pending, written = [], time.monotonic()
        for index, key in enumerate(keys):
            features_ND[index] = known[key]
        return features_ND

    def _read(self, wanted: set[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                table = pq.read_table(path)
                keys = table["key"].to_pylist()
                flat = table["features"].combine_chunks().flatten().to_numpy()
                features_ND = torch.from_numpy(flat.reshape(len(keys), self._trunk.width).copy())
            except (pa.ArrowException, OSError, KeyError, ValueError):
                # What cannot be read is computed again.
                path.unlink(missing_ok=True)
                continue
            found |= {key: row for key, row in zip(keys, features_ND, strict=True) if key in wanted}
        return found

    def _write(self, rows: Sequence[tuple[str, Tensor]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        flat: np.ndarray = torch.stack([features_D for _, features_D in rows]).numpy().reshape(-1)
        table = pa.table(
            {
                "key": [key for key, _ in rows],
                "features": pa.FixedSizeListArray.from_arrays(pa.array(flat), self._trunk.width),
            }
        )
        path = self.folder / f"{uuid4().hex}.parquet"
        beside = path.with_suffix(".part")
        pq.write_table(table, beside)
        beside.rename(path)


def row_key(row: TokenRow) -> str:
    """Hash of a row's tokens, prompt and reply apart."""
    digest = hashlib.sha256()
    for tokens in row:
        digest.update(np.asarray(tokens, dtype=np.int64).tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:32]
