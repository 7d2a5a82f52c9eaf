"""Every error that Pavlov raises on purpose.

::

    PavlovError
     ├─ UserError            something the user gave can be put right; exit code 2
     │   ├─ ConfigError          a configuration file, a key or a value
     │   ├─ DataError            a data file or its rows
     │   ├─ ModelError           a model folder, a hub id, a reward-model folder
     │   ├─ RewardFunctionError  a reward function of one's own
     │   ├─ RunFolderError       the run folder is busy, relative, or holds another run
     │   ├─ PromotionError       a version that may not, or cannot, become the served one
     │   └─ ResourceError        too few cores, GPUs, or too little memory or disk
     └─ RunError             the run itself could not go on; exit code 1
         ├─ GenerationError      one group could not be generated or scored: data, not a crash
         ├─ StaleWeightsError    an engine was asked to serve before it had the current weights
         ├─ WeightUpdateError    an update was refused; `check` names the check that caught it
         ├─ CheckpointError      a checkpoint is incomplete or belongs to another run
         └─ ActorLostError       an actor died and was not replaced in time

Every one of them crosses Ray, so every constructor argument is kept in ``args``: they survive
pickling unchanged.
"""

from __future__ import annotations


class PavlovError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one clear sentence."""

    exit_code = 1


class UserError(PavlovError):
    """Something the user gave can be put right. The message names the value and the remedy."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration file, a key in it or a value is wrong."""


class DataError(UserError):
    """A data file is missing, unreadable, or holds no usable row."""


class ModelError(UserError):
    """A model folder, hub id or reward-model folder cannot be used."""


class RewardFunctionError(UserError):
    """A reward function of one's own cannot be loaded, failed, or returned no numbers."""


class RunFolderError(UserError):
    """The run folder is busy, relative where it must not be, or holds another run."""


class PromotionError(UserError):
    """A version of the assistant may not, or cannot, become the served one."""


class ResourceError(UserError):
    """The machine or cluster lacks what the configuration asks for."""


class RunError(PavlovError):
    """The run itself could not go on."""


class GenerationError(RunError):
    """One group could not be generated or scored. It becomes a recorded failure."""


class StaleWeightsError(RunError):
    """An engine was asked to serve before it had the current weights."""


class WeightUpdateError(RunError):
    """A weight update was refused.

    Args:
        check: which check caught it: ``version``, ``names``, ``shape``, ``checksum`` or ``probe``.
        detail: what it saw.
    """

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(check, detail)
        self.check = check
        self.detail = detail

    def __str__(self) -> str:
        return f"weight update refused by the {self.check} check: {self.detail}"


class CheckpointError(RunError):
    """A checkpoint is incomplete or belongs to another run."""


class ActorLostError(RunError):
    """An actor died and was not replaced in time."""
