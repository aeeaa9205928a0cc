"""Where a figure comes from: NAME.svg, NAME.csv and NAME.json are written together, and checked against the run.

The record names each input artifact with its digest, and everything that the inputs were made from. A figure is stale
when an input has another digest now, or when something upstream of an input was made again after it.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from speed_core import profile as profiles
from speed_core.files import UserError, canonical, digest, file_digest, write_json
from speed_core.store.artifacts import MANIFEST, Artifact, code_digest, device_name, read_manifest
from speed_core.store.run_context import ROOT, Run


def save(
    run: Run, name: str, figure: Any, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Artifact], files: Sequence[Path] = ()
) -> None:
    """Write the three files. `rows` is what was plotted; `inputs` are the artifacts it was computed from, `files` others of
    this repository (the results of a benchmark).

    The same numbers give the same bytes, and a record that would differ in its date alone is left as it is.
    Raises UserError when there is nothing to plot.
    """
    import matplotlib.pyplot

    folder = run.figures
    if outside := [f for f in files if not f.resolve().is_relative_to(ROOT)]:
        raise UserError(f"figure {name}: {outside[0].name} is not in this repository; draw from a file of it")
    folder.mkdir(parents=True, exist_ok=True)
    svg, data, record = (folder / f"{name}.{ending}" for ending in ("svg", "csv", "json"))
    if not rows:
        raise UserError(f"figure {name}: nothing to plot; run the notebooks before this one")
    with data.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(k for r in rows for k in r)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    # Without a salt of its own matplotlib names clip paths at random, and without None it writes the date.
    with matplotlib.rc_context({"svg.hashsalt": "speed-step-by-step", "svg.fonttype": "none"}):
        figure.savefig(svg, metadata={"Date": None})
    show(figure, alternative_text(figure, name))
    now = Now(run.store.roots)
    keys = {now.key(a): a for a in inputs}
    upstream = {k: d for key in keys for k, d in now.upstream(key)}
    manifests = [
        found[0] for key in (*keys, *upstream) if (found := now.read(key))
    ]  # data sets of an endpoint have no compute type
    new = {
        "figure": name,
        "profile": run.profile.name,
        "overrides": _overrides(run.profile),
        "seed": run.profile.seed,
        "seeds": sorted({s for key in keys for s in now.seeds(key)} or {run.profile.seed}),
        "inputs": {key: a.digest for key, a in keys.items()},
        "upstream": {k: upstream[k] for k in sorted(upstream)},
        "data_sha256": file_digest(data),
        "svg_sha256": file_digest(svg),
        "device": device_name(),
        "compute_types": sorted({m["compute_type"] for m in manifests if "compute_type" in m}),
        "code": code_digest(),
        "files": {f.resolve().relative_to(ROOT).as_posix(): file_digest(f) for f in files},
    }
    old = _record(record) if record.is_file() else None
    if old is None or canonical({k: v for k, v in old.items() if k != "written"}) != canonical(new):
        write_json(record, new | {"written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})


def alternative_text(figure: Any, name: str) -> str:
    """What a figure shows, for those who cannot see it: its titles and axes, and where its numbers are."""
    title = figure.get_suptitle().replace("\n", " ")
    panels = []
    for ax in figure.axes:
        axes = " against ".join(t for t in (ax.get_ylabel(), ax.get_xlabel()) if t)
        if said := ": ".join(t.replace("\n", ", ") for t in (ax.get_title("left") or ax.get_title(), axes) if t):
            panels.append(said)
    return f"Figure {name}. " + ". ".join([title] * bool(title) + panels) + f". Numbers: figures/{name}.csv"


def show(figure: Any, text: str) -> None:
    """Display a figure once, as the cell's output, with its alternative text; outside of a notebook, only close it."""
    import matplotlib.pyplot
    from IPython.core.getipython import get_ipython

    if getattr(get_ipython(), "kernel", None) is not None:
        from IPython.display import display

        png = io.BytesIO()
        figure.savefig(png, format="png")
        data = base64.b64encode(png.getvalue()).decode()
        # As HTML, since neither JupyterLab nor nbconvert gives an image/png output an alternative text.
        picture = f'<img style="max-width: 100%" alt="{escape(text)}" src="data:image/png;base64,{data}">'
        display({"text/html": picture, "text/plain": text}, raw=True)
    matplotlib.pyplot.close(figure)  # an open figure would be drawn once more, at the end of the cell


