"""The claim map: each claim of the papers, what they print, what this run found, and a verdict by rule.

The verdict of a comparison is never typed in: it follows from the interval of a difference, which covers texts and
training seeds (`uncertainty`). Then three rules apply. The claims of one paper are tested together (Holm), and both verdicts are told
where that makes a difference. A difference that two one-sided tests show to be smaller than `EQUIVALENCE_MARGIN` is equivalent. A claim
whose treatment did not act is not judged (`GATED`, `gates`). One that is not resolved says that the paper's effect is outside of the
interval, or what would resolve it (one of a point where the paper prints none). A claim whose quantity this run did not measure says so.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from speed_core.evaluation import uncertainty
from speed_core.evaluation.uncertainty import Answer, Estimate
from speed_core.study import paper_values


class Verdict(StrEnum):
    REPRODUCED = "reproduced"
    SMALLER = "smaller scale, same direction"
    EQUIVALENT = "equivalent within the margin"
    UNRESOLVED = "not resolved at this size"
    INACTIVE = "treatment inactive"
    CONTRADICTED = "contradicted"
    IMPOSSIBLE = "not possible here"
    UNTESTED = "not yet tested"


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

# What compares generators, or data sets: more embedding seeds do not tell how much another training or another sample would
# change. For S1, S2 and S4 to S8 generators are trained and asked again (`repeats`); the others are never resolved.
NEEDS_GENERATOR_REPLICATES = ("S1", "S2", "S4", "S5", "S6", "S7", "S8", "S11", "S13", "S14", "S15", "S16", "S18", "S19")
NEEDS_DATA_REPLICATES = ("S9", "S10", "S12")
TRAININGS = 3  # of the generators, from which on an interval over them may decide
INTERIOR_OPTIMUM = ("S12", "S13", "S14", "S15", "S16")  # claims of an optimum inside a range

# Claims about a treatment, which say something only where it acted (`gates`).
SENIOR, REVISOR, STUDENTS = "senior", "revisor", "students"
GATED = {
    "S6": (SENIOR, REVISOR), "S7": (REVISOR,), "S8": (SENIOR,), "S14": (SENIOR,), "S15": (SENIOR,), "S16": (REVISOR,), "S19": (REVISOR,),
    **dict.fromkeys(("S2", "E2", "G1b", "G2", "G3", "G5", "G7", "G8", "G9"), (STUDENTS,)),
}  # fmt: skip

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

# Points (S19: hundredths of the rubric) below which a difference does not matter: a point is less than the choice of the embedding
# seed moves a score here, and twice E4's largest printed difference. Many of the papers' own effects are smaller.
EQUIVALENCE_MARGIN = 1.0
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
    "G1a": ("guided against plain, same records and seeds, all tasks", (("guided", "plain"),)),
}
# The claimed sign where it is not a rise: S2 says that the teacher's data wins with labelled data, G4 that retrieval *can* fall; S11,
# S19 and E4 say that something makes little difference.
EXPECTED = {"S2": -1, "G4": -1, "S11": 0, "S19": 0, "E4": 0}


def present_ids(of: Mapping[str, Any]) -> dict[str, Any]:
    """{claim: anything} of a recorded run under the ids that claims have now."""
    return {RENAMED.get(key, key): value for key, value in of.items()}


def verdict(low: float, high: float, expected: int = 1) -> Verdict:
    """Same direction, contradicted, or not resolved, from the interval of a difference and the claimed sign.

    An expected sign of 0 claims that the difference is no larger than `EQUIVALENCE_MARGIN` either way.
    """
    margin = EQUIVALENCE_MARGIN
    if not expected:
        holds, fails = -margin < low <= high < margin, low > margin or high < -margin
    else:
        above, below = low > 0, high < 0
        holds, fails = (above, below) if expected > 0 else (below, above)
    return Verdict.SMALLER if holds else Verdict.CONTRADICTED if fails else Verdict.UNRESOLVED


def judged(
    key: str, e: Estimate, what: str, artifact: str, *, trained: bool = True, expected: int = 1, level: float = 0.95
) -> dict[str, Any]:
    """The row of a claim that is a difference in points, with an interval of `level`. `trained`: models were trained for it, so
    seeds must be covered."""
    said = verdict(e.low, e.high, expected)
    seeds = f"{e.seeds} embedding seeds and the texts" if e.seeds > 1 else "the texts; one training seed"
    if e.generators > 1:
        seeds = f"{e.generators} trainings of the generators ({e.seeds} embedding models per arm) and the texts"
    if e.no_texts:
        seeds = f"{e.seeds} embedding seeds"
    why = f"{what}: {e} points, interval over {seeds if trained else 'the texts'}"
    if e.low == e.high:
        said, why = Verdict.UNRESOLVED, why + "; nothing changed anywhere, which says nothing of a case in which something would"
    elif e.no_texts:  # tasks of which mteb gives no value for each text
        said, why = Verdict.UNRESOLVED, why + "; it leaves out the texts, so its sign decides nothing"
    elif key in INTERIOR_OPTIMUM and said is Verdict.CONTRADICTED:
        said, why = Verdict.UNRESOLVED, why + "; the best value is at an end, so an optimum may lie outside of this range"
    elif (once := _once(key, e)) and said is not Verdict.UNRESOLVED:
        times = "one training" if e.generators == 1 else "two trainings"
        single = (
            f"rests on {times} of each generator"
            if key in NEEDS_GENERATOR_REPLICATES
            else "rests on one writing of each data set"
        )
        said, why = Verdict.UNRESOLVED, why + f"; the interval leaves zero out, but {single}: it takes {once}"
    elif key == "G4" and said is Verdict.CONTRADICTED:
        said, why = Verdict.UNRESOLVED, why + "; a rise here does not show that it cannot fall elsewhere"
    elif trained and e.seeds == 1 and said is not Verdict.UNRESOLVED:
        # Trainings differ by their seeds too, which an interval over texts does not see.
        said, why = Verdict.UNRESOLVED, why + "; it leaves out the seed, so its sign decides nothing"
    elif said is Verdict.UNRESOLVED and (e.seeds > 1 or not trained):
        why += _would_resolve(key, e, trained, expected, level)
    ends = {"low": e.low, "high": e.high}
    numbers = {"ours": round(e.value, 2)} | {k: "" if math.isnan(v) else round(v, 2) for k, v in ends.items()}
    return numbers | {"verdict": said, "why": why, "artifact": artifact}


def _once(key: str, e: Estimate) -> str:
    """What would have to be repeated beside the embedding models to resolve a claim; empty for most, and where it was repeated."""
    if key in NEEDS_GENERATOR_REPLICATES:
        return "generators trained three times at least" if e.generators < TRAININGS else ""
    return "data sets written three times at least" if key in NEEDS_DATA_REPLICATES else ""


def _would_resolve(key: str, e: Estimate, trained: bool, expected: int, level: float) -> str:
    """The end of a sentence: the interval excludes the paper's effect, or what it takes to resolve that effect.

    Where the paper prints no effect it is one of `EQUIVALENCE_MARGIN`; a claim that something matters little needs the whole
    interval on one side of that margin.
    """

    def required(effect: float) -> uncertainty.RequiredRepeats:
        return uncertainty.required_repeats(e, effect, trained=trained, level=level)

    once = _once(key, e)
    seen = f"the {e.value:+.2f} seen"
    if expected:
        printed = key in paper_values.EFFECTS
        effect = paper_values.EFFECTS.get(key, EQUIVALENCE_MARGIN * expected)
        whose = f"the paper's {effect:+g}" if printed else f"an effect of {EQUIVALENCE_MARGIN:g}"
        excluded = e.high < effect if effect > 0 else e.low > effect
        if excluded and not once and printed:
            return f"; smaller than the paper's effect: the interval leaves {effect:+g} out"
        if excluded and not once:
            return f"; {whose} is outside of the interval, {seen} would need {required(e.value)}"
    else:
        effect = EQUIVALENCE_MARGIN - abs(e.value)
        whose = (
            f"an interval within {EQUIVALENCE_MARGIN:g} of zero" if effect > 0 else f"one wholly beyond {EQUIVALENCE_MARGIN:g}"
        )
    needs = required(effect)
    if needs.answer is Answer.ENOUGH and once:
        return f"; {whose} would need {once}"
    if needs.answer is Answer.ENOUGH:
        whose, needs = seen, required(e.value)
    return f"; {whose} would need {needs}{', and ' * bool(once)}{once}"


def _with_curvature(row: dict[str, Any], curvature: Mapping[str, Any] | None) -> dict[str, Any]:
    """S17's row, from that of the slope and the estimate of the curvature: diminishing returns are half of the claim."""
    if row["verdict"] != Verdict.SMALLER:
        return row
    if curvature is None:
        why = "; diminishing returns, its other half, were not measured (it takes three sizes)"
        return row | {"verdict": Verdict.UNRESOLVED, "why": row["why"] + why}
    e = _estimate(curvature)
    said, why = verdict(e.low, e.high, -1), f"; diminishing returns, its other half: bend {e}"
    if said is Verdict.UNRESOLVED:
        why += f" is not resolved; the {e.value:+.1f} seen would need {uncertainty.required_repeats(e, e.value)}"
    return row | {"verdict": said, "why": row["why"] + why}


