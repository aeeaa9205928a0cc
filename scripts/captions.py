"""One sentence for each figure of the recorded `overnight` run, made from the numbers in the CSV beside it.

    python scripts/captions.py              # write the sentences into the notebooks again, after figures/ has changed
    python scripts/captions.py 01 02        # into these notebooks alone

`scripts/record.py` does so with every recorded run. A test compares the sentences with the committed figures, so no number in
the prose is older than its picture.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat

from speed_core.evaluation.uncertainty import leaves_zero_out
from speed_core.runner.notebook import notebooks
from speed_core.store.artifacts import notebook_number
from speed_core.store.run_context import OFFICIAL, ROOT
from speed_core.study.verdicts import Verdict

Rows = Sequence[dict[str, str]]

LEADS = (f"*The recorded run at `{OFFICIAL}`:*", "*The recorded run of the benchmark:*")
PICTURE = re.compile(r"!\[[^\]]*\]\((?:\.\./)*figures/(\w+)\.svg\)")
# A live notebook shows its own picture just above; two alike, with different numbers, would be mistaken for each other.
# The blank lines let Markdown read the line between them.
FOLDED = "<details><summary>The recorded figure</summary>\n\n{}\n\n</details>"


def _f(row: dict[str, str], key: str = "value") -> float:
    return float(row[key])


def _interval(row: dict[str, str], spec: str = "+.1f") -> str:
    return f"{_f(row):{spec}} [{_f(row, 'low'):{spec}}, {_f(row, 'high'):{spec}}]"


def _points(row: dict[str, str], spec: str = "+.1f") -> str:
    return f"{_f(row):{spec}} points [{_f(row, 'low'):{spec}}, {_f(row, 'high'):{spec}}]"


def _resolved(row: dict[str, str]) -> bool:
    return leaves_zero_out(_f(row, "low"), _f(row, "high"))


def _by_label(rows: Rows) -> dict[str, dict[str, str]]:
    return {r["label"]: r for r in rows}


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else "".join(items)


def _those(found: Sequence[str], one: str, many: str) -> str:
    return f"{_listed(found) or 'none'} {many if len(found) > 1 else one}"


def _data_of(label: str) -> str:
    """A data set of the figure of generators in words: "base model, 150 records" is "the base model's"."""
    name = label.partition(",")[0]
    return f"{'the ' * name.islower()}{name}'s"


def _differences(rows: Rows, whole: str, spec: str = "+.1f") -> str:
    """Reading of a figure of differences in points: the one over all tasks, then which others leave zero out."""
    by = _by_label(rows)
    found = [f"{r['label'].replace(', ', ' on ')} {_interval(r, spec)}" for r in rows if r["label"] != whole and _resolved(r)]
    over = whole.replace(", all ", " and all ")
    first = f"{_points(by[whole], spec)} over {over}, {'resolved' if _resolved(by[whole]) else 'not resolved'}"
    return f"{first}; of the parts, {_those(found, 'is', 'are')} resolved."


def _depth(rows: Rows) -> str:
    raw, cut = ({int(r["category"]): int(_f(r)) for r in rows if r["series"] == s} for s in ("raw paths", "truncated"))
    most = max(k for k, n in cut.items() if n)
    return f"{sum(n for k, n in raw.items() if k > most)} of {sum(raw.values())} topics were deeper than {most} levels and lost their middle."


LOST = {
    "answered": "had no answer", "complete": "were cut off", "valid records": "were invalid",
    "no near-duplicate": "were near-duplicates", "no evaluation overlap": "shared words with an evaluation text",
}  # fmt: skip


def _steps(rows: Rows) -> str:
    counts = [(r["step"], int(_f(r, "records"))) for r in rows]
    lost = [f"{n - m} {LOST[step]}" for (_, n), (step, m) in zip(counts, counts[1:], strict=False) if n != m]
    return f"{counts[-1][1]} of {counts[0][1]} are left: {_listed(lost) or 'nothing was lost on the way'}."


def _valid(rows: Rows) -> str:
    by = _by_label(rows)
    junior, base = (_interval(by[name], ".0%") for name in ("junior", "base"))
    return f"without a grammar the junior writes a valid record for {junior} of the prompts, the base model for {base}."


def _dpo(rows: Rows) -> str:
    first, last = rows[0], rows[-1]
    moved = f"from {round(_f(first, 'margin'), 2) + 0.0:.2f} to {_f(last, 'margin'):.2f}"
    chosen = [_f(r, "reward_chosen") for r in rows[-3:]]
    likely = "less" if max(chosen) < 0 else "more" if min(chosen) > 0 else "neither clearly more nor less"
    return (
        f"in {len(rows)} steps the reward margin goes {moved}, and the policy ranks {_f(last, 'accuracy'):.0%} of the last batch's "
        f"pairs as the judge did; the chosen texts of the last three steps are {likely} likely than under the junior."
    )


def _packed(rows: Rows) -> str:
    parts = len({(r["group"], r["part"]) for r in rows})
    prompts = len({r["group"] for r in rows})
    return f"one row holds {len(rows)} tokens: {prompts} prompts and their completions, {parts} pieces in all."


def _senior(rows: Rows) -> str:
    won = _by_label(rows)["senior wins over junior"]
    open_ = _f(won, "low") <= 0.5 <= _f(won, "high")
    above = "the interval contains one half, so no difference is resolved" if open_ else "a resolved difference"
    return f"by the rubric the senior wins {_interval(won, '.2f')} of the unseen prompts; {above}."


def _revision(rows: Rows) -> str:
    def said(r: dict[str, str]) -> str:
        if _f(r, "low") == _f(r, "high") == 0:
            return f"the {r['label']} changes no score"
        return f"the {r['label']} adds {_interval(r)} hundredths{'' if _resolved(r) else ' (not resolved)'}"

    return f"{_listed([said(r) for r in rows])}."


def _kept(rows: Rows) -> str:
    low, high = min(rows, key=_f), max(rows, key=_f)
    valid = sum(int(r["valid"]) for r in rows)
    lost = valid - sum(int(r["kept"]) for r in rows)
    if not lost:
        return f"none of {valid} valid records was dropped."
    said = [f"{_f(r):.0%} [{_f(r, 'low'):.0%}, {_f(r, 'high'):.0%}] ({r['label']})" for r in (low, high)]
    return f"{lost} of {valid} valid records were dropped; the share kept runs from {said[0]} to {said[-1]}."


def _mask(rows: Rows) -> str:
    gone = Counter(r["block"] for r in rows if int(float(r["removed"])))
    every = Counter(r["block"] for r in rows)
    return f"the guide removes {sum(gone.values())} of the {sum(every.values()):,} pairs that are shown."


def _quality(rows: Rows) -> str:
    at = [r for r in rows if _f(r, "margin") == 0 and r["labels"] == rows[0]["labels"]]
    said = [f"{_f(r, 'precision'):.2f} and {_f(r, 'recall'):.2f} ({r['guide']})" for r in at]
    chance = f"removal at random has precision {_f(at[0], 'base_rate'):.2f}"
    return f"at margin 0, precision and recall on {at[0]['labels']} are {_listed(said)}; {chance}."


def _cost(rows: Rows) -> str:
    by = {(r["method"], int(r["batch"])): r for r in rows if r["status"] == "ok"}
    both = max(b for m, b in by if m == "gist")
    gist, ours = by["gist", both], by["ours", both]
    much = _f(gist, "seconds") / _f(ours, "seconds")
    less = _f(gist, "peak_mb") / _f(ours, "peak_mb")
    return (
        f"at batch {both:,}, the largest that the common implementation finished, ours takes 1/{much:.0f} of its time and 1/{less:.0f} "
        f"of its memory (`benchmarks/guided_loss.py`, two CPU cores)."
    )


def _training(rows: Rows) -> str:
    said = []
    for name in dict.fromkeys(r["series"] for r in rows):
        mine = [r for r in rows if r["series"] == name]
        said.append(f"from {_f(mine[0], 'loss'):.1f} to {_f(mine[-1], 'loss'):.1f} ({name})")
    return f"the loss falls {_listed(said)}."


def _generators(rows: Rows) -> str:
    found = [r for r in rows if _resolved(r)]
    times = max(int(r.get("generators") or 1) for r in rows)
    over = f"over {times} trainings of the generators, " if times > 1 else ""
    if not found:
        return f"{over}no data set differs from Jr's by more than the noise."
    only = "only " * (len(found) < len(rows))
    whose, by = _listed([_data_of(r["label"]) for r in found]), _listed([_points(r) for r in found])
    return f"{over}{only}{whose} data differ from Jr's by more than the noise: {by}."


def _sweeps(rows: Rows) -> str:
    others = [r for r in rows if r["own"] != "True"]
    found = [f"{r['panel'].split(': ')[-1]} {r['x']} ({_interval(r)} points)" for r in others if _resolved(r)]
    many = f"{len(found) or 'none'} of {len(others)} changed values {'differ' if len(found) > 1 else 'differs'}"
    return f"{many} from the profile's own by more than texts and embedding seeds explain{': ' * bool(found)}{_listed(found)}."


def _scaling(rows: Rows) -> str:
    ours = [r for r in rows if r["source"] == "ours"]
    said = [f"{_interval(r, '.1f')} at {r['records']}" for r in ours]
    off = max(ours, key=lambda r: abs(_f(r, "residual")))
    around = f" [{_f(off, 'residual_low'):+.1f}, {_f(off, 'residual_high'):+.1f}]" if off.get("residual_low") else ""
    residual = f"the largest residual is {_f(off, 'residual'):+.1f} points{around}, at {off['records']} records"
    return f"the score is {_listed(said)} records; {residual}."


def _per_record(rows: Rows) -> str:
    ours, paper = (next(r for r in rows if r["who"] == who) for who in ("this run", "paper: SPEED"))
    calls, tokens = (_f(ours, k) / _f(paper, k) for k in ("calls", "tokens"))
    return f"{_f(ours, 'calls'):.2f} teacher calls and {_f(ours, 'tokens'):.0f} tokens per record, {calls:.0f} and {tokens:.0f} times as many as SPEED."


def _asked(rows: Rows) -> str:
    said = [f"{r['label']} ({_interval(r, '+.2f')} points)" for r in rows if _resolved(r)]
    are = "are" if len(said) > 1 else "is"
    return f"{len(said) or 'none'} of {len(rows)} questions {are} resolved{': ' * bool(said)}{'; '.join(said)}."


def _tasks(rows: Rows) -> str:
    low, high = min(rows, key=_f), max(rows, key=_f)
    return f"scores run from {_interval(low, '.1f')} points ({low['label']}) to {_interval(high, '.1f')} ({high['label']}) over {len(rows)} tasks."


def _categories(rows: Rows) -> str:
    """Reading of the figure of category means: the best and the worst category of each model, and of the paper's."""
    said, printed = [], [r for r in rows if r["paper"] and r["category"] != "Avg"]
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == model and r["category"] != "Avg"]
        best, worst = max(mine, key=_f), min(mine, key=_f)
        said.append(f"{model}, {best['category']} ({_f(best):.1f}) and {worst['category']} ({_f(worst):.1f})")
    if printed:
        best, worst = (pick(printed, key=lambda r: _f(r, "paper")) for pick in (max, min))
        ends = f"{best['category']} ({_f(best, 'paper'):.1f}) and {worst['category']} ({_f(worst, 'paper'):.1f})"
        said.append(f"the paper, {ends}")
    return f"the best and the worst category: {'; '.join(said)}."


