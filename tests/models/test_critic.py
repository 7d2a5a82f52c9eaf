"""The critic reads the state before each token, in a packed row as when the reply stands alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.critic import Critic
from models.loading import load_backbone, load_causal_model
from models.logprobs import TokenLogprobs
from models.packing import collate, pack

PROMPTS = [(5, 6, 7), (5, 6, 7), (9,)]
REPLIES = [(11, 12), (13,), (14, 15, 16)]


@pytest.fixture(params=["on the policy", "of its own"])
def module(request: pytest.FixtureRequest, tiny_model: Path) -> TokenLogprobs:
    policy = load_causal_model(tiny_model, "float32")
    critic = Critic(policy, tiny_model if request.param == "of its own" else None)
    torch.manual_seed(0)
    nn.init.normal_(critic.head.weight)
    return TokenLogprobs(policy, critic)


def values(module: TokenLogprobs, chosen: list[int]) -> list[Tensor]:
    rows = pack([PROMPTS[n] for n in chosen], [REPLIES[n] for n in chosen])
    batch = collate(rows, pad_id=0)
    found_NT = module(batch, 1.0)[2]
    assert found_NT is not None
    return [found_NT[batch.indices.index(n), : len(REPLIES[c])] for n, c in enumerate(chosen)]


def test_packed_rows_give_what_each_reply_gives_alone(module: TokenLogprobs) -> None:
    together = values(module, [0, 1, 2])
    for n, found in enumerate(together):
        torch.testing.assert_close(found, values(module, [n])[0], atol=1e-5, rtol=1e-4)


def test_it_is_the_head_on_the_backbones_last_state_before_the_token(
    module: TokenLogprobs, tiny_model: Path
) -> None:
    tokens = torch.tensor([[*PROMPTS[0], *REPLIES[0]]])
    state = load_backbone(tiny_model, "float32")(tokens).last_hidden_state[0]
    assert isinstance(module.critic, Critic)
    # Positions 2 and 3 stand before the two tokens of the reply.
    expected = module.critic.head(state[2:4]).squeeze(-1)
    torch.testing.assert_close(values(module, [0])[0], expected, atol=1e-5, rtol=1e-4)


def test_it_starts_at_zero_and_its_gradient_reaches_the_states_that_it_reads(
    tiny_model: Path,
) -> None:
    policy = load_causal_model(tiny_model, "float32")
    fresh = TokenLogprobs(policy, Critic(policy, None))
    assert not any(found.any() for found in values(fresh, [0, 1, 2]))
    nn.init.ones_(fresh.critic.head.weight)  # type: ignore[union-attr,arg-type]
    sum(found.sum() for found in values(fresh, [0, 2])).backward()  # type: ignore[union-attr]
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for name, parameter in policy.named_parameters()
        if "layers" in name
    )


def test_without_a_critic_nothing_is_estimated(tiny_model: Path) -> None:
    module = TokenLogprobs(load_causal_model(tiny_model, "float32"))
    assert module(collate(pack(PROMPTS, REPLIES), pad_id=0), 1.0)[2] is None
