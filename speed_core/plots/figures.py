"""The figures of single notebooks, one function each, drawn with the pieces of basic.py.

A score that is compared is drawn with its interval or not at all.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speed_core.plots.basic import (
    FOURTH,
    GREY,
    LINES,
    NAMED,
    OURS,
    PAPER,
    SECOND,
    SMALL,
    THIRD,
    WARNING,
    bars,
    beside,
    canvas,
    distinct,
    finding,
    name_lines,
    plain_numbers,
    row_axis,
)  # fmt: skip
from speed_core.plots.provenance import save
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run
from speed_core.study import paper_values
from speed_core.study.claims import SHARES
from speed_core.study.verdicts import EQUIVALENCE_MARGIN, EXPECTED, Verdict

LOOKS = {  # of a verdict: colour, marker, and how the heading says it
    Verdict.REPRODUCED: (THIRD, "o", "reproduces"),
    Verdict.SMALLER: (THIRD, "o", "finds the same direction at a smaller scale for"),
    Verdict.EQUIVALENT: (SECOND, "D", "finds no difference for"),
    Verdict.UNRESOLVED: (GREY, "s", ""),
    Verdict.INACTIVE: (GREY, "x", ""),
    Verdict.CONTRADICTED: (WARNING, "X", "contradicts"),
    Verdict.IMPOSSIBLE: ("#CCCCCC", "", ""),
    Verdict.UNTESTED: ("#CCCCCC", "", ""),
}


def categories(run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact], title: str) -> None:
    """Table 1: mean score of each category, a marker for each model; rows {category, model, value, low, high, paper}.

    `paper` is SPEED's value on MTEB, a black diamond: another model on other tasks. Its order may be compared, its level not.
    """
    kinds, models = (distinct([r[k] for r in rows]) for k in ("category", "model"))
    figure, ax = canvas(1 + 0.16 * len(kinds) * (len(models) + 1), title=title)
    step = 0.8 / (len(models) + 1)  # the last place of a category is the paper's
    first = []
    for j, model in enumerate(models):
        mine = [r for r in rows if r["model"] == model]
        y = [kinds.index(r["category"]) - 0.4 + (j + 0.5) * step for r in mine]
        style = {"fmt": "os^vP"[j % 5], "color": (GREY, THIRD, SECOND, FOURTH, OURS)[j % 5], "capsize": 3, "ms": 5}
        ax.errorbar([r["value"] for r in mine], y, xerr=bars(mine), **style)
        first.append(((mine[0]["low"], mine[0]["high"]), y[0], model, "black"))
    printed = {r["category"]: r["paper"] for r in rows if r["paper"] != ""}
    xlabel = "mean score x 100, 95% interval"
    if printed:
        y = [kinds.index(k) + 0.4 - step / 2 for k in printed]
        ax.plot(list(printed.values()), y, "D", color=PAPER, mfc="none")
        first.append(((value := next(iter(printed.values())), value), y[0], "paper", PAPER))
        xlabel += "\npaper: SPEED 7B on MTEB (other tasks: compare no levels)"
    for edge in range(1, len(kinds)):
        ax.axhline(edge - 0.5, color=GREY, lw=0.5)
    row_axis(ax, kinds)
    left, right = ax.get_xlim()
    ax.set_xlim(left, right + 0.3 * (right - left))  # room for the names
    for named in first:
        beside(ax, *named)
    ax.set(xlabel=xlabel)
    save(run, name, figure, rows, inputs)


def mask_matrix(run: Run, name: str, view: Any, inputs: Sequence[Artifact], title: str) -> None:
    """The masking microscope: which in-batch candidates the guide removed, in each block."""
    from matplotlib.colors import Normalize

    blocks = [b for b in ("ap", "an", "aa", "pp") if b in view.removed]
    names = {"ap": "query - positive", "an": "query - negative", "aa": "query - query", "pp": "positive - positive"}
    columns = min(2, len(blocks))
    lines = -(-len(blocks) // columns)
    figure, axes = canvas(0.5 + 2.7 * lines, columns, lines, title)
    rows = []
    for ax, b in zip(np.ravel(axes), blocks, strict=False):
        gone, similarity = view.removed[b].cpu().numpy(), view.similarity[b].cpu().numpy()
        image = ax.imshow(similarity, cmap="cividis", norm=Normalize(0, 1), aspect="auto")
        ys, xs = np.nonzero(gone)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.get_major_locator().set_params(integer=True)
        ax.scatter(xs, ys, marker="x", color="white", s=36, lw=3.2)  # an edge, for readers in grey
        ax.scatter(xs, ys, marker="x", color=WARNING, s=26, lw=1.6)
        ax.set(title=f"{names[b]}: {int(gone.sum())} removed", xlabel="candidate", ylabel="row" if b == "ap" else "")
        rows += [
            {"block": b, "row": i, "candidate": j, "guide_similarity": round(float(similarity[i, j]), 4), "removed": int(gone[i, j])}
            for i in range(gone.shape[0]) for j in range(gone.shape[1])
        ]  # fmt: skip
    for ax in np.ravel(axes)[len(blocks) :]:
        ax.set_visible(False)
    figure.colorbar(image, ax=axes, label="guide similarity; cross: removed", shrink=0.8)
    save(run, name, figure, rows, inputs)


def packed_mask(run: Run, name: str, batch: Mapping[str, Any], inputs: Sequence[Artifact], title: str) -> None:
    """Who may look at whom in the first row of a packed DPO batch (`prompt_sharing.collate`), and the position of each token."""
    from matplotlib.colors import ListedColormap

    from speed_core.preference.prompt_sharing import dense_mask  # with torch, which takes seconds

    allowed = dense_mask(batch["group"], batch["segment_ids"], batch["position_ids"])[0, 0].numpy()
    group, part, position = (batch[k][0].tolist() for k in ("group", "segment_ids", "position_ids"))
    shade = np.array([2 * g + (1 if p == 0 else 2) for g, p in zip(group, part, strict=True)])
    shades = np.where(allowed, shade[None, :], 0)
    colours = ["#FFFFFF", OURS, "#9CC9E8", SECOND, "#F5D58F", THIRD, "#9FD8C4"][: int(shades.max()) + 1]
    tokens = list(zip(group, part, strict=True))
    across = sum(
        int(allowed[i, j]) for i, (g, p) in enumerate(tokens) for j, (h, q) in enumerate(tokens) if g != h or q not in (0, p)
    )
    said = f"{across} pairs of tokens see across texts" if across else "each completion sees its own prompt and itself alone"
    figure, ax = canvas(5.4, title=f"In a row of {len(part)} tokens {said}.\n{title}")
    ax.imshow(shades, cmap=ListedColormap(colours), interpolation="nearest", vmin=0, vmax=len(colours) - 1)
    starts = [0, *(i for i in range(1, len(part)) if (group[i], part[i]) != (group[i - 1], part[i - 1]))]
    spans = list(zip(starts, [*starts[1:], len(part)], strict=True))
    words = {0: "prompt", 1: "chosen", 2: "rejected"}
    middles = [(a + b - 1) / 2 for a, b in spans]
    ax.set_yticks(middles, [words.get(part[a], f"completion {part[a]}") for a in starts])
    ax.set_xticks(middles, [f"{position[a]}-{position[b - 1]}" for a, b in spans])
    for edge in starts[1:]:
        ax.axhline(edge - 0.5, color="black", lw=0.6)
        ax.axvline(edge - 0.5, color="black", lw=0.6)
    ax.set(xlabel="looked at, by position", ylabel="looking")
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
    zero = [r for r in rows if r["guide"] == guides[0] and r["margin"] == 0 and r.get("removed", 1)]
    times = [r["precision"] / r["base_rate"] for r in zero]
    said = f"At margin 0 {guides[0]} removes with {' and '.join(f'{t:.1f}' for t in times)} times the precision of chance."
    figure, axes = canvas(3.4, len(panels), title=f"{said}\n{title}" if times else title)
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
    np.atleast_1d(axes)[0].legend()
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
    title = f"At batch {both:,} GISTEmbedLoss takes {times:.3g} times as long as ours.\n{machine}, {result['written']}"
    figure, axes = canvas(5.2, 1, 2, title, sharex=True)
    panels = {"seconds": "seconds, forward and backward", "peak_mb": "peak memory, MB"}
    for ax, (key, what) in zip(axes, panels.items(), strict=True):
        for i, (method, label) in enumerate(names.items()):
            points = [r for r in rows if r["method"] == method and r["status"] == "ok"]
            style = {"ls": LINES[i], "marker": "osD^v"[i], "ms": 4, "color": (OURS, SECOND, THIRD, FOURTH, GREY)[i]}
            ax.plot([r["batch"] for r in points], [max(r[key], 1e-4) for r in points], label=label, **style)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set(title=what)
        plain_numbers(ax.xaxis)
        plain_numbers(ax.yaxis)
    axes[-1].set(xlabel="batch (triplets, 384 dimensions)")
    name_lines(axes[0])
    out = [{k: r.get(k, "") for k in ("method", "batch", "status", "seconds", "peak_mb")} for r in rows]
    save(run, name, figure, out, [], files=[path])


def scaling(
    run: Run, name: str, rows: Sequence[Mapping[str, float]], fit: Mapping[str, float], band: Any, inputs: Sequence[Artifact],
    title: str,
) -> None:  # fmt: skip
    """Fig. 4: score against the number of synthetic records, the paper's two points in the same panel, and what the fit leaves over.

    Rows {records, value, low, high, fit, fit_low, fit_high, residual, residual_low, residual_high}. The paper's points are of other
    tasks: its slope may be compared, its level not.
    """
    printed = paper_values.SCORE_BY_RECORDS
    doubling = (printed[-1][1] - printed[0][1]) / np.log2(printed[-1][0] / printed[0][0])
    said = f"{title}.\nThe paper's two points, on other tasks: {doubling:+.1f} (compare no levels)"
    figure, (left, right) = canvas(3.6, 2, title=said, width_ratios=(2, 1))
    x = np.array([r["records"] for r in rows])
    marks = {"fmt": "o", "color": OURS, "capsize": 4}
    left.errorbar(x, [r["value"] for r in rows], yerr=bars(rows), **marks)
    grid = np.geomspace(x.min(), x.max(), 50)
    left.plot(grid, fit["intercept"] + fit["slope"] * np.log2(grid), color=OURS)
    left.fill_between(grid, band[0], band[1], color=OURS, alpha=0.15)
    left.plot(*zip(*printed, strict=True), "D-", color=PAPER, mfc="none")
    right.axhline(0, color=GREY, lw=1, ls="--")
    right.errorbar(x, [r["residual"] for r in rows], yerr=bars(rows, "residual", "residual_low", "residual_high"), **marks)
    right.set(title="left over by the line", ylabel="points")
    few = x[:: 1 + len(x) // 4]
    for panel, ticks in ((left, [*few, *(n for n, _ in printed)]), (right, few)):
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [f"{n / 1000:g}K" if n > 9999 else f"{n:g}" for n in ticks])
        panel.set(xlabel="synthetic records")
    left.set(ylabel="mean score of each one's tasks")
    ours = f"ours, 95% interval\n{fit['slope']:+.2f} per doubling"
    left.annotate(ours, (x[-1], rows[-1]["low"]), color=OURS, **NAMED, xytext=(8, -4))
    left.annotate(f"paper, {doubling:+.1f} per doubling", printed[0], **NAMED, xytext=(0, 14), ha="center")
    paper: list[dict[str, Any]] = [{"records": n, "value": score, "source": "paper"} for n, score in printed]
    save(run, name, figure, [dict(r) | {"source": "ours"} for r in rows] + paper, inputs)


def sweeps(run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact], title: str) -> None:
    """Fig. 3: a panel for each sweep; rows {panel, x, own, records, value, low, high, each, paper} as `paper_sweeps.rows` gives them.

    A point whose models learned from another number of records than the profile's own says so under its value. Where the paper
    prints a difference (`paper_value`, or several of them), it is a black diamond.
    """
    panels = distinct([r["panel"] for r in rows])
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    others = [r for r in rows if not r["own"]]
    said = finding([{**r, "label": f"{r['panel'].split(': ')[-1]} {r['x']}"} for r in others])
    figure, axes = canvas(1.75 * lines + 1, columns, lines, f"{said}.\n{title}")
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
        heading = (panel, f"paper: {found[0]['paper']}")
        ax.set_title("\n".join(heading), fontsize=SMALL)
    for ax in axes[:, 0]:
        ax.set_ylabel("points", fontsize=SMALL)
    key = "points against the profile's own value (hollow), 95% interval; dash: one seed; black diamond: the paper's difference"
    figure.supxlabel(textwrap.fill(key, 90), x=0.01, ha="left", fontsize=SMALL)
    save(run, name, figure, rows, inputs)


def cost(run: Run, name: str, per_record: Mapping[str, tuple[float, float]], inputs: Sequence[Artifact]) -> None:
    """Table 5 for each training record: {who: (teacher calls, teacher tokens)} on logarithmic axes, the paper's in black and white."""
    of_paper = {w: w.startswith("paper") for w in per_record}
    ours, paper = (next((v for w, v in per_record.items() if of_paper[w] is printed), (0, 0)) for printed in (False, True))
    each = zip(ours, paper, ("calls", "tokens"), strict=True)
    times = [f"{mine / its:.2g} times the {unit}" for mine, its, unit in each if mine and its]
    title = f"A record of ours takes {' and '.join(times)} of SPEED's" if times else "What a record takes of the teacher"
    figure, axes = canvas(0.9 + 0.42 * len(per_record), 2, title=title)
    who = list(per_record)
    for k, (ax, unit) in enumerate(zip(axes, ("teacher calls", "teacher tokens"), strict=True)):
        low, high = (f(v[k] for v in per_record.values() if v[k] > 0) for f in (min, max))
        for i, label in enumerate(who):
            printed, value = label.startswith("paper"), per_record[label][k]
            colour, edge = ("white", PAPER) if printed else (OURS, OURS)
            ax.barh(i, value, color=colour, edgecolor=edge, hatch="//" if printed else "", height=0.6)
            said = f"{value:.3g}" if value else "not counted"  # an endpoint need not report tokens
            ax.annotate(said, (value or low / 3, i), (5, 0), textcoords="offset points", va="center", fontsize=SMALL)
        ax.set_xscale("log")
        plain_numbers(ax.xaxis)
        ax.set_yticks(range(len(who)), who if k == 0 else [""] * len(who))
        ax.invert_yaxis()
        ax.set(xlabel=f"{unit} per record", xlim=(low / 3, high * 4))
    save(run, name, figure, [{"who": w, "calls": v[0], "tokens": v[1]} for w, v in per_record.items()], inputs)


