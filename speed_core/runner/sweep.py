"""Many runs of the same notebooks: seeds and grids of values, each point in a folder of its own, several at once.

A point of a sweep is a store over the profile's own run (`artifacts.Store`, `base`): what is current there under the
point's settings is taken, the rest is made in the point's folder. One generation so serves many trainings.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_core import machine
from speed_core.files import UserError, digest, without_users
from speed_core.runner import notebook
from speed_core.store.artifacts import Store
from speed_core.store.run_context import ROOT
from speed_core.study.runs import open_run

EXECUTORS = ("process", "ray")


@dataclass(frozen=True)
class Point:
    """One run of a sweep: `name` is its folder, `overrides` its values, `seed` its training and sampling seed."""

    name: str
    overrides: dict[str, Any]
    seed: int | None


def folder_name(text: str) -> str:
    """A point's name as every file system takes it; of a long one the beginning, and a digest of the whole."""
    name = re.sub(r"[^A-Za-z0-9.,=_-]+", "_", text)
    return name if len(name) <= 120 else f"{name[:100]}-{digest(text)[:12]}"


def points(grid: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> list[Point]:
    """Every combination of the values and seeds; {"embedding.margin": [0.05, 0.1]} and (0, 1) give four points."""
    out = []
    for values in itertools.product(*grid.values()):
        for seed in seeds or (None,):
            overrides = without_users(dict(zip(grid, values, strict=True)))
            varied = {k: v for k, v in overrides.items() if len(grid[k]) > 1} | ({"seed": seed} if len(seeds) > 1 else {})
            name = ",".join(f"{k}={v}" for k, v in varied.items())
            out.append(Point(folder_name(name), overrides, seed))
    if len({p.name for p in out}) != len(out):
        raise UserError("sweep: two points have the same name; give every value once")
    return out


def command(profile: str, point: Point, only: Sequence[str], start: str, cell_timeout: int | None = None) -> list[str]:
    """The command line that runs one point."""
    out = [sys.executable, "-m", "speed_core", "run", "--profile", profile]
    for name, value in point.overrides.items():
        out += ["--set", f"{name}={json.dumps(value)}"]
    out += ["--seed", str(point.seed)] if point.seed is not None else []
    out += ["--only", ",".join(only)] if only else []
    out += ["--from", start] if start else []
    return out + (["--cell-timeout", str(cell_timeout)] if cell_timeout else [])


def run_point(
    words: Sequence[str],
    name: str,
    log: str,
    given: Mapping[str, str] | None = None,
    running: list[subprocess.Popen[bytes]] | None = None,
) -> int:
    """Run one point to its end with its output in `log`; returns the exit code. A failure is printed when it happens.

    `given`: environment variables beside this process's own. Its process is put into `running`.
    """
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | dict(given or {}) | {"SPEED_VARIANT": name}
    with (
        open(log, "w", encoding="utf-8") as out,
        subprocess.Popen(words, cwd=ROOT, env=environment, stdout=out, stderr=out) as one,
    ):
        if running is not None:
            running.append(one)
        code = one.wait()
    if code:  # said at once: the other points know nothing of this one, and go on for hours
        last = Path(log).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        print(f"{name}: failed ({code}): {''.join(last)[:300]}", flush=True)
    return code


def threads(jobs: int) -> dict[str, str]:
    """The environment in which `jobs` points share this machine's cores: without it each would take all of them, and they slow
    each other down several times over."""
    if jobs == 1:
        return {}
    shared = {"OMP_NUM_THREADS": str(max(1, machine.cores() // jobs))}
    shared["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else every vLLM binds to the same cores
    shared["SPEED_WORKERS"] = "1"  # all points see the same free memory, so no notebook takes more processes of it
    return {k: v for k, v in shared.items() if k not in os.environ}


def _in_processes(work: Sequence[tuple[list[str], str, str]], jobs: int) -> list[int]:
    """Exit codes of the points, `jobs` at a time. SIGTERM and Ctrl-C end those that run, and no other is begun."""
    running: list[subprocess.Popen[bytes]] = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_point, *w, threads(min(jobs, len(work))), running) for w in work]
        try:
            return [f.result() for f in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for one in running:
                one.terminate()  # each keeps what it has and shuts its kernel down, then the pool's threads end
            raise


def run_points(
    profile: str,
    todo: Sequence[Point],
    *,
    only: Sequence[str] = (),
    start: str = "",
    jobs: int = 1,
    executor: str = "process",
    cell_timeout: int | None = None,
) -> list[tuple[Point, int]]:
    """Run the given points, `jobs` at a time; returns each with its exit code, in order, and prints one table.

    `executor` "ray" hands the points to a Ray cluster whose machines share this folder. Points that are finished
    are found current; killed and started again, a sweep goes on from its artifacts.
    """
    if not todo:
        return []
    if executor not in EXECUTORS:
        raise UserError(f"--executor {executor!r}: unknown; use {' or '.join(EXECUTORS)}")
    notebook.choose(ROOT / "notebooks", only, start)
    runs = [open_run(profile, p.overrides, p.seed) for p in todo]  # a bad value is refused before anything runs
    folder = runs[0].folder
    work = [(command(profile, p, only, start, cell_timeout), p.name, str(folder / "variants" / p.name / "run.log")) for p in todo]
    print(f"{len(todo)} runs, {jobs} at a time; logs in {folder.name}/variants/*/run.log", flush=True)
    codes = _with_ray(work, jobs) if executor == "ray" else _in_processes(work, jobs)
    done = list(zip(todo, codes, strict=True))
    table(done, folder)
    return done


def _with_ray(work: Sequence[tuple[list[str], str, str]], jobs: int) -> list[int]:
    import ray

    from speed_core.generation.ray_engine import connect

    owned = connect()
    # What a point needs elsewhere: this project's settings, the hub's, the teacher's key.
    passed_on = {k: v for k, v in os.environ.items() if k.startswith(("SPEED_", "HF_")) or k == "OPENAI_API_KEY"}
    try:
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)) // jobs)
        remote: Any = ray.remote(num_cpus=cores, max_retries=2)(run_point)  # a machine that goes away: the point runs elsewhere
        return ray.get([remote.remote(*w, passed_on) for w in work])
    finally:
        if owned:
            ray.shutdown()


def scores(folder: Path) -> dict[str, float]:
    """Mean score over tasks (times 100) of every scored model in a run folder."""
    from speed_core.evaluation import evaluate

    store = Store(folder / "artifacts")
    made = [a for p in sorted(store.root.glob("scores-*")) if (a := store.made(p.name))]
    return {a.name.removeprefix("scores-"): evaluate.category_means(a.json("scores.json"))["Avg"] for a in made}


def table(done: Sequence[tuple[Point, int]], folder: Path) -> None:
    """One table of all points (printed, and kept as variants/sweep.csv): status and the mean scores that each made."""
    from rich.console import Console
    from rich.table import Table

    rows = []
    for p, code in done:
        made = scores(folder / "variants" / p.name)
        rows.append(
            {"run": p.name, "status": "ok" if code == 0 else f"failed ({code})"} | {k: round(v, 2) for k, v in made.items()}
        )
    columns = list(dict.fromkeys(k for r in rows for k in r))
    shown = Table(title="sweep; scores made here, mean over tasks")
    for c in columns:
        shown.add_column(c)
    for r in rows:
        shown.add_row(*(str(r.get(c, "")) for c in columns))
    Console(width=max(110, 12 * len(columns))).print(shown)
    with (folder / "variants" / "sweep.csv").open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)
