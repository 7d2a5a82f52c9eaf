"""The learner actor: one rank of the DeepSpeed engine that trains the policy."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.engine import TrainingEngine
from actors.gauges import Gauges, in_ray_actor
from cluster.files import folder_beside
from cluster.guard import Guard
from cluster.session import free_port, hold_shared_memory, node_address
from cluster.weights import WeightManifest, WeightSender, make_sender
from cluster.weights.probe import PROBE_TEXT, Probe
from models.chat import ChatTokenizer
from models.loading import load_causal_model
from models.logprobs import TokenLogprobs, reply_logprobs
from models.packing import PackedBatch, Row, collate, micro_batches, pack
from models.precision import resolve_dtype
from models.sources import resolve_model
from rlhf.algorithms import Share, algorithm_of
from rlhf.config import LearnerSection, RLSection
from rlhf.kl import kl_in_the_loss
from rlhf.losses import BatchSize, reduce_tokens
from rlhf.records import StepReport, TrainingBatch


class LearnerActor:
    """One rank. Rank 0 also exports weights.

    Args:
        model: the start policy, by a name that this node resolves.
        dtype: precision of the forward and backward pass.
        wire_dtype: precision of exported weights, that of the engines.
    """

    def __init__(
        self,
        model: str,
        dtype: str,
        settings: LearnerSection,
        rl: RLSection,
        wire_dtype: str,
        weight_transport: str,
        shared_memory: str,
        run: str,
        name: str,
        rank: int = 0,
        world_size: int = 1,
        gpus: float = 0,
    ) -> None:
        folders = [Path(shared_memory)] if rank == 0 else []
        self._guard = Guard(*folders, with_parent=in_ray_actor())
        self._held = hold_shared_memory(Path(shared_memory)) if rank == 0 else None
        self._gauges = Gauges(run, name)
        self._folder = resolve_model(model)
        self._tokenizer = ChatTokenizer(self._folder)
        self._dtype = resolve_dtype(dtype)
        self._wire_dtype = getattr(torch, resolve_dtype(wire_dtype))
        self._settings = settings
        self._rl = rl
        self._algorithm = algorithm_of(rl.algorithm)
        self._rank = rank
        self._world_size = world_size
        self._gpus = gpus
        self._sender: WeightSender | None = (
            make_sender(weight_transport, Path(shared_memory)) if rank == 0 else None
        )
        self._engine: TrainingEngine | None = None

    def address(self) -> str:
        """``host:port`` on this node where the ranks can meet; asked of rank 0."""
        host = "127.0.0.1" if self._world_size == 1 else node_address()
        return f"{host}:{free_port()}"

    def start(self, master: str) -> None:
        """Build the DeepSpeed engine; returns when all ranks have met at `master`."""
        model: Any = load_causal_model(self._folder, "float32")
        if self._settings.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self._engine = TrainingEngine(
            TokenLogprobs(model),
            self._settings,
            self._dtype,
            rank=self._rank,
            world_size=self._world_size,
            master=master,
        )

    def connect(self, rollouts: Sequence[Any], ranks_per_engine: int) -> None:
        """NCCL only: join a process group with the engines."""
        from cluster.weights.nccl import NcclSender

        if isinstance(self._sender, NcclSender):
            self._sender.connect(rollouts, ranks_per_engine)

    def step(self, batch: TrainingBatch, step: int) -> StepReport:
        """One optimiser step on this rank's share of the batch.

        An empty batch changes nothing: no step is taken, and the report is empty.
        """
        if not batch.sequences:
            return StepReport()
        assert self._engine is not None
        started = time.monotonic()
        shares, size = self._shares(batch)
        totals: dict[str, float] = {}
        losses = [self._loss(batch, rows, live, size, totals) for rows, live in shares]
        norm = self._engine.step(losses, step)
        metrics = self._reduced(totals) | {
            "losses/gradient_norm": norm,
            "learner/tokens_per_s": batch.num_tokens / (time.monotonic() - started),
        }
        self._gauges.set(metrics)
        return StepReport(metrics)

    def _shares(self, batch: TrainingBatch) -> tuple[list[tuple[list[Row], bool]], BatchSize]:
        """This rank's micro-batches; each rank gets as many, the last ones without weight."""
        rows = pack(
            [s.prompt_token_ids for s in batch.sequences],
            [s.completion_token_ids for s in batch.sequences],
        )
        chunks = micro_batches(rows, self._settings.micro_batch_tokens)
        mine = [(chunk, True) for chunk in chunks[self._rank :: self._world_size]]
        while len(mine) < -(-len(chunks) // self._world_size):
            mine.append((chunks[-1], False))
        return mine, BatchSize(batch.num_sequences, batch.num_tokens, batch.max_tokens)

    def _loss(
        self,
        batch: TrainingBatch,
        rows: list[Row],
        live: bool,
        size: BatchSize,
        totals: dict[str, float],
    ) -> Callable[[], Tensor]:
        """The loss of one micro-batch, computed when called; adds to `totals` as it goes."""

        def compute() -> Tensor:
            assert self._engine is not None
            packed = collate(rows, self._tokenizer.pad_id, self._engine.device)
            rollout_NT = self._padded(batch, packed, "rollout_logprobs_T")
            advantages_N = torch.tensor(
                [batch.sequences[index].advantage for index in packed.indices],
                dtype=torch.float32,
                device=rollout_NT.device,
            )
            mask_NT = packed.reply_mask_NT * float(live)
            coefficient = batch.entropy_coefficient
            logprobs_NT, entropy_NT = self._engine.run(packed, batch.temperature, coefficient > 0)
            policy = self._algorithm.loss(
                Share(logprobs_NT, rollout_NT, advantages_N, mask_NT, size)
            )
            loss = policy.loss
            if self._rl.kl.place == "loss":
                kl = kl_in_the_loss(
                    logprobs_NT,
                    self._padded(batch, packed, "reference_logprobs_T"),
                    mask_NT,
                    estimator=self._rl.kl.estimator or "k2",
                    normalisation=self._rl.algorithm.normalisation,
                    size=size,
                )
                loss = loss + batch.kl_coefficient * kl
                totals["losses/kl"] = totals.get("losses/kl", 0.0) + float(kl) * size.tokens
            if coefficient:
                loss = loss - coefficient * reduce_tokens(entropy_NT, mask_NT, "token", size)
            with torch.no_grad():
                log_ratio_NT = (logprobs_NT - rollout_NT) * mask_NT
                for name, value_NT in {
                    "entropy/mean": entropy_NT,
                    # The k3 estimate of KL(rollout || policy): small, and zero on policy.
                    "losses/approx_kl": torch.exp(log_ratio_NT) - 1 - log_ratio_NT,
                    "losses/clipfrac": policy.clipped_BT.float(),
                    "losses/ratio_mean": policy.ratio_BT,
                    "losses/engine_gap": log_ratio_NT.abs(),
                }.items():
                    totals[name] = totals.get(name, 0.0) + float((value_NT * mask_NT).sum())
                totals["losses/policy"] = totals.get("losses/policy", 0.0) + float(policy.loss) * (
                    size.tokens
                )
                totals["tokens"] = size.tokens
            return loss

        return compute

    def _padded(self, batch: TrainingBatch, packed: PackedBatch, name: str) -> Tensor:
        """A sequence's values for its tokens, in the order of a packed batch's replies; (N, T)."""
        width = packed.reply_ids_NT.shape[1]
        rows = [getattr(batch.sequences[index], name) for index in packed.indices]
        padded_NT = torch.tensor([[*row] + [0.0] * (width - len(row)) for row in rows])
        return padded_NT.to(packed.reply_ids_NT.device)

    def _reduced(self, totals: dict[str, float]) -> dict[str, float]:
        """Sums over ranks, per token of the batch."""
        names = sorted(set(totals) - {"tokens"})
        sums = torch.tensor([totals[name] for name in names], dtype=torch.float64)
        if self._world_size > 1:
            assert self._engine is not None
            sums = sums.to(self._engine.device)
            torch.distributed.all_reduce(sums)
        return dict(zip(names, (sums / totals["tokens"]).tolist(), strict=True))

    def export_weights(self, version: int) -> WeightManifest | None:
        """Make the weights available as `version`; rank 0 returns the manifest. A collective."""
        assert self._engine is not None
        on_device = self._sender is not None and self._sender.sends_from_device
        device = self._engine.device if on_device else "cpu"
        tensors = (
            (name.removeprefix("model."), tensor)
            for name, tensor in self._engine.weights(self._wire_dtype, device)
        )
        if self._sender is None:
            for _ in tensors:
                pass
            return None
        self._gauges.set({"weight_version": version})
        return self._sender.prepare(version, tensors)

    def transmit_weights(self) -> None:
        """Send what was exported, where the transport pushes."""
        if self._sender is not None:
            self._sender.transmit()

    def probe(self) -> Probe:
        """The fixed text and what the current weights say of it, at temperature 1. A collective."""
        assert self._engine is not None
        token_ids = self._tokenizer.reply_ids(PROBE_TEXT, finished=False)
        module = self._engine.module
        autocast = torch.autocast(
            self._engine.device.type, torch.bfloat16, enabled=self._dtype == "bfloat16"
        )
        with autocast:
            logprobs = reply_logprobs(
                module,  # type: ignore[arg-type]
                [token_ids[:1]],
                [token_ids[1:]],
                temperature=1.0,
                pad_id=self._tokenizer.pad_id,
                budget_tokens=self._settings.micro_batch_tokens,
            )
        return Probe(token_ids, logprobs[0])

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
        """Write the policy as a Hugging Face folder in the start policy's precision.

        Written beside and renamed. A collective.
        """
        from safetensors.torch import save_file

        assert self._engine is not None
        config = json.loads((self._folder / "config.json").read_text())
        dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
        tensors = {
            name.removeprefix("model."): tensor for name, tensor in self._engine.weights(dtype)
        }
        if self._rank != 0:
            return
        with folder_beside(Path(folder)) as beside:
            save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
            (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            generation = self._folder / "generation_config.json"
            if generation.is_file():
                (beside / generation.name).write_text(generation.read_text())
            self._tokenizer.save(beside)

    def shutdown(self) -> None:
        """Drop exported weights."""
        if self._sender is not None:
            self._sender.close()
        self._guard.close()
