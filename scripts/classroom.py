"""The students' copy of the notebooks: solution cells give way to their stubs, everything else stays as it is.

    python scripts/classroom.py [FOLDER] [--force]     # default: classroom/

A cell tagged `solution` carries its stub in its metadata, under speed.stub. The copy lies in a folder beside
notebooks/, so that the pictures in the prose (../figures/...) are found from there too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import nbformat
import typer

from speed_core.console import user_errors
from speed_core.files import UserError
from speed_core.runner.notebook import notebooks
from speed_core.store.run_context import ROOT


def tagged(nb: Any, tag: str) -> list[Any]:
    """The code cells of a notebook with a tag: solution or checker."""
    return [c for c in nb.cells if c.cell_type == "code" and tag in c.metadata.get("tags", [])]


def student_copy(source: Path) -> Any:
    """The notebook `source` with a stub in place of every solution, and no stub left in the metadata."""
    nb = nbformat.read(source, as_version=4)
    for number, cell in enumerate(tagged(nb, "solution"), 1):
        stub = cell.metadata.pop("speed", {}).get("stub", "")
        if "..." not in stub:
            raise UserError(f"{source.name}: solution {number} has no stub; put one with three dots into metadata.speed.stub")
        cell.source, cell.outputs, cell.execution_count = stub, [], None
        cell.metadata["tags"] = ["exercise" if t == "solution" else t for t in cell.metadata["tags"]]
    return nb


def write(target: Path | None = None, *, force: bool = False, folder: Path | None = None) -> list[Path]:
    """Write the students' copies into `target` (default: classroom/ in the checkout).

    A copy that somebody has worked in is overwritten only with `force`.
    """
    target = target or ROOT / "classroom"
    copies = {target / p.name: nbformat.writes(student_copy(p)) + "\n" for p in notebooks(folder or ROOT / "notebooks")}
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: a file of that name is there; name a folder")
    changed = [p.name for p, text in copies.items() if p.is_file() and p.read_text(encoding="utf-8") != text]
    if changed and not force:
        raise UserError(
            f"{target / changed[0]}: somebody worked in it (and {len(changed) - 1} more); name a new folder, or --force"
        )
    target.mkdir(parents=True, exist_ok=True)
    for path, text in copies.items():
        path.write_text(text, encoding="utf-8")
    return list(copies)


def main(
    target: Annotated[Path | None, typer.Argument(help="folder beside notebooks/; default: classroom")] = None,
    force: Annotated[bool, typer.Option(help="overwrite copies that somebody worked in")] = False,
) -> None:
    """Write the students' copy of the notebooks: exercises and checkers stay, solutions do not."""
    written = write(target, force=force)
    folder = written[0].parent
    print(f"{len(written)} notebooks in {folder}")
    if folder.resolve().parent != ROOT:
        print("their pictures are ../figures: put the folder into the checkout, or a copy of figures/ beside it")


if __name__ == "__main__":
    with user_errors():
        typer.run(main)
