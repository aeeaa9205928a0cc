"""Any MTEB task or benchmark by name: from a hub, or from a folder of dataset snapshots without one.

The folder ($SPEED_DATA, or an argument) holds snapshots as FOLDER/ORG/NAME/..., the layout that
    hf download ORG/NAME --repo-type dataset --revision REVISION --local-dir FOLDER/ORG/NAME
writes. A task whose data set has one loads from it, through mteb's own code; the others load from the hub.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
from mteb.types import PromptType

from speed_core.files import UserError, digest, file_digest
from speed_core.settings import Settings


def data_folder(data: Path | str | None = None) -> Path | None:
    """The folder of snapshots: the argument, else $SPEED_DATA, else None. Raises UserError when it is no folder."""
    named = data or Settings().data
    if named and not Path(named).is_dir():
        raise UserError(f"SPEED_DATA {str(named)!r}: no such folder; give one with dataset snapshots as ORG/NAME/, or unset it")
    return Path(named) if named else None


def prepare(tasks: Sequence[Any], data: Path | str | None = None) -> list[Any]:
    """The same tasks, those of mteb reading their local snapshot where there is one.

    Raises one UserError for all tasks whose data can be had neither from the folder nor from a hub: before anything
    is scored, not after hours.
    """
    folder = data_folder(data)
    out = [_prepared(task, folder) for task in tasks]
    missing = {p.metadata.name: hub_path(p) for t in out for p in parts(t) if not _reachable(p)}
    if missing:
        (name, wanted), *others = missing.items()
        more = (
            f" (and {len(others)} more: {', '.join(n for n, _ in others[:5])}{' ...' if len(others) > 5 else ''})"
            if others
            else ""
        )
        raise UserError(
            f"task {name!r}: its data set {wanted} is not here{more}; set SPEED_ONLINE=1 where a hub can be reached, "
            f"or put a snapshot into {folder or 'a folder'}/{wanted} and set SPEED_DATA to {folder or 'that folder'}"
        )
    return out


def parts(task: Any) -> list[Any]:
    """The tasks that an aggregate (CQADupstack) is the mean of; of any other task, itself."""
    return list(task.tasks) if task.is_aggregate else [task]


def hub_path(task: Any) -> str:
    """ORG/NAME of a task's data set."""
    return str(task.metadata.dataset["path"])


def _of_mteb(task: Any) -> bool:
    return type(task).__module__.startswith("mteb.")


def _prepared(task: Any, folder: Path | None) -> Any:
    if not _of_mteb(task):
        return task
    task = copy.copy(task)  # a benchmark hands out the same objects each time
    if task.is_aggregate:
        task.tasks = [_prepared(t, folder) for t in task.tasks]
        task.metadata = task.metadata.model_copy(update={"tasks": task.tasks})
        task.taskname_to_task = {t.metadata.name: t for t in task.tasks}
        return task
    snapshot = folder / hub_path(task) if folder else None
    task.snapshot = snapshot if snapshot and snapshot.is_dir() else None
    if task.snapshot:
        # In a class of its own: mteb throws metadata of the object away when it frees a task's data.
        kind = type(task)
        changed = {"metadata": _with(task.metadata, revision=revision(task.snapshot)), "__module__": kind.__module__}
        task.__class__ = type(kind.__name__, (kind,), changed)
        vars(task).pop("metadata", None)
    original = task.load_data

    def load_data(*args: Any, **kwargs: Any) -> None:
        try:
            with _reading(task):
                original(*args, **kwargs)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            what = f"its snapshot {task.snapshot}" if task.snapshot else f"its data set {hub_path(task)}"
            raise UserError(
                f"task {task.metadata.name!r}: {what} could not be read ({type(error).__name__}: {str(error).splitlines()[0][:160]}); "
                "set SPEED_ONLINE=1 where a hub can be reached, or give a whole snapshot as ORG/NAME/ in SPEED_DATA"
            ) from error

    task.load_data = load_data
    return task


def _with(metadata: Any, **changes: str) -> Any:
    return metadata.model_copy(update={"dataset": {**metadata.dataset, **changes}})


