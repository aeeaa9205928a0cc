"""A scorecard for one's own texts: mteb tasks from a JSONL file.

Each line is one of
    {"query": ..., "positive": ...}  with an optional "negative"        -> retrieval among all positives and negatives
    {"sentence1": ..., "sentence2": ..., "score": 0.8}                   -> STS
    {"text": ..., "label": ...}                                          -> classification, a few texts a label to learn from
An optional "task" groups lines into tasks of their own; an optional "instruction" is what retrieval queries are given, one
for all lines of a task. Lines with the same query are one query with several relevant texts.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable, Sequence
from math import ceil, floor
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS

from speed_core.evaluation.offline_tasks import metadata, retrieval_tables
from speed_core.files import NAME, NAME_RULE, UserError, digest, read_text, surrogate, write_json

SHAPES = {"Retrieval": ("query", "positive"), "STS": ("sentence1", "sentence2", "score"), "Classification": ("text", "label")}
OPTIONAL = {"Retrieval": ("negative", "instruction")}  # null is none
FEW = 8  # texts a label that the classifier learns from, at most half of them
LEAST = 10  # lines a task, or different queries: fewer give no interval worth printing


def read(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """{(task name, type): rows} of a JSONL file; a bad line is named with its number."""
    if not path.is_file():
        raise UserError(f"--data {path}: no such file; give a JSONL file, one object a line")
    out: dict[tuple[str, str], list[dict[str, Any]]] = {}
    text = read_text(path)
    if text.lstrip().startswith("["):
        raise UserError(f"{path.name}: one JSON list; write its objects one a line, without the brackets")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path.name}: line {number} is no JSON; write one object a line") from None
        if surrogate(json.dumps(row, ensure_ascii=False)):
            raise UserError(f"{path.name}: line {number} holds half of a UTF-16 pair (\\ud800 to \\udfff); write the text again")
        kind = next((k for k, fields in SHAPES.items() if isinstance(row, dict) and set(fields) <= set(row)), "")
        if not kind:
            shapes = "; ".join(" + ".join(f) for f in SHAPES.values())
            raise UserError(f"{path.name}: line {number} has none of the shapes {shapes}; add the missing field")
        for field in (*SHAPES[kind], *(f for f in OPTIONAL.get(kind, ()) if row.get(f) is not None)):
            value = row[field]
            if field == "score":  # json reads NaN and Infinity
                good, what = _number(value) and abs(value) < 1e300, "a number"
            else:
                good = isinstance(value, str) and bool(value.strip())
                good = good or (field == "label" and _number(value) and isinstance(value, int))
                what = "a text that is not blank"
            if not good:
                raise UserError(f"{path.name}: line {number}: {field!r} is {value!r}; it must be {what}")
        name = (
            str(row["task"])
            if row.get("task") is not None
            else re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")[:64] or "texts"
        )
        if not re.fullmatch(NAME, name):
            raise UserError(f"{path.name}: line {number}: 'task' is {name!r}; name it with {NAME_RULE}")
        rows = out.setdefault((name, kind), [])
        if kind == "Retrieval" and rows and row.get("instruction") != rows[0].get("instruction"):
            wanted = rows[0].get("instruction")
            raise UserError(
                f"{path.name}: line {number}: 'instruction' is {row.get('instruction')!r}, the task's first line has {wanted!r}; "
                'give all lines of a task the same, or another "task"'
            )
        rows.append(row)
    for (name, kind), rows in out.items():
        have, what = (len({r["query"] for r in rows}), "different queries") if kind == "Retrieval" else (len(rows), "lines")
        if have < LEAST:
            raise UserError(f"{path.name}: task {name!r} ({kind}) has {have} {what}; give at least {LEAST}")
    if not out:
        raise UserError(f"{path.name}: empty; write one object a line")
    return out


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def own_tasks(path: Path) -> list[Any]:
    """mteb tasks of a JSONL file, one for each task name and type."""
    makers: dict[str, Callable[[str, list[dict[str, Any]]], Any]] = {
        "Retrieval": _retrieval, "STS": _sts, "Classification": _classification,
    }  # fmt: skip
    return [makers[kind](name, rows) for (name, kind), rows in read(path).items()]


def scorecard(
    names: Sequence[str], data: Path, out: Path, *, instructed: bool = True, dtype: str = "auto"
) -> list[dict[str, Any]]:
    """Evaluate one or two models on a JSONL file; prints a table, writes `out`/scores.json and the figure.

    Returns rows {label, value, low, high} in points: scores of one model, or those of the first minus the second
    (paired: the same texts are drawn for both).
    """
    from speed_core.evaluation import evaluate, uncertainty
    from speed_core.evaluation.encoder import load_encoder
    from speed_core.plots import basic
    from speed_core.study.runs import open_run

    if len(names) not in (1, 2):
        raise UserError(f"--model: {len(names)} given; give one, or two to compare")
    tasks, results = own_tasks(data), []
    run = dataclasses.replace(open_run("smoke"), figures=out)
    for name in names:
        # mteb keeps scores by this name: those with and without the instruction must not be taken for one another.
        label = (Path(name).name.replace(":", "-") or "model") + ("" if instructed else "-without-instruction")
        encoder = load_encoder(name, label, instructed=instructed, dtype=dtype)
        results.append(evaluate.evaluate(encoder, tasks, out / "mteb", label=label))
    write_json(out / "scores.json", results)
    rows = []
    for task in results[0]["tasks"]:
        one = [[{**r, "tasks": {task: r["tasks"][task]}}] for r in results]
        found = uncertainty.difference(one[0], one[1]) if len(one) == 2 else uncertainty.average(one[0])
        rows.append(found.row(task))
        print(f"{task:40} {found}")
    title = f"{Path(names[0]).name} on {data.name}" if len(names) == 1 else f"{Path(names[0]).name} minus {Path(names[1]).name}"
    basic.estimates(run, "scorecard", rows, [], title, "points", line=0 if len(names) == 2 else None)
    print(f"figure and scores in {out}")
    return rows


def _about(name: str, kind: str, score: str, prompt: Any, rows: Sequence[dict[str, Any]]) -> Any:
    """The task's metadata; the digest of its rows is its revision, so that mteb keeps no score of other rows."""
    found = metadata(f"Own{kind}-{name}", "The user's own texts.", kind, score, prompt, "")
    return found.model_copy(update={"dataset": {**found.dataset, "revision": f"rows-{digest(list(rows))}"}})


