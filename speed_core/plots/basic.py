"""The four pictures that most notebooks need: a waterfall, counts, estimates with intervals, and curves.

Each writes NAME.svg, NAME.csv (the plotted numbers) and NAME.json (where they come from, see provenance.py).
Colours are Okabe and Ito's; hatching, line or marker tells them apart in grey. The papers' values are black on white.
A title begins with the finding. Names stand beside the marks where there is room. All are as wide as a page and no text is smaller
than `SMALL`.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from speed_core.evaluation.uncertainty import leaves_zero_out
from speed_core.files import UserError
from speed_core.plots.provenance import save
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run

OURS, SECOND, THIRD, FOURTH, WARNING, PAPER, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#000000", "#999999"
LINES = ("-", "--", ":", "-.", (0, (1, 1)))
HATCHES = ("", "//", "..")
WIDTH, SMALL = 7.0, 9  # inches of a page; points of the smallest text
STYLE: Any = {
    "figure.dpi": 110, "figure.titlesize": 11, "font.size": 10, "legend.fontsize": SMALL, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
    "svg.hashsalt": "speed-step-by-step", "svg.fonttype": "none",
}  # fmt: skip
NAMED: Any = {  # a name beside its mark, `xytext` points away
    "textcoords": "offset points", "va": "center", "fontsize": SMALL, "bbox": {"fc": "white", "ec": "none", "pad": 0.5},
}  # fmt: skip


def canvas(
    height: float, columns: int = 1, lines: int = 1, title: str = "", width: float = WIDTH, **panels: Any
) -> tuple[Any, Any]:
    """(figure, axes) in the style of this project; `title` stands above all panels, each of its lines wrapped."""
    import matplotlib.pyplot as plt  # a second, for a user who draws nothing

    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(lines, columns, figsize=(width, height), layout="constrained", **panels)
    if title:
        wrapped = (textwrap.fill(line, int(11.5 * width), break_on_hyphens=False) for line in title.splitlines())
        figure.suptitle("\n".join(wrapped), x=0.01, ha="left")
    return figure, axes


def bars(rows: Sequence[Mapping[str, Any]], value: str = "value", low: str = "low", high: str = "high") -> np.ndarray:
    """(2, n) distances from each row's value down to the low and up to the high end of its interval."""
    return np.maximum(0, [[r[value] - r[low] for r in rows], [r[high] - r[value] for r in rows]])


def distinct(values: Sequence[Any]) -> list[Any]:
    """The distinct values, in order of their first appearance."""
    return list(dict.fromkeys(values))


def beside(ax: Any, ends: tuple[float, float], y: float, text: str, colour: str) -> None:
    """`text` to the right of a mark that reaches over `ends`, or to its left where the panel ends before the text would."""
    left, right = ax.get_xlim()
    late = ends[1] > right - (0.02 + 0.015 * len(text)) * (right - left)  # a letter takes about so much of a panel
    where = {"xytext": (-6 if late else 6, 0), "ha": "right" if late else "left"}
    ax.annotate(text, (ends[not late], y), color=colour, **NAMED | where)


def name_lines(ax: Any) -> None:
    """The name of each line to the right of its last point; names of lines that end together stand one above the other."""
    ax.figure.draw_without_rendering()  # only then are the places of the points known
    ends = {line.get_label(): line.get_xydata()[-1] for line in ax.lines if len(line.get_xydata())}
    height = {name: ax.transData.transform(end)[1] * 72 / ax.figure.dpi for name, end in ends.items()}
    for x in distinct([end[0] for end in ends.values()]):
        names = sorted((n for n in ends if ends[n][0] == x), key=lambda n: height[n])
        placed = list(itertools.accumulate((height[n] for n in names), lambda below, own: max(own, below + 1.2 * SMALL)))
        up = np.mean(placed) - np.mean([height[n] for n in names])
        for name, y in zip(names, placed, strict=True):
            ax.annotate(name, ends[name], **NAMED, xytext=(7, y - up - height[name]))


def plain_numbers(axis: Any) -> None:
    """Numbers on a logarithmic axis written out, since the exponents of 10 would be too small to read."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def row_axis(ax: Any, labels: Sequence[str]) -> None:
    """One row a label, the first on top; half a row of room above and below, however many rows there are."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)