ENDED = {  # of one claim, and of several
    Verdict.REPRODUCED: ("is reproduced", "are reproduced"),
    Verdict.SMALLER: ("goes the same way", "go the same way"),
    Verdict.EQUIVALENT: ("is equivalent within the margin", "are equivalent within the margin"),
    Verdict.UNRESOLVED: ("is not resolved", "are not resolved"),
    Verdict.INACTIVE: ("had an inactive treatment", "had an inactive treatment"),
    Verdict.CONTRADICTED: ("is contradicted", "are contradicted"),
    Verdict.IMPOSSIBLE: ("cannot be tested", "cannot be tested"),
    Verdict.UNTESTED: ("is not yet tested", "are not yet tested"),
}


def _claims(rows: Rows) -> str:
    counted = Counter(Verdict(r["verdict"]) for r in rows).most_common()
    return f"of {len(rows)} claims, {_listed([f'{n} {ENDED[v][n > 1]}' for v, n in counted])}."


READINGS: dict[str, Callable[[Rows], str]] = {
    "01_topic_depth": _depth,
    "02_seed_yield": _steps,
    "03_valid_rate": _valid,
    "04_dpo_training": _dpo,
    "04_packed_row": _packed,
    "04_senior_against_junior": _senior,
    "05_revision": _revision,
    "06_yield": _steps,
    "06_table6_share_kept": _kept,
    "07_masking_microscope": _mask,
    "07_mask_quality": _quality,
    "07_guided_students": lambda rows: _differences(rows, "all students, all tasks", "+.2f"),
    "07_small_student": _asked,
    "07_loss_cost": _cost,
    "08_training": _training,
    "09_trained_minus_untrained": lambda rows: _differences(rows, "all tasks"),
    "09_table8_tasks": _tasks,
    "10_table1_categories": _categories,
    "09_guided_minus_plain": lambda rows: _differences(rows, "all tasks"),
    "09_instructions": lambda rows: _differences(rows, "all tasks"),
    "10_table2_generators": _generators,
    "10_sweeps": _sweeps,
    "11_scaling": _scaling,
    "12_table5_cost": _per_record,
    "12_claims": _claims,
}


