"""Features are computed once, whoever asks, and what was kept before a kill is not lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import feature_store
from models.feature_store import FeatureStore, row_key
from models.trunk import Trunk

ROWS = [((5, 6, 7), (20 + n, 30, 40)) for n in range(5)] + [((8, 9), (20, 30, 40))]


class CountingTrunk(Trunk):
    """A trunk that counts the rows it computes, and may fail after some."""

    computed = 0
    fails_after = 10**9

    def features(self, rows, progress=lambda count: None):
        if self.computed >= self.fails_after:
            raise RuntimeError("killed")
        self.computed += len(rows)
        return super().features(rows, progress)


@pytest.fixture
def trunk(tiny_model: Path) -> CountingTrunk:
    return make(tiny_model)


def make(model: Path, depth: float = 1.0, dtype: str = "float32") -> CountingTrunk:
    return CountingTrunk(model, depth=depth, dtype=dtype, max_tokens=64, batch_tokens=512)


def test_kept_features_are_the_computed_ones_and_are_not_computed_again(tmp_path, trunk):
    wanted_ND = Trunk.features(trunk, ROWS)
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
    monkeypatch.setattr(feature_store, "_PASS_ROWS", 2)
    monkeypatch.setattr(feature_store, "_WRITE_EVERY_S", 0.0)
    trunk.fails_after = 4
    with pytest.raises(RuntimeError, match="killed"):
        FeatureStore(tmp_path, trunk).features(ROWS)
    trunk.computed, trunk.fails_after = 0, 10**9
    found_ND = FeatureStore(tmp_path, trunk).features(ROWS)
    assert trunk.computed == len(ROWS) - 4
    torch.testing.assert_close(found_ND, Trunk.features(trunk, ROWS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [{"depth": 0.5}, {"dtype": "bfloat16"}])
def test_another_trunk_has_a_store_of_its_own(tmp_path, tiny_model, trunk, change):
    FeatureStore(tmp_path, trunk).features(ROWS)
    other = make(tiny_model, **change)
    FeatureStore(tmp_path, other).features(ROWS)
    assert other.computed == len(ROWS)


def test_another_template_is_another_trunk(tiny_model, tiny_base_model):
    assert make(tiny_model).fingerprint == make(tiny_model).fingerprint
    assert make(tiny_model).fingerprint != make(tiny_base_model).fingerprint


def test_a_damaged_part_is_computed_again(tmp_path, trunk):
    store = FeatureStore(tmp_path, trunk)
    store.features(ROWS)
    [part] = store.folder.iterdir()
    part.write_bytes(part.read_bytes()[:100])
    found_ND = store.features(ROWS)
    assert trunk.computed == 2 * len(ROWS)
    torch.testing.assert_close(found_ND, Trunk.features(trunk, ROWS), atol=1e-5, rtol=1e-5)


def test_prompt_and_reply_are_told_apart():
    assert row_key(((1, 2), (3,))) != row_key(((1,), (2, 3)))
    assert row_key(((1, 2), (3,))) == row_key(([1, 2], [3]))


def test_no_rows_need_no_store(tmp_path, trunk):
    assert FeatureStore(tmp_path / "none", trunk).features([]).shape == (0, trunk.width)
    assert not (tmp_path / "none").exists()
