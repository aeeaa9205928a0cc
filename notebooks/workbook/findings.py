"""What notebooks 05 and 10 to 12 print of findings, a line each, and the rules that their exercises fall back on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from speed_core.study.claims import SHARES
from speed_core.study.verdicts import EXPECTED, Verdict, verdict


def row_lines(rows: Sequence[Mapping[str, Any]], needs: Mapping[str, str] | None = None) -> list[str]:
    """A line for each difference {label, value, low, high}; `needs`: {label: what would resolve the paper's effect}."""
    more = {label: f"   to see the paper's effect: {words}" for label, words in (needs or {}).items()}
    width = max((len(r["label"]) for r in rows), default=0)
    return [f"{r['label']:{width}} {_interval(r)}{more.get(r['label'], '')}" for r in rows]


def verdict_lines(rows: Iterable[Mapping[str, Any]], at_least: Callable[[float, float, float], str]) -> list[str]:
    """A line for each difference {label, low, high}: the verdict that it is positive, and by `at_least(low, high, 1)` a point at least."""
    words = ((r["label"], verdict(r["low"], r["high"]), at_least(r["low"], r["high"], 1)) for r in rows)
    return [f"{label}: {positive}; {a_point}" for label, positive, a_point in words]


def items_for(low: float, high: float, items: int, effect: float) -> float:
    """How many items give a half-width of `effect`, where `items` give the interval [low, high]."""
    return items * ((high - low) / 2 / effect) ** 2


def fact_lines(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each claim of {claim: evidence}; one that says so where there is none."""
    if not facts:
        return ["no claim is estimated here"]
    return [f"{claim} {f['what']}: {_interval(f)}" for claim, f in facts.items()]


def _interval(r: Mapping[str, Any]) -> str:
    return f"{r['value']:+.2f} [{r['low']:+.2f}, {r['high']:+.2f}]"


def per_doubling(small: float, score_small: float, large: float, score_large: float) -> float:
    """Points per doubling between two sizes of the training set."""
    return float((score_large - score_small) / np.log2(large / small))


def records_for(records: float, slope: float, gain: float) -> float:
    """How many records score `gain` points more than `records` do, at `slope` points per doubling."""
    return float(records * 2 ** (gain / slope))


WORDS = {Verdict.SMALLER: "holds", Verdict.CONTRADICTED: "fails", Verdict.UNRESOLVED: "open"}


def in_a_word(low: float, high: float, expected: int = 1) -> str:
    """The rule of `verdicts.verdict`: "holds", "fails" or "open"."""
    return WORDS[verdict(low, high, expected)]


def held_back(rows: Iterable[Mapping[str, Any]], rule: Callable[[float, float, int], str] = in_a_word) -> list[str]:
    """A line for each claim that its interval alone would decide and the map does not."""
    out = []
    for r in _differences(rows):
        word = rule(r["low"], r["high"], EXPECTED.get(r["id"], 1))
        if word != "open" and r["verdict"] in (Verdict.UNRESOLVED, Verdict.EQUIVALENT, Verdict.INACTIVE):
            out.append(f"{r['id']:4} [{r['low']:+}, {r['high']:+}] alone {word}: {r['claim']}")
    return out or ["none"]


def decided(rows: Iterable[Mapping[str, Any]]) -> list[tuple[float, float, int, str]]:
    """(low, high, expected sign, claim) of the claims that are differences and have a verdict in the map."""
    open_ = (Verdict.UNRESOLVED, Verdict.EQUIVALENT, Verdict.INACTIVE, Verdict.IMPOSSIBLE, Verdict.UNTESTED)
    found = [r for r in _differences(rows) if r["verdict"] not in open_]
    return [(r["low"], r["high"], EXPECTED.get(r["id"], 1), r["id"]) for r in found]


def _differences(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [r for r in rows if r["low"] != "" and r["id"] not in SHARES]
