"""What every notebook opens first: the profile, the run folder, the artifact store."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_core import profile as profiles
from speed_core.artifacts import Artifact, Store

ROOT = Path(__file__).resolve().parent.parent
CARRIED = Path(__file__).parent / "assets" / "shipped"  # data sets and scores, no weights
OFFICIAL = "overnight"  # the profile whose recorded run is behind figures/


@dataclass(frozen=True)
class Run:
    """Profile `profile`, artifacts in `folder/artifacts`, request logs in `folder/log`, figures in `figures`."""

    profile: profiles.Profile
    folder: Path
    store: Store
    figures: Path
    replay: bool = False  # answer from the logs alone: no engine, no weights

    @property
    def point(self) -> bool:
        """Whether this is one point of a sweep, over the profile's own run."""
        return self.store.base is not None

    def log(self, name: str) -> Path:
        return self.folder / "log" / f"{name}.jsonl"


def runs_folder() -> Path:
    """$SPEED_RUNS, else runs/ in the checkout."""
    return Path(os.environ.get("SPEED_RUNS") or ROOT / "runs")


def shipped_folder(profile: str) -> Path | None:
    """Where artifacts that others made are looked for: one folder, so that two runs are never mixed.

    $SPEED_SHIPPED/PROFILE/artifacts where that is set (it may be somebody's SPEED_RUNS); else what an offline bundle put into
    shipped/PROFILE/artifacts of the checkout; else the data sets and scores of the recorded run that the package carries.
    """
    if os.environ.get("SPEED_SHIPPED"):
        return Path(os.environ["SPEED_SHIPPED"]).expanduser() / profile / "artifacts"
    places = (ROOT / "shipped" / profile / "artifacts", CARRIED / profile)
    return next((p for p in places if p.is_dir()), None)


def open_notebook() -> str:
    """Number of the notebook that this process executes ("08"), empty where none is known.

    `run.execute` names it in SPEED_NOTEBOOK, Jupyter's server in JPY_SESSION_NAME.
    """
    path = os.environ.get("SPEED_NOTEBOOK") or os.environ.get("JPY_SESSION_NAME", "")
    found = re.match(r"\d\d(?=_)", Path(path).name)
    return found.group() if found else ""


def open_run(
    profile: str = "tiny", overrides: dict[str, Any] | None = None, seed: int | None = None, variant: str | None = None
) -> Run:
    """Open (or begin) the run of a profile.

    The folder is $SPEED_RUNS/PROFILE (default: runs/ in the checkout). Figures of the profile `OFFICIAL` land in
    figures/, those of other profiles in their run folder, so that a smoke run never overwrites them. `variant` ($SPEED_VARIANT)
    names one point of a sweep: a run folder of its own inside, over the artifacts of the profile's run.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", os.environ.get("SPEED_ONLINE", "") == "" and "1" or "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    values = dict(overrides or {})
    if seed is not None:
        values.setdefault("seed", seed)
    variant = os.environ.get("SPEED_VARIANT", "") if variant is None else variant
    return _opened(profiles.load(profile, values), variant)


def reopen(profile: str, variant: str) -> Run:
    """The run that another process has open: its whole profile as JSON, its point of a sweep."""
    return _opened(profiles.Profile.model_validate_json(profile), variant, alone=False)


def _opened(p: profiles.Profile, variant: str, alone: bool = True) -> Run:
    folder = runs_folder() / p.name
    replay = os.environ.get("SPEED_REPLAY", "") not in ("", "0")
    # A replay is rebuilt from its logs alone, so nothing shipped may slip in.
    store = Store(folder / "artifacts", None if replay else shipped_folder(p.name), p.teacher.accept_partial, replay)
    if variant:
        folder = folder / "variants" / variant
        store = Store(folder / "artifacts", store.shipped, p.teacher.accept_partial, replay, store)
    store.root.mkdir(parents=True, exist_ok=True)
    if alone:  # else another process may be between the two renames that this would undo
        store.recover()
    official = p.name == OFFICIAL and not os.environ.get("SPEED_RUNS") and not variant
    run = Run(p, folder, store, ROOT / "figures" if official else folder / "figures", replay)

    def differs(artifact: Artifact) -> list[str]:
        from speed_core import planning  # the stages import this module

        return planning.differences(run, artifact)

    def upstream(name: str) -> bool:
        from speed_core import planning

        return "" < planning.notebook_of(run, name) < open_notebook()

    store.differs, store.upstream = differs, upstream
    return run
