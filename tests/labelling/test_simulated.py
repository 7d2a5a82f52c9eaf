"""The simulated assessor: the rule by hand, and noise as it says."""

from __future__ import annotations

import math

import pytest

from labelling.simulated import SOURCE, Answer, SimulatedAssessor, rule
from rlhf.records import Message, Prompt

EGG = "How do I boil an egg without cracking the shell?"
"""Its content words: boil, cracking, shell (egg is short, without is a stop word)."""
GOOD = "Start in cold water and boil gently, so cracking the shell is rare."


def parts(prompt: str, answer: str) -> float:
    """The rule without the point for an ending."""
    value = rule(prompt, answer, finished=False)
    if value:
        assert rule(prompt, answer, finished=True) == pytest.approx(value + 1)
    return value


@pytest.mark.parametrize(
    ("prompt", "answer", "score"),
    [
        # on topic 3/3, no loop 1, plain 1/2, substance 1/2
        (EGG, GOOD, 1 + 1 + 0.5 + 0.5),
        # on topic 1/3; three words are one trigram, and too few
        (EGG, "Just boil it.", 1 / 3 + 1 + 0.5),
        # two words have no trigram, so none repeats
        (EGG, "Boil it.", 1 / 3 + 1 + 0.5),
        # off topic
        (EGG, "I like the colour blue more than any other colour.", 1 + 0.5 + 0.5),
        # nine words make seven trigrams, three of them distinct
        (EGG, "boil it now boil it now boil it now", 1 / 3 + 3 / 7 + 0.5 + 0.5),
        # of seven characters two are not ASCII
        (EGG, "boil éé", 1 / 3 + 1 + 0.5 * 5 / 7),
        # a line break is plain text, a tab is not
        (EGG, "boil\nit", 1 / 3 + 1 + 0.5),
        (EGG, "boil\tit", 1 / 3 + 1 + 0.5 * 6 / 7),
        # words of a kind: five letters decide
        (EGG, "It cracked; shells do.", 2 / 3 + 1 + 0.5),
        # a question without content words is always on topic
        ("Why is it so?", "No idea.", 1 + 1 + 0.5),
        # of five content words three are enough
        ("Name pasta, bread, water, onion and garlic", "Pasta, bread, water", 1 + 1 + 0.5),
        # exactly eight words
        ("Why?", "one two three four five six seven eight", 1 + 1 + 0.5 + 0.5),
        ("Why?", "one two three four five six seven", 1 + 1 + 0.5),
    ],
)
def test_the_rule_by_hand(prompt, answer, score):
    assert parts(prompt, answer) == pytest.approx(score)


@pytest.mark.parametrize("answer", ["", " ", "...", "你好", "🙂🙂"])
def test_an_answer_without_words_is_worth_nothing_finished_or_not(answer):
    assert rule(EGG, answer, finished=False) == rule(EGG, answer, finished=True) == 0


def test_the_best_answer_has_four_points():
    assert rule(EGG, GOOD, finished=True) == pytest.approx(4)


# Verdicts


def prompt(name: str) -> Prompt:
    return Prompt(name, (Message("system", "Be brief."), Message("user", EGG)))


def prefers_first(noise: float, first: Answer, second: Answer, draws: int = 2000) -> float:
    """Share of prompts on which the first answer is chosen."""
    assessor = SimulatedAssessor(noise, seed=0)
    pairs = [assessor.compare(prompt(f"p{i}"), first, second) for i in range(draws)]
    return sum(pair.chosen == first.text for pair in pairs) / draws


@pytest.mark.parametrize("noise", [0.25, 0.5, 2.0])
def test_the_worse_answer_is_chosen_as_often_as_the_noise_says(noise):
    # The rule says 4 and 10/3: one of three topics is missing.
    better = Answer(GOOD, True)
    worse = Answer("Start in cold water and boil gently, so the shell is rare.", True)
    difference = rule(EGG, better.text, finished=True) - rule(EGG, worse.text, finished=True)
    assert difference == pytest.approx(1 / 3)
    expected = 1 / (1 + math.exp(-difference / noise))
    # 2,000 draws: a standard deviation of at most 0.011; four of them.
    assert prefers_first(noise, better, worse) == pytest.approx(expected, abs=0.045)
    assert prefers_first(noise, worse, better) == pytest.approx(1 - expected, abs=0.045)


def test_equal_answers_by_the_rule_are_a_coin_toss():
    one, other = Answer("Boil it.", True), Answer("Crack it.", False)
    assert rule("Why?", one.text, finished=True) == rule("Why?", other.text, finished=True)
    share = prefers_first(0.5, one, Answer("Boil me.", True))
    assert share == pytest.approx(0.5, abs=0.045)


@pytest.mark.parametrize("noise", [0.1, 0.005, 1e-6])
def test_hardly_any_noise_is_the_rule_itself_on_either_side(noise):
    good, bad = Answer(GOOD, True), Answer("...", False)
    assert prefers_first(noise, good, bad, draws=50) == 1
    assert prefers_first(noise, bad, good, draws=50) == 0


def test_the_same_pair_always_gets_the_same_verdict_and_another_seed_another_one():
    first, second = Answer("Boil it.", True), Answer("Boil me.", True)

    def verdicts(seed: int) -> list[str]:
        return [
            SimulatedAssessor(0.5, seed).compare(prompt(f"p{i}"), first, second).chosen
            for i in range(64)
        ]

    assert verdicts(0) == verdicts(0)
    assert verdicts(0) != verdicts(1)
    backwards = SimulatedAssessor(0.5, 0)
    late = [backwards.compare(prompt(f"p{i}"), first, second).chosen for i in range(63, -1, -1)]
    assert late[::-1] == verdicts(0)


def test_a_verdict_carries_the_conversation_the_ends_and_that_it_is_simulated():
    good, bad = Answer(GOOD, True), Answer("...", False)
    pair = SimulatedAssessor(0.1, 0).compare(prompt("p"), bad, good)
    assert pair.prompt == prompt("p").messages
    assert (pair.chosen, pair.rejected) == (good.text, bad.text)
    assert (pair.chosen_finished, pair.rejected_finished) == (True, False)
    assert (pair.label, pair.weight) == (1.0, 1.0)
    assert pair.source == SOURCE
    assert "simulated" in SOURCE
