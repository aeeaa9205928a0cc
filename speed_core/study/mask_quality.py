"""Notebook 07: is the guide right? What its mask removes, against labels that people gave.

Two sources know the answer. In 20 Newsgroups two posts of one group form a pair, and every other post of that group in the batch
counts as a false negative. In chatterbot-corpus some questions have several accepted answers, and another answer to the same
question is a false negative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from speed_core.contrastive.guided_loss import LossSettings, false_negative_mask
from speed_core.evaluation import text_sources
from speed_core.models import loading
from speed_core.store.run_context import Run
from speed_core.study import generation_stages

NEWS, ANSWERS = "20 Newsgroups", "several answers to a question"
WHOLE, SHALLOW, COUNTS = "MiniLM", "MiniLM, 2 of 6 layers", "TF-IDF"  # guides of falling strength
MARGINS = (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2)
Pair = tuple[str, str, str]  # label, text, another text of the same label
Encode = Callable[[list[str]], Any]


def known_pairs(run: Run) -> dict[str, list[Pair]]:
    """{source: pairs}: a batch of each source in which two texts are alike exactly when their labels are equal."""
    posts, size = text_sources.labelled("20newsgroups-train"), 32 if run.profile.name == "smoke" else 128
    groups = text_sources.top_labels(posts, 12)
    drawn = text_sources.per_label(posts, groups, 2 * size // len(groups), run.profile.seed)
    news = []
    for group in groups:
        mine = [text for label, text in drawn if label == group]
        news += [(group, a, p) for a, p in zip(mine[::2], mine[1::2], strict=False)]
    return {NEWS: news, ANSWERS: [(q, q, a) for q, a in text_sources.several_answers()][:size]}


def guides(run: Run) -> dict[str, Encode]:
    """{name: texts -> (n, D) vectors}: the six layers of the guide, its first two, and weighted word counts."""
    from sentence_transformers import SentenceTransformer
    from sklearn.feature_extraction.text import TfidfVectorizer

    def words(texts: list[str]) -> torch.Tensor:
        return torch.tensor(TfidfVectorizer().fit_transform(texts).toarray(), dtype=torch.float32)

    shallow = SentenceTransformer(str(loading.shallow_encoder(run.profile.models.guide, 2)), device="cpu")
    return {WHOLE: generation_stages.guide(run).encode, SHALLOW: shallow.encode, COUNTS: words}


def alike(pairs: Sequence[Pair]) -> np.ndarray:
    """(B, B): do the labels of query i and of positive j agree, other than in the own pair?"""
    labels = [label for label, _, _ in pairs]
    return np.array([[a == b for b in labels] for a in labels]) & ~np.eye(len(labels), dtype=bool)


def precision_and_recall(removed: np.ndarray, false: np.ndarray) -> tuple[float, float]:
    """The share of what was `removed` that is `false` (a false negative), and the share of the false that
    was removed. Both are boolean, (B, B)."""
    both = (removed & false).sum()
    return both / max(1, removed.sum()), both / max(1, false.sum())


def points(run: Run, pairs: Mapping[str, Sequence[Pair]], draws: int = 200) -> list[dict[str, Any]]:
    """Rows {labels, guide, margin, base_rate, removed, precision, recall, ends of their intervals} of the query-positive block, for each
    source, guide and margin.

    `base_rate`: the precision of removing at random. Intervals are at 95%, by drawing the rows of the batch again.
    """
    rng, out, encoders = np.random.default_rng(run.profile.seed), [], guides(run)
    for source, rows in pairs.items():
        texts, false = [a for _, a, _ in rows] + [p for _, _, p in rows], alike(rows)
        for name, encode in encoders.items():
            queries, positives = torch.as_tensor(encode(texts)).split(len(rows))
            for margin in MARGINS:
                removed = false_negative_mask((queries, positives), LossSettings(margin=margin)).removed["ap"].numpy()
                out.append({"labels": source, "guide": name, "margin": margin} | _with_intervals(removed, false, rng, draws))
    return out


def _with_intervals(removed: np.ndarray, false: np.ndarray, rng: np.random.Generator, draws: int) -> dict[str, float]:
    n = len(false)
    again = [rng.integers(0, n, n) for _ in range(draws)]
    many = np.array([precision_and_recall(removed[rows], false[rows]) for rows in again])
    out: dict[str, float] = {"base_rate": float(false.sum() / (n * (n - 1))), "removed": int(removed.sum())}
    for key, value, drawn in zip(("precision", "recall"), precision_and_recall(removed, false), many.T, strict=True):
        low, high = np.quantile(drawn, [0.025, 0.975])
        out |= {key: float(value), f"{key}_low": float(low), f"{key}_high": float(high)}
    return out


def at_margin_zero(rows: Sequence[Mapping[str, Any]], guide: str = WHOLE, source: str = NEWS) -> Mapping[str, Any]:
    """The row of `points` for a guide and a source at margin 0."""
    return next(r for r in rows if (r["margin"], r["guide"], r["labels"]) == (0.0, guide, source))


def facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What notebook 12 reads of `points`: precision, recall and base rate of the whole guide at margin 0, and `gain`, its precision
    above that of removing at random, with its interval."""
    zero = at_margin_zero(rows)
    gain = {f"gain{end}": zero[f"precision{end}"] - zero["base_rate"] for end in ("", "_low", "_high")}
    return {k: zero[k] for k in ("precision", "recall", "base_rate")} | gain
