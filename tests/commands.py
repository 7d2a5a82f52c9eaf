"""Commands started as a user starts them, in a folder of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "pavlov.py"


class Commands:
    """Starts commands and reads what they leave; `started` are to be killed in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def command(self, *arguments: str) -> subprocess.Popen[str]:
        """`pavlov` with these arguments, called from the folder, with its runs there."""
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            cwd=self.folder,
            env={**os.environ, "PAVLOV_RUNS": str(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def rows(self, name: str, file: str) -> list[dict[str, Any]]:
        """The rows of a run's JSONL file, none where there is no file."""
        path = self.folder / name / file
        return (
            [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        )