@contextmanager
def _reading(task: Any) -> Iterator[None]:
    """While a task loads, its path is the snapshot's, and prepared tables go to a cache of that snapshot's own.

    datasets 5.2 keys its cache by the folder's last name and the configuration's, and would hand out the rows of
    another folder of the same name.
    """
    if not task.snapshot:
        yield
        return
    cache = datasets.config.HF_DATASETS_CACHE
    task.metadata = _with(task.metadata, path=str(task.snapshot))
    datasets.config.HF_DATASETS_CACHE = Path(cache) / "snapshots" / task.metadata.revision
    try:
        yield
    finally:
        vars(task).pop("metadata", None)
        datasets.config.HF_DATASETS_CACHE = cache


def _reachable(task: Any) -> bool:
    if not _of_mteb(task) or task.snapshot or not datasets.config.HF_HUB_OFFLINE:
        return True
    from huggingface_hub.constants import HF_HUB_CACHE

    org, _, name = hub_path(task).partition("/")  # both caches of an earlier, online run
    return (Path(datasets.config.HF_DATASETS_CACHE) / f"{org}___{name.lower()}").is_dir() or (
        Path(HF_HUB_CACHE) / f"datasets--{org}--{name}"
    ).is_dir()


def revision(snapshot: Path) -> str:
    """What mteb's result files call the data: the commit that `hf download` noted beside every file, else a digest of the bytes."""
    files = sorted(p for p in snapshot.rglob("*") if p.is_file() and not _hidden(p, snapshot))
    if not files:
        raise UserError(f"{snapshot}: no files in it; download the data set again")
    noted = snapshot / ".cache" / "huggingface" / "download"
    commits = {_commit(noted / f"{p.relative_to(snapshot)}.metadata", p) for p in files}
    if len(commits) == 1 and (commit := commits.pop()):
        return commit
    return (
        "local-" + digest([[str(p.relative_to(snapshot)), _bytes(p, p.stat().st_size, p.stat().st_mtime_ns)] for p in files])[:12]
    )


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _commit(note: Path, file: Path) -> str:
    """The commit of a downloaded file; empty when there is none, or when the file was written after the download."""
    if not note.is_file():
        return ""
    commit, _, stamp = (note.read_text(encoding="utf-8").split("\n") + ["", ""])[:3]
    return commit if stamp and file.stat().st_mtime <= float(stamp) + 1 else ""


@lru_cache(maxsize=4096)
def _bytes(path: Path, size: int, written: int) -> str:
    return file_digest(path)


def strategy(cache: Any, meta: Any, task: Any) -> str:
    """mteb's overwrite strategy: "always" when its kept result is of another revision of the data, else "only-missing".

    mteb 2.26 hands out a complete kept result whatever data it was made from.
    """
    for part in parts(task):
        kept = cache.load_task_result(part.metadata.name, meta)
        if kept is not None and kept.dataset_revision != part.metadata.revision:
            return "always"
    return "only-missing"


def aggregate(result: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """{benchmark: category means and Avg, in points} of the benchmarks among `names`, of what `evaluate.evaluate` returned.

    Raises UserError when a task of the benchmark was not scored: a mean over fewer tasks is another benchmark's.
    """
    from speed_core.evaluation.evaluate import category_means

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


# --- the values behind a score, for the bootstrap --------------------------------------------------


def table(task: Any, split: str, subset: str) -> Any:
    """One evaluated table of a loaded task: mteb's layouts have the subsets first, or none."""
    data = task.dataset[subset] if subset in task.dataset else task.dataset
    return data[split]


MERGED = "max_over_subqueries_"  # of MindSmall: queries ID_1, ID_2, ... are one, a document has its best score


def ranks(model: Any, task: Any, split: Any) -> list[float]:
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
    return [_score(scores, gains, late, measure, int(at)) for scores, gains in found.values()]


def _score(scores: Mapping[int, float], gains: Mapping[int, float], late: Mapping[int, int], measure: str, at: int) -> float:
    """One query: `scores` of its candidates, `gains` of its relevant documents (some may be no candidates), `late` the place of each
    document in the order of the ids."""
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
