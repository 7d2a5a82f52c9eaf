"""From what a configuration names to a folder on disk with a model in it."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from models.embedded import embedded_model
from rlhf.config import expanded, runs_path
from rlhf.errors import ModelError

EMBEDDED = "embedded"


def resolve_model(name: str) -> Path:
    """The local folder of ``embedded``, of a Hugging Face folder, or of a hub id.

    A relative folder is looked up from here, then below PAVLOV_RUNS. Called on every node that
    loads the model: caches are each node's own.

    Raises:
        ModelError: no such folder, no `config.json`, no safetensors in it, or no hub to ask.
    """
    if name == EMBEDDED:
        return embedded_model()
    if (folder := _local_folder(name)) is not None:
        return check_folder(folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"there is no model folder {name}; give a Hugging Face folder, a hub id (owner/name) "
            f"or {EMBEDDED!r}"
        )
    return _download(name)


def resolve_policy(name: str) -> Path:
    """The same for a run folder too: its ``policy/``.

    Raises:
        ModelError: as `resolve_model`.
    """
    folder = None if name == EMBEDDED else _local_folder(name)
    if folder is not None and (folder / "policy").is_dir():
        return check_folder(folder / "policy")
    return resolve_model(name)


def portable_name(name: str) -> str:
    """A model's name as other processes and nodes understand it: a folder made absolute,
    ``embedded`` and hub ids as they are."""
    folder = None if name == EMBEDDED else _local_folder(name)
    return name if folder is None else str(folder)


def resolve_reward_model(name: str) -> Path:
    """A reward-model folder: as named from here, else below PAVLOV_RUNS."""
    return _local_folder(name) or runs_path(name)


def _local_folder(name: str) -> Path | None:
    for folder in (expanded(name), runs_path(name)):
        if folder.is_dir():
            return folder.resolve()
    return None


def check_folder(folder: Path) -> Path:
    """`folder`, if it is a Hugging Face model folder with safetensors weights that were not cut.

    Raises:
        ModelError: it is not.
    """
    from safetensors import SafetensorError, safe_open

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"{folder} has no weights: a *.safetensors file is needed (pickled weights are not "
            "loaded)"
        )
    for path in weights:
        try:
            with safe_open(path, "np"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is damaged: {error}") from None
    with suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text())
        if isinstance(config, dict) and config.get("model_type"):
            return folder
    raise ModelError(f"{folder / 'config.json'} is damaged: it names no model_type")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]
        )
    except Exception as error:
        raise ModelError(
            f"{name} is neither a folder nor a model that the hub gives: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    return check_folder(Path(folder))


def in_hub_cache(name: str) -> bool:
    """Whether a name is of a model of the hub that was downloaded to this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def require_context(folder: Path, tokens: int, what: str) -> None:
    """Refuse more tokens than a model reads, if its config says: where positions are scaled, it
    does not.

    Args:
        what: needs so many, in the words of whoever asks.

    Raises:
        ModelError: the model reads fewer.
    """
    config = json.loads((folder / "config.json").read_text())
    config |= config.get("text_config") or {}
    positions = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    most = config.get("max_position_embeddings")
    if most is not None and tokens > most and "factor" not in positions:
        raise ModelError(f"{what} = {tokens}, but {folder} reads at most {most} tokens")


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over config and weights: the same model wherever it lies."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
