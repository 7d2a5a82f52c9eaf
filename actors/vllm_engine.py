"""A vLLM engine for rollouts and for chat: started one way, on CPU and GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from models.precision import resolve_dtype
from models.sources import require_context
from rlhf.config import RolloutSection


def start_engine(
    model: Path,
    settings: RolloutSection,
    max_length: int,
    *,
    gpus: float = 0,
    transport: str = "shared_memory",
    extension: str = "",
) -> Any:
    """An `AsyncLLM`; ends with `shutdown()`.

    Args:
        max_length: tokens of prompt and completion together.
        transport: of new weights; "nccl" prepares vLLM's own engine for it.
        extension: qualified name of a class mixed into vLLM's worker.

    Raises:
        ModelError: the model reads fewer tokens than that.
    """
    require_context(model, max_length, "tokens of prompt and completion")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments: dict[str, Any] = {
        "model": str(model),
        "dtype": resolve_dtype(settings.dtype),
        "seed": 0,
        "max_model_len": max_length,
        "max_num_seqs": settings.max_sequences,
        "enforce_eager": settings.enforce_eager,
        "tensor_parallel_size": settings.tensor_parallel,
        # Logprobs of what is sampled from: after temperature, not of the raw distribution.
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": extension,
        "disable_log_stats": True,
    }
    if gpus:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    else:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(settings.kv_cache_gib)))
        if settings.tensor_parallel == 1:
            # The engine's process runs the model itself. A worker beside it would import all of
            # vLLM once more, to set threads that the actor's environment has set already.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if settings.enforce_eager:
            # The ranks of sampled tokens, which nobody reads, are compiled nevertheless.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        # With its prompt split over steps a seeded request fails on CPU ("CPU Generator does
        # not use offset", vLLM 0.32): prompts are read whole.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(4096, max_length)
    if settings.tensor_parallel > 1:
        arguments["distributed_executor_backend"] = "mp"
    if transport == "nccl":
        arguments["weight_transfer_config"] = {"backend": "nccl"}
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
