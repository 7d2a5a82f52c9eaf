"""Whether this machine can hold what a run wants, asked before anything starts."""

from __future__ import annotations

import math
from pathlib import Path

from cluster.memory import free_memory
from models.precision import resolve_dtype
from models.sources import resolve_model
from models.weight_files import weight_shapes
from rlhf.config import ClusterSection, PPOSection, RLConfig, RolloutSection, SFTConfig
from rlhf.errors import ResourceError

_GIB = 2**30
_PROCESS_GIB = 0.7
"""Resident size of an actor with torch imported and nothing loaded, measured."""


def rl_memory_gib(policy: Path, reference: Path, config: RLConfig) -> float:
    """Memory on CPU that `pavlov rl` wants, in GiB: weights, optimiser, cache, processes.

    Activations come on top; they are bounded by `learner.micro_batch_tokens`.
    """
    learner = _learner(policy, config.rollout, lora=config.policy.lora is not None)
    algorithm, cluster = config.rl.algorithm, config.cluster
    if isinstance(algorithm, PPOSection) and algorithm.critic.model is not None:
        learner += 16 * _parameters(resolve_model(algorithm.critic.model))
    references = 0 if config.learner_is_reference else cluster.reference.actors
    learner += _parameters(reference) * _width(config.reference.dtype) * references
    processes = cluster.learner.actors + references
    return (
        learner / _GIB + processes * _PROCESS_GIB + _judges(policy, config.rollout, config.cluster)
    )


def sft_memory_gib(policy: Path, config: SFTConfig, *, concurrent: int = 1) -> float:
    """The same of `pavlov sft`, or of so many trainings around one engine and one ensemble."""
    learner = _learner(policy, config.rollout, lora=config.policy.lora is not None)
    processes = config.cluster.learner.actors
    return concurrent * (learner / _GIB + processes * _PROCESS_GIB) + _judges(
        policy, config.rollout, config.cluster
    )


def _learner(policy: Path, rollout: RolloutSection, *, lora: bool) -> float:
    """Bytes of weights, gradients and two moments in float32, and of a copy on the wire. Of an
    adapter all that comes on top of the frozen weights is small."""
    return _parameters(policy) * (4 if lora else 16 + _width(rollout.dtype))


def _judges(policy: Path, rollout: RolloutSection, cluster: ClusterSection) -> float:
    """GiB of the engines with their caches, of the ensembles, and of the driver and Ray.

    The reward trunk is taken to be of the policy's size, in the wider precision.
    """
    engines, ensembles = cluster.rollout.actors, cluster.reward.actors
    weights = _parameters(policy) * (_width(rollout.dtype) * engines + 4 * ensembles)
    # An engine is the actor and the process that runs the model.
    processes = 2 + 2 * engines + ensembles
    return weights / _GIB + max(1, round(rollout.kv_cache_gib)) * engines + processes * _PROCESS_GIB


def require_memory(wanted_gib: float, cluster: ClusterSection) -> None:
    """Refuse a run that would not fit into this machine's free memory.

    Only where everything computes on the CPU of one machine: elsewhere Ray places by resources.

    Raises:
        ResourceError: names what is wanted and what is free.
    """
    import os

    if cluster.rollout.gpus or cluster.learner.gpus or "RAY_ADDRESS" in os.environ:
        return
    free_gib = free_memory() / _GIB
    if wanted_gib > free_gib:
        raise ResourceError(
            f"about {wanted_gib:.1f} GiB of memory are wanted and {free_gib:.1f} are free; take a "
            "smaller policy.model, less rollout.kv_cache_gib, or another machine"
        )


def _parameters(folder: Path) -> float:
    """Parameters of a model folder, from the size of its weights and their precision."""
    return float(sum(math.prod(shape) for shape in weight_shapes(folder).values()))


def _width(dtype: str) -> int:
    return 2 if resolve_dtype(dtype) == "bfloat16" else 4
