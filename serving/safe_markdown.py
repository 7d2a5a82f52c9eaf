"""What a model wrote, shown as Markdown and never run."""

from __future__ import annotations

from functools import cache

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

LIMIT = 200_000
"""Characters that are shown; what is beyond is said to be left out."""
_CELLS = 20_000
"""Cells that a table has at most: a short row is filled up to the width of the first, so that few
characters can be many cells."""


@cache
def _renderer(*, tables: bool) -> MarkdownIt:
    # Markup is text; images would be fetched from other hosts; links of other kinds than these are
    # not links; and what a reference defines is not shown, so that an answer could hide there. A
    # deep nesting ends at commonmark's own limit.
    shown = MarkdownIt("commonmark", {"html": False, "linkify": False})
    if tables:
        shown.enable("table")
    shown.disable(["image", "html_block", "html_inline", "reference"])
    shown.add_render_rule("link_open", _link_open)
    shown.validateLink = _is_web_link  # type: ignore[method-assign]
    return shown


def _is_web_link(url: str) -> bool:
    return url.strip().lower().startswith(("https://", "http://", "mailto:"))


def _link_open(self: object, tokens: list[Token], at: int, options: object, env: object) -> str:
    from markdown_it.common.utils import escapeHtml

    target = escapeHtml(str(tokens[at].attrs.get("href", "")))
    return f'<a href="{target}" target="_blank" rel="noopener noreferrer nofollow">'


def safe_markdown(text: str) -> Markup:
    """Text as HTML in which nothing runs and nothing is fetched: markup is shown, links lead to web
    pages alone, images are shown as links."""
    cut = text[:LIMIT].replace("\x00", "\ufffd")
    lines = cut.splitlines()
    cells = len(lines) * max((line.count("|") for line in lines), default=0)
    html = _renderer(tables=cells <= _CELLS).render(cut)
    if len(text) > LIMIT:
        html += f"<p class=note>{len(text) - LIMIT} more characters are not shown.</p>"
    return Markup(html)
