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
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

from speed_core.data import curate
from speed_core.files import ASSETS, NAME, TarInput, UserError, disk_errors, file_digest, inside, stream_digest
from speed_core.profile import dotted
from speed_core.store.artifacts import MANIFEST, notebook_number
from speed_core.store.run_context import Run
from speed_core.study import synthesis_stages  # noqa: F401 - it declares the stages of notebooks 01 to 06
from speed_core.study.stage import rebuilt, trained_generators

CONTENTS = "replay.json"
XZ = b"\xfd7zXZ\x00"  # how such a file begins
NOTEBOOKS = ("01", "02", "03", "04", "05", "06")  # which make nothing but data sets and their generators
# An export has some thousand files, and xz makes its rows 20 to 60 times smaller.
MOST_NAMES, MOST_RATIO, LEAST_ROOM, MOST_CONTENTS = 100_000, 200, 2**28, 2**25
HISTORY, FOLDERS = "times.jsonl", ("log", "artifacts", "figures")  # what a whole run has
RECORDED = ASSETS / "recorded_run.tar.gz"  # of the run behind the committed figures


def export_logs(run: Run, target: Path) -> str:
    """Write the logs of a run to `target` (.tar.gz); returns the archive's SHA-256. Same logs, same bytes."""
    logs = sorted((run.folder / "log").glob("*.jsonl"))
    if not logs:
        raise UserError(f"export: no log in {run.folder.name}/log; run notebook 01 first")
    contents = {f"log/{p.name}": p.read_bytes() for p in logs}
    made = {name: a.digest for name in rebuilt(run) if (a := run.store.made(name))}
    for name in trained_generators():
        if trained := run.store.made(name):
            contents |= {f"artifacts/{name}/{f}": trained.file(f).read_bytes() for f in ("training.json", MANIFEST)}
    return pack_run(run, contents, target, artifacts=made, figures=figures(run))


def pack_run(run: Run, contents: Mapping[str, bytes], target: Path, **more: Any) -> str:
    """Write files of a run as an archive, with its profile and `more` in the manifest; returns its SHA-256."""
    files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    return pack({"profile": run.profile.name, "values": dotted(run.profile), **more, "files": files}, contents, target)


def _packed(raw: IO[bytes], target: Path) -> Any:
    if target.suffix == ".xz":  # a third of the size where the same rows stand in logs and artifacts
        return lzma.open(raw, "wb")
    return gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="")


def pack(manifest: dict[str, Any], contents: Mapping[str, bytes], target: Path) -> str:
    """Write `manifest` and files as one archive; returns its SHA-256. The manifest names every file and its digest (`files`)."""
    if target.is_dir():
        raise UserError(f"{target}: a folder; name the file to write, for instance {target / 'run.tar.gz'}")
    work = target.with_name(target.name + ".part")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Time stamps would make two exports of the same logs differ.
        with disk_errors(target), work.open("wb") as raw, _packed(raw, target) as packed:
            with tarfile.open(fileobj=packed, mode="w") as archive:
                for name, data in {CONTENTS: (json.dumps(manifest, indent=1, default=str) + "\n").encode(), **contents}.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
        work.replace(target)
    finally:
        work.unlink(missing_ok=True)
    return file_digest(target)


