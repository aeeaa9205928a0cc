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
            "this is the reference still: with an odd number of levels it keeps one more at the beginning": reference.truncate_topic,
            "the end of a path is its subject, and yours cuts it off": lambda p, n: ends(p, n, 0, n),
            "the beginning of a path says which field it is, and yours cuts it off": lambda p, n: ends(p, 0, n, n),
            "your function returns a list of levels; join them into a path": lambda p, n: right(p, n).split("/"),
            "with an odd number of levels yours keeps one too few": lambda p, n: ends(p, n // 2, n // 2, n),
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
        raise Hint("'refused': the reader takes it, so it holds nothing that would run")
    try:
        tree = ast.parse(texts["refused"].strip(), mode="eval").body
    except SyntaxError:
        raise Hint("'refused': Python itself cannot read this, so `eval` would not run it either") from None
    if not isinstance(tree, ast.List) or not any(isinstance(n, ast.Call) for n in ast.walk(tree)):
        raise Hint("'refused': there is no call inside a list here; what in it could do harm?")


@exercise("02.1")
def own_generators(answer: Any) -> None:
    """`answer(identifier, table, name)`: the attribute `name`, drawn from a generator seeded by the id, a slash and the name."""

    def seeded(seed: Callable[[str, str], str], fixed: str = "") -> Callable[[str, str, str], Any]:
        return lambda i, table, name: prompts.draw_attribute(prompts.rng_for(seed(i, name)), fixed or table, name)

    names = ("clarity", "difficulty", "sts_difficulty", "query_type", "document_words")
    compare(
        answer,
        [(f"record {i}", table, name) for i in range(8) for table in ("paper", "short") for name in names],
        seeded(lambda i, name: f"{i}/{name}"),
        {
            "the generator is seeded by the id alone, so two attributes with equally many values always agree": seeded(
                lambda i, name: i
            ),
            "the generator is seeded by the name alone, so all records get the same value": seeded(lambda i, name: name),
            "the table is not used; the lengths differ from one to the other": seeded(lambda i, name: f"{i}/{name}", "paper"),
            "id and name have changed places; the id comes first": seeded(lambda i, name: f"{name}/{i}"),
            "put a slash between the id and the name": seeded(lambda i, name: i + name),
        },
        "one value",
    )


@exercise("02.2")
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
def mean_of_rows(answer: Any) -> None:
    """`answer(logits, input_ids, is_completion)`: Eq. 1 as the mean over the rows of each row's mean over its completion tokens."""
    cases = []
    for seed in range(6):
        random_ = torch.Generator().manual_seed(seed)
        logits = torch.randn(3, 9, 7, generator=random_, dtype=torch.float64)
        ids = torch.randint(7, (3, 9), generator=random_)
        cases.append((logits, ids, torch.arange(9)[None] >= torch.tensor([[2], [5], [7]])))

    def each(logits: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
        rows = zip(logits, ids, scored, strict=True)
        return torch.stack([reference.completion_loss(x[None], i[None], s[None]) for x, i, s in rows])

    def unshifted(logits: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
        loss = -logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1) * scored
        return (loss.sum(1) / scored.sum(1)).mean()

    def everything(logits: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
        return each(logits, ids, torch.ones_like(scored)).mean()

    compare(
        answer,
        cases,
        lambda *case: each(*case).mean(),
        {
            "this is the reference still: every token counts the same, so a long answer counts more": reference.completion_loss,
            "this is a loss for each row; their mean is asked for": each,
            "this is the sum over the rows; their mean is asked for": lambda *case: each(*case).sum(),
            "the prompt is scored too; `is_completion` says which tokens count": everything,
            "the logits at token t predict token t + 1, and here they are compared with token t": unshifted,
            "each row is a sum here; a long answer then counts more still": lambda x, i, s: (
                each(x, i, s) * s[:, 1:].sum(1)
            ).mean(),
            "a loss has the other sign": lambda *case: -each(*case).mean(),
        },
        "one number",
    )


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
            "the rewards are mixed here; mix the two losses, that of the pair and that of the swapped pair": (
                lambda a, b, c, d, beta, e: loss(a, b, c, d, beta * (1 - 2 * e), 0)
            ),
            "beta is not used, or used as 1": lambda a, b, c, d, beta, e: loss(a, b, c, d, 1, e),
            "the reference model is missing: nothing holds the policy near it": (
                lambda a, b, c, d, beta, e: loss(a, b, 0 * c, 0 * d, beta, e)
            ),
            "this grows when the model tells the pair apart better; a loss has the other sign": lambda *case: -loss(*case),
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
        f"we get another share over {len(pairs)} pairs; count the words with split(), in 'chosen' and 'rejected'",
    )


@exercise("05.1")
def without_the_prompt(answer: Any) -> None:
    """`answer(prompt, sample)`: what `prompts.revise` gives, without the synthesis prompt and the empty line behind it."""
    cases = [(f"Write one example for task {i}.\nRules: none.", f'{{"input":"weak {i}"}}') for i in range(4)]
    compare(
        answer,
        cases,
        lambda p, s: prompts.revise(p, s).removeprefix(f"{p}\n\n"),
        {
            "this is the reference still: the prompt is in it": prompts.revise,
            "the weak sample is missing: there is nothing left to revise": lambda p, s: prompts.revise(p, "").removeprefix(
                f"{p}\n\n"
            ),
            "an empty line is left where the prompt was": lambda p, s: prompts.revise("", s),
            "this is the sample alone; the sentence that asks for a better one must stay": lambda p, s: s,
        },
        "a text",
    )


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
            "the second forgets the records that stay as they were: they count with a gain of zero": right[1] * count / improved,
            "the second is a sum; the mean is asked for": right[1] * count,
            "the second is the first again; what happens to a record whose revision is worse?": right[0],
        },
        "we get another second mean" + ("; it cannot be smaller than the first" if better < right[0] else "; what is the gain of a "
        "record that keeps its old text?"),
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
            "these are still runs of words": reference.jaccard,
            "these are single characters; a run has `size` of them": lambda one, other, size: right(one, other, 1),
            "a space is a character too, and yours leaves it out": lambda one, other, size: right(
                one.replace(" ", ""), other.replace(" ", ""), size
            ),
            "the denominator counts the shared runs twice; the union holds each only once": over(lambda a, b: len(a) + len(b)),
            "the denominator is the smaller set: a short text inside a long one would count as its duplicate": over(
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
        "we get another share; which rule of `dropped_by` is deduplication, and how many records does it start from?",
        tolerance=0.002,
    )
