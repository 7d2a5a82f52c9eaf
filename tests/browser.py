"""A real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

WIDTHS = {1280: 900, 390: 844}
"""Pages are looked at this wide (pixels), and this high."""


def chromium() -> str | None:
    """Chromium's program, if it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def new_page(width: int = 1280) -> Iterator[Any]:
    """A page in a browser of its own; requests to other hosts are refused and noted in
    `page.elsewhere`, errors on the page in `page.errors`."""
    from playwright.sync_api import sync_playwright

    program = chromium()
    assert program is not None
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": WIDTHS[width]})
        elsewhere: list[str] = []
        errors: list[str] = []

        def route(route: Any) -> None:
            if "//127.0.0.1:" in route.request.url:
                route.continue_()
            else:
                elsewhere.append(route.request.url)
                route.abort()

        page.route("**/*", route)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
        page.elsewhere, page.errors = elsewhere, errors
        try:
            yield page
        finally:
            browser.close()