QUESTIONS = {"S": "SPEED: who writes the data", "E": "E5-mistral: how the model is trained", "G": "GISTEmbed: the guide"}
IN_HUNDREDTHS = {"G6": 100}  # the number of this claim is a share, the others' are points


def _heading(rows: Sequence[Mapping[str, Any]]) -> str:
    """The claims on which a verdict says something, and how many are left."""
    found = {words: [r["id"] for r in rows if r["verdict"] == v] for v, (_, _, words) in LOOKS.items() if words}
    said = [f"{words} {len(ids)} ({', '.join(ids)})" for words, ids in found.items() if ids]
    return f"Of {len(rows)} claims this run {', '.join([*said, f'leaves {len(rows) - sum(map(len, found.values()))} open'])}"


def claim_map(run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact]) -> None:
    """Forest plot of all claims with an effect: the estimate with its interval, the paper's effect as a diamond where it prints one, a
    band for what is too small to matter, the verdict in words, colour and shape. The claims without one stand in the last line."""
    bare = [r for r in rows if r["effect"] == "" and (r["low"] == "" or r["id"] in SHARES)]
    lines: list[tuple[str, Mapping[str, Any] | None]] = []
    for letter, question in QUESTIONS.items():
        lines.append((question, None))
        lines += [
            (textwrap.fill(f"{r['id']}  {r['claim']}", 52), r) for r in rows if r["id"].startswith(letter) and r not in bare
        ]
    deep = [text.count("\n") + 1 for text, _ in lines]
    figure, ax = canvas(1.6 + 0.17 * sum(deep), title=_heading(rows), width=8.3)
    ax.axvspan(-EQUIVALENCE_MARGIN, EQUIVALENCE_MARGIN, color="#EEEEEE", zorder=0)
    ax.axvline(0, color="black", linewidth=0.8, zorder=1)
    side = {"va": "center", "fontsize": SMALL, "transform": ax.get_yaxis_transform()}
    for i, (text, r) in zip(np.cumsum(deep) - np.array(deep) / 2, lines, strict=True):
        ax.text(-0.02, i, text, ha="right", weight="normal" if r else "bold", linespacing=1, **side)
        if r is None:
            continue
        found = Verdict(r["verdict"])
        colour, marker, _ = LOOKS[found]
        ink = "#555555" if colour in (GREY, "#CCCCCC") else colour
        ax.text(1.02, i, found, ha="left", color=ink, **side)
        if r["effect"] != "":
            ax.plot(r["effect"], i, "D", markersize=7, markerfacecolor="none", markeredgecolor=PAPER, zorder=4)
        if r["low"] != "" and r["id"] not in SHARES:
            value, low, high = (IN_HUNDREDTHS.get(r["id"], 1) * float(r[k]) for k in ("ours", "low", "high"))
            ax.plot([low, high], [i, i], color=colour, linewidth=1.8, zorder=2)
            ax.plot(value, i, marker, color=colour, markersize=7 if found is Verdict.CONTRADICTED else 5, zorder=3)
    ax.text(
        0, 0.5, "too small to matter", ha="center", va="center", fontsize=SMALL, bbox={"fc": "#EEEEEE", "ec": "none", "pad": 1}
    )
    ticks = (-10, -3, -1, 0, 1, 3, 10, 30)
    ax.set_xscale("symlog", linthresh=1, linscale=0.6)
    ax.set_xticks(ticks, [f"{t:+d}" if t else "0" for t in ticks])
    ax.minorticks_off()
    ax.set(yticks=[], ylim=(sum(deep), 0), xlim=(-20, 45), xlabel="points (G6: hundredths); diamond: the paper's effect")
    signs = {sign: ", ".join(k for k, v in EXPECTED.items() if v == sign) for sign in (-1, 0)}
    under = f"Expected: left of 0 for {signs[-1]}, within the band for {signs[0]}, else right of 0."
    if bare:
        under += " Without an effect in points: " + "; ".join(f"{r['id']} {r['verdict']}" for r in bare) + "."
    figure.supxlabel(textwrap.fill(under, 115), x=0.01, ha="left", fontsize=SMALL)
    ax.spines["left"].set_visible(False)
    save(run, name, figure, rows, inputs)
