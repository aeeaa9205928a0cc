"""The claim map: each claim of the papers, what they print, what this run found, and a verdict by rule.

The verdict of a comparison is never typed in: it follows from the interval of a difference, which covers texts and
training seeds (`uncertainty`). One that is not resolved says what would resolve the paper's effect, or one of a point where
the paper prints none. A claim whose quantity this run did not measure says so.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speed_core import uncertainty
from speed_core.uncertainty import Estimate

# id, claim, the paper's value, notebook, id of the cell in it that measures the claim.
# Sources: SPEED Tables 1-6 and Figs. 3-4, E5-mistral Table 5, GISTEmbed cards.
CLAIMS: list[tuple[str, str, str, str, str]] = [
    ("S1", "data of aligned 8B models beats GPT-made data, synthetic-only", "63.4 against 63.1", "10", "table2"),
    ("S2", "with labelled data added the order flips slightly", "66.5 against 66.6", "09", ""),
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
    ("S22", "MinHash deduplication", "1.15M to 920,415", "06", "curation"),
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


# The effect in points that the paper prints (or its middle), for the question what size would resolve it.
EFFECTS = {
    "S1": 0.3, "S4": 1.9, "S5": 1.0, "S6": 0.1, "S7": 0.25, "S8": 0.35, "S9": 1.35, "S10": 0.8, "S17": 0.1, "E2": 2.0, "E3": 4.2,
    "G1": 0.27, "G2": 0.46, "G3": 1.1, "G4": -7.0,
}  # fmt: skip

# What no run of this repository can measure without something that it does not have.
NOT_POSSIBLE = {
    "S2": "needs the 13 labelled training sets of E5, which no package carries",
    "S21": "needs brainstorming without topics; the recorded teacher has answers for topics only",
    "E5": "needs a base model before and after contrastive pre-training; no package carries such a pair",
}

# What compares generators that were trained once each: more embedding seeds do not tell how much another training of the
# generator would change. `run --seed 0,1,2` trains them again.
ONE_GENERATOR = ("S1", "S4", "S5", "S6", "S7", "S8", "S11", "S13", "S14", "S15", "S16", "S18", "S19")

# Points (S19: hundredths of the rubric). A claim that something matters little holds when the whole interval is inside; E4's
# largest printed difference is 0.5.
LITTLE = 1.0
UNRESOLVED = "not resolved at this size"
SMALLER = "smaller scale, same direction"
REPRODUCED = "reproduced"
# The smallest training set that SPEED prints scores for, and the claims that models of such size can reproduce: claim -> the
# arm whose records count. What rests on `ONE_GENERATOR` is never resolved, so never reproduced.
PAPER_RECORDS = 230_000
SIZED = {"S9": "jr", "S10": "jr", "S12": "jr", "S17": "guided", "E3": "guided"}
EQUAL = ("S1", "S4", "S5", "S7", "S8")  # comparisons of data sets at equal size


def verdict(low: float, high: float, expected: int = 1) -> str:
    """Same direction, contradicted, or not resolved, from the interval of a difference and the claimed sign.

    An expected sign of 0 claims that the difference is no larger than `LITTLE` either way.
    """
    if not expected:
        inside, outside = -LITTLE < low <= high < LITTLE, low > LITTLE or high < -LITTLE
        return SMALLER if inside else "contradicted" if outside else UNRESOLVED
    if low > 0 or high < 0:
        sign = 1 if low > 0 else -1
        return SMALLER if sign == expected else "contradicted"
    return UNRESOLVED


def judged(key: str, e: Estimate, what: str, artifact: str, *, trained: bool = True, expected: int = 1) -> dict[str, Any]:
    """The row of a claim that is a difference in points. `trained`: models were trained for it, so seeds must be covered."""
    said = verdict(e.low, e.high, expected)
    seeds = f"{e.seeds} training seeds of the embedding model and the texts" if e.seeds > 1 else "the texts; one training seed"
    why = f"{what}: {e} points, interval over {seeds if trained else 'the texts'}"
    if e.low == e.high:
        said, why = UNRESOLVED, why + "; nothing changed anywhere, which says nothing of a case in which something would"
    elif key in ONE_GENERATOR and said != UNRESOLVED:
        said, why = UNRESOLVED, why + "; the interval leaves zero out, but each generator was trained once"
    elif key == "G4" and said == "contradicted":
        said, why = UNRESOLVED, why + "; a rise here does not show that it cannot fall elsewhere"
    elif trained and e.seeds == 1 and said != UNRESOLVED:
        # Trainings differ by their seeds too, which an interval over texts does not see.
        said, why = UNRESOLVED, why + "; it leaves out the seed, so its sign decides nothing"
    elif said == UNRESOLVED and (e.seeds > 1 or not trained):
        why += _would_resolve(key, e, trained, expected)
    numbers = {"ours": round(e.value, 2), "low": round(e.low, 2), "high": round(e.high, 2)}
    return numbers | {"verdict": said, "why": why, "artifact": artifact}


def _would_resolve(key: str, e: Estimate, trained: bool, expected: int) -> str:
    """What it takes to resolve the paper's effect, or one of `LITTLE` where it prints none; of a claim that something matters
    little, to have the whole interval inside."""
    if expected and key in EFFECTS:
        effect, whose = EFFECTS[key], f"the paper's {EFFECTS[key]:+g}"
    elif expected:
        effect, whose = LITTLE, f"an effect of {LITTLE:g}"
    else:
        effect, whose = LITTLE - abs(e.value), f"an interval within {LITTLE:g} of zero"
        if effect <= 0:
            return ""
    needed = uncertainty.needed(e, effect, trained=trained)
    once = ", and generators trained more than once" if key in ONE_GENERATOR else ""
    if needed == uncertainty.ENOUGH:
        return f"; {whose} would {'need generators trained more than once' if once else 'have been resolved here'}"
    return f"; {whose} would need {needed}{once}"


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
    # Where the paper prints two such differences, ours is the mean of the two.
    pairs: dict[str, tuple[str, list[tuple[str, str]]]] = {
        "S1": ("Sr+Re against the recorded teacher's own examples", [("sr_re", "teacher")]),
        "S4": ("Jr and Sr+Re against the untrained base model's records", [("jr", "base"), ("sr_re", "base")]),
        "S5": ("Sr+Re against the recorded teacher's own examples", [("sr_re", "teacher")]),
        "S7": ("revised against not, of Jr and of Sr", [("jr_re", "jr"), ("sr_re", "sr")]),
        "S8": ("Sr against Jr, without and with revision", [("sr", "jr"), ("sr_re", "jr_re")]),
        "E1": ("trained on synthetic data against untrained", [("guided", "untrained")]),
        "E3": ("the same models with instructions against without", [("guided", "bare")]),
    }
    for key, (what, compared) in pairs.items():
        arms = list(dict.fromkeys(arm for pair in compared for arm in pair))
        if all(scores.get(arm) for arm in arms):
            signs = [(sign, arm) for pair in compared for sign, arm in zip((1, -1), pair, strict=True)]
            e = uncertainty.contrast([(sign / len(compared), scores[arm], None) for sign, arm in signs])
            if key in EQUAL and (counts := {arm: records[arm] for arm in arms if arm in records}):
                many = f"on unequally many ({', '.join(f'{arm} {n}' for arm, n in counts.items())})"
                what += f", {many if len(set(counts.values())) > 1 else 'equally many'}"
            found[key] = judged(key, e, what, " ".join(digests[arm] for arm in arms))
        else:
            absent[key] = (
                f"no scores of {' and '.join(a for a in arms if not scores.get(a))}; an arm with too few valid records is left out"
            )
    order = ("jr", "jr_re", "sr", "sr_re")
    if all(scores.get(arm) for arm in order):
        steps = [uncertainty.difference(scores[b], scores[a]) for a, b in zip(order, order[1:], strict=False)]
        least = min(steps, key=lambda e: e.value)
        what = "the smallest of the three steps Jr, Jr+Re, Sr, Sr+Re"
        found["S6"] = judged("S6", least, what, " ".join(digests[arm] for arm in order))
    for key, f in facts.get("estimates", {}).items():
        e = Estimate(*(f[k] for k in ("value", "low", "high", "seeds", "sd_items", "sd_seeds")))
        # G4 says that retrieval *can* fall; S11, S19 and E4 say that something makes little difference.
        expected = {"G4": -1, "S11": 0, "S19": 0, "E4": 0}.get(key, 1)
        found[key] = judged(key, e, f["what"], digests[f["source"]], trained=f.get("trained", True), expected=expected)
    if "mask" in facts:
        m = facts["mask"]
        found["G6"] = {
            "ours": round(m["gain"], 3), "low": round(m["gain_low"], 3), "high": round(m["gain_high"], 3),
            "verdict": verdict(m["gain_low"], m["gain_high"]),
            "why": f"precision {m['precision']:.2f} of the mask at margin 0 minus base rate {m['base_rate']:.2f}, labels of 20 Newsgroups",
            "artifact": digests["mask"],
        }  # fmt: skip
    if "kept" in facts:
        low, high = uncertainty.share_interval([True] * facts["kept"] + [False] * (facts["valid"] - facts["kept"]))
        found["S22"] = {
            "ours": round(facts["kept"] / facts["valid"], 3), "low": round(low, 3), "high": round(high, 3), "verdict": UNRESOLVED,
            "why": f"{facts['kept']} of {facts['valid']} valid records kept after MinHash and overlap checks (the paper keeps 0.80); no embedding model was trained without them",
            "artifact": digests["synthetic"],
        }  # fmt: skip
    if "calls" in facts:
        c = facts["calls"]
        # E5-mistral, which the claim compares with, spends one call a record.
        few, said = c["records"] < PAPER_RECORDS, REPRODUCED if c["share"] < 0.1 else "contradicted"
        why = f"{c['calls']} teacher answers for {c['records']} records: {c['share']:.2f} calls and {c['tokens'] / c['records']:.0f} tokens a record (paper 0.05 and 35)"
        found["S3"] = {
            "ours": round(c["share"], 3), "low": "", "high": "", "verdict": "not possible here" if few else said,
            "why": why + "; too few records to spread the seeds over" * few, "artifact": digests["synthetic"],
        }  # fmt: skip
    rows = []
    for key, claim, paper, notebook, cell in CLAIMS:
        nothing = {"ours": "", "low": "", "high": "", "artifact": ""}
        if key in NOT_POSSIBLE:
            entry = nothing | {"verdict": "not possible here", "why": NOT_POSSIBLE[key]}
        else:
            why = absent.get(key, "this run does not measure it yet (sweeps: `python -m speed_core study`)")
            entry = nothing | {"verdict": "not yet tested", "why": why}
        row = {"id": key, "claim": claim, "paper": paper, **found.get(key, entry), "notebook": notebook, "cell": cell}
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
