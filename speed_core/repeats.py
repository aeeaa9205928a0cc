"""Generators trained more than once: what the seeds of embedding models cannot tell of one generator against another.

A repetition is a point of a sweep (`sweep`) at another seed: notebooks 03 to 05 train junior, senior and revisor anew, notebook 10
lets them write and trains embedding models on what they wrote. All of it differs from the profile's own run but the prompts, the
teacher's examples and the evaluation texts, so the scores of a repetition are one independent group (`uncertainty.contrast`,
`groups`), and groups are what an interval of a claim about generators is taken over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speed_core import claims, evaluate, experiments, planning
from speed_core.artifacts import Artifact
from speed_core.run_context import Run, open_run
from speed_core.sweep import Point, folder_name

KEY = "generators"  # of `study --only`
NOTEBOOKS = ("03", "04", "05", "10")
SEEDS = 2  # embedding models an arm and repetition: further trainings of the generators are worth more than further ones of these
UNSEEN = 12  # texts of the notebooks' own comparisons on unseen prompts, which no claim takes from a repetition
Scores = Mapping[str, Sequence[Any]]  # arm -> what `evaluate.evaluate` returned, one a training seed


def point(run: Run, seed: int) -> Point:
    """The run of one repetition, at `seed`."""
    own = run.profile
    values: dict[str, Any] = {
        "study.seeds": list(own.study.seeds[:SEEDS]),
        "study.sweep_seeds": None,
        "study.student.seeds": list(own.study.student.seeds[:SEEDS]),
        "synthesis.evaluation_prompts": min(UNSEEN, own.synthesis.evaluation_prompts),
    }
    return Point(folder_name(f"seed={seed}"), values, seed)


def points(run: Run) -> list[Point]:
    """Every repetition that the profile asks for (`study.generator_seeds`) and that is not the run itself."""
    return [point(run, seed) for seed in run.profile.study.generator_seeds if seed != run.profile.seed]


@dataclass(frozen=True)
class Repeats:
    """The repetitions that are there: the run of each, its scores {arm: results} and the artifacts of these, `MIXED` among the arms."""

    runs: tuple[Run, ...]
    scores: tuple[Scores, ...]
    inputs: tuple[Artifact, ...]

    def joined(self, own: Scores, arms: Iterable[str]) -> tuple[dict[str, list[Any]], tuple[int, ...]]:
        """({arm: results of the profile's own run, then of each repetition that has all `arms`}, how many of each)."""
        arms = list(arms)
        every = [own, *(s for s in self.scores if all(s.get(arm) for arm in arms))]
        return {arm: [r for s in every for r in s[arm]] for arm in arms}, tuple(len(s[arms[0]]) for s in every)

    def means(self, own: Scores, arm: str) -> list[list[float]]:
        """Mean scores of an arm: for each training of the generators those of its embedding models."""
        return [[evaluate.category_means(r)["Avg"] for r in s[arm]] for s in (own, *self.scores) if s.get(arm)]

    def estimates(self, own: Scores, records: Sequence[Mapping[str, int]], *, draws: int = 1000) -> dict[str, dict[str, Any]]:
        """{claim: estimate} of the claims that compare generators, over all their trainings; none where there is only one.

        `records`: {arm: how many its models learned from} of the profile's own run, then of each repetition.
        """
        out: dict[str, dict[str, Any]] = {}
        for key in claims.COMPARED:
            arms = {arm for pair in claims.COMPARED[key][1] for arm in pair}
            if key not in claims.ONE_GENERATOR or not all(own.get(arm) for arm in arms):
                continue
            scores, groups = self.joined(own, arms)
            e = claims.compared(key, scores, groups, draws=draws) if len(groups) > 1 else None
            if e:
                what = claims.compared_words(key, records[0])
                used = [sorted({r[arm] for arm in arms if arm in r}) for r in records[1:]]
                said = " and ".join("-".join(map(str, dict.fromkeys([n[0], n[-1]]))) for n in used if n)
                out[key] = e.row(key) | {"what": f"{what}; {said} records in the further trainings", "source": KEY}
        return out


def spread(means: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(standard deviation of the mean scores between trainings of the generators, of single embedding models within one, pooled).

    The first holds a part of the second, which the mean over a training's embedding models has not removed.
    """
    within = [np.var(m, ddof=1) for m in means if len(m) > 1]
    free = [len(m) - 1 for m in means if len(m) > 1]
    pooled = float(np.average(within, weights=free)) if within else float("nan")
    return float(np.std([np.mean(m) for m in means], ddof=1)) if len(means) > 1 else float("nan"), pooled**0.5


def collect(run: Run) -> Repeats:
    """The repetitions of `run` that were run and are current; of one the arms that it could compare."""
    runs, scores, inputs = [], [], []
    for one in [] if run.point else points(run):
        at = open_run(run.profile.name, one.overrides, one.seed, variant=one.name)
        arms = experiments.ablation_arms(at) if (at.folder / "times.jsonl").is_file() else []
        names = [f"scores-{arm}-{s}" for arm in arms for s in experiments.training_seeds(at)]
        students = [(arm, f"scores-{experiments.student_name(layers, arm, s)}") for layers, s, arm in experiments.mixed_arms(at)]
        if not arms or not planning.current(at, names + [name for _, name in students]):
            continue
        made = {arm: experiments.scored(at, arm) for arm in arms}
        for arm, name in students:
            made.setdefault(arm, []).append(at.store.need(name))
        runs.append(at)
        scores.append({arm: [a.json("scores.json") for a in of] for arm, of in made.items()})
        inputs += [a for of in made.values() for a in of]
    return Repeats(tuple(runs), tuple(scores), tuple(inputs))


def trained_on(run: Run, arms: Iterable[str]) -> dict[str, int]:
    """{arm: records that each of its embedding models learned from}."""
    return {arm: n for arm in arms if (n := experiments.trained_on(run, arm))}