def _overrides(profile: profiles.Profile) -> dict[str, Any]:
    """Values of a run that its profile's file does not have; of a profile from elsewhere, all values."""
    known = profiles.dotted(profiles.load(profile.name)) if profile.name in profiles.names() else {}
    mine = profiles.dotted(profile.model_copy(update={"sources": {}, "description": ""}))
    unset = {"sources", "description"}
    return {k: v for k, v in mine.items() if k not in unset and (k not in known or known[k] != v)}


CLAIMS = "12_claims"  # the figure of the claim map; claims.csv beside it is the same table

# --- checking -------------------------------------------------------------------------------------


class Now:
    """The artifacts of a run as they are on disk; `roots` are searched in order (a point of a sweep, then its base).

    An artifact has its name as key; one of a sweep's point, read from outside of it, "variants/POINT/NAME". With `deep` digests are taken of the files' bytes, else of what the manifests say.
    """

    def __init__(self, roots: Sequence[Path], deep: bool = False):
        self.roots = [r for r in roots if r.is_dir()]
        self.deep = deep
        self.touched: dict[str, list[str]] = {}  # artifact -> files whose bytes are not those of its manifest
        self._known: dict[str, tuple[dict[str, Any], str] | None] = {}

    def read(self, name: str) -> tuple[dict[str, Any], str] | None:
        """(manifest, digest) of an artifact, or None where the run does not have it."""
        if name not in self._known:
            point, _, own = name.rpartition("/")  # "variants/POINT" or ""
            roots = [self.roots[-1].parent / point / "artifacts"] if point and self.roots else self.roots
            path = next((r / own for r in roots if (r / own / MANIFEST).is_file()), None)
            self._known[name] = None if path is None else self._read(name, path)
        return self._known[name]

    def key(self, artifact: Artifact) -> str:
        """The key of an artifact that a stage handed out; two points of a sweep have artifacts of the same name."""
        root = artifact.path.parent
        point = root.parent.parent.name == "variants" and root not in self.roots
        key = f"variants/{root.parent.name}/{artifact.name}" if point else artifact.name
        self._known[key] = (artifact.manifest, artifact.digest)
        return key

    def _read(self, key: str, path: Path) -> tuple[dict[str, Any], str]:
        manifest = read_manifest((path / MANIFEST).read_bytes(), f"artifact {path.name!r}")
        files = manifest["files"]
        if self.deep:
            # A file that is not here (weights, after an import of logs) was not changed here either.
            now = {f: file_digest(path / f) if (path / f).is_file() else e["sha256"] for f, e in files.items()}
            if touched := [f for f, e in files.items() if e["sha256"] != now[f]]:
                self.touched[key] = touched
            files = {f: {**e, "sha256": now[f]} for f, e in files.items()}
        return manifest, digest(files)[:16]

    def parents(self, name: str) -> Iterator[tuple[str, str, str]]:
        """(parent, its digest when `name` was made from it, its digest now)."""
        found, point = self.read(name), name.rpartition("/")[0]
        for parent, then in (found[0]["parents"] if found else {}).items():
            own = f"{point}/{parent}"
            key = own if point and self.read(own) else parent  # what a point does not have it took from its base
            if now := self.read(key):
                yield key, then, now[1]

    def upstream(self, name: str) -> Iterator[tuple[str, str]]:
        """(key, digest when it was used) of everything that an artifact was made from."""
        for parent, then, _ in self.parents(name):
            yield parent, then
            yield from self.upstream(parent)

    def seeds(self, name: str) -> set[int]:
        """The seed of an artifact, or those of what it was made from: scores have none, but the scored model has."""
        found = self.read(name)
        if found and "seed" in found[0]["parameters"]:
            return {found[0]["parameters"]["seed"]}
        return {s for parent, _, _ in self.parents(name) for s in self.seeds(parent)}

    def cause(self, name: str, then: Mapping[str, str]) -> list[str]:
        """Names from the first artifact upstream that has another digest than `then` down to the parent of `name`."""
        for parent, _, now in self.parents(name):
            if then.get(parent, now) != now:
                return [*self.cause(parent, then), parent]
        return []

    def earlier(self, name: str) -> tuple[str, str, str, str] | None:
        """(child, parent, digest then, digest now) of the nearest artifact upstream that was made again after its child."""
        for parent, then, now in self.parents(name):
            if then != now:
                return name, parent, then, now
        return next((found for parent, _, _ in self.parents(name) if (found := self.earlier(parent))), None)


