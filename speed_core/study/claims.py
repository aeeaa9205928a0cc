"""The claim map: each claim of the papers, what they print, what this run found, and a verdict by rule.

The verdict of a comparison is never typed in: it follows from the interval of a difference, which covers texts and
training seeds (`uncertainty`). One that is not resolved says that the paper's effect is outside of the interval, or what would
resolve it (one of a point where the paper prints none). A claim whose quantity this run did not measure says so.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from speed_core.evaluation import uncertainty
from speed_core.evaluation.uncertainty import Estimate
from speed_core.study import paper_values

# id, claim, the paper's value, notebook, id of the cell in it that measures the claim.
# Sources: SPEED Tables 1-6 and Figs. 3-4, E5-mistral Table 5, GISTEmbed cards.
CLAIMS: list[tuple[str, str, str, str, str]] = [
    ("S1", "data of aligned 8B models beats GPT-made data, synthetic-only", "63.4 against 63.1", "10", "table2"),
    ("S2", "with labelled data added the order flips slightly", "66.5 against 66.6", "10", "mixed"),
    ("S3", "fewer than 1/10 of the teacher calls, about 1/6 of the tokens", "45K/500K calls, 32M/180M tokens", "12", "calls"),
    ("S4", "alignment beats the off-the-shelf model (paper: instruct model; here: base model)", "61.0 against 62.6 (Jr) and 63.2", "10", "table2"),
    ("S5", "the aligned small model beats its own teacher's data at equal size", "62.2 against 63.2", "10", "table2"),
    ("S6", "order Jr < Jr+Re < Sr < Sr+Re", "62.6 < 62.8 < 62.9 < 63.2", "10", "table2"),
    ("S7", "the revisor helps", "+0.2 on Jr, +0.3 on Sr", "10", "table2"),
    ("S8", "DPO helps", "+0.3 without Re, +0.4 with it", "10", "table2"),
    ("S9", "more tasks a topic at fixed size hurts", "62.6 / 61.6 / 60.9", "10", "sweeps"),
    ("S10", "over-specific topics hurt", "62.6 against 61.8", "10", "sweeps"),
    ("S11", "works across base models", "62.6 / 62.5 / 62.4 / 62.3", "10", "sweeps"),
    ("S12", "generation temperature has an interior optimum", "Fig. 3a, at 1.0", "10", "sweeps"),
    ("S13", "a small seed set is enough, too many hurt", "Fig. 3b, 25K", "10", "sweeps"),
    ("S14", "beta has an interior optimum", "Fig. 3c, at 0.1", "10", "sweeps"),
    ("S15", "DPO needs fewer samples than SFT", "Fig. 3d, 10K", "10", "sweeps"),
    ("S16", "the revisor needs fewer samples than the junior", "Fig. 3e, 10K", "10", "sweeps"),
    ("S17", "log-linear scaling with diminishing returns", "63.2 @230K, 63.4 @920K", "11", "slope"),
    ("S18", "generators without tailoring write poor hard negatives", "no number", "10", "hard-negatives"),
    ("S19", "one revision pass suffices", "no experiment", "05", "second-pass"),
    ("S20", "the judge's signals are good enough", "no experiment", "04", "judge-check"),
    ("S21", "topics reduce narrowness", "no run without topics", "01", ""),
    ("S22", "MinHash deduplication", "1.15M to 920,415 (classification 245,947, STS 294,388, retrieval 303,424, short matching 39,954, long 36,702)", "06", "curation"),
    ("E1", "synthetic-only data is competitive (here: it beats the untrained model)", "63.1", "09", "trained-minus-untrained"),
    ("E2", "synthetic data adds to labelled data", "64.6 to 66.6", "07", "students"),
    ("E3", "instructions matter", "64.5 to 60.3 without", "09", "instructions"),
    ("E4", "pooling and LoRA rank matter little", "pooling -0.4 and -0.5, rank +0.3 and +0.1", "10", "sweeps"),
    ("E5", "contrastive pre-training is unnecessary for a strong model", "+0.1", "09", ""),
    ("G1", "guide masking improves the student", "+0.56 / +0.16 / +0.10", "07", "students"),
    ("G2", "gains are largest for small students", "the same numbers", "07", "students"),
    ("G3", "STS improves most", "+1.4 / +1.1 / +1.5", "07", "students"),
    ("G4", "retrieval can fall on an uncovered topic", "TRECCOVID -6.8 / -8.5 / -5.7", "07", "students"),
    ("G5", "topic-matched synthetic triplets repair that", "no number", "07", "students"),
    ("G6", "masking removes false negatives", "no number", "07", "mask-quality"),
    ("G7", "a stronger guide lifts a weaker student", "guide 64.64, students 62.7-64.3", "07", "students"),
    ("G8", "in-domain training data confounds the published gain", "11 of 12 train sets used", "07", "students"),
    ("G9", "a margin can help further", "no number", "07", "students"),
]  # fmt: skip


# What no run of this repository can measure without something that it does not have.
NOT_POSSIBLE = {
    "S21": "needs brainstorming without topics; the recorded teacher has answers for topics only",
    "E5": "needs a base model before and after contrastive pre-training; no package carries such a pair",
}

# What compares generators, or data sets: more embedding seeds do not tell how much another training or another sample would
# change. For S1, S2 and S4 to S8 generators are trained and asked again (`repeats`); the others are never resolved.
ONE_GENERATOR = ("S1", "S2", "S4", "S5", "S6", "S7", "S8", "S11", "S13", "S14", "S15", "S16", "S18", "S19")
ONE_SAMPLE = ("S9", "S10", "S12")
TRAININGS = 3  # of the generators, from which on an interval over them may decide
HUMPS = ("S12", "S13", "S14", "S15", "S16")  # claims of an optimum inside a range

# What a reader has to know of a claim's evidence beside its interval.
NOTES = {
    "S2": "one labelled source in place of 13",
    "S15": "tests an optimum inside the range only; the shares of DPO and SFT were not compared",
    "S16": "tests an optimum inside the range only; the shares of revisor and junior were not compared",
    "S20": "the paper gives no number; the pairs were written by the rubric's authors",
    "E4": "the learning rate was chosen with last-token pooling",
    "G6": "the paper gives no number",
    "G7": "one of many intervals at 95%, without allowance for their number; that it does not pass its guide is not measured",
}

# Points (S19: hundredths of the rubric). A claim that something matters little holds when the whole interval is inside; E4's
# largest printed difference is 0.5.
LITTLE = 1.0
UNRESOLVED = "not resolved at this size"
SMALLER = "smaller scale, same direction"
REPRODUCED = "reproduced"
CONTRADICTED = "contradicted"
IMPOSSIBLE = "not possible here"
UNTESTED = "not yet tested"
VERDICTS = (REPRODUCED, SMALLER, UNRESOLVED, CONTRADICTED, IMPOSSIBLE, UNTESTED)
# The smallest training set that SPEED prints scores for, and the claims that models of such size can reproduce: claim -> the
# arm whose records count.
PAPER_RECORDS = paper_values.SCORE_BY_RECORDS[0][0]
SIZED = {"S17": "guided", "E3": "guided"} | dict.fromkeys(("S1", "S4", "S5", "S6", "S7", "S8"), "sr_re")
EQUAL = ("S1", "S4", "S5", "S7", "S8")  # comparisons of data sets at equal size
# Differences of arms: claim -> (in words, (arm, the one it is compared with)). Where the paper prints two such differences, ours is the
# mean of the two; S6 is the step of its three that is least surely one upward.
COMPARED: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "S1": ("Sr+Re against the recorded teacher's own examples", (("sr_re", "teacher"),)),
    "S4": ("Jr and Sr+Re against the untrained base model's records", (("jr", "base"), ("sr_re", "base"))),
    "S5": ("Sr+Re against the recorded teacher's own examples", (("sr_re", "teacher"),)),
    "S6": ("the step of Jr, Jr+Re, Sr, Sr+Re whose interval reaches lowest", (("jr_re", "jr"), ("sr", "jr_re"), ("sr_re", "sr"))),
    "S7": ("revised against not, of Jr and of Sr", (("jr_re", "jr"), ("sr_re", "sr"))),
    "S8": ("Sr against Jr, without and with revision", (("sr", "jr"), ("sr_re", "jr_re"))),
    "E1": ("trained on synthetic data against untrained", (("guided", "untrained"),)),
    "E3": ("the same models with instructions against without", (("guided", "bare"),)),
}
E5_TOKENS = paper_values.E5_A_RECORD[1]  # the teacher's, a record


def verdict(low: float, high: float, expected: int = 1) -> str:
    """Same direction, contradicted, or not resolved, from the interval of a difference and the claimed sign.

    An expected sign of 0 claims that the difference is no larger than `LITTLE` either way.
    """
    if not expected:
        inside, outside = -LITTLE < low <= high < LITTLE, low > LITTLE or high < -LITTLE
        return SMALLER if inside else CONTRADICTED if outside else UNRESOLVED
    if low > 0 or high < 0:
        sign = 1 if low > 0 else -1
        return SMALLER if sign == expected else CONTRADICTED
    return UNRESOLVED


def judged(
    key: str, e: Estimate, what: str, artifact: str, *, trained: bool = True, expected: int = 1, level: float = 0.95
) -> dict[str, Any]:
    """The row of a claim that is a difference in points, with an interval of `level`. `trained`: models were trained for it, so
    seeds must be covered."""
    said = verdict(e.low, e.high, expected)
    seeds = f"{e.seeds} embedding seeds and the texts" if e.seeds > 1 else "the texts; one training seed"
    if e.generators > 1:
        seeds = f"{e.generators} trainings of the generators ({e.seeds} embedding models an arm) and the texts"
    if e.no_texts:
        seeds = f"{e.seeds} embedding seeds"
    why = f"{what}: {e} points, interval over {seeds if trained else 'the texts'}"
    if e.low == e.high:
        said, why = UNRESOLVED, why + "; nothing changed anywhere, which says nothing of a case in which something would"
    elif e.no_texts:  # tasks of which mteb gives no value for each text
        said, why = UNRESOLVED, why + "; it leaves out the texts, so its sign decides nothing"
    elif key in HUMPS and said == CONTRADICTED:
        said, why = UNRESOLVED, why + "; the best value is at an end, so an optimum may lie outside of this range"
    elif (once := _once(key, e)) and said != UNRESOLVED:
        times = "one training" if e.generators == 1 else "two trainings"
        single = f"rests on {times} of each generator" if key in ONE_GENERATOR else "rests on one writing of each data set"
        said, why = UNRESOLVED, why + f"; the interval leaves zero out, but {single}: it takes {once}"
    elif key == "G4" and said == CONTRADICTED:
        said, why = UNRESOLVED, why + "; a rise here does not show that it cannot fall elsewhere"
    elif trained and e.seeds == 1 and said != UNRESOLVED:
        # Trainings differ by their seeds too, which an interval over texts does not see.
        said, why = UNRESOLVED, why + "; it leaves out the seed, so its sign decides nothing"
    elif said == UNRESOLVED and (e.seeds > 1 or not trained):
        why += _would_resolve(key, e, trained, expected, level)
    ends = {"low": e.low, "high": e.high}
    numbers = {"ours": round(e.value, 2)} | {k: "" if math.isnan(v) else round(v, 2) for k, v in ends.items()}
    return numbers | {"verdict": said, "why": why, "artifact": artifact}


def _once(key: str, e: Estimate) -> str:
    """What would have to be repeated beside the embedding models to resolve a claim; empty for most, and where it was repeated."""
    if key in ONE_GENERATOR:
        return "generators trained three times at least" if e.generators < TRAININGS else ""
    return "data sets written three times at least" if key in ONE_SAMPLE else ""


def _would_resolve(key: str, e: Estimate, trained: bool, expected: int, level: float) -> str:
    """That the interval leaves the paper's effect out, or what it takes to resolve it, or one of `LITTLE` where it prints none; of
    a claim that something matters little, what it takes to have the whole interval on one side of `LITTLE`."""
    once = _once(key, e)
    if expected:
        effect = paper_values.EFFECTS.get(key, LITTLE * expected)
        whose = f"the paper's {effect:+g}" if key in paper_values.EFFECTS else f"an effect of {LITTLE:g}"
        smaller = e.high < effect if effect > 0 else e.low > effect
        if smaller and not once and key in paper_values.EFFECTS:
            return f"; smaller than the paper's effect: the interval leaves {effect:+g} out"
        if smaller and not once:
            seen = uncertainty.needed(e, e.value, trained=trained, level=level)
            return f"; {whose} is outside of the interval, the {e.value:+.2f} seen would need {_same_seeds(seen, e)}"
    else:
        room = LITTLE - abs(e.value)
        effect, whose = room, f"an interval within {LITTLE:g} of zero" if room > 0 else f"one wholly beyond {LITTLE:g}"
    needed = uncertainty.needed(e, effect, trained=trained, level=level)
    if needed == uncertainty.ENOUGH and once:
        return f"; {whose} would need {once}"
    if needed == uncertainty.ENOUGH:
        whose, needed = f"the {e.value:+.2f} seen", uncertainty.needed(e, e.value, trained=trained, level=level)
    return f"; {whose} would need {_same_seeds(needed, e)}{', and ' * bool(once)}{once}"


def _same_seeds(needed: str, e: Estimate) -> str:
    """`needed` without a number of repetitions that is no larger than the one that was used."""
    unit = r" and (\d+) (seeds|trainings of the generators)"
    return re.sub(unit, lambda m: f" and the same {m[2]}" if int(m[1]) <= e.repeats else m[0], needed)


def _bent(row: dict[str, Any], bend: Mapping[str, Any] | None) -> dict[str, Any]:
    """S17's row from that of the slope and the estimate of the `bend`: diminishing returns are half of the claim."""
    if row["verdict"] != SMALLER:
        return row
    if bend is None:
        return row | {
            "verdict": UNRESOLVED,
            "why": row["why"] + "; diminishing returns, its other half, were not measured (it takes three sizes)",
        }
    e = _estimate(bend)
    half = f"; diminishing returns, its other half: bend {e}"
    if (said := verdict(e.low, e.high, -1)) == UNRESOLVED:
        half += f" is not resolved; the {e.value:+.1f} seen would need {_same_seeds(uncertainty.needed(e, e.value), e)}"
    return row | {"verdict": said, "why": row["why"] + half}


