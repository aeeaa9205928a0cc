"""Scores by mteb, named by the digest of the model, with intervals.

mteb 2.26 names every locally trained model alike and then serves one model's cached scores for another; so each model here gets the
digest of all that decides its embeddings as revision, and a result cache of its own.
mteb keeps task means only; per-query and per-pair values for the bootstrap are computed here from the
same embeddings.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType

from speed_core import console
from speed_core.contrastive.embedder import ADAPTER, build_embedder, instruct, load_trained
from speed_core.contrastive.guide_cache import encoder_digest
from speed_core.evaluation import prefix
from speed_core.files import UserError, digest
from speed_core.models import loading

CATEGORIES = {
    "Classification": "Class.",
    "Clustering": "Clust.",
    "PairClassification": "Pair",
    "Reranking": "Rerank",
    "Retrieval": "Retr.",
    "STS": "STS",
    "Summarization": "Summ.",
}
DECIMALS = 6  # of a similarity, in mteb's score and in our items alike


class Embedder(AbsEncoder):
    """A sentence-transformers model as mteb sees it: its own name, the digest of what decides its embeddings as revision (weights,
    structure, tokenizer, length limit, with or without the template), our query template.

    Queries of retrieval and reranking get "Instruct: ...\\nQuery: ..."; documents none. In the symmetric
    tasks (STS, classification, clustering) every text gets it, as in E5-mistral. Each distinct text is
    encoded once in the life of this object.
    """

    def __init__(self, model: Any, name: str, instructed: bool, batch_size: int = 32, max_length: int | None = None):
        self.model = model
        self.instructed = instructed
        self.batch_size = batch_size
        if max_length:
            self.model.max_seq_length = max_length
        self.vectors: dict[str, np.ndarray] = {}
        revision = digest([encoder_digest(model), instructed])[:16]
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"speed-step-by-step/{name}", "revision": revision})

    def texts(self, raw: Sequence[str], task: Any, prompt_type: Any) -> list[str]:
        """Apply the query template where it belongs."""
        if not self.instructed or prompt_type == PromptType.document:
            return list(raw)
        prompt = task.prompt
        text = prompt.get("query", "") if isinstance(prompt, dict) else prompt
        return [instruct(text or "Represent the text", t) for t in raw]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, D) unit vectors; new texts are encoded together, longest first, and what they begin with in common once."""
        new = list(dict.fromkeys(t for t in texts if t not in self.vectors))
        if new:
            self.vectors.update(zip(new, prefix.encode(self.model, new, self.batch_size), strict=True))
        return np.stack([self.vectors[t] for t in texts])

    def encode(self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **_: Any) -> Any:
        raw = [t for batch in inputs for t in batch["text"]]
        # mteb joins an empty title and the text with a space; the items below are the plain texts.
        return self.embed(self.texts([t.strip() for t in raw], task_metadata, prompt_type))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of every pair; the vectors have unit length already. Rounded, so that equal texts tie whatever their place in a batch."""
        return (_tensor(embeddings1) @ _tensor(embeddings2).T).round(decimals=DECIMALS)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of row i with row i, rounded likewise."""
        return (_tensor(embeddings1) * _tensor(embeddings2)).sum(-1).round(decimals=DECIMALS)


def _tensor(value: Any) -> Any:
    import torch

    return torch.atleast_2d(torch.as_tensor(np.asarray(value), dtype=torch.float32))


def load(
    path: str | Any, name: str, *, instructed: bool, max_length: int | None = None, batch_size: int = 32, dtype: str = "auto"
) -> Embedder:
    """An Embedder from a saved folder, a hub id, package:NAME, or a loaded SentenceTransformer.

    `dtype` as in `loading.load_causal_lm`; an adapter that was trained here says its own.
    """
    console.quiet()
    model = path
    if isinstance(path, str):
        folder = Path(loading.resolve(path))
        bare = folder.is_dir() and not any((folder / part).exists() for part in (ADAPTER, "modules.json"))
        model = build_embedder(path, max_length or 512, dtype) if bare else load_trained(str(folder), dtype)
    encoder = Embedder(model, name, instructed, batch_size, max_length)
    if isinstance(path, str):  # a model that was handed over stays as it is
        loading.prepack(model)
    return encoder


