"""Logprobs, entropy and gradients on packed rows are those of every reply computed alone."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.loading import load_causal_model
from models.logprobs import TokenLogprobs, reply_logprobs
from models.packing import PackedBatch, collate, micro_batches, pack
from rlhf.errors import ModelError

PAD = 0
Case = tuple[list[tuple[int, ...]], list[tuple[int, ...]]]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def module(request: pytest.FixtureRequest, tiny_model: Path) -> TokenLogprobs:
    return TokenLogprobs(load_causal_model(tiny_model, "float32", attention=request.param))


@pytest.fixture(scope="module")
def any_module(tiny_model: Path) -> TokenLogprobs:
    return TokenLogprobs(load_causal_model(tiny_model, "float32"))


def random_case(seed: int) -> Case:
    """Prompts with one to four replies each, of one to a dozen tokens."""
    draw = random.Random(seed)
    prompts, replies = [], []
    for _ in range(4):
        prompt = tuple(draw.randrange(3, 448) for _ in range(draw.randint(1, 15)))
        for _ in range(draw.randint(1, 4)):
            prompts.append(prompt)
            replies.append(tuple(draw.randrange(3, 448) for _ in range(draw.randint(1, 12))))
    return prompts, replies


def alone(
    module: TokenLogprobs, prompt: tuple[int, ...], reply: tuple[int, ...], temperature: float
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropy of a reply's tokens by the plain definition, each of shape (T,)."""
    logits_LV = module.model(input_ids=torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0]
    log_TV = torch.log_softmax(logits_LV[len(prompt) - 1 : -1] / temperature, dim=-1)
    logprobs_T = log_TV[torch.arange(len(reply)), torch.tensor(reply)]
    return logprobs_T, -(log_TV.exp() * log_TV).sum(dim=-1)


def packed(
    module: TokenLogprobs,
    case: Case,
    temperature: float,
    budget: int,
    *,
    change: Callable[[PackedBatch], PackedBatch] = lambda batch: batch,
    pad: int = PAD,
) -> list[tuple[Tensor, Tensor]]:
    """The same by packed rows, in the order given."""
    results: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(case[1])
    for rows in micro_batches(pack(*case), budget):
        batch = change(collate(rows, pad))
        logprobs_NT, entropy_NT, _ = module(batch, temperature, True)
        for n, index in enumerate(batch.indices):
            length = len(case[1][index])
            results[index] = logprobs_NT[n, :length], entropy_NT[n, :length]
    return results


