"""Exercises of notebooks 07 and 08: the guide's mask and the contrastive loss."""

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