def resolve_tasks(names: Sequence[str], size: str = "tiny", data: Path | str | None = None) -> list[Any]:
    """ "offline" gives the offline tasks; other names are offline tasks, MTEB tasks or MTEB benchmarks.

    MTEB's data come from a hub, or from the folder `data` (default $SPEED_DATA, see benchmark_data.py).
    """
    from speed_core.evaluation import benchmark_data, offline_tasks

    offline = {t.metadata.name: t for t in offline_tasks.offline_tasks(size)}
    out: list[Any] = []
    for name in names:
        if name == "offline":
            out += [t for n, t in offline.items() if size != "smoke" or n in offline_tasks.ONE_OF_A_KIND]
        elif name in offline:
            out.append(offline[name])
        elif name in (benchmarks := [b.name for b in mteb.get_benchmarks()]):
            out += list(mteb.get_benchmark(name).tasks)
        else:
            # Many of the 56 tasks of the papers are superseded by a second version; they are asked for by name.
            known = [t.metadata.name for t in mteb.get_tasks(exclude_superseded=False)]
            if name not in known:
                close = difflib.get_close_matches(name, [*known, *benchmarks, *offline, "offline"], 3)
                raise UserError(
                    f"task {name!r}: unknown to mteb {mteb.__version__}; did you mean {', '.join(close) or 'offline'}?"
                )
            out.append(mteb.get_task(name))
    # A task that is named twice, by itself and in a benchmark, is scored once.
    return benchmark_data.prepare(list({t.metadata.name: t for t in out}.values()), data)


def evaluate(model: Embedder, tasks: Sequence[Any], cache: Path, label: str = "") -> dict[str, Any]:
    """Score `model` on `tasks`.

    Returns {"model", "revision", "tasks": {name: {"type", "score", "items"}}} where score is mteb's main
    score in [0, 1] and items are the values a bootstrap draws from, one a text: nDCG@10 (or average precision) per
    query, [gold, cosine] per STS pair, [label, cosine, minus Manhattan distance] per pair to classify, the share of mteb's
    classifiers that are right about a text, [class, cluster, cluster, ...] of a text in three clusterings, Spearman's
    correlation of a text's summaries, the V-measure of each set of texts (MTEB's first clustering tasks). Where mteb keeps no
    prediction for each text (other main scores), the items are the scores of its repetitions, which all see the same texts,
    or there are none (`uncertainty.contrast` says what then). A task whose score is the mean over several splits, subsets or
    part tasks has "parts": items of each. "documents": STS pairs are all pairs of so many texts.
    """
    import logging

    from mteb.cache import ResultCache

    from speed_core.evaluation import benchmark_data

    logging.getLogger("mteb").setLevel(logging.ERROR)
    # A few-shot classifier that never predicts a class, or constant vectors, are low scores and no news.
    warnings.filterwarnings("ignore", message=".*ill-defined.*")
    warnings.filterwarnings("ignore", message=".*input array is constant.*")
    warnings.filterwarnings("ignore", message=".*is superseded by.*")  # the papers' tasks are the first versions
    encoder: Any = model
    revision = encoder.mteb_model_meta.revision
    out: dict[str, Any] = {"model": encoder.mteb_model_meta.name, "revision": revision, "tasks": {}}
    bar = console.progress(len(tasks), f"evaluate {label}".strip(), "task")
    for task in tasks:
        kept = ResultCache(cache / str(revision))
        how: Any = benchmark_data.strategy(kept, encoder.mteb_model_meta, task)
        said = (
            cache / "predictions" / str(revision) / (Path(label).name or "model")
        )  # one model may be scored in two ways at a time
        results = mteb.evaluate(
            encoder, [task], cache=kept, overwrite_strategy=how, show_progress_bar=False, encode_kwargs={}, prediction_folder=said
        )
        result = results.task_results[0]
        rows = _asked(task, result)
        score = np.mean([r["main_score"] for r in rows.values()]) if rows else result.get_score()
        if task.is_aggregate:  # its score is the mean over tasks, whatever their size
            scored = [(p, _asked(p, kept.load_task_result(p.metadata.name, encoder.mteb_model_meta))) for p in task.tasks]
            found = [_items(model, p, r, said) for p, r in scored]
            parts = [f[0] for f in found] if all(len(f) == 1 for f in found) else []
        else:
            parts = _items(model, task, rows, said)
        out["tasks"][task.metadata.name] = {
            "type": task.metadata.type,
            # Constant vectors have no correlation: mteb says nan, which counts as 0 here in `uncertainty.statistic` too.
            "score": float(np.nan_to_num(score)),
            "items": parts[0] if len(parts) == 1 else [],
        }
        if len(parts) > 1:
            out["tasks"][task.metadata.name]["parts"] = parts
        if documents := getattr(task, "documents", None):
            out["tasks"][task.metadata.name]["documents"] = documents
        bar.update()
    bar.close()
    return out


