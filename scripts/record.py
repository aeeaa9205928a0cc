"""Take a finished run into the package: its logs, what each stage took, the data sets that a fresh clone starts on, and of `tiny` the
executed notebooks, from which a fresh clone builds the site.

python scripts/record.py --profile overnight     # after `python -m speed_core run --profile overnight`
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

import book
import captions
from speed_core.console import user_errors
from speed_core.files import UserError
from speed_core.runner import notebook, recorded, replay
from speed_core.store.artifacts import MANIFEST
from speed_core.store.run_context import CARRIED, OFFICIAL, ROOT, Run
from speed_core.study import forecast, planning
from speed_core.study.runs import open_run

CARRIED_NOT = ("scores-student-", "scores-scale")  # read by the notebook that made them only


def carry(run: Run, target: Path = CARRIED) -> list[str]:
    """Put a run's data sets and scores (no weights) into the package, so that a fresh clone can start anywhere with them."""
    folder = target / run.profile.name
    found = {n: a for n, a in recorded.data_and_scores(run.store).items() if not n.startswith(CARRIED_NOT)}
    shutil.rmtree(folder, ignore_errors=True)
    for name, artifact in found.items():
        for f in (*artifact.manifest["files"], MANIFEST):
            (folder / name / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.file(f), folder / name / f)
    return sorted(found)


def before_the_run(profile: str) -> dict[str, Any]:
    """{name: notebook 00} as a run begins with it, executed in an empty run folder: afterwards its plan says that all is current."""
    (source,) = notebook.choose(ROOT / "notebooks", ["0"])
    with tempfile.TemporaryDirectory() as runs, notebook.environment(SPEED_RUNS=runs, SPEED_SHIPPED=runs):
        target = Path(runs, profile, "notebooks", source.name)
        report = notebook.execute(source, target, {"profile": profile}, show=False)
        if not report.ok:
            raise UserError(f"record: {source.stem}: {report.detail}")
        return {source.name: book.read(target)}


def main(profile: Annotated[str, typer.Option(help="smoke, tiny, overnight, workshop, paper, or a .json file")] = "tiny") -> None:
    """Take a finished run into the package. Of a profile that the package does not carry, only the times are kept."""
    run = open_run(profile)
    entry = planning.record(run)
    print(f"{forecast.RECORDED.name}: {len(entry['artifacts'])} stages, {entry['device']} ({entry['cpu']}), {entry['date']}")
    if (CARRIED / run.profile.name).is_dir():
        carried, known = carry(run), recorded.write(run)
        print(f"assets/shipped/{profile}: {len(carried)} artifacts, values and verdicts in {known.name}")
    if profile == book.SHIPPED:
        info, notebooks = book.of_run(run.folder)
        notebooks |= before_the_run(profile)
        print(f"{book.ARCHIVE.name}: sha256 {replay.pack(info, book.packed(notebooks), book.ARCHIVE)}")
    if profile == OFFICIAL:
        print(f"{replay.RECORDED.name}: sha256 {replay.export_logs(run, replay.RECORDED)}")
        print(f"notebooks: {captions.write()} sentences under figures changed")


if __name__ == "__main__":
    with user_errors():
        typer.run(main)
