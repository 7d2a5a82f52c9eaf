"""Probes: each is what its name says, and the same again under the same seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from models.probes import FLUENT, SEPARABLE, probe_rows
from models.trunk import Family, Trunk
from rlhf.records import Message, PreferencePair

WORDS = ["use", "enough", "water", "and", "stir", "the", "rice", "once", "or", "twice"]


def pair(number: int, words: int) -> PreferencePair:
    text = " ".join(f"{word}{number}" for word in WORDS[:words])
    return PreferencePair((Message("user", f"Question {number}?"),), text, "No.")


@pytest.fixture(scope="module")
def trunk(tiny_model: Path) -> Trunk:
    family = Family(1, "last")
    return Trunk(tiny_model, [family], dtype="float32", max_tokens=512, batch_tokens=512)


def test_each_probe_is_what_its_name_says(trunk):
    pairs = [pair(n, 10) for n in range(6)]
    rows = probe_rows(trunk, pairs, 4, seed=0)
    assert list(rows) == [*SEPARABLE, *FLUENT]
    assert {len(found) for found in rows.values()} == {4}
    end = trunk.tokenizer.end_id
    texts = {name: [trunk.tokenizer.decode(r) for _, r in found] for name, found in rows.items()}
    replies = {p.chosen: p for p in pairs}
    assert all(reply == (end,) for _, reply in rows["empty"])
    assert all(len(reply) == 4 and end not in reply for _, reply in rows["cut off"])
    assert all(len(set(text.split())) == 1 for text in texts["word loop"])
    for text in texts["sentence loop"]:
        sentences = [part for part in text.split(". ") if part.strip(". ")]
        assert max(Counter(sentences).values()) >= 3
    wanted = sorted(sorted(chosen.split()) for chosen in replies)
    for text in texts["shuffled words"]:
        assert sorted(text.split()) in wanted
        assert text not in replies
    for name, found in (("another prompt's reply", texts["another prompt's reply"]),):
        for (prompt, _), text in zip(rows[name], found, strict=True):
            own = trunk.tokenise(replies[text].prompt, text)[0]
            assert prompt != own


def test_probes_are_the_same_under_a_seed_and_others_under_another(trunk):
    pairs = [pair(n, 10) for n in range(6)]
    assert probe_rows(trunk, pairs, 4, 0) == probe_rows(trunk, pairs, 4, 0)
    assert probe_rows(trunk, pairs, 4, 0) != probe_rows(trunk, pairs, 4, 1)


def test_replies_of_a_few_words_make_no_probes(trunk):
    rows = probe_rows(trunk, [pair(n, 3) for n in range(6)] + [pair(7, 9)], 4, 0)
    assert {len(found) for found in rows.values()} == {1}
    assert all(not found for found in probe_rows(trunk, [pair(0, 2)], 4, 0).values())