def _asked(task: Any, result: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """{(split, subset): scores} of what a task asks for; mteb's kept file may have more, of another benchmark's selection."""
    return {
        (split, row["hf_subset"]): row
        for split in task.eval_splits
        for row in result.scores.get(split, [])
        if row["hf_subset"] in task.hf_subsets
    }


def _items(model: Embedder, task: Any, rows: Mapping[tuple[str, str], Mapping[str, Any]], predictions: Path) -> list[list[Any]]:
    """The items of each (split, subset) of a task that is no aggregate."""
    from speed_core.evaluation import benchmark_data

    if loads := not getattr(task, "dataset", None):  # mteb frees a task's data when it has scored it
        task.load_data()
    path = predictions / task.prediction_file_name
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and task.metadata.type == "Classification" else {}
    out = []
    for (split, subset), detail in rows.items():
        guesses = said.get(subset, {}).get(split, [])
        out.append(_of_table(model, task, benchmark_data.table(task, split, subset), guesses) or _repetitions(task, detail))
    if loads:
        task.unload_data()
    return out


def _of_table(model: Embedder, task: Any, data: Any, guesses: Sequence[Any]) -> list[Any]:
    """Items of one table by the task's type; empty where there is no value for each text that the main score is made of."""
    from speed_core.evaluation import benchmark_data

    kind, measure = task.metadata.type, task.metadata.main_score
    if kind in ("Retrieval", "Reranking"):
        return benchmark_data.ranks(model, task, data)
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


# Which of the similarities [cosine, minus Manhattan] a score takes; of unit vectors, the others order pairs as the cosine does.
SIMILARITIES = {"max": (0, 1), "manhattan": (1,), "similarity": (0,), "cosine": (0,), "dot": (0,), "euclidean": (0,)}


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
    from scipy.stats import spearmanr

    out = []
    columns = (task.human_summaries_column_name, task.machine_summaries_column_name, task.relevancy_column_name)
    for human, machine, gold in zip(*(data[c] for c in columns), strict=True):
        best = (_vectors(model, task, machine) @ _vectors(model, task, human).T).max(1).tolist()
        if len(set(gold)) > 1 and len(set(best)) > 1:
            found = spearmanr(gold, best)
            with_p = task.evaluator.__name__.startswith("Deprecated")
            out.append(float(np.mean([found.statistic, found.pvalue])) if with_p else float(found.statistic))
    return out


CLUSTERINGS = 3  # of each text, with other starting points


def _clustered(model: Embedder, task: Any, data: Any) -> list[list[int]]:
    """[class, cluster, ...] of each text, clusters by mteb's k-means; empty for several levels of classes or sets of texts."""
    from sklearn.cluster import MiniBatchKMeans

    if not {"sentences", "labels"} <= set(data.column_names):
        return []
    texts, labels = data["sentences"], data["labels"]
    if not all(isinstance(t, str) for t in texts) or any(isinstance(label, list) for label in labels):
        return []
    known = {label: i for i, label in enumerate(sorted(set(labels), key=str))}
    vectors = _vectors(model, task, texts)
    found = [
        MiniBatchKMeans(len(known), batch_size=512, n_init=1, random_state=k).fit_predict(vectors) for k in range(CLUSTERINGS)
    ]
    return [[known[label], *(int(f[i]) for f in found)] for i, label in enumerate(labels)]


def category_means(result: Mapping[str, Any]) -> dict[str, float]:
    """Mean main score per category (names of SPEED Table 1), in [0, 100], and their mean over tasks as Avg."""
    groups: dict[str, list[float]] = {}
    for entry in result["tasks"].values():
        groups.setdefault(CATEGORIES.get(entry["type"], entry["type"]), []).append(100 * entry["score"])
    means = {k: float(np.mean(v)) for k, v in groups.items()}
    means["Avg"] = float(np.mean([100 * e["score"] for e in result["tasks"].values()]))
    return means
