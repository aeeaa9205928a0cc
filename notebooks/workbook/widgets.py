"""Three things to touch: the margin of the mask (07), the written records (06), the temperature (03).

Every one gives its facts first, as ordinary text and, where the notebook has none yet, as a still figure. The margin's slider is
a script in the page. The two others need a kernel and come only where somebody can move them, so a page without one (a
papermill run, an HTML export, a preview on the web) loses nothing and shows no empty box.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from html import escape
from typing import Any

import ipywidgets as w
import torch
from IPython.core.getipython import get_ipython
from IPython.display import display

from speed_core.contrastive.guided_loss import LossSettings, false_negative_mask
from speed_core.contrastive.loss_inputs import TIE
from speed_core.data import records
from speed_core.data.prompts import Prompt, revise
from speed_core.evaluation import uncertainty
from speed_core.files import ASSETS, read_jsonl
from speed_core.plots import provenance
from speed_core.plots.basic import OURS, canvas
from speed_core.store.artifacts import Artifact

TEMPERATURES = (0.3, 0.7, 1.0, 1.3)  # what scripts/record_temperatures.py records
MARGINS = (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2)
BLOCKS = {"ap": "query-positive", "an": "query-negative", "aa": "query-query", "pp": "positive-positive"}
FILTERS = ("stage", "status", "kind", "reason")
# Reasons of `records.parse` in words; which key is hit is chance at this size.
FAULTS = {"length": "cut off", "not_json": "no JSON", "missing_key": "miss a key"}
FAULTS |= dict.fromkeys(("query_equals_positive", "positive_equals_negative", "query_equals_negative"), "repeat themselves")
RECORDED = ASSETS / "recorded" / "temperatures.jsonl"
LABELS = {"description_width": "initial"}  # ipywidgets cuts a long label otherwise
NO_KERNEL = "(A widget stands here while a kernel runs; its numbers are in the text above.)"


def interactive() -> bool:
    """Can somebody move a slider here?

    The rule: in a Jupyter kernel, unless SPEED_HEADLESS is set. A kernel cannot ask who reads its output, so whoever runs
    notebooks with nobody watching has to say it: `notebook.execute` does, and so can any other batch runner.
    """
    return os.environ.get("SPEED_HEADLESS", "") in ("", "0") and getattr(get_ipython(), "kernel", None) is not None


def show(text: str, build: Callable[[], Any], figure: Any = None) -> None:
    """Print `text` and display `figure`; where somebody can touch it, display the widget that `build()` returns as well.

    The widget is not even made in a headless run: papermill would keep its state in the notebook's metadata, and a page
    made from that would wait for a script from the network. In a front end that draws no widgets a line stands in its place.
    """
    print(text)
    if figure is not None:
        title = figure.axes[0].get_title("left")
        provenance.show(figure, f"{title}. Its numbers stand in the text above.")
    if interactive():
        display(build()._repr_mimebundle_() | {"text/plain": NO_KERNEL}, raw=True)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in (head, *rows))


def _text(title: str, body: str) -> str:
    """A titled block of preformatted text as HTML; model text is escaped, never rendered."""
    style = (
        "white-space: pre-wrap; word-break: normal; overflow-wrap: anywhere; max-height: 20em; overflow: auto; margin: 2px 0 8px"
    )
    return f'<b>{escape(title)}</b><pre style="{style}" tabindex="0">{escape(body)}</pre>'


# --- 07: the margin ------------------------------------------------------------------------------


def margin_table(columns: Sequence[Any]) -> str:
    """Candidates removed in each block, a line for each margin; `columns` are the guide's (B, D) queries, positives, negatives."""
    rows = []
    for m in MARGINS:
        removed = false_negative_mask(tuple(columns), LossSettings(margin=m)).removed
        counts = [int(removed[b].sum()) for b in BLOCKS if b in removed]
        rows.append([f"{m:+.2f}", *map(str, counts), str(sum(counts))])
    return _table(["margin", *(name for b, name in BLOCKS.items() if b in removed), "all"], rows)


