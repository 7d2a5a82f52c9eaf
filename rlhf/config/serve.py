"""`pavlov serve`: which assistant answers, how its answers are chosen, and what is refused."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rlhf.config.actors import RolloutSection
from rlhf.config.label import database_url
from rlhf.config.section import Gpus, Port, Section, changed

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ReplicasSection(Section):
    """How many replicas a deployment has, and what each takes."""

    least: PositiveInt = 1
    """Replicas that are always there."""
    most: PositiveInt = 1
    """Replicas at the height of load."""
    cpus: NonNegativeFloat = 0.25
    """CPUs each reserves from Ray."""
    gpus: Gpus = 0
    """GPUs each reserves."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least = {self.least} replicas are more than most = {self.most}")
        return self


class ServeSection(Section):
    """The chat endpoint."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: Port = 8000
    """Port to listen on; 0: one that the system hands out."""
    name: str = "pavlov"
    """What the model is called in /v1/models."""
    system: str | None = None
    """A system turn before conversations that have none."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest conversation."""
    max_tokens: PositiveInt = 512
    """Longest answer, and its length where a request does not say."""
    best_of: PositiveInt = 1
    """Candidates drawn where a request does not say."""
    best_of_limit: PositiveInt = 8
    """Most candidates a request may ask for."""
    disagreement_penalty: NonNegativeFloat = 1.0
    """Times the members' disagreement within families is taken off a candidate's mean reward: the
    lower bound that candidates are ranked by."""
    reject_after: NonNegativeInt = 0
    """Tokens after which candidates that are far behind are given up; 0: none is. What it saves and
    what it costs was measured on short answers alone (docs/serving.md)."""
    reject_margin: NonNegativeFloat = 0.5
    """How far behind: deviations between the most that a beginning may be worth (its reward plus
    the penalty) and the lower bound of the last one that would be sent."""
    patience_s: PositiveFloat = 5.0
    """Seconds that a part of the ensemble is waited for when another has answered; then the members
    that there are judge alone, and the answer says so."""
    domain_shift: Literal["answer", "notice", "decline"] = "answer"
    """What follows where the ensemble does not know the chosen answer's kind: nothing but the mark,
    `notice_text` below it, or `decline_text` in its place."""
    notice_text: str = "(I am less sure of this answer than of most.)"
    """Stands below an answer out of the ensemble's domain."""
    decline_text: str = "I am sorry, but I am not able to give a good answer to this."
    """Stands in the place of an answer out of the ensemble's domain."""
    keys: list[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(default_factory=list)
    """SHA-256 hashes of the API keys that are let in; none: everybody on loopback is."""
    requests_per_minute: PositiveInt = 600
    """Requests of one key or address within a minute."""
    at_once: PositiveInt = 32
    """Requests that are answered at once."""
    waiting: NonNegativeInt = 32
    """Requests that wait; one more is refused with 429."""
    timeout_s: PositiveFloat = 300.0
    """Seconds from a request's admission after which it is given up, whether it waits or is
    answered."""
    feedback: str | None = None
    """A labelling database (as label.database) for what users say of answers; without one nothing
    is asked or kept."""
    feedback_project: str = "feedback"
    """The project in it; made where there is none."""
    ingress: ReplicasSection = ReplicasSection(cpus=0)
    """Where requests arrive."""
    engine: ReplicasSection = ReplicasSection()
    """vLLM engines."""
    scorer: ReplicasSection = ReplicasSection()
    """Copies of each of the ensemble's backbones with its members."""

    @model_validator(mode="after")
    def _best_of_within_its_limit(self) -> Self:
        if self.best_of > self.best_of_limit:
            raise ValueError(
                f"serve.best_of = {self.best_of} with serve.best_of_limit = {self.best_of_limit}: "
                "no request may ask for more than the limit"
            )
        return self

    @model_validator(mode="after")
    def _one_ingress_writes_sqlite(self) -> Self:
        if self.ingress.most > 1 and (self.feedback or "").startswith("sqlite"):
            raise ValueError(
                f"serve.ingress.most = {self.ingress.most} with serve.feedback = "
                f"{self.feedback!r}: SQLite has one server; set most to 1, or feedback to a "
                "PostgreSQL URL"
            )
        return self

    @model_validator(mode="after")
    def _keys_where_others_can_ask(self) -> Self:
        if not self.keys and self.host not in LOOPBACK:
            raise ValueError(
                f"serve.host = {self.host!r} without serve.keys: everybody in reach could ask; "
                "list the SHA-256 of your keys, or listen on 127.0.0.1"
            )
        return self

    @property
    def feedback_url(self) -> str | None:
        """See `database_url`."""
        return None if self.feedback is None else database_url(self.feedback)


class AssistantSection(Section):
    """Who answers."""

    model: str = "embedded"
    """`embedded`, a Hugging Face folder such as `<run>/policy`, or a hub id."""


class ServeConfig(Section):
    """`pavlov serve`."""

    policy: AssistantSection = AssistantSection()
    """The assistant."""
    reward: str | None = None
    """A reward-model folder; without one there is no best-of-N."""
    engine: RolloutSection = RolloutSection()
    """The vLLM engine."""
    serve: ServeSection = ServeSection()
    """The endpoint."""

    @model_validator(mode="after")
    def _best_of_needs_a_judge(self) -> Self:
        if self.reward is None and self.serve.best_of > 1:
            raise ValueError(
                f"serve.best_of = {self.serve.best_of} without reward: the ensemble chooses; set "
                "reward to a reward-model folder"
            )
        if self.reward is None and self.serve.domain_shift != "answer":
            raise ValueError(
                f'serve.domain_shift = "{self.serve.domain_shift}" without reward: the ensemble '
                "tells it; set reward to a reward-model folder"
            )
        return self

    @model_validator(mode="after")
    def _settings_do_something(self) -> Self:
        if self.engine.keep_cache:
            raise ValueError(
                "engine.keep_cache = true: a served engine's weights never change, so that its "
                "cache is kept anyway; leave it out"
            )
        if self.reward is None:
            names = ("reject_after", "reject_margin", "patience_s", "disagreement_penalty")
            for name in changed(self.serve, *names):
                raise ValueError(
                    f"serve.{name} = {getattr(self.serve, name):g} without reward: it is about the "
                    "ensemble; set reward to a reward-model folder, or leave it out"
                )
        if not self.serve.reject_after and changed(self.serve, "reject_margin"):
            raise ValueError(
                f"serve.reject_margin = {self.serve.reject_margin:g} with serve.reject_after = 0: "
                "no candidate is given up; set reject_after, or leave it out"
            )
        return self