def roots_of(folder: Path, profile: str, runs: Path) -> list[Path]:
    """Where the artifacts of a folder of figures are: beside it in a run folder, else in `runs`/PROFILE."""
    mine = folder.resolve().parent
    if not (mine / "artifacts").is_dir():
        return [runs / profile / "artifacts"]
    return [mine / "artifacts"] + ([mine.parents[1] / "artifacts"] if mine.parent.name == "variants" else [])


def _record(path: Path) -> dict[str, Any] | None:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return said if isinstance(said, dict) and {"svg_sha256", "data_sha256", "inputs"} <= set(said) else None


def inspect(folder: Path, runs: Path | None = None, deep: bool = False) -> tuple[list[str], list[str]]:
    """(problems, remarks) of the figures in a folder, a line each.

    Problems: a missing companion, a file changed since its record was written, a claims.csv that is not the table of the figure
    `CLAIMS`, and, where `runs` has the artifacts of the figure's profile, an input that moved (the line names it and what made it
    move). Remarks: what was not checked.
    """
    problems: list[str] = []
    remarks: list[str] = []
    homeless: dict[str, int] = {}
    stores: dict[str, Now] = {}
    records = {p.stem for p in folder.glob("*.json") if _record(p)}
    for name in sorted({p.stem for p in folder.glob("*.svg")} | records):
        svg, data, record = (folder / f"{name}.{ending}" for ending in ("svg", "csv", "json"))
        if gone := [p.suffix for p in (svg, data, record) if not p.is_file()]:
            problems.append(f"{name}: no {' or '.join(gone)} beside it; run its notebook again")
            continue
        said = _record(record)
        if said is None:
            problems.append(f"{record.name}: no record of a figure; run its notebook again")
            continue
        for key, path in (("data_sha256", data), ("svg_sha256", svg)):
            if said[key] != file_digest(path):
                problems.append(f"{path.name}: changed since {record.name} was written; run its notebook again")
        if name == CLAIMS and (differs := _claims_differ(folder)):
            problems.append(f"claims.csv: {differs}; run notebook 12 again")
        for file, then in said.get("files", {}).items():
            if not (ROOT / file).is_file() or file_digest(ROOT / file) != then:
                problems.append(f"{name}: stale, {file} moved since it was drawn; run its notebook again")
        if runs is None or not said["inputs"]:
            continue
        now = stores.setdefault(said["profile"], Now(roots_of(folder, said["profile"], runs), deep))
        if not now.roots:
            homeless[said["profile"]] = homeless.get(said["profile"], 0) + 1
            continue
        if missing := [i for i in said["inputs"] if now.read(i) is None]:
            remarks.append(f"{name}: inputs not checked: {', '.join(missing)} not in the run here")
        if why := _stale(said, now):
            problems.append(f"{name}: stale, {why}")
    remarks += [f"inputs not checked: no run here of profile {p} ({count} figures)" for p, count in homeless.items()]
    return problems, remarks


def _claims_differ(folder: Path) -> str:
    """How claims.csv, which has no record of its own, differs from the plotted table of the claim map; empty where it does not."""
    plotted, table = folder / f"{CLAIMS}.csv", folder / "claims.csv"
    if not table.is_file():
        return f"not beside {plotted.name}"
    found = []
    for path in (plotted, table):
        with path.open(newline="", encoding="utf-8") as f:
            found.append(list(csv.DictReader(f)))
    moved = [str((a or b or {}).get("id")) for a, b in itertools.zip_longest(*found) if a != b]
    return f"{', '.join(moved)} not as in {plotted.name}" if moved else ""


def _stale(said: Mapping[str, Any], now: Now) -> str:
    """Why a figure is stale: its first input that moved, with the reason, and the names of the others. Empty when it is not."""
    moved = {}
    for name, then in said["inputs"].items():
        if (found := now.read(name)) is None:
            continue
        if found[1] != then:
            chain = now.cause(name, said.get("upstream", {}))
            because = f" because {' -> '.join(chain)} moved" if chain else ""
            if name in now.touched:
                because = f" because its {', '.join(now.touched[name])} was changed by hand"
            moved[name] = f"input {name} moved ({then[:8]}.. -> {found[1][:8]}..){because}"
        elif behind := now.earlier(name):
            child, parent, old, new = behind
            way = "" if child == name else f" by way of {child}"
            moved[name] = f"input {name} is of an earlier {parent}{way}: {parent} moved ({old[:8]}.. -> {new[:8]}..)"
    if not moved:
        return ""
    first, *others = moved
    return moved[first] + (f"; also {', '.join(others)}" if others else "")
