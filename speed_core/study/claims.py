"""The claim map: each claim of the papers, what they print, what this run found, and its verdict (`verdicts`).

A claim whose quantity this run did not measure says so.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from speed_core.evaluation import uncertainty
from speed_core.evaluation.uncertainty import Estimate
from speed_core.study import paper_values, verdicts
from speed_core.study.verdicts import EXPECTED, Test, Verdict, judged, verdict


class Claim(NamedTuple):
    id: str
    claim: str
    notebook: str
    cell: str  # id of the notebook's cell that measures the claim; empty where no run can


CLAIMS = [
    Claim("S1", "data of aligned 8B models beats GPT-made data, synthetic-only", "10", "table2"),
    Claim("S2", "with labelled data added the order flips slightly", "10", "mixed"),
    Claim("S3", "fewer than 1/10 of the teacher calls, about 1/6 of the tokens", "12", "calls"),
    Claim("S4", "alignment beats the off-the-shelf model (paper: instruct model; here: base model)", "10", "table2"),
    Claim("S5", "the aligned small model beats its own teacher's data at equal size", "10", "table2"),
    Claim("S6", "order Jr < Jr+Re < Sr < Sr+Re", "10", "table2"),
    Claim("S7", "the revisor helps", "10", "table2"),
    Claim("S8", "DPO helps", "10", "table2"),
    Claim("S9", "more tasks per topic at fixed size hurts", "10", "sweeps"),
    Claim("S10", "over-specific topics hurt", "10", "sweeps"),
    Claim("S11", "works across base models", "10", "sweeps"),
    Claim("S12", "generation temperature has an interior optimum", "10", "sweeps"),
    Claim("S13", "a small seed set is enough, too many hurt", "10", "sweeps"),
    Claim("S14", "beta has an interior optimum", "10", "sweeps"),
    Claim("S15", "DPO needs fewer samples than SFT", "10", "sweeps"),
    Claim("S16", "the revisor needs fewer samples than the junior", "10", "sweeps"),
    Claim("S17", "log-linear scaling with diminishing returns", "11", "slope"),
    Claim("S18", "generators without tailoring write poor hard negatives", "10", "hard-negatives"),
    Claim("S19", "one revision pass suffices", "05", "second-pass"),
    Claim("S20", "the judge's signals are good enough", "04", "judge-check"),
    Claim("S21", "topics reduce narrowness", "01", ""),
    Claim("S22", "MinHash deduplication", "06", "curation"),
    Claim("E1", "synthetic-only data is competitive (here: it beats the untrained model)", "09", "trained-minus-untrained"),
    Claim("E2", "synthetic data adds to labelled data", "07b", "students"),
    Claim("E3", "instructions matter", "09", "instructions"),
    Claim("E4", "pooling and LoRA rank matter little", "10", "sweeps"),
    Claim("E5", "contrastive pre-training is unnecessary for a strong model", "09", ""),
    Claim("G1a", "guide masking improves the student (here: the embedding model)", "09", "guided-minus-plain"),
    Claim("G1b", "guide masking improves the student (here: small students)", "07b", "students"),
    Claim("G2", "gains are largest for small students", "07b", "students"),
    Claim("G3", "STS improves most", "07b", "students"),
    Claim("G4", "retrieval can fall on an uncovered topic", "07b", "students"),
    Claim("G5", "topic-matched synthetic triplets repair that", "07b", "students"),
    Claim("G6", "masking removes false negatives", "07", "mask-quality"),
    Claim("G7", "a stronger guide lifts a weaker student", "07b", "students"),
    Claim("G8", "in-domain training data confounds the published gain", "07b", "students"),
    Claim("G9", "a margin can help further", "07b", "students"),
]  # fmt: skip

# Claims that recorded runs know by another id: old id -> the present one.
RENAMED = {"G1": "G1b"}

# What no run of this repository can measure without something that it does not have.
NOT_POSSIBLE = {
    "S21": "needs brainstorming without topics; the recorded teacher has answers for topics only",
    "E5": "needs a base model before and after contrastive pre-training; no package carries such a pair",
}

# What a reader has to know of a claim's evidence beside its interval.
NOTES = {
    "S2": "one labelled source in place of 13",
    "S15": "tests an optimum inside the range only; the shares of DPO and SFT were not compared",
    "S16": "tests an optimum inside the range only; the shares of revisor and junior were not compared",
    "S20": "the paper gives no number; the pairs were written by the rubric's authors",
    "E4": "the learning rate was chosen with last-token pooling",
    "G6": "the paper gives no number",
    "G7": "that it does not pass its guide is not measured",
}

# The smallest training set that SPEED prints scores for, and the claims that models of such size can reproduce: claim -> the
# arm whose records count.
PAPER_RECORDS = paper_values.SCORE_BY_RECORDS[0][0]
SIZED = {"S17": "guided", "E3": "guided"} | dict.fromkeys(("S1", "S4", "S5", "S6", "S7", "S8"), "sr_re")
SHARES = ("S3", "S22")  # their numbers are shares of calls and of records, not differences
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
    "G1a": ("guided against plain, same records and seeds, all tasks", (("guided", "plain"),)),
}


def present_ids(of: Mapping[str, Any]) -> dict[str, Any]:
    """{claim: anything} of a recorded run under the ids that claims have now."""
    return {RENAMED.get(key, key): value for key, value in of.items()}


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


def _alone(
    scores: Mapping[str, Sequence[Any]], facts: Mapping[str, Any], digests: Mapping[str, str], records: Mapping[str, int]
) -> tuple[dict[str, dict[str, Any]], dict[str, Test], dict[str, str]]:
    """({claim: its row, judged by its interval alone}, {claim: its test}, {claim: what it lacks}); arguments as of `build`."""
    found: dict[str, dict[str, Any]] = {}
    tests: dict[str, Test] = {}
    absent: dict[str, str] = {}
    estimates = present_ids(facts.get("estimates", {}))
    for key in (k for k in COMPARED if k not in estimates):  # notebook 10 may have estimated it over several trainings
        arms = arms_of(key)
        if e := compared(key, scores):
            found[key] = judged(key, e, compared_words(key, records), " ".join(digests[arm] for arm in arms))
            tests[key] = Test(e)
        else:
            missing = " and ".join(a for a in arms if not scores.get(a))
            absent[key] = f"no scores of {missing}; an arm with too few valid records is left out"
    for key, f in estimates.items():
        e, how = verdicts.estimate_of(f), {"trained": f.get("trained", True), "level": f.get("level", 0.95)}
        found[key] = judged(key, e, f["what"], digests[f["source"]], expected=EXPECTED.get(key, 1), **how)
        tests[key] = Test(e, **how)
    if "S17" in found:
        found["S17"] = verdicts.with_curvature(found["S17"], estimates["S17"].get("bend"))
    if "mask" in facts:
        found["G6"] = _mask_row(facts["mask"]) | {"artifact": digests["mask"]}
        gain, low, high = (100 * facts["mask"][k] for k in ("gain", "gain_low", "gain_high"))
        tests["G6"] = Test(verdicts.estimate_of(uncertainty.claim_evidence(gain, low, high, "")), trained=False)
    return found, tests, absent


def p_values(
    scores: Mapping[str, Sequence[Any]], facts: Mapping[str, Any], digests: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """{claim: (its p alone, its p among the tests of its paper by Holm)} of the claims that are tested; arguments as of `build`."""
    tests = _alone(scores, facts, digests, {})[1]
    return {key: both for of_paper in verdicts.p_values(tests) for key, both in of_paper.items()}


def build(
    scores: Mapping[str, Sequence[Any]],
    facts: Mapping[str, Any],
    digests: Mapping[str, str],
    records: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Rows {id, claim, paper, effect (in points, where the paper prints one), ours, low, high, verdict, why, notebook, cell, artifact} for every claim.

    `scores` maps arms (untrained, guided, bare, jr, jr_re, sr, sr_re, base, teacher) to their results, one per training seed;
    `facts` holds estimates by claim (`estimates`: {id: {value, low, high, seeds, sd_items, sd_seeds, what, source}}), the
    mask's precision, the share of kept records, teacher calls and the `gates` (`gates.gates`); `digests` maps what a verdict rests on to
    its artifacts.
    `records`: how many each arm's models learned from; a comparison of unequally many says so, and with `PAPER_RECORDS` or more
    the same direction is "reproduced" (`SIZED`).
    """
    records = records or {}
    found, tests, absent = _alone(scores, facts, digests, records)
    verdicts.test_together(found, tests)
    verdicts.call_inactive(found, facts.get("gates", {}))
    if "kept" in facts:
        found["S22"] = _kept_row(facts["kept"], facts["valid"]) | {"artifact": digests["synthetic"]}
    if "calls" in facts:
        found["S3"] = _calls_row(**facts["calls"]) | {"artifact": digests["synthetic"]}
    rows = []
    nothing = {"ours": "", "low": "", "high": "", "artifact": ""}
    for key, claim, notebook, cell in CLAIMS:
        if key in NOT_POSSIBLE:
            entry = nothing | {"verdict": Verdict.IMPOSSIBLE, "why": NOT_POSSIBLE[key]}
        else:
            why = absent.get(key, "this run does not measure it yet (sweeps: `python -m speed_core study`)")
            entry = nothing | {"verdict": Verdict.UNTESTED, "why": why}
        row: dict[str, Any] = {"id": key, "claim": claim, "paper": paper_values.PRINTED[key]}
        row |= {"effect": paper_values.EFFECTS.get(key, ""), **found.get(key, entry), "notebook": notebook, "cell": cell}
        if key in found and key in NOTES:
            row["why"] += f"; {NOTES[key]}"
        if row["verdict"] == Verdict.SMALLER and records.get(SIZED.get(key, ""), 0) >= PAPER_RECORDS:
            row["verdict"] = Verdict.REPRODUCED
        rows.append(row)
    return rows


