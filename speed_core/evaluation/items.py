"""The values behind a score, for the bootstrap: mteb keeps the means of tasks only.

The values are computed from the same embeddings as mteb's score, so that their statistic (`resampling.statistic`) is that score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mteb.types import PromptType
from scipy.stats import spearmanr
from sklearn.cluster import MiniBatchKMeans

from speed_core.evaluation.encoder import DECIMALS, Embedder

CLUSTERINGS = 3  # of each text, with other starting points
MERGED = "max_over_subqueries_"  # of MindSmall: queries ID_1, ID_2, ... are one, a document has its best score
# Which of the similarities [cosine, minus Manhattan] a score takes; of unit vectors, the others order pairs as the cosine does.
SIMILARITIES = {"max": (0, 1), "manhattan": (1,), "similarity": (0,), "cosine": (0,), "dot": (0,), "euclidean": (0,)}


def items_of(model: Embedder, task: Any, rows: Mapping[tuple[str, str], Mapping[str, Any]], predictions: Path) -> list[list[Any]]:
    """The items of each (split, subset) in `rows`, the scores of a task that is no aggregate."""
    if loads := not getattr(task, "dataset", None):  # mteb frees a task's data when it has scored it
        task.load_data()
    path = predictions / task.prediction_file_name
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and task.metadata.type == "Classification" else {}
    out = []
    for (split, subset), detail in rows.items():
        guesses = said.get(subset, {}).get(split, [])
        # mteb's layouts have the subsets first, or none.
        tables = task.dataset[subset] if subset in task.dataset else task.dataset
        out.append(_of_table(model, task, tables[split], guesses) or _repetitions(task, detail))
    if loads:
        task.unload_data()
    return out


def _of_table(model: Embedder, task: Any, data: Any, guesses: Sequence[Any]) -> list[Any]:
    """Items of one table by the task's type; empty where the main score is not made of a value for each text."""
    kind, measure = task.metadata.type, task.metadata.main_score
    if kind in ("Retrieval", "Reranking"):
        return _ranks(model, task, data)
    if kind == "STS" and measure in ("cosine_spearman", "spearman"):
        a, b = (_vectors(model, task, data[c]) for c in task.column_names)
        return [[float(g), round(float(c), DECIMALS)] for g, c in zip(data["score"], (a * b).sum(1), strict=True)]
    if kind == "PairClassification":
        return _pairs(model, task, data)
    if kind == "Summarization" and measure in ("cosine_spearman", "spearman"):
        return _summaries(model, task, data)
    if kind == "Clustering" and measure == "v_measure":
        return _clustered(model, task, data)
    if kind == "Classification" and measure == "accuracy":
        labels = data[task.label_column_name]
        if guesses and all(len(g) == len(labels) for g in guesses):
            return [sum(g[i] == label for g in guesses) / len(guesses) for i, label in enumerate(labels)]
    return []


def _repetitions(task: Any, detail: Mapping[str, Any]) -> list[float]:
    """The main score of each repetition, or of each set of texts that is clustered."""
    if "scores_per_experiment" in detail:
        return [float(e[task.metadata.main_score]) for e in detail["scores_per_experiment"]]
    measures = detail.get("v_measures") or []
    levels = measures.values() if isinstance(measures, dict) else [measures]
    return [float(v) for level in levels for v in level]


def _vectors(model: Embedder, task: Any, texts: Sequence[str]) -> np.ndarray:
    """Of the texts of a symmetric task, as `Embedder.encode` reads them."""
    return model.embed(model.texts([t.strip() for t in texts], task.metadata, None))


def _pairs(model: Embedder, task: Any, data: Any) -> list[list[float]]:
    """[label, similarity, ...] of each pair; empty for a main score that is no average precision."""
    name, _, measure = task.metadata.main_score.partition("_")
    if measure != "ap" or name not in SIMILARITIES:
        return []
    if len(data) == 1:  # the first versions have lists in one row
        data = data[0]
    a, b = (_vectors(model, task, data[c]) for c in (task.input1_column_name, task.input2_column_name))
    both = ((a * b).sum(1), -np.abs(a - b).sum(1))
    columns = [np.round(both[k].astype(float), DECIMALS).tolist() for k in SIMILARITIES[name]]
    return [list(row) for row in zip(map(float, data[task.label_column_name]), *columns, strict=True)]


