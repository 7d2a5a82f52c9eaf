"""Models of many kinds read packed rows as they read single ones, or are refused in a sentence."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from models.critic import Critic
from models.loading import load_backbone, load_causal_model, text_config
from models.logprobs import TokenLogprobs, reply_logprobs
from models.masks import TOLERANCE, attention_mask, packing_error, require_packable
from models.packing import Row, collate
from models.sources import resolve_model
from models.top_layers import TopLayers
from models.trunk import Family, Trunk, layers_at
from rlhf.errors import ModelError

Make = Callable[[str], Path]

WINDOW = 16
PLAIN: dict[str, Any] = {
    "vocab_size": 448,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Wide enough that what a layer sees is seen in what it puts out.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = PLAIN | {"head_dim": 8}
BARE: dict[str, Any] = {
    name: PLAIN[name]
    for name in ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
}
NARROW = BARE | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = HEADS | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}

SLIDING = {
    "Mistral": PLAIN | {"sliding_window": WINDOW},
    "Mixtral": PLAIN | EXPERTS | {"sliding_window": WINDOW},
    "Phi3": PLAIN | {"sliding_window": WINDOW},
    "Qwen2": PLAIN | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "Gemma2": HEADS | {"sliding_window": WINDOW},
    "Gemma3": HEADS | MIXED,
    "GptOss": HEADS | MIXED | EXPERTS,
    "Cohere2": PLAIN | MIXED,
}
"""Keyword arguments of configurations, by the beginning of a class's name."""

