"""What the recorded runs of `tiny` got for a number that another machine, or another compute type, may change.

The numbers are in speed_core/assets/elsewhere.json, which scripts/elsewhere.py collects from the recorded runs. Runs whose settings
decided the number as today's profile does make one range; earlier runs with other settings are told apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from speed_core.files import ASSETS
from speed_core.store.run_context import Run

RECORDED = ASSETS / "elsewhere.json"


@lru_cache
def recorded() -> dict[str, Any]:
    """{"profile", "runs": {commit: {date, compute_type, cpu}}, "numbers": {name: [{run, value, compute_type, other}]}}."""
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def show(run: Run, name: str, value: float, digits: int = 2) -> None:
    """Print a number of this run with the recorded runs' beside it."""
    print(text(run.profile.name, name, value, digits))


def text(profile: str, name: str, value: float, digits: int = 2) -> str:
    """One line, as "junior valid: 0.53 here; 0.53 in 1 recorded tiny run (float32)". At other sizes than the recorded one it says so.

    Raises KeyError for a name that no recorded run has.
    """
    profile_of_all, found = recorded()["profile"], recorded()["numbers"][name]
    said = f"{name}: {value:.{digits}f} here"
    if profile != profile_of_all:
        return f"{said} ({profile}; the recorded runs are at {profile_of_all})"
    same, other = ([n for n in found if bool(n["other"]) == differs] for differs in (False, True))
    parts = (
        [f"{_values(same, digits)} in {len(same)} recorded {profile_of_all} run{'s' * (len(same) > 1)} ({_types(same)})"]
        if same
        else []
    )
    if other:
        parts.append(
            f"{_values(other, digits)} in {len(other)} earlier run{'s' * (len(other) > 1)} with other settings ({_types(other)})"
        )
    return "; ".join([said, *parts])


def _values(found: Sequence[Mapping[str, Any]], digits: int) -> str:
    low, high = (f"{pick(n['value'] for n in found):.{digits}f}" for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _types(found: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(sorted({n["compute_type"] for n in found}))