def _retrieval(name: str, rows: Sequence[dict[str, Any]]) -> Any:
    texts = list(dict.fromkeys(t for r in rows for t in (r["positive"], r.get("negative")) if t))
    ids = {t: f"d{i}" for i, t in enumerate(texts)}
    instruction = rows[0].get("instruction") or "Given a query, retrieve the text that answers it"
    wanted: dict[str, dict[str, int]] = {}  # query -> its relevant texts
    for r in rows:
        wanted.setdefault(r["query"], {})[ids[r["positive"]]] = 1

    class Own(AbsTaskRetrieval):
        metadata = _about(name, "Retrieval", "ndcg_at_10", {"query": instruction}, rows)

        def load_data(self, num_proc: int | None = None, *, timer: Any = None, **kwargs: Any) -> None:
            queries = {f"q{i}": query for i, query in enumerate(wanted)}
            relevant = {f"q{i}": found for i, found in enumerate(wanted.values())}
            self.dataset = retrieval_tables(queries, {i: t for t, i in ids.items()}, relevant)
            self.data_loaded = True

    return Own()


def _sts(name: str, rows: Sequence[dict[str, Any]]) -> Any:
    class Own(AbsTaskSTS):
        metadata = _about(name, "STS", "cosine_spearman", "Retrieve semantically similar text", rows)
        min_score = floor(min(r["score"] for r in rows))
        max_score = ceil(max(r["score"] for r in rows))

        def load_data(self, num_proc: int | None = None, *, timer: Any = None, **kwargs: Any) -> None:
            columns = {k: [r[k] for r in rows] for k in ("sentence1", "sentence2")}
            self.dataset = DatasetDict({"test": Dataset.from_dict(columns | {"score": [float(r["score"]) for r in rows]})})
            self.data_loaded = True

    if len({float(r["score"]) for r in rows}) == 1:
        raise UserError(f"task {name!r}: every score is {rows[0]['score']}; a correlation needs scores that differ")
    return Own()


def _classification(name: str, rows: Sequence[dict[str, Any]]) -> Any:
    by_label: dict[str, list[str]] = {}
    for r in rows:
        by_label.setdefault(str(r["label"]), []).append(r["text"])
    small = [k for k, v in by_label.items() if len(set(v)) < 2]
    if small or len(by_label) < 2:
        raise UserError(
            f"task {name!r}: label {small[0]!r} has one text; give every label at least two" if small
            else f"task {name!r}: one label only; give at least two"
        )  # fmt: skip
    labels = sorted(by_label)
    rng, train, test = random.Random(0), [], []
    for i, label in enumerate(labels):
        texts = list(dict.fromkeys(by_label[label]))
        rng.shuffle(texts)
        cut = min(FEW, len(texts) // 2)
        train += [(t, i) for t in texts[:cut]]
        test += [(t, i) for t in texts[cut:]]

    class Own(AbsTaskClassification):
        metadata = _about(name, "Classification", "accuracy", "Identify the label of the given text", rows)
        samples_per_label = min(FEW, max(1, min(len(set(v)) // 2 for v in by_label.values())))
        n_experiments = 5

        def load_data(self, num_proc: int | None = None, *, timer: Any = None, **kwargs: Any) -> None:
            splits = {"train": train, "test": test}
            self.dataset = DatasetDict(
                {k: Dataset.from_dict({"text": [t for t, _ in v], "label": [y for _, y in v]}) for k, v in splits.items()}
            )
            self.data_loaded = True

    return Own()
