"""One function a figure. Each writes NAME.svg, NAME.csv (the plotted numbers) and NAME.json (where they come from, see provenance.py).

Colours are Okabe and Ito's, told apart in grey by hatching or marker too. A score that is compared is
drawn with its interval or not at all.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speed_core.files import UserError
from speed_core.plots.provenance import save
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run
from speed_core.study import paper_values

OURS, SECOND, THIRD, PAPER, GREY = "#0072B2", "#E69F00", "#009E73", "#000000", "#999999"
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


def canvas(width: float = 7.0, height: float = 3.4, columns: int = 1, lines: int = 1) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt.subplots(lines, columns, figsize=(width, height), layout="constrained")


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
    categories = list(dict.fromkeys(k for g in groups.values() for k in g))
    width = 0.8 / len(groups)
    whole = all(float(v).is_integer() for g in groups.values() for v in g.values())
    for i, (series, values) in enumerate(groups.items()):
        paper = series.startswith("paper")  # the paper's values are black on white, here as in every figure
        x = np.arange(len(categories)) + (i - (len(groups) - 1) / 2) * width
        bars = ax.bar(
            x,
            [values.get(c, 0) for c in categories],
            width * 0.95,
            label=series,
            color="white" if paper else (OURS, SECOND, THIRD)[i % 3],
            edgecolor=PAPER if paper else None,
            hatch=("", "//", "..")[i % 3],
        )
        ax.bar_label(bars, fmt="%d" if whole else "%.2f", fontsize=8, padding=1)
    ax.set_xticks(np.arange(len(categories)), [c.replace("_", "-") for c in categories])
    ax.set(title=title, ylabel=ylabel, xlabel=xlabel)
    if len(groups) > 1:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    rows = [{"series": s, "category": c, "value": g.get(c, 0)} for s, g in groups.items() for c in categories]
    save(run, name, figure, rows, inputs)


def rates(
    run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact], title: str, xlabel: str,
    paper: Mapping[str, float] | None = None, line: float | None = None,
) -> None:  # fmt: skip
    """Estimates with intervals: rows {label, value, low, high}; the paper's value (same units) as a black diamond.

    With `each` in a row, the values of single training seeds (of single trainings of the generators, where a row counts several) stand
    as small marks below the estimate. `line`: the value that says "no difference", drawn dashed.
    """
    if any("low" not in r or "high" not in r for r in rows):
        raise UserError(f"figure {name}: a compared score without an interval; give low and high")
    figure, ax = canvas(7, 0.9 + 0.42 * len(rows))
    for i, r in enumerate(rows):
        error = [[max(0.0, r["value"] - r["low"])], [max(0.0, r["high"] - r["value"])]]
        ax.errorbar(r["value"], i, xerr=error, fmt="o", color=OURS, capsize=4, label="ours, 95% interval" if i == 0 else None)
        seeds = r.get("each", ())
        if len(seeds) > 1:
            mark = "one training of the generators" if r.get("generators", 1) > 1 else "one seed"
            shown = ax.get_legend_handles_labels()[1].count(mark)
            ax.plot(seeds, [i + 0.22] * len(seeds), "|", color=OURS, ms=6, label=None if shown else mark)
        if paper and r["label"] in paper:
            shown = not ax.get_legend_handles_labels()[1].count("paper")
            ax.plot(paper[r["label"]], i, "D", color=PAPER, mfc="none", label="paper" if shown else None)
    if line is not None:
        ax.axvline(line, color=GREY, lw=1, ls="--")
    ax.set_yticks(range(len(rows)), [r["label"] for r in rows])
    # Half a row above and below, however many rows: a margin in shares puts two rows on the edges and spreads nine.
    ax.set(title=title, xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    out = [dict(r) | {"paper": (paper or {}).get(r["label"], "")} for r in rows]
    save(run, name, figure, out, inputs)


def categories(run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact], title: str) -> None:
    """Table 1: mean score of each category, a marker for each model; rows {category, model, value, low, high, paper}.

    `paper`: SPEED's value of the category on MTEB (a black diamond), of another model on other tasks: its order may be compared,
    its level not.
    """
    kinds, models = (list(dict.fromkeys(r[k] for r in rows)) for k in ("category", "model"))
    figure, ax = canvas(7.6, 1.3 + 0.14 * len(kinds) * (len(models) + 1))
    step = 0.8 / (len(models) + 1)  # the last place of a category is the paper's
    for j, model in enumerate(models):
        mine = [r for r in rows if r["model"] == model]
        y = [kinds.index(r["category"]) - 0.4 + (j + 0.5) * step for r in mine]
        value = np.array([r["value"] for r in mine])
        error = np.maximum(0, [value - [r["low"] for r in mine], [r["high"] for r in mine] - value])
        colour, mark = (GREY, THIRD, SECOND, "#CC79A7", OURS)[j % 5], "os^vP"[j % 5]
        ax.errorbar(value, y, xerr=error, fmt=mark, color=colour, capsize=3, ms=5, label=model)
    printed = {r["category"]: r["paper"] for r in rows if r["paper"] != ""}
    if printed:
        label = "paper: SPEED 7B on MTEB (other tasks: compare no levels)"
        ax.plot(
            list(printed.values()), [kinds.index(k) + 0.4 - step / 2 for k in printed], "D", color=PAPER, mfc="none", label=label
        )
    for edge in range(1, len(kinds)):
        ax.axhline(edge - 0.5, color=GREY, lw=0.5)
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set(title=title, xlabel="mean score x 100, 95% interval", ylim=(len(kinds) - 0.5, -0.5))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    save(run, name, figure, rows, inputs)


def curves(
    run: Run,
    name: str,
    series: Mapping[str, Sequence[Mapping[str, float]]],
    keys: Sequence[str],
    inputs: Sequence[Artifact],
    title: str,
) -> None:
    """Training curves: one panel a key, one line a series, over steps."""
    figure, axes = canvas(3.4 * len(keys) + 0.4, 3.0, len(keys))
    for ax, key in zip(np.atleast_1d(axes), keys, strict=True):
        for i, (label, history) in enumerate(series.items()):
            points = [(h["step"], h[key]) for h in history if key in h]
            ax.plot(
                *zip(*points, strict=True),
                color=(OURS, SECOND, THIRD, GREY)[i % 4],
                ls=("-", "--", ":", "-.")[i % 4],
                marker="o",
                ms=3,
                label=label,
            )
        ax.set(xlabel="step", title=key.replace("_", " "))
        if len(series) > 1:
            ax.legend(fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    rows = [{"series": s, **{k: h[k] for k in ("step", *keys) if k in h}} for s, history in series.items() for h in history]
    save(run, name, figure, rows, inputs)


def mask_matrix(run: Run, name: str, view: Any, inputs: Sequence[Artifact], title: str) -> None:
    """The masking microscope: which in-batch candidates the guide removed, in each block."""
    figure, rows = mask_picture(view, title)
    save(run, name, figure, rows, inputs)


def mask_picture(view: Any, title: str) -> tuple[Any, list[dict[str, Any]]]:
    """(figure, plotted rows) of the masking microscope for a `MaskView`; nothing is written."""
    import matplotlib.colors as colors

    blocks = [b for b in ("ap", "an", "aa", "pp") if b in view.removed]
    names = {"ap": "query - positive", "an": "query - negative", "aa": "query - query", "pp": "positive - positive"}
    figure, axes = canvas(2.6 * len(blocks), 3.1, len(blocks))
    rows = []
    for ax, b in zip(np.atleast_1d(axes), blocks, strict=True):
        gone, similarity = view.removed[b].cpu().numpy(), view.similarity[b].cpu().numpy()
        image = ax.imshow(similarity, cmap="cividis", norm=colors.Normalize(0, 1), aspect="auto")
        ys, xs = np.nonzero(gone)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.get_major_locator().set_params(integer=True)
        ax.scatter(xs, ys, marker="x", color="white", s=36, lw=3.2)  # an edge, for readers in grey
        ax.scatter(xs, ys, marker="x", color="#D55E00", s=26, lw=1.6)
        ax.set(title=f"{names[b]}\n{int(gone.sum())} removed", xlabel="candidate", ylabel="row" if b == "ap" else "")
        rows += [
            {"block": b, "row": i, "candidate": j, "guide_similarity": round(float(similarity[i, j]), 4), "removed": int(gone[i, j])}
            for i in range(gone.shape[0]) for j in range(gone.shape[1])
        ]  # fmt: skip
    figure.colorbar(image, ax=axes, label="guide similarity", shrink=0.8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure, rows


def packed_mask(run: Run, name: str, batch: Mapping[str, Any], inputs: Sequence[Artifact], title: str) -> None:
    """Who may look at whom in the first row of a packed DPO batch (`prompt_sharing.collate`), and the position of each token."""
    from speed_core.preference.prompt_sharing import dense_mask

    allowed = dense_mask(batch["group"], batch["segment_ids"], batch["position_ids"])[0, 0].numpy()
    group, part, position = (batch[k][0].tolist() for k in ("group", "segment_ids", "position_ids"))
    owner = np.where(allowed, np.array([2 * g + (1 if p == 0 else 2) for g, p in zip(group, part, strict=True)])[None, :], 0)
    figure, ax = canvas(6.4, 5.2)
    import matplotlib.colors as colors

    shades = ["#FFFFFF", OURS, "#9CC9E8", SECOND, "#F5D58F", THIRD, "#9FD8C4"][: int(owner.max()) + 1]
    ax.imshow(owner, cmap=colors.ListedColormap(shades), interpolation="nearest", vmin=0, vmax=len(shades) - 1)
    starts = [0, *(i for i in range(1, len(part)) if (group[i], part[i]) != (group[i - 1], part[i - 1]))]
    ends = [*starts[1:], len(part)]
    words = {0: "prompt", 1: "chosen", 2: "rejected"}
    middles = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
    labels = [words.get(part[a], f"completion {part[a]}") for a in starts]
    ax.set_yticks(middles, labels, fontsize=8)
    ax.set_xticks(middles, [f"positions\n{position[a]}-{position[b - 1]}" for a, b in zip(starts, ends, strict=True)], fontsize=7)
    for edge in starts[1:]:
        ax.axhline(edge - 0.5, color="black", lw=0.6)
        ax.axvline(edge - 0.5, color="black", lw=0.6)
    ax.set(title=title, xlabel="looked at", ylabel="looking")
    rows = [{"token": i, "group": g, "part": k, "position": x, "sees": int(allowed[i].sum())} for i, (g, k, x) in enumerate(zip(group, part, position, strict=True))]  # fmt: skip
    save(run, name, figure, rows, inputs)


def mask_quality(run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact], title: str) -> None:
    """Precision against recall of the mask over margins, a panel for each source of labels, a line for each guide.

    Rows {labels, guide, margin, precision, recall, low/high of both, base_rate}. Bars are the intervals, the ringed
    point is margin 0; the dashed line is the precision of removing at random.
    """
    panels, guides = list(dict.fromkeys(r["labels"] for r in rows)), list(dict.fromkeys(r["guide"] for r in rows))
    figure, axes = canvas(4.2 * len(panels), 3.8, len(panels))
    for ax, panel in zip(np.atleast_1d(axes), panels, strict=True):
        # A mask that removes nothing has no precision; a bar of one that removes little may leave the panel.
        mine = [r for r in rows if r["labels"] == panel and r.get("removed", 1)]
        top = min(1.02, 1.15 * max(r["precision_high"] if r["margin"] == 0 else r["precision"] for r in mine))
        for i, guide in enumerate(guides):
            points = [r for r in mine if r["guide"] == guide]
            colour = (OURS, SECOND, THIRD)[i % 3]
            x, y = [r["recall"] for r in points], [r["precision"] for r in points]
            ax.plot(x, y, color=colour, ls=("-", "--", ":")[i % 3], marker=("o", "s", "^")[i % 3], ms=4, label=guide)
            error = {
                f"{side}err": np.maximum(
                    0, [[r[key] - r[f"{key}_low"] for r in points], [r[f"{key}_high"] - r[key] for r in points]]
                )
                for side, key in (("x", "recall"), ("y", "precision"))
            }
            ax.errorbar(x, y, **error, fmt="none", color=colour, capsize=2, lw=0.8, alpha=0.6)
            zero = [r for r in points if r["margin"] == 0]
            ax.plot([r["recall"] for r in zero], [r["precision"] for r in zero], "o", ms=11, mfc="none", mec=colour)
        base = next(r["base_rate"] for r in rows if r["labels"] == panel)
        ax.axhline(base, color=GREY, ls="--", lw=1, label="removed at random")
        ax.set(title=panel, xlabel="recall of false negatives", ylabel="precision", xlim=(-0.02, 1.02), ylim=(0, top))
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    save(run, name, figure, rows, inputs)


def loss_cost(run: Run, name: str, path: Path) -> None:
    """Seconds and memory of the losses over batch sizes, from a file of `benchmarks/results`; a line ends at the largest batch that worked."""
    result = json.loads(path.read_text(encoding="utf-8"))
    figure, axes = canvas(9, 3.6, 2)
    names = {
        "ours": "ours", "matmul": "plain matrix product", "gist": "GISTEmbedLoss", "cached_gist": "CachedGISTEmbedLoss",
        "unguided": "ours, no guide",
    }  # fmt: skip
    rows = [r for r in result["rows"] if r["method"] in names]
    for i, (method, label) in enumerate(names.items()):
        points = [r for r in rows if r["method"] == method and r["status"] == "ok"]
        for ax, key in zip(axes, ("seconds", "peak_mb"), strict=True):
            colour = (OURS, SECOND, THIRD, "#CC79A7", GREY)[i]
            style = ("-", "--", ":", "-.", (0, (1, 1)))[i]
            ax.plot(
                [r["batch"] for r in points],
                [max(r[key], 1e-4) for r in points],
                ls=style,
                marker="osD^v"[i],
                ms=4,
                color=colour,
                label=label,
            )
    for ax, ylabel in zip(axes, ("seconds, forward and backward", "peak memory, MB"), strict=True):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set(xlabel="batch (triplets, 384 dimensions)", ylabel=ylabel)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(
        f"The loss alone, {result['machine'].get('gpu', result['machine']['cpu'])}, recorded {result['written']}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    out = [{k: r.get(k, "") for k in ("method", "batch", "status", "seconds", "peak_mb")} for r in rows]
    save(run, name, figure, out, [], files=[path])


def scaling(
    run: Run, name: str, rows: Sequence[Mapping[str, float]], fit: Mapping[str, float], band: Any, inputs: Sequence[Artifact]
) -> None:
    """Fig. 4: score against the number of synthetic records, log-linear fit with its band, what it leaves over, and the paper's
    two points. Rows {records, value, low, high, fit, fit_low, fit_high, residual, residual_low, residual_high}."""
    figure, (ax, middle, right) = canvas(10.4, 3.4, 3)
    x = np.array([r["records"] for r in rows])
    y = np.array([r["value"] for r in rows])
    error = np.maximum(0, [y - [r["low"] for r in rows], [r["high"] for r in rows] - y])
    ax.errorbar(x, y, yerr=error, fmt="o", color=OURS, capsize=4, label="ours, 95% interval")
    grid = np.geomspace(x.min(), x.max(), 50)
    ax.plot(grid, fit["intercept"] + fit["slope"] * np.log2(grid), color=OURS, label=f"{fit['slope']:+.2f} points a doubling")
    ax.fill_between(grid, band[0], band[1], color=OURS, alpha=0.15)
    ax.set(title="ours", ylabel="mean score of the offline tasks")
    ax.legend(fontsize=8)
    middle.axhline(0, color=GREY, lw=1, ls="--")
    left = np.array([r["residual"] for r in rows])
    error = np.maximum(0, [left - [r["residual_low"] for r in rows], [r["residual_high"] for r in rows] - left])
    middle.errorbar(x, left, yerr=error, fmt="o", color=OURS, capsize=4)
    middle.set(title="residuals of the line", ylabel="points")
    for panel in (ax, middle):
        panel.set_xscale("log", base=2)
        panel.set_xticks(x, [str(int(v)) for v in x])
        panel.set(xlabel="synthetic records")
    printed = paper_values.SCORE_BY_RECORDS
    thousands, scores = [n / 1000 for n, _ in printed], [score for _, score in printed]
    right.plot(thousands, scores, "D-", color=PAPER, mfc="none", label="+0.1 points a doubling")
    right.set_xscale("log", base=2)
    right.set_xticks([230, 920], ["230K", "920K"])
    right.set(title="paper (Tables 1 and 2)", xlabel="synthetic records", ylabel="MTEB average, 56 tasks", ylim=(62.5, 64))
    right.legend(fontsize=8)
    paper: list[dict[str, Any]] = [{"records": n, "value": score, "source": "paper"} for n, score in printed]
    save(run, name, figure, [dict(r) | {"source": "ours"} for r in rows] + paper, inputs)


def sweeps(run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact], title: str) -> None:
    """Fig. 3: a panel for each sweep; rows {panel, x, own, records, value, low, high, each, paper} as `paper_sweeps.rows` gives them.

    A point whose models learned from another number of records than the profile's own says so under its value. Where the paper
    prints a difference (`paper_value`, or several of them), it is a black diamond.
    """
    panels = list(dict.fromkeys(r["panel"] for r in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = canvas(3.2 * columns, 2.7 * lines + 0.4, columns, lines)
    axes = np.atleast_2d(axes)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        found = [r for r in rows if r["panel"] == panel]
        for i, r in enumerate(found):
            error = [[max(0.0, r["value"] - r["low"])], [max(0.0, r["high"] - r["value"])]]
            face = "white" if r["own"] else OURS
            ax.errorbar(i, r["value"], yerr=error, fmt="o", color=OURS, mfc=face, capsize=4)
            if not r["own"]:
                ax.plot([i + 0.15] * len(r["each"]), r["each"], "_", color=OURS, ms=6)
            if r.get("paper_value", "") != "":
                values = np.atleast_1d(r["paper_value"])
                ax.plot([i - 0.15] * len(values), values, "D", color=PAPER, mfc="none")
        ax.axhline(0, color=GREY, lw=1, ls="--")
        usual = next((r["records"] for r in found if r["own"]), None)
        few = [r["records"] not in (None, usual) for r in found]
        ticks = [f"{r['x']}\n({r['records']} records)" if other else r["x"] for r, other in zip(found, few, strict=True)]
        ax.set_xticks(range(len(found)), ticks)
        ax.margins(x=0.15)
        ax.set_title(f"{panel}\npaper: {found[0]['paper']}", fontsize=8.5)
    for ax in axes[:, 0]:
        ax.set_ylabel("points against own value", fontsize=8.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    save(run, name, figure, rows, inputs)


def cost(run: Run, name: str, per_record: Mapping[str, tuple[float, float]], inputs: Sequence[Artifact]) -> None:
    """Table 5 for each training record: {who: (teacher calls, teacher tokens)} on logarithmic axes, the paper's in black and white."""
    figure, axes = canvas(8.4, 0.9 + 0.42 * len(per_record), 2)
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
        ax.set(xlabel=f"{unit} a record", xlim=(low / 3, high * 4))
    figure.suptitle("What a training record costs", x=0.01, ha="left", fontsize=11)
    save(run, name, figure, [{"who": w, "calls": v[0], "tokens": v[1]} for w, v in per_record.items()], inputs)


def verdicts(run: Run, name: str, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact]) -> None:
    """The claim map as a picture: one line a claim, its verdict in words and colour."""
    colours = {"reproduced": THIRD, "smaller scale, same direction": THIRD, "not resolved at this size": GREY, "contradicted": "#D55E00", "not possible here": "#CCCCCC", "not yet tested": "#CCCCCC"}  # fmt: skip
    figure, ax = canvas(9, 0.6 + 0.27 * len(rows))
    for i, r in enumerate(rows):
        ax.barh(i, 1, color=colours.get(r["verdict"], GREY), height=0.85)
        ax.text(
            -0.02, i, f"{r['id']}  {textwrap.shorten(r['claim'], 84, placeholder=' ...')}", ha="right", va="center", fontsize=8
        )
        ax.text(
            0.5,
            i,
            r["verdict"],
            ha="center",
            va="center",
            fontsize=8,
            color="white" if r["verdict"] == "contradicted" else "black",
        )
    ax.set(title="verdicts at this size", xticks=[], yticks=[], xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
    for spine in ax.spines.values():
        spine.set_visible(False)
    save(run, name, figure, rows, inputs)
