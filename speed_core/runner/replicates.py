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

from speed_core.evaluation import evaluate, uncertainty
from speed_core.profile import dotted
from speed_core.runner.sweep import Point, folder_name
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run
from speed_core.study import ablation_stages, claims, embedding_stages, paper_values, planning, student_stages
from speed_core.study.ablation_stages import Arm
from speed_core.study.runs import open_run
from speed_core.study.score_stages import scored
from speed_core.study.verdicts import NEEDS_GENERATOR_REPLICATES

KEY = "generators"  # of `study --only`
NOTEBOOKS = ("03", "04", "05", "10")
SEEDS = 2  # embedding models per arm and repetition: further trainings of the generators are worth more than more of these
UNSEEN = 12  # texts of the notebooks' own comparisons on unseen prompts, which no claim takes from a repetition
Scores = Mapping[str, Sequence[Any]]  # arm -> what `evaluate.evaluate` returned, one a training seed


def point(run: Run, seed: int) -> Point:
    """The run of one repetition, at `seed`: it shares no seed of a student with the profile's own run, nor another repetition."""
    own = run.profile
    values: dict[str, Any] = {
        "study.seeds": list(own.study.seeds[:SEEDS]),
        "study.sweep_seeds": None,
        "study.student.seeds": [seed + k for k in own.study.student.seeds[:SEEDS]],
        "synthesis.evaluation_prompts": min(UNSEEN, own.synthesis.evaluation_prompts),
    }
    return Point(folder_name(f"seed={seed}"), values, seed)


def points(run: Run) -> list[Point]:
    """Every repetition that the profile asks for (`study.generator_seeds`), but those that share a seed with the run itself."""
    own = set(embedding_stages.training_seeds(run)) | set(run.profile.study.student.seeds)
    theirs = {seed: {seed + k for k in run.profile.study.seeds[:SEEDS]} for seed in run.profile.study.generator_seeds}
    return [point(run, seed) for seed, used in theirs.items() if not used & own]