def waterfall(run: Run, name: str, steps: Sequence[tuple[str, int]], inputs: Sequence[Artifact], title: str) -> None:
    """Yield waterfall: how many records are left after each step."""
    figure, ax = canvas(0.7 + 0.4 * len(steps), title=title)
    labels, values = [s[0] for s in steps], [s[1] for s in steps]
    ax.barh(labels, values, color=OURS, height=0.6)
    for i, (v, before) in enumerate(zip(values, [values[0], *values[:-1]], strict=True)):
        lost = f"  (-{before - v})" if before > v else ""
        # An offset, not a leading space: browsers drop the space, and the number touches the bar.
        ax.annotate(f"{v}{lost}", (v, i), (5, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    ax.set(xlabel="records", xlim=(0, max(values) * 1.18))
    save(run, name, figure, [{"step": a, "records": b} for a, b in steps], inputs)


def counts(
    run: Run,
    name: str,
    groups: Mapping[str, Mapping[str, float]],
    inputs: Sequence[Artifact],
    title: str,
    ylabel: str,
    xlabel: str = "",
) -> None:
    """Grouped bars of plain counts (not scores, so no interval): {series: {category: value}}."""
    figure, ax = canvas(3.2, title=title)
    categories = distinct([k for g in groups.values() for k in g])
    width = 0.8 / len(groups)
    whole = all(float(v).is_integer() for g in groups.values() for v in g.values())
    for i, (series, values) in enumerate(groups.items()):
        paper = series.startswith("paper")
        x = np.arange(len(categories)) + (i - (len(groups) - 1) / 2) * width
        colours = {"color": "white" if paper else (OURS, SECOND, THIRD)[i % 3], "edgecolor": PAPER if paper else None}
        drawn = ax.bar(x, [values.get(c, 0) for c in categories], width * 0.95, label=series, hatch=HATCHES[i % 3], **colours)
        ax.bar_label(drawn, fmt="%d" if whole else "%.2f", fontsize=SMALL, padding=1)
    ax.set_xticks(np.arange(len(categories)), [c.replace("_", "-") for c in categories])
    ax.set(ylabel=ylabel, xlabel=xlabel)
    if len(groups) > 1:
        ax.legend()
    rows = [{"series": s, "category": c, "value": g.get(c, 0)} for s, g in groups.items() for c in categories]
    save(run, name, figure, rows, inputs)


def finding(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a figure of differences {label, value, low, high} found, for its title."""
    found = [r for r in rows if leaves_zero_out(r["low"], r["high"])]
    if not found:
        return "No difference is resolved"
    if len(found) == len(rows) > 2:
        low, high = (pick(r["value"] for r in rows) for pick in (min, max))
        return f"All {len(rows)} differences are resolved, {low:+.1f} to {high:+.1f}"
    listed = "Resolved: " + "; ".join(f"{r['label']} ({r['value']:+.1f})" for r in found)
    return listed if len(listed) < 150 else f"{len(found)} of {len(rows)} differences are resolved"


def estimates(
    run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact], title: str, xlabel: str,
    paper: Mapping[str, float] | None = None, line: float | None = None,
) -> None:  # fmt: skip
    """Estimates with intervals: rows {label, value, low, high}; the paper's value (same units) as a black diamond.

    `each` in a row holds the values of single training seeds, or of single trainings of the generators where a row counts
    several: small marks below the estimate. `line`: the value that says "no difference", drawn dashed. Where it is zero the figure
    is headed by the differences that are resolved, and the marks of the others are hollow.
    """
    if any("low" not in r or "high" not in r for r in rows):
        raise UserError(f"figure {name}: a compared score without an interval; give low and high")
    heading = f"{finding(rows)}.\n{title}" if line == 0 else title
    figure, ax = canvas(0.6 + 0.2 * len(heading.splitlines()) + 0.36 * len(rows), title=heading)
    paper = paper or {}
    xlabel += "; ours with 95% interval"
    for i, r in enumerate(rows):
        open_ = line == 0 and not leaves_zero_out(r["low"], r["high"])
        ax.errorbar(r["value"], i, xerr=bars([r]), fmt="o", color=OURS, mfc="white" if open_ else OURS, capsize=4)
        if r["label"] in paper:
            ax.plot(paper[r["label"]], i, "D", color=PAPER, mfc="none")
        ax.plot(seeds := r.get("each", ()), [i + 0.22] * len(seeds), "|", color=OURS, ms=6)
        if open_ and "hollow" not in xlabel:
            xlabel += ", hollow: contains zero"
    if line is not None:
        ax.axvline(line, color=GREY, lw=1, ls="--")
    row_axis(ax, [r["label"] for r in rows])
    printed = {i: paper[r["label"]] for i, r in enumerate(rows) if r["label"] in paper}
    if printed:
        i = max(printed, key=lambda k: abs(printed[k] - rows[k]["value"]))  # the one that stands alone
        ax.annotate("paper", (printed[i], i), **NAMED, xytext=(0, 10), ha="center")
    if several := next(((i, r) for i, r in enumerate(rows) if len(r.get("each", ())) > 1), None):
        i, r = several
        mark = "one training of the generators" if r.get("generators", 1) > 1 else "one seed"
        beside(ax, (min(r["low"], *r["each"]), max(r["high"], *r["each"])), i + 0.22, mark, OURS)
    ax.set(xlabel=xlabel)
    save(run, name, figure, [dict(r) | {"paper": paper.get(r["label"], "")} for r in rows], inputs)


def curves(
    run: Run,
    name: str,
    series: Mapping[str, Sequence[Mapping[str, float]]],
    keys: Sequence[str],
    inputs: Sequence[Artifact],
    title: str,
) -> None:
    """Training curves: one panel a key, one line a series, over steps."""
    figure, axes = canvas(2.8, len(keys), title=title)
    for ax, key in zip(np.atleast_1d(axes), keys, strict=True):
        for i, (label, history) in enumerate(series.items()):
            points = [(h["step"], h[key]) for h in history if key in h]
            style = {"color": (OURS, SECOND, THIRD, GREY)[i % 4], "ls": LINES[i % 4], "marker": "o", "ms": 3}
            ax.plot(*zip(*points, strict=True), label=label, **style)
        ax.set(xlabel="step", title=key.replace("_", " "))
        if len(series) > 1:
            ax.legend()
    rows = [{"series": s, **{k: h[k] for k in ("step", *keys) if k in h}} for s, history in series.items() for h in history]
    save(run, name, figure, rows, inputs)
