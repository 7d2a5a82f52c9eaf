"""Whether this machine can hold what a run wants, asked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from cluster.memory import free_memory
from models.precision import resolve_dtype
from models.sources import resolve_model
from models.weight_files import weight_shapes
from rlhf.config import PPOSection, RLConfig
from rlhf.errors import ResourceError

_GIB = 2**30
_PROCESS_GIB = 0.7
"""Resident size of an actor with torch imported and nothing loaded, measured."""


def memory_estimate_gib(models: Sequence[Path], config: RLConfig) -> float:
    """Memory on CPU that a run wants, in GiB: weights, optimiser, cache, processes.

    Activations come on top; they are bounded by `learner.micro_batch_tokens`.
    """
    parameters = [_parameters(folder) for folder in models]
    policy, reference = parameters[0], parameters[-1]
    engine = policy * _width(config.rollout.dtype)
    # Weights, gradients, two moments in float32; one copy on the wire. Of an adapter all that comes
    # on top of the frozen weights is small.
    learner = policy * (4 if config.policy.lora else 16 + _width(config.rollout.dtype))
    algorithm = config.rl.algorithm
    if isinstance(algorithm, PPOSection) and algorithm.critic.model is not None:
        learner += 16 * _parameters(resolve_model(algorithm.critic.model))
    cluster = config.cluster
    # The reward trunk, taken to be of the policy's size, in the wider precision.
    references = 0 if config.learner_is_reference else cluster.reference.actors
    frozen = reference * _width(config.reference.dtype) * references
    frozen += policy * 4 * cluster.reward.actors
    processes = 2 + cluster.learner.actors + cluster.reward.actors + references
    # An engine is the actor and the process that runs the model.
    processes += 2 * cluster.rollout.actors
    caches = max(1, round(config.rollout.kv_cache_gib)) * cluster.rollout.actors
    return (
        (engine * cluster.rollout.actors + learner + frozen) / _GIB
        + caches
        + processes * _PROCESS_GIB
    )


def require_memory(models: Sequence[Path], config: RLConfig) -> None:
    """Refuse a run that would not fit into this machine's free memory.

    Only where everything computes on the CPU of one machine: elsewhere Ray places by resources.

    Raises:
        ResourceError: names what is wanted and what is free.
    """
    import os

    if config.cluster.rollout.gpus or config.cluster.learner.gpus or "RAY_ADDRESS" in os.environ:
        return
    wanted = memory_estimate_gib(models, config)
    free = free_memory() / _GIB
    if wanted > free:
        raise ResourceError(
            f"about {wanted:.1f} GiB of memory are wanted and {free:.1f} are free; take a smaller "
            "policy.model, less rollout.kv_cache_gib, or another machine"
        )


def _parameters(folder: Path) -> float:
    """Parameters of a model folder, from the size of its weights and their precision."""
    return float(sum(math.prod(shape) for shape in weight_shapes(folder).values()))


def _width(dtype: str) -> int:
    return 2 if resolve_dtype(dtype) == "bfloat16" else 4
