"""The figures of single notebooks, one function each, drawn with the pieces of basic.py.

A score that is compared is drawn with its interval or not at all.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speed_core.evaluation.uncertainty import leaves_zero_out
from speed_core.plots.basic import (
    FOURTH,
    GREY,
    LINES,
    OURS,
    PAPER,
    SECOND,
    THIRD,
    WARNING,
    bars,
    canvas,
    distinct,
    legend_below,
    row_axis,
)  # fmt: skip
from speed_core.plots.provenance import save, show
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run
from speed_core.study import paper_values
from speed_core.study.claims import EQUIVALENCE_MARGIN, EXPECTED, Verdict

COLOURS = {
    Verdict.REPRODUCED: THIRD,
    Verdict.SMALLER: THIRD,
    Verdict.EQUIVALENT: SECOND,
    Verdict.UNRESOLVED: GREY,
    Verdict.INACTIVE: GREY,
    Verdict.CONTRADICTED: WARNING,
    Verdict.IMPOSSIBLE: "#CCCCCC",
    Verdict.UNTESTED: "#CCCCCC",
}


def categories(run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact], title: str) -> None:
    """Table 1: mean score of each category, a marker for each model; rows {category, model, value, low, high, paper}.

    `paper` is SPEED's value on MTEB, a black diamond: another model on other tasks. Its order may be compared, its level not.
    """
    kinds, models = (distinct([r[k] for r in rows]) for k in ("category", "model"))
    figure, ax = canvas(7.6, 1.3 + 0.14 * len(kinds) * (len(models) + 1))
    step = 0.8 / (len(models) + 1)  # the last place of a category is the paper's
    for j, model in enumerate(models):
        mine = [r for r in rows if r["model"] == model]
        y = [kinds.index(r["category"]) - 0.4 + (j + 0.5) * step for r in mine]
        style = {"fmt": "os^vP"[j % 5], "color": (GREY, THIRD, SECOND, FOURTH, OURS)[j % 5], "capsize": 3, "ms": 5}
        ax.errorbar([r["value"] for r in mine], y, xerr=bars(mine), label=model, **style)
    printed = {r["category"]: r["paper"] for r in rows if r["paper"] != ""}
    if printed:
        label = "paper: SPEED 7B on MTEB (other tasks: compare no levels)"
        y = [kinds.index(k) + 0.4 - step / 2 for k in printed]
        ax.plot(list(printed.values()), y, "D", color=PAPER, mfc="none", label=label)
    for edge in range(1, len(kinds)):
        ax.axhline(edge - 0.5, color=GREY, lw=0.5)
    row_axis(ax, kinds)
    ax.set(title=title, xlabel="mean score x 100, 95% interval")
    legend_below(figure, 3)
    save(run, name, figure, rows, inputs)


def mask_matrix(run: Run, name: str, view: Any, inputs: Sequence[Artifact], title: str) -> None:
    """The masking microscope: which in-batch candidates the guide removed, in each block."""
    from matplotlib.colors import Normalize

    blocks = [b for b in ("ap", "an", "aa", "pp") if b in view.removed]
    names = {"ap": "query - positive", "an": "query - negative", "aa": "query - query", "pp": "positive - positive"}
    figure, axes = canvas(2.6 * len(blocks), 3.1, len(blocks), title=title)
    rows = []
    for ax, b in zip(np.atleast_1d(axes), blocks, strict=True):
        gone, similarity = view.removed[b].cpu().numpy(), view.similarity[b].cpu().numpy()
        image = ax.imshow(similarity, cmap="cividis", norm=Normalize(0, 1), aspect="auto")
        ys, xs = np.nonzero(gone)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.get_major_locator().set_params(integer=True)
        ax.scatter(xs, ys, marker="x", color="white", s=36, lw=3.2)  # an edge, for readers in grey
        ax.scatter(xs, ys, marker="x", color=WARNING, s=26, lw=1.6)
        ax.set(title=f"{names[b]}\n{int(gone.sum())} removed", xlabel="candidate", ylabel="row" if b == "ap" else "")
        rows += [
            {"block": b, "row": i, "candidate": j, "guide_similarity": round(float(similarity[i, j]), 4), "removed": int(gone[i, j])}
            for i in range(gone.shape[0]) for j in range(gone.shape[1])
        ]  # fmt: skip
    figure.colorbar(image, ax=axes, label="guide similarity", shrink=0.8)
    save(run, name, figure, rows, inputs)


def mask_before_and_after(similarity: Any, removed: Any, topics: Sequence[str]) -> None:
    """Show a small batch twice, as the guide sees it and as the mask leaves it; nothing is written.

    `similarity` and `removed` (B, B): query i against positive j, the guide's cosine and whether j is taken out; `topics` (B,) name
    the pairs.
    """
    similarity, removed = np.asarray(similarity), np.asarray(removed, bool)
    figure, axes = canvas(8.6, 3.7, 2)
    for ax, gone, title in zip(axes, (np.zeros_like(removed), removed), ("before the mask", "after the mask"), strict=True):
        ax.imshow(np.where(gone, np.nan, similarity), cmap="Blues", vmin=-0.2, vmax=1.2, aspect="auto")
        for i, j in np.ndindex(*similarity.shape):
            said = "x" if gone[i, j] else f"{similarity[i, j]:.2f}"
            ink = WARNING if gone[i, j] else "white" if similarity[i, j] > 0.6 else "black"
            style = {"weight": "bold"} if gone[i, j] or i == j else {}
            ax.text(j, i, said, ha="center", va="center", fontsize=9, color=ink, **style)
        labels = [f"{k} {topic}" for k, topic in enumerate(topics)]
        ax.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
        ax.set_yticks(range(len(labels)), labels, fontsize=8)
        ax.set(title=title, xlabel="positive", ylabel="query" if ax is axes[0] else "")
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    where = ", ".join(f"query {i} and positive {j}" for i, j in zip(*np.nonzero(removed), strict=True))
    show(figure, f"A batch of {len(topics)} pairs before and after the mask; removed: {where or 'nothing'}.")


def packed_mask(run: Run, name: str, batch: Mapping[str, Any], inputs: Sequence[Artifact], title: str) -> None:
    """Who may look at whom in the first row of a packed DPO batch (`prompt_sharing.collate`), and the position of each token."""
    from matplotlib.colors import ListedColormap

    from speed_core.preference.prompt_sharing import dense_mask  # with torch, which takes seconds

    allowed = dense_mask(batch["group"], batch["segment_ids"], batch["position_ids"])[0, 0].numpy()
    group, part, position = (batch[k][0].tolist() for k in ("group", "segment_ids", "position_ids"))
    shade = np.array([2 * g + (1 if p == 0 else 2) for g, p in zip(group, part, strict=True)])
    shades = np.where(allowed, shade[None, :], 0)
    colours = ["#FFFFFF", OURS, "#9CC9E8", SECOND, "#F5D58F", THIRD, "#9FD8C4"][: int(shades.max()) + 1]
    figure, ax = canvas(6.4, 5.2)
    ax.imshow(shades, cmap=ListedColormap(colours), interpolation="nearest", vmin=0, vmax=len(colours) - 1)
    starts = [0, *(i for i in range(1, len(part)) if (group[i], part[i]) != (group[i - 1], part[i - 1]))]
    spans = list(zip(starts, [*starts[1:], len(part)], strict=True))
    words = {0: "prompt", 1: "chosen", 2: "rejected"}
    middles = [(a + b - 1) / 2 for a, b in spans]
    ax.set_yticks(middles, [words.get(part[a], f"completion {part[a]}") for a in starts], fontsize=8)
    ax.set_xticks(middles, [f"positions\n{position[a]}-{position[b - 1]}" for a, b in spans], fontsize=7)
    for edge in starts[1:]:
        ax.axhline(edge - 0.5, color="black", lw=0.6)
        ax.axvline(edge - 0.5, color="black", lw=0.6)
    ax.set(title=title, xlabel="looked at", ylabel="looking")
    rows = [
        {"token": i, "group": g, "part": k, "position": x, "sees": int(allowed[i].sum())}
        for i, (g, k, x) in enumerate(zip(group, part, position, strict=True))
    ]
    save(run, name, figure, rows, inputs)


def mask_quality(run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact], title: str) -> None:
    """Precision against recall of the mask over margins, a panel for each source of labels, a line for each guide.

    Rows {labels, guide, margin, precision, recall, low/high of both, base_rate}. Bars are the intervals, the ringed
    point is margin 0; the dashed line is the precision of removing at random.
    """
    panels, guides = (distinct([r[k] for r in rows]) for k in ("labels", "guide"))
    figure, axes = canvas(4.2 * len(panels), 3.8, len(panels), title=title)
    for ax, panel in zip(np.atleast_1d(axes), panels, strict=True):
        # A mask that removes nothing has no precision; a bar of one that removes little may leave the panel.
        mine = [r for r in rows if r["labels"] == panel and r.get("removed", 1)]
        top = min(1.02, 1.15 * max(r["precision_high"] if r["margin"] == 0 else r["precision"] for r in mine))
        for i, guide in enumerate(guides):
            points = [r for r in mine if r["guide"] == guide]
            colour, style = (OURS, SECOND, THIRD)[i % 3], {"ls": LINES[i % 3], "marker": "os^"[i % 3], "ms": 4}
            x, y = [r["recall"] for r in points], [r["precision"] for r in points]
            ax.plot(x, y, color=colour, label=guide, **style)
            xerr, yerr = (bars(points, key, f"{key}_low", f"{key}_high") for key in ("recall", "precision"))
            ax.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="none", color=colour, capsize=2, lw=0.8, alpha=0.6)
            zero = [r for r in points if r["margin"] == 0]
            ax.plot([r["recall"] for r in zero], [r["precision"] for r in zero], "o", ms=11, mfc="none", mec=colour)
        base = next(r["base_rate"] for r in rows if r["labels"] == panel)
        ax.axhline(base, color=GREY, ls="--", lw=1, label="removed at random")
        ax.set(title=panel, xlabel="recall of false negatives", ylabel="precision", xlim=(-0.02, 1.02), ylim=(0, top))
    legend_below(figure, len(guides) + 1, np.atleast_1d(axes)[0])
    save(run, name, figure, rows, inputs)


def loss_cost(run: Run, name: str, path: Path) -> None:
    """Seconds and memory of the losses over batch sizes, from a file of `benchmarks/results`.

    A line ends at the largest batch that worked.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    machine = result["machine"].get("gpu", result["machine"]["cpu"])
    names = {
        "ours": "ours", "matmul": "plain matrix product", "gist": "GISTEmbedLoss", "cached_gist": "CachedGISTEmbedLoss",
        "unguided": "ours, no guide",
    }  # fmt: skip
    rows = [r for r in result["rows"] if r["method"] in names]
    took = {m: {r["batch"]: r["seconds"] for r in rows if r["method"] == m and r["status"] == "ok"} for m in ("ours", "gist")}
    both = max(took["ours"].keys() & took["gist"].keys())
    times = took["gist"][both] / took["ours"][both]
    title = f"At batch {both:,} GISTEmbedLoss takes {times:.3g} times as long as ours ({machine}, {result['written']})"
    figure, axes = canvas(9, 3.6, 2, title=title)
    panels = {"seconds": "seconds, forward and backward", "peak_mb": "peak memory, MB"}
    for ax, (key, ylabel) in zip(axes, panels.items(), strict=True):
        for i, (method, label) in enumerate(names.items()):
            points = [r for r in rows if r["method"] == method and r["status"] == "ok"]
            style = {"ls": LINES[i], "marker": "osD^v"[i], "ms": 4, "color": (OURS, SECOND, THIRD, FOURTH, GREY)[i]}
            ax.plot([r["batch"] for r in points], [max(r[key], 1e-4) for r in points], label=label, **style)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set(xlabel="batch (triplets, 384 dimensions)", ylabel=ylabel)
    legend_below(figure, 5, axes[0])
    out = [{k: r.get(k, "") for k in ("method", "batch", "status", "seconds", "peak_mb")} for r in rows]
    save(run, name, figure, out, [], files=[path])


