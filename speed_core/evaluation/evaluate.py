"""Scores of a model on mteb tasks, with the values that an interval needs."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.cache import ResultCache

from speed_core import console
from speed_core.evaluation import local_data, offline_tasks
from speed_core.evaluation.encoder import Embedder
from speed_core.evaluation.items import items_of
from speed_core.files import UserError

CATEGORIES = {  # type of task -> its name in SPEED's Table 1
    "Classification": "Class.", "Clustering": "Clust.", "PairClassification": "Pair", "Reranking": "Rerank", "Retrieval": "Retr.",
    "STS": "STS", "Summarization": "Summ.",
}  # fmt: skip


def resolve_tasks(names: Sequence[str], size: str = "tiny") -> list[Any]:
    """ "offline" gives the offline tasks; other names are offline tasks, MTEB tasks or MTEB benchmarks.

    MTEB's data come from a hub, or from the folder $SPEED_DATA (see local_data.py).
    """
    offline = {t.metadata.name: t for t in offline_tasks.offline_tasks(size)}
    out: list[Any] = []
    for name in names:
        if name == "offline":
            out += [t for n, t in offline.items() if size != "smoke" or n in offline_tasks.ONE_OF_A_KIND]
        elif name in offline:
            out.append(offline[name])
        elif name in _benchmarks():
            out += list(mteb.get_benchmark(name).tasks)
        elif name in _tasks():
            out.append(mteb.get_task(name))
        else:
            near = ", ".join(_suggested(name, [*_tasks(), *_benchmarks(), *offline, "offline"]))
            raise UserError(f"task {name!r}: unknown to mteb {mteb.__version__}; did you mean {near}?")
    # A task that is named twice, by itself and in a benchmark, is scored once.
    return local_data.prepare(list({t.metadata.name: t for t in out}.values()))


@lru_cache(maxsize=1)  # reading each of these takes seconds
def _benchmarks() -> list[str]:
    return [b.name for b in mteb.get_benchmarks()]


@lru_cache(maxsize=1)
def _tasks() -> list[str]:
    # Many of the 56 tasks of the papers are superseded by a second version; they are asked for by name.
    return [t.metadata.name for t in mteb.get_tasks(exclude_superseded=False)]


def _suggested(name: str, known: Sequence[str]) -> list[str]:
    """Up to three of `known` for a name that is not among them: those that begin like it, else those that look like it."""
    plain = {"".join(filter(str.isalnum, k.lower())): k for k in reversed(known)}
    asked = "".join(filter(str.isalnum, name.lower()))
    begin = sorted((k for k in plain if asked and k.startswith(asked)), key=len)
    found = begin or difflib.get_close_matches(asked, plain, 3) or difflib.get_close_matches(asked, plain, 3, 0.4) or ["offline"]
    return [plain.get(k, k) for k in found[:3]]


def evaluate(model: Embedder, tasks: Sequence[Any], cache: Path, label: str = "") -> dict[str, Any]:
    """Score `model` on `tasks`.

    Returns {"model", "revision", "tasks": {name: {"type", "score", "items"}}}. The score is mteb's main score in [0, 1]. The items
    are what a bootstrap draws from, one a text:
        retrieval, reranking   nDCG@10 (or the task's own measure) of a query
        STS                    [gold, cosine] of a pair
        pair classification    [label, cosine, minus Manhattan distance] of a pair
        classification         the share of mteb's classifiers that are right about a text
        clustering             [class, cluster, cluster, ...] of a text in several clusterings
        summarization          Spearman's correlation of a text's summaries
    Where mteb keeps no prediction for each text, the items are the scores of its repetitions or of its sets of texts, or there are
    none (`uncertainty.contrast` says what then). A score that is the mean over several splits, subsets or part tasks has "parts":
    items of each. "documents": STS pairs are all pairs of so many texts.
    """
    logging.getLogger("mteb").setLevel(logging.ERROR)
    # A few-shot classifier that never predicts a class, or constant vectors, are low scores and no news.
    warnings.filterwarnings("ignore", message=".*ill-defined.*")
    warnings.filterwarnings("ignore", message=".*input array is constant.*")
    warnings.filterwarnings("ignore", message=".*is superseded by.*")  # the papers' tasks are the first versions
    encoder: Any = model
    meta = encoder.mteb_model_meta
    kept = ResultCache(cache / str(meta.revision))
    # One model may be scored in two ways at a time.
    predictions = cache / "predictions" / str(meta.revision) / (Path(label).name or "model")
    out: dict[str, Any] = {"model": meta.name, "revision": meta.revision, "tasks": {}}
    bar = console.progress(len(tasks), f"evaluate {label}".strip(), "task")
    for task in tasks:
        how: Any = _overwrite_strategy(kept, meta, task)
        results = mteb.evaluate(
            encoder, [task], cache=kept, overwrite_strategy=how, show_progress_bar=False, encode_kwargs={},
            prediction_folder=predictions,
        )  # fmt: skip
        result = results.task_results[0]
        rows = _asked(task, result)
        score = np.mean([r["main_score"] for r in rows.values()]) if rows else result.get_score()
        if task.is_aggregate:  # its score is the mean over tasks, whatever their size
            scored = [(p, _asked(p, kept.load_task_result(p.metadata.name, meta))) for p in task.tasks]
            found = [items_of(model, p, r, predictions) for p, r in scored]
            parts = [f[0] for f in found] if all(len(f) == 1 for f in found) else []
        else:
            parts = items_of(model, task, rows, predictions)
        # Constant vectors have no correlation: mteb says nan, which counts as 0 here and in `resampling.statistic`.
        entry = {"type": task.metadata.type, "score": float(np.nan_to_num(score)), "items": parts[0] if len(parts) == 1 else []}
        if len(parts) > 1:
            entry["parts"] = parts
        if documents := getattr(task, "documents", None):
            entry["documents"] = documents
        out["tasks"][task.metadata.name] = entry
        bar.update()
    bar.close()
    return out


def _asked(task: Any, result: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """{(split, subset): scores} of what a task asks for; mteb's result file may hold more, for another benchmark."""
    return {
        (split, row["hf_subset"]): row
        for split in task.eval_splits
        for row in result.scores.get(split, [])
        if row["hf_subset"] in task.hf_subsets
    }


def _overwrite_strategy(cache: Any, meta: Any, task: Any) -> str:
    """mteb's overwrite strategy: "always" when its kept result is of another revision of the data, else "only-missing".

    mteb 2.26 hands out a complete kept result whatever data it was made from.
    """
    for part in local_data.parts(task):
        kept = cache.load_task_result(part.metadata.name, meta)
        if kept is not None and kept.dataset_revision != part.metadata.revision:
            return "always"
    return "only-missing"


def category_means(result: Mapping[str, Any]) -> dict[str, float]:
    """Mean main score per category (names of SPEED Table 1), in [0, 100], and their mean over tasks as Avg."""
    groups: dict[str, list[float]] = {}
    for entry in result["tasks"].values():
        groups.setdefault(CATEGORIES.get(entry["type"], entry["type"]), []).append(100 * entry["score"])
    means = {k: float(np.mean(v)) for k, v in groups.items()}
    means["Avg"] = float(np.mean([100 * e["score"] for e in result["tasks"].values()]))
    return means


def benchmark_means(result: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """{benchmark: category means and Avg, in points} of the benchmarks among `names`, of what `evaluate` returned.

    Raises UserError when a task of the benchmark was not scored: a mean over fewer tasks is another benchmark's.
    """
    out = {}
    known = mteb.get_benchmarks() if set(names) - {"offline"} else []  # reading them takes seconds
    for name, benchmark in ((b.name, b) for b in known if b.name in names):
        wanted = [t.metadata.name for t in benchmark.tasks]
        if lost := [t for t in wanted if t not in result["tasks"]]:
            raise UserError(
                f"benchmark {name!r}: {len(lost)} of its {len(wanted)} tasks are not scored, first {lost[0]}; evaluate all of them"
            )
        out[name] = category_means({"tasks": {t: result["tasks"][t] for t in wanted}})
    return out
