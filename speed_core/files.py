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
import tarfile
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, TypeVar, overload

from speed_core.settings import BUNDLED, PACKAGE, Settings

T = TypeVar("T")
ASSETS = PACKAGE / "assets"
HEADERS, HEADER = 2**20, 2**12  # bytes of a tar's names and records, and so many more for each member


class UserError(Exception):
    """Bad input. One line: what, which rule, what to do. The command line exits with 2 on it."""


class OtherPrompts(UserError):
    """An input answers other prompts than this run's, so nothing can be joined to it."""


class MissingArtifact(UserError):
    """The artifact `name` is neither made nor shipped."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


@contextmanager
def disk_errors(where: Path | None = None) -> Iterator[None]:
    """Turn a full or read-only disk, an exhausted quota, a file size limit or a place that no file can have into one line that says
    what is kept.

    `where`: what is being written, where the system's error does not name it.
    """
    try:
        yield
    except Exception as error:
        named = where or Path(str(getattr(error, "filename", None) or "a file"))
        code, why = (error.errno, (error.strerror or "").lower()) if isinstance(error, OSError) else (None, str(error))
        if code in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise UserError(
                f"{named}: cannot be read or written ({why}); choose a folder that is yours, for runs with SPEED_RUNS"
            ) from None
        # Weights are written by a library in Rust, whose error is no OSError but quotes the system's.
        if code not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and not re.search(r"\(os error (27|28|122)\)", str(error)):
            raise
        raise UserError(
            f"{named.name}: no room to write it ({why}); free some disk, or set SPEED_RUNS to another one, and run again: what is "
            "finished is kept"
        ) from None


@contextmanager
def file_lock(path: Path, busy: str = "") -> Iterator[None]:
    """Let one process in at a time. Another one waits or, where `busy` is given, is refused with that message (UserError).

    A lock that a killed process left does not count, and a file system without locks locks nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError:
            pass
        try:
            yield
        finally:
            if busy:  # nobody waits for this file, so it can go
                path.unlink(missing_ok=True)


def cache_dir() -> Path:
    """Folder for converted weights: $SPEED_CACHE, else cache/ of an unpacked bundle, else the user's cache folder."""
    if folder := Settings().cache:
        return folder
    if BUNDLED.is_dir():
        return BUNDLED
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "speed-step-by-step"