def scaling(
    run: Run, name: str, rows: Sequence[Mapping[str, float]], fit: Mapping[str, float], band: Any, inputs: Sequence[Artifact],
    title: str,
) -> None:  # fmt: skip
    """Fig. 4: score against the number of synthetic records, and the paper's two points beside it.

    Three panels: the log-linear fit with its band, what it leaves over, the paper. Rows {records, value, low, high, fit, fit_low,
    fit_high, residual, residual_low, residual_high}.
    """
    figure, (left, middle, right) = canvas(10.4, 3.6, 3, title=title)
    x = np.array([r["records"] for r in rows])
    marks = {"fmt": "o", "color": OURS, "capsize": 4}
    left.errorbar(x, [r["value"] for r in rows], yerr=bars(rows), label="ours, 95% interval", **marks)
    grid = np.geomspace(x.min(), x.max(), 50)
    left.plot(grid, fit["intercept"] + fit["slope"] * np.log2(grid), color=OURS, label=f"{fit['slope']:+.2f} points per doubling")
    left.fill_between(grid, band[0], band[1], color=OURS, alpha=0.15)
    left.set(title="ours", ylabel="mean score of the offline tasks")
    left.legend(fontsize=8)
    middle.axhline(0, color=GREY, lw=1, ls="--")
    middle.errorbar(x, [r["residual"] for r in rows], yerr=bars(rows, "residual", "residual_low", "residual_high"), **marks)
    middle.set(title="residuals of the line", ylabel="points")
    for panel in (left, middle):
        panel.set_xscale("log", base=2)
        panel.set_xticks(x, [str(int(v)) for v in x])
        panel.set(xlabel="synthetic records")
    printed = paper_values.SCORE_BY_RECORDS
    thousands, scores = [n / 1000 for n, _ in printed], [score for _, score in printed]
    doubling = (scores[-1] - scores[0]) / np.log2(thousands[-1] / thousands[0])
    right.plot(thousands, scores, "D-", color=PAPER, mfc="none", label=f"{doubling:+.1f} points per doubling")
    right.set_xscale("log", base=2)
    right.set_xticks(thousands, [f"{n:g}K" for n in thousands])
    right.set(title="paper (Tables 1 and 2)", xlabel="synthetic records", ylabel="MTEB average, 56 tasks", ylim=(62.5, 64))
    right.legend(fontsize=8)
    paper: list[dict[str, Any]] = [{"records": n, "value": score, "source": "paper"} for n, score in printed]
    save(run, name, figure, [dict(r) | {"source": "ours"} for r in rows] + paper, inputs)


