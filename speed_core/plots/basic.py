"""The four pictures that most notebooks need: a waterfall, counts, estimates with intervals, and curves.

Each writes NAME.svg, NAME.csv (the plotted numbers) and NAME.json (where they come from, see provenance.py).
Colours are Okabe and Ito's; hatching, line or marker tells them apart in grey. The papers' values are black on white.
"""

from __future__ import annotations

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
STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "speed-step-by-step",
    "svg.fonttype": "none",
}


def canvas(width: float = 7.0, height: float = 3.4, columns: int = 1, lines: int = 1, title: str = "") -> tuple[Any, Any]:
    """(figure, axes) in the style of this project; `title` stands above all panels."""
    import matplotlib.pyplot as plt  # a second, for a user who draws nothing

    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(lines, columns, figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure, axes


def bars(rows: Sequence[Mapping[str, Any]], value: str = "value", low: str = "low", high: str = "high") -> np.ndarray:
    """(2, n) distances from each row's value down to the low and up to the high end of its interval."""
    return np.maximum(0, [[r[value] - r[low] for r in rows], [r[high] - r[value] for r in rows]])


def distinct(values: Sequence[Any]) -> list[Any]:
    """The distinct values, in order of their first appearance."""
    return list(dict.fromkeys(values))


def legend_below(figure: Any, columns: int, axes: Any = None) -> None:
    """One legend under all panels, of the entries of `axes` (all)."""
    entries = axes.get_legend_handles_labels() if axes is not None else ()
    figure.legend(*entries, loc="outside lower center", ncols=columns, fontsize=8)


def row_axis(ax: Any, labels: Sequence[str]) -> None:
    """One row a label, the first on top; half a row of room above and below, however many rows there are."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)


def waterfall(run: Run, name: str, steps: Sequence[tuple[str, int]], inputs: Sequence[Artifact], title: str) -> None:
    """Yield waterfall: how many records are left after each step."""
    figure, ax = canvas(7, 0.5 + 0.45 * len(steps))
    labels, values = [s[0] for s in steps], [s[1] for s in steps]
    ax.barh(labels, values, color=OURS, height=0.6)
    for i, (v, before) in enumerate(zip(values, [values[0], *values[:-1]], strict=True)):
        lost = f"  (-{before - v})" if before > v else ""
        # An offset, not a leading space: browsers drop the space, and the number touches the bar.
        ax.annotate(f"{v}{lost}", (v, i), (5, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    ax.set(title=title, xlabel="records", xlim=(0, max(values) * 1.18))
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
    figure, ax = canvas()
    categories = distinct([k for g in groups.values() for k in g])
    width = 0.8 / len(groups)
    whole = all(float(v).is_integer() for g in groups.values() for v in g.values())
    for i, (series, values) in enumerate(groups.items()):
        paper = series.startswith("paper")
        x = np.arange(len(categories)) + (i - (len(groups) - 1) / 2) * width
        colours = {"color": "white" if paper else (OURS, SECOND, THIRD)[i % 3], "edgecolor": PAPER if paper else None}
        drawn = ax.bar(x, [values.get(c, 0) for c in categories], width * 0.95, label=series, hatch=HATCHES[i % 3], **colours)
        ax.bar_label(drawn, fmt="%d" if whole else "%.2f", fontsize=8, padding=1)
    ax.set_xticks(np.arange(len(categories)), [c.replace("_", "-") for c in categories])
    ax.set(title=title, ylabel=ylabel, xlabel=xlabel)
    if len(groups) > 1:
        legend_below(figure, 2)
    rows = [{"series": s, "category": c, "value": g.get(c, 0)} for s, g in groups.items() for c in categories]
    save(run, name, figure, rows, inputs)


def finding(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a figure of differences {label, value, low, high} found, for its title."""
    found = [f"{r['label']} ({r['value']:+.1f})" for r in rows if leaves_zero_out(r["low"], r["high"])]
    if not found:
        return "no difference is resolved (hollow: the interval contains zero)"
    if len(found) == len(rows):
        return "resolved: all of them" if len(rows) > 1 else "resolved"
    listed = f"resolved (filled): {'; '.join(found)}"
    return listed if len(listed) < 80 else f"{len(found)} of {len(rows)} are resolved (filled)"


def estimates(
    run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact], title: str, xlabel: str,
    paper: Mapping[str, float] | None = None, line: float | None = None,
) -> None:  # fmt: skip
    """Estimates with intervals: rows {label, value, low, high}; the paper's value (same units) as a black diamond.

    `each` in a row holds the values of single training seeds, or of single trainings of the generators where a row counts
    several: small marks below the estimate. `line`: the value that says "no difference", drawn dashed. Where it is zero the title says
    which differences are resolved, and the marks of the others are hollow.
    """
    if any("low" not in r or "high" not in r for r in rows):
        raise UserError(f"figure {name}: a compared score without an interval; give low and high")
    figure, ax = canvas(7, 0.9 + 0.42 * len(rows))
    paper = paper or {}
    named: set[str] = set()

    def once(label: str) -> str | None:
        """`label` for the legend, the first time that it is drawn."""
        if label in named:
            return None
        named.add(label)
        return label

    for i, r in enumerate(rows):
        fill = OURS if line != 0 or leaves_zero_out(r["low"], r["high"]) else "white"
        ax.errorbar(r["value"], i, xerr=bars([r]), fmt="o", color=OURS, mfc=fill, capsize=4, label=once("ours, 95% interval"))
        if len(seeds := r.get("each", ())) > 1:
            mark = "one training of the generators" if r.get("generators", 1) > 1 else "one seed"
            ax.plot(seeds, [i + 0.22] * len(seeds), "|", color=OURS, ms=6, label=once(mark))
        if r["label"] in paper:
            ax.plot(paper[r["label"]], i, "D", color=PAPER, mfc="none", label=once("paper"))
    if line is not None:
        ax.axvline(line, color=GREY, lw=1, ls="--")
    row_axis(ax, [r["label"] for r in rows])
    ax.set(title=f"{title}\n{finding(rows)}" if line == 0 else title, xlabel=xlabel)
    legend_below(figure, 3)
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
    figure, axes = canvas(3.4 * len(keys) + 0.4, 3.0, len(keys), title=title)
    for ax, key in zip(np.atleast_1d(axes), keys, strict=True):
        for i, (label, history) in enumerate(series.items()):
            points = [(h["step"], h[key]) for h in history if key in h]
            style = {"color": (OURS, SECOND, THIRD, GREY)[i % 4], "ls": LINES[i % 4], "marker": "o", "ms": 3}
            ax.plot(*zip(*points, strict=True), label=label, **style)
        ax.set(xlabel="step", title=key.replace("_", " "))
        if len(series) > 1:
            ax.legend(fontsize=8)
    rows = [{"series": s, **{k: h[k] for k in ("step", *keys) if k in h}} for s, history in series.items() for h in history]
    save(run, name, figure, rows, inputs)
