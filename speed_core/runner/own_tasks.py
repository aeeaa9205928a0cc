"""A scorecard of any model: on one's own texts (mteb tasks from a JSONL file), on MTEB's tasks by name, or on both.

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
from collections.abc import Mapping, Sequence
from math import ceil, floor
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS

from speed_core.evaluation import evaluate, uncertainty
from speed_core.evaluation.encoder import load_encoder
from speed_core.evaluation.offline_tasks import make_task, metadata, retrieval_tables
from speed_core.files import NAME, NAME_RULE, UserError, digest, read_text, surrogate, write_json
from speed_core.plots import basic
from speed_core.study.runs import open_run

Rows = list[dict[str, Any]]
SHAPES = {"Retrieval": ("query", "positive"), "STS": ("sentence1", "sentence2", "score"), "Classification": ("text", "label")}
OPTIONAL = ("negative", "instruction")  # of a line for retrieval; null is none
FEW = 8  # texts a label that the classifier learns from, at most half of them
LEAST = 10  # lines a task, or different queries: fewer give no interval worth printing


def read(path: Path) -> dict[tuple[str, str], Rows]:
    """{(task name, type): rows} of a JSONL file; a bad line is named with its number."""
    if not path.is_file():
        raise UserError(f"--data {path}: no such file; give a JSONL file, one object a line")
    text = read_text(path)
    if text.lstrip().startswith("["):
        raise UserError(f"{path.name}: one JSON list; write one object per line, without the brackets")
    out: dict[tuple[str, str], Rows] = {}
    own_name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")[:64] or "texts"
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path.name}: line {number} is no JSON; write one object a line") from None
        kind = next((k for k, fields in SHAPES.items() if isinstance(row, dict) and set(fields) <= set(row)), "")
        if fault := _fault(row, kind):
            raise UserError(f"{path.name}: line {number}{fault}")
        name = own_name if row.get("task") is None else str(row["task"])
        if not re.fullmatch(NAME, name):
            raise UserError(f"{path.name}: line {number}: 'task' is {name!r}; name it with {NAME_RULE}")
        first = out.setdefault((name, kind), []) or [row]
        given, expected = row.get("instruction"), first[0].get("instruction")
        if kind == "Retrieval" and given != expected:
            raise UserError(
                f"{path.name}: line {number}: 'instruction' is {given!r}, the task's first line has {expected!r}; "
                'give all lines of a task the same, or another "task"'
            )
        out[name, kind].append(row)
    if not out:
        raise UserError(f"{path.name}: empty; write one object a line")
    for (name, kind), rows in out.items():
        have, what = (len({r["query"] for r in rows}), "different queries") if kind == "Retrieval" else (len(rows), "lines")
        if have < LEAST:
            raise UserError(f"{path.name}: task {name!r} ({kind}) has {have} {what}; give at least {LEAST}")
    return out


def _fault(row: Any, kind: str) -> str:
    """What is wrong with a line, to be said after its number; empty when nothing is."""
    if surrogate(json.dumps(row, ensure_ascii=False)):
        return " holds half of a UTF-16 pair (\\ud800 to \\udfff); write the text again"
    if not kind:
        return f" has none of the shapes {'; '.join(' + '.join(f) for f in SHAPES.values())}; add the missing field"
    more = [field for field in OPTIONAL if kind == "Retrieval" and row.get(field) is not None]
    for field in (*SHAPES[kind], *more):
        value = row[field]
        if field == "score":
            good, rule = type(value) in (int, float) and abs(value) < 1e300, "a number"  # JSON reads NaN and Infinity
        else:
            good, rule = isinstance(value, str) and bool(value.strip()), "a text that is not blank"
        if not good and not (field == "label" and type(value) is int):
            return f": {field!r} is {value!r}; it must be {rule}"
    return ""


def own_tasks(path: Path) -> list[Any]:
    """mteb tasks of a JSONL file, one for each task name and type."""
    makers = {"Retrieval": _retrieval, "STS": _sts, "Classification": _classification}
    return [makers[kind](name, rows) for (name, kind), rows in read(path).items()]


def scorecard(
    names: Sequence[str],
    out: Path,
    *,
    data: Path | None = None,
    mteb_tasks: Sequence[str] = (),
    instructed: bool = True,
    dtype: str = "auto",
) -> list[dict[str, Any]]:
    """Evaluate one or two models on a JSONL file, on MTEB tasks or benchmarks by name, or on both; prints a table, writes
    `out`/scores.json and the figure.

    Returns rows {label, value, low, high} in points: scores of one model, or those of the first minus the second
    (paired: the same texts are drawn for both).
    """
    if len(names) not in (1, 2):
        raise UserError(f"--model: {len(names)} given; give one, or two to compare")
    if not data and not mteb_tasks:
        raise UserError("evaluate: nothing to score on; give --data FILE, --tasks NAMES, or both")
    run = dataclasses.replace(open_run("smoke"), figures=out)
    tasks, results = [*(own_tasks(data) if data else ()), *evaluate.resolve_tasks(mteb_tasks)], []
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
    where = data.name if data and not mteb_tasks else f"{len(tasks)} tasks"
    title = f"{Path(names[0]).name} on {where}" if len(names) == 1 else f"{Path(names[0]).name} minus {Path(names[1]).name}"
    basic.estimates(run, "scorecard", rows, [], title, "points", line=0 if len(names) == 2 else None)
    print(f"figure and scores in {out}")
    return rows


def _about(name: str, kind: str, score: str, prompt: Any, rows: Rows) -> Any:
    """The task's metadata; the digest of its rows is its revision, so that mteb keeps no score of other rows."""
    found = metadata(f"Own{kind}-{name}", "The user's own texts.", kind, score, prompt, "")
    return found.model_copy(update={"dataset": {**found.dataset, "revision": f"rows-{digest(rows)}"}})


