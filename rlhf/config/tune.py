"""`pavlov tune`: what is searched, for how long, and how the winner is judged."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlhf.config.section import Section
from rlhf.config.sft import SFTConfig


class TuneSection(Section):
    """The search."""

    trials: Annotated[int, Field(ge=2)] = 8
    """Settings that are tried."""
    concurrent: PositiveInt = 1
    """Trials at once, as far as the cluster has room."""
    learning_rate: Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: [1e-6, 3e-4]
    )
    """Least and largest learning rate; drawn evenly in its logarithm."""
    epochs: Annotated[list[PositiveInt], Field(min_length=1)] = Field(default_factory=lambda: [1])
    """Choices of passes over the conversations."""
    batch_conversations: Annotated[list[PositiveInt], Field(min_length=1)] = Field(
        default_factory=lambda: [8, 16, 32]
    )
    """Choices of the batch."""
    lora_rank: Annotated[list[NonNegativeInt], Field(min_length=1)] = Field(
        default_factory=lambda: [0]
    )
    """Choices of an adapter's rank, at the alpha / rank of `policy.lora`; 0: as `policy.lora` says,
    which is all weights where it is not there."""
    grace: PositiveInt = 2
    """Evaluations after the start's that every trial gets."""
    reduction: Annotated[int, Field(ge=2)] = 2
    """One in so many of the trials that came this far goes on (successive halving)."""
    final_prompts: Annotated[int, Field(ge=2)] = 100
    """Prompts that no trial saw, on which the winner meets the median trial."""

    @model_validator(mode="after")
    def _the_range_is_one(self) -> Self:
        low, high = self.learning_rate
        if low >= high:
            raise ValueError(
                f"tune.learning_rate = [{low:g}, {high:g}]: the first must be the smaller"
            )
        return self


class TuneConfig(SFTConfig):
    """`pavlov tune`: supervised fine-tuning, and what is searched."""

    tune: TuneSection = TuneSection()
    """The search; it sets `learner.learning_rate`, `sft.epochs`, `sft.batch_conversations` and
    `policy.lora.rank`."""

    @model_validator(mode="after")
    def _trials_side_by_side_with_a_thread_each(self) -> Self:
        if self.tune.concurrent > 1 and self.cluster.cpu_layout == "turns":
            raise ValueError(
                f'cluster.cpu_layout = "turns" with tune.concurrent = {self.tune.concurrent}: '
                'trials compute side by side; set cluster.cpu_layout = "threads", or leave it out'
            )
        return self
