"""Packed rows: which replies share a row, which rows share a batch, and what each token sees."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.packing import MAX_ROW_TOKENS, Row, collate, micro_batches, pack, padded_tokens

PAD = 0
LAYOUTS = pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "flush"])


def tokens(count: int, start: int = 1) -> tuple[int, ...]:
    return tuple(range(start, start + count))


def row(prompt: int, *replies: int, index: int = 0) -> Row:
    """A row of the given lengths."""
    indices = tuple(range(index, index + len(replies)))
    return Row(tokens(prompt), tuple(tokens(length) for length in replies), indices)


# Which replies share a row


def test_neighbours_with_one_prompt_share_a_row():
    a, b = (1, 2), (1, 2, 3)
    rows = pack([a, a, b, a], [(5,), (6, 7), (8,), (9,)])
    assert rows == [
        Row(a, ((5,), (6, 7)), (0, 1)),
        Row(b, ((8,),), (2,)),
        Row(a, ((9,),), (3,)),
    ]
    assert [row.length for row in rows] == [5, 4, 3]


def test_lists_and_tuples_are_the_same_prompt():
    assert len(pack([[1, 2], (1, 2)], [[3], (4,)])) == 1


def test_a_row_is_filled_up_to_its_limit_and_no_further():
    prompt = tokens(4)
    rows = pack([prompt] * 4, [tokens(3)] * 4, max_row_tokens=10)
    assert [row.indices for row in rows] == [(0, 1), (2, 3)]
    rows = pack([prompt] * 4, [tokens(3)] * 4, max_row_tokens=9)
    assert [row.indices for row in rows] == [(0,), (1,), (2,), (3,)]


def test_a_reply_over_the_limit_has_a_row_of_its_own():
    prompt = tokens(4)
    rows = pack([prompt] * 3, [tokens(2), tokens(50), tokens(2)], max_row_tokens=10)
    assert [row.indices for row in rows] == [(0,), (1,), (2,)]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 400)), max_size=30),
    st.sampled_from([1, 100, MAX_ROW_TOKENS]),
)
def test_every_reply_is_in_one_row_in_the_order_given(pairs, limit):
    prompts = [tokens(3, start=10 * which + 1) for which, _ in pairs]
    replies = [tokens(length) for _, length in pairs]
    rows = pack(prompts, replies, max_row_tokens=limit)
    assert [index for row in rows for index in row.indices] == list(range(len(pairs)))
    for row_ in rows:
        assert [prompts[index] for index in row_.indices] == [row_.prompt] * len(row_.replies)
        assert [replies[index] for index in row_.indices] == list(row_.replies)
        assert row_.length <= limit or len(row_.replies) == 1


def test_as_many_prompts_as_replies_are_wanted():
    with pytest.raises(ValueError, match="zip"):
        pack([(1,)], [(2,), (3,)])


# Which rows share a batch


def test_the_longest_rows_come_first():
    rows = [row(2, 2, index=0), row(9, 9, index=1), row(5, 5, index=2)]
    batches = micro_batches(rows, 1000)
    assert [[row.length for row in batch] for batch in batches] == [[18, 10, 4]]


def test_rows_of_one_length_stay_in_order():
    rows = [row(3, 3, index=index) for index in range(5)]
    batches = micro_batches(rows, 12)
    assert [[row.indices[0] for row in batch] for batch in batches] == [[0, 1], [2, 3], [4]]


def test_a_row_over_the_budget_has_a_batch_of_its_own():
    rows = [row(10, 90, index=0), row(4, 4, index=1), row(4, 4, index=2)]
    batches = micro_batches(rows, 20)
    assert [[row.indices[0] for row in batch] for batch in batches] == [[0], [1, 2]]


LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=25)


@LAYOUTS
@given(LENGTHS, st.integers(1, 300))
def test_every_row_is_in_one_batch(aligned, lengths, budget):
    rows = [row(prompt, reply, index=i) for i, (prompt, reply) in enumerate(lengths)]
    batches = micro_batches(rows, budget, aligned=aligned)
    assert Counter(row for batch in batches for row in batch) == Counter(rows)
    assert all(batches)


@LAYOUTS
@given(LENGTHS, st.integers(1, 300))
def test_no_batch_pads_to_more_than_the_budget(aligned, lengths, budget):
    rows = [row(prompt, reply, index=i) for i, (prompt, reply) in enumerate(lengths)]
    for batch in micro_batches(rows, budget, aligned=aligned):
        padded = collate(batch, PAD, aligned=aligned).input_ids_BL.numel()
        assert padded == padded_tokens(batch, aligned=aligned)
        assert padded <= budget or len(batch) == 1


def test_a_batch_is_filled_by_what_it_pads_to_in_its_own_layout():
    # Flush, the rows of 10 pad to 20; aligned, to 8 + 9 columns of 2 rows.
    rows = [row(8, 2, index=0), row(1, 9, index=1)]
    assert [len(batch) for batch in micro_batches(rows, 20, aligned=False)] == [2]
    assert [len(batch) for batch in micro_batches(rows, 33)] == [1, 1]
    assert [len(batch) for batch in micro_batches(rows, 34)] == [2]


# What stands where, and who sees what

GROUPS = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


def numbered_rows(groups) -> list[Row]:
    """Rows in which every token is another number, so that a token tells where it comes from."""
    rows, index, token = [], 0, 1
    for prompt, replies in groups:
        parts = []
        for length in [prompt, *replies]:
            parts.append(tokens(length, token))
            token += length
        rows.append(Row(parts[0], tuple(parts[1:]), tuple(range(index, index + len(replies)))))
        index += len(replies)
    return rows


@LAYOUTS
@given(GROUPS)
def test_every_reply_token_is_found_and_is_predicted_from_its_predecessor(aligned, groups):
    rows = numbered_rows(groups)
    batch = collate(rows, PAD, aligned=aligned)
    kept = batch.input_ids_BL[:, -batch.kept_columns :].flatten()
    n = 0
    for row_ in rows:
        for reply, index in zip(row_.replies, row_.indices, strict=True):
            length = len(reply)
            assert batch.indices[n] == index
            assert tuple(batch.reply_ids_NT[n, :length].tolist()) == reply
            assert batch.reply_mask_NT[n].tolist() == [
                t < length for t in range(batch.reply_ids_NT.shape[1])
            ]
            assert tuple(kept[batch.columns_NT[n, :length]].tolist()) == reply
            before = (row_.prompt[-1], *reply[:-1])
            assert tuple(kept[batch.predictors_NT[n, :length]].tolist()) == before
            n += 1
    assert n == len(batch.indices)


@LAYOUTS
@given(GROUPS)
def test_a_token_sees_its_prompt_and_its_own_reply_up_to_itself_and_nothing_else(aligned, groups):
    rows = numbered_rows(groups)
    batch = collate(rows, PAD, aligned=aligned)
    for b, row_ in enumerate(rows):
        ids = batch.input_ids_BL[b].tolist()
        # By token, and so padding, which is token 0, would be seen in the set.
        seen = {
            token: {
                ids[key] for key in range(len(ids)) if batch.mask_B1LL[b, 0, ids.index(token), key]
            }
            for token in ids
            if token != PAD
        }
        positions = dict(zip(ids, batch.position_ids_BL[b].tolist(), strict=True))
        for reply in ((), *row_.replies):
            alone = [*row_.prompt, *reply]
            for place, token in enumerate(alone):
                assert seen[token] == set(alone[: place + 1])
                assert positions[token] == place


@LAYOUTS
def test_no_token_sees_padding(aligned):
    batch = collate(numbered_rows([(2, [3]), (6, [1, 1])]), PAD, aligned=aligned)
    real_BL = batch.input_ids_BL != PAD
    padding_seen_BLL = batch.mask_B1LL[:, 0] & real_BL.unsqueeze(2) & ~real_BL.unsqueeze(1)
    assert not padding_seen_BLL.any()
    assert batch.mask_B1LL.dtype == torch.bool


def test_aligned_replies_of_all_rows_begin_in_one_column():
    batch = collate([row(2, 3), row(7, 1, 1)], 99)
    assert batch.kept_columns == 4
    starts = batch.columns_NT[:, 0] % batch.kept_columns
    assert starts.tolist() == [1, 1, 2]
    assert batch.input_ids_BL.tolist() == [
        [99, 99, 99, 99, 99, 1, 2, 1, 2, 3],
        [1, 2, 3, 4, 5, 6, 7, 1, 1, 99],
    ]


def test_flush_rows_are_padded_on_the_right_alone():
    batch = collate([row(2, 3), row(7, 1, 1)], 99, aligned=False)
    assert batch.input_ids_BL.tolist() == [
        [1, 2, 1, 2, 3, 99, 99, 99, 99],
        [1, 2, 3, 4, 5, 6, 7, 1, 1],
    ]
    assert batch.kept_columns == 9
    assert batch.columns_NT[:, 0].tolist() == [2, 9 + 7, 9 + 8]
    assert batch.predictors_NT[:, 0].tolist() == [1, 9 + 6, 9 + 6]


@given(GROUPS)
def test_the_flush_layout_pads_to_the_longest_row_and_never_to_more_than_the_aligned_one(groups):
    rows = numbered_rows(groups)
    flush = padded_tokens(rows, aligned=False)
    assert flush == len(rows) * max(row_.length for row_ in rows)
    assert flush <= padded_tokens(rows)
