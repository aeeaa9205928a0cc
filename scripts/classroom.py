"""The students' copy of the notebooks: solution cells give way to their stubs, everything else stays as it is.

    python scripts/classroom.py [FOLDER] [--force]              # no solutions; default: classroom/
    python scripts/classroom.py lab --folded --keep             # what `make lab` does

A cell tagged `solution` carries its stub in its metadata, under speed.stub. With --folded each solution follows the checker of its
exercise, closed until somebody clicks on it. The copy lies in a folder beside notebooks/, so that the pictures in the prose
(../figures/...) are found from there too.
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


def folded_solution(cell: Any) -> Any:
    """A Markdown cell with the code of a solution cell, closed until somebody clicks on it."""
    text = f"<details><summary>Solution</summary>\n\n```python\n{cell.source}\n```\n\n</details>"
    return nbformat.v4.new_markdown_cell(text, id=f"{cell.id}-solution")


def student_copy(source: Path, *, folded: bool = False) -> Any:
    """The notebook `source` with a stub in place of every solution, and no stub left in the metadata.

    With `folded` each solution stands closed behind the checker of its exercise.
    """
    nb = nbformat.read(source, as_version=4)
    solutions, checkers = tagged(nb, "solution"), tagged(nb, "checker")
    if len(solutions) != len(checkers):
        raise UserError(f"{source.name}: {len(solutions)} solutions and {len(checkers)} checkers; each exercise needs both")
    for number, (cell, checker) in enumerate(zip(solutions, checkers, strict=True), 1):
        if folded:
            nb.cells.insert(nb.cells.index(checker) + 1, folded_solution(cell))
        stub = cell.metadata.pop("speed", {}).get("stub", "")
        if "..." not in stub:
            raise UserError(f"{source.name}: solution {number} has no stub; put one with three dots into metadata.speed.stub")
        cell.source, cell.outputs, cell.execution_count = stub, [], None
        cell.metadata["tags"] = ["exercise" if t == "solution" else t for t in cell.metadata["tags"]]
    return nb


def write(
    target: Path | None = None, *, force: bool = False, folded: bool = False, keep: bool = False, folder: Path | None = None
) -> list[Path]:
    """Write the students' copies into `target` (default: classroom/ in the checkout); returns their paths.

    A copy that somebody has worked in is overwritten only with `force`. With `keep` every file that is there stays as it is, and
    only the missing ones are written. `folded` as in `student_copy`.
    """
    target = target or ROOT / "classroom"
    sources = notebooks(folder or ROOT / "notebooks")
    copies = {target / p.name: nbformat.writes(student_copy(p, folded=folded)) + "\n" for p in sources}
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: a file of that name is there; name a folder")
    changed = [p.name for p, text in copies.items() if p.is_file() and p.read_text(encoding="utf-8") != text]
    if changed and not force and not keep:
        raise UserError(
            f"{target / changed[0]}: somebody worked in it (and {len(changed) - 1} more); name a new folder, or --force"
        )
    target.mkdir(parents=True, exist_ok=True)
    for path, text in copies.items():
        if not (keep and path.exists()):
            path.write_text(text, encoding="utf-8")
    return list(copies)


def main(
    target: Annotated[Path | None, typer.Argument(help="folder beside notebooks/; default: classroom")] = None,
    force: Annotated[bool, typer.Option(help="overwrite copies that somebody worked in")] = False,
    folded: Annotated[
        bool, typer.Option("--folded", help="keep each solution, closed, behind the checker of its exercise")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="leave every copy that is there as it is; write the missing ones")] = False,
) -> None:
    """Write the students' copy of the notebooks: exercises and checkers stay, solutions go, or are folded."""
    if force and keep:
        raise UserError("--force overwrites what is there and --keep leaves it; give one of them")
    written = write(target, force=force, folded=folded, keep=keep)
    folder = written[0].parent
    print(f"{len(written)} notebooks in {folder}")
    if folder.resolve().parent != ROOT:
        print("their pictures are ../figures: put the folder into the checkout, or a copy of figures/ beside it")


if __name__ == "__main__":
    with user_errors():
        typer.run(main)