def members(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, stream) of each file of an archive, one after the other, so that memory does not grow with them. Raises UserError for a
    name that is none, and where an archive is far larger unpacked than packed."""
    room = max(LEAST_ROOM, MOST_RATIO * source.stat().st_size)
    with source.open("rb") as raw:
        packed: Any = lzma.open(raw) if raw.read(len(XZ)) == XZ else gzip.GzipFile(fileobj=raw)
        raw.seek(0)
        limited = TarInput(packed)
        with packed, tarfile.open(fileobj=limited, mode="r|") as archive:  # type: ignore[call-overload]
            seen: set[str] = set()
            folders: set[str] = set()
            for number, m in enumerate(archive):
                limited.begins(m)
                if m.isdir() and number < MOST_NAMES:
                    continue
                if (
                    not m.isfile()
                    or not inside(m.name)
                    or m.name in seen
                    or m.name in folders
                    or seen & (within := {str(p) for p in PurePosixPath(m.name).parents})
                    or number + len(folders) + len(within) >= MOST_NAMES
                ):
                    raise UserError(
                        f"{source.name}: {m.name[:80]!r} is no plain file with a name of its own; fetch or export it again"
                    )
                if (room := room - m.size) < 0:
                    raise UserError(
                        f"{source.name}: unpacked it is more than {MOST_RATIO} times as large, which no export is; do not use this copy"
                    )
                seen.add(m.name)
                folders |= within
                stream = archive.extractfile(m)
                assert stream is not None
                yield m.name, stream
            while packed.read(1 << 20):  # to its end, where the archive's own checksum stands
                pass


def check_archive(source: Path) -> dict[str, Any]:
    """The manifest of an export, every file of which was checked against its digest."""
    if not source.is_file():
        raise UserError(f"{source}: no such file; give an archive made by `python -m speed_core export`")
    have: dict[str, str] = {}
    manifest: Any = None
    try:
        for name, stream in members(source):
            if name == CONTENTS:
                manifest = json.loads(stream.read(MOST_CONTENTS))
            else:
                have[name] = stream_digest(stream)
        files = manifest["files"]
        if not all(isinstance(v, str) for v in [manifest["profile"], *files.values()]):
            raise TypeError
        name_of = manifest["profile"]
        if not re.fullmatch(NAME, name_of) or name_of.endswith(".json"):  # a profile's file is no name of one
            raise ValueError
        known = [manifest[k] for k in ("artifacts", "figures")] if not manifest.get("whole") else []
        if not all(inside(name) and isinstance(digest, str) for part in known for name, digest in part.items()):
            raise TypeError
    except (
        tarfile.TarError, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
    ) as error:  # fmt: skip
        raise UserError(f"{source.name}: not a whole export ({type(error).__name__}); fetch or export it again") from None
    for name, wanted in files.items():
        if have.get(name) != wanted:
            raise UserError(
                f"{source.name}: {name} has digest {have.get(name, 'nothing')[:12]}, its manifest says {wanted[:12]}; "
                "fetch or export it again"
            )
    if extra := sorted(set(have) - set(files)):
        raise UserError(f"{source.name}: holds {extra[0]}, which its manifest does not name; fetch or export it again")
    return dict(manifest)


def figures(run: Run) -> dict[str, str]:
    """{figure: digest of its plotted numbers} of the notebooks that a replay runs."""
    found = sorted(p for p in run.figures.glob("*.json") if notebook_number(p) in NOTEBOOKS)
    try:
        return {p.stem: json.loads(p.read_text(encoding="utf-8"))["data_sha256"] for p in found}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"figures of {run.folder.name}: a record cannot be read ({type(error).__name__}); run the notebooks again"
        ) from None


def take_in(source: Path, open_for: Callable[[str], Run]) -> tuple[Run, bool]:
    """Check an archive of `export_logs` or `run_archive.export` and put it into the run folder of its profile; nothing unequal that is
    there is touched. Returns the run, and whether the archive holds all of it."""
    manifest = check_archive(source)
    whole = bool(manifest.get("whole"))
    for name in manifest["files"]:
        if not _belongs(Path(name).parts, whole):
            raise UserError(f"{source.name}: {name} would land outside of a run's folders; fetch or export it again")
    run = open_for(manifest["profile"])
    put(run, source, manifest["files"])
    return run, whole


def _belongs(parts: tuple[str, ...], whole: bool) -> bool:
    """Does a file of this path belong into a run folder: logs and what is known of the generators, or (`whole`) anything of it?"""
    if ".." in parts:
        return False
    if not whole:
        return parts[0] == "log" or (parts[0] == "artifacts" and len(parts) > 1 and parts[1] in trained_generators())
    own = parts[2:] if parts[0] == "variants" else parts
    return bool(own) and (own[0] in FOLDERS or own == (HISTORY,))


def put(run: Run, source: Path, files: Mapping[str, str]) -> None:
    """Write the files of a checked archive {name: SHA-256} into a run folder; refuses all of them when another one of a name is there,
    and then touches nothing. What a full or read-only disk refuses leaves no half a file."""
    for name, wanted in files.items():
        path = run.folder / name
        if path.is_dir() or any(p.is_file() for p in path.parents) or (path.is_file() and file_digest(path) != wanted):
            raise UserError(f"{name}: another one is there already; set SPEED_RUNS to an empty folder and import again")
    for name, stream in members(source):
        if name == CONTENTS or (run.folder / name).is_file():
            continue
        path = run.folder / name
        work = path.with_name(path.name + ".part")
        try:
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with work.open("wb") as f:
                    shutil.copyfileobj(stream, f)
                work.replace(path)
        finally:
            if work.is_file():
                work.unlink()


def compare(run: Run, source: Path) -> list[tuple[str, str, str]]:
    """(artifact or figure, digest in the export, digest here or "missing") of everything that the export names."""
    manifest = check_archive(source)
    here = {name: a.digest if (a := run.store.made(name)) else "missing" for name in manifest["artifacts"]}
    for name, wanted in manifest["artifacts"].items():
        a = run.store.made(name)
        if a and a.digest != wanted and "train.jsonl" in a.manifest["files"]:
            here[name] = curate.earlier_digest(a)
    drawn = figures(run)
    rows = [(name, wanted, here[name]) for name, wanted in manifest["artifacts"].items()]
    return rows + [(name, wanted[:16], drawn.get(name, "missing")[:16]) for name, wanted in manifest["figures"].items()]
