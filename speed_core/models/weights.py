"""Which weights a model has: digests that name them, and the folders of the cache that are made from them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from speed_core.files import UserError, cache_dir, digest, file_digest, file_lock, write_atomically

COMPLETE = "complete.json"  # written last into a folder of the cache
# What a configuration says of its files, and not of the model.
OF_FILES = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype")


def digest_of(file: Path) -> str:
    """SHA-256 of a file's bytes, remembered in the cache by path, size and time of change; empty when there is no such file."""
    if not file.is_file():
        return ""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    memo = cache_dir() / "digests" / key
    if memo.is_file():
        return memo.read_text()
    value = file_digest(file)
    write_atomically(memo, value.encode())
    return value


def weights_id(folder: str | Path) -> str:
    """Short digest that names the weights in a local folder; a hub id names itself."""
    path = Path(folder)
    if not path.is_dir():
        return str(folder)
    h = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]):
        h.update(digest_of(file).encode())
    return h.hexdigest()[:16]


def _given_path(name: str) -> Path:
    """The folder that a name may stand for; `NAME[:12]` is a model of the first 12 layers."""
    return Path(re.sub(r"\[:\d+\]$", "", name)).expanduser()


def settings_id(name: str) -> str:
    """What decides a model beside the weights that `weights_id` reads: "-" and a digest of the configuration, the tokenizer, the
    pooling and the weights of further modules in a user's own folder.

    Empty for a package's model, a hub id and a folder of the cache: their name or their weights say it.
    """
    path = _given_path(name)
    if not path.is_dir() or (path / COMPLETE).is_file():
        return ""
    try:
        listed = json.loads((path / "modules.json").read_text(encoding="utf-8")) if (path / "modules.json").is_file() else []
        # A module without settings has an empty folder, which neither packages nor git keep.
        folders = [path, *(path / m["path"] for m in listed if m["path"] and (path / m["path"]).is_dir())]
        files = [p for folder in folders for p in sorted(folder.iterdir()) if p.is_file() and _decides(p, path)]
        return "-" + digest({str(p.relative_to(path)): digest_of(p) for p in files})[:8]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model {name!r}: its files cannot be read ({type(error).__name__}: {error}); give a whole model folder"
        ) from None


def _decides(file: Path, folder: Path) -> bool:
    """Does a file of a model's folder say how texts become numbers? `weights_id` reads the weights at the top."""
    if file.name.lower().startswith(("readme", "license")) or file.name in ("base.json", "trainer_state.json", "training.json"):
        return False
    further_weights = file.parent != folder and file.suffix in (".safetensors", ".bin")
    return further_weights or file.suffix in (".json", ".txt", ".model", ".jinja")


def named(name: str) -> str:
    """A name that stands for one model: a folder's with the digests of what is in it."""
    path = _given_path(name)
    return f"{name}@{weights_id(path)}{settings_id(name)}" if path.is_dir() else name


def broken_weights(folder: str | Path) -> Path | None:
    """The first weights file of a folder that is shorter or longer than its own header says; None when all are whole."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return file
    return None


def cached_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """The folder `target` of the cache; `fill` writes it unless it is complete. Processes wait for each other."""
    if (target / COMPLETE).is_file():
        return target
    with file_lock(target.with_suffix(".lock")):
        if not (target / COMPLETE).is_file():
            work = target.with_name(target.name + ".part")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            fill(work)
            (work / COMPLETE).write_text(json.dumps({"made": time.time()}))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(work, target)
    return target
