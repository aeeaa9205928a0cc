"""Exercises of notebooks 07, 07b and 08: the guide's mask, gains of students, the contrastive loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speed_core import reference
from speed_core.evaluation import uncertainty
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


@exercise("07.3")
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


def _seeds() -> list[tuple[list[float], ...]]:
    """Four lists of scores, one value a training seed: what a seed does, it does to both arms."""
    rng, cases = np.random.default_rng(77), []
    for seeds in (3, 5, 4):
        small, large = rng.normal(50, 2, seeds), rng.normal(60, 2, seeds)
        arms = (small + rng.normal(1, 0.3, seeds), small, large + rng.normal(0.4, 0.3, seeds), large)
        cases.append(tuple(arm.round(2).tolist() for arm in arms))
    return cases


@exercise("07b.1")
def gain_by_layers(answer: Any) -> None:
    """`answer(scores, layers)`: terms of the mean gain in which a student of k layers has a weight in proportion to k."""
    tasks = [
        [{"tasks": {"toy": {"type": "STS", "score": v / 100, "items": []}}} for v in arm] for case in _seeds() for arm in case
    ]
    keys = [(k, arm) for k in (1, 4) for arm in ("guided", "plain")]
    scores = [dict(zip(keys, tasks[4 * i : 4 * i + 4], strict=True)) for i in range(3)]
    cases = [(s, layers) for s in scores for layers in ([1, 4], [4], [1])]
    for case in cases:
        terms = call(answer, *case)
        if not isinstance(terms, list) or not all(isinstance(one, tuple) and len(one) == 3 for one in terms):
            raise Hint("a list of terms is asked for, each (weight, results, tasks), as `gain` returns them")

    def each(f: Callable[..., Any]) -> Callable[..., Any]:
        """The value for each seed of the terms that `f` gives."""
        return lambda i: uncertainty.contrast(f(*cases[i])).each

    def gain(weight: Callable[[int, Sequence[int]], float], sign: int = 1) -> Callable[..., Any]:
        def terms(scores: Any, layers: Sequence[int]) -> list[Any]:
            weights = {k: sign * weight(k, layers) for k in layers}
            return [t for k, w in weights.items() for t in ((w, scores[k, "guided"], None), (-w, scores[k, "plain"], None))]

        return terms

    compare(
        each(answer),
        [(i,) for i in range(len(cases))],
        each(gain(lambda k, layers: k / sum(layers))),
        {
            "this is the reference still: all students count alike": each(gain(lambda k, layers: 1 / len(layers))),
            "the weights of the guided students sum to more than 1: divide by all layers together": each(
                gain(lambda k, layers: k)
            ),
            "a small student counts more here; the weight grows with the layers": each(
                gain(lambda k, layers: (1 / k) / sum(1 / other for other in layers))
            ),
            "turned round: the guided student comes first": each(gain(lambda k, layers: k / sum(layers), sign=-1)),
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
def weighted_pooling(answer: Any) -> None:
    """`answer(hidden, attention_mask)`: the mean of each text's real tokens, token t weighted by t, as unit vectors (B, D)."""
    cases = []
    for longest in (3, 5, 8):
        lengths = torch.tensor([longest, 2, 1, longest, 2])
        mask = (torch.arange(longest + 2)[None] < lengths[:, None]).long()
        cases.append((torch.stack(_unit(5, longest + 2, 4, seed=longest)) + 0.5, mask))

    def position(mask: Tensor) -> Tensor:
        return mask.cumsum(1) * mask

    def summed(hidden: Tensor, weights: Tensor) -> Tensor:
        return (hidden * weights[..., None]).sum(1)

    unit = torch.nn.functional.normalize
    compare(
        answer,
        cases,
        lambda h, m: unit(summed(h, position(m)), dim=1),
        {
            "this is the reference still: all tokens count alike": reference.mean_pooling,
            "this reads the last token alone": reference.last_token_pooling,
            "the padding is in the mean; the mask says which tokens are real": lambda h, m: unit(
                summed(h, torch.ones_like(m).cumsum(1)), dim=1
            ),
            "the vectors are not of length 1": lambda h, m: summed(h, position(m)) / position(m).sum(1, keepdim=True),
            "positions begin at 1; from 0 the first token is lost": lambda h, m: unit(
                summed(h, (position(m) - 1).clamp(min=0)), dim=1
            ),
            "the first token counts most here; it has read nothing but itself": lambda h, m: unit(
                summed(h, (m.sum(1, keepdim=True) + 1 - position(m)) * m), dim=1
            ),
        },
        "a vector for each text",
    )
