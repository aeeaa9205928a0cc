"""An open run: its profile, its folder, its artifacts. `speed_core.study.runs.open_run` opens one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from speed_core import profile as profiles
from speed_core.files import ASSETS, PACKAGE
from speed_core.settings import Settings
from speed_core.store.artifacts import Store

ROOT = PACKAGE.parent
CARRIED = ASSETS / "shipped"  # data sets and scores, no weights
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
        return len(self.store.roots) > 1

    def log(self, name: str) -> Path:
        return self.folder / "log" / f"{name}.jsonl"


def runs_folder() -> Path:
    """$SPEED_RUNS, else runs/ in the checkout."""
    return Settings().runs or ROOT / "runs"


def shipped_folder(profile: str) -> Path | None:
    """Where artifacts that others made are looked for: one folder, so that two runs are never mixed.

    $SPEED_SHIPPED/PROFILE/artifacts where that is set (it may be somebody's SPEED_RUNS); else what an offline bundle put into
    shipped/PROFILE/artifacts of the checkout; else the data sets and scores of the recorded run that the package carries.
    """
    if shipped := Settings().shipped:
        return shipped / profile / "artifacts"
    places = (ROOT / "shipped" / profile / "artifacts", CARRIED / profile)
    return next((p for p in places if p.is_dir()), None)
