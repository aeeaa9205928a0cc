"""Checkers of the notebooks' exercises: they say what is wrong and where, never what is right.

An exercise is one function here, named by notebook and number. It gets the reader's answer and, where the right
answer depends on the run, the artifacts' rows, and computes what is right from them; so a checker holds at every
size. `check` prints one line and never raises on an answer, so that an unsolved copy still runs to its end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

UNANSWERED = "put your answer in place of the three dots, run that cell, then this one"

CHECKERS: dict[str, Callable[..., None]] = {}


class Hint(Exception):
    """What is wrong with an answer, in words that do not give the right one."""


def exercise(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a checker `f(answer, **facts)`; it raises Hint unless the answer is right."""

    def register(f: Callable[..., None]) -> Callable[..., None]:
        CHECKERS[name] = f
        return f

    return register


def hint(name: str, answer: Any, **facts: Any) -> str:
    """What is wrong with the answer to exercise `name`, as "03.1"; empty when it is right."""
    if name not in CHECKERS:
        raise ValueError(f"exercise {name!r}: unknown; there are {', '.join(sorted(CHECKERS))}")
    try:
        if answer is ... or (isinstance(answer, (list, tuple)) and any(a is ... for a in answer)):
            raise Hint(UNANSWERED)
        CHECKERS[name](answer, **facts)
    except Hint as found:
        return str(found)
    return ""


def check(name: str, answer: Any, **facts: Any) -> None:
    """Print "03.1: right" or "03.1: not yet - HINT"."""
    use(name, answer, None, **facts)


def use(name: str, answer: Any, otherwise: Any, **facts: Any) -> Any:
    """`check`, then what the notebook goes on with: the reader's answer when it is right, else `otherwise`."""
    why = hint(name, answer, **facts)
    print(f"{name}: not yet - {why}" if why else f"{name}: right")
    return otherwise if why else answer


# --- what the checkers are made of ----------------------------------------------------------------


def brief(value: Any, most: int = 120) -> str:
    """One line of at most `most` characters that shows a value."""
    if hasattr(value, "tolist"):  # an array or a tensor, or one number of it
        array = np.asarray(value)
        value = (array.round(3) if array.ndim and array.dtype.kind == "f" else array).tolist()
    text = " ".join((f"{value:.4g}" if isinstance(value, float) else repr(value)).split())
    return text if len(text) <= most else text[: most - 3] + "..."


def call(answer: Any, *arguments: Any) -> Any:
    """What the reader's function returns; Hint when there is no function, no value, or an error."""
    if not callable(answer):
        raise Hint(f"a function is asked for, and this is {type(answer).__name__}; keep the line that starts with def")
    try:
        value = answer(*copy.deepcopy(arguments))
    except Exception as error:  # the reader's code may raise anything; all of it is an answer that is not right yet
        shown = ", ".join(brief(a, 60) for a in arguments)
        raise Hint(f"your function stops with {type(error).__name__}: {error}; it was given {shown}") from None
    if value is None or value is ...:
        raise Hint(UNANSWERED + " (your function returns nothing)")
    return value


def number(value: Any) -> float:
    """A finite float from whatever number the reader computed; Hint otherwise."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise Hint(f"one number is asked for, and this is {type(value).__name__} {brief(value, 60)}") from None
    if not math.isfinite(found):
        raise Hint(f"the answer is {found}; look for a division by zero or a logarithm of zero")
    return found


def same(a: Any, b: Any) -> bool:
    """Texts equal; numbers, lists and arrays of one shape and equal to four digits."""
    if isinstance(a, str) or isinstance(b, str):
        return isinstance(a, str) and isinstance(b, str) and a == b
    if isinstance(b, (list, tuple)) and any(isinstance(x, str) for x in b):
        return isinstance(a, (list, tuple)) and list(a) == list(b)
    try:
        x, y = np.asarray(a, float), np.asarray(b, float)
    except (TypeError, ValueError):
        return isinstance(a, list) and a == b
    return x.shape == y.shape and bool(np.allclose(x, y, rtol=1e-4, atol=1e-6))


def compare(
    answer: Any,
    cases: Sequence[tuple[Any, ...]],
    right: Callable[..., Any],
    mistakes: Mapping[str, Callable[..., Any]],
    shape: str = "",
) -> None:
    """The reader's function against `right` on all cases; a known mistake, right on none but its own terms, has its hint.

    `mistakes` maps a hint to the function that makes this mistake. `shape` says what is to be returned, for answers of
    another form than the right one.
    """
    found = [call(answer, *c) for c in cases]
    wrong = [i for i, c in enumerate(cases) if not same(found[i], right(*c))]
    if not wrong:
        return
    for text, f in mistakes.items():
        if all(same(v, f(*c)) for v, c in zip(found, cases, strict=True)):
            raise Hint(text)
    i = wrong[0]
    form = f" ({shape})" if shape and np.shape(found[i]) != np.shape(right(*cases[i])) else ""
    given = ", ".join(brief(a, 80) for a in cases[i])
    raise Hint(f"{len(wrong)} of {len(cases)} cases differ; the first is given {given} and returns {brief(found[i], 80)}{form}")


def among(answer: Any, right: float, mistakes: Mapping[str, float], otherwise: str, tolerance: float = 0.006) -> None:
    """One number against `right` (two decimals are enough) and against the values that known mistakes give."""
    value = number(answer)
    if abs(value - right) <= tolerance:
        return
    for text, wrong in mistakes.items():
        if abs(value - wrong) <= tolerance:
            raise Hint(text)
    raise Hint(otherwise)


def several(answer: Any, count: int, asked: str) -> Sequence[Any]:
    """The `count` parts of an answer; Hint with what is `asked` for otherwise."""
    if not isinstance(answer, (list, tuple)) or len(answer) != count:
        raise Hint(f"{asked} are asked for")
    return answer


def mapping(answer: Any, keys: Sequence[str]) -> dict[str, Any]:
    """A dictionary with exactly these keys, all of them filled in; Hint otherwise."""
    if not isinstance(answer, Mapping) or set(answer) != set(keys):
        raise Hint(f"a dictionary with the keys {', '.join(keys)} is asked for")
    empty = [k for k in keys if answer[k] is ... or answer[k] is None]
    if empty:
        raise Hint(f"{UNANSWERED}: {', '.join(empty)}")
    return dict(answer)


from workbook.exercises import data, embedding, results  # noqa: E402, F401  (they register their checkers)
