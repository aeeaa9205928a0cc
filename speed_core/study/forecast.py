"""What a stage will take at a size that was never run: the recorded run's cost times the ratio of the work.

Work is counted in the stage's own unit (`stage.Stage.work`): texts to write, records times epochs, texts to embed. A generator also
takes time to start, the same at every size; least squares over the recorded generation stages says how long.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from speed_core import machine
from speed_core import profile as profiles
from speed_core.files import ASSETS
from speed_core.models import compute_type
from speed_core.profile import Profile
from speed_core.study.stage import Planned

RECORDED = ASSETS / "recorded_times.json"


class Row(NamedTuple):
    """What a stage took: a line of recorded_times.json."""

    seconds: float
    peak_mb: float | None
    disk_mb: float
    tokens: int | None  # that a generator wrote
    stage: str  # its declared name, which stages of other seeds and sizes share
    work: float


def recorded(profile: str) -> dict[str, Any]:
    """What `planning.record` wrote for a profile: device, cpu, cores, layer_seconds, date, weights, artifacts, other; empty when it never ran."""
    return _all().get(profile, {})


def _all() -> dict[str, Any]:
    return json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.is_file() else {}


@dataclass(frozen=True)
class Forecast:
    """What stages take at `profile` by the recorded `entry` of profile `other`, which may be the same."""

    profile: Profile
    other: Profile
    entry: dict[str, Any]

    @classmethod
    def of(cls, p: Profile) -> Forecast | None:
        """By the profile's own recorded run, else by one with the same models and lengths of text; None when there is none."""
        known = _all()
        for name in sorted(known, key=lambda n: n != p.name):
            if name in profiles.names() and _alike(p) == _alike(other := profiles.load(name)):
                return cls(p, other, known[name])
        return None

    @property
    def scaled(self) -> str:
        """Says when the recorded run had another size."""
        return "" if self.profile.name == self.other.name else f", scaled from profile {self.other.name}"

    @cached_property
    def scale(self) -> float:
        """This machine's time for a layer over the recorded machine's, each in its own type; 1 where nothing can be compared."""
        there, asked = self.entry.get("layer_seconds"), self.profile.junior.dtype
        if not there or machine.device().type != "cpu":
            return 1.0
        return machine.layer_seconds(compute_type.choose().name if asked == "auto" else asked) / there

    @cached_property
    def rows(self) -> dict[str, Row]:
        return {name: Row(*row) for name, row in self.entry["artifacts"].items()}

    @cached_property
    def start(self) -> float:
        """Seconds that a generation stage takes whatever it writes."""
        return start_seconds(self.rows.values())

    def expected(self, planned: Planned) -> Row | None:
        """What a stage would take on the machine of the recorded run; None when nothing like it was recorded."""
        own = self.rows.get(planned.name)
        alike = [own] if own else [r for r in self.rows.values() if r.stage == planned.stage.name]
        if not alike:
            return None
        work = planned.work(self.profile)
        ratio = work * len(alike) / sum(r.work for r in alike)
        seconds, disk, tokens = (
            sum(v) / len(alike) for v in zip(*((r.seconds, r.disk_mb, r.tokens or 0) for r in alike), strict=True)
        )
        fixed = self.start if tokens else 0.0
        peak = max(r.peak_mb or 0 for r in alike) or None
        return Row(fixed + (seconds - fixed) * ratio, peak, disk, round(tokens * ratio) or None, planned.stage.name, work)


def _alike(p: Profile) -> tuple[Any, ...]:
    g = p.generation
    return p.models, p.prompts.attributes, g.max_new_tokens, g.max_length, p.embedding.max_length, p.evaluation.tasks


def start_seconds(rows: Iterable[Row]) -> float:
    """Seconds that a generation stage takes before it writes: the intercept of seconds over tokens, not below zero."""
    writing = [r for r in rows if r.tokens]
    tokens, seconds = [r.tokens or 0 for r in writing], [r.seconds for r in writing]
    if len(set(tokens)) < 2:
        return 0.0
    start = float(np.polyfit(tokens, seconds, 1)[1])
    return min(max(start, 0.0), min(seconds))
