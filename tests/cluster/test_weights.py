"""Weights on their way: what differs from what was sent is refused, by the check that is named."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.vllm_worker import WeightLoader
from cluster.weights import WeightManifest, choose_transport, make_sender
from cluster.weights.base import checksum, entry, fetch, verified
from cluster.weights.probe import PROBE_TEXT, TOLERANCE, Probe, check_probe
from cluster.weights.shared_memory import SharedMemorySender, read_tensors, write_tensors
from rlhf.config import ClusterSection
from rlhf.errors import WeightUpdateError

Named = dict[str, Tensor]


def version(number: int) -> Named:
    """A small model: two tensors of one shape, one of another precision, one without dimensions."""
    generator = torch.Generator().manual_seed(number)
    return {
        "layers.0.weight": torch.randn(4, 8, generator=generator),
        "layers.1.weight": torch.randn(4, 8, generator=generator),
        "head.weight": torch.randn(3, generator=generator).bfloat16(),
        "scale": torch.randn((), generator=generator),
    }


def announced(tensors: Named) -> dict[str, object]:
    return {name: entry(tensor) for name, tensor in tensors.items()}


def with_one_left_at_the_previous_version(sent: Named) -> Named:
    return {**sent, "layers.1.weight": version(1)["layers.1.weight"]}


def with_two_of_one_shape_swapped(sent: Named) -> Named:
    one, other = sent["layers.0.weight"], sent["layers.1.weight"]
    return {**sent, "layers.0.weight": other, "layers.1.weight": one}


def with_one_high_bit_flipped(sent: Named) -> Named:
    bits = sent["head.weight"].clone().view(torch.int16)
    bits[1] ^= 0x4000
    return {**sent, "head.weight": bits.view(torch.bfloat16)}


def with_the_last_bit_of_a_scalar_flipped(sent: Named) -> Named:
    bits = sent["scale"].clone().view(torch.int32)
    return {**sent, "scale": (bits ^ 1).view(torch.float32)}


def with_one_missing(sent: Named) -> Named:
    return {name: tensor for name, tensor in sent.items() if name != "layers.1.weight"}


def with_one_more(sent: Named) -> Named:
    return {**sent, "layers.2.weight": torch.zeros(4, 8)}


def with_another_precision(sent: Named) -> Named:
    return {**sent, "head.weight": sent["head.weight"].float()}


def with_another_shape(sent: Named) -> Named:
    return {**sent, "layers.0.weight": sent["layers.0.weight"].reshape(8, 4)}


FAULTS: list[tuple[Callable[[Named], Named], str, str]] = [
    (with_one_left_at_the_previous_version, "checksum", "layers.1.weight"),
    (with_two_of_one_shape_swapped, "checksum", "layers.0.weight"),
    (with_one_high_bit_flipped, "checksum", "head.weight"),
    (with_the_last_bit_of_a_scalar_flipped, "checksum", "scale"),
    (with_one_missing, "names", "layers.1.weight"),
    (with_one_more, "names", "layers.2.weight"),
    (with_another_precision, "shape", "head.weight"),
    (with_another_shape, "shape", "layers.0.weight"),
]


def test_what_arrives_as_it_was_sent_is_handed_on():
    sent = version(2)
    arrived = dict(verified(((n, t.clone()) for n, t in sent.items()), announced(sent)))
    assert all(torch.equal(arrived[name], tensor) for name, tensor in sent.items())
    assert len(arrived) == 4


def test_the_order_of_arrival_does_not_matter():
    sent = version(2)
    names = random.Random(0).sample(list(sent), len(sent))
    assert [name for name, _ in verified([(n, sent[n]) for n in names], announced(sent))] == names


@pytest.mark.parametrize(("fault", "check", "name"), FAULTS)
def test_a_faulty_update_is_refused_by_name_of_check_and_tensor(fault, check, name):
    sent = version(2)
    with pytest.raises(WeightUpdateError) as caught:
        list(verified(fault(sent).items(), announced(sent)))
    assert caught.value.check == check
    assert name in caught.value.detail


def test_a_tensor_that_comes_twice_is_refused():
    sent = version(2)
    with pytest.raises(WeightUpdateError, match=r"names check: scale .* twice"):
        list(verified([*sent.items(), ("scale", sent["scale"])], announced(sent)))


def test_a_faulty_tensor_is_never_handed_on():
    sent = version(2)
    arrived = verified(with_one_high_bit_flipped(sent).items(), announced(sent))
    handed_on = []
    with pytest.raises(WeightUpdateError):
        for name, _ in arrived:
            handed_on.append(name)
    assert handed_on == ["layers.0.weight", "layers.1.weight"]


def test_a_checksum_is_of_the_values_and_not_of_how_they_lie():
    tensor = torch.arange(6.0).reshape(2, 3)
    assert checksum(tensor.T) == checksum(tensor.T.contiguous()) != checksum(tensor)
    assert checksum(torch.empty(0)) == checksum(torch.empty(0, 3))
    parameter = torch.nn.Parameter(tensor)
    assert checksum(parameter) == checksum(tensor)


# In the engine's worker


class Worker(WeightLoader):
    """A worker without an engine."""

    def __init__(self) -> None:
        self.applied: list[Named] = []

    def pavlov_apply(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.applied.append(dict(tensors))


def entries(sent: Named) -> dict[str, dict[str, object]]:
    return {
        name: {"dtype": str(t.dtype), "shape": list(t.shape), "checksum": checksum(t)}
        for name, t in sent.items()
    }


def test_a_worker_loads_a_good_update_and_says_its_version(tmp_path):
    worker, sent = Worker(), version(2)
    path = write_tensors(sent, tmp_path, "version-2")
    assert worker.pavlov_loaded_version() == -1
    assert worker.pavlov_load_weights(str(path), 2, entries(sent)) is None
    assert worker.pavlov_loaded_version() == 2
    assert all(torch.equal(worker.applied[0][name], tensor) for name, tensor in sent.items())


@pytest.mark.parametrize(("fault", "check", "name"), FAULTS)
def test_a_refused_update_touches_nothing_in_a_worker(tmp_path, fault, check, name):
    worker, sent = Worker(), version(2)
    path = write_tensors(fault(sent), tmp_path, "version-2")
    refusal = worker.pavlov_load_weights(str(path), 2, entries(sent))
    assert refusal is not None
    assert refusal.startswith(f"{check}: ")
    assert worker.applied == []
    assert worker.pavlov_loaded_version() == -1


# Through shared memory


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_shared_memory_brings_every_tensor_as_the_manifest_announces(tmp_path):
    sent = version(1)
    manifest = SharedMemorySender(tmp_path / "new").prepare(1, sent.items())
    assert (manifest.version, manifest.transport) == (1, "shared_memory")
    path = fetch(manifest, tmp_path)
    arrived = dict(verified(read_tensors(path), manifest.entries))
    assert all(torch.equal(arrived[name], tensor) for name, tensor in sent.items())


def test_shared_memory_keeps_only_the_newest_version(tmp_path):
    sender = SharedMemorySender(tmp_path)
    first = sender.prepare(1, version(1).items())
    second = sender.prepare(2, version(2).items())
    assert files(tmp_path) == ["version-2.safetensors"]
    fetch(second, tmp_path)
    with pytest.raises(WeightUpdateError, match="version check: version 1 is no longer"):
        fetch(first, tmp_path)
    sender.close()
    assert files(tmp_path) == []


def test_weights_in_the_memory_of_another_node_are_told_from_an_old_version(tmp_path):
    elsewhere = WeightManifest(1, "shared_memory", str(tmp_path / "none" / "version-1"), {})
    with pytest.raises(WeightUpdateError, match=r'set cluster\.weight_transport = "object_store"'):
        fetch(elsewhere, tmp_path)


@pytest.mark.parametrize(
    ("configured", "alive", "chosen"),
    [
        ({}, [True], "shared_memory"),
        ({}, [True, False], "shared_memory"),
        ({}, [True, True], "object_store"),
        ({"weight_transport": "shared_memory"}, [True, True], "shared_memory"),
        ({"weight_transport": "nccl"}, [True, True], "nccl"),
    ],
)
def test_weights_reach_several_nodes_unless_another_way_is_configured(
    monkeypatch, configured, alive, chosen
):
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": each} for each in alive])
    said: list[str] = []
    cluster = ClusterSection(start_timeout_s=7.0, **configured)
    found = choose_transport(cluster, said.append)
    assert (found.weight_transport, found.start_timeout_s) == (chosen, 7.0)
    assert len(said) == (chosen == "object_store")


def test_a_version_can_be_sent_again_by_a_sender_that_was_replaced(tmp_path):
    SharedMemorySender(tmp_path).prepare(1, version(1).items())
    manifest = SharedMemorySender(tmp_path).prepare(1, version(7).items())
    assert len(list(verified(read_tensors(fetch(manifest, tmp_path)), manifest.entries))) == 4


def test_a_version_appears_whole_and_the_one_before_it_stays_until_then(tmp_path, monkeypatch):
    import safetensors.torch

    sender = SharedMemorySender(tmp_path)
    first = sender.prepare(1, version(1).items())
    save, seen = safetensors.torch.save_file, []

    def slow(tensors: Named, path: Path) -> None:
        save(tensors, path)
        seen.append([name for name in files(tmp_path) if name.startswith("version-")])
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", slow)
    with pytest.raises(OSError, match="no space"):
        sender.prepare(2, version(2).items())
    assert seen == [["version-1.safetensors"]]
    assert len(list(verified(read_tensors(fetch(first, tmp_path)), first.entries))) == 4


def test_tensors_that_do_not_lie_in_a_row_are_sent_by_value(tmp_path):
    transposed = torch.arange(6.0).reshape(2, 3).T
    manifest = SharedMemorySender(tmp_path).prepare(1, [("t", transposed)])
    [(_, arrived)] = verified(read_tensors(fetch(manifest, tmp_path)), manifest.entries)
    assert torch.equal(arrived, transposed)


def test_an_unknown_transport_is_refused(tmp_path):
    assert isinstance(make_sender("shared_memory", tmp_path), SharedMemorySender)
    with pytest.raises(ValueError, match="unknown weight transport 'pigeon'"):
        make_sender("pigeon", tmp_path)


def test_a_manifest_survives_pickling(tmp_path):
    import pickle

    manifest = SharedMemorySender(tmp_path).prepare(1, version(1).items())
    again = pickle.loads(pickle.dumps(manifest))
    assert isinstance(again, WeightManifest)
    assert again == manifest


# The probe

LEARNER = tuple(-0.1 * i for i in range(1, 41))
PROBE = Probe(tuple(range(41)), LEARNER, "float32")


def shifted(*differences: float) -> list[float]:
    """The learner's logprobs, the first ones changed by `differences`."""
    return [
        value + (differences[i] if i < len(differences) else 0.0) for i, value in enumerate(LEARNER)
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_probe_within_the_tolerance_passes_with_its_mean_difference(dtype):
    mean, largest = TOLERANCE[dtype]
    assert check_probe(PROBE, LEARNER, dtype) == 0
    assert check_probe(PROBE, [v + mean * 0.99 for v in LEARNER], dtype) == pytest.approx(
        mean * 0.99, rel=1e-3
    )
    assert check_probe(PROBE, shifted(largest * 0.99), dtype) > 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_probe_beyond_either_tolerance_is_refused(dtype, sign):
    mean, largest = TOLERANCE[dtype]
    assert largest / len(LEARNER) < mean  # one token alone passes the mean
    for engine in ([v + sign * mean * 1.01 for v in LEARNER], shifted(sign * largest * 1.01)):
        with pytest.raises(WeightUpdateError) as caught:
            check_probe(PROBE, engine, dtype)
        assert caught.value.check == "probe"
        assert f"{dtype} allows {mean:g} and {largest:g}" in caught.value.detail


@pytest.mark.parametrize(
    ("learner", "engine"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16",) * 2]
)
def test_the_coarser_of_two_precisions_says_what_a_probe_may_differ_by(learner, engine):
    """A learner in bfloat16 is 0.05 from an engine in float32 without any fault."""
    probe = Probe(PROBE.token_ids, LEARNER, learner)
    assert check_probe(probe, [v + 0.05 for v in LEARNER], engine) == pytest.approx(0.05)
    with pytest.raises(WeightUpdateError, match=r"bfloat16 allows 0\.15 and 1"):
        check_probe(probe, [v + 0.16 for v in LEARNER], engine)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, 39])
def test_a_probe_that_is_not_a_number_is_refused_wherever_it_stands(value, place):
    engine = list(LEARNER)
    engine[place] = value
    for dtype in TOLERANCE:
        with pytest.raises(WeightUpdateError, match="refused by the probe check"):
            check_probe(PROBE, engine, dtype)
    learner = Probe(PROBE.token_ids, tuple(engine), "bfloat16")
    with pytest.raises(WeightUpdateError, match="refused by the probe check"):
        check_probe(learner, LEARNER, "bfloat16")


def test_the_probe_text_is_long_enough_to_see_every_layer_at_work():
    assert len(PROBE_TEXT.split()) > 30
    assert PROBE_TEXT.isascii()
