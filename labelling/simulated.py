"""The demo's *simulated* assessor: a published rule with noise in the place of a person.

Nothing here is human judgement, and everything made with it says "simulated". The rule rewards
what anyone can check in a short answer of an assistant. The reward model never sees the rule, only
the comparisons; the final comparison uses the rule, which took no part in training.

| part       | points | what                                                                |
|------------|--------|---------------------------------------------------------------------|
| finished   | 1      | the answer ends by itself and not at the token limit                |
| on topic   | 0 … 1  | share of the question's content words (at most 3 count) that it has |
| no loop    | 0 … 1  | share of its word trigrams that are distinct                        |
| plain text | 0 … 0.5| share of characters that are printable ASCII                        |
| substance  | 0.5    | at least eight words                                                |

P(first preferred) = sigmoid((rule(first) - rule(second)) / noise).
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from rlhf.records import PreferencePair, Prompt
from rlhf.seeding import derive_seed

SOURCE = "simulated-assessor"
_WORD = re.compile(r"[a-z0-9']+")
_STOP_WORDS = frozenset(
    """
    about above after again also always another because been before being best better between
    both could does doing down during each every find from give good have having help here into
    just keep know like make many maybe more most much must need never only other over please
    quick same should simple small some someone something such suggest tell than that their them
    then there these they thing things think this those through using very want what when where
    which while will with without word words would write your
    """.split()  # noqa: SIM905 - a list of words reads best as words
)
_TOPIC_WORDS = 3


def rule(prompt: str, answer: str, *, finished: bool) -> float:
    """The rule's score of an answer, between 0 and 4."""
    words = _WORD.findall(answer.lower())
    if not words:
        return 0.0
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    distinct = len(set(trigrams)) / len(trigrams) if trigrams else 1.0
    plain = sum(c.isascii() and (c.isprintable() or c == "\n") for c in answer) / len(answer)
    return (
        float(finished)
        + _on_topic(prompt, words)
        + distinct
        + 0.5 * plain
        + 0.5 * (len(words) >= 8)
    )


def _on_topic(prompt: str, words: list[str]) -> float:
    content = {w for w in _WORD.findall(prompt.lower()) if len(w) >= 4 and w not in _STOP_WORDS}
    if not content:
        return 1.0
    stems = {word[:5] for word in words}
    hits = sum(word[:5] in stems for word in content)
    return min(hits, _TOPIC_WORDS) / min(len(content), _TOPIC_WORDS)


@dataclass(frozen=True, slots=True)
class Answer:
    """A candidate answer to a prompt."""

    text: str
    finished: bool


class SimulatedAssessor:
    """Compares two answers by `rule`, with the noise of a hurried person."""

    def __init__(self, noise: float, seed: int) -> None:
        self._noise = noise
        self._seed = seed

    def compare(self, prompt: Prompt, first: Answer, second: Answer) -> PreferencePair:
        """The verdict as a preference pair; the same pair always gets the same verdict."""
        question = prompt.messages[-1].content
        difference = rule(question, first.text, finished=first.finished) - rule(
            question, second.text, finished=second.finished
        )
        draw = random.Random(derive_seed(self._seed, SOURCE, prompt.id, first.text, second.text))
        # The sigmoid by tanh: an exponential would overflow where there is hardly any noise.
        prefers_first = draw.random() < 0.5 + 0.5 * math.tanh(difference / self._noise / 2)
        chosen, rejected = (first, second) if prefers_first else (second, first)
        return PreferencePair(
            prompt.messages,
            chosen.text,
            rejected.text,
            source=SOURCE,
            chosen_finished=chosen.finished,
            rejected_finished=rejected.finished,
        )
