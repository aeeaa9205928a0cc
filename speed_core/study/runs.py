"""What every notebook opens first: the run of a profile."""

from __future__ import annotations

import os
from typing import Any

from speed_core import profile as profiles
from speed_core.settings import Settings, prepare_hub
from speed_core.store import run_context
from speed_core.store.artifacts import Catalog, Store
from speed_core.store.run_context import Run
from speed_core.study import planning, stage


def open_run(
    profile: str = "tiny", overrides: dict[str, Any] | None = None, seed: int | None = None, variant: str | None = None
) -> Run:
    """Open (or begin) the run of a profile.

    The folder is $SPEED_RUNS/PROFILE (default: runs/ in the checkout). Figures of the profile `run_context.OFFICIAL` land in
    figures/, those of other profiles in their run folder, so that a smoke run never overwrites them. `variant` ($SPEED_VARIANT)
    names one point of a sweep: a run folder of its own inside, over the artifacts of the profile's run.
    """
    prepare_hub()
    values = dict(overrides or {})
    if seed is not None:
        values.setdefault("seed", seed)
    variant = os.environ.get("SPEED_VARIANT", "") if variant is None else variant
    return _opened(profiles.load(profile, values), variant)


def reopen(profile: str, variant: str) -> Run:
    """The run that another process has open: its whole profile as JSON, its point of a sweep."""
    return _opened(profiles.Profile.model_validate_json(profile), variant, alone=False)


def _opened(p: profiles.Profile, variant: str, alone: bool = True) -> Run:
    folder, base = run_context.runs_folder() / p.name, None
    replay = os.environ.get("SPEED_REPLAY", "") not in ("", "0")
    # A replay is rebuilt from its logs alone, so nothing shipped may slip in.
    shipped = None if replay else run_context.shipped_folder(p.name)
    if variant:
        folder, base = folder / "variants" / variant, folder / "artifacts"
    official = p.name == run_context.OFFICIAL and not Settings().runs and not variant
    figures = run_context.ROOT / "figures" if official else folder / "figures"

    # They are asked once the run is there.
    catalog = Catalog(lambda name: stage.notebook_of(run, name), lambda artifact: planning.differences(run, artifact))
    store = Store(folder / "artifacts", shipped, p.teacher.accept_partial, replay, base, catalog)
    store.root.mkdir(parents=True, exist_ok=True)
    if alone:  # else another process may be between the two renames that this would undo
        store.recover()
    run = Run(p, folder, store, figures, replay)
    return run
