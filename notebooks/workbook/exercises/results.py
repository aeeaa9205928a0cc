"""Exercises of notebooks 00 and 09 to 12: profiles, scores, intervals, scaling, verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import norm

from speed_core import profile as profiles
from speed_core.files import UserError
from speed_core.study.verdicts import Verdict, verdict
from workbook.exercises import Hint, call, compare, exercise, number


@exercise("00.1")
def times_the_paper(answer: Any, *, prompts: int) -> None:
    """`answer`: how many times more synthesis prompts the paper answered than this profile, which has `prompts`."""
    paper = profiles.load("paper").synthesis.count
    right, value = paper / prompts, number(answer)
    if abs(value - right) <= 0.01 * right:
        return
    for text, wrong in {
        "turn it over: how many times *more* is asked for": prompts / paper,
        "this is how many the paper has; divide by yours": float(paper),
    }.items():
        if abs(value - wrong) <= 0.01 * abs(wrong):
            raise Hint(text)
    raise Hint("another number; divide `synthesis.count` of both profiles")


@exercise("00.2")
def offered_name(answer: Any) -> None:
    """`answer`: the name that the error for a misspelled setting offers."""
    wrong = "junior.epocs"
    try:
        profiles.load("tiny", {wrong: 2})
    except UserError as error:
        offered = str(error)
    if answer == wrong:
        raise Hint("this is the misspelled name itself; what does the end of the message offer?")
    if not isinstance(answer, str) or answer not in profiles.dotted(profiles.load("tiny")):
        raise Hint("this is no setting of a profile; copy the name from the end of the message")
    if f"'{answer}'" not in offered:
        raise Hint("a setting, but not the one that the message offers")


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
def at_least(answer: Any) -> None:
    """`answer(low, high, least)`: the verdict on the claim that a difference is `least` points or more."""
    intervals = [(0.2, 1.4), (1.2, 2.5), (-1.2, 0.4), (-2.0, -0.3), (0.1, 0.9), (0.6, 3.0), (2.1, 2.2), (-0.5, 4.0)]

    def said(holds: Any, fails: Any) -> Any:
        words = Verdict.SMALLER, Verdict.CONTRADICTED, Verdict.UNRESOLVED
        return lambda a, b, m: words[0] if holds(a, b, m) else words[1] if fails(a, b, m) else words[2]

    compare(
        answer,
        [(*ends, least) for ends in intervals for least in (1.0, 0.5, 2.0)],
        lambda a, b, m: verdict(a - m, b - m),
        {
            "this is the reference still: a rise of any size will do": lambda a, b, m: verdict(a, b),
            "the interval is moved the wrong way: a larger `least` must be harder to reach": lambda a, b, m: verdict(
                a + m, b + m
            ),
            "an interval that holds `least` decides nothing": said(lambda a, b, m: a > m, lambda a, b, m: a < m),
            "a rise that is surely smaller than `least` contradicts the claim": said(
                lambda a, b, m: a > m, lambda a, b, m: b < 0
            ),
            "the whole interval has to lie above `least`, not its upper end alone": said(
                lambda a, b, m: b > m, lambda a, b, m: b < m
            ),
        },
        "a verdict, as `verdicts.verdict` returns it",
    )


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
def weighted_slope(answer: Any) -> None:
    """`answer(scores)` of {records: score}: the least-squares slope on log2 of the records, each size weighted by its records."""
    cases = [
        ({16: 40.0, 64: 52.0, 256: 58.0},),
        ({21: 35.7, 42: 43.5, 84: 53.9, 168: 61.9, 336: 62.3},),
        ({100: 40.0, 150: 39.0, 1000: 45.0},),
    ]

    def slope(weigh: Any, log: Any = np.log2, middle: Any = None) -> Any:
        def fitted(scores: Mapping[int, float]) -> float:
            n, y = np.array(list(scores), float), np.array(list(scores.values()))
            x, w = log(n), weigh(n)
            apart = x - np.average(x, weights=w if middle is None else middle(n))
            return float((w * apart) @ y / (w * apart**2).sum())

        return fitted

    compare(
        answer,
        cases,
        slope(lambda n: n),
        {
            "this is the reference still: every size counts the same": slope(np.ones_like),
            "the middle is the plain mean of the logarithms; the weights belong into it too": slope(
                lambda n: n, middle=np.ones_like
            ),
            "the weights are the logarithms; the records themselves are asked for": slope(np.log2),
            "the logarithm is natural: this is points for each 2.7-fold": slope(lambda n: n, np.log),
            "this is points a record; a doubling is a step in the logarithm": slope(lambda n: n, lambda n: n),
            "few records count most here": slope(lambda n: 1 / n),
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


INTERVALS = [
    (0.2, 1.4, 1), (-1.2, -0.1, 1), (-0.3, 2.0, 1), (0.0, 0.9, 1), (-2.0, -0.4, -1), (0.3, 0.8, -1), (-0.5, 0.1, -1),
    (-0.4, 0.6, 0), (-0.2, 1.3, 0), (1.2, 2.5, 0), (-9.0, -1.1, 0), (-3.0, 3.0, 0),
]  # fmt: skip


def _word(low: float, high: float, expected: int, margin: float = 1.0) -> str:
    if not expected:
        holds, fails = -margin < low and high < margin, low > margin or high < -margin
    else:
        holds, fails = (low > 0, high < 0) if expected > 0 else (high < 0, low > 0)
    return "holds" if holds else "fails" if fails else "open"


def _flipped(word: str) -> str:
    return {"holds": "fails", "fails": "holds"}.get(word, word)


@exercise("12.1")
def verdict_rule(answer: Any) -> None:
    """`answer(low, high, expected)`: "holds", "fails" or "open"."""
    compare(
        answer,
        INTERVALS,
        _word,
        {
            "a claimed fall is judged as if a rise were claimed": lambda a, b, e: _word(a, b, abs(e)),
            "a claim of no difference is judged as if a rise were claimed": lambda a, b, e: _word(a, b, e or 1),
            "zero at the very end of an interval is still inside it": lambda a, b, e: "holds" if a == 0 and e > 0 else _word(a, b, e),
            "an interval across the one-point margin decides nothing: part of it is within": (
                lambda a, b, e: "fails" if not e and _word(a, b, e) == "open" else _word(a, b, e)
            ),
            "an interval that contains zero does not contradict a claim: nothing is decided": (
                lambda a, b, e: "fails" if e and _word(a, b, e) == "open" else _word(a, b, e)
            ),
            "*holds* and *fails* have changed places": lambda a, b, e: _flipped(_word(a, b, e)),
        },
        'one of three words, "holds", "fails" or "open"',
    )  # fmt: skip


@exercise("12.2")
def many_claims(answer: Any) -> None:
    """`answer(low, high, expected, count)`: the verdict of the interval at the level 1 - 0.05 / count."""

    def widened(by: Any) -> Any:
        def judge(low: float, high: float, expected: int, count: int) -> str:
            middle, half = (low + high) / 2, (high - low) / 2 * by(count)
            return str(verdict(middle - half, middle + half, expected))

        return judge

    def ratio(tail: Any) -> Any:
        return widened(lambda count: norm.ppf(1 - tail(count)) / norm.ppf(0.975))

    compare(
        answer,
        [(*case, count) for case in [*INTERVALS, (0.5, 3.0, 1), (0.9, 3.0, 1), (-0.7, 0.7, 0)] for count in (1, 10, 37)],
        ratio(lambda count: 0.025 / count),
        {
            "this is the interval as it was: nothing became wider": ratio(lambda count: 0.025),
            "an interval has two sides, and each gets half of the level": ratio(lambda count: 0.05 / count),
            "the width is multiplied by the number of intervals; a level is divided by it, and the width follows from the quantiles": (
                widened(lambda count: count)
            ),
            "the interval became narrower; more claims need a wider one": (
                widened(lambda count: norm.ppf(0.975) / norm.ppf(1 - 0.025 / count))
            ),
        },
        "a verdict, as `verdicts.verdict` returns it",
    )
