"""Exercises of notebooks 01 to 06: topics, seeds, generators, revision, deduplication."""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from speed_core import reference
from speed_core.data import prompts, records
from workbook.exercises import Hint, among, call, compare, exercise, mapping, number, several

Rows = Sequence[Mapping[str, Any]]


@exercise("01.1")
def truncate(answer: Any, *, topics: Sequence[str]) -> None:
    """`answer(path, levels)`: the path without its middle; at an odd number of levels its end keeps one more than its beginning."""

    def ends(path: str, first: int, last: int, levels: int) -> str:
        parts = path.split("/")
        return path if len(parts) <= levels else "/".join(parts[:first] + parts[len(parts) - last :])

    def right(path: str, levels: int) -> str:
        return ends(path, levels // 2, levels - levels // 2, levels)

    compare(
        answer,
        [(path, n) for n in (5, 4, 3, 2) for path in ("A/B/C/D/E/F", "A/B", "A/B/C/D/E", *topics)],
        right,
        {
            "this is the reference still: at an odd number of levels its beginning keeps one more": reference.truncate_topic,
            "the end of a path is its subject, and yours cuts it off": lambda p, n: ends(p, n, 0, n),
            "the beginning of a path says which field it is, and yours cuts it off": lambda p, n: ends(p, 0, n, n),
            "a list of levels comes back; join them to a path again": lambda p, n: right(p, n).split("/"),
            "at an odd number of levels yours keeps one too few": lambda p, n: ends(p, n // 2, n // 2, n),
            "`levels` says how many stay; yours always leaves four": lambda p, n: right(p, 4),
        },
    )


@exercise("01.2")
def unread_answers(answer: Any) -> None:
    """`answer`: a text that only the literal reader takes, and one that an evaluator would have run."""
    given = mapping(answer, ("read", "refused"))
    texts = {k: str(v) for k, v in given.items()}
    found, why = records.parse_string_list(texts["read"])
    if why:
        raise Hint(f"'read': the reader refuses it as {why}")
    try:
        json.loads(texts["read"])
    except ValueError:
        pass
    else:
        raise Hint("'read': this is JSON already; which quotes would a Python programmer type?")
    if not records.parse_string_list(texts["refused"])[1]:
        raise Hint("'refused': the reader takes it, so nothing in it would have to be run")
    try:
        tree = ast.parse(texts["refused"].strip(), mode="eval").body
    except SyntaxError:
        raise Hint("'refused': Python itself cannot read this, so an evaluator would not have run it either") from None
    if not isinstance(tree, ast.List) or not any(isinstance(n, ast.Call) for n in ast.walk(tree)):
        raise Hint("'refused': there is no call inside a list here; what in it could do harm?")


@exercise("02.1")
def two_parsers(answer: Any) -> None:
    """`answer`: a text that only our parser keeps, and one that only the released one keeps."""
    given = mapping(answer, ("lost", "kept"))
    ours = {k: records.parse(str(v), "retrieval") for k, v in given.items()}
    theirs = {k: records.released_parser_verdict(str(v), "retrieval") for k, v in given.items()}
    if ours["lost"].status != "ok":
        raise Hint(f"'lost': our parser says {ours['lost'].status}, {ours['lost'].reason}; it must be a good record first")
    if theirs["lost"] != "lost":
        raise Hint(f"'lost': the released parser says {theirs['lost']}; reread how it looks for the end of an object, and when")
    if ours["kept"].status == "ok":
        raise Hint("'kept': our parser takes it as well; break a rule about the *meaning* of a record")
    if theirs["kept"] != "kept":
        raise Hint(f"'kept': the released parser says {theirs['kept']}; the text must still be JSON, with the query's key")


@exercise("02.2")
def near_negatives(answer: Any, *, rows: Rows) -> None:
    """`answer`: share of retrieval seeds whose hard negative shares at least as many words with the query."""
    found = [records.parse(e["raw"], e["kind"]).record for e in rows if e["status"] == "ok" and e["kind"] == "retrieval"]
    shared: list[tuple[int, int]] = []
    for record in found:
        q, p, n = (set(str((record or {})[k]).lower().split()) for k in ("query", "positive", "negative"))
        shared.append((len(q & p), len(q & n)))
    total = max(1, len(shared))
    right, strict = sum(n >= p for p, n in shared) / total, sum(n > p for p, n in shared) / total
    everything = max(1, sum(e["status"] == "ok" for e in rows))
    among(
        answer,
        right,
        {
            "at least as many: a tie counts, and yours leaves ties out": strict,
            "a share lies between 0 and 1; this is a percentage": 100 * right,
            "this is a count; divide it by the number of retrieval seeds": sum(n >= p for p, n in shared),
            "this counts the queries that are nearer to the positive": 1 - right,
            "this is divided by all seeds; only retrieval seeds are asked for": sum(n >= p for p, n in shared) / everything,
        },
        f"another share than ours over {len(shared)} retrieval seeds; are words lower-cased, split at spaces, and counted once?",
    )


@exercise("03.1")
def completion_mask(answer: Any) -> None:
    """`answer(prompt, completion, end)`: (token ids of the row, 1 where the loss looks)."""

    def right(p: list[int], c: list[int], end: int) -> list[list[int]]:
        return [p + c + [end], [0] * len(p) + [1] * (len(c) + 1)]

    rng = random.Random(3)
    tokens = lambda most: [rng.randrange(10, 99) for _ in range(rng.randrange(1, most))]  # noqa: E731
    cases = [(tokens(9), tokens(7), 1) for _ in range(12)]
    for case in cases:
        row, mask = several(call(answer, *case), 2, "two lists, the row's tokens and its mask,")
        if len(row) != len(mask):
            raise Hint(f"the row has {len(row)} tokens and its mask {len(mask)} entries")
    compare(
        answer,
        cases,
        right,
        {
            "the prompt is scored too; Eq. 1 sums over y alone": lambda p, c, e: [p + c + [e], [1] * (len(p) + len(c) + 1)],
            "a generator that never sees the end never stops: the row lacks a token": lambda p, c, e: [
                p + c,
                [0] * len(p) + [1] * len(c),
            ],
            "the end is in the row but not scored, so it is never learnt": lambda p, c, e: [
                p + c + [e],
                [0] * len(p) + [1] * len(c) + [0],
            ],
            "zeros and ones are the wrong way round": lambda p, c, e: [p + c + [e], [1] * len(p) + [0] * (len(c) + 1)],
            "an end token between prompt and completion would end the answer before it begins": lambda p, c, e: [
                p + [e] + c + [e],
                [0] * (len(p) + 1) + [1] * (len(c) + 1),
            ],
        },
    )


@exercise("03.2")
def paired_counts(answer: Any, *, base: Rows, junior: Rows) -> None:
    """`answer`: prompts on which (both, only base, only junior, neither) wrote a valid record."""
    given = [number(v) for v in several(answer, 4, "four counts (both valid, only the base, only the junior, neither)")]
    ok = {e["record"]: e["status"] == "ok" for e in junior}
    pairs = [(e["status"] == "ok", ok[e["record"]]) for e in base]
    right = [float(pairs.count(k)) for k in ((True, True), (True, False), (False, True), (False, False))]
    if given == right:
        return
    if sum(given) != len(pairs):
        raise Hint(f"each prompt belongs in one of four places; yours add up to {sum(given):g} of {len(pairs)} prompts")
    if given == [right[0], right[2], right[1], right[3]]:
        raise Hint("the second count is of prompts that only the base can do; yours are the wrong way round")
    if given == right[::-1]:
        raise Hint("the order is: both, only the base, only the junior, neither")
    raise Hint("the four add up, but they are not ours; pair the rows by their field 'record'")


@exercise("04.1")
def smoothed_dpo_loss(answer: Any) -> None:
    """`answer(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, smoothing)`: Eq. 2 where the judge is wrong
    with the probability `smoothing`."""
    rng = random.Random(4)
    logps = [[torch.tensor(-rng.uniform(1, 60), dtype=torch.float64) for _ in range(4)] for _ in range(20)]
    cases = [(*four, rng.choice([0.05, 0.1, 0.5]), rng.choice([0.1, 0.2, 0.3])) for four in logps]

    def loss(a: Tensor, b: Tensor, c: Tensor, d: Tensor, beta: float, e: float) -> Tensor:
        return (1 - e) * reference.dpo_loss(a, b, c, d, beta) + e * reference.dpo_loss(b, a, d, c, beta)

    compare(
        answer,
        cases,
        loss,
        {
            "this is Eq. 2 as it was; where does the smoothing come in?": lambda a, b, c, d, beta, e: loss(a, b, c, d, beta, 0),
            "the two labels have changed places: the judge is right with probability 1 - smoothing": (
                lambda a, b, c, d, beta, e: loss(a, b, c, d, beta, 1 - e)
            ),
            "the rewards are mixed here; mix the two losses, that of the pair and that of the pair turned round": (
                lambda a, b, c, d, beta, e: loss(a, b, c, d, beta * (1 - 2 * e), 0)
            ),
            "beta is not used, or used as 1": lambda a, b, c, d, beta, e: loss(a, b, c, d, 1, e),
            "the reference model is missing: this pulls away from it without any limit": (
                lambda a, b, c, d, beta, e: loss(a, b, 0 * c, 0 * d, beta, e)
            ),
            "this grows when the pair is told apart better; a loss has the other sign": lambda *case: -loss(*case),
        },
        "one number",
    )


@exercise("04.2")
def longer_chosen(answer: Any, *, pairs: Rows) -> None:
    """`answer`: share of pairs whose chosen text has more words than the rejected one."""

    def share(size: Any, strict: bool = True) -> float:
        sizes = [(size(p["chosen"]), size(p["rejected"])) for p in pairs]
        return sum(a > b if strict else a >= b for a, b in sizes) / max(1, len(sizes))

    words = lambda text: len(text.split())  # noqa: E731
    right = share(words)
    among(
        answer,
        right,
        {
            "a share lies between 0 and 1; this is a percentage": 100 * right,
            "this is a count; divide it by the number of pairs": right * len(pairs),
            "texts of equal length are counted too; the question says more": share(words, strict=False),
            "this compares characters; the question says words": share(len),
            "this counts the pairs whose rejected text is the longer one": 1 - share(words, strict=False),
        },
        f"another share than ours over {len(pairs)} pairs; count the words with split(), in 'chosen' and 'rejected'",
    )


@exercise("05.1")
def revision_row(answer: Any) -> None:
    """`answer(prompt, weak, revision)`: (what the revisor reads, what it learns to write)."""
    cases = [(f"Write one example for task {i}.", f'{{"input":"weak {i}"}}', f'{{"input":"better {i}"}}') for i in range(3)]
    for p, w, r in cases:
        read, written = map(str, several(call(answer, p, w, r), 2, "two texts, what is read and what is to be written,"))
        if r in read:
            raise Hint("the revision stands in what is read: the revisor would learn to copy, and has nothing to copy from later")
        if w == written:
            raise Hint("this teaches the revisor to write the weak sample once more")
        if p not in read:
            raise Hint("the revisor cannot know what was asked for; the prompt is missing from what it reads")
        if w not in read:
            raise Hint("the revisor cannot know what to mend; the weak sample is missing from what it reads")
        if read != prompts.revise(p, w):
            raise Hint("training and use must ask in the same words; the second cell of this notebook shows them")
        if written != r:
            raise Hint("what is to be written is not the revision as it stands")


@exercise("05.2")
def keep_the_better(answer: Any, *, gain: Sequence[float]) -> None:
    """`answer`: (mean gain when every revision is taken, mean gain when only the better of the two is kept)."""
    asked = "two numbers, with every revision taken and with the better text of each record kept,"
    always, better = (number(v) for v in several(answer, 2, asked))
    count = max(1, len(gain))
    right = sum(gain) / count, sum(max(g, 0.0) for g in gain) / count
    improved = max(1, sum(g > 0 for g in gain))
    among(always, right[0], {"the first is a sum; the mean is asked for": sum(gain)}, "the first is not the mean of all gains")
    among(
        better,
        right[1],
        {
            "the second forgets the records that stay as they were: they count with a gain of nothing": right[1] * count / improved,
            "the second is a sum; the mean is asked for": right[1] * count,
            "the second is the first again; what happens to a record whose revision is worse?": right[0],
        },
        "the second is not ours" + ("; it cannot be smaller than the first" if better < right[0] else "; which gain has a record "
        "that keeps its old text?"),
    )  # fmt: skip


_TEXTS = [
    ("the hen lays an egg every day of the week", "the hen lays an egg on most days of the week"),
    ("how do I mend a torn sail at sea", "How do I mend a torn sail at sea?"),
    ("one two three four five six", "six five four three two one"),
    ("so it goes and so it goes and so it goes", "so it goes and so it went"),
    ("a short text about old maps of the coast", "a short text about old maps"),
]


@exercise("06.1")
def jaccard_of_characters(answer: Any) -> None:
    """`answer(one, other, size)`: Jaccard similarity of the two texts' runs of `size` characters, spaces included."""

    def runs(text: str, size: int) -> set[str]:
        return {text[i : i + size] for i in range(len(text) - size + 1)}

    def over(below: Callable[[set[str], set[str]], int], letters: Callable[[str], str] = str.lower) -> Callable[..., float]:
        def f(one: str, other: str, size: int) -> float:
            a, b = runs(letters(one), size), runs(letters(other), size)
            return len(a & b) / below(a, b)

        return f

    right = over(lambda a, b: len(a | b))

    compare(
        answer,
        [(*texts, size) for texts in _TEXTS for size in (5, 3)],
        right,
        {
            "these are runs of words still": reference.jaccard,
            "these are single characters; a run has `size` of them": lambda one, other, size: right(one, other, 1),
            "a space is a character too, and yours leaves it out": lambda one, other, size: right(
                one.replace(" ", ""), other.replace(" ", ""), size
            ),
            "the shared runs are counted twice below the line; what is in both sets is in the union once": over(
                lambda a, b: len(a) + len(b)
            ),
            "below the line stands the smaller set: a short text inside a long one would count as its duplicate": over(
                lambda a, b: min(len(a), len(b))
            ),
            "a capital letter makes equal words differ": over(lambda a, b: len(a | b), letters=str),
            "this is a distance: equal texts must get 1": lambda *case: 1 - right(*case),
        },
        "one number",
    )


@exercise("06.2")
def kept_by_deduplication(answer: Any, *, issued: int, valid: int, dropped: Rows) -> None:
    """`answer`: share of the valid records that deduplication keeps, what the paper's 0.80 counts."""
    twins = sum(r["dropped_by"] == "near-duplicate" for r in dropped)
    right = (valid - twins) / max(1, valid)
    among(
        answer,
        right,
        {
            "this counts every loss since the prompts; the paper starts from records that exist": (valid - len(dropped)) / issued,
            "this is divided by the prompts; the paper starts from records that exist": (valid - twins) / issued,
            "records that overlap the evaluation are no duplicates; the paper's number leaves them in": (valid - len(dropped))
            / max(1, valid),
            "this is the share that is dropped": 1 - right,
            "this is a percentage; give a share between 0 and 1": 100 * right,
        },
        "another share than ours; which rule of `dropped_by` is deduplication, and of how many records?",
        tolerance=0.002,
    )