def reading(name: str, figures: Path) -> str:
    """The sentence for the figure `name` of the folder `figures`."""
    with (figures / f"{name}.csv").open(encoding="utf-8") as f:
        return READINGS[name](list(csv.DictReader(f)))


def under_pictures(text: str, figures: Path) -> str:
    """The text of a Markdown cell with the sentence of its recorded figure behind the words that lead to it, and the figure folded."""
    found = PICTURE.search(text)
    lead = next((lead for lead in LEADS if text.startswith(lead)), "")
    if not found or not lead:
        return text
    after = text[found.end() :].strip().removeprefix("</details>").strip()
    folded = FOLDED.format(found[0])
    return "\n\n".join(part for part in (f"{lead} {reading(found[1], figures)}", folded, after) if part)


def write(figures: Path = ROOT / "figures", only: Sequence[str] = ()) -> int:
    """Bring the sentences in the notebooks (in those with the numbers `only`) up to the figures; returns how many cells changed."""
    changed = 0
    for path in [p for p in notebooks(ROOT / "notebooks") if not only or notebook_number(p) in only]:
        nb = nbformat.read(path, as_version=4)
        for cell in (c for c in nb.cells if c.cell_type == "markdown"):
            new = under_pictures(cell.source, figures)
            changed += new != cell.source
            cell.source = new
        nbformat.write(nb, path)
    return changed


if __name__ == "__main__":
    print(f"{write(only=sys.argv[1:])} sentences under figures changed")
