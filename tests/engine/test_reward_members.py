"""`pavlov reward` with members that train layers of their own, by the real Ray Train."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from actors.reward_member import MemberJob, MemberTraining, PairRow, TrainedMember
from cluster.session import free_port
from models.adapters import are_adapter
from models.reward_model import RewardModel
from models.top_layers import file_hash
from models.trunk import Family, Trunk
from rlhf.config import FullMembers, RewardConfig, parse_config
from rlhf.errors import ModelError, ResourceError
from rlhf.records import Message
from rlhf.seeding import derive_seed
from tests.trainers.test_reward import pair
from trainers.reward import run_reward
from trainers.reward_members import train_members

pytestmark = pytest.mark.engine

FAST = {"learning_rate": 1e-3, "warmup_steps": 0, "weight_decay": 0.0}


class Training:
    """Trains an ensemble by `pavlov reward` in a folder of its own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder, self._model = folder, model
        self._data, self._held = folder / "train.jsonl", folder / "validation.jsonl"
        for file, numbers in ((self._data, range(60)), (self._held, range(60, 80))):
            file.write_text("".join(json.dumps(pair(n)) + "\n" for n in numbers))

    def run(self, name: str, members: list[dict[str, Any]]) -> Path:
        values = {
            "data": {"train": [str(self._data)], "validation": [str(self._held)]},
            "ensemble": {
                "model": str(self._model),
                "max_tokens": 64,
                "dtype": "float32",
                "members": members,
            },
        }
        config = parse_config(RewardConfig, values, "test")
        return run_reward(config, self._folder / f"{name}.toml", Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Training]:
    folder = tmp_path_factory.mktemp("members")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAVLOV_RUNS", str(folder / "runs"))
        patch.setenv("PAVLOV_CACHE", str(folder / "cache"))
        yield Training(folder, tiny_model)


def own(kind: str, workers: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "count": 1,
        "workers": workers,
        "dtype": "float32",
        "learner": FAST,
        "cpus_per_worker": 0.5,
        **changes,
    }


def train_here(job: MemberJob) -> TrainedMember:
    """What a worker alone gives, in this process."""
    trained = MemberTraining(job, 0, 1).run()
    assert trained is not None
    return trained


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[MemberJob]:
    """One member by one worker, by two, and by one with a head that stands still."""
    out = str(tmp_path_factory.mktemp("own"))
    trunk = Trunk(tiny_model, [Family(1, "last")], dtype="float32", max_tokens=64, batch_tokens=512)
    rows = []
    for n in range(40):
        given = pair(n)
        chosen, rejected = (
            trunk.tokenise((Message("user", given["prompt"]),), given[side], finished=True)
            for side in ("chosen", "rejected")
        )
        rows.append(PairRow(*chosen, rejected[1], 0.9, 1.0 + n % 2, 0.1, n % 2))
    return [
        MemberJob(
            model=str(tiny_model),
            cut=0,
            end=2,
            settings=FullMembers.model_validate(
                # Micro-batches of a pair or two: five a batch, so that one of two ranks has fewer.
                own("full", workers, batch_pairs=5, centring=0.01, head_learning_rate=rate)
                | {"learner": {**FAST, "micro_batch_tokens": 128, **more}}
            ),
            criteria=2,
            pairs=rows,
            member=0,
            seed=3,
            dtype="float32",
            max_tokens=64,
            out=out,
        )
        for workers, rate, more in (
            (1, 1e-3, {}),
            # Activations computed again are the same ones.
            (2, 1e-3, {"gradient_checkpointing": True}),
            (1, 1e-9, {}),
        )
    ]


@pytest.fixture(scope="module")
def trained(training: Training, jobs: list[MemberJob]) -> tuple[Path, TrainedMember]:
    """The run of an ensemble of all kinds, and what the two workers gave, from one session of Ray:
    a machine need not start it twice."""
    members = [
        {"count": 3, "depth": 0.5},
        own("top", layers=1, pooling="mean"),
        own("full", 2, epochs=2),
        own("lora", lora={"rank": 4, "alpha": 8}),
    ]
    two: list[TrainedMember] = []

    def train(own_jobs: Sequence[MemberJob], console: Console) -> list[TrainedMember]:
        *own_members, last = train_members([*own_jobs, jobs[1]], console)
        two.append(last)
        return own_members

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.reward_banks.train_members", train)
        run = training.run("mixed", members)
    return run, two[0]


