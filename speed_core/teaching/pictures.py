"""Still figures of the widgets: drawn like those of `plots`, shown in a cell, and written nowhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from speed_core.plots.basic import OURS, canvas


def temperature_picture(points: Sequence[Mapping[str, float]]) -> Any:
    """The still figure of `widgets.temperature`: share of valid records against temperature; points {x, value, low, high}."""
    figure, ax = canvas(7, 2.6)
    x, y = ([p[k] for p in points] for k in ("x", "value"))
    error = [[p["value"] - p["low"] for p in points], [p["high"] - p["value"] for p in points]]
    ax.errorbar(x, y, yerr=error, fmt="o-", color=OURS, capsize=4, label="ours, 95% interval")
    ax.set_xticks(x)
    ax.set(title="Valid records, recorded samples", xlabel="temperature", ylabel="share valid", ylim=(0, 1))
    ax.legend(fontsize=8)
    return figure


def outcome_picture(counts: Mapping[str, int]) -> Any:
    """The still figure of `widgets.browse`: a bar for each stage and outcome, valid ones filled, the others hatched."""
    figure, ax = canvas(7, 0.9 + 0.3 * len(counts))
    for i, (label, n) in enumerate(counts.items()):
        ok = label.endswith(", ok")
        ax.barh(i, n, color=OURS if ok else "white", edgecolor=OURS, hatch="" if ok else "//", height=0.6)
        ax.annotate(str(n), (n, i), (5, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(counts)), [label.replace("_", " ") for label in counts])
    ax.invert_yaxis()
    ax.set(title="How each text ended", xlabel="texts", xlim=(0, max(counts.values(), default=1) * 1.12))
    return figure
