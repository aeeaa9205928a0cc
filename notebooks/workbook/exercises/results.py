"""Exercises of notebooks 09 to 12: scores, intervals, scaling, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workbook.exercises import Hint, among, call, compare, exercise, mapping, number

Rows = Sequence[Mapping[str, Any]]


@exercise("09.1")
def ndcg(answer: Any) -> None:
    """`answer(rank)`: nDCG@10 of a query whose one relevant document stands at `rank`, from 1."""
    compare(
        answer,
        [(r,) for r in (1, 2, 3, 5, 10, 11, 40)],
        lambda r: 1 / math.log2(r + 1) if r <= 10 else 0.0,
        {
            "a document behind the tenth place still counts; what does @10 say?": lambda r: 1 / math.log2(r + 1),
            "rank 10 still is among the first ten": lambda r: 1 / math.log2(r + 1) if r < 10 else 0.0,
            "this is the reciprocal rank; nDCG discounts by a logarithm": lambda r: 1 / r if r <= 10 else 0.0,
            "the logarithm is to another base: rank 1 must give exactly 1": (
                lambda r: 1 / math.log(r + 1) if r <= 10 else 0.0
            ),
            "ranks begin at 1, and yours are shifted by one": lambda r: 1 / math.log2(r + 2) if r <= 10 else 0.0,
        },
        "one number",
    )  # fmt: skip


@exercise("09.2")
def paired_interval(answer: Any) -> None:
    """`answer(a, b)`: 95% interval of mean(a) - mean(b), the items drawn alike for both."""
    rng = np.random.default_rng(9)
    for n in (80, 200):
        hard = rng.uniform(0, 1, n)  # both models fail on the same queries
        a, b = hard + rng.normal(0.05, 0.08, n), hard + rng.normal(0.0, 0.08, n)
        value = call(answer, a, b)
        if np.shape(value) != (2,):
            raise Hint(f"two numbers are asked for, the low and the high end; yours has the shape {np.shape(value)}")
        low, high = map(number, value)
        if low > high:
            raise Hint("the low end lies above the high end")
        d, half = a - b, 1.96 * (a - b).std() / math.sqrt(n)
        apart = 1.96 * math.sqrt((a.var() + b.var()) / n)
        middle, width = (low + high) / 2, (high - low) / 2
        if abs(middle + d.mean()) < half / 4 and abs(middle - d.mean()) > half:
            raise Hint("the difference is turned round: a minus b is asked for")
        if abs(width - apart) < 0.2 * apart:
            raise Hint(
                "the interval is as wide as if both models were drawn apart; what hard queries do to both cancels in pairs"
            )
        if abs(width - 1.96 * d.std()) < 0.3 * 1.96 * d.std():
            raise Hint("this is where single items lie; the question is about their mean")
        if abs(width - half) > 0.2 * half or abs(middle - d.mean()) > half / 2:
            side = "wider" if width > half else "narrower"
            raise Hint(f"with {n} items the interval is {width / half:.2f} times ours ({side}), or its middle is not the mean")


@exercise("10.1")
def resolved(answer: Any, *, rows: Rows) -> None:
    """`answer(rows)`: labels of the differences whose interval lies on one side of zero."""
    table = [
        {"label": "clear gain", "value": 1.0, "low": 0.2, "high": 1.8},
        {"label": "large but wide", "value": 2.0, "low": -0.4, "high": 4.4},
        {"label": "clear loss", "value": -0.6, "low": -1.0, "high": -0.2},
        {"label": "small loss", "value": -0.1, "low": -0.9, "high": 0.7},
        {"label": "touches zero", "value": 0.5, "low": 0.0, "high": 1.0},
    ]
    compare(
        answer,
        [(table,), (list(rows),)],
        lambda t: [r["label"] for r in t if r["low"] > 0 or r["high"] < 0],
        {
            "a difference can be resolved on the other side too: a loss is a result": lambda t: [r["label"] for r in t if r["low"] > 0],
            "this looks at the estimate alone; which part of a row says how sure it is?": lambda t: [
                r["label"] for r in t if r["value"] > 0
            ],
            "zero at the very end of an interval is still inside it": lambda t: [
                r["label"] for r in t if r["low"] >= 0 or r["high"] <= 0
            ],
            "these are the ones that are *not* resolved": lambda t: [r["label"] for r in t if r["low"] <= 0 <= r["high"]],
            "the rows come back; only their labels are asked for": lambda t: [r for r in t if r["low"] > 0 or r["high"] < 0],
        },
        "a list of labels, in the order of the rows",
    )  # fmt: skip


@exercise("10.2")
def items_needed(answer: Any) -> None:
    """`answer(low, high, items, effect)`: items at which the interval's half-width is `effect`."""
    cases = [(-2.7, 1.0, 120, 0.3), (-0.5, 1.5, 80, 0.5), (0.1, 0.9, 300, 0.2), (-3.0, 3.0, 50, 3.0)]

    def half(low: float, high: float) -> float:
        return (high - low) / 2

    compare(
        answer,
        cases,
        lambda a, b, n, e: n * (half(a, b) / e) ** 2,
        {
            "width falls with the square root of the number of items, not with the number": lambda a, b, n, e: n * half(a, b) / e,
            "the whole width is compared with the effect; half of it lies on each side": lambda a, b, n, e: (
                n * ((b - a) / e) ** 2
            ),
            "this says how many times more; multiply by the items there are": lambda a, b, n, e: (half(a, b) / e) ** 2,
            "to see a smaller effect one needs more items, and yours become fewer": lambda a, b, n, e: n * (e / half(a, b)) ** 2,
            "the square root points the other way: a narrower interval costs more than in proportion": lambda a, b, n, e: (
                n * math.sqrt(half(a, b) / e)
            ),
        },
        "one number",
    )