class Test(NamedTuple):
    """What a claim's verdict is tested with; `trained` and `level` as in `judged`."""

    estimate: Estimate
    trained: bool = True
    level: float = 0.95

    def decides(self, key: str) -> bool:
        """Whether nothing but the interval holds the verdict back."""
        e = self.estimate
        return bool(e.error) and not (e.no_texts or _once(key, e) or (self.trained and e.seeds == 1))


def _decisive(tests: Mapping[str, Test]) -> dict[str, Test]:
    return {key: one for key, one in tests.items() if one.decides(key)}


def _p_values(tests: Mapping[str, Test]) -> list[dict[str, tuple[float, float]]]:
    """{claim: (its p alone, its p among the tests of its paper by Holm)} of each paper."""
    decisive, out = _decisive(tests), []
    for paper in sorted({key[0] for key in decisive}):
        p = {
            key: one.estimate.p_value(EXPECTED.get(key, 1), EQUIVALENCE_MARGIN, one.level)
            for key, one in decisive.items()
            if key.startswith(paper)
        }
        out.append({key: (p[key], adjusted) for key, adjusted in uncertainty.holm(p).items()})
    return out


def _test_together(found: dict[str, dict[str, Any]], tests: Mapping[str, Test]) -> None:
    """Allow for the number of tests of each paper (Holm, at 5%), then call what is left open equivalent where it is."""
    for of_paper in _p_values(tests):
        for key, (p, adjusted) in of_paper.items():
            row = found[key]
            if row["verdict"] in (Verdict.SMALLER, Verdict.CONTRADICTED) and adjusted >= 0.05:
                row["why"] += (
                    f"; alone it would be {row['verdict']} (p = {p:.3f}), among the {len(of_paper)} tests of its paper it is not (Holm: p = {adjusted:.2f})"
                )
                row["verdict"] = Verdict.UNRESOLVED
    for key, one in _decisive(tests).items():
        row, effect = found[key], paper_values.EFFECTS.get(key)
        open_ = row["verdict"] == Verdict.UNRESOLVED and EXPECTED.get(key, 1) != 0
        if open_ and one.estimate.within(EQUIVALENCE_MARGIN, one.level):
            row["verdict"] = Verdict.EQUIVALENT
            row["why"] += f"; smaller than {EQUIVALENCE_MARGIN:g} either way by two one-sided tests"
            if effect is not None and row["low"] <= effect <= row["high"]:
                row["why"] += f", which neither confirms nor refutes the paper's {effect:+g}"


