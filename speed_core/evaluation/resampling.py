"""The score of one task under resampling: the values behind it are drawn again, for all draws at once.

statistic          the score of resampled items, as mteb defines it for the task's type
resampled_scores   draws of a scored task's score, the same texts for every model
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import rankdata

BLOCK = 4_000_000  # resampled values in memory at a time: a test set may have 400,000 texts


def statistic(kind: str, data: np.ndarray) -> np.ndarray:
    """(draws,) scores of resampled items, by the task's type `kind`.

    (draws, n) values: their mean. (draws, n, 2) of STS: Spearman's correlation of gold score and cosine. (draws, n, 1 + R) of
    clustering: V-measure of classes and clusters, mean over R clusterings. (draws, n, 1 + R) of pair classification: the highest
    average precision of R similarities for the label (mteb's max_ap).
    """
    if data.ndim == 2:
        return data.mean(axis=1)
    if kind == "PairClassification":
        return np.max([_average_precision(data[..., 0], data[..., k]) for k in range(1, data.shape[2])], axis=0)
    if kind == "Clustering":
        classes, *runs = np.moveaxis(data.astype(int), 2, 0)
        return np.mean([_v_measure(classes, clusters) for clusters in runs], axis=0)
    x, y = (rankdata(data[..., k], axis=1) for k in (0, 1))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    spread = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    # Constant vectors have no correlation; that counts as 0.
    return np.divide((x * y).sum(axis=1), spread, out=np.zeros(len(spread)), where=spread > 0)


def _v_measure(classes: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """(draws,) V-measures of (draws, n) classes and clusters: 2 I / (H(classes) + H(clusters)), as Rosenberg and Hirschberg's."""
    draws, wide = len(classes), int(clusters.max()) + 1
    cells = (int(classes.max()) + 1) * wide
    flat = classes * wide + clusters + np.arange(draws)[:, None] * cells
    table = np.bincount(flat.ravel(), minlength=draws * cells).reshape(draws, -1, wide) / classes.shape[1]
    joint, h_class, h_cluster = (_entropy(table.sum(axis=axis)) for axis in ((), 2, 1))
    both = h_class + h_cluster
    return np.divide(2 * (both - joint), both, out=np.ones(draws), where=both > 0)


def _average_precision(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(draws,) average precisions of (draws, n) labels 0 or 1 and scores: sum of (R_k - R_{k-1}) P_k over thresholds.

    As scikit-learn's: equal scores are one threshold. 0 where no label is 1.
    """
    draws, n = labels.shape
    order = np.argsort(-scores, axis=1)
    labels, scores = (np.take_along_axis(v, order, 1) for v in (labels, scores))
    last = np.append(scores[:, 1:] != scores[:, :-1], np.ones((draws, 1), bool), axis=1)
    ends = np.where(last, np.arange(n), n)
    ends = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]  # the last place with the same score
    precision = np.take_along_axis(labels.cumsum(axis=1), ends, 1) / (ends + 1)
    found = labels.sum(axis=1)
    return np.divide((labels * precision).sum(axis=1), found, out=np.zeros(draws), where=found > 0)


def _entropy(share: np.ndarray) -> np.ndarray:
    share = share.reshape(len(share), -1)
    return -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1)


# Tasks with the same texts are resampled alike: a text that is hard to place is hard in both.
SAME_TEXTS = {
    "OfflineReutersR8Clustering": "OfflineReutersR8Classification",
    "OfflineNewsgroupsClustering": "OfflineNewsgroupsClassification",
}


def has_values(task: Mapping[str, Any]) -> bool:
    """Whether a bootstrap can draw from a scored task's values: each part has two at least. One value would seem not to vary."""
    return all(len(items) > 1 for items in task.get("parts") or [task["items"]])


def resampled_scores(task: Mapping[str, Any], name: str, draws: int, seed: int) -> np.ndarray:
    """(draws,) scores of a task whose items are drawn again with replacement; a task with parts draws each part by itself.

    The task's name seeds the draws, so every model is scored on the same items.
    """
    if task.get("parts"):
        each = [{"type": task["type"], "items": items} for items in task["parts"]]
        return np.mean([resampled_scores(part, f"{name}/{k}", draws, seed) for k, part in enumerate(each)], axis=0)
    items, rng = np.asarray(task["items"], float), np.random.default_rng([seed, zlib.crc32(SAME_TEXTS.get(name, name).encode())])
    if task.get("documents"):
        return _over_documents(task["type"], items, task["documents"], draws, rng)
    some = max(1, BLOCK // items.size)
    sizes = [min(some, draws - start) for start in range(0, draws, some)]
    return np.concatenate([statistic(task["type"], items[rng.integers(0, len(items), (n, len(items)))]) for n in sizes])


def _over_documents(kind: str, items: np.ndarray, documents: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws,) scores of items that are all pairs of `documents` texts, with the variance of the jackknife over the texts.

    Pairs that share a text are not independent, so texts are left out, one at a time; a draw weighs what each of them changes.
    """
    pairs = np.array(list(itertools.combinations(range(documents), 2)))
    without = np.array([statistic(kind, items[None, (pairs != k).all(axis=1)])[0] for k in range(documents)])
    change = (without - without.mean()) * math.sqrt((documents - 1) / documents)
    return statistic(kind, items[None])[0] + rng.standard_normal((draws, documents)) @ change
