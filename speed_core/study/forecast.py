"""What a stage will take at a size that was never run: the recorded run's cost times the ratio of the work.

Work is counted in the stage's own unit: texts to write (generation), records times epochs (training), texts to embed
(scores). A generator also takes time to start, the same at every size; least squares over the recorded generation stages
says how long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from speed_core import machine
from speed_core import profile as profiles
from speed_core.files import ASSETS
from speed_core.models import compute_type
from speed_core.profile import Profile
from speed_core.study import embedding_stages

RECORDED = ASSETS / "recorded_times.json"
EVALUATIONS = ("eval-base", "eval-junior", "eval-senior", "revised-eval", "revised-twice")


class Row(NamedTuple):
    """What a stage took: a line of recorded_times.json."""

    seconds: float
    peak_mb: float | None
    disk_mb: float
    tokens: int | None
    inputs: list[str]


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
        return start_seconds(self.rows)

    def expected(self, name: str) -> Row | None:
        """What stage `name` would take on the machine of the recorded run; None when nothing like it was recorded."""
        sort, amount = work(self.profile, name)
        # The stage itself, else the same with other seeds and sizes, else all of its sort.
        alike = {name: self.rows[name]} if name in self.rows else {}
        alike = alike or {k: r for k, r in self.rows.items() if _shape(k) == _shape(name)}
        alike = alike or {k: r for k, r in self.rows.items() if work(self.other, k)[0] == sort}
        if not alike:
            return None
        ratio = amount * len(alike) / sum(work(self.other, k)[1] for k in alike)
        rows = alike.values()
        seconds, disk, tokens = (
            sum(v) / len(rows) for v in zip(*((r.seconds, r.disk_mb, r.tokens or 0) for r in rows), strict=True)
        )
        fixed = self.start if tokens else 0.0
        peak = max(r.peak_mb or 0 for r in rows) or None
        like, row = next(iter(alike.items()))
        inputs = [_renamed(i, like, name) for i in row.inputs]
        return Row(fixed + (seconds - fixed) * ratio, peak, disk, round(tokens * ratio) or None, inputs)


def _alike(p: Profile) -> tuple[Any, ...]:
    g = p.generation
    return p.models, p.prompts.attributes, g.max_new_tokens, g.max_length, p.embedding.max_length, p.evaluation.tasks


def work(p: Profile, name: str) -> tuple[str, float]:
    """(sort, amount) of a stage's work at a profile; costs of one sort compare by amount, which is 1 for a fixed cost."""
    s, head = p.study, name.partition("-")[0]
    compared = embedding_stages.ablation_prompts(p)
    written = dict.fromkeys(EVALUATIONS, p.synthesis.evaluation_prompts)
    written |= dict.fromkeys(("raw", "revised", "raw-base"), p.synthesis.count)
    written |= {"root": p.senior.prompts * p.senior.candidates, "raw-junior": compared, "revised-junior": compared}
    if name in written:
        return name, written[name]
    if name in ("junior", "revisor"):
        training = getattr(p, name)
        return name, training.examples * training.epochs
    if name == "senior":
        return name, min(p.senior.examples, p.senior.prompts) * p.senior.epochs
    if head == "student" and name.count("-") == 3:
        _, layers, arm, _ = name.split("-")
        depth = 6 if layers == "whole" else int(layers)  # the packaged guide's
        return head, depth * s.student.examples * s.student.epochs * (2 if arm in ("both", *embedding_stages.MIXED) else 1)
    if head == "embedder" and "-" in name:
        arm = name.split("-")[1]
        whole = min(p.embedding.examples, p.synthesis.count)
        size = whole if arm in ("guided", "plain") else int(arm[5:]) if arm.startswith("scale") else s.ablation_examples
        return head, size * p.embedding.epochs
    if head == "scores":
        texts, asked = _texts(p.evaluation.size), None
        if name.startswith("scores-guide"):
            head, asked = "scores-guide", embedding_stages.student_tasks("uncovered") if name.endswith("-topic") else None
        elif name.startswith("scores-student"):
            head, asked = "scores-student", embedding_stages.student_tasks(name.split("-")[3])
        return head, sum(texts[t] for t in asked or texts) if asked or p.evaluation.tasks == ("offline",) else 1
    return name, 1


@lru_cache(maxsize=8)
def _texts(size: str) -> dict[str, int]:
    """Evaluation texts of each offline task."""
    from speed_core.evaluation import offline_tasks

    return {name: len(texts) for name, texts in offline_tasks.offline_texts(size).items()}


def start_seconds(rows: Mapping[str, Row]) -> float:
    """Seconds that a generation stage takes before it writes: the intercept of seconds over tokens, not below zero."""
    tokens, seconds = [r.tokens for r in rows.values() if r.tokens], [r.seconds for r in rows.values() if r.tokens]
    if len(set(tokens)) < 2:
        return 0.0
    start = float(np.polyfit(tokens, seconds, 1)[1])
    return min(max(start, 0.0), min(seconds))


def _shape(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _renamed(parent: str, like: str, name: str) -> str:
    """The input of `name`, from the input `parent` of the stage `like`: scores-ARM-SEED reads embedder-ARM-SEED."""
    mine, its = name.partition("-")[2], like.partition("-")[2]
    if its and parent.endswith(its):
        return parent.removesuffix(its) + mine
    seed, other = (re.findall(r"-\d+$", n) for n in (name, like))
    return parent.removesuffix(other[0]) + seed[0] if seed and other and parent.endswith(other[0]) else parent