def margin_data(columns: Sequence[Any]) -> dict[str, Any]:
    """What the slider computes the mask from, in thousandths: {own: the guide's similarity of each pair (B,), blocks: {name: how far
    each candidate lies above its row's own pair, None where it never counts}}.

    Distances are rounded up, so that "removed: distance > -margin" is exact at every margin of whole thousandths.
    """
    at_zero, all_removed = (false_negative_mask(tuple(columns), LossSettings(margin=m)) for m in (0.0, 4.0))
    own, blocks = at_zero.threshold.double(), {}
    for b, name in ((b, name) for b, name in BLOCKS.items() if b in at_zero.removed):
        above = at_zero.similarity[b].double() - own[:, None] - TIE * torch.finfo(columns[0].dtype).eps
        counts = all_removed.removed[b].tolist()
        rows = zip((1000 * above).ceil().int().tolist(), counts, strict=True)
        blocks[name] = [[x if may else None for x, may in zip(*row, strict=True)] for row in rows]
    return {"own": (1000 * own).round().int().tolist(), "blocks": blocks}


# Plain JavaScript, so that the slider works wherever the output is shown as a page: in JupyterLab, in an exported file and on the
# site, without a kernel and without a network. Where scripts are not run, the sentence in the box stays. JupyterLab would take the
# arrow keys for itself, but for the attribute of the slider that keeps its shortcuts away.
MARGIN_PAGE = """<div style="background: white; color: black; padding: 4px">
<p>A slider stands here where scripts may run. Its numbers are in the table above.</p>
<script>
(() => {
  const data = DATA, box = document.currentScript.parentElement, font = "font: 14px sans-serif; ";
  const stops = ["#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838"];  // cividis, dark to light
  const colour = x => stops[Math.max(0, Math.min(5, Math.floor(x * 6 / 1000)))];
  const panel = ([name, rows]) => `<figure style="margin: 0">
    <figcaption style="${font}text-align: left">${name}: <b></b></figcaption>
    <svg role="img" viewBox="0 0 ${rows[0].length} ${rows.length}" style="width: 100%" shape-rendering="crispEdges">
    ${rows.map((row, i) => row.map((x, j) => `<rect x="${j}" y="${i}" width="1" height="1"
      fill="${x === null ? "white" : colour(data.own[i] + x)}"/>`).join("")).join("")}
    <g fill="none" shape-rendering="auto"><path stroke="white" stroke-width=".4"/><path stroke="#d55e00" stroke-width=".22"/></g>
    </svg></figure>`;
  box.innerHTML = `<label style="${font}">margin m
    <input type="range" min="-0.3" max="0.3" step="0.01" value="0" style="width: 220px; vertical-align: middle"
      data-lm-suppress-shortcuts="true"></label>
    <output style="${font}" aria-live="polite"></output>
    <div style="display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; max-width: 640px; margin: 8px 0">
    ${Object.entries(data.blocks).map(panel).join("")}</div>
    <div style="${font}">A row for each pair, a column for each candidate; a cross marks what is removed, white what never counts.
    <span style="white-space: nowrap">Guide similarity: 0
    ${stops.map(c => `<span style="display: inline-block; width: 20px; height: 11px; background: ${c}"></span>`).join("")} 1</span>
    </div>`;
  const slider = box.querySelector("input"), figures = [...box.querySelectorAll("figure")];
  const draw = () => {
    const bar = -Math.round(1000 * slider.value);
    const said = `${slider.value > 0 ? "+" : ""}${(+slider.value).toFixed(2)}`;
    const counts = Object.entries(data.blocks).map(([name, rows], k) => {
      const gone = rows.flatMap((row, i) => row.flatMap((x, j) => x !== null && x > bar ? [[i, j]] : []));
      const crosses = gone.map(([i, j]) => `M${j + .15} ${i + .15}l.7 .7m0 -.7l-.7 .7`).join("");
      figures[k].querySelectorAll("path").forEach(path => path.setAttribute("d", crosses));
      figures[k].querySelector("b").textContent = `${gone.length} removed`;
      figures[k].querySelector("svg").setAttribute("aria-label", `${name} at margin ${said}: ${gone.length} removed`);
      return gone.length;
    });
    box.querySelector("output").textContent = `${said}: ${counts.reduce((a, b) => a + b)} removed`;
    slider.setAttribute("aria-valuetext", said);
  };
  slider.addEventListener("input", draw);
  draw();
})();
</script>
</div>"""


def margin(columns: Sequence[Any]) -> None:
    """Notebook 07: counts at a few margins, and a slider over the mask that works in the page itself."""
    print(margin_table(columns))
    if getattr(get_ipython(), "kernel", None) is not None:
        page = MARGIN_PAGE.replace("DATA", json.dumps(margin_data(columns), separators=(",", ":")))
        display(
            {"text/html": page, "text/plain": "(A slider stands here on a page; its numbers are in the table above.)"}, raw=True
        )


# --- 06: the browser -----------------------------------------------------------------------------


