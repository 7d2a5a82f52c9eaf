"""Adapters on a real model: what they add, where they travel, what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.adapters import (
    add_adapter,
    is_adapter,
    merge,
    on_the_wire,
    require_known,
    require_mergeable,
    without_adapter,
)
from models.loading import load_causal_model
from models.weight_files import weight_shapes
from rlhf.config import LoRASection
from rlhf.errors import ModelError, WeightUpdateError

TOKENS = torch.tensor([[5, 6, 7, 8]])
SETTINGS = LoRASection(rank=3, alpha=12)


@pytest.fixture
def adapted(tiny_model: Path) -> nn.Module:
    model = add_adapter(load_causal_model(tiny_model, "float32"), SETTINGS, 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


def travelling(model: nn.Module) -> dict[str, Tensor]:
    named = ((name, p.detach()) for name, p in model.named_parameters() if is_adapter(name))
    return dict(on_the_wire(named, SETTINGS))


def test_only_the_adapter_is_trained_and_a_new_one_changes_nothing(tiny_model: Path) -> None:
    plain = load_causal_model(tiny_model, "float32")
    expected = logits(plain)
    model = add_adapter(plain, SETTINGS, 0)
    assert torch.equal(logits(model), expected)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == is_adapter(name), name
    assert not any("lm_head" in name for name, _ in model.named_parameters() if is_adapter(name))


def test_what_travels_makes_the_start_model_the_adapted_one(
    adapted: nn.Module, tiny_model: Path
) -> None:
    start = load_file(tiny_model / "model.safetensors")
    merged = dict(merge(start.items(), travelling(adapted), torch.float32))
    plain = load_causal_model(tiny_model, "float32")
    before = logits(plain)
    plain.load_state_dict(merged, strict=False)
    assert (logits(adapted) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(plain), logits(adapted), atol=1e-4, rtol=1e-4)


def test_off_it_is_the_start_model_and_comes_back_even_after_an_error(
    adapted: nn.Module, tiny_model: Path
) -> None:
    expected, with_it = logits(load_causal_model(tiny_model, "float32")), logits(adapted)
    with without_adapter(adapted):
        assert torch.equal(logits(adapted), expected)
    with pytest.raises(KeyError), without_adapter(adapted):
        raise KeyError
    assert torch.equal(logits(adapted), with_it)


def test_it_may_be_in_some_layers_alone_and_names_that_are_not_there_are_refused(
    tiny_model: Path,
) -> None:
    some = LoRASection(layers=["q_proj"])
    model = add_adapter(load_causal_model(tiny_model, "float32"), some, 0)
    assert all("q_proj" in name for name, _ in model.named_parameters() if is_adapter(name))
    for wrong, reason in {
        "nothing_like_it": "has no layer 'nothing_like_it'",
        "embed_tokens": "'embed_tokens' is no linear layer",
        "lm_head": "'lm_head' is tied to the embedding",
    }.items():
        with pytest.raises(ModelError, match=rf"policy\.lora\.layers: .*{reason}"):
            add_adapter(
                load_causal_model(tiny_model, "float32"), LoRASection(layers=["q_proj", wrong]), 0
            )


def test_layers_that_the_files_hold_otherwise_are_refused_before_anything_is_trained(
    adapted: nn.Module, tiny_model: Path
) -> None:
    shapes = weight_shapes(tiny_model)
    require_mergeable(adapted, shapes)
    name = next(name for name in shapes if "q_proj" in name)
    with pytest.raises(ModelError, match=r"q_proj cannot be merged .* not there"):
        require_mergeable(adapted, {key: s for key, s in shapes.items() if key != name})
    with pytest.raises(ModelError, match=r"q_proj cannot be merged .*\(1, 2\)"):
        require_mergeable(adapted, {**shapes, name: (1, 2)})


def test_a_small_difference_survives_where_the_start_model_is_rounder_than_the_engine() -> None:
    start = [("q.weight", torch.ones(2, 2, dtype=torch.bfloat16))]
    adapter = {"q.lora_A": torch.full((1, 2), 0.01), "q.lora_B": torch.full((2, 1), 0.01)}
    [(_, merged)] = merge(start, adapter, torch.float32)
    torch.testing.assert_close(merged, torch.full((2, 2), 1.0001))


def test_an_adapter_of_another_model_is_refused() -> None:
    adapter = {
        "layers.7.q_proj.lora_A": torch.ones(1, 2),
        "layers.7.q_proj.lora_B": torch.ones(2, 1),
    }
    with pytest.raises(WeightUpdateError, match=r"no layer for layers\.7\.q_proj"):
        list(merge([("layers.0.q_proj.weight", torch.ones(2, 2))], adapter, torch.float32))
    with pytest.raises(WeightUpdateError, match=r"no layer for layers\.7\.q_proj"):
        require_known(["layers.0.q_proj.weight"], adapter)
    require_known(["layers.7.q_proj.weight", "norm.weight"], adapter)


def test_its_start_follows_from_the_seed_and_leaves_other_draws_alone(tiny_model: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    models = [
        add_adapter(load_causal_model(tiny_model, "float32"), SETTINGS, seed) for seed in (1, 1, 2)
    ]
    first, same, other = (travelling(model) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.rand(1), expected)
