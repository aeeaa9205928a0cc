"""Exercises of notebooks 07 and 08: the guide's mask and the contrastive loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workbook.exercises import Hint, call, compare, exercise, number


def _guides() -> list[tuple[np.ndarray, float]]:
    """4 x 4 guide similarities with margins; two hold an exact tie with the own pair."""
    rng = np.random.default_rng(7)
    cases = [(rng.uniform(-0.2, 1.0, (4, 4)).round(2), m) for m in (0.0, 0.1, -0.1, 0.3, 0.0, 0.0)]
    for guide, _ in cases[-2:]:
        guide[0, 2] = guide[0, 0]
    return cases


@exercise("07.1")
def removed(answer: Any) -> None:
    """`answer(guide, margin)`: boolean (B, B), True where candidate j of query i is removed."""
    off = ~np.eye(4, dtype=bool)

    def rule(guide: np.ndarray, threshold: np.ndarray) -> np.ndarray:
        return (guide > threshold) & off

    def own(guide: np.ndarray) -> np.ndarray:
        return np.diag(guide)[:, None]

    cases = _guides()
    value = call(answer, *cases[0])
    if np.shape(value) != (4, 4):
        raise Hint(f"a 4 x 4 array is asked for, a row for each query; yours has the shape {np.shape(value)}")
    compare(
        answer,
        cases,
        lambda g, m: rule(g, own(g) - m),
        {
            "the own pair is removed somewhere: a positive margin puts it above its own threshold": lambda g, m: g > own(g) - m,
            "the margin points the wrong way: a larger one must remove more": lambda g, m: rule(g, own(g) + m),
            "the margin is not used": lambda g, m: rule(g, own(g)),
            "the threshold of row i is the own pair of row i; yours is that of the column": lambda g, m: rule(g, own(g).T - m),
            "a candidate exactly as alike as the own pair stays (a copy of the positive, for instance)": lambda g, m: (
                (g >= own(g) - m) & off
            ),
            "this marks what stays; mark what is removed": lambda g, m: ~rule(g, own(g) - m),
            "one threshold for the whole batch; each row has its own": lambda g, m: rule(g, np.diag(g).mean() - m),
        },
        "True or False for each",
    )


@exercise("07.2")
def even_margin(answer: Any, *, points: Sequence[Mapping[str, Any]]) -> None:
    """`answer`: the tried margin at which MiniLM, on the answered questions, is nearest to as many right as wrong removals."""
    value = number(answer)

    def nearest(guide: str, labels: str, key: str) -> set[float]:
        mine = [r for r in points if (r["guide"], r["labels"]) == (guide, labels)]
        best = min(abs(r[key] - 0.5) for r in mine)
        return {r["margin"] for r in mine if abs(abs(r[key] - 0.5) - best) < 1e-9}

    answered, other = "several answers to a question", "20 Newsgroups"
    if value in nearest("MiniLM", answered, "precision"):
        return
    if value not in {r["margin"] for r in points}:
        raise Hint(f"{value:g} was not tried; the margins in `points` were")
    if value in nearest("MiniLM", answered, "recall"):
        raise Hint("there half of the false negatives are found; the question is about what was removed")
    if value in nearest("MiniLM", other, "precision"):
        raise Hint("that is so for the newsgroups; the question is about questions with several answers")
    if value in nearest("TF-IDF", answered, "precision") | nearest("MiniLM, 2 of 6 layers", answered, "precision"):
        raise Hint("that is so for a weaker guide; the question is about MiniLM itself")
    raise Hint("as many right as wrong removals: which value has the precision then, and where is it nearest to that?")


@exercise("08.1")
def info_nce(answer: Any) -> None:
    """`answer(similarities, own, temperature)`: loss of one query, its positive at index `own`."""
    rng = np.random.default_rng(8)
    cases = [(rng.uniform(-0.3, 0.9, 8).round(3), int(rng.integers(8)), t) for t in (0.02, 0.05, 0.1, 1.0) for _ in range(4)]

    def loss(s: np.ndarray, own: int, scale: float, keep: Any = None) -> float:
        z = s * scale
        pool = z if keep is None else z[keep]
        return float(np.log(np.exp(pool - z.max()).sum()) + z.max() - z[own])

    compare(
        answer,
        cases,
        lambda s, o, t: loss(s, o, 1 / t),
        {
            "similarities are multiplied by the temperature; a low temperature must sharpen": lambda s, o, t: loss(s, o, t),
            "the temperature is not used": lambda s, o, t: loss(s, o, 1.0),
            "the positive is missing below the line: this loss can become negative": lambda s, o, t: loss(
                s, o, 1 / t, np.arange(len(s)) != o
            ),
            "this grows with the positive's probability; a loss has the other sign": lambda s, o, t: -loss(s, o, 1 / t),
            "this is the positive's probability; the loss is made from its logarithm": lambda s, o, t: np.exp(-loss(s, o, 1 / t)),
            "the positive's similarity is not divided by the temperature, the others are": lambda s, o, t: (
                loss(s, o, 1 / t) + s[o] / t - s[o]
            ),
            "the first candidate is taken for the positive; it stands at `own`": lambda s, o, t: loss(s, 0, 1 / t),
        },
        "one number",
    )


@exercise("08.2")
def last_token(answer: Any) -> None:
    """`answer(hidden, mask)`: the vector at each text's last real token, (texts, D)."""
    rng = np.random.default_rng(9)
    cases = []
    for longest in (3, 5, 8):
        lengths = [longest, *rng.integers(2, longest + 1, 3), 2]
        mask = (np.arange(longest + 2)[None] < np.array(lengths)[:, None]).astype(int)
        cases.append((rng.normal(size=(5, longest + 2, 4)).round(2), mask))
    rows = np.arange(5)
    compare(
        answer,
        cases,
        lambda h, m: h[rows, m.sum(1) - 1],
        {
            "this reads the last column, which is padding for every shorter text": lambda h, m: h[:, -1],
            "this reads the token before the last: the count of tokens is no index yet": lambda h, m: h[rows, m.sum(1) - 2],
            "this reads the first padding, one behind the end": lambda h, m: h[rows, m.sum(1)],
            "this is the mean over tokens, as encoders do it; a causal model has seen the whole text at one place only": (
                lambda h, m: (h * m[..., None]).sum(1) / m.sum(1, keepdims=True)
            ),
            "this reads the first token, which has seen nothing of the text": lambda h, m: h[:, 0],
        },
        "a vector for each text",
    )