def _summaries(model: Embedder, task: Any, data: Any) -> list[float]:
    """Of each text Spearman's correlation of its machine summaries' scores with their highest cosine to a human's summary.

    SummEval's first version averages the correlation with its p-value (mteb issue 1156), and so do its items; mteb leaves out a
    text whose summaries are all scored alike.
    """
    out = []
    columns = (task.human_summaries_column_name, task.machine_summaries_column_name, task.relevancy_column_name)
    for human, machine, gold in zip(*(data[c] for c in columns), strict=True):
        best = (_vectors(model, task, machine) @ _vectors(model, task, human).T).max(1).tolist()
        if len(set(gold)) > 1 and len(set(best)) > 1:
            found = spearmanr(gold, best)
            with_p = task.evaluator.__name__.startswith("Deprecated")
            out.append(float(np.mean([found.statistic, found.pvalue])) if with_p else float(found.statistic))
    return out


def _clustered(model: Embedder, task: Any, data: Any) -> list[list[int]]:
    """[class, cluster, ...] of each text, clusters by mteb's k-means; empty for several levels of classes or sets of texts."""
    if not {"sentences", "labels"} <= set(data.column_names):
        return []
    texts, labels = data["sentences"], data["labels"]
    if not all(isinstance(t, str) for t in texts) or any(isinstance(label, list) for label in labels):
        return []
    known = {label: i for i, label in enumerate(sorted(set(labels), key=str))}
    vectors = _vectors(model, task, texts)
    kmeans = [MiniBatchKMeans(len(known), batch_size=512, n_init=1, random_state=k) for k in range(CLUSTERINGS)]
    clusters = [k.fit_predict(vectors) for k in kmeans]
    return [[known[label], *(int(c[i]) for c in clusters)] for i, label in enumerate(labels)]


def _ranks(model: Any, task: Any, split: Any) -> list[float]:
    """The main score of each query of a retrieval or reranking task's table: nDCG@k, MAP@k or MRR@k, as trec_eval defines them.

    Of equal similarities the document with the greater id comes first, as in trec_eval and mteb, so that the mean of these values is
    mteb's score. Empty for other main scores.
    """
    merged = task.metadata.main_score.startswith(MERGED)
    measure, _, at = task.metadata.main_score.removeprefix(MERGED).partition("_at_")
    if measure not in ("ndcg", "map", "mrr") or not at.isdigit():
        return []
    corpus, queries = split["corpus"], split["queries"]
    titles = corpus["title"] if "title" in corpus.column_names else [""] * len(corpus)
    # mteb reads a document as title and text joined.
    texts = [f"{title or ''} {text}".strip() for title, text in zip(titles, corpus["text"], strict=True)]
    vectors = model.embed(model.texts(texts, task.metadata, PromptType.document))
    ids = list(corpus["id"])
    position = {d: i for i, d in enumerate(ids)}
    late = {i: n for n, i in enumerate(sorted(range(len(ids)), key=ids.__getitem__))}  # place in the order of the ids
    asked = model.embed(model.texts([t.strip() for t in queries["text"]], task.metadata, PromptType.query))
    found: dict[str, tuple[dict[int, float], dict[int, float]]] = {}  # query -> (scores, gains)
    for qid, q in zip(queries["id"], asked, strict=True):
        pool = [position[d] for d in split["top_ranked"][qid]] if split["top_ranked"] else list(range(len(position)))
        if getattr(task, "ignore_identical_ids", False):
            pool = [i for i in pool if i != position.get(qid)]
        scores = dict(zip(pool, model.similarity(q, vectors[pool])[0].tolist(), strict=True))
        gains = {position.get(d, -1 - n): s for n, (d, s) in enumerate(split["relevant_docs"][qid].items()) if s > 0}
        name = qid.rpartition("_")[0] if merged else qid
        before = found.get(name, ({}, {}))[0]
        found[name] = {d: max(v, before.get(d, v)) for d, v in (before | scores).items()}, gains
    return [_rank_score(scores, gains, late, measure, int(at)) for scores, gains in found.values()]


def _rank_score(scores: Mapping[int, float], gains: Mapping[int, float], late: Mapping[int, int], measure: str, at: int) -> float:
    """The measure of one query: `scores` of its candidates, `gains` of its relevant documents (some may be no candidates).

    `late` is the place of each document in the order of the ids.
    """
    values, places = np.array(list(scores.values())), np.array([late[d] for d in scores])
    found = []  # (rank, gain) of the relevant candidates
    for document, gain in gains.items():
        if document in scores:
            own = scores[document]
            before = (values > own) | ((values == own) & (places > late[document]))
            found.append((1 + int(before.sum()), gain))
    within = sorted((rank, gain) for rank, gain in found if rank <= at)
    if not gains or not within:
        return 0.0
    if measure == "mrr":
        return 1 / within[0][0]
    if measure == "map":
        return sum((n + 1) / rank for n, (rank, _) in enumerate(within)) / len(gains)
    ideal = sorted(gains.values(), reverse=True)[:at]
    return float(sum(g / np.log2(r + 1) for r, g in within) / sum(g / np.log2(n + 2) for n, g in enumerate(ideal)))
