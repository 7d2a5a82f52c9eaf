"""Probes: each is what its name says, and the same again under the same seed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from models.probes import FLUENT, SEPARABLE, probe_rows
from models.trunk import Family, Trunk
from rlhf.records import Message, PreferencePair
from rlhf.text_checks import text_flags

WORDS = ["use", "enough", "water", "and", "stir", "the", "rice", "once", "or", "twice"]


def pair(number: int, words: int) -> PreferencePair:
    text = " ".join(f"{word}{number}" for word in WORDS[:words])
    return PreferencePair((Message("user", f"Question {number}?"),), text, "No.")


PAIRS = [pair(n, 10) for n in range(6)]


@pytest.fixture(scope="module")
def trunk(tiny_model: Path) -> Trunk:
    family = Family(1, "last")
    return Trunk(tiny_model, [family], dtype="float32", max_tokens=512, batch_tokens=512)


def test_each_probe_is_what_its_name_says(trunk):
    rows = probe_rows(trunk, PAIRS, 4, seed=0)
    assert list(rows) == [*SEPARABLE, *FLUENT]
    assert {len(found) for found in rows.values()} == {4}
    end = trunk.tokenizer.end_id
    texts = {name: [trunk.tokenizer.decode(r) for _, r in found] for name, found in rows.items()}
    replies = {p.chosen: p for p in PAIRS}
    assert all(reply == (end,) for _, reply in rows["empty"])
    assert all(len(reply) == 4 and end not in reply for _, reply in rows["cut off"])
    assert all(len(set(text.split())) == 1 for text in texts["word loop"])
    for text in texts["sentence loop"]:
        sentences = [part for part in text.split(". ") if part.strip(". ")]
        assert max(Counter(sentences).values()) >= 4
    wanted = sorted(sorted(chosen.split()) for chosen in replies)
    for text in texts["shuffled words"]:
        assert sorted(text.split()) in wanted
        assert text not in replies
    other = "another prompt's reply"
    for (prompt, _), text in zip(rows[other], texts[other], strict=True):
        assert prompt != trunk.tokenise(replies[text].prompt, text)[0]


def test_loops_say_words_of_the_reply_over_and_over(trunk):
    rows = probe_rows(trunk, PAIRS, 6, seed=1)
    own = {trunk.tokenise(p.prompt, p.chosen)[0]: p.chosen.split() for p in PAIRS}
    for prompt, reply in rows["word loop"]:
        said = trunk.tokenizer.decode(reply).split()
        assert len(said) >= 12
        assert said[0] in own[prompt]
    for prompt, reply in rows["sentence loop"]:
        first, *others = trunk.tokenizer.decode(reply).split(". ")
        assert first.split() == own[prompt][: len(first.split())]
        assert 6 <= len(first.split()) <= 12
        assert len(others) >= 3
        assert all(first.startswith(other.strip().rstrip(".")) for other in others)


def test_random_tokens_are_as_many_as_the_reply_has_and_end_as_it_does(trunk):
    rows = probe_rows(trunk, PAIRS, 6, seed=0)
    own = {
        trunk.tokenise(p.prompt, p.chosen)[0]: trunk.tokenise(p.prompt, p.chosen)[1] for p in PAIRS
    }
    for prompt, reply in rows["random tokens"]:
        assert len(reply) == len(own[prompt])
        assert reply[-1] == own[prompt][-1] == trunk.tokenizer.end_id
        same = sum(a == b for a, b in zip(reply[:-1], own[prompt][:-1], strict=True))
        assert same <= 3
        assert all(0 <= token < trunk.tokenizer.size for token in reply)
    assert len({reply for _, reply in rows["random tokens"]}) == 6


def test_random_tokens_in_place_of_a_reply_that_the_limit_cuts_have_no_end(tiny_model):
    # A reply that the limit cuts has no end, and neither have random tokens in its place.
    short = Trunk(tiny_model, [Family(1, "last")], dtype="float32", max_tokens=32, batch_tokens=512)
    rows = probe_rows(short, PAIRS, 3, seed=0)
    own = dict(short.tokenise(p.prompt, p.chosen) for p in PAIRS)
    assert all(len(reply) == 32 - len(prompt) for prompt, reply in rows["random tokens"])
    # Not even the token that the reply happens to be cut at.
    assert any(reply[-1] != own[prompt][-1] for prompt, reply in rows["random tokens"])
    assert all(len(reply) == 4 for _, reply in rows["cut off"])


@pytest.mark.parametrize(
    ("probe", "script"),
    [("Cyrillic", "[\u0410-\u0451]"), ("Japanese", "[\u3040-\u30ff\u4e00-\u9fff]")],
)
def test_other_scripts_are_what_they_are_called(trunk, probe, script):
    for _, reply in probe_rows(trunk, PAIRS, 6, seed=0)[probe]:
        letters = [c for c in trunk.tokenizer.decode(reply) if c.isalpha()]
        assert len(letters) > 20
        assert all(re.match(script, letter) for letter in letters)


def test_flattery_is_what_the_text_check_takes_for_it(trunk):
    found = probe_rows(trunk, PAIRS, 6, seed=0)["flattery"]
    assert all("flattery" in text_flags(trunk.tokenizer.decode(reply)) for _, reply in found)


def test_probes_are_the_same_under_a_seed_and_others_under_another(trunk):
    assert probe_rows(trunk, PAIRS, 4, 0) == probe_rows(trunk, PAIRS, 4, 0)
    assert probe_rows(trunk, PAIRS, 4, 0) != probe_rows(trunk, PAIRS, 4, 1)


def test_replies_of_a_few_words_make_no_probes(trunk):
    rows = probe_rows(trunk, [pair(n, 3) for n in range(6)] + [pair(7, 9)], 4, 0)
    # A prompt that stands alone has no other's reply.
    assert not rows.pop("another prompt's reply")
    assert {len(found) for found in rows.values()} == {1}
    assert all(not found for found in probe_rows(trunk, [pair(0, 2)], 4, 0).values())


def test_no_prompt_gets_its_own_reply_for_anothers(trunk):
    same = [replace(pair(0, 10), chosen=f"{pair(0, 10).chosen} {n}") for n in range(5)]
    alone = probe_rows(trunk, same, 5, 0)
    assert not alone["another prompt's reply"]
    assert len(alone["word loop"]) == 5
    rows = probe_rows(trunk, [*same, pair(1, 10)], 6, 0)["another prompt's reply"]
    own = {trunk.tokenise(p.prompt, p.chosen) for p in [*same, pair(1, 10)]}
    assert len(rows) == 6
    assert not own & {(tuple(a), tuple(b)) for a, b in rows}