def sweeps(run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact], title: str) -> None:
    """Fig. 3: a panel for each sweep; rows {panel, x, own, records, value, low, high, each, paper} as `paper_sweeps.rows` gives them.

    A point whose models learned from another number of records than the profile's own says so under its value. Where the paper
    prints a difference (`paper_value`, or several of them), it is a black diamond.
    """
    panels = distinct([r["panel"] for r in rows])
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    beside = [r for r in rows if not r["own"]]
    clear = sum(leaves_zero_out(r["low"], r["high"]) for r in beside)
    title = f"{title}: {clear} of {len(beside)} differences resolved"
    figure, axes = canvas(3.2 * columns, 2.7 * lines + 0.4, columns, lines, title)
    axes = np.atleast_2d(axes)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        found = [r for r in rows if r["panel"] == panel]
        for i, r in enumerate(found):
            face = "white" if r["own"] else OURS
            ax.errorbar(i, r["value"], yerr=bars([r]), fmt="o", color=OURS, mfc=face, capsize=4)
            if not r["own"]:
                ax.plot([i + 0.15] * len(r["each"]), r["each"], "_", color=OURS, ms=6)
            if r.get("paper_value", "") != "":
                values = np.atleast_1d(r["paper_value"])
                ax.plot([i - 0.15] * len(values), values, "D", color=PAPER, mfc="none")
        ax.axhline(0, color=GREY, lw=1, ls="--")
        usual = (None, next((r["records"] for r in found if r["own"]), None))
        ticks = [r["x"] if r["records"] in usual else f"{r['x']}\n({r['records']} records)" for r in found]
        ax.set_xticks(range(len(found)), ticks)
        ax.margins(x=0.15)
        ax.set_title(f"{panel}\npaper: {found[0]['paper']}", fontsize=8.5)
    for ax in axes[:, 0]:
        ax.set_ylabel("points against own value", fontsize=8.5)
    save(run, name, figure, rows, inputs)


