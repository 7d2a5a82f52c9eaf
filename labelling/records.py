"""What passes between the store, quality control, aggregation and files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from rlhf.records import Message

Verdict = Literal["a", "b", "tie", "bad"]
"""Answer a is better, answer b is, they are equally good, both are bad."""

Kind = Literal["person", "simulated", "model"]
"""What an assessor is. Verdicts of different kinds are never counted together."""

VERDICTS: tuple[Verdict, ...] = ("a", "b", "tie", "bad")
CRITERIA = ("helpful", "honest", "harmless")
"""What is asked beside `rlhf.records.OVERALL` where a project does not say."""


PREFERS_A: dict[Verdict, float] = {"a": 1.0, "b": 0.0, "tie": 0.5, "bad": 0.5}
"""How much of a win for answer a a verdict is."""


def flipped(verdict: Verdict) -> Verdict:
    """The verdict with the two answers in the other order."""
    turned: dict[Verdict, Verdict] = {"a": "b", "b": "a"}
    return turned.get(verdict, verdict)


def _require_no_nul(*texts: str) -> None:
    # PostgreSQL keeps no such text.
    if any("\x00" in text for text in texts):
        raise ValueError("text with a NUL character")


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply and who gave it: a model, and the checkpoint or weight version it had."""

    text: str
    model: str = ""
    checkpoint: str = ""
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Honeypot:
    """The known verdict on a pair, and why: written by an expert, shown to those who miss it."""

    verdict: Verdict
    explanation: str = ""


@dataclass(frozen=True, slots=True)
class Work:
    """A pair to be judged. `priority` is higher for what training has flagged."""

    prompt: tuple[Message, ...]
    a: Answer
    b: Answer
    source: str = ""
    priority: float = 0.0
    honeypot: Honeypot | None = None

    def __post_init__(self) -> None:
        if not self.a.text.strip() or not self.b.text.strip():
            raise ValueError("empty reply")
        if self.a.text.strip() == self.b.text.strip():
            raise ValueError("equal replies")
        for each in (self.a, self.b):
            _require_no_nul(each.text, each.model, each.checkpoint)
        explanation = self.honeypot.explanation if self.honeypot else ""
        _require_no_nul(self.source, explanation, *(turn.content for turn in self.prompt))


@dataclass(frozen=True, slots=True)
class Judgement:
    """One assessor's verdicts on a pair, and how they came about.

    `verdicts` has `rlhf.records.OVERALL` and any criteria that were asked. `first` is the answer
    that was shown first ("" where it is not known), `seconds` the time taken (nan where it is not
    known), `at` when it was given (seconds since 1970; 0 where it is not known). `truth` is the
    known overall verdict where the pair is a honeypot. `repeat`: the assessor had judged the pair
    before, in the other order. `doubt` says why it is not counted ("" where it is). `models` gave
    answers a and b ("" where it is not known): those of `work` where there is work, so that
    verdicts without texts compare models too. `id` is the assignment's in the store.
    """

    pair: str
    assessor: str
    verdicts: dict[str, Verdict]
    first: Literal["a", "b", ""] = ""
    seconds: float = math.nan
    at: float = 0.0
    kind: Kind = "person"
    truth: Verdict | None = None
    repeat: bool = False
    words: tuple[int, int] = (0, 0)
    models: tuple[str, str] = ("", "")
    comment: str = ""
    doubt: str = ""
    work: Work | None = field(default=None, repr=False)
    id: str = ""

    def __post_init__(self) -> None:
        _require_no_nul(self.pair, self.assessor, self.comment, self.doubt, self.id)
        _require_no_nul(*self.models, *self.verdicts)
        if self.work is not None:
            object.__setattr__(self, "models", (self.work.a.model, self.work.b.model))


@dataclass(frozen=True, slots=True)
class SoftLabel:
    """What all judges of a pair say together: the probability that answer a is the better one, the
    pair's share of a loss, and how many judges that rests on."""

    a_better: float
    weight: float = 1.0
    judges: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.a_better <= 1:
            raise ValueError(f"probability {self.a_better} outside 0 to 1")
