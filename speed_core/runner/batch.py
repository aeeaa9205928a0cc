"""Run the numbered notebooks of a profile in order, and say what became of each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from speed_core.runner import recorded
from speed_core.runner.notebook import Report, Status, check_parameters, choose, execute, plain
from speed_core.store.run_context import ROOT, Run
from speed_core.study.runs import open_run


def run_all(
    profile: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    seed: int | None = None,
    only: Sequence[str] = (),
    start: str = "",
    cell_timeout: int | None = None,
) -> list[Report]:
    """Run the numbered notebooks at a profile, in order, up to the first failure; prints one table at the end."""
    run = open_run(profile, dict(overrides or {}), seed)  # refuses a bad profile or parameter
    chosen = choose(ROOT / "notebooks", only, start)
    given = {"profile": profile, "overrides": dict(overrides or {})} | ({"seed": seed} if seed is not None else {})
    for path in chosen:
        check_parameters(path, given)
    reports: list[Report] = []
    for number, path in enumerate(chosen, 1):
        print(f"\n[{number}/{len(chosen)}] {path.stem}", flush=True)
        report = execute(path, run.folder / "notebooks" / path.name, given, cell_timeout=cell_timeout)
        reports.append(report)
        line = {"notebook": path.stem, "status": report.status, "seconds": round(report.seconds, 1), "detail": report.detail}
        with (run.folder / "times.jsonl").open("a") as f:
            f.write(json.dumps(line | {"written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}) + "\n")
        if not report.ok:
            break
    table(reports, [p.stem for p in chosen], run.figures)
    if not only and not start and all(r.ok for r in reports):
        _compare(run)
    return reports


def _compare(run: Run) -> None:
    """Print how a whole run compares with the recorded one. The run has succeeded by now, whatever happens here."""
    try:
        report = recorded.report(run)
    except Exception as error:  # an archive that is damaged, a full disk, a manifest of another version
        report = f"not compared with the recorded run: {type(error).__name__}: {plain(str(error))}"
    if report:
        print(report, flush=True)


def table(reports: Sequence[Report], wanted: Sequence[str], figures: Path) -> None:
    """One table of notebooks and the list of figures."""
    t = Table(title="notebooks")
    for column in ("notebook", "status", "time", "detail"):
        t.add_column(column)
    by_name = {r.name: r for r in reports}
    for name in wanted:
        r = by_name.get(name, Report(name, Status.NOT_RUN))
        t.add_row(name, r.status, f"{r.seconds / 60:.1f} min" if r.seconds else "", r.detail)
    t.add_row("all", "", f"{sum(r.seconds for r in reports) / 60:.1f} min", "")
    console = Console(width=110)
    console.print(t)
    drawn = ", ".join(sorted(p.name for p in figures.glob("*.svg")))
    console.print(f"figures in {os.path.relpath(figures)}: {drawn}", soft_wrap=True)
