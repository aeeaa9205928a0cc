"""What a stage leaves on disk: an append log while it works (`files.AppendLog`), a published artifact when it is done.

The artifact appears at once: every file is written under a temporary name in the same folder,
synced, renamed, and `manifest.json` is renamed last. A reader sees the old artifact or the new one.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from speed_core import machine
from speed_core.files import (
    PACKAGE,
    Lazy,
    MissingArtifact,
    OtherPrompts,
    UserError,
    canonical,
    digest,
    disk_errors,
    file_digest,
    file_lock,
    inside,
    known_digest,
    read_jsonl,
    stored_jsonl,
    write_json,
)

MANIFEST = "manifest.json"


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Digest of the package's Python files, so that a manifest says which code made it."""
    return digest({str(p.relative_to(PACKAGE)): file_digest(p) for p in sorted(PACKAGE.rglob("*.py"))})[:16]


def device_name() -> str:
    """The accelerator's name, or the processor's architecture and core count."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x{torch.cuda.device_count()}"
    return f"cpu {platform.machine()} x{os.cpu_count()}"


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

    @property
    def seconds(self) -> float:
        """Seconds of the machine that making it took: where several stages ran at a time, its share of them."""
        return round(self.manifest["seconds"] / self.manifest.get("beside", 1), 1)

    def file(self, name: str) -> Path:
        """The path of one file. Raises UserError where it is not what the manifest says: its size is compared each time, its digest
        once in a process."""
        path, wanted = self.path / name, self.manifest["files"].get(name)
        if wanted and path.is_file():
            found, said = f"{path.stat().st_size:,} bytes", f"{wanted['bytes']:,} bytes"
            if found == said:
                found, said = (f"digest {d[:12]}" for d in (known_digest(path), wanted["sha256"]))
            if found != said:
                kind, out = "shipped artifact", "unpack the bundle again"
                if not self.shipped:
                    kind, out = "artifact", "it changed after it was written: import it again, or remove "
                    out += f"{self._place}/{self.name} and run again"
                raise UserError(f"{kind} {self.name!r}: {name} has {found}, its manifest says {said}; {out}")
        return path

    @property
    def _place(self) -> Path:
        return Path(*self.path.parts[-3:-1])

    def lost(self) -> list[str]:
        """The files that the manifest names and that are not here."""
        return [f for f in self.manifest["files"] if not (self.path / f).is_file()]

    def complete(self) -> bool:
        """Are all files there that the manifest names, those aside that stayed on another machine (`moving`)?"""
        return set(self.lost()) <= set(self.manifest.get("elsewhere", ()))

    def weights(self) -> Path:
        """The folder of a trained model. Raises UserError where its weights stayed on the machine that trained it."""
        if lost := self.lost():
            raise UserError(
                f"artifact {self.name!r} came without its weights ({lost[0]}), which are to be read now; remove its folder in "
                f"{self._place} and run again: it is trained anew, and what was made "
                "from it stays if the digest is the same"
            )
        for name in self.manifest["files"]:
            self.file(name)
        return self.path

    def changes(self, parameters: Mapping[str, Any], parents: Iterable[Artifact]) -> list[Difference]:
        """What was otherwise when it was made: decoding.temperature 1.0 -> 0.7, input.seeds 4c6c -> 99fe."""
        return self.other_parameters(parameters) + differences(
            self.manifest["parents"], {p.name: p.digest for p in parents}, "input."
        )

    def other_parameters(self, asked: Mapping[str, Any]) -> list[Difference]:
        """The parameters with which it was made otherwise than `asked`."""
        return differences(*self._with_types(json.loads(canonical(asked))))

    def _with_types(self, asked: dict[str, Any]) -> tuple[Any, Any]:
        """(own parameters, `asked`), with compute types to compare: `auto` takes an artifact of any type, as it takes one of any
        device; a type that is asked for has to be the one that the artifact was computed in."""
        own = json.loads(canonical(self.manifest["parameters"]))
        for mine, wanted in ((own, asked), (own.get("training", {}), asked.get("training", {}))):
            mine.pop("save_steps", None)  # earlier manifests say when checkpoints were written
            if wanted.get("dtype", "auto") == "auto":
                mine.pop("dtype", None)
                wanted.pop("dtype", None)
            elif mine.get("dtype") == "auto":
                mine["dtype"] = self.manifest.get("compute_type", "auto")
        return own, asked

    def rows(self, name: str = "data.jsonl") -> list[dict[str, Any]]:
        return read_jsonl(self.file(name))

    def stored(self, name: str = "data.jsonl") -> Lazy[dict[str, Any]]:
        """The same rows, left on the disk until each is read."""
        return stored_jsonl(self.file(name))

    def json(self, name: str) -> Any:
        return json.loads(self.file(name).read_text(encoding="utf-8"))


def read_manifest(data: bytes, what: str) -> dict[str, Any]:
    """The manifest of an artifact, whoever wrote it. Raises UserError for another shape, and for a name of a file outside of it."""
    try:
        found = json.loads(data)
        files, parts = found["files"], [found[k] for k in ("parameters", "parents", "files")]
        good = all(isinstance(p, dict) for p in parts) and isinstance(found["seconds"], (int, float))
        good = good and all(isinstance(f["sha256"], str) and isinstance(f["bytes"], int) for f in files.values())
        good = good and isinstance(found.get("elsewhere", []), list) and found.get("beside", 1) > 0
    except (ValueError, TypeError, KeyError, RecursionError):
        good = False
    if not good:
        raise UserError(
            f"{what}: its {MANIFEST} is no manifest; import the run again, or remove the artifact's folder and make it anew"
        )
    outside = [f for f in [*files, *found.get("elsewhere", ())] if not inside(f) or f == MANIFEST]
    if outside:
        raise UserError(f"{what}: its {MANIFEST} names {outside[0]!r}, which is no file inside of it; do not use this copy")
    return dict(found)


@dataclass
class Draft:
    """A folder being filled; `Store.stage` publishes it when the block ends without an error."""

    path: Path
    info: dict[str, Any] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


@dataclass(frozen=True)
class Difference:
    """One value that an artifact was made with and that is another one now, by its dotted name; `of`: an artifact further upstream."""

    where: str
    then: Any
    now: Any
    of: str = ""

    def __str__(self) -> str:
        return self.text(" -> ")

    def text(self, between: str) -> str:
        then, now = (text if len(text) <= 80 else f"{text[:77]}..." for text in (str(self.then), str(self.now)))
        return f"{f'{self.of}: ' if self.of else ''}{self.where} {then}{between}{now}"  # a digest is shown whole


def differences(old: Any, new: Any, prefix: str = "") -> list[Difference]:
    """Named differences of two nested values."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for k in sorted(set(old) | set(new)) for d in differences(old.get(k), new.get(k), f"{prefix}{k}.")]
    return [] if canonical(old) == canonical(new) else [Difference(prefix.rstrip("."), old, new)]