def _estimate(f: Mapping[str, Any]) -> Estimate:
    names = ("value", "low", "high", "seeds", "sd_items", "sd_seeds")
    return Estimate(**{k: f[k] for k in names}, generators=f.get("generators", 1))


def arms_of(key: str) -> list[str]:
    """The arms that a claim of `COMPARED` compares."""
    return list(dict.fromkeys(arm for pair in COMPARED[key][1] for arm in pair))


def compared(key: str, scores: Mapping[str, Sequence[Any]], groups: Sequence[int] = (), *, draws: int = 1000) -> Estimate | None:
    """The estimate of a claim of `COMPARED` from {arm: results} (`groups` as in `uncertainty.contrast`); None without an arm's."""
    pairs = COMPARED[key][1]
    if not all(scores.get(arm) for arm in arms_of(key)):
        return None
    if key == "S6":  # an order holds where each step rises, and fails where one falls, be it of three
        least = _least_step(scores, groups, draws, 0.95)
        return least if least.high >= 0 else _least_step(scores, groups, draws, 1 - 0.05 / len(pairs))
    signs = [(sign, arm) for pair in pairs for sign, arm in zip((1, -1), pair, strict=True)]
    return uncertainty.contrast([(sign / len(pairs), scores[arm], None) for sign, arm in signs], draws=draws, groups=groups)


