"""The features of a reply: the same packed or alone, and of the layers that were asked for."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from models import precision
from models.masks import attention_mask
from models.packing import Row, collate, pack
from models.top_layers import keep_layers
from models.trunk import COMPUTATION, Family, Trunk, layers_at, pool
from rlhf.errors import ModelError
from rlhf.records import Message

QUESTION = (Message("user", "What is a good name for a cat?"),)
MakeTrunk = Callable[..., Trunk]


@pytest.fixture(scope="module")
def make_trunk(tiny_model: Path) -> MakeTrunk:
    def make(**changes: object) -> Trunk:
        settings = {"dtype": "float32", "max_tokens": 128, "batch_tokens": 4096}
        families = both(int(changes.pop("layers", 1)))  # type: ignore[call-overload]
        return Trunk(tiny_model, families, **settings | changes)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def trunk(make_trunk: MakeTrunk) -> Trunk:
    return make_trunk()


def both(layers: int) -> list[Family]:
    return [Family(layers, "last"), Family(layers, "mean")]


def random_rows(seed: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Two replies each to a few prompts."""
    draw = random.Random(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 448) for _ in range(draw.randint(1, most)))

    prompts = [tokens(20) for _ in range(4)]
    return [(prompt, tokens(12)) for prompt in prompts for _ in range(2)]


