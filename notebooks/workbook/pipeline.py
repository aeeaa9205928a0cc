"""One drawing of the whole pipeline, with the box of the present notebook filled and a count at each arrow."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from speed_core import profile as profiles
from speed_core.store.artifacts import MANIFEST
from speed_core.store.run_context import runs_folder
from workbook.show import Shown

WIDTH, HEIGHT, ACROSS, DOWN, TOP, EDGE = 92, 46, 136, 88, 8, 8  # of a box; from box to box; margins
# (notebook, what it makes, of what, column, row)
BOXES = (
    ("", "teacher", "", 0, 0),
    ("01", "tasks", "from topics", 1, 0),
    ("02", "seed data", "from task lists", 2, 0),
    ("03", "junior", "from examples", 3, 0),
    ("04", "senior", "from pairs", 4, 0),
    ("05", "revisor", "from revisions", 3, 1),
    ("06", "synthesis", "from valid texts", 4, 1),
    ("07", "mask", "of the guide", 3, 2),
    ("07b", "students", "from examples", 2, 2),
    ("08", "embedder", "from records", 4, 2),
    ("09", "scores", "on tasks", 5, 2),
    ("10", "claims", "compared", 5, 1),
)
# (from, to, the paper's count, the artifact whose manifest has ours and where in it, the profile's value until there is one).
# An artifact may be a pattern; FILE:KEY is in a file of it, and of a mapping the entries count.
ARROWS = (
    ("", "01", "", "", "", "topics.count"),
    ("01", "02", "", "tasks", "outcomes.ok", ""),
    ("02", "03", "25K", "seeds", "outcomes.ok", "seeds"),
    ("03", "04", "10K", "pairs", "counts.pairs", "senior.examples"),
    ("03", "05", "10K", "revisor", "parameters.training.examples", "revisor.examples"),
    ("04", "06", "1.15M", "raw", "outcomes.ok", "synthesis.count"),
    ("05", "06", "", "revised", "outcomes.ok", ""),
    ("06", "08", "920K", "synthetic", "kept", "embedding.examples"),
    ("07", "08", "", "", "", ""),
    ("07", "07b", "", "", "", "study.student.examples"),
    ("08", "09", "56", "scores-guided-*", "scores.json:tasks", ""),
    ("09", "10", "", "", "", ""),
)  # fmt: skip


def show(here: str, profile: str = "tiny", overrides: dict[str, Any] | None = None) -> Shown:
    """The pipeline with box `here` filled ("05"; 11 and 12 belong to the comparisons).

    A count is what this run has; in brackets, the profile's value, where the run has not come so far.
    """
    here = "10" if here in ("11", "12") else here
    settings = profiles.load(profile, dict(overrides or {}))
    values, run = profiles.dotted(settings), runs_folder() / settings.name
    point = os.environ.get("SPEED_VARIANT", "")  # what a point of a sweep does not have it takes from its base
    roots = [folder / "artifacts" for folder in ((run / "variants" / point, run) if point else (run,))]
    place = {n: (EDGE + column * ACROSS, TOP + row * DOWN) for n, _, _, column, row in BOXES}
    parts, told, counted = [], [], []
    for number, name, source, _, _ in BOXES:
        x, y = place[number]
        fill, ink, line = ("#0072B2", "white", "#0072B2") if number == here else ("white", "black", "#999999")
        label = {"10": "10-12 "}.get(number, f"{number} " if number else "") + name
        lines = [label, *filter(None, (source,))] if number else [label, "GPT-4o", str(values["teacher.kind"])]
        parts.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4" fill="{fill}" stroke="{line if number else "none"}"/>'
        )
        first = y + HEIGHT / 2 + 4 - 7 * (len(lines) - 1)
        parts += [_text(x + WIDTH / 2, first + 14 * k, line, "middle", ink, 11 + (k == 0)) for k, line in enumerate(lines)]
        told.append(f"[{label}]" if number == here else label)
    for start, end, paper, artifact, key, setting in ARROWS:
        ours = _count(roots, artifact, key)
        said = f"{ours:,}" if ours is not None else f"({values[setting]:,})" if setting else ""
        parts += _arrow(place[start], place[end], paper, said)
        if paper or said:
            counted.append(f"{start or 'teacher'} to {end} {' | '.join(filter(None, (paper, said)))}")
    box = f"{2 * EDGE + 5 * ACROSS + WIDTH} {2 * TOP + 2 * DOWN + HEIGHT}"
    keys = (
        "above or left of an arrow: the paper's count",
        f"below or right: that of the run at {profile},",
        "in brackets where it is only planned",
    )
    parts += [_text(EDGE, TOP + 1.6 * DOWN + 14 * k, line, "start", "#555555", 11) for k, line in enumerate(keys)]
    alternative = f"The pipeline: {', '.join(told)}. Counts, the paper's | profile {profile}: {'; '.join(counted)}."
    page = (
        f'<svg viewBox="0 0 {box}" style="max-width: 860px; background: white" role="img" aria-label="{escape(alternative)}" '
        'font-family="sans-serif"><defs><marker id="tip" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" markerHeight="6" '
        f'orient="auto"><path d="M0,0 L6,3 L0,6 z" fill="#555555"/></marker></defs>{"".join(parts)}</svg>'
    )
    return Shown(alternative, page)


def _count(roots: Sequence[Path], artifact: str, key: str) -> int | None:
    """The number at the dotted `key` of an artifact's manifest (see `ARROWS`); None where the run has not made it."""
    file, _, key = key.rpartition(":")
    path = next((p for r in roots if artifact for p in sorted(r.glob(f"{artifact}/{file or MANIFEST}"))), None)
    found: Any = json.loads(path.read_bytes()) if path else {}
    for part in key.split("."):
        found = found.get(part, {})
    return len(found) or None if isinstance(found, dict) else found if isinstance(found, int) else None


def _text(x: float, y: float, said: str, anchor: str, ink: str, size: int) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{ink}">{escape(said)}</text>'


def _arrow(start: tuple[int, int], end: tuple[int, int], paper: str, ours: str) -> list[str]:
    """From the side of a box that faces the other one to that one's side, the counts on either side of the line."""
    (x1, y1), (x2, y2) = start, end
    if x1 == x2:  # up or down
        x1 = x2 = x1 + WIDTH // 2
        y1, y2 = (y1 + HEIGHT, y2) if y2 > y1 else (y1, y2 + HEIGHT)
        y = (y1 + y2) / 2 + 4
        counts = [_text(x1 - 6, y, paper, "end", "black", 11), _text(x1 + 6, y, ours, "start", "#0072B2", 11)]
    else:
        y1 = y2 = y1 + HEIGHT // 2
        x1, x2 = (x1 + WIDTH, x2) if x2 > x1 else (x1, x2 + WIDTH)
        x = (x1 + x2) / 2
        counts = [_text(x, y1 - 6, paper, "middle", "black", 11), _text(x, y1 + 14, ours, "middle", "#0072B2", 11)]
    return [f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#555555" marker-end="url(#tip)"/>', *counts]
