"""A run that is resumed goes on with what it had steered itself to."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

from rich.console import Console

from cluster.files import RunFolder
from rlhf.config import Section
from rlhf.prompts import PromptCursor
from tests.trainers.test_loop import GROUPS, PROMPTS, FakeActors, config
from trainers import rl


class FakeFleet(FakeActors):
    learner_is_sound = True

    async def save_checkpoint(self, folder: Path, *, in_turn: bool = True) -> None:
        (folder / "weights").write_text("w")


def run(folder: RunFolder, first_step: int, steps: int) -> list[dict[str, float]]:
    kl = {"target": 0.4, "coefficient": 0.1, "rate": 0.5}
    settings = config(steps=steps, rl={"kl": kl})
    cursor = PromptCursor(PROMPTS, settings.seed, first_step * GROUPS)
    said = Console(file=io.StringIO())
    asyncio.run(
        rl._steps(settings, FakeFleet(), cursor, folder, said, "test", first_step)  # type: ignore[arg-type]
    )
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_resumed_run_steers_on_from_the_step_before_it(tmp_path: Path) -> None:
    folders = [
        RunFolder.claim(tmp_path / name, Section(), resume=False) for name in ("whole", "resumed")
    ]
    whole = run(folders[0], 0, 4)
    run(folders[1], 0, 2)
    resumed = run(folders[1], 2, 4)
    coefficients = [[row["kl/coefficient"] for row in rows] for rows in (whole, resumed)]
    assert coefficients[0] == coefficients[1]
    assert len(set(coefficients[0])) == 4
    for folder in folders:
        folder.release()
