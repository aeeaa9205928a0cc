"""Replay: from the request logs alone, the data sets and their figures are rebuilt offline, byte for byte.

`export_logs` writes one archive with the digest of everything in it; `take_in` refuses a damaged one. A run opened
with SPEED_REPLAY=1 answers every request from its log (`generate.replay`) and starts no engine and no training. The
trained generators travel as what is known about them (manifest, training history), without weights; the rubric judge
reads texts with the guide model, which has to be there as in any run.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from speed_core.artifacts import MANIFEST, UserError, file_digest
from speed_core.profile import dotted
from speed_core.run_context import Run

CONTENTS = "replay.json"
XZ = b"\xfd7zXZ\x00"  # how such a file begins
NOTEBOOKS = ("01", "02", "03", "04", "05", "06")
DATA = (
    "tasks", "seeds", "eval-base", "eval-junior", "root", "pairs", "eval-senior", "revised-eval", "revised-twice", "raw", "revised",
    "synthetic", "raw-junior", "revised-junior", "raw-base", "synthetic-jr", "synthetic-jr_re", "synthetic-sr", "synthetic-sr_re",
    "synthetic-base", "synthetic-teacher",
)  # fmt: skip
HISTORY, FOLDERS = "times.jsonl", ("log", "artifacts", "figures")  # what a whole run has
TRAINED = ("junior", "senior", "revisor")
RECORDED = Path(__file__).parent / "assets" / "recorded_run.tar.gz"  # of the run behind the committed figures


def export_logs(run: Run, target: Path) -> str:
    """Write the logs of a run to `target` (.tar.gz); returns the archive's SHA-256. Same logs, same bytes."""
    logs = sorted((run.folder / "log").glob("*.jsonl"))
    if not logs:
        raise UserError(f"export: no log in {run.folder.name}/log; run notebook 01 first")
    contents = {f"log/{p.name}": p.read_bytes() for p in logs}
    made = {name: a.digest for name in DATA if (a := run.store.made(name))}
    for name in TRAINED:
        if trained := run.store.made(name):
            contents |= {f"artifacts/{name}/{f}": trained.file(f).read_bytes() for f in ("training.json", MANIFEST)}
    manifest = {
        "profile": run.profile.name,
        "values": dotted(run.profile),
        "artifacts": made,
        "figures": figures(run),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    }
    return pack(manifest, contents, target)


def _packed(raw: IO[bytes], target: Path) -> Any:
    if target.suffix == ".xz":  # a third of the size where the same rows stand in logs and artifacts
        return lzma.open(raw, "wb")
    return gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="")


def pack(manifest: dict[str, Any], contents: Mapping[str, bytes], target: Path) -> str:
    """Write `manifest` and files as one archive; returns its SHA-256. The manifest names every file and its digest (`files`)."""
    work = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Time stamps would make two exports of the same logs differ.
    with work.open("wb") as raw, _packed(raw, target) as packed:
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, data in {CONTENTS: (json.dumps(manifest, indent=1, default=str) + "\n").encode(), **contents}.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    work.replace(target)
    return file_digest(target)


def read_archive(source: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(manifest, {name: bytes}) of an export, every file checked against its digest."""
    if not source.is_file():
        raise UserError(f"{source}: no such file; give an archive made by `python -m speed_core export`")
    try:
        # All of it, so that the archive's own checksum is compared: tarfile stops reading at the archive's end mark.
        data = source.read_bytes()
        whole = lzma.decompress(data) if data.startswith(XZ) else gzip.decompress(data)
        with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
            found = {m.name: (archive.extractfile(m) or io.BytesIO()).read() for m in archive.getmembers() if m.isfile()}
        manifest = json.loads(found.pop(CONTENTS))
        files = manifest["files"]
    except (tarfile.TarError, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source.name}: not a whole export ({type(error).__name__}); fetch or export it again") from None
    for name, wanted in files.items():
        have = hashlib.sha256(found[name]).hexdigest() if name in found else "nothing"
        if have != wanted:
            raise UserError(
                f"{source.name}: {name} has digest {have[:12]}, its manifest says {wanted[:12]}; fetch or export it again"
            )
    if extra := sorted(set(found) - set(files)):
        raise UserError(f"{source.name}: holds {extra[0]}, which its manifest does not name; fetch or export it again")
    return manifest, found


def figures(run: Run) -> dict[str, str]:
    """{figure: digest of its plotted numbers} of the notebooks that a replay runs."""
    found = sorted(p for p in run.figures.glob("*.json") if p.stem[:2] in NOTEBOOKS)
    return {p.stem: json.loads(p.read_text(encoding="utf-8"))["data_sha256"] for p in found}


def take_in(source: Path, open_for: Callable[[str], Run]) -> tuple[Run, bool]:
    """Check an archive of `export_logs` or `moving.export` and put it into the run folder of its profile; nothing unequal that is
    there is touched. Returns the run, and whether the archive holds all of it."""
    manifest, found = read_archive(source)
    whole = bool(manifest.get("whole"))
    for name in found:
        if not _belongs(Path(name).parts, whole):
            raise UserError(f"{source.name}: {name} would land outside of a run's folders; fetch or export it again")
    run = open_for(manifest["profile"])
    put(run, found)
    return run, whole


def _belongs(parts: tuple[str, ...], whole: bool) -> bool:
    """Does a file of this path belong into a run folder: logs and what is known of the generators, or (`whole`) anything of it?"""
    if ".." in parts:
        return False
    if not whole:
        return parts[0] == "log" or (parts[0] == "artifacts" and len(parts) > 1 and parts[1] in TRAINED)
    own = parts[2:] if parts[0] == "variants" else parts
    return bool(own) and (own[0] in FOLDERS or own == (HISTORY,))


def put(run: Run, found: Mapping[str, bytes]) -> None:
    """Write files into a run folder; refuses all of them when another one of a name is there, and then touches nothing."""
    for name, data in found.items():
        path = run.folder / name
        if path.exists() and path.read_bytes() != data:
            raise UserError(f"{name}: another one is there already; set SPEED_RUNS to an empty folder and import again")
    for name, data in found.items():
        path = run.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        work = path.with_name(path.name + ".part")
        work.write_bytes(data)
        work.replace(path)


def compare(run: Run, source: Path) -> list[tuple[str, str, str]]:
    """(artifact or figure, digest in the export, digest here or "missing") of everything that the export names."""
    manifest, _ = read_archive(source)
    here = {name: a.digest if (a := run.store.made(name)) else "missing" for name in manifest["artifacts"]}
    drawn = figures(run)
    rows = [(name, wanted, here[name]) for name, wanted in manifest["artifacts"].items()]
    return rows + [(name, wanted[:16], drawn.get(name, "missing")[:16]) for name, wanted in manifest["figures"].items()]
