"""The one DeepSpeed wrapper: one backward path, one checkpoint format, one resume."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config import LearnerSection
from rlhf.errors import CheckpointError

_TAG = "deepspeed"


class TrainingEngine:
    """A module under DeepSpeed (ZeRO 0-3), with float32 master weights.

    Every rank builds one. Losses are already normalised over the whole batch, so gradients are
    *summed* over micro-batches and ranks.

    Args:
        module: what is trained; its `forward` is what `run` calls.
        settings: the optimiser.
        dtype: ``float32`` or ``bfloat16``, of the forward and backward pass.
        rank, world_size, master: this process among its peers; `master` is ``host:port``, or None
            where the peers have met already (Ray Train's workers).
        rate_factors: multiples of the learning rate for parameters whose name begins so.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: LearnerSection,
        dtype: str,
        *,
        rank: int = 0,
        world_size: int = 1,
        master: str | None,
        rate_factors: Mapping[str, float] | None = None,
    ) -> None:
        if master is not None:
            host, _, port = master.rpartition(":")
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": host,
                "MASTER_PORT": port,
            }
        import deepspeed

        cuda = torch.cuda.is_available()
        if not cuda:
            _use_gloo_alone()
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
        module = module.float()
        optimiser = torch.optim.AdamW(
            _parameter_groups(module, rate_factors or {}),
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._settings = settings
        self._world_size = world_size
        self._engine, self._optimiser, _, _ = deepspeed.initialize(
            model=module, optimizer=optimiser, config=_deepspeed_config(settings, dtype)
        )
        self._engine.checkpoint_engine = _safe_checkpoint_engine(self._engine.checkpoint_engine)

    @property
    def module(self) -> nn.Module:
        """The module, to be called through `run` wherever gradients are wanted."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return torch.device(self._engine.device)

    def run(self, *args: Any) -> Any:
        """The module's forward pass, through DeepSpeed."""
        return self._engine(*args)

    def step(self, losses: Sequence[Callable[[], Tensor]], step: int) -> float:
        """One optimiser step on the sum of `losses`; returns the gradient norm before clipping.

        Each loss is computed only when its turn comes, so that one micro-batch is in memory at a
        time. Every rank must bring the same number of them. Step 0 starts the warm-up.
        """
        rate = self._settings.learning_rate
        if self._settings.warmup_steps:
            rate *= min(1.0, (step + 1) / self._settings.warmup_steps)
        for group in self._optimiser.param_groups:
            group["lr"] = rate * group["rate_factor"]
        self._engine.train()
        for index, loss in enumerate(losses):
            self._engine.set_gradient_accumulation_boundary(index == len(losses) - 1)
            # DeepSpeed averages over ranks; the losses are shares of a sum.
            self._engine.backward(loss() * self._world_size)
        norm = self._gradient_norm()
        self._engine.step()
        self._engine.eval()
        # Sharded gradients are gone from the parameters: there DeepSpeed knows their norm.
        return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def _gradient_norm(self) -> float | None:
        """Norm of unsharded gradients (ZeRO 0), else None."""
        if self._settings.zero_stage:
            return None
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def weights(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        wanted: Callable[[str], bool] = lambda name: True,
    ) -> Iterator[tuple[str, Tensor]]:
        """Copies of the full parameters whose names are wanted, gathered where ZeRO 3 shards them.

        A collective: every rank must walk through all of them. Tied parameters appear once.
        """
        import deepspeed

        sharded = self._settings.zero_stage == 3
        for name, parameter in self.module.named_parameters():
            if not wanted(name):
                continue
            with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
                yield name, parameter.detach().to(device, dtype, copy=True)

    def save(self, folder: Path) -> None:
        """Write this rank's part of a checkpoint into `folder` (the same for all ranks). What is
        frozen is not in it."""
        self._engine.save_checkpoint(
            str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, folder: Path) -> None:
        """Read a checkpoint that `save` wrote with the same number of ranks.

        Raises:
            CheckpointError: it is not complete or does not fit this model.
        """
        try:
            path, _ = self._engine.load_checkpoint(
                str(folder), tag=_TAG, custom_load_fn=_load_trained
            )
        except (RuntimeError, KeyError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} does not fit this model: {str(error).splitlines()[0]}"
            ) from None
        if path is None:
            raise CheckpointError(f"{folder} holds no checkpoint of this learner")


def _load_trained(src: Mapping[str, Tensor], dst: nn.Module) -> None:
    """Load all that is trained: nothing of it may be missing, and nothing be there beside it."""
    frozen = {name for name, parameter in dst.named_parameters() if not parameter.requires_grad}
    result = dst.load_state_dict(src, strict=False)
    missing = sorted(set(result.missing_keys) - frozen)
    if missing or result.unexpected_keys:
        wrong = [*missing, *result.unexpected_keys]
        raise RuntimeError(f"{len(wrong)} tensors do not match, {wrong[0]} first")


def _use_gloo_alone() -> None:
    """Keep DeepSpeed from compiling its own collective, which takes a C++ compiler and its time.

    Only its tensor-parallel inference calls that one; training goes through gloo anyway.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def _parameter_groups(module: nn.Module, rate_factors: Mapping[str, float]) -> list[dict[str, Any]]:
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        factors = [factor for start, factor in rate_factors.items() if name.startswith(start)]
        groups.setdefault(factors[0] if factors else 1.0, []).append(parameter)
    return [{"params": own, "rate_factor": factor} for factor, own in groups.items()]


def _deepspeed_config(settings: LearnerSection, dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.gradient_clip,
        "zero_optimization": {"stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if dtype == "bfloat16":
        if settings.zero_stage == 0:
            # Weights stay float32 and each operation casts: no second copy to keep in step.
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        else:
            config["bf16"] = {"enabled": True}
    return config


def _safe_checkpoint_engine(engine: Any) -> Any:
    """DeepSpeed's checkpoint engine, reading tensors, plain data and the few plain records that a
    sharded optimiser's state is made of; never other pickled code."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    records: list[Any] = [LossScaler, ZeroStageEnum, fragment_address]

    def load(path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(records):
            return torch.load(path, map_location=map_location, weights_only=True)

    engine.load = load
    return engine
