"""Exercises of notebooks 01 to 06: topics, seeds, generators, revision, deduplication."""

from __future__ import annotations

import ast
import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from speed_core.data import minhash, prompts, records
from workbook.exercises import Hint, among, call, compare, exercise, mapping, number

Rows = Sequence[Mapping[str, Any]]


@exercise("01.1")
def truncate(answer: Any, *, topics: Sequence[str]) -> None:
    """`answer(path, depth)`: the path without its middle."""
    paths = ["A/B/C/D/E/F", "A/B", "A/B/C/D/E", *topics]
    cases = [(p, d) for d in (4, 3, 2) for p in paths]

    def parts(p: str, head: int, tail: int, depth: int) -> str:
        levels = p.split("/")
        return p if len(levels) <= depth else "/".join(levels[:head] + levels[len(levels) - tail :])

    compare(
        answer,
        cases,
        prompts.truncate_topic,
        {
            "the end of a path is its subject, and yours cuts it off": lambda p, d: "/".join(p.split("/")[:d]),
            "the beginning of a path says which field it is, and yours cuts it off": lambda p, d: "/".join(p.split("/")[-d:]),
            "a list of levels comes back; join them to a path again": lambda p, d: prompts.truncate_topic(p, d).split("/"),
            "at an odd depth one end keeps a level more than the other; you chose the other end": lambda p, d: parts(
                p, d // 2, d - d // 2, d
            ),
            "at an odd depth yours keeps a level too few": lambda p, d: parts(p, d // 2, d // 2, d),
            "depth says how many levels stay; yours always leaves four": lambda p, d: prompts.truncate_topic(p, 4),
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


def _token_rows(count: int) -> list[tuple[list[int], list[int], int]]:
    rng = random.Random(3)
    draw = lambda most: [rng.randrange(10, 99) for _ in range(rng.randrange(1, most))]  # noqa: E731
    return [(draw(9), draw(7), 1) for _ in range(count)]


@exercise("03.1")
def completion_mask(answer: Any) -> None:
    """`answer(prompt, completion, end)`: (token ids of the row, 1 where the loss looks)."""

    def right(p: list[int], c: list[int], end: int) -> list[list[int]]:
        return [p + c + [end], [0] * len(p) + [1] * (len(c) + 1)]

    cases = _token_rows(12)
    for p, c, end in cases:
        value = call(answer, list(p), list(c), end)
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise Hint("two lists are asked for: the row's tokens and its mask")
        if len(value[0]) != len(value[1]):
            raise Hint(f"the row has {len(value[0])} tokens and its mask {len(value[1])} entries")
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
    if not isinstance(answer, (list, tuple)) or len(answer) != 4:
        raise Hint("four counts are asked for: both valid, only the base, only the junior, neither")
    given = [number(v) for v in answer]
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


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


@exercise("04.1")
def dpo_loss(answer: Any) -> None:
    """`answer(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)`: Eq. 2 of one pair."""
    rng = random.Random(4)
    cases = [(*(-rng.uniform(1, 60) for _ in range(4)), rng.choice([0.05, 0.1, 0.5])) for _ in range(20)]

    def margin(a: float, b: float, c: float, d: float) -> float:
        return (a - c) - (b - d)

    compare(
        answer,
        cases,
        lambda a, b, c, d, beta: -_log_sigmoid(beta * margin(a, b, c, d)),
        {
            "the sign of the margin is turned round: this loss falls when the rejected text becomes likelier": (
                lambda a, b, c, d, beta: -_log_sigmoid(-beta * margin(a, b, c, d))
            ),
            "beta multiplies the whole difference of the two log-ratios, not one of them": (
                lambda a, b, c, d, beta: -_log_sigmoid(beta * (a - c) - (b - d))
            ),
            "beta is not used, or used as 1": lambda a, b, c, d, beta: -_log_sigmoid(margin(a, b, c, d)),
            "the reference is missing: this pulls away from it without any limit": (
                lambda a, b, c, d, beta: -_log_sigmoid(beta * (a - b))
            ),
            "this grows when the pair is told apart better; a loss has the other sign": (
                lambda a, b, c, d, beta: _log_sigmoid(beta * margin(a, b, c, d))
            ),
            "this is the probability that the pair is told apart; the loss is made from its logarithm": (
                lambda a, b, c, d, beta: math.exp(_log_sigmoid(beta * margin(a, b, c, d)))
            ),
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
        value = call(answer, p, w, r)
        if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(isinstance(v, str) for v in value):
            raise Hint("two texts are asked for: what is read, and what is to be written")
        read, written = value
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
    if not isinstance(answer, (list, tuple)) or len(answer) != 2:
        raise Hint("two numbers are asked for: taking every revision, and keeping the better text of each record")
    always, better = (number(v) for v in answer)
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
def jaccard(answer: Any) -> None:
    """`answer(a, b)`: Jaccard similarity of the two texts' sets of 3-word shingles."""

    def of(size: int = 3, below: Any = None) -> Any:
        def f(a: str, b: str) -> float:
            x, y = minhash.shingles(a, size), minhash.shingles(b, size)
            return len(x & y) / (below(x, y) if below else len(x | y))

        return f

    def case_sensitive(a: str, b: str) -> float:
        x, y = ({tuple(t.split()[i : i + 3]) for i in range(len(t.split()) - 2)} for t in (a, b))
        return len(x & y) / len(x | y)

    compare(
        answer,
        _TEXTS,
        of(),
        {
            "single words are compared, so a text with its words in another order counts as a duplicate": of(1),
            "the shingles are two words long": of(2),
            "the shingles are four words long": of(4),
            "the shared shingles are counted twice below the line; what is in both sets is in the union once": of(
                3, lambda x, y: len(x) + len(y)
            ),
            "below the line stands the smaller set: a short text inside a long one would count as its duplicate": of(
                3, lambda x, y: min(len(x), len(y))
            ),
            "case or punctuation makes equal words differ; minhash.shingles takes care of both": case_sensitive,
            "this is a distance: equal texts must get 1": lambda a, b: 1 - of()(a, b),
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