def gap(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> float:
    """The largest difference of a logprob."""
    return max(float((a[0] - b[0]).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [1, 80, 10_000])
def test_packed_rows_give_what_each_reply_gives_alone(module, seed, budget):
    case, temperature = random_case(seed), 0.5 + seed / 2
    with torch.no_grad():
        wanted = [alone(module, *pair, temperature) for pair in zip(*case, strict=True)]
        found = packed(module, case, temperature, budget)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def gradients(
    module: TokenLogprobs, results: list[tuple[Tensor, Tensor]], seed: int
) -> dict[str, Tensor]:
    """Of a random weighted sum of all logprobs and entropies."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for logprobs_T, entropy_T in results:
        for values_T in (logprobs_T, entropy_T):
            total = total + (values_T * torch.randn(values_T.shape, generator=generator)).mean()
    module.zero_grad()
    total.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.parametrize("seed", range(2))
def test_gradients_through_packed_rows_are_those_of_each_reply_alone(module, seed):
    case = random_case(seed)
    wanted = gradients(module, [alone(module, *pair, 0.7) for pair in zip(*case, strict=True)], 1)
    found = gradients(module, packed(module, case, 0.7, 120), 1)
    assert len(found) > 15
    assert min(float(gradient.abs().max()) for gradient in wanted.values()) > 1e-4
    torch.testing.assert_close(found, wanted, **CLOSE)


def predicted_one_late(batch: PackedBatch) -> dict[str, Tensor]:
    return {"predictors_NT": (batch.predictors_NT + 1).clamp(max=batch.predictors_NT.max())}


def predicted_one_early(batch: PackedBatch) -> dict[str, Tensor]:
    return {"predictors_NT": (batch.predictors_NT - 1).clamp(min=0)}


def first_tokens_predicted_like_the_others(batch: PackedBatch) -> dict[str, Tensor]:
    return {"predictors_NT": batch.columns_NT - 1}


def replies_one_position_late(batch: PackedBatch) -> dict[str, Tensor]:
    columns = torch.arange(batch.input_ids_BL.shape[1])
    in_replies = columns > len(columns) - batch.kept_columns
    return {"position_ids_BL": batch.position_ids_BL + in_replies}


def replies_that_see_their_siblings(batch: PackedBatch) -> dict[str, Tensor]:
    return {"mask_B1LL": torch.ones_like(batch.mask_B1LL).tril()}


@pytest.mark.parametrize(
    "fault",
    [
        predicted_one_late,
        predicted_one_early,
        first_tokens_predicted_like_the_others,
        replies_one_position_late,
        replies_that_see_their_siblings,
    ],
)
def test_the_comparison_notices_a_packing_that_is_off_by_one(any_module, fault):
    """The proof that the tests above see what they are there to see."""
    case = random_case(0)
    with torch.no_grad():
        wanted = [alone(any_module, *pair, 1.0) for pair in zip(*case, strict=True)]
        found = packed(
            any_module, case, 1.0, 10_000, change=lambda b: dataclasses.replace(b, **fault(b))
        )
    assert gap(found, wanted) > 1e-3


def test_what_stands_in_padding_does_not_matter(module):
    case = random_case(1)
    with torch.no_grad():
        assert (
            gap(packed(module, case, 1.0, 10_000), packed(module, case, 1.0, 10_000, pad=7)) < 1e-6
        )


def test_logprobs_are_of_the_distribution_at_the_temperature(any_module):
    prompt, reply = (5, 6, 7), (8, 9)
    with torch.no_grad():
        logits_TV = any_module.model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0, 2:4]
    [cold] = reply_logprobs(
        any_module, [prompt], [reply], temperature=0.25, pad_id=PAD, budget_tokens=64
    )
    for logits_V, token, logprob in zip(logits_TV, reply, cold, strict=True):
        powers_V = torch.exp(4 * logits_V.double())
        assert logprob == pytest.approx(
            float(torch.log(powers_V[token] / powers_V.sum())), abs=1e-5
        )
    [warm] = reply_logprobs(
        any_module, [prompt], [reply], temperature=1.0, pad_id=PAD, budget_tokens=64
    )
    assert all(abs(a - b) > 1e-2 for a, b in zip(cold, warm, strict=True))


def test_entropy_has_a_gradient_only_where_it_is_asked_for(any_module):
    batch = collate(pack([(5, 6)], [(7, 8)]), PAD)
    assert not any_module(batch, 1.0)[1].requires_grad
    assert any_module(batch, 1.0, True)[1].requires_grad
    assert any_module(batch, 1.0)[0].requires_grad
    torch.testing.assert_close(any_module(batch, 1.0)[1], any_module(batch, 1.0, True)[1])


@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_reply_logprobs_come_in_the_order_given_without_gradients(any_module, budget):
    case = random_case(3)
    results = reply_logprobs(any_module, *case, temperature=1.0, pad_id=PAD, budget_tokens=budget)
    assert [len(logprobs) for logprobs in results] == [len(reply) for reply in case[1]]
    with torch.no_grad():
        for logprobs, *pair in zip(results, *case, strict=True):
            assert logprobs == pytest.approx(alone(any_module, *pair, 1.0)[0].tolist(), abs=1e-5)


# Loading


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_a_model_is_loaded_for_evaluation_in_the_precision_asked_for(tiny_model):
    model = load_causal_model(tiny_model, "bfloat16", attention="eager")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert isinstance(model, nn.Module)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def of_an_unknown_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')


@pytest.mark.parametrize(
    "spoil", [truncated, of_another_shape, without_a_tensor, of_an_unknown_kind]
)
def test_weights_that_do_not_fit_are_a_model_error_in_one_sentence(model_copy, spoil):
    spoil(model_copy)
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_causal_model(model_copy, "float32")
    assert str(model_copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_learner_never_drops_out(tmp_path):
    """Rollouts are sampled without dropout: with it, ratios of the same weights would be noise."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)).save_pretrained(
        tmp_path
    )
    assert json.loads((tmp_path / "config.json").read_text())["resid_pdrop"] == 0.1
    model = load_causal_model(tmp_path, "float32").train()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids).logits)
