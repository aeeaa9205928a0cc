"""The site: the docs and the executed notebooks of a run as pages that open from a folder. Nothing is executed, nothing is fetched.

    make book PROFILE=tiny     # calls this file in .venv-book; then open book/index.html

The notebooks are those of the run in $SPEED_RUNS or, where there is none, the recorded ones that ship with the repository
(`scripts/record.py` packs them). Pages lie as their files do in the repository, so a link between two files leads to a page.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import nbformat
import typer

from speed_core import profile as profiles
from speed_core.console import user_errors
from speed_core.files import ASSETS, UserError
from speed_core.store.run_context import ROOT, runs_folder
from workbook import pipeline

ARCHIVE = ASSETS / "recorded_notebooks.tar.xz"
SHIPPED = "tiny"  # the profile whose executed notebooks ship
ABOUT = "replay.json"  # what `replay.pack` calls the description in an archive
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
PAGES = ("README.md", "notebooks/README.md", "docs/*.md", "benchmarks/README.md")

Notebooks = dict[str, Any]  # file name: executed notebook


def of_run(folder: Path) -> tuple[dict[str, str], Notebooks]:
    """(what is known of a run, its executed notebooks) of a run folder; raises UserError where a notebook is missing.

    Cells and outputs are as they were executed, but for folders and links (`read`).
    """
    found = {}
    for source in sorted((ROOT / "notebooks").glob("[0-9][0-9]*.ipynb")):
        path = folder / "notebooks" / source.name
        if not path.is_file():
            raise UserError(
                f"book: {source.stem} was not executed in this run; "
                f"python -m speed_core run --profile {folder.name} --from {source.name[:2]}"
            )
        found[source.name] = read(path)
    return about(folder), found


def read(path: Path) -> Any:
    """An executed notebook without the names of this machine's folders; its links lead to where they lead from notebooks/."""
    nb = without_folders(nbformat.read(path, as_version=4))
    nb.metadata.pop("speed_check", None)  # of the cells as they were
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(lambda link: f"]({from_notebooks(link[1])}{link[2] or ''})", cell.source)
    return nb


def about(folder: Path) -> dict[str, str]:
    """{profile, date, device, compute_type, instructions} of a run, by the manifests of what it made."""
    made = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("artifacts/*/manifest.json"))]
    if not made:
        raise UserError(f"book: {folder.name} has notebooks and no artifacts; run them again")
    keys = ("device", "compute_type", "instructions")
    said = {key: ", ".join(sorted({m[key] for m in made if m.get(key)})) or "unknown" for key in keys}
    return {"profile": folder.name, "date": max(m["written"] for m in made)[:10], **said}


def without_folders(nb: Any) -> Any:
    """A notebook without the names of the folders it was executed in, of this repository's and of this user's."""
    written = Path(nb.metadata.get("papermill", {}).get("output_path") or "/")  # RUNS/PROFILE/notebooks/NAME
    text = nbformat.writes(nb)
    for folder, short in ((written.parent.parent.parent, "runs"), (ROOT, "."), (Path.home(), "~")):
        if len(folder.parts) > 1:
            text = text.replace(f"{folder}/", f"{short}/")
    return nbformat.reads(text, as_version=4)


def from_notebooks(link: str) -> str:
    """A link of a notebook that was executed somewhere, as it stands in notebooks/: the end of it that names a file of the repository."""
    parts = PurePosixPath(link).parts
    ends = (PurePosixPath(*parts[k:]) for k in range(len(parts)) if ".." not in parts[k:])
    inside = next((end for end in ends if (ROOT / end).is_file()), None)
    return os.path.relpath(inside, "notebooks") if inside else link


def with_present_text(name: str, executed: Any) -> Any:
    """An executed notebook with the Markdown cells as the repository has them now. Raises UserError where its code is another."""
    own = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    given = [c for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])]
    ran = [c for c in executed.cells if c.cell_type == "code" and c not in given]
    if [c.source for c in ran] != [c.source for c in own.cells if c.cell_type == "code"]:
        raise UserError(f"book: code of {name} was changed since it was executed; run it again with --only {name.split('_')[0]}")
    cells, rest = [], iter(ran)
    for cell in own.cells:
        cells.append(cell if cell.cell_type == "markdown" else next(rest))
        if "parameters" in cell.metadata.get("tags", []):
            cells += given
    return nbformat.from_dict({**executed, "cells": cells})


def packed(notebooks: Notebooks) -> dict[str, bytes]:
    """The notebooks as files of the archive that ships, with the text of the repository: {name: bytes}. `scripts/record.py` writes it."""
    present = {name: with_present_text(name, nb) for name, nb in notebooks.items()}
    return {name: (nbformat.writes(nb) + "\n").encode() for name, nb in present.items()}


def of_archive(path: Path) -> tuple[dict[str, str], Notebooks]:
    """What `of_run` gave when the archive was packed."""
    files = {}
    with tarfile.open(path) as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None
            files[member.name] = stream.read().decode()
    info = json.loads(files.pop(ABOUT))
    return info, {name: nbformat.reads(text, as_version=4) for name, text in files.items()}