@exercise("11.1")
def per_doubling(answer: Any) -> None:
    """`answer(small, score_small, large, score_large)`: points a doubling."""
    cases = [(230, 63.2, 920, 63.4), (16, 31.0, 128, 50.5), (100, 40.0, 1000, 45.0), (64, 50.0, 128, 49.0)]

    def slope(log: Any) -> Any:
        return lambda a, x, b, y: (y - x) / log(b / a)

    compare(
        answer,
        cases,
        slope(math.log2),
        {
            "this is divided by how many *times* larger; how many doublings is that?": slope(lambda r: r),
            "the logarithm is natural: this is points for each 2.7-fold": slope(math.log),
            "the logarithm is to base 10: this is points for each tenfold": slope(math.log10),
            "this is points a record; a doubling is a step in the logarithm": lambda a, x, b, y: (y - x) / (b - a),
            "the sign is turned round: a falling score has a negative slope": lambda a, x, b, y: (x - y) / math.log2(b / a),
            "this is doublings a point; turn it over": lambda a, x, b, y: math.log2(b / a) / (y - x),
        },
        "one number",
    )


@exercise("11.2")
def records_for(answer: Any) -> None:
    """`answer(records, slope, gain)`: records at which a log-linear law has gained `gain` points."""
    cases = [(128, 6.8, 1.0), (920_000, 0.1, 0.5), (64, 2.0, 2.0), (1000, 0.5, 1.5)]
    compare(
        answer,
        cases,
        lambda n, s, g: n * 2 ** (g / s),
        {
            "this grows in a straight line; each further point costs a *factor*": lambda n, s, g: n * (1 + g / s),
            "this is how many doublings; how many records is that, from where you stand?": lambda n, s, g: g / s,
            "this is the factor; multiply by the records there are": lambda n, s, g: 2 ** (g / s),
            "slope and gain have changed places: a steeper law needs fewer records": lambda n, s, g: n * 2 ** (s / g),
            "the slope is for a doubling, and yours takes it for an e-fold": lambda n, s, g: n * math.exp(g / s),
        },
        "one number",
    )


@exercise("12.1")
def calls_per_record(answer: Any, *, calls: Mapping[str, int], records: int) -> None:
    """`answer`: {"paper", "ours"}, teacher calls for each training record."""
    given = mapping(answer, ("paper", "ours"))
    paper = 45 / 920
    with_brainstorm, counted = sum(calls.values()), sum(n for name, n in calls.items() if not name.startswith("brainstorm"))
    small = 0.0004  # of a few hundredths
    among(
        given["paper"],
        paper,
        {
            "'paper': this is records a call; turn it over": 1 / paper,
            "'paper': only the seed calls; the other two kinds are calls as well": 25 / 920,
            "'paper': this is the share of E5-mistral's calls; the question is about records": 45 / 500,
            "'paper': calls and records are both in thousands here; this mixes the units": 45 / 920_000,
        },
        "'paper': not ours; which calls, for how many records?",
        tolerance=small,
    )
    among(
        given["ours"],
        counted / max(1, records),
        {
            "'ours': brainstorm calls are in it; the paper leaves them out, so the two would not compare": with_brainstorm
            / max(1, records),
            "'ours': this is records a call; turn it over": records / max(1, counted),
            "'ours': only the seed calls; the other kinds are calls as well": calls.get("seed", 0) / max(1, records),
        },
        "'ours': not ours; the sum of `calls` without brainstorm, for how many records in `data`?",
    )


@exercise("12.2")
def records_to_match(answer: Any, *, calls: int) -> None:
    """`answer`: records at which `calls` are as few a record as the paper's 45 for 920."""
    right = calls * 920 / 45
    value = number(answer)
    if abs(value - right) <= 1 + 0.01 * right:  # 0.049 is near enough
        return
    for text, wrong in {
        "this multiplies by the paper's share, where it should divide: fewer calls a record need more records": calls * 45 / 920,
        "this is the call share against E5-mistral's; the question is about records": calls * 500 / 45,
        "this counts calls against the paper's calls; how many records does the paper have for each call?": 45_000 / calls,
        "as many records as calls: then each record costs one call, and the paper's cost far less": float(calls),
    }.items():
        if abs(value - wrong) <= max(1e-3, 0.01 * wrong):
            raise Hint(text)
    raise Hint(
        f"with {value:g} records, {calls} calls are {calls / value if value else math.inf:.3g} a record; not the paper's yet"
    )