def cost(run: Run, name: str, per_record: Mapping[str, tuple[float, float]], inputs: Sequence[Artifact]) -> None:
    """Table 5 for each training record: {who: (teacher calls, teacher tokens)} on logarithmic axes, the paper's in black and white."""
    calls = ", ".join(f"{w} {v[0]:.2g}" for w, v in per_record.items())
    figure, axes = canvas(8.4, 0.9 + 0.42 * len(per_record), 2, title=f"Teacher calls per training record: {calls}")
    who = list(per_record)
    for k, (ax, unit) in enumerate(zip(axes, ("teacher calls", "teacher tokens"), strict=True)):
        low, high = (f(v[k] for v in per_record.values() if v[k] > 0) for f in (min, max))
        for i, label in enumerate(who):
            paper, value = label.startswith("paper"), per_record[label][k]
            colour, edge = ("white", PAPER) if paper else (OURS, OURS)
            ax.barh(i, value, color=colour, edgecolor=edge, hatch="//" if paper else "", height=0.6)
            said = f"{value:.3g}" if value else "not counted"  # an endpoint need not report tokens
            ax.annotate(said, (value or low / 3, i), (5, 0), textcoords="offset points", va="center", fontsize=8)
        ax.set_xscale("log")
        ax.set_yticks(range(len(who)), who if k == 0 else [""] * len(who))
        ax.invert_yaxis()
        ax.set(xlabel=f"{unit} per record", xlim=(low / 3, high * 4))
    save(run, name, figure, [{"who": w, "calls": v[0], "tokens": v[1]} for w, v in per_record.items()], inputs)


