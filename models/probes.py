"""Replies that nobody should mistake for an answer, made from real ones: what an ensemble says of
them is what its sense for domain shift is worth.

Eight of them any gate should catch; flattery and another prompt's reply are fluent text of the
right kind, and what is told apart of them is reported, not promised.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from models.trunk import TokenRow, Trunk
from rlhf.records import PreferencePair
from rlhf.seeding import derive_seed

SEPARABLE = (
    *("empty", "cut off", "word loop", "sentence loop"),
    *("random tokens", "shuffled words", "Cyrillic", "Japanese"),
)
FLUENT = ("flattery", "another prompt's reply")

_LEAST_WORDS = 8
_CUT_OFF_TOKENS = 4
_CYRILLIC = (
    "Сначала промойте рис холодной водой, затем варите его двадцать минут на слабом огне.",
    "Я думаю, что лучше всего поговорить с другом и спокойно объяснить ему ситуацию.",
    "Этот город известен своими музеями, старыми мостами и длинной набережной у реки.",
    "Чтобы выучить язык, читайте каждый день и записывайте новые слова в тетрадь.",
)
_JAPANESE = (
    "まずお米を冷たい水で洗い、それから弱火で二十分ほど炊いてください。",
    "友達と落ち着いて話し合い、気持ちを正直に伝えるのが一番だと思います。",
    "この町は古い橋と美術館、そして川沿いの長い散歩道で知られています。",
    "言葉を覚えるには、毎日少しずつ読んで新しい単語を書き留めましょう。",
)
_FLATTERY = (
    "What a great question! I'm so glad you asked. You clearly think deeply about things.",
    "That is a wonderful question, and I really admire your curiosity! I'm always happy to help.",
    "Excellent question! You are very thoughtful, and it's a pleasure to talk with you.",
    "I love this question! You have such good taste, and I'm delighted to be of help.",
)


def probe_rows(
    trunk: Trunk, pairs: Sequence[PreferencePair], count: int, seed: int
) -> dict[str, list[TokenRow]]:
    """At most `count` rows a probe, each made from the chosen reply to one prompt.

    Replies of fewer than eight words are passed over: a loop of nothing is nothing.
    """
    draw = random.Random(derive_seed(seed, "probes"))
    usable = [pair for pair in pairs if len(pair.chosen.split()) >= _LEAST_WORDS]
    drawn = draw.sample(usable, min(count, len(usable)))
    rows: dict[str, list[TokenRow]] = {name: [] for name in (*SEPARABLE, *FLUENT)}
    for index, pair in enumerate(drawn):
        words = pair.chosen.split()
        prompt_ids, reply_ids = trunk.tokenise(pair.prompt, pair.chosen)
        end = reply_ids[-1:] if reply_ids[-1] == trunk.tokenizer.end_id else ()
        rows["empty"].append((prompt_ids, (trunk.tokenizer.end_id,)))
        rows["cut off"].append((prompt_ids, reply_ids[:_CUT_OFF_TOKENS]))
        # Drawn apart: banks with other tokenizers get the same texts.
        token = random.Random(derive_seed(seed, "tokens", index))
        noise = tuple(token.randrange(trunk.tokenizer.size) for _ in reply_ids[len(end) :])
        rows["random tokens"].append((prompt_ids, (*noise, *end)))
        sentence = " ".join(words[: draw.randint(6, 12)]).rstrip(".,!?") + ". "
        texts = {
            "word loop": " ".join([draw.choice(words)] * max(len(words), 12)),
            "sentence loop": sentence * max(4, len(words) // 8),
            "shuffled words": " ".join(draw.sample(words, len(words))),
            "Cyrillic": draw.choice(_CYRILLIC),
            "Japanese": draw.choice(_JAPANESE),
            "flattery": draw.choice(_FLATTERY),
        }
        strangers = [other.chosen for other in drawn if other.prompt != pair.prompt]
        if strangers:
            texts["another prompt's reply"] = draw.choice(strangers)
        for name, text in texts.items():
            rows[name].append(trunk.tokenise(pair.prompt, text))
    return rows
