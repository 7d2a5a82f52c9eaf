"""Features of a frozen trunk, computed once and kept: a killed pass goes on, a second one is free.

A store is a folder of Parquet parts, one folder for each trunk (backbone, tokenizer, template,
precision), with a column for each feature family of the frozen layers. A row is found by the hash
of its tokens, so it does not matter which file, run or ensemble asked for it first. Parts are
written beside and renamed, and never changed: processes that write at the same time at worst
compute a row twice.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from models.trunk import TokenRow, Trunk
from rlhf.errors import DataError

_WRITE_EVERY_S = 20.0

Compute = Callable[[Sequence[TokenRow]], Iterable[tuple[Sequence[int], Tensor]]]
"""Features of rows as they come: which rows, and theirs (n, F, H)."""


class FeatureStore:
    """The features of one trunk's rows.

    Args:
        folder: where stores stand; the trunk gets a folder of its own in it.
    """

    def __init__(self, folder: Path, trunk: Trunk) -> None:
        self._trunk = trunk
        self._frozen = tuple(family for family in trunk.families if not family.own)
        self.folder = folder / trunk.fingerprint

    def features(
        self,
        rows: Sequence[TokenRow],
        progress: Callable[[int], None] = lambda count: None,
        compute: Compute | None = None,
    ) -> Tensor:
        """As `Trunk.features`: float32, shape (N, F, H); known rows are read, new ones computed,
        by the trunk itself unless `compute` does what its `stream` does elsewhere.

        Raises:
            DataError: the system cannot read what is kept, now or at all.
        """
        keys = [row_key(row) for row in rows]
        kept = self._read(set(keys))
        # What trained layers make is another thing after every training: it is not kept.
        known = dict(kept) if self._frozen == self._trunk.families else {}
        missing: dict[str, int] = {}
        for index, key in enumerate(keys):
            if key not in known:
                missing.setdefault(key, index)
        progress(len(rows) - len(missing))
        # In the order given: neighbours share a prompt, and so a pass.
        todo = list(missing)
        pending: dict[str, Tensor] = {}
        written = time.monotonic()
        compute = compute or self._trunk.stream
        computed = compute([rows[index] for index in missing.values()]) if missing else ()
        for indices, part_nFH in computed:
            pending |= {todo[i]: row for i, row in zip(indices, part_nFH, strict=True)}
            progress(len(indices))
            if time.monotonic() - written > _WRITE_EVERY_S:
                self._write(pending, kept)
                known |= pending
                pending, written = {}, time.monotonic()
        self._write(pending, kept)
        known |= pending
        if not rows:
            return torch.empty(0, len(self._trunk.families), self._trunk.width)
        return torch.stack([known[key] for key in keys])

    def _read(self, wanted: set[str]) -> dict[str, Tensor]:
        families = [str(family) for family in self._frozen]
        if not families:
            return {}
        found: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                if not set(families) <= set(pq.read_schema(path).names):
                    continue
                keys = pq.read_table(path, columns=["key"])["key"].to_pylist()
                places = [place for place, key in enumerate(keys) if key in wanted]
                if not places:
                    continue
                # No others are kept: what a caller holds is a view of all that were read.
                table = pq.read_table(path, columns=families).take(places)
                keys = [keys[place] for place in places]
                features_NFH = torch.stack(
                    [
                        torch.from_numpy(flat.reshape(len(keys), self._trunk.width).copy())
                        for flat in (
                            table[family].combine_chunks().flatten().to_numpy()
                            for family in families
                        )
                    ],
                    dim=1,
                )
            except FileNotFoundError:
                # Another process found it damaged.
                continue
            except (OSError, ValueError, KeyError, pa.ArrowNotImplementedError) as error:
                # A number is the system's, which may read the part the next time; of damage Arrow
                # tells without one.
                if isinstance(error, OSError) and error.errno is not None:
                    raise DataError(
                        f"kept features cannot be read: {error.strerror}; try again, or delete "
                        f"{path} to have them computed again"
                    ) from None
                # What is damaged is computed again.
                path.unlink(missing_ok=True)
                continue
            found |= dict(zip(keys, features_NFH, strict=True))
        return found

    def _write(self, rows: Mapping[str, Tensor], kept: Container[str]) -> None:
        new = {key: row for key, row in rows.items() if key not in kept}
        if not new or not self._frozen:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        features_NFH = torch.stack(list(new.values()))
        columns = {
            str(family): pa.FixedSizeListArray.from_arrays(
                pa.array(features_NFH[:, index].numpy().reshape(-1)), self._trunk.width
            )
            for index, family in enumerate(self._trunk.families)
            if family in self._frozen
        }
        path = self.folder / f"{uuid4().hex}.parquet"
        beside = path.with_suffix(".part")
        pq.write_table(pa.table({"key": list(new)} | columns), beside)
        beside.rename(path)


def row_key(row: TokenRow) -> str:
    """Hash of a row's tokens, prompt and reply apart."""
    digest = hashlib.sha256()
    for tokens in row:
        digest.update(np.asarray(tokens, dtype=np.int64).tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:32]
