"""What a stage leaves on disk: an append log while it works, a published artifact when it is done.

Two layers. The log takes one line per finished request with a single write, so a killed process
loses at most the line it was writing; a torn last line is cut off when the log is opened again.
The artifact appears at once: every file is written under a temporary name in the same folder,
synced, renamed, and `manifest.json` is renamed last. A reader sees the old artifact or the new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class UserError(Exception):
    """Bad input. One line: what, which rule, what to do. The command line exits with 2 on it."""


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk, an exhausted quota or a file size limit into one line that says what is kept."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # Weights are written by a library in Rust, whose error is no OSError but quotes the system's.
        if not full and not re.search(r"\(os error (27|28|122)\)", str(error)):
            raise
        raise UserError(
            f"{where.name}: no room to write it ({getattr(error, 'strerror', None) or error}); free some disk, or set SPEED_RUNS to another one, and run "
            "again: what is finished is kept"
        ) from None


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces. The text that digests are taken of."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def digest(value: Any) -> str:
    """SHA-256 (hex) of canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    h = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(1 << 20):
            h.update(piece)
    return h.hexdigest()


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Digest of the package's Python files, so that a manifest says which code made it."""
    root = Path(__file__).parent
    return digest({str(p.relative_to(root)): file_digest(p) for p in sorted(root.rglob("*.py"))})[:16]


def device_name() -> str:
    """The accelerator's name, or the processor's architecture and core count."""
    try:
        import torch

        if torch.cuda.is_available():
            return f"{torch.cuda.get_device_name()} x{torch.cuda.device_count()}"
    except ImportError:
        pass
    return f"cpu {platform.machine()} x{os.cpu_count()}"


def _write_atomic(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n").encode())


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON lines, atomically; returns the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    _write_atomic(path, "".join(line + "\n" for line in lines).encode())
    return len(lines)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines. Splits on newline only: text may hold other line separators (U+2028)."""
    with path.open(encoding="utf-8", newline="\n") as f:
        return [json.loads(line) for line in f if line.strip()]


class AppendLog:
    """Outcomes of one stage, one JSON object a line, keyed by `id`.

    Opening cuts a torn tail (bytes after the last newline, or a last line that is not JSON).
    The last entry of an id wins, so a retried request replaces its earlier outcome.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.entries: dict[str, dict[str, Any]] = {}
        self._recover()
        self._file = path.open("ab", buffering=0)

    def _recover(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        good = 0
        for line in data.splitlines(keepends=True) if b"\r" not in data else _split_newlines(data):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self.entries[entry["id"]] = entry
            except (ValueError, KeyError, TypeError):
                break
            good += len(line)
        if good < len(data):
            with self.path.open("r+b") as f:
                f.truncate(good)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one outcome with a single write call; on a full disk nothing of it stays."""
        line, before = (json.dumps(entry, ensure_ascii=True) + "\n").encode(), self._file.seek(0, os.SEEK_END)
        with disk_errors(self.path):
            try:
                written = self._file.write(line)
                while written < len(line):  # a disk that is nearly full takes a part first, then refuses
                    written += self._file.write(line[written:])
            except OSError:
                self._file.truncate(before)
                raise
        self.entries[entry["id"]] = dict(entry)

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> AppendLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _split_newlines(data: bytes) -> list[bytes]:
    return [piece + b"\n" for piece in data.split(b"\n")[:-1]] + [data.rsplit(b"\n", 1)[-1]]


@dataclass
class Artifact:
    """One published folder: files plus a manifest."""

    path: Path
    manifest: dict[str, Any]
    shipped: bool = False

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def digest(self) -> str:
        """Digest of the contents: the files' digests, not the time or the machine."""
        return digest(self.manifest["files"])[:16]

    def file(self, name: str) -> Path:
        return self.path / name

    def rows(self, name: str = "data.jsonl") -> list[dict[str, Any]]:
        return read_jsonl(self.path / name)

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))


@dataclass
class Draft:
    """A folder being filled; `Store.stage` publishes it when the block ends without an error."""

    path: Path
    info: dict[str, Any] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