def _call_inactive(found: dict[str, dict[str, Any]], gates: Mapping[str, Any]) -> None:
    """Give the claims behind a closed gate their verdict; the one that their interval alone would have is told."""
    for key, needed in GATED.items():
        if key in found and (closed := [gates[name].said for name in needed if name in gates and not gates[name].is_open]):
            row = found[key]
            row["why"] += f"; not judged ({row['verdict']} by its interval), because {' and '.join(closed)}"
            row["verdict"] = Verdict.INACTIVE


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
        e, how = _estimate(f), {"trained": f.get("trained", True), "level": f.get("level", 0.95)}
        found[key] = judged(key, e, f["what"], digests[f["source"]], expected=EXPECTED.get(key, 1), **how)
        tests[key] = Test(e, **how)
    if "S17" in found:
        found["S17"] = _with_curvature(found["S17"], estimates["S17"].get("bend"))
    if "mask" in facts:
        found["G6"] = _mask_row(facts["mask"]) | {"artifact": digests["mask"]}
        gain, low, high = (100 * facts["mask"][k] for k in ("gain", "gain_low", "gain_high"))
        tests["G6"] = Test(_estimate(uncertainty.claim_evidence(gain, low, high, "")), trained=False)
    return found, tests, absent


def p_values(
    scores: Mapping[str, Sequence[Any]], facts: Mapping[str, Any], digests: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """{claim: (its p alone, its p among the tests of its paper by Holm)} of the claims that are tested; arguments as of `build`."""
    tests = _alone(scores, facts, digests, {})[1]
    return {key: both for of_paper in _p_values(tests) for key, both in of_paper.items()}


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
    _test_together(found, tests)
    _call_inactive(found, facts.get("gates", {}))
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
        row = {
            "id": key,
            "claim": claim,
            "paper": paper_values.PRINTED[key],
            "effect": paper_values.EFFECTS.get(key, ""),
            **found.get(key, entry),
        }
        row |= {"notebook": notebook, "cell": cell}
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
