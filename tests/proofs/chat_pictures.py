"""Pictures of the chat page."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

from serving.ensemble import Verdict
from tests.chat_page import Engine, Scorer, ask, chat_page
from tests.conftest import build_tiny_model
from tests.proofs.runner import PICTURES, hold

_ANSWERS = {
    """Three things matter most:

1. **Plenty of water**: about a litre for 100 g, so that the starch is thinned out.
2. **Stir in the first minute**, when the surface is at its stickiest.
3. **Sauce at once.** Pasta that waits dry in a sieve sticks, whatever you did before.

Oil in the water does little: it floats. If the pasta has to wait, toss it with a spoonful
*afterwards*.""": (1.12, 1.32, 1.47, 1.54, 1.65, 1.2, 1.72, 1.34),
    "Use a large pot, salt the water, and stir during the first minute. Serve it at once.": (
        *(0.98, 1.28, 1.33, 1.13, 1.38, 1.03, 1.23, 1.08),
    ),
    "Put oil into the water.": (-0.1, 2.0, 1.5, 0.5, 2.4, 0.2, 1.3, 1.0),
    "Pasta is a popular dish in many countries, made of flour and water.": (
        *(-1.15, -0.55, -0.95, -0.75, -0.65, -1.05, -0.45, -1.25),
    ),
}
"""Written by hand, with each member's reward; the picture is of the page, not of a model."""


def page(folder: Path) -> dict[str, Any]:
    """The page in Chromium at 1280 and 390 pixels, with answers and rewards written by hand:
    docs/pictures/chat*.png."""
    verdicts = {
        text: Verdict(
            statistics.fmean(rewards), rewards, statistics.pstdev(rewards), text[:3] == "Put", "v1"
        )
        for text, rewards in _ANSWERS.items()
    }
    shutil.rmtree(folder, ignore_errors=True)
    model = build_tiny_model(folder)
    figures = {}
    for width, name in ((1280, "chat.png"), (390, "chat-phone.png")):
        with chat_page(model, Engine(*_ANSWERS), Scorer(verdicts), width, best_of=4) as shown:
            ask(shown, "How do I keep pasta from sticking together?")
            shown.locator(".answer .text:not(.raw)").wait_for()
            if width == 1280:
                shown.locator(".more").click()
                shown.locator("#candidates strong").first.wait_for()
                shown.evaluate("Promise.all(document.getAnimations().map((each) => each.finished))")
            shown.screenshot(path=PICTURES / name)
            figures[f"errors at {width}"] = len(shown.errors) + len(shown.elsewhere)
    return hold({"no errors": not any(figures.values())}, figures)
