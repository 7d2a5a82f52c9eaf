"""Policies on disk, side by side: the same prompts and seeds for each, by one engine."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from actors.sft_worker import Judge, SFTJob
from cluster.guard import Guard
from cluster.session import hold_shared_memory
from cluster.weights import WeightManifest, WeightSender, make_sender
from cluster.weights.probe import PROBE_TEXT, Probe
from models.chat import ChatTokenizer
from models.loading import load_causal_model
from models.logprobs import TokenLogprobs, reply_logprobs
from models.precision import resolve_dtype
from models.weight_files import read_weights
from rlhf.config import SFTConfig
from rlhf.stopping import Evaluation


def side_by_side(job: SFTJob, policies: Sequence[Path], folder: Path) -> list[Evaluation]:
    """What the ensemble says of each policy's answers to the job's prompts; the answers stand in
    ``folder/<place>/answers``. The loss is not measured."""
    memory = Path(f"{job.shared_memory}-side-by-side")
    guard, held = Guard(memory), hold_shared_memory(memory)
    sender = make_sender(job.config.cluster.weight_transport, memory)
    found = []
    try:
        for place, policy in enumerate(policies):
            manifest, probe = _published(job.config, policy, sender, place)
            own = folder / str(place)
            own.mkdir(parents=True, exist_ok=True)
            judge = Judge(replace(job, folder=str(own), prompted=()))
            found.append(judge.evaluate(0, math.nan, manifest, probe))
    finally:
        sender.close()
        held.release()
        shutil.rmtree(memory, ignore_errors=True)
        guard.close()
    return found


def _published(
    config: SFTConfig, policy: Path, sender: WeightSender, version: int
) -> tuple[WeightManifest, Probe]:
    """A policy's weights as an engine takes them."""
    dtype = resolve_dtype(config.rollout.dtype)
    tokenizer = ChatTokenizer(policy)
    token_ids = tokenizer.reply_ids(PROBE_TEXT, finished=False)
    [logprobs] = reply_logprobs(
        TokenLogprobs(load_causal_model(policy, dtype)),
        [token_ids[:1]],
        [token_ids[1:]],
        temperature=1.0,
        pad_id=tokenizer.pad_id,
        budget_tokens=config.learner.micro_batch_tokens,
    )
    wire = getattr(torch, dtype)
    tensors = ((name, tensor.to(wire)) for name, tensor in read_weights(policy))
    return sender.prepare(version, tensors), Probe(token_ids, logprobs, dtype)