class Lazy(Sequence[T]):
    """A sequence whose items are made each time they are read, as `make(key)` for each of `keys`; a slice is one too.

    A million requests or records are held as keys of a few bytes each.
    """

    def __init__(self, make: Callable[[Any], T], keys: Sequence[Any]):
        self.make, self.keys = make, keys

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Lazy[T]: ...
    def __getitem__(self, at: int | slice) -> T | Lazy[T]:
        return Lazy(self.make, self.keys[at]) if isinstance(at, slice) else self.make(self.keys[at])

    def __iter__(self) -> Iterator[T]:
        return map(self.make, self.keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def where(self, test: Callable[[T], bool]) -> Lazy[T]:
        """The items that pass `test`."""
        return Lazy(self.make, [key for key in self.keys if test(self.make(key))])


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces. The text that digests are taken of."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def digest(value: Any) -> str:
    """SHA-256 (hex) of canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    with path.open("rb") as f:
        return stream_digest(f)


def known_digest(path: Path) -> str:
    """`file_digest`, taken once in a process as long as the file keeps its size and time."""
    there = path.stat()
    return _digest_of(path, there.st_mtime_ns, there.st_size)


@lru_cache(maxsize=4096)
def _digest_of(path: Path, when: int, size: int) -> str:
    return file_digest(path)


class TarInput:
    """What tarfile reads an archive from (mode "r|"). tarfile takes a member's header into memory whole and keeps it, however long the
    archive says it is: headers of more than a megabyte, and 4 KB more for each member, raise ReadError."""

    def __init__(self, stream: IO[bytes]):
        self.stream, self.left = stream, HEADERS

    def read(self, count: int) -> bytes:
        self.left -= count
        if self.left < 0:
            raise tarfile.ReadError("headers of more than a megabyte")
        return self.stream.read(count)

    def begins(self, member: tarfile.TarInfo) -> None:
        """Its contents come next, then another header."""
        self.left += member.size + HEADER


def stream_digest(stream: IO[bytes]) -> str:
    """SHA-256 (hex) of what is left of a stream, read in pieces."""
    h = hashlib.sha256()
    while piece := stream.read(1 << 20):
        h.update(piece)
    return h.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file so that a reader, or a crash, never meets half of it. Its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """`data` as a whole file, see `atomic_file`."""
    with atomic_file(path) as f:
        f.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n"
    write_atomically(path, text.encode("utf-8", "backslashreplace"))  # as JSON escapes half a pair


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON lines, one at a time and atomically; returns the number of rows."""
    count = 0
    with atomic_file(path) as f:
        for row in rows:
            count += 1
            f.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
    return count


def read_text(path: Path) -> str:
    """The text of a file that somebody else wrote: UTF-8, with or without a byte order mark.

    Raises UserError that names another encoding, or what keeps the file from being read.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        why = getattr(error, "strerror", None) or "no such name"
        raise UserError(f"{path.name!r}: {why.lower()}; give a file that can be read") from None
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    if marked or b"\0" in data[:1000]:
        raise UserError(f"{path.name}: written as UTF-16{'' if marked else ', or no text at all'}; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path.name}: line {line} is no UTF-8 (byte {data[error.start]:#04x}, as Latin-1 has it); save the file as UTF-8"
        ) from None


def surrogate(text: str) -> bool:
    """Does `text` hold half of a UTF-16 pair, which no file can hold?"""
    return bool(re.search("[\ud800-\udfff]", text))


NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of a profile, or of a task in one's own texts: they become names of files
NAME_RULE = "letters, digits, '.', '_' and '-', at most 64 of them, a letter or digit first"
USERS = "SPEED_URL_USERS"  # an environment variable: {address: user} as JSON, for this process and those that it starts


def without_user(url: str) -> str:
    """An address without its "user:key@", so that no file and no output shows it; `with_user` puts it back to send it."""
    found = re.fullmatch(r"(?i)(https?://)([^/?#]+)@([^@/?#]+)(.*)", url)
    if not found:
        return url
    plain = f"{found[1]}{found[3]}{found[4]}"
    os.environ[USERS] = json.dumps(json.loads(os.environ.get(USERS, "{}")) | {plain: found[2]})
    return plain


def with_user(url: str) -> str:
    """The address with what `without_user` took off."""
    user = json.loads(os.environ.get(USERS, "{}")).get(url)
    return url.replace("//", f"//{user}@", 1) if user else url


def without_users(value: Any) -> Any:
    """`without_user` of every address in nested values."""
    if isinstance(value, str):
        return without_user(value)
    if isinstance(value, dict):
        return {k: without_users(v) for k, v in value.items()}
    return [without_users(v) for v in value] if isinstance(value, (list, tuple)) else value


def inside(name: object) -> bool:
    """Is `name` a relative path, with / between its parts, that stays in the folder it is put into?"""
    if not isinstance(name, str) or not 0 < len(name) <= 1000 or surrogate(name) or re.search(r"[\x00-\x1f\x7f\\]", name):
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= 200 for part in name.split("/"))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines. Splits on newline only: text may hold other line separators (U+2028)."""
    with path.open(encoding="utf-8", newline="\n") as f:
        return [json.loads(line) for line in f if line.strip()]


def _line_at(file: IO[bytes], place: int) -> dict[str, Any]:
    file.seek(place)
    row: dict[str, Any] = json.loads(file.readline())
    return row


def stored_jsonl(path: Path) -> Lazy[dict[str, Any]]:
    """The rows of `read_jsonl`, each read from the file when it is asked for: 8 bytes of memory a row."""
    file, places, place = path.open("rb"), array("q"), 0
    for line in file:
        if line.strip():
            places.append(place)
        place += len(line)
    return Lazy(partial(_line_at, file), places)


def spooled(rows: Iterable[Mapping[str, Any]]) -> Lazy[dict[str, Any]]:
    """Rows moved out of memory, into a file without a name in the folder for temporary files (TMPDIR)."""
    file, places = tempfile.TemporaryFile(), array("q")
    for row in rows:
        places.append(file.tell())
        file.write((json.dumps(row) + "\n").encode())
    return Lazy(partial(_line_at, file), places)


class Entries(Mapping[str, dict[str, Any]]):
    """The entries of a log by id. Memory holds where each one begins (`places`); it is read when it is asked for."""

    def __init__(self, path: Path, places: dict[str, int]):
        self.places, self._file = places, path.open("rb")

    def __getitem__(self, key: str) -> dict[str, Any]:
        entry = _line_at(self._file, self.places[key])
        entry.pop("check", None)
        return entry

    def __contains__(self, key: object) -> bool:
        return key in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class AppendLog:
    """Outcomes of one stage, one JSON object a line, keyed by `id`; the last entry of an id wins, so a retried request replaces its
    earlier outcome.

    Each line carries a checksum of its entry under "check". Opening cuts the half line that a killed process left at the end. Any
    other line that cannot be read, or lacks a field of `needs`, moves into `NAME.damaged` beside the log and is named; every other
    entry counts.
    """

    def __init__(self, path: Path, needs: Sequence[str] = ()):
        self.path, self.needs = path, needs
        path.parent.mkdir(parents=True, exist_ok=True)
        places = self._recover()
        self._file = path.open("ab", buffering=0)
        self.entries = Entries(path, places)

    def _recover(self) -> dict[str, int]:
        """Where each entry begins, once the log holds entries alone."""
        places: dict[str, int] = {}
        if not self.path.exists():
            return places
        damaged, dropped, place, line = [], set(), 0, b"\n"
        with self.path.open("rb") as f:
            for number, line in enumerate(f, 1):
                try:
                    key = _checked(line, self.needs)["id"] if line.strip() else None
                except (ValueError, RecursionError) as error:
                    key = None
                    if line.endswith(b"\n") or not _is_torn(line, error):
                        damaged.append((number, line.rstrip(b"\n"), error))
                if key is None:
                    dropped.add(number)
                else:
                    places[key] = place
                    place += len(line)
        if damaged:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            with disk_errors(aside), aside.open("ab") as f:
                f.writelines(text + b"\n" for _, text, _ in damaged)
            first, _, why = damaged[0]
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            print(
                f"{self.path.name}: line {first}{more} cannot be read ({why}); moved to {aside.name}, the other "
                f"{number - len(dropped)} count",
                flush=True,
            )
        if dropped or not line.endswith(b"\n"):
            with disk_errors(self.path), self.path.open("rb") as old, atomic_file(self.path) as new:
                new.writelines(text.rstrip(b"\n") + b"\n" for i, text in enumerate(old, 1) if i not in dropped)
        return places

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one outcome with a single write call; on a full disk nothing of it stays."""
        checked = {**entry, "check": _check(entry)}
        line, before = (json.dumps(checked, ensure_ascii=True) + "\n").encode(), self._file.seek(0, os.SEEK_END)
        with disk_errors(self.path):
            try:
                written = self._file.write(line)
                while written < len(line):  # a disk that is nearly full takes a part first, then refuses
                    written += self._file.write(line[written:])
            except OSError:
                self._file.truncate(before)
                raise
        self.entries.places[entry["id"]] = before

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> AppendLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _check(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:12]


class _NoEntry(ValueError):
    """A line that is JSON and no entry of the log."""


def _is_torn(line: bytes, error: Exception) -> bool:
    """Is the last line of a log the beginning of an entry, which was being written when the process ended?"""
    whole = isinstance(error, _NoEntry) or getattr(error, "msg", "") == "Extra data"
    return not whole and line.startswith(b"{") and line.isascii() and not line.rstrip().endswith(b"}")


def _checked(line: bytes, needs: Sequence[str]) -> dict[str, Any]:
    """The entry of one line of a log, or ValueError that says what is wrong. A log of an earlier version has no checksums."""
    entry = json.loads(line)
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        raise _NoEntry("no object with an id")
    check = entry.pop("check", None)
    if check not in (None, _check(entry)):
        raise _NoEntry("its text is not what was written")
    if lacking := [name for name in needs if name not in entry]:
        raise _NoEntry(f"no {lacking[0]!r} in it")
    return entry
