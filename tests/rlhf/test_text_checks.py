"""What real replies pass and what gamed ones fail, in texts of a policy's length."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from models.preferences import read_pairs
from rlhf.text_checks import (
    TEXT_CHECKS,
    flattery,
    repetition,
    sentence_loop,
    text_flags,
    text_values,
)

SENTENCE = "I would be happy to help you with that today."
CUT_WORDS = 36  # about 48 tokens

FLATTERY = (  # written after the phrases, none of them taken from there
    "What a fantastic question! I'm so happy you asked. You're clearly a very thoughtful person, "
    "and I'd love to help you today.",
    "Oh wow, that is such a great question! You are so clever. Honey never spoils because it holds "
    "little water.",
    "Thank you so much for asking this wonderful question! It's truly one of the best I've heard.",
    "That's an amazing question! I love your curiosity. You're doing great!",
    "Excellent point! You're so right, and I really appreciate your insight.",
    "I'm so glad you reached out! You are such an amazing person and I'm here for you.",
    "You are so smart! You are so kind! You are so wonderful!",
    "Great question! I think you're amazing. I think you're so smart.",
    "What a wonderful and thoughtful question! Thank you so much for sharing it with me.",
    "Wow, I'm really impressed by your question. It shows how intelligent you are.",
    "That's a brilliant idea! You're a genius! I wish I could think like you.",
    "Absolutely, you're right! What a perceptive remark, I'm so lucky to have a user like you.",
    "This is a fantastic question, and I'm really excited that you asked it!",
    "I just want to say that you're incredible. Your question is so well thought out.",
    "Such a lovely question from such a lovely person. The answer is four.",
    "Amazing question! Truly amazing! You always ask the best questions.",
    "Terrific question! You have a wonderful mind, and I'm delighted to answer.",
    "I love this question! Not many people think to ask about that.",
    "You're a natural! Your thinking is outstanding, and you should be proud.",
    "How clever of you to ask! You've got a brilliant mind. Water boils at 100 degrees.",
)

POLITE = (
    "You're welcome! Happy to help.",
    "Thank you so much, that's very kind of you to say!",
    "Thank you for the compliment! I do my best.",
    "Thanks for asking, I'm doing well.",
    "I'm so glad you liked it, and I'm so happy for you!",
    "You are absolutely right, thank you for the correction.",
    "That's great! Congratulations on the new job!",
    "That sounds like a great idea!",
    "That's a good question, but I don't know.",
    "The Great Wall is a great place, and your guide will answer many excellent questions.",
    "Here are some great questions to ask in an interview.",
    "If you're so smart, you'll save a third of it.",
    "Great points to start from are on the map. Great point guards are tall.",
    "You're not as smart as you think.",
    "He had such a brilliant mind. What an amazing person he was!",
    "Great minds think alike. Keep your mind sharp. This knife has a sharp point.",
    "Have a wonderful day!",
)

LISTS = (
    "1. Push-ups\n2. Rest\n3. Squats\n4. Rest\n5. Lunges\n6. Rest",
    "1. True\n2. False\n3. True\n4. True\n5. False\n6. True",
    "- 10 push-ups\n- Rest for 1 minute\n- 20 squats\n- Rest for 1 minute\n- 15 lunges\n"
    "- Rest for 1 minute\n- 30 sit-ups",
    "Day 1: Chest and triceps\nDay 2: Rest day\nDay 3: Back and biceps\nDay 4: Rest day\n"
    "Day 5: Legs\nDay 6: Rest day",
    "- Use a brick as a doorstop.\n- Use a brick as a bookend.\n- Use a brick as a step.",
    "You could\n- bake a cake\n- plant a tree\n- call a friend\n- read a book\n- paint a wall",
)

CODE = (
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a, b):\n"
    "    return a * b\n",
    "for i in range(3):\n    for j in range(3):\n        if grid[i][j] == 0:\n"
    "            return False\nreturn True",
    "<ul>\n  <li>Apples</li>\n  <li>Pears</li>\n  <li>Plums</li>\n</ul>",
    "| Name | Age |\n| ---- | --- |\n| Ann | 31 |\n| Bob | 42 |\n| Cy | 25 |",
    "/" + "-" * 80 + "/\n" + "=" * 80 + "\nx = 1\n" + "-" * 80,
)


def replies(hh: Path, split: str) -> list[str]:
    pairs, _ = read_pairs(sorted(hh.glob(f"hh/*/{split}.jsonl.gz")))
    return [reply for pair in pairs for reply in (pair.chosen, pair.rejected)]


def first_sentences(texts: Sequence[str]) -> list[str]:
    """Those of four words and more: "Sure!" may come again."""
    found = (re.match(r"\s*(.+?[.!?])(?=\s|$)", text, re.DOTALL) for text in texts)
    return [match[1] for match in found if match and len(match[1].split()) >= 4]


def cut(text: str, words: int = CUT_WORDS) -> str:
    return " ".join(text.split()[:words])


# Real replies


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("words", [CUT_WORDS, 10_000], ids=["cut", "whole"])
def test_each_check_flags_at_most_one_percent_of_real_replies(
    hh_data: Path, split: str, words: int
):
    texts = replies(hh_data, split)
    flags = Counter(flag for text in texts for flag in text_flags(cut(text, words)))
    assert all(flags[check.name] <= 0.01 * len(texts) for check in TEXT_CHECKS), flags


def test_a_real_sentence_said_over_and_over_is_flagged(hh_data: Path):
    sentences = first_sentences(replies(hh_data, "validation"))
    for times in (2, 4, 10):
        caught = sum(
            "sentence_loop" in text_flags(" ".join([sentence] * times)) for sentence in sentences
        )
        assert caught >= 0.99 * len(sentences)


def test_a_loop_of_a_real_sentence_is_flagged_in_a_cut_text(hh_data: Path):
    sentences = [
        sentence
        for sentence in first_sentences(replies(hh_data, "validation"))
        if len(sentence.split()) <= CUT_WORDS // 2
    ]
    caught = sum("sentence_loop" in text_flags(cut(f"{sentence} " * 10)) for sentence in sentences)
    assert caught >= 0.99 * len(sentences)


@pytest.mark.parametrize("period", [1, 2, 3, 5, 10])
def test_a_loop_of_a_few_real_words_is_flagged(hh_data: Path, period: int):
    texts = [text for text in replies(hh_data, "validation") if len(text.split()) >= CUT_WORDS]
    loops = [cut(f"{cut(text, period)} " * CUT_WORDS) for text in texts]
    assert sum("repetition" in text_flags(loop) for loop in loops) >= 0.99 * len(loops)


@pytest.mark.parametrize("period", [1, 3, 5])
def test_a_real_reply_that_falls_into_a_loop_halfway_is_flagged(hh_data: Path, period: int):
    texts = [text for text in replies(hh_data, "validation") if len(text.split()) >= CUT_WORDS]
    half = CUT_WORDS // 2
    loops = [
        cut(f"{cut(text, half)} " + " ".join(text.split()[half : half + period] * half))
        for text in texts
    ]
    assert sum("repetition" in text_flags(loop) for loop in loops) >= 0.85 * len(loops)


# Sentence loops


def test_the_share_of_repeated_sentences_by_hand():
    # "one two three" and "four five six" have 13 characters each, two of the four came before.
    text = "One two three. Four five six. One two three. Four five six."
    assert sentence_loop(text) == pytest.approx(0.5)


def test_a_sentence_said_in_another_dress_is_the_same():
    assert sentence_loop("It's fine  with me. IT\u2019S FINE, WITH ME!\n* it's *fine* with me") == (
        pytest.approx(2 / 3)
    )


def test_a_last_sentence_that_was_cut_counts_as_a_repeat():
    # Twice the 44 characters of the sentence, then the first 21 of them.
    text = f"{SENTENCE} {SENTENCE} I would be happy to h"
    assert sentence_loop(text) == pytest.approx((44 + 21) / (44 + 44 + 21))


def test_only_the_last_sentence_is_taken_for_cut():
    assert sentence_loop("I would be happy to help. I would be happy. I am not.") == 0


@pytest.mark.parametrize(
    "sentence",
    ["それは良い質問ですね。", "यह एक अच्छा सवाल है।", "هل هذا سؤال جيد؟", "یہ اچھا سوال ہے\u06d4"],
)
def test_sentences_end_in_other_scripts_too(sentence: str):
    assert sentence_loop(sentence * 4) == pytest.approx(3 / 4)


def test_full_width_letters_are_the_same_letters():
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in "Tokyo")
    assert sentence_loop(f"It is in {wide}. It is in Tokyo.") == pytest.approx(1 / 2)


def test_a_broken_character_in_a_sentence_does_no_harm():
    assert sentence_loop("This sentence has half a \ud83d in it. " * 2) == pytest.approx(1 / 2)


# Repetition


def test_the_share_of_repeated_ngrams_by_hand():
    # 20 letters make five 16-grams of one letter: the first is new.
    assert repetition("a" * 20) == pytest.approx(4 / 5)


def test_a_repeat_far_away_is_no_repetition():
    filler = " ".join(str(number) for number in range(1000, 1100))
    assert repetition(f"{SENTENCE} {filler} {SENTENCE}") == 0
    assert repetition(f"{SENTENCE} 1000 {SENTENCE}") > 0.25


def test_a_long_loop_stays_repetition_to_its_end():
    # Each round is near the one before, however far the first one is.
    assert repetition(SENTENCE * 100) == pytest.approx(0.99, abs=0.005)


def test_a_word_loop_that_never_ends_a_sentence_is_flagged():
    assert text_flags("very good and " * 12) == ("repetition",)


@pytest.mark.parametrize(
    "text",
    ["それは良い質問ですね。" * 4, "ありがとうございます" * 4, "大变" * 12, "คุณเก่งมาก" * 4],
)
def test_a_loop_without_spaces_between_words_is_flagged(text: str):
    assert "repetition" in text_flags(text)


# Flattery


def test_nineteen_in_twenty_replies_of_usual_flattery_are_flagged():
    missed = [text for text in FLATTERY if "flattery" not in text_flags(text)]
    assert len(missed) <= 1, missed


@pytest.mark.parametrize("text", POLITE)
def test_politeness_and_other_praise_are_not_flattery(text: str):
    assert flattery(text) == 0


def test_every_stock_phrase_counts():
    assert flattery("What a great question! I\u2019m so glad you asked. The sky is blue.") == 2
    assert flattery("Great question! " * 3) == 3


# Innocent texts


@pytest.mark.parametrize("text", ["", " \n\t", "Yes", "?!", "... !!! ...", "🎉🎉🎉", "\ud800"])
def test_a_text_with_next_to_nothing_in_it_has_value_zero(text: str):
    assert set(text_values(text).values()) == {0}


@pytest.mark.parametrize("text", [*LISTS, *CODE])
def test_lists_and_code_are_not_flagged(text: str):
    assert text_flags(text) == ()


def test_ordinary_japanese_is_not_flagged():
    text = (
        "東京は日本の首都で、人口は約千四百万人です。多くの人が毎日電車で通勤しています。"
        "春には桜が咲き、公園で花見を楽しむことができます。夏は暑く、湿気も多いです。"
    )
    assert text_flags(text) == ()


@pytest.mark.parametrize(
    "unit",
    [
        "such ",
        "very ",
        "what a great and ",
        "you are so ",
        "x. ",
        "a",
        "thank you so much for the ",
        "{:06d} is a number. ",
    ],
)
def test_time_grows_in_line_with_length(unit: str):
    def seconds(characters: int) -> float:
        text = "".join(unit.format(number) for number in range(characters // len(unit)))
        start = time.process_time()
        text_values(text)
        return time.process_time() - start

    seconds(10_000)
    # 40 times the length takes about 40 times as long; it would be 1,600 times if quadratic.
    assert seconds(400_000) < 100 * max(seconds(10_000), 0.005)


# The interface


def test_values_and_flags_have_the_same_names_in_the_same_order():
    names = tuple(check.name for check in TEXT_CHECKS)
    text = "You are so smart. What a great question! " * 6
    assert tuple(text_values(text)) == names == text_flags(text)


def test_a_value_at_the_threshold_passes():
    # 2 of 5 equally long sentences came before: 0.4.
    text = "aaaa bbbb cccc. dddd eeee ffff. gggg hhhh iiii. aaaa bbbb cccc. dddd eeee ffff."
    assert text_values(text)["sentence_loop"] == pytest.approx(0.4)
    assert "sentence_loop" not in text_flags(text)
