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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from speed_core.settings import BUNDLED, PACKAGE, Settings

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


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, never meets half of it. Its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    write_atomically(
        path, (json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n").encode("utf-8", "backslashreplace")
    )


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON lines, atomically; returns the number of rows."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_atomically(
        path, "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")
    )  # as JSON escapes half a pair
    return len(lines)


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
        self.entries: dict[str, dict[str, Any]] = {}
        self._recover()
        self._file = path.open("ab", buffering=0)

    def _recover(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        good, damaged = [], []
        *lines, tail = data.split(b"\n")
        for number, line in enumerate([*lines, tail], 1):
            if not line.strip():
                continue
            try:
                entry = _checked(line, self.needs)
            except (ValueError, RecursionError) as error:
                if number <= len(lines) or not _is_torn(line, error):
                    damaged.append((number, line, error))
                continue
            self.entries[entry["id"]] = entry
            good.append(line + b"\n")
        if damaged:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            with disk_errors(aside), aside.open("ab") as f:
                f.writelines(line + b"\n" for _, line, _ in damaged)
            number, _, why = damaged[0]
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            print(
                f"{self.path.name}: line {number}{more} cannot be read ({why}); moved to {aside.name}, the other {len(good)} count",
                flush=True,
            )
        if (whole := b"".join(good)) != data:
            with disk_errors(self.path):
                write_atomically(self.path, whole)

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
        self.entries[entry["id"]] = dict(entry)

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