def _mask_row(m: Mapping[str, float]) -> dict[str, Any]:
    """G6: the precision of the guide's mask against removing at random."""
    why = f"precision {m['precision']:.2f} of the mask at margin 0 minus base rate {m['base_rate']:.2f}, labels of 20 Newsgroups"
    numbers = {"ours": round(m["gain"], 3), "low": round(m["gain_low"], 3), "high": round(m["gain_high"], 3)}
    return numbers | {"verdict": verdict(m["gain_low"], m["gain_high"]), "why": why}


def _kept_row(kept: int, valid: int) -> dict[str, Any]:
    """S22: the share of the valid records that curation keeps."""
    low, high = uncertainty.share_interval([True] * kept + [False] * (valid - kept))
    why = f"{kept} of {valid} valid records kept after MinHash and overlap checks (the paper keeps {paper_values.KEPT:.2f}); that dropping helps takes embedding models trained with and without it"
    if kept == valid:
        why += f", on a pool of which MinHash drops something: here less than {1 - low:.1%}"
    numbers = {"ours": round(kept / valid, 3), "low": round(low, 3), "high": round(high, 3)}
    return numbers | {"verdict": Verdict.UNRESOLVED, "why": why}


def _calls_row(calls: int, tokens: int, records: int, share: float, **_: Any) -> dict[str, Any]:
    """S3: teacher calls and tokens per record."""
    (speed_calls, speed_tokens), (e5_calls, e5_tokens) = paper_values.SPEED_A_RECORD, paper_values.E5_A_RECORD
    papers = f"SPEED {speed_calls:.2f} and {speed_tokens:.0f}, E5-mistral {e5_calls:.0f} and {e5_tokens:.0f}"
    why = f"{calls} teacher answers for {records} records: {share:.2f} calls and {tokens / records:.0f} tokens per record ({papers}), judged by the calls"
    decided = Verdict.REPRODUCED if share < 0.1 else Verdict.CONTRADICTED
    if records < PAPER_RECORDS:
        decided = Verdict.IMPOSSIBLE
        sizes = [f"{math.ceil(n):,} ({n / records:.1f} x as many)" for n in (10 * calls, 6 * tokens / e5_tokens)]
        why += f"; too few records to spread the seeds over: a tenth of its calls takes more than {sizes[0]}, a sixth of its tokens {sizes[1]}"
    return {"ours": round(share, 3), "low": "", "high": "", "verdict": decided, "why": why}


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The claim map as a table: id, claim, paper, effect, ours, low, high, verdict, why, notebook, cell, artifact."""
    columns = ("id", "claim", "paper", "effect", "ours", "low", "high", "verdict", "why", "notebook", "cell", "artifact")
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
