"""`pavlov label`: where human judgement is kept, what is asked, and what is done against bugs."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rlhf.config.reading import runs_path
from rlhf.config.section import Fraction, Port, Section

Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


def database_url(database: str) -> str:
    """A database as configured, a relative SQLite file made absolute, the driver named."""
    if match := re.fullmatch(r"sqlite(?:\+\w+)?:///(.+)", database):
        path = match.group(1)
        return f"sqlite:///{path if path == ':memory:' else runs_path(path)}"
    return re.sub(r"^postgres(ql)?://", "postgresql+pg8000://", database)


class AttentionSection(Section):
    """Quality control of assessors."""

    honeypot_share: Share = 0.1
    """Share of tasks whose answer is known; they look like any other."""
    repeat_share: Share = 0.05
    """Share of tasks that the assessor has judged before, shown in the other order."""
    repeat_after: PositiveInt = 10
    """Judgements between a task and its repeat, at least."""
    false_pause_rate: Fraction = 0.03
    """Chance that an attentive assessor is ever paused."""
    spread: NonNegativeFloat = 0.1
    """How much attentive assessors differ in how often they are right: standard deviation of its
    log-odds. Below the truth, the less gifted are paused; above it, spammers stay longer."""
    false_break_rate: Fraction = 0.05
    """Chance that a shift without fatigue is taken for a tired one."""
    review_every: PositiveInt = 20
    """Judgements between two reviews of all assessors of a project; a fiftieth part of all, where
    that is more."""
    feedback: bool = True
    """Whether a missed honeypot is explained at once."""

    @model_validator(mode="after")
    def _leave_room_for_work(self) -> Self:
        if self.honeypot_share + self.repeat_share >= 1:
            raise ValueError(
                f"label.attention.honeypot_share = {self.honeypot_share:g} with repeat_share = "
                f"{self.repeat_share:g}: nothing is left for work"
            )
        return self


class LabelSection(Section):
    """The labelling service."""

    database: str = "sqlite:///labels.db"
    """An SQLAlchemy URL: SQLite (a relative file stands below PAVLOV_RUNS) or PostgreSQL."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: Port = 8100
    """Port to listen on; 0: one that the system hands out."""
    replicas: PositiveInt = 1
    """Server processes; more than one needs PostgreSQL."""
    secure_cookie: bool = False
    """Whether sign-in is for https alone: behind a proxy that speaks it."""
    criteria: list[str] = Field(default_factory=lambda: ["helpful", "honest", "harmless"])
    """What is asked beside the overall verdict."""
    guidelines: str | None = None
    """A Markdown file beside the task, relative to PAVLOV_DATA; default: the shipped ones."""
    judges_per_pair: Annotated[PositiveInt, Field(le=1000)] = 3
    """Assessors who judge each pair, of each kind (person, simulated, model)."""
    expires_s: PositiveFloat = 1800.0
    """Seconds after which a task that was not judged returns to the queue."""
    requests_per_minute: PositiveInt = 120
    """Requests of one token, or sign-ins from one address, within a minute."""
    attention: AttentionSection = AttentionSection()
    """Quality control."""

    @model_validator(mode="after")
    def _one_server_writes_sqlite(self) -> Self:
        if self.replicas > 1 and self.database.startswith("sqlite"):
            raise ValueError(
                f"label.replicas = {self.replicas} with label.database = {self.database!r}: "
                "SQLite has one server; set replicas to 1, or database to a PostgreSQL URL"
            )
        return self

    @model_validator(mode="after")
    def _criteria_are_names(self) -> Self:
        for name in self.criteria:
            if not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name) or name == "overall":
                raise ValueError(
                    f"label.criteria: {name!r} is no name for a criterion: small letters, digits, "
                    "- and _; overall is always asked"
                )
        if len(set(self.criteria)) < len(self.criteria):
            raise ValueError("label.criteria names one twice")
        return self

    @property
    def url(self) -> str:
        """See `database_url`."""
        return database_url(self.database)


class SimulatedSection(Section):
    """`pavlov label judge`: assessors who are no people. Their verdicts say so wherever they go."""

    assessors: PositiveInt = 3
    """How many judge at once."""
    accuracy: Probability = 0.8
    """Chance to be right on a pair, where there is a verdict that is no tie."""
    honeypot_accuracy: Probability = 0.92
    """The same on honeypots."""
    tie_rate: Probability = 0.05
    """Share of ties."""
    position_bias: Annotated[float, Field(ge=-0.5, le=0.5)] = 0.0
    """By how much more often than half the answer shown first is chosen."""
    fatigue_onset: PositiveInt | None = None
    """The judgement from which on they are faster by 40 % and less often right by 0.20."""
    spammers: NonNegativeInt = 0
    """How many of them do not read."""
    spam: Literal["random", "first", "longest", "half-random"] = "random"
    """What those do instead."""
    ties_below: NonNegativeFloat = 0.0
    """A reward model's tie: rewards that differ by less."""


class LabelConfig(Section):
    """`pavlov label`."""

    seed: int = 0
    """Of simulated assessors and of bootstrap intervals; what assessors get is drawn at random."""
    label: LabelSection = LabelSection()
    """The service."""
    simulated: SimulatedSection = SimulatedSection()
    """Judges by program."""
