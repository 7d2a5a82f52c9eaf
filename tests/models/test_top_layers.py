"""Layers above a cut give what the whole model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.adapters import is_adapter, on_the_wire
from models.loading import load_backbone
from models.top_layers import TopLayers, file_hash, write_layers
from models.trunk import Family, Trunk
from rlhf.config import LoRASection
from rlhf.errors import ModelError
from rlhf.records import Message

TEXTS = ["Use less water.", "The river is lazy and the town", "No."]


def rows(trunk: Trunk) -> list[tuple[object, object]]:
    return [trunk.tokenise((Message("user", "What about rice?"),), text) for text in TEXTS]


def make_trunk(model: Path, families: list[Family], **own: TopLayers) -> Trunk:
    return Trunk(model, families, dtype="float32", max_tokens=64, batch_tokens=512, own=own)


@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_layers_above_any_cut_are_the_whole_model_bit_for_bit(tiny_model, cut, pooling):
    own = make_trunk(
        tiny_model, [Family(cut, pooling, "a")], a=TopLayers(tiny_model, cut, 2, "float32")
    )
    # The trunk cut after all its layers has no final norm, which the layers of one's own have.
    whole = load_backbone(tiny_model, "float32")
    passed = next(iter(own.passes(rows(own))))
    batch = passed.batch
    with torch.inference_mode():
        wanted_BLH = whole(
            input_ids=batch.input_ids_BL,
            attention_mask=batch.mask_B1LL | ~batch.mask_B1LL.any(dim=-1, keepdim=True),
            position_ids=batch.position_ids_BL,
            use_cache=False,
        ).last_hidden_state
        found_BLH = own._own["a"](passed.states[cut], batch)
    assert torch.equal(found_BLH, wanted_BLH)


def test_own_and_frozen_families_come_from_one_pass(tiny_model):
    layers = TopLayers(tiny_model, 1, 2, "float32")
    both = make_trunk(tiny_model, [Family(1, "last"), Family(1, "mean", "a")], a=layers)
    alone = make_trunk(tiny_model, [Family(1, "last")])
    features_NFH = both.features(rows(both))
    assert torch.equal(features_NFH[:, :1], alone.features(rows(alone)))
    assert not torch.allclose(features_NFH[:, 0], features_NFH[:, 1])
    assert str(both.families[1]) == "mean@1+a"


def test_written_layers_are_named_by_what_they_are_and_read_back(tiny_model, tmp_path: Path):
    layers = TopLayers(tiny_model, 1, 2, "float32")
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(0.1)
    name = write_layers(layers.state_dict(), tmp_path / "own")
    [file] = (tmp_path / "own").iterdir()
    assert file.name == f"{name}.safetensors"
    assert file_hash(file) == name
    again = TopLayers(tiny_model, 1, 2, "float32").read(file)
    for one, other in zip(layers.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_adapter_is_trained_alone_and_read_back_as_the_layers_it_makes(
    tiny_model, tmp_path: Path
):
    plain = TopLayers(tiny_model, 1, 2, "float32")
    adapted = TopLayers(tiny_model, 1, 2, "float32")
    settings = LoRASection(rank=4, alpha=8)
    adapted.add_adapter(settings, 0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    named = [(name, tensor) for name, tensor in adapted.named_parameters() if is_adapter(name)]
    assert len(named) == sum(parameter.requires_grad for parameter in adapted.parameters()) == 14
    name = write_layers(dict(on_the_wire(named, settings)), tmp_path / "own")
    again = TopLayers(tiny_model, 1, 2, "float32").read(tmp_path / "own" / f"{name}.safetensors")
    assert again.state_dict().keys() == plain.state_dict().keys()

    def features(layers: TopLayers) -> torch.Tensor:
        trunk = make_trunk(tiny_model, [Family(1, "mean", "a")], a=layers)
        return trunk.features(rows(trunk))

    torch.testing.assert_close(features(again), features(adapted), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(features(again), features(plain), atol=1e-2)
    with pytest.raises(ModelError, match=r"cannot be loaded: .*no layer for"):
        TopLayers(tiny_model, 0, 1, "float32").read(
            path_of({"model.layers.9.mlp.up_proj.lora_A": torch.ones(1, 2)}, tmp_path)
        )


def path_of(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(tensors, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


@pytest.mark.parametrize(
    ("layers", "reason"),
    [("nothing", "the model has no layer 'nothing'"), ("norm", "'norm' is no linear layer")],
)
def test_an_adapter_of_layers_that_are_not_there_is_refused(tiny_model, layers, reason):
    with pytest.raises(ModelError, match=rf"ensemble\.members\.lora\.layers: {reason}"):
        TopLayers(tiny_model, 1, 2, "float32").add_adapter(LoRASection(layers=[layers]), 0)


def test_a_file_of_other_layers_is_refused(tiny_model, tmp_path: Path):
    layers = TopLayers(tiny_model, 1, 2, "float32")
    path = tmp_path / "own.safetensors"
    tensors = layers.state_dict()
    save_file(dict(list(tensors.items())[1:]), path)
    with pytest.raises(ModelError, match=r"own\.safetensors cannot be loaded"):
        layers.read(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be loaded"):
        layers.read(path)


def test_more_layers_than_there_are_are_refused(tiny_model):
    with pytest.raises(ModelError, match="3 layers are wanted of LlamaModel, which has 2"):
        TopLayers(tiny_model, 1, 3, "float32")


def test_a_backbone_that_adds_positions_to_its_embeddings_is_refused(tmp_path: Path):
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    GPT2Model(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="GPT2Model changes its embeddings"):
        TopLayers(tmp_path, 1, 2, "float32")
