"""Memory is asked for before anything starts."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cluster.capacity import require_memory, rl_memory_gib, sft_memory_gib
from rlhf.config import RLConfig, SFTConfig, parse_config
from rlhf.errors import ModelError, ResourceError

GIB = 2**30


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def free_gib(monkeypatch: pytest.MonkeyPatch):
    def pretend(gib: float) -> None:
        memory = SimpleNamespace(available=gib * GIB, total=64 * GIB)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    return pretend


def config(**sections: object) -> RLConfig:
    plain = {"dtype": "float32"}
    values = {
        "reward": {"model": "r"},
        "data": {"prompts": ["p"]},
        "policy": plain,
        "reference": plain,
        "rollout": plain,
    }
    return parse_config(RLConfig, {**values, **sections}, "test")


def model_of(folder: Path, parameters: int) -> Path:
    """A model folder with so many parameters that takes no disk: the file has a hole."""
    import json

    folder.mkdir()
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [parameters], "data_offsets": [0, 4 * parameters]}}
    ).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * parameters)
    return folder


def test_a_run_that_does_not_fit_is_refused_with_both_numbers(tiny_model, free_gib):
    wanted = rl_memory_gib(tiny_model, tiny_model, config())
    free_gib(2.5)
    with pytest.raises(ResourceError) as caught:
        require_memory(rl_memory_gib(tiny_model, tiny_model, config()), config().cluster)
    numbers = re.findall(r"\d+\.\d", str(caught.value))
    assert numbers == [f"{wanted:.1f}", "2.5"]
    assert "rollout.kv_cache_gib" in str(caught.value)


def test_a_run_that_fits_is_accepted(tiny_model, free_gib):
    wanted = rl_memory_gib(tiny_model, tiny_model, config())
    free_gib(wanted + 0.01)
    require_memory(rl_memory_gib(tiny_model, tiny_model, config()), config().cluster)
    free_gib(wanted - 0.01)
    with pytest.raises(ResourceError):
        require_memory(rl_memory_gib(tiny_model, tiny_model, config()), config().cluster)


def test_the_estimate_counts_weights_optimiser_cache_and_processes(tmp_path, tiny_model):
    quarter = GIB // 4  # parameters: 1 GiB of float32
    big = model_of(tmp_path / "big", quarter)
    small = rl_memory_gib(tiny_model, tiny_model, config())
    # An engine 1, the learner 16 / 4 and a copy on the wire 1, reference and reward trunk 1 each.
    assert rl_memory_gib(big, big, config()) - small == pytest.approx(8, abs=0.05)
    # A small reference instead saves 1, bfloat16 in the engine a half twice.
    assert rl_memory_gib(big, tiny_model, config()) - small == pytest.approx(7, abs=0.05)
    half = config(rollout={"dtype": "bfloat16"})
    assert rl_memory_gib(big, big, half) - small == pytest.approx(7, abs=0.05)
    more_cache = config(rollout={"dtype": "float32", "kv_cache_gib": 3.0})
    assert rl_memory_gib(tiny_model, tiny_model, more_cache) - small == pytest.approx(2, abs=0.01)
    engines = config(cluster={"rollout": {"actors": 2}})
    assert rl_memory_gib(big, big, engines) - rl_memory_gib(big, big, config()) > 2


def test_trainings_side_by_side_share_an_engine_and_an_ensemble(tmp_path, tiny_model):
    big = model_of(tmp_path / "big", GIB // 4)

    def sft(**policy: object) -> SFTConfig:
        values = {
            "reward": {"model": "r"},
            "data": {"conversations": ["c"]},
            "answers": {"prompts": ["p"]},
            "policy": {"dtype": "float32", **policy},
            "rollout": {"dtype": "float32"},
        }
        return parse_config(SFTConfig, values, "test")

    def weights(config: SFTConfig, concurrent: int) -> float:
        return sft_memory_gib(big, config, concurrent=concurrent) - sft_memory_gib(
            tiny_model, config, concurrent=concurrent
        )

    # An engine and a reward trunk 1 each, a learner 16 / 4 and a copy on the wire 1.
    assert weights(sft(), 1) == pytest.approx(7, abs=0.05)
    assert weights(sft(), 3) == pytest.approx(17, abs=0.05)
    assert weights(sft(lora={}), 1) == pytest.approx(3, abs=0.05)


def test_elsewhere_ray_places_by_resources(tiny_model, free_gib, monkeypatch):
    free_gib(0.1)
    on_gpus = config(cluster={"rollout": {"gpus": 1}, "learner": {"gpus": 1}})
    require_memory(rl_memory_gib(tiny_model, tiny_model, on_gpus), on_gpus.cluster)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    require_memory(rl_memory_gib(tiny_model, tiny_model, config()), config().cluster)


def test_a_containers_limit_counts_where_it_is_lower(tmp_path, monkeypatch):
    from cluster import memory

    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "_CGROUP_V2", (limit, used))
    monkeypatch.setattr(memory, "_CGROUP_V1", (tmp_path / "none", tmp_path / "none"))
    whole = memory.free_memory()
    limit.write_text("max\n")
    used.write_text("1000\n")
    assert memory.free_memory() == pytest.approx(whole, rel=0.2)
    limit.write_text("5000\n")
    assert memory.free_memory() == 4000
    used.write_text("6000\n")
    assert memory.free_memory() == 0


@pytest.mark.parametrize(
    ("stat", "free"),
    [
        ("anon 3000\nshmem 500\ninactive_file 700\nactive_file 300\n", 2000),
        ("active_file 1\ninactive_file 1\ntotal_inactive_file 700\ntotal_active_file 300\n", 2000),
        ("inactive_file 9000\nactive_file 0\n", 5000),
        ("inactive_file 700\n", 1000),
        ("inactive_file many\nactive_file 300\n", 1000),
        ("of another kernel\n", 1000),
        (None, 1000),
    ],
)
def test_files_that_a_container_has_read_count_as_free(tmp_path, monkeypatch, stat, free):
    from cluster import memory

    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text("5000\n")
    used.write_text("4000\n")
    if stat is not None:
        (tmp_path / "memory.stat").write_text(stat)
    monkeypatch.setattr(memory, "_CGROUP_V2", (tmp_path / "none", tmp_path / "none"))
    monkeypatch.setattr(memory, "_CGROUP_V1", (limit, used))
    assert memory.free_memory() == free


def test_damaged_weights_are_named(tmp_path):
    folder = model_of(tmp_path / "model", 10)
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        rl_memory_gib(folder, folder, config())