def test_two_workers_train_what_one_does(
    trained: tuple[Path, TrainedMember],
    jobs: list[MemberJob],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    _, two = trained
    out = Path(jobs[0].out)
    # Ray Train brings two ranks together; a single one needs only this.
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | meet).items():
        monkeypatch.setenv(name, value)
    one, still = (train_here(job) for job in jobs[::2])
    assert one.figures["steps"] == two.figures["steps"] == 8
    assert one.figures["loss"] == pytest.approx(two.figures["loss"], rel=1e-4)
    start = load_file(tiny_model / "model.safetensors")
    first, second = (load_file(out / f"{m.name}.safetensors") for m in (one, two))
    assert first.keys() == second.keys()
    assert not any("embed" in name for name in first)
    moved = 0.0
    for name, tensor in first.items():
        before = start[name if name in start else name.removeprefix("model.")]
        moved = max(moved, float((tensor - before).abs().max()))
        assert torch.allclose(tensor, second[name], atol=2e-5), name
    # Eight steps of Adam: by far more than what the two differ by.
    assert moved > 1e-3
    assert torch.allclose(one.weights_CH, two.weights_CH, atol=2e-5)
    # A head with a rate of its own keeps to it; the layers below learn all the same.
    generator = torch.Generator().manual_seed(derive_seed(3, "head", 0))
    drawn_CH = 0.02 * torch.randn(one.weights_CH.shape, generator=generator)
    assert torch.allclose(still.weights_CH, drawn_CH, atol=1e-6)
    assert (one.weights_CH - drawn_CH).abs().max() > 1e-3
    third = load_file(out / f"{still.name}.safetensors")
    assert max(float((third[name] - first[name]).abs().max()) for name in first) < 1e-2
    assert third.keys() == first.keys() and still.name != one.name


def test_members_of_all_kinds_stand_in_one_ensemble(
    trained: tuple[Path, TrainedMember], tmp_path: Path
):
    run, _ = trained
    model = RewardModel.load(run)
    figures = model.card.metrics["cross_validation"]
    assert figures["accuracy"] > 0.9
    # Only what no trained member has seen: a tenth of the pairs.
    assert 0 < figures["pairs"] == model.card.data["pairs_held_out"] < 15
    [bank] = model.card.banks
    assert [group.kind for group in bank.groups] == ["probe", "top", "full", "lora"]
    assert [family.layers for family in bank.families] == [1, 1, 0, 0]
    assert bank.groups[2].training["steps"] == -(-2 * (60 - figures["pairs"]) // 16)
    files = sorted((run / "reward" / "own").iterdir())
    assert [file.stem for file in files] == sorted(map(file_hash, files))
    assert len(files) == 3
    adapters = [load_file(file) for file in files if are_adapter(load_file(file))]
    # Seven linear layers in each of two, and A and B of each; B has left zero.
    assert [len(adapter) for adapter in adapters] == [2 * 7 * 2]
    assert all(tensor.any() for tensor in adapters[0].values())
    assert not list(run.glob(".own*"))
    replies = [
        ((Message("user", "What about rice?"),), text, True)
        for text in ("Use less water for the rice and stir it once.", "The rice is lazy and the")
    ]
    rewards_KN = model.score(replies).rewards_KN
    # Every member prefers what was preferred.
    assert (rewards_KN[:, 0] > rewards_KN[:, 1]).all()
    copy = tmp_path / "copy"
    copy.mkdir()
    model.save(copy)
    assert torch.equal(RewardModel.load(copy).score(replies).rewards_KN, rewards_KN)
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(ModelError, match="own layers are missing or damaged"):
        RewardModel.load(run).score(replies)


def test_workers_that_never_fit_are_refused_before_anything_waits(training: Training):
    with pytest.raises(
        ResourceError, match="wants 2 workers with 32 CPUs each, and the cluster has room for 0"
    ):
        training.run("big", [own("full", 2, count=3, cpus_per_worker=32.0)])