@dataclass(frozen=True)
class Repeats:
    """The repetitions that are there: the run of each, its scores {arm: results} and the artifacts of these, `MIXED` among the arms."""

    runs: tuple[Run, ...]
    scores: tuple[Scores, ...]
    inputs: tuple[Artifact, ...]
    mixed: tuple[Artifact, ...] = ()  # those of `MIXED`

    def having(self, arms: Iterable[str]) -> list[int]:
        """Which of the repetitions have scores of all `arms`."""
        return [k for k, s in enumerate(self.scores) if all(s.get(arm) for arm in arms)]

    def joined(self, own: Scores, arms: Iterable[str]) -> tuple[dict[str, list[Any]], tuple[int, ...]]:
        """({arm: results of the profile's own run, then of each repetition that has all `arms`}, how many of each)."""
        arms = list(arms)
        every = [own, *(self.scores[k] for k in self.having(arms))]
        return {arm: [r for s in every for r in s[arm]] for arm in arms}, tuple(len(s[arms[0]]) for s in every)

    def behind(self, run: Run, arms: Iterable[str]) -> list[Artifact]:
        """The artifacts of all these scores: of the profile's own run those of `arms`, and of the repetitions all."""
        return [a for arm in arms for a in scored(run, arm)] + list(self.inputs)

    def means(self, own: Scores, arm: str) -> list[list[float]]:
        """Mean scores of an arm: for each training of the generators those of its embedding models."""
        return [[evaluate.category_means(r)["Avg"] for r in s[arm]] for s in (own, *self.scores) if s.get(arm)]

    def trainings(self, own: Scores) -> list[str]:
        """A line for each arm of `own`: its mean score in every training of the generators, and two standard deviations (`spread`)."""
        out = []
        for arm in own if self.runs else ():
            means = self.means(own, arm)
            between, within = spread(means)
            shown = " ".join(f"{sum(m) / len(m):6.2f}" for m in means)
            out.append(f"{arm:8} {shown}   of trainings {between:.1f} points, of embedding models {within:.1f}")
        return out

    def against_junior(
        self, own: Scores, names: Mapping[str, str], *, draws: int = 1000
    ) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Table 2: (rows {label, value, low, high, ...} of each arm of `names` minus Jr, what would resolve the paper's difference).

        `names`: {arm: label}; arms without scores are left out. The second maps the labels that are not resolved to words.
        """
        rows, needs = [], {}
        for arm in [k for k in names if k in own and Arm.JR in own]:
            both, groups = self.joined(own, (arm, Arm.JR))
            e = uncertainty.difference(both[arm], both[Arm.JR], draws=draws, groups=groups)
            rows.append(e.row(names[arm]))
            if not e.resolved:
                needs[names[arm]] = str(uncertainty.required_repeats(e, paper_values.MINUS_JUNIOR[arm]))
        return rows, needs

    def with_labels(
        self, own: Mapping[str, Sequence[Artifact]], records: int, *, draws: int = 1000
    ) -> tuple[dict[str, dict[str, Any]], list[Artifact]]:
        """({"S2": evidence}, the artifacts behind it): labelled pairs joined by `records` of Sr+Re, minus by as many of the teacher.

        `own`: {arm of `MIXED`: scores of its students} of the profile's own run; nothing where it has none.
        """
        if not own:
            return {}, []
        scores = {arm: [a.json("scores.json") for a in made] for arm, made in own.items()}
        both, groups = self.joined(scores, student_stages.MIXED)
        ours, theirs = (both[arm] for arm in student_stages.MIXED)
        e = uncertainty.difference(ours, theirs, draws=draws, groups=groups)
        what = (
            f"labelled pairs and {records} records of Sr+Re minus labelled pairs and {records} of the teacher, smallest student"
        )
        inputs = [a for made in own.values() for a in made] + list(self.mixed)
        return {"S2": e.row("S2") | {"what": what, "source": "mixed"}}, inputs

    def estimates(self, own: Scores, records: Sequence[Mapping[str, int]], *, draws: int = 1000) -> dict[str, dict[str, Any]]:
        """{claim: estimate} of the claims that compare generators, over all their trainings; none where there is only one.

        `records`: {arm: how many its models learned from} of the profile's own run, then of each repetition.
        """
        out: dict[str, dict[str, Any]] = {}
        for key in claims.COMPARED:
            arms = claims.arms_of(key)
            if key not in NEEDS_GENERATOR_REPLICATES or not all(own.get(arm) for arm in arms):
                continue
            scores, groups = self.joined(own, arms)
            e = claims.compared(key, scores, groups, draws=draws) if len(groups) > 1 else None
            if e:
                used = [_counts(records[0], arms), *(_counts(records[1 + k], arms) for k in self.having(arms))]
                said = f"{used[0]} records each time" if len(set(used)) == 1 else f"{', then '.join(used)} records"
                what = f"{claims.COMPARED[key][0]}, on {said}"
                out[key] = e.row(key) | {"what": what, "source": KEY}
        return out


def _counts(records: Mapping[str, int], arms: Iterable[str]) -> str:
    """Says "168" where the models of all `arms` learned from equally many records, else "168 (base 150)"."""
    known = {arm: records[arm] for arm in arms if arm in records}
    most = max(known.values(), default=0)
    fewer = [f"{arm} {n}" for arm, n in known.items() if n < most]
    return f"{most} ({', '.join(fewer)})" if fewer else str(most)


def spread(means: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(standard deviation of the mean scores between trainings of the generators, of single embedding models within one, pooled).

    The first holds a part of the second, which the mean over a training's embedding models has not removed.
    """
    free = sum(len(m) - 1 for m in means)
    pooled = sum(len(m) * np.var(m) for m in means) / free if free else float("nan")
    return float(np.std([np.mean(m) for m in means], ddof=1)) if len(means) > 1 else float("nan"), float(pooled) ** 0.5


def collect(run: Run) -> Repeats:
    """The repetitions of `run` that were run and are current, each with the arms that it could compare; of the others it says why
    they are left out."""
    runs, scores, inputs, mixed = [], [], [], []
    for one in [] if run.point else points(run):
        at = open_run(run.profile.name, one.overrides, one.seed, variant=one.name)
        if not (at.folder / "times.jsonl").is_file():
            continue
        arms = ablation_stages.ablation_arms(at)
        students = [(s.arm, f"scores-{s.name}") for s in student_stages.mixed_students(at)]
        names = [f"scores-{arm}-{s}" for arm in arms for s in embedding_stages.training_seeds(at)] + [n for _, n in students]
        if wrong := _otherwise(run, at, one) or planning.stale(at, names):
            print(f"{one.name} is left out: {wrong[0]}{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}")
            continue
        made = {arm: scored(at, arm) for arm in arms}
        for arm, name in students:
            made.setdefault(arm, []).append(at.store.need(name))
        runs.append(at)
        scores.append({arm: [a.json("scores.json") for a in of] for arm, of in made.items()})
        inputs += [a for of in made.values() for a in of]
        mixed += [a for arm in student_stages.MIXED for a in made.get(arm, ())]
    return Repeats(tuple(runs), tuple(scores), tuple(inputs), tuple(mixed))


def _otherwise(run: Run, at: Run, one: Point) -> list[str]:
    """What a repetition was told that the run is not (`run --set` changes the run alone): ["junior.epochs 2 here, 1 there"]."""
    own, theirs = dotted(run.profile), dotted(at.profile)
    return [f"{k} {v} here, {theirs[k]} there" for k, v in own.items() if k not in {"seed", *one.overrides} and theirs[k] != v]