@dataclass(frozen=True)
class Catalog:
    """What a store is told about stages: `notebook` gives the number of the one that makes an artifact (empty: none of this run),
    `differences` what a shipped artifact, or one that it was made from, was made with that this run would do otherwise."""

    notebook: Callable[[str], str] = lambda name: ""
    differences: Callable[[Artifact], Sequence[Difference]] = lambda artifact: ()


@dataclass(eq=False)
class Store:
    """Artifacts of one run: `FOLDER/NAME/` with a manifest each, looked for in the run's own folder, then in that of the `base` run
    (of a sweep, whose points so share what they have in common), then in `shipped`. Only the first is written to.

    An artifact whose manifest says why it is `partial` (a budget ran out) is handed to later stages only with
    `accept_partial`; without, making it goes on where it stopped. With `replay` an artifact counts although files of
    it are missing: an export carries trained models without their weights.

    What somebody else made (`shipped`) is used where this run made nothing, and that is printed, with the first value that it was
    made with otherwise; it is refused where it answers other prompts. A stage of the open notebook never counts as done because
    a shipped artifact of its name is there; one of an earlier notebook does, when it is exactly what this run would make.
    """

    root: Path
    shipped: Path | None = None
    accept_partial: bool = False
    replay: bool = False
    base: Path | None = None
    catalog: Catalog = Catalog()
    quiet: bool = False  # for somebody who only looks: nothing is printed

    def __post_init__(self) -> None:
        self.roots = list(dict.fromkeys([self.root, self.base or self.root]))
        self._checked: dict[str, Sequence[Difference]] = {}  # shipped artifacts that were checked and said

    def silent(self) -> Store:
        """The same artifacts for somebody who only looks: nothing is printed, and nothing refused for what it was made with."""
        return replace(self, accept_partial=True, catalog=Catalog(self.catalog.notebook), quiet=True)

    def made(self, name: str) -> Artifact | None:
        """The artifact `name` that this run or its base made, or None. One that lacks a file does not count."""
        for root in self.roots:
            artifact = self._read(root / name)
            if artifact and (self.replay or artifact.complete()):
                return artifact
        return None

    def get(self, name: str) -> Artifact | None:
        """The artifact `name` of this run, else the shipped one, else None."""
        return self.made(name) or self._from_shipped(name)

    @staticmethod
    def _read(path: Path, shipped: bool = False) -> Artifact | None:
        manifest = path / MANIFEST
        if not manifest.is_file():
            return None
        return Artifact(path, read_manifest(manifest.read_bytes(), f"artifact {path.name!r}"), shipped)

    def _from_shipped(self, name: str, joined: bool = False) -> Artifact | None:
        artifact = self._read(self.shipped / name, shipped=True) if self.shipped else None
        if artifact is None or artifact.lost():
            return None
        first = name not in self._checked
        if first:
            for file in artifact.manifest["files"]:
                artifact.file(file)
            self._checked[name] = self.catalog.differences(artifact)
        # Its rows answer prompts that this run does not have, so nothing later could be joined to them.
        if joined and any(d.where == "prompts" and not d.of for d in self._checked[name]):
            raise OtherPrompts(
                f"shipped artifact {name!r} answers other prompts than this run's; run the notebook that writes it: "
                f"{self._way_out(name)}, or leave topics, seeds and synthesis as the profile has them"
            )
        if first and not self.quiet:
            self._say(artifact, self._checked[name])
        return artifact

    def _say(self, artifact: Artifact, found: Sequence[Difference]) -> None:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        first = "".join(d.text(", this run says ") for d in found[:1])
        note = "; made with " + re.sub(r"\b([0-9a-f]{8})[0-9a-f]{8,}\b", r"\1", first) + more if first else ""
        print(f"using shipped upstream {artifact.name!r}, digest {artifact.digest}{note}", flush=True)

    def _way_out(self, name: str) -> str:
        profile = self.roots[-1].parent.name
        return f"python -m speed_core run --profile {profile} --only {self.catalog.notebook(name) or 'NN'}"

    def need(self, name: str) -> Artifact:
        """The artifact `name` of this run, else the shipped one, else an error that names the ways out."""
        artifact = self.made(name) or self._from_shipped(name, joined=True)
        if artifact is None:
            raise MissingArtifact(
                name,
                f"artifact {name!r}: not in {self.root} and none is shipped; run the notebook that writes it first: "
                f"{self._way_out(name)}, or unpack an offline bundle and set SPEED_SHIPPED to its folder shipped/",
            )
        if (why := artifact.manifest.get("partial")) and not self.accept_partial:
            raise UserError(
                f"artifact {name!r} is partial: {why}; or set teacher.accept_partial=true to go on with what is there"
            )
        return artifact

    def why_stale(self, name: str, parameters: Mapping[str, Any], parents: Iterable[Artifact] = ()) -> str:
        """Empty when the artifact that this run made is current, else the one reason why it has to be made again."""
        artifact = self.made(name)
        if artifact is None:
            return "not made yet"
        if self.replay and artifact.lost():
            return ""  # it came with an export, without weights: nothing here could make it again
        if artifact.manifest.get("partial") and not self.accept_partial:
            return f"partial, {artifact.manifest['partial']}"
        changes = artifact.changes(parameters, parents)
        return str(changes[0]) if changes else ""

    @contextmanager
    def stage(self, name: str, parameters: Mapping[str, Any], parents: Iterable[Artifact] = ()) -> Iterator[Draft | None]:
        """Make `name` unless it is current. Yields a Draft to fill, or None when nothing is to be done.

        Nothing of an older artifact is touched until the new one is complete.
        """
        parents = list(parents)
        reason = self.why_stale(name, parameters, parents)
        if not reason or self._made_upstream(name, parameters, parents):
            yield None
            return
        older = self.made(name)
        path = self.root / f".{name}.draft"
        busy = f"{name}: another process is making it in this folder; wait until it has, or set SPEED_RUNS to a new folder"
        with file_lock(self.root / f".{name}.lock", busy), disk_errors(path.with_name(name)):
            print(f"{name}: making it ({reason})", flush=True)
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            draft, started = Draft(path), time.time()
            try:
                yield draft
                if older:  # what `plan` had predicted, to tell how good its predictions are
                    draft.info["predicted_seconds"] = older.seconds
                self._publish(name, draft, parameters, parents, started)
            finally:
                shutil.rmtree(path, ignore_errors=True)  # half of a stage is of no use

    def _made_upstream(self, name: str, parameters: Mapping[str, Any], parents: Sequence[Artifact]) -> bool:
        if self.made(name) or not self.shipped or not (self.shipped / name).is_dir():
            return False
        if not "" < self.catalog.notebook(name) < open_notebook():  # asked last: it lists every stage of the run
            return False
        artifact = self._from_shipped(name)
        return artifact is not None and not artifact.manifest.get("partial") and not artifact.changes(parameters, parents)

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
        beside = int(os.environ.get("SPEED_BESIDE", "1"))  # how many stages ran at a time (`runner.parallel`)
        manifest = {
            "name": name,
            "files": files,
            "parameters": json.loads(canonical(parameters)),
            "parents": {p.name: p.digest for p in parents},
            "code": code_digest(),
            "device": device_name(),
            "seconds": round(time.time() - started, 1),
            **({"beside": beside} if beside > 1 else {}),
            "peak_mb": round(machine.peak_mb()),  # of the process so far
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


def open_notebook() -> str:
    """Number of the notebook that this process executes ("08"), empty where none is known.

    `notebook.execute` names it in SPEED_NOTEBOOK, Jupyter's server in JPY_SESSION_NAME.
    """
    path = os.environ.get("SPEED_NOTEBOOK") or os.environ.get("JPY_SESSION_NAME", "")
    return notebook_number(path)


def notebook_number(path: str | os.PathLike[str]) -> str:
    """Number of a notebook by its file: "08" of 08_embedding_model.ipynb, "07b" of 07b_...; empty where the name begins otherwise."""
    found = re.match(r"\d\d[a-z]?(?=_)", Path(path).name)
    return found.group() if found else ""
