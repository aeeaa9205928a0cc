"""Near-duplicates of short records at growing size: seconds, peak memory, what is found of what was planted.

    python benchmarks/dedup.py [--quick]

Records of about 30 words (query and positive, Zipf-distributed words, four kinds). A tenth of them are near-copies of
an earlier record at a similarity of at least the threshold, another tenth look-alikes below it: copies in which a
run of words was replaced. `ours` is `curate.near_duplicates`; `datasketch` and `rensa` (where it is installed: Rust) are
those libraries' indexes with the same shingles, permutations, bands and exact confirmation, record by record;
`datasketch_own_bands` has the bands that datasketch chooses for the threshold. Each in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import common
import numpy as np

KINDS = ("retrieval", "classification", "sts", "short_short")
WORDS = 50_000


def records(count: int, seed: int = 0) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """(rows, position of a copy -> position of its original, for near-copies and look-alikes alike)."""
    rng = np.random.default_rng(seed)
    vocabulary = np.array([f"w{i * 2654435761 % 2**32:x}" for i in range(WORDS)], dtype=object)
    frequency = np.cumsum(1 / np.arange(1, WORDS + 1))
    rows: list[dict[str, Any]] = []
    texts: list[np.ndarray] = []
    originals: list[int] = []
    source: dict[int, int] = {}
    for i in range(count):
        share = rng.random()
        if share < 0.2 and originals:
            j = originals[rng.integers(len(originals))]
            run = rng.integers(1, 3) if share < 0.1 else 10
            words, kind, source[i] = texts[j].copy(), rows[j]["kind"], j
            at = rng.integers(0, len(words) - run)
            words[at : at + run] = rng.integers(0, WORDS, run)
        else:
            draws = rng.random(rng.integers(24, 40)) * frequency[-1]
            words, kind = np.searchsorted(frequency, draws).astype(np.int32), KINDS[i % len(KINDS)]
            originals.append(i)
        texts.append(words)
        text, cut = vocabulary[words].tolist(), len(words) // 3
        rows.append({"id": f"{i:08x}", "kind": kind, "query": " ".join(text[:cut]), "positive": " ".join(text[cut:])})
    return rows, source


def peer(rows: list[dict[str, Any]], settings: Any, open_index: Any, sketches: Any) -> list[str | None]:
    """A library's index for each kind, queried and filled in order; candidates confirmed by the exact similarity."""
    from speed_core.data import curate, minhash

    @lru_cache(maxsize=1 << 14)
    def grams(i: int) -> set[str]:
        return minhash.shingles(curate.record_text(rows[i]), settings.shingle)

    indexes = {kind: open_index() for kind in KINDS}
    out: list[str | None] = []
    for i, sketch in enumerate(sketches(grams(i) for i in range(len(rows)))):
        index = indexes[rows[i]["kind"]]
        near = (c for c in sorted(index.query(sketch)) if minhash.jaccard(grams(i), grams(c)) >= settings.threshold)
        twin = next(near, None)
        out.append(None if twin is None else rows[twin]["id"])
        if twin is None:
            index.insert(i, sketch)
    return out


def with_datasketch(rows: list[dict[str, Any]], settings: Any, bands: tuple[int, int] | None) -> list[str | None]:
    """`bands`: (bands, rows), or None for the library's own choice."""
    from datasketch import MinHash, MinHashLSH

    count = settings.permutations
    return peer(
        rows,
        settings,
        lambda: MinHashLSH(threshold=settings.threshold, num_perm=count, params=bands),
        lambda sets: MinHash.generator(([g.encode() for g in s] for s in sets), num_perm=count, seed=1),
    )


def with_rensa(rows: list[dict[str, Any]], settings: Any, bands: tuple[int, int]) -> list[str | None]:
    from rensa import RMinHash, RMinHashLSH

    def sketches(sets: Iterator[set[str]]) -> Iterator[Any]:
        for grams in sets:
            sketch = RMinHash(settings.permutations, 1)
            sketch.update(list(grams))
            yield sketch

    return peer(rows, settings, lambda: RMinHashLSH(settings.threshold, settings.permutations, bands[0]), sketches)


def measure(name: str, count: int) -> dict[str, Any]:
    """One run: time and memory, and the outcome against the plan and against the definition."""
    from speed_core.data import curate, minhash
    from speed_core.profile import Curate

    settings = Curate()
    bands = minhash.banding(settings.threshold, settings.permutations)
    rows, source = records(count)
    before = common.peak_mb("cpu")
    start = time.perf_counter()
    if name == "ours":
        twins = curate.near_duplicates(rows, settings)
    elif name == "rensa":
        twins = with_rensa(rows, settings, bands)
    else:
        twins = with_datasketch(rows, settings, None if name == "datasketch_own_bands" else bands)
    out: dict[str, Any] = {"seconds": time.perf_counter() - start, "rows_mb": before, "peak_mb": common.peak_mb("cpu")}

    def similarity(i: int, j: int) -> float:
        return minhash.jaccard(*(minhash.shingles(curate.record_text(rows[k]), settings.shingle) for k in (i, j)))

    place = {row["id"]: i for i, row in enumerate(rows)}
    # A copy counts as planted when its original was kept: then the definition wants it dropped.
    alike = {i: similarity(i, j) for i, j in source.items() if twins[j] is None}
    planted = {i: s for i, s in alike.items() if s >= settings.threshold}
    found = [i for i in planted if twins[i] is not None]
    close = [i for i, s in planted.items() if s < 0.8]
    dropped = [(i, place[t]) for i, t in enumerate(twins) if t is not None]
    wrong = [i for i, j in dropped if j >= i or twins[j] is not None or similarity(i, j) < settings.threshold]
    out |= {"dropped": len(dropped), "planted": len(planted), "recall": len(found) / len(planted)}
    out |= {"planted_below_0.8": len(close), "recall_below_0.8": float(np.mean([twins[i] is not None for i in close]))}
    below = [i for i in alike if i not in planted]
    return out | {
        "falsely_dropped": len(wrong),
        "lookalikes": len(below),
        "lookalikes_kept": sum(twins[i] is None for i in below),
    }


def main() -> None:
    args = common.arguments(__doc__ or "")
    sizes = (10_000, 100_000) if args.quick else (10_000, 100_000, 1_000_000)
    plan = [("ours", n) for n in sizes] + [(name, n) for n in sizes[:2] for name in ("datasketch", "datasketch_own_bands")]
    if importlib.util.find_spec("rensa"):
        plan += [("rensa", n) for n in sizes]
    rows = []
    for name, count in plan:
        rows.append({"method": name, "records": count} | common.in_process(measure, name, count, limit_s=480))
        print(json.dumps(rows[-1]), flush=True)
    by = {(r["method"], r["records"]): r for r in rows if r["status"] == "ok"}
    ratios = {
        f"vs_{name}": {
            str(n): by[name, n]["seconds"] / by["ours", n]["seconds"] for n in sizes if {("ours", n), (name, n)} <= set(by)
        }
        for name in ("datasketch", "rensa")
    }
    common.finish("dedup", args, rows, ratios, ("numpy", "datasketch", "rensa"))


if __name__ == "__main__":
    main()