QUESTIONS = {"S": "SPEED: who writes the data", "E": "E5-mistral: how the model is trained", "G": "GISTEmbed: the guide"}
MARKERS = {
    Verdict.REPRODUCED: "o", Verdict.SMALLER: "o", Verdict.EQUIVALENT: "D", Verdict.CONTRADICTED: "X", Verdict.UNRESOLVED: "s",
    Verdict.INACTIVE: "x",
}  # fmt: skip
NO_DIFFERENCE = ("S3", "S22")  # their numbers are shares of calls and of records
IN_HUNDREDTHS = {"G6": 100}  # the number of this claim is a share, the others' are points


def claim_map(run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact]) -> None:
    """Forest plot of all claims: the estimate with its interval, the paper's effect as a diamond where it prints one, a band for
    what is too small to matter, the verdict in words, colour and shape."""
    lines: list[Mapping[str, Any] | str] = []
    for letter, question in QUESTIONS.items():
        lines += [question, *(r for r in rows if r["id"].startswith(letter))]
    count = Counter(Verdict(r["verdict"]) for r in rows)
    title = f"{len(rows)} claims: {'; '.join(f'{count[v]} {v}' for v in Verdict if count[v])}"
    figure, ax = canvas(9.5, 1.3 + 0.26 * len(lines), title=textwrap.fill(title, 95))
    ax.axvspan(-EQUIVALENCE_MARGIN, EQUIVALENCE_MARGIN, color="#EEEEEE", zorder=0)
    ax.axvline(0, color="black", linewidth=0.8, zorder=1)
    beside = ax.get_yaxis_transform()
    for i, r in enumerate(lines):
        if isinstance(r, str):
            ax.text(-0.02, i, r, ha="right", va="center", fontsize=9, weight="bold", transform=beside)
            continue
        found = Verdict(r["verdict"])
        claim = f"{r['id']}  {textwrap.shorten(r['claim'], 66, placeholder=' ...')}"
        ax.text(-0.02, i, claim, ha="right", va="center", fontsize=8, transform=beside)
        ink = "#555555" if COLOURS[found] in (GREY, "#CCCCCC") else COLOURS[found]
        ax.text(1.02, i, found, ha="left", va="center", fontsize=8, color=ink, transform=beside)
        if r["effect"] != "":
            ax.plot(r["effect"], i, "D", markersize=7, markerfacecolor="none", markeredgecolor=PAPER, zorder=4)
        if r["low"] != "" and r["id"] not in NO_DIFFERENCE:
            value, low, high = (IN_HUNDREDTHS.get(r["id"], 1) * float(r[k]) for k in ("ours", "low", "high"))
            ax.plot([low, high], [i, i], color=COLOURS[found], linewidth=1.8, zorder=2)
            ax.plot(
                value, i, MARKERS[found], color=COLOURS[found], markersize=7 if found is Verdict.CONTRADICTED else 5, zorder=3
            )
    ticks = (-10, -3, -1, 0, 1, 3, 10, 30)
    ax.set_xscale("symlog", linthresh=1, linscale=0.6)
    ax.set_xticks(ticks, [f"{t:+d}" if t else "0" for t in ticks])
    ax.minorticks_off()
    ax.set(yticks=[], ylim=(len(lines) - 0.5, -0.7), xlim=(-20, 45))
    signs = {sign: ", ".join(k for k, v in EXPECTED.items() if v == sign) for sign in (-1, 0)}
    expected = f"expected: left of 0 for {signs[-1]}, within the band for {signs[0]}, else right of 0"
    ax.set_xlabel(f"points (G6: hundredths); diamond: the paper's effect; grey band: too small to matter\n{expected}", fontsize=8)
    ax.spines["left"].set_visible(False)
    save(run, name, figure, rows, inputs)
