"""Requests and records by the million: seconds and peak memory of planning, logging, resuming and curating.

    python benchmarks/million.py [--quick]

The engine is simulated: it writes records of about 30 words (Zipf-distributed) at once, a tenth of them near-copies of others. `stop`
plans the requests and answers half of them; `resume`, another process as after a kill, answers the rest and writes the data
file; `curate` reads that file, drops near-duplicates and writes the data set; `ray` is `stop` and `resume` in one over two local
workers, measured in the process that writes the log. Each is a process of its own; `start_mb` is what it held before.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common

LIMIT_MB = 2000
PROFILE: Any = SimpleNamespace(profile=SimpleNamespace(seed=0))
VOCABULARY = [f"w{i * 2654435761 % 2**32:x}" for i in range(50_000)]
FREQUENCY = list(accumulate(1 / i for i in range(1, len(VOCABULARY) + 1)))
MODEL = "package:all-MiniLM-L6-v2"  # its name alone is used: Ray's workers compare the weights


class Stopped(Exception):
    """The end of the first half."""


def text(kind: str, seed: int, count: int) -> str:
    """A record of `kind`; a tenth share all words but one with those whose seeds are alike modulo a hundredth of `count`."""
    from speed_core.data import records

    rng = random.Random(seed)
    source, copy = rng, rng.random() < 0.1
    if copy:
        source = random.Random(seed % max(count // 100, 1))
    drawn = source.choices(VOCABULARY, cum_weights=FREQUENCY, k=30)
    if copy:
        drawn[-1] = rng.choice(VOCABULARY)
    parts = (drawn[:10], drawn[10:], drawn[::-1])
    return json.dumps(dict(zip(records.KEYS[kind], map(" ".join, parts), strict=False)))


def simulated(count: int, stop: int = 0) -> Any:
    """An engine that writes at once, and stops after `stop` texts where that is not 0."""
    from speed_core.generation.engines import Completion, Decoding, Request

    class Simulated:
        name = "simulated"

        def generate(self, requests: Sequence[Request], decoding: Decoding) -> Generator[Completion, None, None]:
            for n, r in enumerate(requests, 1):
                yield Completion(r.id, text(r.kind, r.seed, count), "stop", 300, 100)
                if n == stop:
                    raise Stopped

        def close(self) -> None:
            pass

    return Simulated()


def planned(count: int) -> Any:
    from speed_core.data import records, tasks

    topics = [f"Topic {i}" for i in range(max(count // 100, 10))]
    table = {(kind, topic): [f"Find what fits a question on {topic}."] for topic in topics for kind in records.KINDS}
    return tasks.plan_synthesis("synthesis", count, topics, table)


def generated(count: int, folder: Path, engine: Any) -> int:
    """Answers all requests that the log lacks; the number of rows of the data file."""
    from speed_core.files import write_jsonl
    from speed_core.generation import generate
    from speed_core.study.generator_answers import Ask

    requests = Ask(planned(count)).requests(PROFILE)
    entries = generate.generate_all(
        requests, model=MODEL, model_id="simulated", log=folder / "log.jsonl", decoding=generate.Decoding(), engine=engine
    )
    return write_jsonl(folder / "data.jsonl", entries)


def stop(count: int, folder: Path) -> dict[str, Any]:
    try:
        generated(count, folder, simulated(count, stop=count // 2))
    except Stopped:
        return {"logged": count // 2}
    raise RuntimeError("not stopped")


def resume(count: int, folder: Path) -> dict[str, Any]:
    return {"logged": generated(count, folder, simulated(count)), "log_mb": (folder / "log.jsonl").stat().st_size / 2**20}


def curate(count: int, folder: Path) -> dict[str, Any]:
    from speed_core.data import curate
    from speed_core.files import stored_jsonl, write_jsonl
    from speed_core.profile import Curate
    from speed_core.study.synthesis_stages import to_records

    rows = to_records(PROFILE, stored_jsonl(folder / "data.jsonl"), planned(count), "senior")
    kept, dropped = curate.curate(rows, Curate(), {})
    curate.write_dataset(folder / "data", kept, title="million", how="Simulated.")
    return {"records": len(rows), "kept": len(kept), "dropped": write_jsonl(folder / "dropped.jsonl", dropped)}


def ray(count: int, folder: Path) -> dict[str, Any]:
    from ray import cloudpickle

    from speed_core.generation.engines import EngineOptions
    from speed_core.generation.ray_engine import RayEngine

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    options = EngineOptions("simulated", workers=2, ray_address="local")
    engine = RayEngine(options, MODEL, opener=lambda *_: simulated(count))
    (folder / "ray").mkdir()
    try:
        rows = generated(count, folder / "ray", engine)
    finally:
        engine.close()
    same = (folder / "ray" / "data.jsonl").read_bytes() == (folder / "data.jsonl").read_bytes() if count <= 100_000 else None
    return {"logged": rows, "data_as_in_one_process": same}


STEPS: dict[str, Callable[[int, Path], dict[str, Any]]] = {"stop": stop, "resume": resume, "curate": curate, "ray": ray}


def measure(step: str, count: int, folder: Path) -> dict[str, Any]:
    import speed_core.study.synthesis_stages  # noqa: F401  what every step holds anyway

    held, start = common.reset_peak("cpu"), time.perf_counter()
    out = STEPS[step](count, folder)
    return {"seconds": time.perf_counter() - start, "start_mb": held, "peak_mb": common.peak_mb("cpu")} | out


def main() -> None:
    args = common.arguments(__doc__ or "")
    rows: list[dict[str, Any]] = []
    for count in (2_000, 20_000) if args.quick else (100_000, 1_000_000):
        folder = Path(tempfile.mkdtemp())
        for step in STEPS:
            row = {"step": step, "requests": count} | common.in_process(measure, step, count, folder, limit_s=7200)
            rows.append(row | ({"under_2_gb": row["peak_mb"] < LIMIT_MB} if row["status"] == "ok" else {}))
            # After each step, so that an interrupted run keeps what it has.
            common.finish("million", args, rows, growth(rows), ("numpy", "ray", "pyarrow"))
        shutil.rmtree(folder)


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By how many bytes a request more raises the peak of each step that was measured at both sizes."""
    by = {(r["step"], r["requests"]): r["peak_mb"] for r in rows if r["status"] == "ok"}
    small, large = min(r["requests"] for r in rows), max(r["requests"] for r in rows)
    return {
        f"{step}_bytes_a_request": (by[step, large] - by[step, small]) * 2**20 / (large - small)
        for step in STEPS
        if small < large and {(step, small), (step, large)} <= set(by)
    }


if __name__ == "__main__":
    main()
