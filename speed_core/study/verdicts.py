"""The verdict of a claim, by rule.

It is never typed in: it follows from the interval of a difference, which covers texts and training seeds (`uncertainty`). Then three
rules apply. The claims of one paper are tested together (Holm), and both verdicts are told where that makes a difference. A difference
that two one-sided tests show to be smaller than `EQUIVALENCE_MARGIN` is equivalent. A claim whose treatment did not act is not judged
(`GATED`, `gates`). One that is not resolved says that the paper's effect is outside of the interval, or what would resolve it (one of a
point where the paper prints none).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
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

# Points (S19: hundredths of the rubric) below which a difference does not matter: a point is less than the choice of the embedding
# seed moves a score here, and twice E4's largest printed difference. Many of the papers' own effects are smaller.
EQUIVALENCE_MARGIN = 1.0
# The claimed sign where it is not a rise: S2 says that the teacher's data wins with labelled data, G4 that retrieval *can* fall; S11,
# S19 and E4 say that something makes little difference.
EXPECTED = {"S2": -1, "G4": -1, "S11": 0, "S19": 0, "E4": 0}


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
        of_generators = f"{'one training' if e.generators == 1 else 'two trainings'} of each generator"
        single = of_generators if key in NEEDS_GENERATOR_REPLICATES else "one writing of each data set"
        said, why = Verdict.UNRESOLVED, why + f"; the interval leaves zero out, but rests on {single}: it takes {once}"
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
        whose = f"an interval within {EQUIVALENCE_MARGIN:g} of zero"
        whose = whose if effect > 0 else f"one wholly beyond {EQUIVALENCE_MARGIN:g}"
    needs = required(effect)
    if needs.answer is Answer.ENOUGH and once:
        return f"; {whose} would need {once}"
    if needs.answer is Answer.ENOUGH:
        whose, needs = seen, required(e.value)
    return f"; {whose} would need {needs}{', and ' * bool(once)}{once}"


def with_curvature(row: dict[str, Any], curvature: Mapping[str, Any] | None) -> dict[str, Any]:
    """S17's row, from that of the slope and the estimate of the curvature: diminishing returns are half of the claim."""
    if row["verdict"] != Verdict.SMALLER:
        return row
    if curvature is None:
        why = "; diminishing returns, its other half, were not measured (it takes three sizes)"
        return row | {"verdict": Verdict.UNRESOLVED, "why": row["why"] + why}
    e = estimate_of(curvature)
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


def p_values(tests: Mapping[str, Test]) -> list[dict[str, tuple[float, float]]]:
    """{claim: (its p alone, its p among the tests of its paper by Holm)} of each paper."""
    decisive, out = _decisive(tests), []
    for paper in sorted({key[0] for key in decisive}):
        tested = {key: one for key, one in decisive.items() if key.startswith(paper)}
        p = {k: one.estimate.p_value(EXPECTED.get(k, 1), EQUIVALENCE_MARGIN, one.level) for k, one in tested.items()}
        out.append({key: (p[key], adjusted) for key, adjusted in uncertainty.holm(p).items()})
    return out


def test_together(found: dict[str, dict[str, Any]], tests: Mapping[str, Test]) -> None:
    """Allow for the number of tests of each paper (Holm, at 5%), then call what is left open equivalent where it is."""
    for of_paper in p_values(tests):
        for key, (p, adjusted) in of_paper.items():
            row = found[key]
            if row["verdict"] in (Verdict.SMALLER, Verdict.CONTRADICTED) and adjusted >= 0.05:
                among = f"among the {len(of_paper)} tests of its paper it is not (Holm: p = {adjusted:.2f})"
                row["why"] += f"; alone it would be {row['verdict']} (p = {p:.3f}), {among}"
                row["verdict"] = Verdict.UNRESOLVED
    for key, one in _decisive(tests).items():
        row, effect = found[key], paper_values.EFFECTS.get(key)
        open_ = row["verdict"] == Verdict.UNRESOLVED and EXPECTED.get(key, 1) != 0
        if open_ and one.estimate.within(EQUIVALENCE_MARGIN, one.level):
            row["verdict"] = Verdict.EQUIVALENT
            row["why"] += f"; smaller than {EQUIVALENCE_MARGIN:g} either way by two one-sided tests"
            if effect is not None and row["low"] <= effect <= row["high"]:
                row["why"] += f", which neither confirms nor refutes the paper's {effect:+g}"


def call_inactive(found: dict[str, dict[str, Any]], gates: Mapping[str, Any]) -> None:
    """Give the claims behind a closed gate their verdict; the one that their interval alone would have is told."""
    for key, needed in GATED.items():
        if key in found and (closed := [gates[name].said for name in needed if name in gates and not gates[name].is_open]):
            row = found[key]
            row["why"] += f"; not judged ({row['verdict']} by its interval), because {' and '.join(closed)}"
            row["verdict"] = Verdict.INACTIVE


def estimate_of(f: Mapping[str, Any]) -> Estimate:
    """The estimate that a notebook noted down (`Estimate.row`)."""
    names = ("value", "low", "high", "seeds", "sd_items", "sd_seeds")
    return Estimate(**{k: f[k] for k in names}, generators=f.get("generators", 1))