def _least_step(scores: Mapping[str, Sequence[Any]], groups: Sequence[int], draws: int, level: float) -> Estimate:
    """The step of S6 whose interval reaches lowest."""
    terms = [[(1.0, scores[a], None), (-1.0, scores[b], None)] for a, b in COMPARED["S6"][1]]
    steps = [uncertainty.contrast(both, draws=draws, groups=groups, level=level) for both in terms]
    return min(steps, key=lambda e: e.low)


def compared_words(key: str, records: Mapping[str, int]) -> str:
    """What a claim of `COMPARED` compares, and whether on equally many `records` ({arm: how many})."""
    what, counts = COMPARED[key][0], {arm: records[arm] for arm in arms_of(key) if arm in records}
    if key not in EQUAL or not counts:
        return what
    many = f"on unequally many ({', '.join(f'{arm} {n}' for arm, n in counts.items())})"
    return f"{what}, {many if len(set(counts.values())) > 1 else 'equally many'}"


def build(
    scores: Mapping[str, Sequence[Any]],
    facts: Mapping[str, Any],
    digests: Mapping[str, str],
    records: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Rows {id, claim, paper, ours, low, high, verdict, why, notebook, cell, artifact} for every claim.

    `scores` maps arms (untrained, guided, bare, jr, jr_re, sr, sr_re, base, teacher) to their results, one a training seed;
    `facts` holds estimates by claim (`estimates`: {id: {value, low, high, seeds, sd_items, sd_seeds, what, source}}), the
    mask's precision, the share of kept records and teacher calls; `digests` maps what a verdict rests on to its artifacts.
    `records`: how many each arm's models learned from; a comparison of unequally many says so, and with `PAPER_RECORDS` or more
    the same direction is "reproduced" (`SIZED`).
    """
    found: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    records = records or {}
    estimates = facts.get("estimates", {})
    for key in (k for k in COMPARED if k not in estimates):  # notebook 10 may have estimated it over several trainings
        arms = arms_of(key)
        if e := compared(key, scores):
            found[key] = judged(key, e, compared_words(key, records), " ".join(digests[arm] for arm in arms))
        else:
            absent[key] = (
                f"no scores of {' and '.join(a for a in arms if not scores.get(a))}; an arm with too few valid records is left out"
            )
    for key, f in estimates.items():
        # S2 says that the teacher's data wins with labelled data, G4 that retrieval *can* fall; S11, S19 and E4 say that something makes little difference.
        expected = {"S2": -1, "G4": -1, "S11": 0, "S19": 0, "E4": 0}.get(key, 1)
        how = {"trained": f.get("trained", True), "level": f.get("level", 0.95)}
        found[key] = judged(key, _estimate(f), f["what"], digests[f["source"]], expected=expected, **how)
    if "S17" in found:
        found["S17"] = _bent(found["S17"], facts["estimates"]["S17"].get("bend"))
    if "G1" in found and scores.get("guided") and scores.get("plain"):
        found["G1"]["why"] += f"; on the larger model of notebook 09 {uncertainty.difference(scores['guided'], scores['plain'])}"
        found["G1"]["artifact"] += f" {digests['guided']} {digests['plain']}"
    if "mask" in facts:
        m = facts["mask"]
        found["G6"] = {
            "ours": round(m["gain"], 3), "low": round(m["gain_low"], 3), "high": round(m["gain_high"], 3),
            "verdict": verdict(m["gain_low"], m["gain_high"]),
            "why": f"precision {m['precision']:.2f} of the mask at margin 0 minus base rate {m['base_rate']:.2f}, labels of 20 Newsgroups",
            "artifact": digests["mask"],
        }  # fmt: skip
    if "kept" in facts:
        dropped, valid = facts["valid"] - facts["kept"], facts["valid"]
        low, high = uncertainty.share_interval([True] * facts["kept"] + [False] * dropped)
        why = f"{facts['kept']} of {valid} valid records kept after MinHash and overlap checks (the paper keeps 0.80); that dropping helps takes embedding models trained with and without it"
        if not dropped:
            why += f", on a pool of which MinHash drops something: here less than {1 - low:.1%}"
        found["S22"] = {
            "ours": round(facts["kept"] / valid, 3), "low": round(low, 3), "high": round(high, 3), "verdict": UNRESOLVED,
            "why": why, "artifact": digests["synthetic"],
        }  # fmt: skip
    if "calls" in facts:
        c = facts["calls"]
        few, said = c["records"] < PAPER_RECORDS, REPRODUCED if c["share"] < 0.1 else CONTRADICTED
        each = c["tokens"] / c["records"]
        why = f"{c['calls']} teacher answers for {c['records']} records: {c['share']:.2f} calls and {each:.0f} tokens a record (SPEED 0.05 and 35, E5-mistral 1 and {E5_TOKENS:.0f}), judged by the calls"
        if few:
            wanted = (10 * c["calls"], 6 * c["tokens"] / E5_TOKENS)
            needed = [f"{math.ceil(n):,} ({n / c['records']:.1f} x as many)" for n in wanted]
            why += f"; too few records to spread the seeds over: a tenth of its calls takes more than {needed[0]}, a sixth of its tokens {needed[1]}"
        found["S3"] = {
            "ours": round(c["share"], 3), "low": "", "high": "", "verdict": IMPOSSIBLE if few else said, "why": why,
            "artifact": digests["synthetic"],
        }  # fmt: skip
    rows = []
    for key, claim, paper, notebook, cell in CLAIMS:
        nothing = {"ours": "", "low": "", "high": "", "artifact": ""}
        if key in NOT_POSSIBLE:
            entry = nothing | {"verdict": IMPOSSIBLE, "why": NOT_POSSIBLE[key]}
        else:
            why = absent.get(key, "this run does not measure it yet (sweeps: `python -m speed_core study`)")
            entry = nothing | {"verdict": UNTESTED, "why": why}
        row = {"id": key, "claim": claim, "paper": paper, **found.get(key, entry), "notebook": notebook, "cell": cell}
        if key in found and key in NOTES:
            row["why"] += f"; {NOTES[key]}"
        if row["verdict"] == SMALLER and records.get(SIZED.get(key, ""), 0) >= PAPER_RECORDS:
            row["verdict"] = REPRODUCED
        rows.append(row)
    return rows


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The claim map as a table: id, claim, paper, ours, low, high, verdict, why, notebook, cell, artifact."""
    columns = ("id", "claim", "paper", "ours", "low", "high", "verdict", "why", "notebook", "cell", "artifact")
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: r[k] for k in columns} for r in rows)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The claim map as an HTML table: claim, paper, ours, interval, verdict, why; the claims that were measured first."""
    heads = ("", "claim", "paper", "ours", "95% interval", "verdict", "why", "notebook")
    left = 'style="text-align: left; vertical-align: top"'  # on each cell: notebooks align tables to the right
    lines = []
    for r in sorted(rows, key=lambda r: not r["artifact"]):
        interval = f"[{r['low']}, {r['high']}]" if r["low"] != "" else ""
        cells = (r["claim"], r["paper"], r["ours"], interval, r["verdict"], r["why"], r["notebook"])
        shown = "".join(f"<td {left}>{escape(str(c))}</td>" for c in cells)
        lines.append(f'<tr><th scope="row" {left}>{escape(r["id"])}</th>{shown}</tr>')
    head = "".join(f'<th scope="col" {left}>{h}</th>' for h in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
