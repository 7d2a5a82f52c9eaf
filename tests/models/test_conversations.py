"""Conversations as tokens: what is learnt, in every layout, against a hand-made tokenisation."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.chat import ChatTokenizer
from models.conversations import Example, examples_of, learnt_mask, rows_of
from models.loading import load_causal_model
from models.logprobs import TokenLogprobs
from models.packing import collate, micro_batches
from models.preferences import read_conversations
from rlhf.losses import BatchSize, reduce_tokens
from rlhf.records import Conversation, Message

TWO_TURNS = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "Is rice good?"),
        Message("assistant", "Yes."),
        Message("user", "Why?"),
        Message("assistant", "It fills you."),
    )
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_model)


def test_the_assistants_turns_are_learnt_with_their_ends_and_nothing_else(tokenizer):
    [found] = examples_of(TWO_TURNS, tokenizer)
    text = "".join(tokenizer._tokenizer.convert_ids_to_tokens(list(found.token_ids)))
    learnt = tokenizer._tokenizer.convert_ids_to_tokens(
        [token for token, wanted in zip(found.token_ids, found.learnt, strict=True) if wanted]
    )
    end = tokenizer._tokenizer.convert_ids_to_tokens([tokenizer.end_id])[0]
    spoken = "".join(learnt).replace("Ġ", " ")
    assert spoken == f"Yes.{end}It fills you.{end}"
    assert text.count(end) >= 2
    # By hand: the template's text before each reply is read, the reply is learnt.
    first = tokenizer.prompt_ids(TWO_TURNS.messages[:2])
    second = tokenizer.prompt_ids(TWO_TURNS.messages[:4])
    replies = [tokenizer.reply_ids(m, finished=True) for m in ("Yes.", "It fills you.")]
    gap = len(second) - len(first) - len(replies[0])
    assert found.token_ids == (*second, *replies[1])
    assert found.learnt == (
        *[False] * len(first),
        *[True] * len(replies[0]),
        *[False] * gap,
        *[True] * len(replies[1]),
    )


class Rewriting:
    """A tokenizer whose template drops what the assistant said before."""

    def prompt_ids(self, messages):
        return tuple(len(m.content) for m in messages if m.role != "assistant")

    def reply_ids(self, text, *, finished):
        return (100 + len(text), 1)


def test_a_template_that_rewrites_the_past_makes_an_example_of_every_turn():
    assert examples_of(TWO_TURNS, Rewriting()) == [
        Example((9, 13, 104, 1), (False, False, True, True)),
        Example((9, 13, 4, 113, 1), (False, False, False, True, True)),
    ]


EXAMPLES = [
    Example((5, 6, 7, 8, 9), (False, False, True, False, True)),
    Example((10, 11, 12), (False, True, True)),
    Example((13, 14, 15, 16, 17, 18, 19), (False, True, False, False, True, True, True)),
    Example((20, 21), (False, True)),
]


@pytest.fixture(scope="module")
def module(tiny_model: Path) -> TokenLogprobs:
    return TokenLogprobs(load_causal_model(tiny_model, "float32"))


def loss_and_gradient(
    module: TokenLogprobs, examples: list[Example], *, packing: bool, budget: int
) -> tuple[float, dict[str, Tensor]]:
    count = sum(example.count for example in examples)
    size = BatchSize(len(examples), count, 1)
    module.zero_grad()
    total = 0.0
    for rows in micro_batches(
        rows_of(examples, packing=packing, budget_tokens=budget), budget, aligned=not packing
    ):
        batch = collate(rows, 0, aligned=not packing)
        logprobs_NT = module(batch, 1.0)[0]
        loss = -reduce_tokens(logprobs_NT, learnt_mask(examples, batch), "token", size)
        loss.backward()
        total += float(loss.detach())
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    return total, gradients


@pytest.mark.parametrize("budget", [1, 12, 1000])
@pytest.mark.parametrize("packing", [True, False])
def test_every_layout_gives_the_loss_and_gradient_of_examples_alone(module, packing, budget):
    found, gradients = loss_and_gradient(module, EXAMPLES, packing=packing, budget=budget)
    count = sum(example.count for example in EXAMPLES)
    expected, sums = 0.0, dict.fromkeys(gradients, torch.zeros(()))
    for example in EXAMPLES:
        module.zero_grad()
        tokens = torch.tensor([example.token_ids])
        log_TV = torch.log_softmax(module.model(tokens).logits[0].float(), dim=-1)
        picked = [
            log_TV[t - 1, token]
            for t, (token, wanted) in enumerate(
                zip(*(example.token_ids, example.learnt), strict=True)
            )
            if wanted
        ]
        loss = -torch.stack(picked).sum() / count
        loss.backward()
        expected += float(loss.detach())
        sums = {name: sums[name] + p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    assert found == pytest.approx(expected, abs=1e-5)
    for name, wanted in sums.items():
        torch.testing.assert_close(gradients[name], wanted, atol=1e-5, rtol=1e-4, msg=name)


def test_a_row_of_packed_examples_is_no_longer_than_it_may_be():
    many = [
        Example(tuple(range(n)), (False,) * (n - 1) + (True,)) for n in (300, 400, 200, 700, 90)
    ]
    rows = rows_of(many, packing=True, budget_tokens=2048)
    assert sorted(index for row in rows for index in row.indices) == list(range(5))
    # 700 is longer than a row and stands alone; 400 + 200 and 300 + 90 share one.
    assert [row.length for row in rows] == [700, 600, 390]


def test_conversations_of_every_form_are_read_and_bad_ones_are_named_by_line(tmp_path):
    path = tmp_path / "talk.jsonl"
    user, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    rows = [
        {"messages": [user, said]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "chosen": "Hello", "rejected": ""},
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
            "rejected": "\n\nHuman: Hi\n\nAssistant: No",
        },
        {"messages": [{"role": "system", "content": "Be brief."}]},
        {"messages": [user, said, user]},
        {"messages": [user, {"role": "assistant", "content": " "}]},
        {"prompt": "Hi", "completion": ""},
        {"messages": [said]},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello\n"},
        {"prompt": "Human: Hi\n\nAssistant:", "completion": " Hello"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, [report] = read_conversations([path])
    expected = (Message("user", "Hi"), Message("assistant", "Hello"))
    assert [(line, item.messages) for line, _, item in found] == [
        (line, expected) for line in (1, 2, 3, 4, 10)
    ]
    assert [(bad.line, bad.reason) for bad in report.bad] == [
        (5, "conversation without an assistant turn"),
        (6, "conversation that does not end in an assistant turn"),
        (7, "empty reply"),
        (8, "empty reply"),
        (9, "prompt that does not end in a user turn"),
        (11, "prompt that ends in Assistant: but does not start with a blank line and Human:"),
    ]


def test_the_better_reply_of_a_pair_is_learnt_and_no_end_where_it_was_cut_off(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "No", "chosen_finished": False}
    rows = [
        pair,
        {**pair, "label": 0.2},
        {**pair, "label": 0.5},
        {**pair, "weight": 0},
        {**pair, "label": 2},
        {"prompt": "Hi", "completion": "Hello", "finish_reason": "length"},
        {"prompt": "Hi", "completion": "Hello", "finished": True},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, [report] = read_conversations([path])
    learnt = {}
    for line, _, conversation in found:
        [example] = examples_of(conversation, tokenizer)
        ended = example.token_ids[-1] == tokenizer.end_id
        learnt[line] = (conversation.messages[-1].content, ended)
    assert learnt == {
        1: ("Hello", False),
        2: ("No", True),
        6: ("Hello", False),
        7: ("Hello", True),
    }
    assert [(bad.line, bad.reason) for bad in report.bad] == [
        (3, "tie: neither reply is better"),
        (4, "weight 0"),
        (5, "label that is not between 0 and 1"),
    ]


def test_a_row_of_packed_examples_keeps_to_the_tokens_that_a_pass_may_hold():
    many = [Example(tuple(range(30)), (False,) * 29 + (True,)) for _ in range(6)]
    rows = rows_of(many, packing=True, budget_tokens=64)
    assert [row.length for row in rows] == [60, 60, 60]
