"""The lower layer of what a stage leaves on disk: digests, files that appear at once, and the append log.

The log takes one line per finished request with a single write, so a killed process loses at most the line it was
writing; a torn last line is cut off when the log is opened again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


@contextmanager
def alone(lock: Path, name: str) -> Iterator[None]:
    """Refuse to make `name` while another process does; a lock that a killed process left counts for nothing."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{name}: another process is making it in this folder; wait until it has, or set SPEED_RUNS to a new folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """One process at a time (two notebooks may ask for the same conversion)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


BUNDLED = Path(__file__).resolve().parent.parent / "cache"  # where an offline bundle unpacks weights


def cache_dir() -> Path:
    """Folder for converted weights: $SPEED_CACHE, else cache/ of an unpacked bundle, else the user's cache folder."""
    if os.environ.get("SPEED_CACHE"):
        return Path(os.environ["SPEED_CACHE"]).expanduser()
    if BUNDLED.is_dir():
        return BUNDLED
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "speed-step-by-step"


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
