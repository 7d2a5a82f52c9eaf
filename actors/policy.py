"""A policy in training: one rank of the engine that trains it, and all that is done with its
weights. What it is trained on is for those who build on it (`actors/learner.py`, `sft_worker.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.engine import TrainingEngine
from actors.gauges import in_ray_actor
from cluster.files import folder_beside
from cluster.guard import Guard
from cluster.session import hold_shared_memory
from cluster.weights import WeightManifest, WeightSender, make_sender
from cluster.weights.probe import PROBE_TEXT, Probe
from models.adapters import (
    add_adapter,
    is_adapter,
    merge,
    on_the_wire,
    require_mergeable,
    save_adapter,
)
from models.chat import ChatTokenizer
from models.loading import load_causal_model
from models.logprobs import TokenLogprobs, reply_logprobs
from models.precision import resolve_dtype
from models.sources import resolve_model
from models.weight_files import weight_shapes
from rlhf.config import LearnerSection, LoRASection


class TrainedPolicy:
    """One rank. Rank 0 also exports weights.

    Args:
        model: the start policy, by a name that this node resolves.
        dtype: precision of the forward and backward pass.
        wire_dtype: precision of exported weights, that of the engines.
        lora: train an adapter, which begins by `seed`, and send it alone.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        settings: LearnerSection,
        wire_dtype: str,
        weight_transport: str,
        shared_memory: str,
        rank: int = 0,
        world_size: int = 1,
        lora: LoRASection | None = None,
        seed: int = 0,
    ) -> None:
        folders = [Path(shared_memory)] if rank == 0 else []
        self._guard = Guard(*folders, with_parent=in_ray_actor())
        self._held = hold_shared_memory(Path(shared_memory)) if rank == 0 else None
        self._folder = resolve_model(model)
        self._tokenizer = ChatTokenizer(self._folder)
        self._dtype = resolve_dtype(dtype)
        self._wire_dtype = getattr(torch, resolve_dtype(wire_dtype))
        self._settings = settings
        self._lora = lora
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._sender: WeightSender | None = (
            make_sender(weight_transport, Path(shared_memory)) if rank == 0 else None
        )
        self._engine: TrainingEngine | None = None

    def start(self, master: str | None) -> None:
        """Build the DeepSpeed engine; returns when all ranks have met at `master` (None: they have
        met already)."""
        model: Any = load_causal_model(self._folder, "float32")
        if self._settings.gradient_checkpointing:
            # The reentrant form learns nothing from an input without a gradient of its own.
            model.gradient_checkpointing_enable({"use_reentrant": False})
        critic, rates = self._critic(model)
        if self._lora is not None:
            model = add_adapter(model, self._lora, self._seed)
            require_mergeable(model, weight_shapes(self._folder))
        self._engine = TrainingEngine(
            TokenLogprobs(model, critic),
            self._settings,
            self._dtype,
            rank=self._rank,
            world_size=self._world_size,
            master=master,
            rate_factors=rates,
        )

    def _critic(self, policy: Any) -> tuple[nn.Module | None, dict[str, float]]:
        """A critic beside the policy and its learning rates as multiples of the policy's, by the
        beginning of a parameter's name."""
        return None, {}

    def export_weights(self, version: int) -> WeightManifest | None:
        """Make the weights available as `version`; rank 0 returns the manifest. A collective."""
        assert self._engine is not None
        on_device = self._sender is not None and self._sender.sends_from_device
        device = self._engine.device if on_device else "cpu"
        tensors = (
            self._policy_weights(self._wire_dtype, device)
            if self._lora is None
            # The difference alone, and exact: engines have the start policy and merge it.
            else iter(self._adapter().items())
        )
        if self._sender is None:
            for _ in tensors:
                pass
            return None
        return self._sender.prepare(version, tensors)

    def _policy_weights(
        self, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor]]:
        """Copies of the policy's parameters under their Hugging Face names, an adapter merged; a
        critic stays here."""
        assert self._engine is not None
        adapter = {} if self._lora is None else self._adapter()

        def wanted(name: str) -> bool:
            return name.startswith("model.") and not is_adapter(name)

        named = (
            (name.removeprefix("model."), tensor)
            for name, tensor in self._engine.weights(dtype, device, wanted)
        )
        yield from merge(named, adapter, dtype) if adapter else named

    def _adapter(self) -> dict[str, Tensor]:
        """The adapter as it travels, in float32. A collective."""
        assert self._engine is not None and self._lora is not None
        weights = self._engine.weights(torch.float32, wanted=is_adapter)
        named = ((name.removeprefix("model."), tensor) for name, tensor in weights)
        return dict(on_the_wire(named, self._lora))

    def transmit_weights(self) -> None:
        """Send what was exported, where the transport pushes."""
        if self._sender is not None:
            self._sender.transmit()

    def probe(self) -> Probe:
        """The fixed text and what the current weights say of it, at temperature 1. A collective."""
        assert self._engine is not None
        token_ids = self._tokenizer.reply_ids(PROBE_TEXT, finished=False)
        with self._autocast():
            logprobs = reply_logprobs(
                self._engine.module,  # type: ignore[arg-type]
                [token_ids[:1]],
                [token_ids[1:]],
                temperature=1.0,
                pad_id=self._tokenizer.pad_id,
                budget_tokens=self._settings.micro_batch_tokens,
            )
        return Probe(token_ids, logprobs[0], self._dtype)

    def save_checkpoint(self, folder: str) -> None:
        """Write this rank's part of a checkpoint. A collective."""
        assert self._engine is not None
        self._engine.save(Path(folder))

    def load_checkpoint(self, folder: str) -> None:
        """Read a checkpoint. A collective.

        Raises:
            CheckpointError: it does not fit.
        """
        assert self._engine is not None
        self._engine.load(Path(folder))

    def save_policy(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder in the start policy's precision, an adapter
        merged and beside it in ``adapter/``.

        Written beside and renamed. A collective.
        """
        from safetensors.torch import save_file

        assert self._engine is not None
        config = json.loads((self._folder / "config.json").read_text())
        dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
        tensors = dict(self._policy_weights(dtype))
        adapter = {} if self._lora is None else self._adapter()
        if self._rank != 0:
            return
        with folder_beside(Path(folder)) as beside:
            save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
            (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            generation = self._folder / "generation_config.json"
            if generation.is_file():
                (beside / generation.name).write_text(generation.read_text())
            self._tokenizer.save(beside)
            if self._lora is not None:
                save_adapter(adapter, self._lora, beside / "adapter")

    def _autocast(self) -> torch.autocast:
        """The precision of the forward pass, for one outside of the engine."""
        assert self._engine is not None
        enabled = self._dtype == "bfloat16"
        return torch.autocast(self._engine.device.type, torch.bfloat16, enabled=enabled)

    def shutdown(self) -> None:
        """Drop exported weights."""
        if self._sender is not None:
            self._sender.close()
        self._guard.close()
