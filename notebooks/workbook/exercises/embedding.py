"""Exercises of notebooks 07, 07b and 08: the guide's mask, gains of students, the contrastive loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speed_core import reference
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


@exercise("07.3")
def copies(answer: Any) -> None:
    """`answer(guide_similarity, positives, margin)`: the reference mask, own pairs kept, and copies of the own positive removed too."""
    cases = []
    for seed, texts in enumerate((list("abca"), list("aabb"), list("abcd"), list("abac"), list("aaab"), list("abcb"))):
        similarity = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)).mul(100).round() / 100
        for j, text in enumerate(texts):
            similarity[:, j] = similarity[:, texts.index(text)]  # equal texts are equally alike
        if seed == 3:
            similarity[0, 1] = similarity[0, 0]  # another text, exactly as alike
        cases.append((similarity, texts, (0.0, 0.1, -0.1)[seed % 3]))
    off = ~torch.eye(4, dtype=torch.bool)

    def same(texts: Sequence[str]) -> Tensor:
        return torch.tensor([[a == b for b in texts] for a in texts])

    def right(g: Tensor, texts: Sequence[str], m: float) -> Tensor:
        return (reference.guide_mask(g, m) | same(texts)) & off

    compare(
        answer,
        cases,
        right,
        {
            "this is the reference still: a copy of the own positive stays": lambda g, t, m: reference.guide_mask(g, m) & off,
            "the own pair is removed: it is a copy of itself": lambda g, t, m: reference.guide_mask(g, m) | same(t),
            "a tie is not yet a copy: another text may be exactly as alike; compare the texts": lambda g, t, m: (
                (g >= g.diagonal()[:, None] - m) & off
            ),
            "only copies are removed; what the guide removes has to go as well": lambda g, t, m: same(t) & off,
            "a copy has to go, and yours protects it: it is a right answer used as a wrong one": lambda g, t, m: (
                reference.guide_mask(g, m) & ~same(t)
            ),
            "this marks what stays; mark what is removed": lambda g, t, m: ~right(g, t, m),
        },
        "True or False for each query and positive",
    )


def _seeds() -> list[tuple[list[float], ...]]:
    """Four lists of scores, one value a training seed: what a seed does, it does to both arms."""
    rng, cases = np.random.default_rng(77), []
    for seeds in (3, 5, 4):
        small, large = rng.normal(50, 2, seeds), rng.normal(60, 2, seeds)
        arms = (small + rng.normal(1, 0.3, seeds), small, large + rng.normal(0.4, 0.3, seeds), large)
        cases.append(tuple(arm.round(2).tolist() for arm in arms))
    return cases


@exercise("07b.1")
def difference_of_gains(answer: Any) -> None:
    """`answer(small_guided, small_plain, large_guided, large_plain)`: for each seed, the small student's gain minus the large one's."""

    def gains(*arms: Sequence[float]) -> list[np.ndarray]:
        a, b, c, d = (np.asarray(arm) for arm in arms)
        return [a - b, c - d]

    compare(
        answer,
        _seeds(),
        lambda *arms: gains(*arms)[0] - gains(*arms)[1],
        {
            "this is one number, the mean; keep a value for each seed": lambda *arms: (gains(*arms)[0] - gains(*arms)[1]).mean(),
            "turned round: the small student's gain comes first": lambda *arms: gains(*arms)[1] - gains(*arms)[0],
            "the gains are added; G2 compares them": lambda *arms: gains(*arms)[0] + gains(*arms)[1],
            "this is the small student's gain; the large one's is to be subtracted": lambda *arms: gains(*arms)[0],
            "this compares the guided students alone; what do they score without the mask?": lambda a, b, c, d: (
                np.asarray(a) - np.asarray(c)
            ),
            "the seeds are mixed up: sorting pairs one seed's score with another's": lambda *arms: np.subtract(
                *gains(*(sorted(arm) for arm in arms))
            ),
        },
        "one value for each seed",
    )


@exercise("07b.2")
def error_over_seeds(answer: Any) -> None:
    """`answer(guided, plain)`: the standard error of the mean gain over the seeds, which both arms share."""

    def gains(guided: Sequence[float], plain: Sequence[float]) -> np.ndarray:
        return np.subtract(guided, plain)

    def error(values: Any) -> float:
        return float(np.std(values, ddof=1) / np.sqrt(len(values)))

    compare(
        answer,
        [case[:2] for case in _seeds()],
        lambda a, b: error(gains(a, b)),
        {
            "as if the arms had seeds of their own; what a seed does to both cancels in their difference": lambda a, b: float(
                np.hypot(error(a), error(b))
            ),
            "this is the spread of single seeds; the mean over them is surer": lambda a, b: float(np.std(gains(a, b), ddof=1)),
            "divide by one seed less: the mean was taken from the same values": lambda a, b: float(
                np.std(gains(a, b)) / np.sqrt(len(a))
            ),
            "the spread of single seeds, and by one seed too many": lambda a, b: float(np.std(gains(a, b))),
            "this is a variance; its square root is asked for": lambda a, b: error(gains(a, b)) ** 2,
            "this is the mean gain; how sure is it?": lambda a, b: float(gains(a, b).mean()),
            "half the width of an interval; the standard error comes before Student's t": lambda a, b: 1.96 * error(gains(a, b)),
        },
        "one number",
    )


def _unit(count: int, rows: int, width: int, seed: int) -> list[Tensor]:
    """`count` random (rows, width) tensors of unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(count))
    return [torch.nn.functional.normalize(t, dim=1) for t in drawn]


