"""Features are computed once, whoever asks, and what was kept before a kill is not lost."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from models import feature_store
from models.feature_store import FeatureStore, row_key
from models.top_layers import TopLayers
from models.trunk import Family, Trunk
from rlhf.errors import DataError

DEEP = (Family(2, "last"), Family(2, "mean"))
ROWS = [((5, 6, 7), (20 + n, 30, 40)) for n in range(5)] + [((8, 9), (20, 30, 40))]


class CountingTrunk(Trunk):
    """A trunk that counts the rows it computes, and may fail after some."""

    computed = 0
    fails_after = 10**9

    def stream(self, rows):
        for indices, part_nFH in super().stream(rows):
            if self.computed >= self.fails_after:
                raise RuntimeError("killed")
            self.computed += len(indices)
            yield indices, part_nFH


@pytest.fixture
def trunk(tiny_model: Path) -> CountingTrunk:
    return make(tiny_model)


def make(model: Path, families: tuple[Family, ...] = DEEP, dtype: str = "float32") -> CountingTrunk:
    return CountingTrunk(model, families, dtype=dtype, max_tokens=64, batch_tokens=8)


def plain(trunk: Trunk, rows: list[Any]) -> Tensor:
    """The features without a store, not counted."""
    counted = trunk.computed  # type: ignore[attr-defined]
    features_NFH = trunk.features(rows)
    trunk.computed = counted  # type: ignore[attr-defined]
    return features_NFH


def test_kept_features_are_the_computed_ones_and_are_not_computed_again(tmp_path, trunk):
    wanted_ND = plain(trunk, ROWS)
    first_ND = FeatureStore(tmp_path, trunk).features(ROWS)
    assert trunk.computed == len(ROWS)
    counts: list[int] = []
    again_ND = FeatureStore(tmp_path, trunk).features(ROWS[::-1], counts.append)
    assert trunk.computed == len(ROWS)
    assert sum(counts) == len(ROWS)
    torch.testing.assert_close(first_ND, wanted_ND, atol=1e-5, rtol=1e-5)
    assert torch.equal(again_ND, first_ND.flip(0))


def test_a_row_that_comes_twice_is_computed_once_and_counted_twice(tmp_path, trunk):
    counts: list[int] = []
    found_ND = FeatureStore(tmp_path, trunk).features([ROWS[0], ROWS[1], ROWS[0]], counts.append)
    assert trunk.computed == 2
    assert sum(counts) == 3
    assert torch.equal(found_ND[0], found_ND[2])


def test_after_a_kill_only_what_was_not_kept_is_computed(tmp_path, trunk, monkeypatch):
    monkeypatch.setattr(feature_store, "_WRITE_EVERY_S", 0.0)
    trunk.fails_after = 3
    with pytest.raises(RuntimeError, match="killed"):
        FeatureStore(tmp_path, trunk).features(ROWS)
    kept, trunk.computed, trunk.fails_after = trunk.computed, 0, 10**9
    assert 3 <= kept < len(ROWS)
    found_ND = FeatureStore(tmp_path, trunk).features(ROWS)
    assert trunk.computed == len(ROWS) - kept
    torch.testing.assert_close(found_ND, plain(trunk, ROWS), atol=1e-5, rtol=1e-5)


def test_a_kill_in_the_middle_of_writing_leaves_nothing_that_is_read(tmp_path, trunk, monkeypatch):
    write = feature_store.pq.write_table

    def killed(table: Any, path: Path) -> None:
        write(table, path)
        path.write_bytes(path.read_bytes()[:-50])
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_store.pq, "write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        FeatureStore(tmp_path, trunk).features(ROWS)
    monkeypatch.undo()
    assert not list(FeatureStore(tmp_path, trunk).folder.glob("*.parquet"))
    found_ND = FeatureStore(tmp_path, trunk).features(ROWS)
    assert trunk.computed == 2 * len(ROWS)
    torch.testing.assert_close(found_ND, plain(trunk, ROWS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change", [{"dtype": "bfloat16"}, {"families": (Family(1, "last"), Family(2, "last"))}]
)
def test_what_another_precision_or_family_needs_is_computed(tmp_path, tiny_model, trunk, change):
    FeatureStore(tmp_path, trunk).features(ROWS)
    other = make(tiny_model, **change)
    found_NFH = FeatureStore(tmp_path, other).features(ROWS)
    assert other.computed == len(ROWS)
    torch.testing.assert_close(found_NFH, plain(other, ROWS), atol=1e-2, rtol=1e-2)


def test_a_family_that_was_kept_with_others_is_not_computed_again(tmp_path, tiny_model, trunk):
    wanted_NFH = FeatureStore(tmp_path, trunk).features(ROWS)
    fewer = make(tiny_model, families=(Family(2, "mean"),))
    found_NFH = FeatureStore(tmp_path, fewer).features(ROWS)
    assert fewer.computed == 0
    assert torch.equal(found_NFH[:, 0], wanted_NFH[:, 1])


def test_what_was_computed_anew_for_another_family_is_kept_beside_the_first(
    tmp_path, tiny_model, trunk
):
    mixed = (Family(2, "mean"), Family(1, "last"))
    first_NFH = FeatureStore(tmp_path, trunk).features(ROWS)
    mixed_NFH = FeatureStore(tmp_path, make(tiny_model, mixed)).features(ROWS)
    for families, wanted_NFH in ((DEEP, first_NFH), (mixed, mixed_NFH)):
        again = make(tiny_model, families)
        assert torch.equal(FeatureStore(tmp_path, again).features(ROWS), wanted_NFH)
        assert again.computed == 0


def test_families_are_found_by_name_in_whatever_order_they_are_asked_for(
    tmp_path, tiny_model, trunk
):
    wanted_NFH = FeatureStore(tmp_path, trunk).features(ROWS)
    turned = make(tiny_model, DEEP[::-1])
    assert torch.equal(FeatureStore(tmp_path, turned).features(ROWS), wanted_NFH.flip(1))
    assert turned.computed == 0


def test_another_template_is_another_trunk(tiny_model, tiny_base_model):
    assert make(tiny_model).fingerprint == make(tiny_model).fingerprint
    assert make(tiny_model).fingerprint != make(tiny_base_model).fingerprint


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:100],
        lambda content: b"",
        # The first page's header, which Arrow tells of by an OSError.
        lambda content: content[:4] + b"\xff" * 60 + content[64:],
    ],
    ids=["cut short", "empty", "overwritten"],
)
def test_a_damaged_part_is_computed_again(tmp_path, trunk, damage):
    store = FeatureStore(tmp_path, trunk)
    store.features(ROWS)
    [part] = store.folder.iterdir()
    part.write_bytes(damage(part.read_bytes()))
    found_ND = store.features(ROWS)
    assert trunk.computed == 2 * len(ROWS)
    torch.testing.assert_close(found_ND, plain(trunk, ROWS), atol=1e-5, rtol=1e-5)
    assert part not in store.folder.iterdir()


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.EMFILE, "Too many open files"), DataError),
        (OSError(errno.EIO, "Input/output error"), DataError),
        (pa.ArrowMemoryError("malloc of size 64 failed"), MemoryError),
    ],
)
def test_what_the_system_cannot_read_now_stays_where_it_is(
    tmp_path, trunk, monkeypatch, failure, raised
):
    store = FeatureStore(tmp_path, trunk)
    store.features(ROWS)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise failure

    for reader in ("read_schema", "read_table"):
        with monkeypatch.context() as patch:
            patch.setattr(feature_store.pq, reader, fails)
            with pytest.raises(raised):
                store.features(ROWS)
    store.features(ROWS)
    assert trunk.computed == len(ROWS)


def test_a_part_that_another_process_took_away_is_computed_again(tmp_path, trunk, monkeypatch):
    store = FeatureStore(tmp_path, trunk)
    store.features(ROWS)
    [part] = store.folder.iterdir()
    read_schema = feature_store.pq.read_schema

    def too_late(path: Path) -> Any:
        part.unlink()
        return read_schema(path)

    monkeypatch.setattr(feature_store.pq, "read_schema", too_late)
    store.features(ROWS)
    assert trunk.computed == 2 * len(ROWS)


def test_prompt_and_reply_are_told_apart():
    assert row_key(((1, 2), (3,))) != row_key(((1,), (2, 3)))
    assert row_key(((1, 2), (3,))) == row_key(([1, 2], [3]))


def test_no_rows_need_no_store(tmp_path, trunk):
    assert FeatureStore(tmp_path / "none", trunk).features([]).shape == (0, 2, trunk.width)
    assert not (tmp_path / "none").exists()


def test_what_trained_layers_make_is_computed_anew_and_what_is_frozen_beside_it_is_kept(
    tmp_path, tiny_model, trunk
):
    families = (*DEEP, Family(1, "last", "a"))
    mixed = CountingTrunk(
        tiny_model,
        families,
        dtype="float32",
        max_tokens=64,
        batch_tokens=8,
        own={"a": TopLayers(tiny_model, 1, 2, "float32")},
    )
    store = FeatureStore(tmp_path, mixed)
    first_NFH = store.features(ROWS)
    for path in store.folder.glob("*.parquet"):
        assert pq.read_schema(path).names == ["key", *map(str, DEEP)]
    files = len(list(store.folder.iterdir()))
    torch.testing.assert_close(store.features(ROWS), first_NFH)
    assert mixed.computed == 2 * len(ROWS)
    assert len(list(store.folder.iterdir())) == files
    # Probes alone find what the mixed ensemble's pass left.
    FeatureStore(tmp_path, trunk).features(ROWS)
    assert trunk.computed == 0


def test_of_kept_features_only_those_that_are_wanted_are_held(tmp_path, trunk):
    store = FeatureStore(tmp_path, trunk)
    store.features(ROWS[:4])
    store.features(ROWS[4:])
    held = store._read({row_key(row) for row in (ROWS[1], ROWS[5])})
    wanted = {row_key(row): plain(trunk, [row])[0] for row in (ROWS[1], ROWS[5])}
    assert held.keys() == wanted.keys()
    for key, row_FH in held.items():
        torch.testing.assert_close(row_FH, wanted[key], atol=1e-5, rtol=1e-5)
        assert row_FH.untyped_storage().nbytes() == row_FH.numel() * row_FH.element_size()
