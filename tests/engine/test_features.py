"""The trunk's pass through Ray Data gives what the trunk gives here, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.features import stream_features
from cluster.session import ray_session
from models.feature_store import FeatureStore
from models.reward_model import FamilyCard, OwnLayersCard, trunk_of
from models.top_layers import TopLayers, write_layers
from rlhf.errors import ModelError
from rlhf.records import Message

pytestmark = pytest.mark.engine


def test_features_of_a_cluster_are_those_of_this_process_and_are_kept(
    tmp_path: Path, tiny_model: Path
):
    layers = TopLayers(tiny_model, 1, 2, "float32")
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.mul_(1.5)
    name = write_layers(layers.state_dict(), tmp_path / "own")
    families = [
        FamilyCard(layers=1, pooling="mean"),
        FamilyCard(layers=1, pooling="last", own=OwnLayersCard(name=name, end=2)),
    ]
    arguments = {
        "model": str(tiny_model),
        "families": [family.model_dump() for family in families],
        "own": str(tmp_path / "own"),
        "dtype": "float32",
        "max_tokens": 64,
        "batch_tokens": 512,
    }
    trunk = trunk_of(arguments)
    rows = [
        trunk.tokenise(
            (Message("user", f"What about number {n // 2}?"),), "Stir it. " * (1 + n % 7)
        )
        for n in range(100)
    ]
    frozen = {**arguments, "families": arguments["families"][:1]}
    calls = 0

    def compute(rows):
        nonlocal calls
        calls += 1
        return stream_features(rows, frozen, 1)

    store, said = FeatureStore(tmp_path / "kept", trunk_of(frozen)), []
    with ray_session("features", num_cpus=2):
        kept_NFH = store.features(rows, said.append, compute)
        streamed = list(stream_features(rows, arguments, 2))
        # The actor's own words, not Ray's.
        missing = {**arguments, "own": str(tmp_path / "nowhere")}
        with pytest.raises(ModelError, match="own layers are missing or damaged"):
            list(stream_features(rows, missing, 2))
    found_NFH = torch.cat([part_nFH for _, part_nFH in streamed])
    assert [n for indices, _ in streamed for n in indices] == list(range(100))
    wanted_NFH = trunk.features(rows)
    torch.testing.assert_close(found_NFH, wanted_NFH, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept_NFH, wanted_NFH[:, :1], atol=1e-5, rtol=1e-5)
    assert sum(said) == 100
    # All are kept: nobody is asked again.
    assert torch.equal(store.features(rows, compute=compute), kept_NFH)
    assert calls == 1