@exercise("08.1")
def own_candidates(answer: Any) -> None:
    """`answer(queries, positives, negatives, temperature)`: InfoNCE where each query is compared with its own two texts alone."""
    cases = [(*_unit(3, 4, 8, seed=k), t) for k, t in enumerate((0.05, 0.1, 0.2, 1.0) * 2)]

    def loss(q: Tensor, p: Tensor, n: Tensor, scale: float, label: int = 0) -> Tensor:
        own = torch.stack([(q * p).sum(1), (q * n).sum(1)], dim=1)
        return torch.nn.functional.cross_entropy(own * scale, torch.full((len(q),), label))

    def own_positive_all_negatives(q: Tensor, p: Tensor, n: Tensor, t: float) -> Tensor:
        similarity = torch.cat([(q * p).sum(1, keepdim=True), q @ n.T], dim=1)
        return torch.nn.functional.cross_entropy(similarity / t, torch.zeros(len(q), dtype=torch.long))

    compare(
        answer,
        cases,
        lambda q, p, n, t: loss(q, p, n, 1 / t),
        {
            "this is the reference still: the whole batch is compared": reference.info_nce,
            "each query meets the negatives of all the others; its own one alone is to stay": own_positive_all_negatives,
            "similarities are multiplied by the temperature; a low temperature must sharpen": loss,
            "the temperature is not used": lambda q, p, n, t: loss(q, p, n, 1.0),
            "the negative is taken for the positive": lambda q, p, n, t: loss(q, p, n, 1 / t, label=1),
            "this grows with the positive's probability; a loss has the other sign": lambda q, p, n, t: -loss(q, p, n, 1 / t),
            "this is the sum over the queries; their mean is asked for": lambda q, p, n, t: len(q) * loss(q, p, n, 1 / t),
        },
        "one number",
    )


@exercise("08.2")
def mean_pooling(answer: Any) -> None:
    """`answer(hidden, attention_mask)`: the unit vector along the mean of each text's real tokens, (B, D)."""
    cases = []
    for longest in (3, 5, 8):
        lengths = torch.tensor([longest, 2, 1, longest, 2])
        mask = (torch.arange(longest + 2)[None] < lengths[:, None]).long()
        cases.append((torch.stack(_unit(5, longest + 2, 4, seed=longest)) + 0.5, mask))
    unit = torch.nn.functional.normalize

    def mean(hidden: Tensor, mask: Tensor) -> Tensor:
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    compare(
        answer,
        cases,
        lambda h, m: unit(mean(h, m), dim=1),
        {
            "this is the reference still: it reads the last token alone": reference.last_token_pooling,
            "the padding is in the mean; the mask says which tokens are real": lambda h, m: unit(h.mean(1), dim=1),
            "the vectors are not of length 1": mean,
            "this reads the first token, which has seen nothing of the text": lambda h, m: unit(h[:, 0], dim=1),
        },
        "a vector for each text",
    )