def executed(profile: str) -> tuple[dict[str, str], Notebooks]:
    """The notebooks of the run of a profile: of the one that is here or, where it is not whole, of the one that ships."""
    name = profiles.load(profile).name
    ships = name == SHIPPED and ARCHIVE.is_file()
    if (runs_folder() / name / "notebooks").is_dir():
        try:
            return of_run(runs_folder() / name)
        except UserError as error:
            if not ships:
                raise
            print(f"{error}; until then the recorded notebooks are shown")
    if ships:
        return of_archive(ARCHIVE)
    raise UserError(f"book: no run of profile {name} is here; make it with `make reproduce PROFILE={name}`")


def pages() -> list[PurePosixPath]:
    """The text pages of the site, as files of the repository."""
    found = [p for pattern in PAGES for p in sorted(ROOT.glob(pattern))]
    return [PurePosixPath(p.relative_to(ROOT)) for p in found]


def on_site(text: str, page: PurePosixPath, linked: set[PurePosixPath]) -> str:
    """The text of a page with its links as the site has them. Files of the repository that are no pages go into `linked`."""

    def moved(link: re.Match[str]) -> str:
        target = PurePosixPath(os.path.normpath(page.parent / link[1]))
        if target == PurePosixPath("README.md"):
            return f"]({os.path.relpath('index.md', page.parent)}{link[2] or ''})"
        if target.suffix not in (".md", ".ipynb") and (ROOT / target).is_file():
            linked.add(target)
        return link[0]

    return LINK.sub(moved, text)


def first_page(text: str, info: Mapping[str, str], others: Sequence[PurePosixPath], notebooks: Sequence[str]) -> str:
    """README as the first page: a drawing of all stages, which run the outputs are of, and a list of all pages."""
    drawing = pipeline.show("none", info["profile"]).html
    lead, rule, rest = text.partition("\n## ")
    lead = f"{lead.rstrip()}\n\n```{{raw}} html\n{drawing}\n```"
    lists = {"Notebooks": [f"notebooks/{name}" for name in notebooks], "More": [str(p) for p in others]}
    trees = (
        f"```{{toctree}}\n:hidden:\n:caption: {caption}\n" + "\n".join(names) + "\n```\n" for caption, names in lists.items()
    )
    return "\n".join((f"{lead.rstrip()}\n\n```{{note}}\n{of_which_run(info)}\n```", rule.strip() and rule + rest, *trees))


def of_which_run(info: Mapping[str, str]) -> str:
    """Where the outputs on the site come from, in a sentence."""
    return (
        f"What the notebooks print and draw on this site comes from a run at profile `{info['profile']}`, finished on {info['date']} "
        f"on {info['device']} ({info['instructions']}), in {info['compute_type']}."
    )


def lay_out(folder: Path, info: Mapping[str, str], notebooks: Notebooks) -> None:
    """Write everything that Sphinx reads into `folder`."""
    linked: set[PurePosixPath] = set()
    files: dict[PurePosixPath, str] = {}
    for page in pages():
        files[page] = on_site((ROOT / page).read_text(encoding="utf-8"), page, linked)
    for name, nb in notebooks.items():
        page = PurePosixPath("notebooks", name)
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = on_site(cell.source, page, linked)
            elif "solution" in cell.metadata.get("tags", []):  # folded: a reader may want to try first
                cell.metadata["tags"] = [*cell.metadata["tags"], "hide-input"]
        files[page] = nbformat.writes(nb)
    readme = files.pop(PurePosixPath("README.md"))
    others = [page for page in files if page.suffix == ".md"]
    files[PurePosixPath("index.md")] = first_page(readme, info, others, list(notebooks))
    for page, text in files.items():
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text(text, encoding="utf-8")
    for file in linked:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, folder / file)


def build(profile: str, target: Path) -> Path:
    """Build the site into `target`; what is there is replaced if it is a site. Returns its first page."""
    if target.exists() and not (target / "searchindex.js").is_file():
        raise UserError(f"{target}: is there and is no site; name another folder, or remove it")
    info, notebooks = executed(profile)
    if not find_spec("sphinx"):
        raise UserError("book: no Sphinx in this environment; `make book` brings it")
    with tempfile.TemporaryDirectory() as work:
        source, html = Path(work, "source"), Path(work, "html")
        lay_out(source, info, notebooks)
        words = ["-b", "html", "-q", "-W", "--keep-going", "-j", "auto", "-c", str(ROOT / "docs"), "-d", f"{work}/doctrees"]
        footer = f"html_theme_options.extra_footer={of_which_run(info).replace('`', '')}"
        done = subprocess.run([sys.executable, "-m", "sphinx", *words, "-D", footer, str(source), str(html)])
        if done.returncode:
            raise UserError("book: the site was not built; Sphinx says above which pages to mend")
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(html, target)
    return target / "index.html"


def main(
    target: Annotated[Path, typer.Argument(help="folder of the site")] = ROOT / "book",
    profile: Annotated[str, typer.Option(help="smoke, tiny, overnight, workshop, paper, or a .json file")] = SHIPPED,
) -> None:
    """Build the site from the executed notebooks of a run and the docs."""
    print(f"open {build(profile, target)}")


if __name__ == "__main__":
    with user_errors():
        typer.run(main)
