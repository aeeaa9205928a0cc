"""What notebooks show of code and texts: functions as the package has them, tokens that a loss sees, two versions of a text,
how MinHash finds near-duplicates, and a small batch before and after the mask."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
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


def fields(raw: str) -> str:
    """The text of a JSON object, "name: value" a line, or `raw` itself where it is none: so a diff shows words and not quotes."""
    try:
        found = json.loads(raw)
    except ValueError:
        return raw
    return "\n".join(f"{k}: {v}" for k, v in found.items()) if isinstance(found, dict) else raw


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


def bands(keys: Mapping[str, Sequence[Hashable]]) -> Shown:
    """One strip of bands for each text; a band that agrees with the same band of the first text is filled (# in plain text)."""
    first = next(iter(keys.values()))
    side, gap, left = 14, 2, 8
    text, parts = [], []
    for k, (label, mine) in enumerate(keys.items()):
        same = [a == b for a, b in zip(mine, first, strict=True)]
        count = f"{sum(same)} of {len(same)} bands agree" if k else f"{len(same)} bands"
        text.append(f"{''.join('#' if s else '.' for s in same)}  {count}: {label}")
        y = 20 + 44 * k
        parts.append(f'<text x="{left}" y="{y - 5}" font-size="12">{escape(label)} ({count})</text>')
        parts += [
            f'<rect x="{left + i * (side + gap)}" y="{y}" width="{side}" height="{side}" '
            f'fill="{"#0072B2" if s else "white"}" stroke="#999999"/>'
            for i, s in enumerate(same)
        ]
    return Shown("\n".join(text), _svg(left * 2 + len(first) * (side + gap), 44 * len(keys), parts, " / ".join(text)))


def s_curve(bands: int, rows: int, threshold: float, marked: Sequence[float] = ()) -> Shown:
    """The probability that a pair is found, over its similarity (`minhash.probability`).

    A dashed line stands at the threshold of the decision, and a point at each similarity of `marked`.
    """
    from speed_core.data import minhash  # with numpy, which the environment of the site does not have

    wide, high, left, top = 420, 170, 46, 26

    def at(s: float) -> tuple[float, float]:
        return left + wide * s, top + high * (1 - minhash.probability(s, bands, rows))

    points = " ".join("{:.1f},{:.1f}".format(*at(i / 100)) for i in range(101))
    x = left + wide * threshold
    parts = [
        f'<polyline points="{points}" fill="none" stroke="#0072B2" stroke-width="2"/>',
        f'<line x1="{x}" y1="{top}" x2="{x}" y2="{top + high}" stroke="#555555" stroke-dasharray="4 3"/>',
        f'<text x="{x - 4}" y="{top + high - 6}" font-size="11" text-anchor="end">threshold {threshold}</text>',
        f'<path d="M{left},{top} V{top + high} H{left + wide}" fill="none" stroke="black"/>',
        f'<text x="{left + wide / 2}" y="{top + high + 32}" font-size="12" text-anchor="middle">Jaccard similarity of a pair</text>',
        f'<text x="12" y="{top + high / 2}" font-size="12" text-anchor="middle" transform="rotate(-90 12 {top + high / 2})">'
        "probability of being found</text>",
    ]
    for v in (0, 0.5, 1):
        parts.append(f'<text x="{left + wide * v}" y="{top + high + 15}" font-size="11" text-anchor="middle">{v}</text>')
        parts.append(f'<text x="{left - 5}" y="{top + high * (1 - v) + 4}" font-size="11" text-anchor="end">{v}</text>')
    for s in marked:
        cx, cy = at(s)
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="#E69F00" stroke="black"/>')
        parts.append(f'<text x="{cx - 8:.1f}" y="{cy - 6:.1f}" font-size="11" text-anchor="end">pair at {s:.2f}</text>')
    text = "\n".join(
        f"similarity {s:.2f}: found with probability {minhash.probability(s, bands, rows):.4f}"
        for s in sorted({0.2, 0.4, 0.6, threshold, 0.8, *marked})
    )
    return Shown(text, _svg(left + wide + 16, top + high + 40, parts, text.replace("\n", "; ")))


def _svg(width: float, height: float, parts: Sequence[str], told: str) -> str:
    """A drawing of these parts, with a text for those who do not see it."""
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" style="max-width: 100%; background: white" role="img" '
        f'aria-label="{escape(told)}" font-family="sans-serif">{"".join(parts)}</svg>'
    )


def mask_before_and_after(similarity: Any, removed: Any, topics: Sequence[str]) -> None:
    """Show a small batch twice, as the guide sees it and as the mask leaves it; nothing is written.

    `similarity` and `removed` (B, B): query i against positive j, the guide's cosine and whether j is taken out; `topics` (B,) name
    the pairs.
    """
    import numpy as np  # with the rest, which the environment of the site does not have

    from speed_core.plots import provenance
    from speed_core.plots.basic import SMALL, WARNING, canvas

    similarity, removed = np.asarray(similarity), np.asarray(removed, bool)
    figure, axes = canvas(3.3, 2)
    for ax, gone, title in zip(axes, (np.zeros_like(removed), removed), ("before the mask", "after the mask"), strict=True):
        ax.imshow(np.where(gone, np.nan, similarity), cmap="Blues", vmin=-0.2, vmax=1.2, aspect="auto")
        for i, j in np.ndindex(*similarity.shape):
            said = "x" if gone[i, j] else f"{similarity[i, j]:.2f}"
            ink = WARNING if gone[i, j] else "white" if similarity[i, j] > 0.6 else "black"
            style = {"weight": "bold"} if gone[i, j] or i == j else {}
            ax.text(j, i, said, ha="center", va="center", fontsize=9, color=ink, **style)
        labels = [f"{k} {topic}" for k, topic in enumerate(topics)]
        ax.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=SMALL)
        ax.set_yticks(range(len(labels)), labels if ax is axes[0] else [], fontsize=SMALL)
        ax.set(title=title, xlabel="positive", ylabel="query" if ax is axes[0] else "")
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    where = ", ".join(f"query {i} and positive {j}" for i, j in zip(*np.nonzero(removed), strict=True))
    provenance.show(figure, f"A batch of {len(topics)} pairs before and after the mask; removed: {where or 'nothing'}.")
