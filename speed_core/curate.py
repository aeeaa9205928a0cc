"""From raw records to a training set: near-duplicates, overlap with the evaluation texts, a dataset folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speed_core.artifacts import UserError, digest, write_jsonl
from speed_core.profile import Curate


def shingles(text: str, size: int) -> set[str]:
    """Word n-grams of lower-cased text (the words themselves when the text is shorter)."""
    words = re.findall(r"\w+", text.lower())
    grams = {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}
    return grams or set(words)


def record_text(row: Mapping[str, Any]) -> str:
    """The text by which records are compared: query and positive."""
    return f"{row['query']} {row['positive']}"


def near_duplicates(rows: Sequence[Mapping[str, Any]], settings: Curate) -> list[str | None]:
    """For each row, the id of an earlier near-duplicate of the same kind, or None when it is kept.

    MinHash over word shingles; candidates from locality-sensitive hashing are confirmed by the exact
    Jaccard similarity, so the stated threshold is the one that holds. The paper names the method, not
    its settings; ours are threshold 0.7, 3-word shingles, 128 permutations.
    """
    from datasketch import MinHash, MinHashLSH

    index: dict[str, Any] = {}
    kept: dict[str, set[str]] = {}
    out: list[str | None] = []
    for row in rows:
        lsh = index.setdefault(row["kind"], MinHashLSH(threshold=settings.threshold, num_perm=settings.permutations))
        grams = shingles(record_text(row), settings.shingle)
        sketch = MinHash(num_perm=settings.permutations, seed=1)
        sketch.update_batch([g.encode() for g in sorted(grams)])
        twin = next((c for c in sorted(lsh.query(sketch)) if _jaccard(grams, kept[c]) >= settings.threshold), None)
        out.append(twin)
        if twin is None:
            lsh.insert(row["id"], sketch)
            kept[row["id"]] = grams
    return out


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def overlaps(rows: Sequence[Mapping[str, Any]], texts: Mapping[str, Sequence[str]], words: int) -> list[tuple[str, str] | None]:
    """For each row, (task, shared n-gram) when it shares `words` consecutive words with an evaluation text.

    Evaluation texts shorter than `words` words are matched whole against the query or the positive.
    """
    grams: dict[str, str] = {}
    whole: dict[str, str] = {}
    for task, items in texts.items():
        for text in items:
            tokens = re.findall(r"\w+", text.lower())
            if 3 <= len(tokens) < words:
                whole.setdefault(" ".join(tokens), task)
            for i in range(len(tokens) - words + 1):
                grams.setdefault(" ".join(tokens[i : i + words]), task)
    out: list[tuple[str, str] | None] = []
    for row in rows:
        hit = None
        for name in ("query", "positive", "negative"):
            text = row[name] or ""
            tokens = re.findall(r"\w+", text.lower())
            joined = " ".join(tokens)
            if joined in whole:
                hit = (whole[joined], joined)
            for i in range(len(tokens) - words + 1):
                gram = " ".join(tokens[i : i + words])
                if gram in grams:
                    hit = (grams[gram], gram)
                    break
            if hit:
                break
        out.append(hit)
    return out


def curate(
    rows: Sequence[dict[str, Any]], settings: Curate, evaluation_texts: Mapping[str, Sequence[str]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(kept rows, dropped rows with `dropped_by` and `because`). Every row is in exactly one of them."""
    if len({r["id"] for r in rows}) != len(rows):
        raise UserError("records: two share an id; ids must differ")
    kept, dropped = [], []
    twins = near_duplicates(rows, settings)
    hits = overlaps(rows, evaluation_texts, settings.overlap_words)
    for row, twin, hit in zip(rows, twins, hits, strict=True):
        if twin is not None:
            dropped.append({**row, "dropped_by": "near-duplicate", "because": f"of {twin}"})
        elif hit is not None:
            dropped.append({**row, "dropped_by": "evaluation overlap", "because": f"{hit[0]}: {hit[1]!r}"})
        else:
            kept.append(row)
    return kept, dropped


def make_record(prompt: Any, outcome_record: Mapping[str, Any], *, source: str, parent: str | None, seed: int) -> dict[str, Any]:
    """A record of the contract: {id, kind, task, instruction, query, positive, negative, ...}."""
    return {
        "id": prompt.id,
        "kind": prompt.kind,
        "task": prompt.task,
        "topic": prompt.topic,
        "instruction": prompt.task,
        "query": outcome_record["query"],
        "positive": outcome_record["positive"],
        "negative": outcome_record["negative"],
        "language": "en",
        "source": source,
        "parent": parent,
        "seed": seed,
        "prompt_digest": prompt.digest,
    }


def write_dataset(folder: Path, rows: Sequence[Mapping[str, Any]], *, title: str, how: str) -> None:
    """A folder that `datasets.load_dataset(folder)` opens: train.jsonl and a card (README.md)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", rows)
    # datasets 5.2 keeps a folder's rows in its cache under the configuration's name, and would hand out the
    # rows of an earlier folder of the same name: so the name is taken from the contents.
    count = Counter(r["kind"] for r in rows)
    table = "\n".join(f"| {k} | {count[k]} |" for k in sorted(count))
    card = f"""---
language: en
task_categories: [sentence-similarity]
tags: [synthetic, speed, text-embeddings]
configs:
- config_name: v{digest([r["id"] for r in rows] + [r["query"] for r in rows])[:10]}
  data_files: train.jsonl
---
# {title}

{how}

Synthetic text, written by a small language model; not checked for truth. Do not use it as a source of facts.

| kind | records |
|---|---|
{table}
| **sum** | {len(rows)} |

Fields: id, kind, task, topic, instruction, query, positive, negative (null for the two matching kinds), language, source,
parent, seed, prompt_digest.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