def test_a_trunk_on_a_cpu_has_a_precision_of_the_cpu_whatever_gpu_stands_beside(
    make_trunk, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, dtype in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(precision, "_cpu_multiplies_bfloat16", lambda native=native: native)
        found = make_trunk(dtype="auto")
        assert next(found._model.parameters()).dtype == getattr(torch, dtype)
        assert found.fingerprint == make_trunk(dtype=dtype).fingerprint
        assert precision.resolve_dtype("auto") == precision.resolve_dtype("auto", "cuda")
        assert precision.resolve_dtype("auto", "cuda") == "bfloat16"


def test_another_way_of_computing_features_does_not_find_those_of_before(make_trunk, monkeypatch):
    before = make_trunk().fingerprint
    assert make_trunk().fingerprint == before
    monkeypatch.setattr("models.trunk.COMPUTATION", COMPUTATION + 1)
    assert make_trunk().fingerprint != before


def hidden_after(folder: Path, layer: int, token_ids: tuple[int, ...]) -> Tensor:
    """What layer number `layer` puts out, shape (L, H), by a hook on the whole model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    model.model.layers[layer].register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=torch.tensor([token_ids]))
    return seen[0][0]


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_packed_features_are_those_of_each_reply_alone(make_trunk, batch_tokens):
    rows = random_rows(0)
    alone = torch.cat([make_trunk().features([row]) for row in rows])
    together = make_trunk(batch_tokens=batch_tokens).features(rows)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert alone.shape == (8, 2, 128)
    assert alone.std(dim=0).min() > 1e-3


@pytest.mark.parametrize("layers", [1, 2])
def test_features_are_the_last_tokens_state_and_the_replys_mean_after_the_kept_layers(
    make_trunk, tiny_model, layers
):
    trunk = make_trunk(layers=layers)
    for prompt, reply in random_rows(1):
        hidden_TH = hidden_after(tiny_model, layers - 1, prompt + reply)[len(prompt) :]
        wanted_FH = torch.stack([hidden_TH[-1], hidden_TH.mean(dim=0)])
        found_FH = trunk.features([(prompt, reply)])[0]
        torch.testing.assert_close(found_FH, wanted_FH, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", ["deep", "shallow"])
def test_several_depths_in_one_pass_are_those_of_a_trunk_for_each(make_trunk, tiny_model, first):
    families = [Family(2, "mean"), Family(1, "last")]
    if first == "shallow":
        families.reverse()
    trunk = Trunk(tiny_model, families, dtype="float32", max_tokens=128, batch_tokens=4096)
    rows = random_rows(4)
    found_NFH = trunk.features(rows)
    assert trunk.layers == 2
    alone = {2: make_trunk(layers=2).features(rows)[:, 1], 1: make_trunk().features(rows)[:, 0]}
    for index, family in enumerate(families):
        torch.testing.assert_close(found_NFH[:, index], alone[family.layers])


def test_a_reply_has_the_same_states_in_either_layout(tiny_model):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_model, dtype=torch.float32).eval()
    rows = random_rows(5)
    packed = pack([prompt for prompt, _ in rows], [reply for _, reply in rows])
    pooled: list[Tensor] = []
    for aligned in (True, False):
        batch = collate(packed, 0, aligned=aligned)
        with torch.no_grad():
            hidden_BLH = model(
                input_ids=batch.input_ids_BL,
                attention_mask=attention_mask(model, batch),
                position_ids=batch.position_ids_BL,
            ).last_hidden_state[:, -batch.kept_columns :]
        pooled.append(
            torch.stack([pool(hidden_BLH, batch, pooling) for pooling in ("last", "mean", "max")])
        )
    torch.testing.assert_close(pooled[0], pooled[1], atol=1e-5, rtol=1e-5)


def test_pooling_by_hand():
    # The state of a token is its number: prompt 1 2, replies 3 4 5 and 6; prompt 7, reply 8 9.
    rows = [Row((1, 2), ((3, 4, 5), (6,)), (0, 1)), Row((7,), ((8, 9),), (2,))]
    batch = collate(rows, 0, aligned=False)
    hidden_BL1 = batch.input_ids_BL.unsqueeze(2).to(torch.bfloat16)
    assert pool(hidden_BL1, batch, "last").flatten().tolist() == [5.0, 6.0, 9.0]
    found_N1 = pool(hidden_BL1, batch, "mean")
    assert found_N1.flatten().tolist() == [4.0, 6.0, 8.5]
    assert found_N1.dtype == torch.float32
    assert pool(-hidden_BL1, batch, "max").flatten().tolist() == [-3.0, -6.0, -8.0]
    assert pool(hidden_BL1, batch, "max").flatten().tolist() == [5.0, 6.0, 9.0]


def test_a_stream_brings_every_row_once_in_passes_within_the_budget(make_trunk):
    trunk = make_trunk(batch_tokens=60)
    rows = random_rows(6)
    wanted_NFH = make_trunk().features(rows)
    widths, order = [], []
    # One after the other: each holds inference mode while it is under way.
    passes, stream = list(trunk.passes(rows)), list(trunk.stream(rows))
    for part, (indices, part_nFH) in zip(passes, stream, strict=True):
        assert part.batch.indices == indices
        # Only what a family reads is kept of a pass.
        assert set(part.states) == {1}
        columns = part.batch.input_ids_BL.shape
        assert columns.numel() <= 60 or columns[0] == 1
        widths.append(columns[1])
        torch.testing.assert_close(part_nFH, wanted_NFH[list(indices)], atol=1e-5, rtol=1e-5)
        order += indices
    assert sorted(order) == list(range(8))
    assert len(widths) > 1
    assert widths == sorted(widths, reverse=True)


def test_neighbours_with_one_prompt_share_its_pass(trunk):
    rows = [((5, 6, 7), (8,)), ((5, 6, 7), (9, 10)), ((5, 6), (8,))]
    [part] = trunk.passes(rows)
    tokens = [[token for token in row if token] for row in part.batch.input_ids_BL.tolist()]
    assert tokens == [[5, 6, 7, 8, 9, 10], [5, 6, 8]]


def test_features_are_float32_without_gradients_in_any_precision(make_trunk):
    features_ND = make_trunk(dtype="bfloat16").features(random_rows(2))
    assert features_ND.dtype == torch.float32
    assert not features_ND.requires_grad


def test_progress_counts_every_row_once(trunk):
    counts: list[int] = []
    trunk.features(random_rows(3), counts.append)
    assert sum(counts) == 8


def test_no_rows_have_no_features(trunk):
    assert trunk.features([]).shape == (0, 2, 128)


# What becomes a row


def test_a_cut_off_reply_has_other_features_than_a_finished_one(trunk):
    finished = trunk.tokenise(QUESTION, "The answer is", finished=True)
    cut_off = trunk.tokenise(QUESTION, "The answer is", finished=False)
    assert finished[1] == (*cut_off[1], trunk.tokenizer.end_id)
    one_ND, other_ND = trunk.features([finished]), trunk.features([cut_off])
    assert (one_ND - other_ND).abs().max() > 0.1


@pytest.mark.parametrize("finished", [True, False])
def test_an_empty_reply_is_refused(trunk, finished):
    with pytest.raises(ModelError, match="empty reply"):
        trunk.tokenise(QUESTION, "", finished=finished)


def test_a_prompt_keeps_its_last_third_of_the_tokens_and_a_reply_gets_what_it_leaves(make_trunk):
    trunk = make_trunk(max_tokens=96)
    long = " ".join(["water", "rice", "pasta", "bread"] * 30)
    all_prompt, short = make_trunk(max_tokens=10_000).tokenise(
        (Message("user", long),), "yes", finished=True
    )
    prompt, reply = trunk.tokenise((Message("user", long),), "yes", finished=True)
    assert prompt == all_prompt[-32:]
    assert reply == short
    all_reply = make_trunk(max_tokens=10_000).tokenise(QUESTION, long, finished=True)[1]
    prompt, reply = trunk.tokenise(QUESTION, long, finished=True)
    assert reply == all_reply[: 96 - len(prompt)]
    assert 0 < len(prompt) <= 32


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("question", [QUESTION, (Message("user", "rice " * 100),)])
def test_a_reply_is_read_to_its_end_where_nothing_is_cut_off_it(make_trunk, question, finished):
    trunk, whole = make_trunk(max_tokens=96), make_trunk(max_tokens=10_000)
    known = set()
    for count in range(1, 100):
        reply = "water " * count
        row = trunk.tokenise(question, reply, finished=finished)
        uncut = whole.tokenise(question, reply, finished=finished)[1]
        read = trunk.reads_to_its_end(row, question, reply, finished=finished)
        assert read == (row[1] == uncut)
        known.add(read)
    assert known == {True, False}


def test_replies_to_one_prompt_share_it_however_long_they_are(make_trunk):
    trunk = make_trunk(max_tokens=64)
    question = (Message("user", "rice " * 100),)
    assert trunk.tokenise(question, "yes")[0] == trunk.tokenise(question, "yes " * 50)[0]


@pytest.mark.parametrize("max_tokens", [16, 32, 33, 128])
def test_a_row_keeps_to_the_limit_and_has_some_of_both(make_trunk, max_tokens):
    long_question = (Message("user", "rice " * 100),)
    for reply in ("water", "water " * 200):
        trunk = make_trunk(max_tokens=max_tokens)
        prompt_ids, reply_ids = trunk.tokenise(long_question, reply, finished=True)
        assert len(prompt_ids) + len(reply_ids) <= max_tokens
        assert prompt_ids
        assert reply_ids


# Which layers


@pytest.mark.parametrize(("depth", "layers"), [(0.01, 1), (0.3, 1), (0.67, 1), (0.8, 2), (1.0, 2)])
def test_a_depth_is_a_share_of_the_layers_and_at_least_one(tiny_model, depth, layers):
    assert layers_at(tiny_model, depth) == layers


@pytest.mark.parametrize(("first", "end"), [(0, 1), (0, 7), (3, 7), (0, 10)])
def test_the_layers_between_two_places_are_kept(first, end):
    model = nn.Module()
    layers = [nn.Linear(1, 1) for _ in range(10)]
    model.layers = nn.ModuleList(layers)
    model.config = SimpleNamespace(num_hidden_layers=10)  # type: ignore[assignment]
    keep_layers(model, first, end)
    assert list(model.layers) == layers[first:end]
    assert model.config.num_hidden_layers == end - first


@pytest.fixture(scope="module")
def neox(tiny_model, tmp_path_factory):
    """A backbone whose final norm is not called norm, with the tiny model's tokenizer."""
    from transformers import GPTNeoXConfig, GPTNeoXModel

    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("neox") / "model"))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    words = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = GPTNeoXConfig(
        vocab_size=words,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    GPTNeoXModel(config).save_pretrained(folder)
    return folder


def test_a_state_is_the_same_however_many_layers_follow_whatever_the_norm_is_called(neox):
    # The final norm belongs to the model's end, not to the layer that a trunk happens to end with.
    wanted, deeper = Family(2, "last"), Family(3, "last")
    alone, beside = (
        Trunk(neox, families, dtype="float32", max_tokens=64, batch_tokens=256)
        for families in ([wanted], [wanted, deeper])
    )
    rows = [alone.tokenise(QUESTION, text) for text in ("water and rice", "no")]
    features_NFH = beside.features(rows)
    torch.testing.assert_close(alone.features(rows)[:, 0], features_NFH[:, 0])
    assert not torch.allclose(features_NFH[:, 0], features_NFH[:, 1])


def test_more_layers_than_a_model_has_are_refused(tiny_model):
    with pytest.raises(ModelError, match="3 layers are wanted of LlamaModel, which has 2"):
        Trunk(tiny_model, both(3), dtype="float32", max_tokens=64, batch_tokens=64)


@pytest.mark.parametrize("stacks", [0, 2])
def test_an_architecture_whose_layers_are_not_found_is_refused(stacks):
    model = nn.Module()
    model.config = SimpleNamespace(num_hidden_layers=3)  # type: ignore[assignment]
    model.other = nn.ModuleList([nn.Linear(1, 1)])
    for number in range(stacks):
        setattr(model, f"stack{number}", nn.ModuleList([nn.Linear(1, 1)] * 3))
    with pytest.raises(ModelError, match="layers of Module cannot be cut"):
        keep_layers(model, 0, 2)


def test_damaged_weights_are_a_model_error_in_one_sentence(tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError) as caught:
        Trunk(folder, both(1), dtype="float32", max_tokens=64, batch_tokens=64)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