def _splits(splits: Mapping[str, Mapping[str, Sequence[Any]]]) -> DatasetDict:
    return DatasetDict({split: Dataset.from_dict(dict(columns)) for split, columns in splits.items()})


def _retrieval(name: str, rows: Rows) -> Any:
    texts = dict.fromkeys(t for r in rows for t in (r["positive"], r.get("negative")) if t)
    ids = {text: f"d{i}" for i, text in enumerate(texts)}
    relevant: dict[str, dict[str, int]] = {}  # query -> its relevant texts
    for r in rows:
        relevant.setdefault(r["query"], {})[ids[r["positive"]]] = 1
    queries = {f"q{i}": query for i, query in enumerate(relevant)}
    documents, judged = {i: text for text, i in ids.items()}, {i: relevant[query] for i, query in queries.items()}
    prompt = {"query": rows[0].get("instruction") or "Given a query, retrieve the text that answers it"}
    about = _about(name, "Retrieval", "ndcg_at_10", prompt, rows)
    return make_task(AbsTaskRetrieval, about, lambda: retrieval_tables(queries, documents, judged))


def _sts(name: str, rows: Rows) -> Any:
    scores = [float(r["score"]) for r in rows]
    if len(set(scores)) == 1:
        raise UserError(f"task {name!r}: every score is {rows[0]['score']}; a correlation needs scores that differ")
    columns = {k: [r[k] for r in rows] for k in ("sentence1", "sentence2")} | {"score": scores}
    about = _about(name, "STS", "cosine_spearman", "Retrieve semantically similar text", rows)
    scale = {"min_score": floor(min(scores)), "max_score": ceil(max(scores))}
    return make_task(AbsTaskSTS, about, lambda: _splits({"test": columns}), **scale)


def _classification(name: str, rows: Rows) -> Any:
    by_label: dict[str, dict[str, None]] = {}  # label -> its different texts
    for r in rows:
        by_label.setdefault(str(r["label"]), {})[r["text"]] = None
    if len(by_label) < 2:
        raise UserError(f"task {name!r}: one label only; give at least two")
    if small := [label for label, texts in by_label.items() if len(texts) < 2]:
        raise UserError(f"task {name!r}: label {small[0]!r} has one text; give every label at least two")
    rng = random.Random(0)
    splits: dict[str, dict[str, list[Any]]] = {split: {"text": [], "label": []} for split in ("train", "test")}
    for i, label in enumerate(sorted(by_label)):
        texts = list(by_label[label])
        rng.shuffle(texts)
        cut = min(FEW, len(texts) // 2)
        for split, part in (("train", texts[:cut]), ("test", texts[cut:])):
            splits[split]["text"] += part
            splits[split]["label"] += [i] * len(part)
    few = min(FEW, *(len(texts) // 2 for texts in by_label.values()))
    about = _about(name, "Classification", "accuracy", "Identify the label of the given text", rows)
    return make_task(AbsTaskClassification, about, lambda: _splits(splits), samples_per_label=few, n_experiments=5)