def difference(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Named differences of two nested values: ['decoding.temperature 1.0 -> 0.7']."""
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in sorted(set(old) | set(new)):
            out += difference(old.get(key), new.get(key), f"{prefix}{key}.")
        return out
    return [] if canonical(old) == canonical(new) else [f"{prefix.rstrip('.')} {old} -> {new}"]


class Store:
    """Artifacts of one run folder: `root/NAME/` with a manifest each.

    An artifact whose manifest says why it is `partial` (a budget ran out) is handed to later stages only with
    `accept_partial`; without, making it goes on where it stopped. With `replay` an artifact counts although files of
    it are missing: an export carries trained models without their weights. A store over a `base` takes from there what
    is current under its own settings, and makes only what differs: so the points of a sweep share what they have in common.
    """

    def __init__(
        self,
        root: Path,
        shipped: Path | None = None,
        accept_partial: bool = False,
        replay: bool = False,
        base: Store | None = None,
    ):
        self.base = base
        self.root = root
        self.shipped = shipped
        self.accept_partial = accept_partial
        self.replay = replay

    def get(self, name: str) -> Artifact | None:
        """The published artifact `name`, or None. A folder without a manifest, or without one of its files, does not count."""
        artifact = self._read(self.root / name)
        if artifact and not self.replay and not all(artifact.file(f).is_file() for f in artifact.manifest["files"]):
            artifact = None
        return artifact or (self.base.get(name) if self.base else None)

    @staticmethod
    def _read(path: Path, shipped: bool = False) -> Artifact | None:
        manifest = path / MANIFEST
        if not manifest.is_file():
            return None
        return Artifact(path, json.loads(manifest.read_text(encoding="utf-8")), shipped)

    def need(self, name: str) -> Artifact:
        """The artifact `name`, else the small one shipped with the repository, said aloud, else an error."""
        artifact = self.get(name)
        if artifact is not None:
            if (why := artifact.manifest.get("partial")) and not self.accept_partial:
                raise UserError(
                    f"artifact {name!r} is partial: {why}; or set teacher.accept_partial=true to go on with what is there"
                )
            return artifact
        if self.shipped is not None and (artifact := self._read(self.shipped / name, shipped=True)):
            print(f"using shipped upstream {name!r}, digest {artifact.digest}")
            return artifact
        notebook = PRODUCERS.get(name.split("-")[0], "")
        raise UserError(
            f"artifact {name!r}: not in {self.root} and none is shipped; "
            f"run the notebook that writes it first: python -m speed_core run --profile {self.root.parent.name} --only {notebook or 'NN'}"
        )

    def why_stale(self, name: str, parameters: Mapping[str, Any], parents: Iterable[Artifact] = ()) -> str:
        """Empty when the artifact is current, else the one reason why it has to be made again."""
        artifact = self.get(name)
        if artifact is None:
            return "not made yet"
        old = artifact.manifest
        if self.replay and not all(artifact.file(f).is_file() for f in old["files"]):
            return ""  # it came with an export, without weights: nothing here could make it again
        if old.get("partial") and not self.accept_partial:
            return f"partial, {old['partial']}"
        changes = difference(old["parameters"], json.loads(canonical(parameters)))
        changes += difference(old["parents"], {p.name: p.digest for p in parents}, "input.")
        return changes[0] if changes else ""

    @contextmanager
    def stage(self, name: str, parameters: Mapping[str, Any], parents: Iterable[Artifact] = ()) -> Iterator[Draft | None]:
        """Make `name` unless it is current. Yields a Draft to fill, or None when nothing is to be done.

        Nothing of an older artifact is touched until the new one is complete.
        """
        parents = list(parents)
        reason = self.why_stale(name, parameters, parents)
        if not reason:
            yield None
            return
        older = self.get(name)
        print(f"{name}: making it ({reason})", flush=True)
        path = self.root / f".{name}.draft"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        draft, started = Draft(path), time.time()
        with disk_errors(path.with_name(name)):
            yield draft
            if older:  # what `plan` had predicted, to tell how good its predictions are
                draft.info["predicted_seconds"] = older.manifest["seconds"]
            self._publish(name, draft, parameters, parents, started)

    def _publish(
        self, name: str, draft: Draft, parameters: Mapping[str, Any], parents: Sequence[Artifact], started: float
    ) -> None:
        """Write the manifest of a draft and put it in the place of the older artifact."""
        path = draft.path
        files = {
            str(p.relative_to(path)): {"sha256": file_digest(p), "bytes": p.stat().st_size}
            for p in sorted(path.rglob("*"))
            if p.is_file()
        }
        for file_name, entry in files.items():
            if file_name.endswith(".jsonl"):
                entry["rows"] = sum(1 for _ in (path / file_name).open("rb"))
        manifest = {
            "name": name,
            "files": files,
            "parameters": json.loads(canonical(parameters)),
            "parents": {p.name: p.digest for p in parents},
            "code": code_digest(),
            "device": device_name(),
            "seconds": round(time.time() - started, 1),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),  # of the process so far
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **draft.info,
        }
        write_json(path / MANIFEST, manifest)
        target, old = self.root / name, self.root / f".{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(path, target)
        shutil.rmtree(old, ignore_errors=True)

    def recover(self) -> None:
        """Put back an artifact whose replacement was killed between its two renames."""
        for old in self.root.glob(".*.old"):
            target = self.root / old.name[1:-4]
            if not target.exists():
                os.replace(old, target)


# Which notebook writes which artifact; used in messages only.
PRODUCERS = {
    "tasks": "01",
    "seeds": "02",
    "junior": "03",
    "root": "04",
    "pairs": "04",
    "senior": "04",
    "revisions": "05",
    "revisor": "05",
    "synthetic": "06",
    "embedder": "08",
    "scores": "09",
    "contamination": "09",
    "raw": "06",
    "revised": "06",
    "eval": "03",
    "mask": "07",
    "student": "07",
    "guided": "07",
    "scaling": "11",
    "second": "05",
    "hard": "10",
    "study": "10",
}
