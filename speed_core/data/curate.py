"""From raw records to a training set: near-duplicates, overlap with the evaluation texts, a dataset folder."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speed_core.data import minhash
from speed_core.files import Lazy, UserError, canonical, digest, write_jsonl
from speed_core.profile import Curate
from speed_core.store.artifacts import Artifact


def record_text(row: Mapping[str, Any]) -> str:
    """The text by which records are compared: query and positive."""
    return f"{row['query']} {row['positive']}"


def near_duplicates(rows: Sequence[Mapping[str, Any]], settings: Curate) -> list[str | None]:
    """For each row, the id of an earlier near-duplicate of the same kind, or None when it is kept.

    MinHash over word shingles of query and positive (`minhash.duplicates`): in order, a row is a duplicate when
    its exact Jaccard similarity to an earlier kept row is at least the threshold. The paper names the method,
    not its settings; ours are threshold 0.7, 3-word shingles, 128 permutations: 32 bands of 4, with which a pair
    at the threshold is found with probability 0.998 (`minhash.banding`; never less than 0.99 at other settings).
    """
    how = settings.model_dump(include={"threshold", "permutations", "shingle"})
    places: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(row["kind"], []).append(i)
    out: list[str | None] = [None] * len(rows)
    for mine in places.values():
        twins = minhash.duplicates(Lazy(lambda i: record_text(rows[i]), mine), **how)
        for at in (twins >= 0).nonzero()[0]:
            out[mine[at]] = rows[mine[twins[at]]]["id"]
    return out


def ngrams(text: str, size: int) -> Iterator[str]:
    """What a training text is looked up by: all its runs of `size` words, and (behind "=") the text as a whole."""
    found = minhash.words(text)
    yield "= " + " ".join(found)
    for i in range(len(found) - size + 1):
        yield " ".join(found[i : i + size])


def ngram_index(texts: Mapping[str, Sequence[str]], size: int) -> dict[str, list[tuple[str, int]]]:
    """n-gram -> (task, number of the text) of the evaluation texts that hold it.

    Texts of three to `size` - 1 words are matched as a whole, and those of signs alone; shorter ones, single words, match nothing.
    """
    out: dict[str, list[tuple[str, int]]] = {}
    for task, items in texts.items():
        for number, text in enumerate(items):
            whole, *runs = ngrams(text, size)
            signs = whole != "= " and not any(map(str.isalnum, whole))
            short = [whole] if whole.count(" ") >= 3 or signs else []
            for gram in runs or short:
                out.setdefault(gram, []).append((task, number))
    return out


def fields(row: Mapping[str, Any]) -> list[str]:
    """Query, positive and, where there is one, negative: the texts that training reads."""
    return [t for name in ("query", "positive", "negative") if (t := row[name])]


def overlaps(rows: Sequence[Mapping[str, Any]], texts: Mapping[str, Sequence[str]], words: int) -> list[tuple[str, str] | None]:
    """For each row, (task, shared n-gram) when it shares `words` consecutive words with an evaluation text.

    Evaluation texts shorter than `words` words are matched whole against the query, the positive or the negative.
    """
    index = ngram_index(texts, words)
    out: list[tuple[str, str] | None] = []
    for row in rows:
        gram = next((g for text in fields(row) for g in ngrams(text, words) if g in index), None)
        out.append(None if gram is None else (index[gram][0][0], gram.removeprefix("= ")))
    return out


def curate(
    rows: Sequence[dict[str, Any]], settings: Curate, evaluation_texts: Mapping[str, Sequence[str]]
) -> tuple[Lazy[dict[str, Any]], Lazy[dict[str, Any]]]:
    """(kept rows, dropped rows with `dropped_by` and `because`). Every row is in exactly one of them.

    `rows` may be `files.stored_jsonl`: only ids, places and reasons are held in memory.
    """
    if len({r["id"] for r in rows}) != len(rows):
        raise UserError("records: two share an id; ids must differ")
    kept, dropped = array("q"), []
    twins = near_duplicates(rows, settings)
    hits = overlaps(rows, evaluation_texts, settings.overlap_words)
    for i, (twin, hit) in enumerate(zip(twins, hits, strict=True)):
        if twin is not None:
            dropped.append((i, "near-duplicate", f"of {twin}"))
        elif hit is not None:
            dropped.append((i, "evaluation overlap", f"{hit[0]}: {hit[1]!r}"))
        else:
            kept.append(i)

    def reason(key: tuple[int, str, str]) -> dict[str, Any]:
        return {**rows[key[0]], "dropped_by": key[1], "because": key[2]}

    return Lazy(rows.__getitem__, kept), Lazy(reason, dropped)


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
    # rows of an earlier folder of the same name: so the name is taken from all of the contents.
    count, contents = Counter(r["kind"] for r in rows), hashlib.sha256(b"[")
    for i, row in enumerate(rows):
        contents.update(("," * (i > 0) + canonical(row)).encode())
    contents.update(b"]")  # the digest of the list of rows
    table = "\n".join(f"| {k} | {count[k]} |" for k in sorted(count))
    card = f"""---
language: en
task_categories: [sentence-similarity]
tags: [synthetic, speed, text-embeddings]
configs:
- config_name: v{contents.hexdigest()[:10]}
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


def earlier_digest(data: Artifact) -> str:
    """The digest that a data set had when the name of its configuration covered ids and queries alone, as in recorded runs."""
    rows, card = data.rows("train.jsonl"), data.file("README.md").read_text(encoding="utf-8")
    name = digest([r["id"] for r in rows] + [r["query"] for r in rows])[:10]
    card = card.replace(f"config_name: v{digest(rows)[:10]}\n", f"config_name: v{name}\n")
    sha = hashlib.sha256(card.encode("utf-8")).hexdigest()
    return digest(data.manifest["files"] | {"README.md": {"sha256": sha, "bytes": len(card.encode("utf-8"))}})[:16]
