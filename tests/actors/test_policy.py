"""What a policy in training says of itself, without the engine that trains it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.policy import TrainedPolicy
from cluster.weights.probe import Probe, check_probe
from models.chat import ChatTokenizer
from models.loading import load_causal_model
from models.logprobs import TokenLogprobs
from rlhf.config import LearnerSection
from rlhf.errors import WeightUpdateError


def probe_of(model: Path, dtype: str) -> Probe:
    policy: Any = TrainedPolicy.__new__(TrainedPolicy)
    module = TokenLogprobs(load_causal_model(model, "float32"))
    policy._engine = SimpleNamespace(module=module, device=torch.device("cpu"))
    policy._tokenizer, policy._settings = ChatTokenizer(model), LearnerSection()
    policy._dtype = dtype
    probe: Probe = policy.probe()
    return probe


def test_a_learner_in_bfloat16_says_so_and_is_taken_by_an_engine_in_float32(
    tiny_model: Path,
) -> None:
    exact, coarse = (probe_of(tiny_model, dtype) for dtype in ("float32", "bfloat16"))
    assert (exact.dtype, coarse.dtype) == ("float32", "bfloat16")
    assert 1e-3 < check_probe(coarse, exact.logprobs, "float32") < 0.1
    # By the engine's precision alone it would be a fault.
    with pytest.raises(WeightUpdateError, match="float32 allows"):
        check_probe(Probe(coarse.token_ids, coarse.logprobs, "float32"), exact.logprobs, "float32")