UNFIT = {
    "Lfm2": PLAIN | {"layer_types": ["conv", "full_attention"] * 2},
    "Qwen3_5": LINEAR,
    "Qwen3Next": LINEAR
    | {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "GraniteMoeHybrid": PLAIN
    | {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
        "num_local_experts": 0,
    },
    "RecurrentGemma": PLAIN | {"lru_width": 32, "block_types": ["recurrent", "attention"]},
    "Mpt": BARE | {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "Bloom": BARE | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": NARROW | {"alibi": True},
    "Mamba": BARE | {"hidden_size": 32, "num_hidden_layers": 2},
    "GPTNeo": BARE
    | {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
}
"""Recurrent, with convolutions, with a bias by distance in columns, with windows over columns."""

TEXT = {"Gemma3": "Gemma3TextConfig", "Qwen3_5": "Qwen3_5TextConfig"}


def write(folder: Path, tokenizer: Path, kind: str, settings: dict[str, Any]) -> Path:
    """A tiny random causal model with the tiny model's tokenizer."""
    shutil.copytree(
        tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    config = getattr(transformers, TEXT.get(kind, f"{kind}Config"))(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Path] = {}

    def model(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "model"
            made[kind] = write(folder, tiny_model, kind, {**SLIDING, **UNFIT}[kind])
        return made[kind]

    return model


def long_rows() -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Three prompts with two replies each, most of them longer than the window."""
    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 448) for _ in range(count))

    prompts = [prompt for prompt in map(tokens, (20, 9, 30)) for _ in range(2)]
    return prompts, [tokens(count) for count in (40, 24, 30, 33, 5, 21)]


def own_reading(folder: Path, auto: Any) -> Any:
    """The model as transformers loads and runs it, on one row at a time and without masks."""
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", SLIDING)
def test_logprobs_of_models_that_slide_a_window_are_those_of_each_reply_alone(make, kind):
    folder, (prompts, replies) = make(kind), long_rows()
    found = reply_logprobs(
        TokenLogprobs(load_causal_model(folder, "float32")),
        prompts,
        replies,
        temperature=1.0,
        pad_id=0,
        budget_tokens=2048,
    )
    model = own_reading(folder, transformers.AutoModelForCausalLM)
    for prompt, reply, logprobs in zip(prompts, replies, found, strict=True):
        with torch.no_grad():
            logits_LV = model(torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0]
        log_TV = torch.log_softmax(logits_LV[len(prompt) - 1 : -1], dim=-1)
        wanted_T = log_TV.gather(1, torch.tensor(reply)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), wanted_T, atol=1e-4, rtol=1e-4)


def hidden(model: Any, after: int, tokens: tuple[int, ...]) -> Tensor:
    """The state after so many layers, of one row, shape (L, H)."""
    taken: list[Tensor] = []
    hook = model.layers[after - 1].register_forward_hook(
        lambda _, args, output: taken.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        last_LH = model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
    hook.remove()
    return last_LH if after == len(model.layers) else taken[0][0]


@pytest.mark.parametrize("kind", SLIDING)
def test_features_of_models_that_slide_a_window_are_those_of_each_reply_alone(make, kind):
    """Frozen ones, and those of trained layers above a cut: each layer has its own kind's mask."""
    folder, rows = make(kind), list(zip(*long_rows(), strict=True))
    families = [Family(3, "mean"), Family(1, "last"), Family(1, "mean", "own")]
    trunk = Trunk(
        folder,
        families,
        dtype="float32",
        max_tokens=128,
        batch_tokens=2048,
        own={"own": TopLayers(folder, 1, 4, "float32")},
    )
    found_NFH = trunk.features(rows)
    model = own_reading(folder, transformers.AutoModel)
    for (prompt, reply), found_FH in zip(rows, found_NFH, strict=True):
        states = {after: hidden(model, after, prompt + reply)[len(prompt) :] for after in (1, 3, 4)}
        wanted_FH = torch.stack([states[3].mean(dim=0), states[1][-1], states[4].mean(dim=0)])
        torch.testing.assert_close(found_FH, wanted_FH, atol=1e-4, rtol=1e-3)


def test_a_window_counts_positions_and_not_columns(make):
    """By hand: a prompt of three, replies of two and two, a window of three."""
    model: Any = load_backbone(make("Mistral"), "float32")
    model.config.sliding_window = 3
    [mask_1LL] = attention_mask(model, collate([Row((5, 6, 7), ((8, 9), (10, 11)), (0, 1))], 0))
    assert mask_1LL[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        # The second reply sees of the prompt what the first one sees.
        [0, 1, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 1, 1],
    ]


def test_only_models_with_layers_of_several_kinds_get_a_mask_for_each(make):
    batch = collate([Row((5, 6, 7), ((8, 9),), (0,))], 0)
    for kind in ("Mistral", "Gemma3"):
        found = attention_mask(load_backbone(make(kind), "float32"), batch)
        assert isinstance(found, dict) == (kind == "Gemma3")
    assert set(found) == {"sliding_attention", "full_attention"}


# Refused


@pytest.mark.parametrize("load", [load_causal_model, load_backbone])
@pytest.mark.parametrize("kind", UNFIT)
def test_a_model_that_reads_packed_rows_otherwise_is_refused_in_one_sentence(make, kind, load):
    with pytest.raises(ModelError, match=rf"cannot be used: {kind}\w* (reads|has)") as caught:
        load(make(kind), "bfloat16" if kind == "Lfm2" else "float32")
    assert "\n" not in str(caught.value)


def test_a_window_that_a_models_code_sees_otherwise_is_refused(make, monkeypatch):
    """The trial is of windows too, however long they are: they are shortened for it."""
    model: Any = load_backbone(make("Mistral"), "float32")
    model.config.sliding_window = 4096
    require_packable(model, Path("here"))
    assert model.config.sliding_window == 4096
    monkeypatch.setattr("models.masks._view", lambda config, layer_type: ("all", 0))
    with pytest.raises(ModelError, match="otherwise than each alone"):
        require_packable(model, Path("here"))
    assert model.config.sliding_window == 4096


def test_a_trial_leaves_weights_and_precision_as_they_are(make):
    model = load_backbone(make("Gemma3"), "bfloat16")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    require_packable(model, Path("here"))
    after = model.state_dict()
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_model_is_far_within_the_tolerance_and_loaded_in_either_precision(
    tiny_model, dtype
):
    assert packing_error(load_backbone(tiny_model, "float32")) < TOLERANCE / 100
    load_causal_model(tiny_model, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model_is_loaded_in_either_precision(dtype):
    load_backbone(resolve_model("embedded"), dtype)


# Several kinds of input


@pytest.fixture(scope="module")
def multimodal(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 with an eye."""
    folder = tmp_path_factory.mktemp("multimodal") / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config*"))
    config = transformers.Gemma3Config(
        text_config=HEADS | MIXED,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_of_a_model_with_eyes_the_text_part_is_the_trunk(multimodal):
    assert layers_at(multimodal, 0.5) == 2
    trunk = Trunk(
        multimodal,
        [Family(2, "mean")],
        dtype="float32",
        max_tokens=128,
        batch_tokens=2048,
    )
    rows = list(zip(*long_rows(), strict=True))
    model = own_reading(multimodal, transformers.AutoModel).language_model
    for (prompt, reply), found_1H in zip(rows, trunk.features(rows), strict=True):
        wanted_H = hidden(model, 2, prompt + reply)[len(prompt) :].mean(dim=0)
        torch.testing.assert_close(found_1H[0], wanted_H, atol=1e-4, rtol=1e-3)
    assert trunk.width == 32
    TopLayers(multimodal, 2, 4, "float32")
    assert Critic(load_causal_model(multimodal, "float32"), None).head.in_features == 32


class Blind(transformers.PreTrainedConfig):
    """No text backbone: nothing says how many layers there are."""

    model_type = "blind"


class TwoTongued(transformers.PreTrainedConfig):
    model_type = "two_tongued"

    def get_text_config(self, **_: Any) -> transformers.PreTrainedConfig:
        raise ValueError("Multiple valid text configs were found in the model config")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Blind(), "Blind has no text backbone that is known: it lacks num_hidden_layers"),
        (Blind(num_hidden_layers=2), "Blind has no text backbone that is known: it lacks hidden"),
        (TwoTongued(), "TwoTongued has several text backbones"),
    ],
)
def test_a_configuration_without_a_text_backbone_is_a_model_error(config, reason):
    with pytest.raises(ModelError, match=reason):
        text_config(config)


def test_an_unknown_architecture_has_no_depths(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        layers_at(tmp_path, 0.5)
