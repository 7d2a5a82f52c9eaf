"""Rewards of one's own: plain functions beside the ensemble, named in `rl.rewards`.

A function takes prompts and completions (records, one prompt for each completion) and returns a
finite number for each completion::

    # brevity.py, in the folder that `pavlov rl` is called from, or installed on every node
    def short(prompts, completions):
        return [-float(len(completion.text)) for completion in completions]

    [[rl.rewards]]
    name = "short"
    function = "brevity:short"
    weight = 0.01
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any

from rlhf.config import RewardFunction
from rlhf.errors import RewardFunctionError
from rlhf.records import Completion, Prompt


class RewardFunctions:
    """The functions that the settings name, loaded.

    Raises:
        RewardFunctionError: one cannot be imported or is not a function.
    """

    def __init__(self, settings: Sequence[RewardFunction]) -> None:
        self._functions = {own.name: (own.function, _load(own.function)) for own in settings}

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> dict[str, list[float]]:
        """What each says of every completion, by name.

        Raises:
            RewardFunctionError: one fails, or returns something else than a number for each.
        """
        return {
            name: _asked(where, function, prompts, completions)
            for name, (where, function) in self._functions.items()
        }


def _load(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        # An installed command does not look where it is called from.
        sys.path.append(here)
    try:
        function = getattr(import_module(module), name)
    except Exception as error:
        raise RewardFunctionError(
            f"reward function {where} cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    if not callable(function):
        raise RewardFunctionError(f"reward function {where} is no function but {function!r:.60}")
    return function  # type: ignore[no-any-return]


def _asked(
    where: str,
    function: Callable[..., Any],
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
) -> list[float]:
    try:
        values = list(function(prompts, completions))
    except Exception as error:
        raise RewardFunctionError(
            f"reward function {where} failed: {type(error).__name__}: {error}"
        ) from error
    if len(values) != len(completions):
        raise RewardFunctionError(
            f"reward function {where} returned {len(values)} rewards for {len(completions)} "
            "completions"
        )
    for value, completion in zip(values, completions, strict=True):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RewardFunctionError(
                f"reward function {where} returned {value!r:.60} for {completion.text!r:.60}; a "
                "finite number is needed"
            )
    return [float(value) for value in values]
