"""How close the training texts come to the texts of each evaluated task: shared n-grams and nearest neighbours."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from speed_core.data.curate import fields, ngram_index, ngrams
from speed_core.files import UserError

# Measured with all-MiniLM-L6-v2 on the texts of eight words and more of the offline tasks at `tiny`: 85 % stay at 0.9 or
# above when one word is exchanged, 63 % with two, 79 % when the last fifth is cut off; 3 % have another evaluated text that
# near (one news story printed twice). The number belongs to the guide: measure again for another one.
NEAR = 0.9
TEXTS = 2000  # texts of a task that are looked at: a retrieval corpus may hold millions
BLOCK = 4096  # texts embedded and compared at a time: 64 MB of cosines


def sample(texts: Mapping[str, Sequence[str]], most: int = TEXTS) -> dict[str, list[str]]:
    """At most `most` distinct texts of each task, drawn by the task's name alone."""
    distinct = {task: list(dict.fromkeys(items)) for task, items in texts.items()}
    return {k: v if len(v) <= most else random.Random(k).sample(v, most) for k, v in distinct.items()}


def report(
    texts: Mapping[str, Sequence[str]],
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    *,
    words: int,
    embed: Callable[[Sequence[str]], np.ndarray],
    near: float = NEAR,
) -> dict[str, dict[str, Any]]:
    """For each task, what its evaluated texts share with the training records `before` and `after` curation.

    {"texts": how many, "checked": of them long enough for the n-gram check (three words), "ngram_before" and
    "ngram_after": share of the checked that share `words` consecutive words with a record (None when none is
    checked), "near": share of all whose nearest training text has a cosine of at least `near`, "mean" and
    "closest": mean and highest cosine to the nearest, "pair": [evaluated text, training text] of the highest}.
    `embed` gives (n, D) vectors of n texts; the query, the positive and the negative of `after` are searched.
    """
    training = list(dict.fromkeys(t for row in after for t in fields(row)))
    if not training:
        raise UserError("contamination: no training text is left after curation; synthesise more records")
    texts = {task: items for task, items in texts.items() if items}
    index = ngram_index(texts, words)
    checked: dict[str, set[int]] = {task: set() for task in texts}
    for places in index.values():
        for task, number in places:
            checked[task].add(number)
    hits = {name: shared(index, rows, words) for name, rows in (("before", before), ("after", after))}
    evaluated = list(dict.fromkeys(t for items in texts.values() for t in items))
    cosine, which = (dict(zip(evaluated, v.tolist(), strict=True)) for v in nearest(embed, evaluated, training))
    out: dict[str, dict[str, Any]] = {}
    for task, items in texts.items():
        values, long = np.array([cosine[t] for t in items]), len(checked[task])
        share = {f"ngram_{k}": sum(t == task for t, _ in v) / long if long else None for k, v in hits.items()}
        top = items[int(values.argmax())]
        out[task] = {"texts": len(items), "checked": long, **share, "near": float((values >= near).mean())}
        out[task] |= {"mean": float(values.mean()), "closest": cosine[top], "pair": [top, training[which[top]]]}
    return out


def shared(index: Mapping[str, Sequence[tuple[str, int]]], rows: Sequence[Mapping[str, Any]], words: int) -> set[tuple[str, int]]:
    """(task, number) of the evaluated texts of `index` that share an n-gram with a record."""
    return {place for row in rows for text in fields(row) for gram in ngrams(text, words) for place in index.get(gram, ())}


def nearest(
    embed: Callable[[Sequence[str]], np.ndarray], queries: Sequence[str], texts: Sequence[str], block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """(cosine (n,), position (n,)) of the nearest of `texts` to each query; only one block of texts has vectors at a time."""
    vectors = np.concatenate([unit(embed(queries[i : i + block])) for i in range(0, len(queries), block)])
    best, where = np.full(len(queries), -np.inf, np.float32), np.zeros(len(queries), np.int64)
    for start in range(0, len(texts), block):
        those = unit(embed(texts[start : start + block]))
        for at in range(0, len(queries), block):
            mine = slice(at, at + block)
            cosines = vectors[mine] @ those.T
            top, place = cosines.max(1), cosines.argmax(1)
            better = top > best[mine]
            best[mine] = np.where(better, top, best[mine])
            where[mine] = np.where(better, start + place, where[mine])
    return best, where


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, D) float32 rows of length one."""
    v = np.asarray(vectors, np.float32)
    return v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12)
