"""MTEB's data sets from a local folder, for rooms without a hub.

The folder ($SPEED_DATA) holds snapshots as FOLDER/ORG/NAME/..., the layout that
    hf download ORG/NAME --repo-type dataset --revision REVISION --local-dir FOLDER/ORG/NAME
writes. A task whose data set has one loads from it, through mteb's own code; the others load from the hub.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants

from speed_core.files import UserError, digest, known_digest
from speed_core.settings import Settings


def prepare(tasks: Sequence[Any]) -> list[Any]:
    """The same tasks; those of mteb read their local snapshot where there is one.

    Raises one UserError for all tasks whose data are neither in the folder nor on a hub in reach, before anything is scored.
    """
    if (folder := Settings().data) and not folder.is_dir():
        raise UserError(f"SPEED_DATA {str(folder)!r}: no such folder; give one with dataset snapshots as ORG/NAME/, or unset it")
    out = [_local(task, folder) for task in tasks]
    missing = {p.metadata.name: hub_path(p) for t in out for p in parts(t) if not _available(p)}
    if missing:
        (name, wanted), *others = missing.items()
        some = f"{', '.join(n for n, _ in others[:5])}{' ...' if len(others) > 5 else ''}"
        more = f" (and {len(others)} more: {some})" if others else ""
        raise UserError(
            f"task {name!r}: its data set {wanted} is not here{more}; set SPEED_ONLINE=1 where a hub can be reached, "
            f"or put a snapshot into {folder or 'a folder'}/{wanted} and set SPEED_DATA to {folder or 'that folder'}"
        )
    return out


def parts(task: Any) -> list[Any]:
    """The tasks that an aggregate (CQADupstack) is the mean of; of any other task, itself."""
    return list(task.tasks) if task.is_aggregate else [task]


def hub_path(task: Any) -> str:
    """ORG/NAME of a task's data set."""
    return str(task.metadata.dataset["path"])


def _of_mteb(task: Any) -> bool:
    return type(task).__module__.startswith("mteb.")


def _with(metadata: Any, **changes: str) -> Any:
    return metadata.model_copy(update={"dataset": {**metadata.dataset, **changes}})


def _local(task: Any, folder: Path | None) -> Any:
    """The task, or for mteb's a copy that loads from its snapshot and says in one line what could not be read."""
    if not _of_mteb(task):
        return task
    task = copy.copy(task)  # a benchmark hands out the same objects each time
    if task.is_aggregate:
        task.tasks = [_local(t, folder) for t in task.tasks]
        task.metadata = task.metadata.model_copy(update={"tasks": task.tasks})
        task.taskname_to_task = {t.metadata.name: t for t in task.tasks}
        return task
    snapshot = folder / hub_path(task) if folder else None
    task.snapshot = snapshot = snapshot if snapshot and snapshot.is_dir() else None
    if snapshot:
        # In a class of its own: mteb drops the metadata of the object when it frees a task's data.
        kind = type(task)
        own = {"metadata": _with(task.metadata, revision=revision(snapshot)), "__module__": kind.__module__}
        task.__class__ = type(kind.__name__, (kind,), own)
        vars(task).pop("metadata", None)
    load = task.load_data

    def load_data(*args: Any, **kwargs: Any) -> None:
        cache = datasets.config.HF_DATASETS_CACHE
        try:
            if snapshot:
                # A cache for each snapshot: datasets 5.2 takes folders of one name for the same data set.
                datasets.config.HF_DATASETS_CACHE = Path(cache) / "snapshots" / task.metadata.revision
                task.metadata = _with(task.metadata, path=str(snapshot))
            load(*args, **kwargs)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            what = f"its snapshot {snapshot}" if snapshot else f"its data set {hub_path(task)}"
            raise UserError(
                f"task {task.metadata.name!r}: {what} could not be read ({type(error).__name__}: {str(error).splitlines()[0][:160]}); "
                "set SPEED_ONLINE=1 where a hub can be reached, or give a whole snapshot as ORG/NAME/ in SPEED_DATA"
            ) from error
        finally:
            if snapshot:
                vars(task).pop("metadata", None)
                datasets.config.HF_DATASETS_CACHE = cache

    task.load_data = load_data
    return task


def _available(task: Any) -> bool:
    """Whether a task's data are here, or a hub may be asked for them."""
    if not _of_mteb(task) or task.snapshot or not datasets.config.HF_HUB_OFFLINE:
        return True
    org, _, name = hub_path(task).partition("/")  # both caches of an earlier, online run
    tables = Path(datasets.config.HF_DATASETS_CACHE) / f"{org}___{name.lower()}"
    return tables.is_dir() or (Path(constants.HF_HUB_CACHE) / f"datasets--{org}--{name}").is_dir()


def revision(snapshot: Path) -> str:
    """The data's name in mteb's result files: the commit that `hf download` noted beside each file, else a digest of the bytes."""
    names = {p: p.relative_to(snapshot) for p in sorted(snapshot.rglob("*")) if p.is_file()}
    names = {p: name for p, name in names.items() if not any(part.startswith(".") for part in name.parts)}
    if not names:
        raise UserError(f"{snapshot}: no files in it; download the data set again")
    notes = snapshot / ".cache" / "huggingface" / "download"
    commits = {_commit(notes / f"{name}.metadata", p) for p, name in names.items()}
    if len(commits) == 1 and (commit := commits.pop()):
        return commit
    return "local-" + digest([[str(name), known_digest(p)] for p, name in names.items()])[:12]


def _commit(note: Path, file: Path) -> str:
    """The commit of a downloaded file; empty when there is none, or when the file was written after the download."""
    if not note.is_file():
        return ""
    commit, _, stamp = (note.read_text(encoding="utf-8").split("\n") + ["", ""])[:3]
    return commit if stamp and file.stat().st_mtime <= float(stamp) + 1 else ""
