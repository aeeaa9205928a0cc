"""A run goes on on another machine, finished or not: one archive without the many models that were trained only to be scored.

Data sets, scores, logs, figures and the three generators travel. An embedding model or a student has done its work once it is
scored: its manifest travels without the weights (`elsewhere`), and whoever needs these after all is told (`Artifact.weights`).
A model that some stage still has to read is left behind whole, so it is trained again there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path

from speed_core.files import UserError, digest
from speed_core.runner.replay import HISTORY, pack_run
from speed_core.store.artifacts import MANIFEST, Artifact, Store, read_manifest
from speed_core.store.run_context import Run
from speed_core.study import embedding_stages, planning
from speed_core.study.stage import trained_generators

WEIGHTS = (".safetensors", ".bin", ".pt")


def whole_artifacts(store: Store) -> dict[str, Artifact]:
    """The artifacts of a run that can travel: nothing was cut short by a budget, and every file is there."""
    made = (store.made(path.parent.name) for path in sorted(store.root.glob("*/" + MANIFEST)))
    return {a.name: a for a in made if a and not a.manifest.get("partial") and not a.lost()}


def has_weights(artifact: Artifact) -> bool:
    """Whether an artifact is a trained model."""
    return any(f.endswith(WEIGHTS) for f in artifact.manifest["files"])


def export(run: Run, target: Path, *, weights: bool = True) -> str:
    """Write the run with the points of its sweeps to `target` (.tar.gz); returns the archive's SHA-256.

    Without `weights` the generators travel like the scored models: what still reads one makes it necessary to train it again.
    """
    contents: dict[str, bytes] = {}
    shown = f"embedder-guided-{embedding_stages.training_seeds(run)[0]}"  # notebook 08 asks it for a similarity
    wanted = {name for s in planning.steps(run) if s.reason for name in s.inputs} | {shown}
    kept = {*trained_generators(), shown} if weights else set()
    for part in (run.folder, *sorted(p for p in (run.folder / "variants").glob("*") if p.is_dir())):
        contents |= {str(Path(part.relative_to(run.folder), name)): data for name, data in _files(part, kept, wanted)}
    if not contents:
        raise UserError(f"export: {run.folder.name} has neither logs nor artifacts; run notebook 01 first")
    return pack_run(run, contents, target, whole=True)


def _files(folder: Path, kept: AbstractSet[str], wanted: AbstractSet[str]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of what travels of a run folder or of one point's, in order of the names.

    `kept`: models whose weights travel; `wanted`: models that some stage still has to read."""
    manifests = {p.parent.name: read_manifest(p.read_bytes(), p.parent.name) for p in folder.glob(f"artifacts/*/{MANIFEST}")}
    read = {item for m in manifests.values() for item in m["parents"].items()}
    for place in (folder / HISTORY, *(p for name in ("log", "figures") for p in sorted((folder / name).glob("*")))):
        if place.is_file() and not place.name.startswith("."):
            yield str(place.relative_to(folder)), place.read_bytes()
    for name, manifest in sorted(manifests.items()):
        heavy = [f for f in manifest["files"] if f.endswith(WEIGHTS)] if name not in kept else []
        if heavy:  # a model that cannot be loaded needs no tokenizer either, and that of each student has 0.7 MB
            heavy += [f for f in manifest["files"] if f.endswith("tokenizer.json")]
        used = (name, digest(manifest["files"])[:16]) in read
        if name.startswith(".") or heavy and (not used or name in wanted):
            continue
        for file in sorted(set(manifest["files"]) - set(heavy)):
            path = folder / "artifacts" / name / file
            if path.is_file():
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest() != manifest["files"][file]["sha256"]:
                    raise UserError(f"{path}: is not what its manifest says; remove the folder {path.parent} and run again")
                yield f"artifacts/{name}/{file}", data
        said = manifest | ({"elsewhere": heavy} if heavy else {})
        yield f"artifacts/{name}/{MANIFEST}", (json.dumps(said, indent=1) + "\n").encode()
