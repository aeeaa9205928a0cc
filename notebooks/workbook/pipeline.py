"""One drawing of the whole pipeline, with the box of the present notebook filled."""

from __future__ import annotations

from html import escape
from typing import Any

from speed_core import profile as profiles
from workbook.show import Shown

WIDTH, HEIGHT, STEP, ROW, TOP, EDGE = 92, 56, 107, 88, 22, 8  # of a box; from box to box; margins
# (notebook, what it makes, column, row, the paper's count, the profile's value that stands beside it)
BOXES = (
    ("", "teacher", 0, 0, "GPT-4o", "teacher.kind"),
    ("01", "tasks", 1, 0, "", "topics.count"),
    ("02", "seed data", 2, 0, "25K", "seeds"),
    ("03", "junior", 3, 0, "25K", "junior.examples"),
    ("04", "senior", 4, 0, "10K", "senior.examples"),
    ("05", "revisor", 4, 1, "10K", "revisor.examples"),
    ("06", "synthesis", 5, 0, "920K", "synthesis.count"),
    ("07", "guide's mask", 5, 1, "", ""),
    ("07b", "students", 6, 1, "", "study.student.examples"),
    ("08", "embedder", 6, 0, "920K", "embedding.examples"),
    ("09", "scores", 7, 0, "", ""),
    ("10", "compared", 7, 1, "", ""),
)
UNITS = {
    "01": "topics", "02": "examples", "03": "examples", "04": "pairs", "05": "revisions", "06": "prompts", "07b": "examples",
    "08": "records",
}  # fmt: skip
ARROWS = (
    ("", "01"), ("01", "02"), ("02", "03"), ("03", "04"), ("03", "05"), ("04", "06"), ("05", "06"), ("06", "08"), ("07", "08"),
    ("07", "07b"), ("08", "09"), ("09", "10"),
)  # fmt: skip


def show(here: str, profile: str = "tiny", overrides: dict[str, Any] | None = None) -> Shown:
    """The pipeline with box `here` filled ("05"; 11 and 12 belong to the comparisons); counts: the paper's, then the profile's."""
    here = "10" if here in ("11", "12") else here
    values = profiles.dotted(profiles.load(profile, dict(overrides or {})))
    place = {n: (EDGE + column * STEP, TOP + row * ROW) for n, _, column, row, _, _ in BOXES}
    parts, told = [], []
    for number, name, _, _, paper, key in BOXES:
        x, y = place[number]
        fill, ink, line = ("#0072B2", "white", "#0072B2") if number == here else ("white", "black", "#999999")
        if not number:
            line = "none"
        label = {"10": "10-12 "}.get(number, f"{number} " if number else "") + name
        count = " | ".join(filter(None, (paper, str(values.get(key, "")))))
        parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4" fill="{fill}" stroke="{line}"/>')
        for text, down, size in ((label, 20, 12), (count, 36, 11), (UNITS.get(number, ""), 49, 10)):
            parts.append(
                f'<text x="{x + WIDTH / 2}" y="{y + down}" font-size="{size}" text-anchor="middle" fill="{ink}">{escape(text)}</text>'
            )
        told.append(f"[{label}]" if number == here else label)
    parts += [_arrow(place[a], place[b]) for a, b in ARROWS]
    box = f"{2 * EDGE + 7 * STEP + WIDTH} {TOP + ROW + HEIGHT + EDGE}"
    alternative = f"The pipeline: {', '.join(told)}. Counts: the paper, then profile {profile}."
    page = (
        f'<svg viewBox="0 0 {box}" style="max-width: 860px; background: white" role="img" aria-label="{escape(alternative)}" '
        'font-family="sans-serif"><defs><marker id="tip" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" markerHeight="6" '
        'orient="auto"><path d="M0,0 L6,3 L0,6 z" fill="#555555"/></marker></defs>'
        f'<text x="{EDGE}" y="13" font-size="10" fill="#555555">counts: the paper | profile {escape(profile)}</text>{"".join(parts)}</svg>'
    )
    return Shown(alternative, page)


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """From the side of a box that faces the other one to that one's side."""
    (x1, y1), (x2, y2) = start, end
    if x1 == x2:  # up or down
        down = y2 > y1
        x1 = x2 = x1 + WIDTH // 2
        y1, y2 = (y1 + HEIGHT, y2) if down else (y1, y2 + HEIGHT)
    else:
        x1, y1, y2 = x1 + WIDTH, y1 + HEIGHT // 2, y2 + HEIGHT // 2
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#555555" marker-end="url(#tip)"/>'
