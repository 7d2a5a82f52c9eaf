"""What is settled before any member with layers of its own is trained."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.reward_member import MemberJob, PairRow, batches
from models.precision import resolve_dtype
from rlhf.config import EnsembleSection, TopMembers
from rlhf.errors import DataError, ResourceError
from tests.trainers.test_reward import pair
from trainers import reward as trainer
from trainers import reward_banks
from trainers.reward_banks import backbones, plan_banks
from trainers.reward_members import require_resources


def job(**settings: Any) -> MemberJob:
    return MemberJob(
        model="none",
        cut=1,
        end=2,
        settings=TopMembers.model_validate({"kind": "top", **settings}),
        criteria=1,
        pairs=(),
        member=0,
        seed=0,
        dtype="float32",
        max_tokens=64,
        out="nowhere",
    )


@pytest.mark.parametrize(
    ("settings", "nodes"),
    [
        ({"workers": 4, "cpus_per_worker": 2.0}, [{"CPU": 4.0}, {"CPU": 4.0}]),
        ({"workers": 3, "cpus_per_worker": 0.1}, [{"CPU": 0.3}]),
        ({"workers": 2, "gpus_per_worker": 0.5}, [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}]),
    ],
)
def test_workers_that_fit_on_the_nodes_are_let_go(settings, nodes):
    require_resources(job(**settings), nodes)


@pytest.mark.parametrize(
    ("settings", "nodes", "room"),
    [
        # Eight CPUs in all, and no node that has them.
        ({"workers": 1, "cpus_per_worker": 8.0}, [{"CPU": 4.0}, {"CPU": 4.0}], 0),
        # Each node holds one worker and wastes the rest.
        ({"workers": 3, "cpus_per_worker": 3.0}, [{"CPU": 5.0}, {"CPU": 5.0}], 2),
        # CPUs on one node, GPUs on another.
        ({"workers": 1, "gpus_per_worker": 1.0}, [{"CPU": 8.0}, {"GPU": 8.0}], 0),
    ],
)
def test_workers_that_no_placement_can_hold_are_refused(settings, nodes, room):
    with pytest.raises(ResourceError, match=f"the cluster has room for {room}$"):
        require_resources(job(**settings), nodes)


def test_a_criterion_without_a_held_out_pair_is_refused_before_training(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAVLOV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        trainer, "folds_by_first_user_turn", lambda pairs, folds, seed: [1] * len(pairs)
    )
    monkeypatch.setattr(trainer, "with_trained_members", lambda *rest: pytest.fail("trained"))
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair(n)) + "\n" for n in range(20)))
    pairs, _ = trainer.read_pairs([data])
    settings = EnsembleSection.model_validate(
        {"model": str(tiny_model), "max_tokens": 64, "members": [{"kind": "full", "count": 3}]}
    )
    with pytest.raises(DataError, match="no pair judged by 'overall' falls into the fold"):
        trainer.train_reward_model(settings, pairs, [], 0, trainer.Console(), tmp_path / ".own")


def test_other_processes_are_told_the_folder_and_the_precision_that_hold_here(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A relative name, from a folder that a worker does not stand in.
    monkeypatch.chdir(tiny_model.parent)
    monkeypatch.setattr(trainer, "cluster_address", lambda: "auto")
    settings = EnsembleSection.model_validate({"model": tiny_model.name, "max_tokens": 64})
    assert backbones(settings) == [str(tiny_model.resolve())]
    [bank] = plan_banks(settings)
    stream = trainer._stream(bank, settings, tmp_path, trainer.Console())
    told = stream.keywords["trunk"]  # type: ignore[union-attr]
    assert told["model"] == str(tiny_model.resolve())
    assert told["dtype"] == resolve_dtype("auto") != "auto"
    monkeypatch.setattr(trainer, "cluster_address", lambda: None)
    assert trainer._stream(bank, settings, tmp_path, trainer.Console()) is None


@pytest.mark.parametrize(
    ("gpu", "cluster", "device"),
    [(True, None, "cuda"), (True, "auto", "cpu"), (False, None, "cpu"), (False, "auto", "cpu")],
)
def test_the_trunk_takes_the_gpu_of_a_machine_that_is_no_cluster(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, cluster: str | None, device: str
) -> None:
    places: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(reward_banks, "cluster_address", lambda: cluster)
    monkeypatch.setattr(reward_banks, "trunk_of", lambda arguments, place: places.append(place))
    settings = EnsembleSection.model_validate({"model": str(tiny_model), "max_tokens": 64})
    plan_banks(settings)
    assert places == [device]


def test_a_member_goes_through_its_own_draw_of_the_live_pairs_in_a_new_order_every_epoch():
    pairs = tuple(
        PairRow((n,), (1,), (2,), label=1.0, weight=float(n % 5 > 0), margin=0.0, criterion=0)
        for n in range(50)
    )
    of_eight: Counter[int] = Counter()
    for member in range(8):
        own = replace(job(epochs=2, batch_pairs=10), pairs=pairs, member=member)
        made = batches(own)
        assert [len(batch) for batch in made] == [10] * 8
        seen = [pair.prompt[0] for batch in made for pair in batch]
        first, second = seen[:40], seen[40:]
        assert sorted(first) == sorted(second)
        assert first != second
        assert batches(own) == made
        of_eight.update(first)
    assert of_eight == {n: 8 for n in range(50) if n % 5}
