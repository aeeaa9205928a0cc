"""What notebooks show of code and texts: functions as the package has them, tokens that a loss sees, two versions of a text."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from IPython.display import display
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

MONO = "font-family: monospace; font-size: 90%; white-space: pre; overflow-x: auto"
PROSE = "white-space: pre-wrap; line-height: 1.6"


class Shown:
    """Text for a terminal, and the same marked up for a page."""

    def __init__(self, text: str, html: str):
        self.text, self.html = text, html

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def source(*functions: Callable[..., Any]) -> None:
    """Show functions as they stand in the package: what you read is what runs."""
    text = "\n\n\n".join(inspect.getsource(f).rstrip() for f in functions)
    page = highlight(text, PythonLexer(), HtmlFormatter(noclasses=True, nobackground=True, prestyles=MONO))
    display(Shown(text, page))


def masked(tokens: Sequence[str], mask: Sequence[int]) -> Shown:
    """Tokens in a line; those with mask 1 are marked, and stand in [brackets] where there is no colour."""
    pairs = list(zip(tokens, mask, strict=True))
    marked = "".join(f"<mark>{escape(t)}</mark>" if m else escape(t) for t, m in pairs)
    return Shown("".join(f"[{t}]" if m else t for t, m in pairs), f'<div style="{PROSE}">{marked}</div>')


def word_diff(before: str, after: str) -> Shown:
    """Two versions of a text, word by word: what went is struck through ([-so-]), what came is underlined ({+so+})."""
    a, b = before.split(), after.split()
    text, html = [], []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        gone, came = " ".join(a[i:j]), " ".join(b[k:m])
        if kind == "equal":
            text.append(gone)
            html.append(escape(gone))
            continue
        text += [f"[-{gone}-]"] * bool(gone) + [f"{{+{came}+}}"] * bool(came)
        html += [f"<del>{escape(gone)}</del>"] * bool(gone) + [f"<ins>{escape(came)}</ins>"] * bool(came)
    return Shown(" ".join(text), f'<div style="{PROSE}">{" ".join(html)}</div>')
