"""How a TOML file and dotted overrides become settings, and what is said when they do not."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ValidationError

from rlhf.config.section import TAG, Section
from rlhf.errors import ConfigError

Root = TypeVar("Root", bound=Section)
_NO_TOML = (ValueError, RecursionError)
"""Of TOML, also of numbers too long and tables too deep for Python."""


def load_config(root: type[Root], path: Path, overrides: Sequence[str] = ()) -> Root:
    """Read a TOML file, apply dotted overrides, validate.

    Example: ``load_config(RLConfig, Path("configs/rl_hh_cpu.toml"), ["rl.num_steps=3"])``

    Raises:
        ConfigError: one sentence that names the file, the key and the remedy.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"there is no configuration file {path}") from None
    except _NO_TOML as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    for override in overrides:
        _apply_override(values, override)
    return parse_config(root, values, str(path))


def parse_config(root: type[Root], values: dict[str, Any], origin: str) -> Root:
    """Validate a mapping as `root`; errors name `origin`."""
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_sentence(root, error)}") from None


def read_again(root: type[Root], values: dict[str, Any]) -> Root:
    """Settings as an earlier version of Pavlov may have recorded them: what is new since has its
    default, what is gone is left out (of `values` too).

    Raises:
        ValueError: they are refused today.
    """
    while True:
        try:
            return root.model_validate_json(json.dumps(values))
        except ValidationError as error:
            gone = [e["loc"] for e in error.errors() if e["type"] == "extra_forbidden"]
            if not gone:
                raise ValueError(_sentence(root, error)) from None
            for location in gone:
                _leave_out(values, location)


def _leave_out(values: Any, location: Sequence[str | int]) -> None:
    *parents, leaf = (part for part in location if not TAG.match(str(part)))
    for parent in parents:
        values = values[parent]
    del values[leaf]


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"an override is written key=value, got {override!r}")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except _NO_TOML:
        parsed = {}
    # What is no single value is text, e.g. two lines.
    value = parsed["value"] if parsed.keys() == {"value"} else text
    *parents, leaf = key.strip().split(".")
    table = values
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
    table[leaf] = value


def _sentence(root: type[Section], error: ValidationError) -> str:
    first, *rest = error.errors()
    # Which section of several a table was taken for is no part of the key.
    tags = [part for part in first["loc"] if TAG.match(str(part))]
    parts = [str(part) for part in first["loc"] if part not in tags]
    key = ".".join(parts)
    if first["type"] == "extra_forbidden" and tags and _unnumbered(parts) in known_keys(root):
        # A setting of another kind.
        kind = ".".join([*parts[:-1], str(tags[-1])])
        text = f"{key} = {_toml(first['input'])} with {kind}: that one has no such setting"
    elif first["type"] == "extra_forbidden":
        text = f"{key} is not a known key"
        close = difflib.get_close_matches(key, known_keys(root), n=1, cutoff=0.4)
        if close:
            text += f"; did you mean {close[0]}?"
    elif first["type"] == "missing":
        below = [known for known in known_keys(root) if known.startswith(f"{key}.")]
        text = f"{below[0] if below else key} is required"
    elif first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        text = f"{key}: {reason}" if key and key.split(".")[-1] not in reason else reason
    else:
        reason = first["msg"][0].lower() + first["msg"][1:]
        text = f"{key} = {first['input']!r}: {reason}"
    return text + (f" (and {len(rest)} more)" if rest else "")


def _unnumbered(parts: Sequence[str]) -> str:
    return ".".join(part for part in parts if not part.isdigit())


def _toml(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool | int | float | str) else repr(value)


def known_keys(root: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key of a configuration class."""
    keys = []
    for name, field in root.model_fields.items():
        keys.append(prefix + name)
        for section in _sections_of(field.annotation):
            keys += known_keys(section, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))


def _sections_of(annotation: Any) -> list[type[Section]]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, Annotated):
        return [each for part in typing.get_args(annotation) for each in _sections_of(part)]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return []


def data_path(path: str) -> Path:
    """A data path made absolute against PAVLOV_DATA (default ``../shared/data``)."""
    return _against("PAVLOV_DATA", "../shared/data", path)


def runs_path(path: str) -> Path:
    """A run folder made absolute against PAVLOV_RUNS (default ``runs``)."""
    return _against("PAVLOV_RUNS", "runs", path)


def _against(variable: str, default: str, path: str) -> Path:
    base = expanded(os.environ.get(variable) or default).absolute()
    return (base / expanded(path)).resolve()


def expanded(path: str | Path) -> Path:
    """A path as a user writes it, ``~`` replaced.

    Raises:
        ConfigError: it cannot be one.
    """
    if "\0" in str(path):
        raise ConfigError(f"{str(path)!r} is no path: it holds a NUL character")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: there is no such user") from None