def entries(planned: Sequence[Prompt], raw: Artifact, revised: Artifact, data: Artifact) -> list[dict[str, str]]:
    """Every outcome of `raw` and `revised`, and every record that `data` dropped, with the prompt that was read.

    Each is {stage: raw, revised or curation; status; kind; reason: empty when valid; prompt; text}.
    """
    asked = {q.id: q.text for q in planned}
    first = {e["record"]: e["raw"] for e in raw.rows()}
    out = []
    for stage, artifact in (("raw", raw), ("revised", revised)):
        for e in artifact.rows():
            prompt = asked[e["record"]] if stage == "raw" else revise(asked[e["record"]], first[e["record"]])
            said = {k: e[k] for k in ("status", "kind", "reason")}
            out.append({"stage": stage, **said, "prompt": prompt, "text": e["raw"]})
    for r in data.rows("dropped.jsonl"):
        text = json.dumps({k: r[k] for k in ("query", "positive", "negative", "because")}, ensure_ascii=False, indent=1)
        said = {"status": "dropped", "kind": r["kind"], "reason": r["dropped_by"]}
        out.append({"stage": "curation", **said, "prompt": asked[r["id"]], "text": text})
    return out


def outcome_counts(found: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """How many texts ended how: {"stage, status, reason": texts}."""
    return dict(Counter(", ".join(filter(None, (e["stage"], e["status"], e["reason"]))) for e in found))


def outcome_table(found: Sequence[Mapping[str, str]]) -> str:
    """`outcome_counts` as text, a line each."""
    return _table(["stage, status, reason", "texts"], [[k, str(n)] for k, n in outcome_counts(found).items()])


def outcome_picture(counts: Mapping[str, int]) -> Any:
    """The still figure of `browse`: a bar for each stage and outcome, valid ones filled, the others hatched."""
    figure, ax = canvas(0.9 + 0.3 * len(counts))
    for i, (label, n) in enumerate(counts.items()):
        ok = label.endswith(", ok")
        ax.barh(i, n, color=OURS if ok else "white", edgecolor=OURS, hatch="" if ok else "//", height=0.6)
        ax.annotate(str(n), (n, i), (5, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(counts)), [label.replace("_", " ") for label in counts])
    ax.invert_yaxis()
    ax.set(title="How each text ended", xlabel="texts", xlim=(0, max(counts.values(), default=1) * 1.12))
    return figure


def entry_browser(found: Sequence[Mapping[str, str]]) -> Any:
    """Filters by stage, status, kind and reason, two buttons, and the text with its prompt."""
    filters = {}
    for key in FILTERS:
        values = sorted({e[key] for e in found} - {""})
        filters[key] = w.Dropdown(options=[("all", ""), *((v, v) for v in values)], description=key, style=LABELS)
    back, on = w.Button(description="previous"), w.Button(description="next")
    place, page, at = w.Label(), w.HTML(), 0

    def draw(step: int = 0) -> None:
        nonlocal at
        chosen = [e for e in found if all(f.value in ("", e[key]) for key, f in filters.items())]
        at = max(0, min(at + step, len(chosen) - 1)) if step else 0
        back.disabled, on.disabled = at == 0, at >= len(chosen) - 1
        place.value = f"{at + 1} of {len(chosen)}" if chosen else "none: widen a filter"
        shown = chosen[at : at + 1]  # one or, where the filters leave nothing, none
        titles = [", ".join(filter(None, (e[key] for key in FILTERS))) for e in shown]
        page.value = "".join(_text(s, e["text"]) + _text("prompt", e["prompt"]) for s, e in zip(titles, shown, strict=True))

    for f in filters.values():
        f.observe(lambda _: draw(), "value")
    back.on_click(lambda _: draw(-1))
    on.on_click(lambda _: draw(+1))
    draw()
    return w.VBox([w.HBox(list(filters.values()), layout=w.Layout(flex_flow="row wrap")), w.HBox([back, on, place]), page])


def browse(planned: Sequence[Prompt], raw: Artifact, revised: Artifact, data: Artifact) -> None:
    """Notebook 06: how many texts ended how, and a browser of all of them."""
    found = entries(planned, raw, revised, data)
    show(outcome_table(found), lambda: entry_browser(found), outcome_picture(outcome_counts(found)))


# --- 03: the temperature -------------------------------------------------------------------------


@lru_cache(maxsize=1)
def recorded_samples() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(header, rows) of the recording; each row has its `status` and `reason`, parsed here and now like any model text."""
    header, *rows = read_jsonl(RECORDED)
    for r in rows:
        found = records.parse(r["raw"], r["kind"], r["finish_reason"])
        r |= {"status": found.status, "reason": found.reason, "prompt": r["record"].partition("#")[0]}
    return header, rows


@lru_cache(maxsize=1)
def temperature_points() -> list[dict[str, Any]]:
    """For each temperature {x, value, low, high: share of valid records and its 95% interval over prompts; valid, all: counts;
    wrong: {fault: texts}}."""
    header, rows = recorded_samples()
    points: list[dict[str, Any]] = []
    for t in TEMPERATURES:
        here = [r for r in rows if r["temperature"] == t]
        by_prompt = [[r["status"] == "ok" for r in here if r["prompt"] == p] for p in header["prompts"]]
        low, high = uncertainty.bootstrap_interval([sum(v) / len(v) for v in by_prompt], "mean")
        valid = sum(map(sum, by_prompt))
        families = [r["reason"].partition(":")[0] for r in here if r["status"] != "ok"]
        counts = {"valid": valid, "all": len(here), "wrong": Counter(FAULTS.get(f, f) for f in families)}
        points.append({"x": t, "value": valid / len(here), "low": low, "high": high} | counts)
    return points


def temperature_lines() -> list[str]:
    """A head and a line for each of `temperature_points`."""
    lines = []
    for p in temperature_points():
        share = f"{p['value']:.2f} [{p['low']:.2f}, {p['high']:.2f}]"
        wrong = ", ".join(f"{n} {why}" for why, n in p["wrong"].most_common())
        lines.append([f"{p['x']}", f"{p['valid']} of {p['all']}", share, wrong])
    return _table(["temperature", "valid", "share, 95% interval", "the others"], lines).split("\n")


def temperature_picture(points: Sequence[Mapping[str, float]]) -> Any:
    """The still figure of `temperature`: share of valid records against temperature; points {x, value, low, high}."""
    figure, ax = canvas(2.6)
    x, y = ([p[k] for p in points] for k in ("x", "value"))
    error = [[p["value"] - p["low"] for p in points], [p["high"] - p["value"] for p in points]]
    ax.errorbar(x, y, yerr=error, fmt="o-", color=OURS, capsize=4, label="ours, 95% interval")
    ax.set_xticks(x)
    ax.set(title="Valid records, recorded samples", xlabel="temperature", ylabel="share valid", ylim=(0, 1))
    ax.legend()
    return figure


def temperature_slider() -> Any:
    """A slider over the recorded temperatures, a prompt and a seed: the recorded text, and whether it is a valid record."""
    header, rows = recorded_samples()
    lines = temperature_lines()
    topics = [(f"{q['kind']}: {q['topic']}", name) for name, q in header["prompts"].items()]
    slider = w.SelectionSlider(options=TEMPERATURES, value=0.7, description="temperature", style=LABELS)
    prompt = w.Dropdown(options=topics, description="prompt", style=LABELS, layout=w.Layout(width="auto"))
    seed = w.Dropdown(options=sorted({r["record"].partition("#")[2] for r in rows}), description="seed", style=LABELS)
    page = w.HTML()

    def draw(_: Any = None) -> None:
        name = f"{prompt.value}#{seed.value}"
        r = next(r for r in rows if r["temperature"] == slider.value and r["record"] == name)
        said = "a valid record" if r["status"] == "ok" else f"no valid record: {r['status']}, {r['reason']}"
        here = TEMPERATURES.index(slider.value) + 1
        marked = "\n".join(f"{'>' if i == here else ' '} {line}" for i, line in enumerate(lines))
        asked = header["prompts"][prompt.value]["text"]
        parts = {f"temperature {slider.value}, {said}": r["raw"], "all samples": marked, "prompt": asked}
        page.value = "".join(_text(title, body) for title, body in parts.items())

    for control in (slider, prompt, seed):
        control.observe(draw, "value")
    draw()
    return w.VBox([slider, prompt, seed, page])


def temperature() -> None:
    """Notebook 03: share of valid records at four temperatures (recorded), and the texts behind it."""
    header, rows = recorded_samples()
    made = f"recorded {header['date']} on {header['device']}: profile {header['profile']}, junior {header['junior'][:12]}"
    record = rows[0]["record"]
    samples = [f"{r['temperature']}: {' '.join(r['raw'].split())[:110]} ..." for r in rows if r["record"] == record]
    text = "\n".join([made, *temperature_lines(), "", "one prompt, one seed:", *samples])
    show(text, temperature_slider, temperature_picture(temperature_points()))
