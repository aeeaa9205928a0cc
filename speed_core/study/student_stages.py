"""Notebook 07b: students, small encoders cut from the guide and trained with its mask and without, on several data sets."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple

from speed_core.data import prompts
from speed_core.models import compute_type, loading
from speed_core.profile import Embedding, Profile
from speed_core.store.artifacts import Artifact, Draft
from speed_core.store.run_context import Run
from speed_core.study import generation_stages
from speed_core.study.ablation_stages import Arm, ablation_size
from speed_core.study.stage import Instances, Kind, stage


class StudentArm(StrEnum):
    """How a student learns: with which mask, else (`guided`) on which data."""

    GUIDED = "guided"
    PLAIN = "plain"  # no mask
    WEAK = "weak"  # the mask of a guide of two layers
    MARGIN = "margin"  # the mask with a margin of 0.05
    LABELLED = "labelled"  # equally many pairs that people labelled (`offline_tasks.labelled_pairs`)
    BOTH = "both"  # labelled pairs and the teacher's records
    UNCOVERED = "uncovered"  # the teacher's records without a topic
    COVERED = "covered"  # equally many, with it (`topic_records`)
    MIXED_SR_RE = "mixed_sr_re"  # labelled pairs and records of a data set of notebook 10 (S2)
    MIXED_TEACHER = "mixed_teacher"


MIXED = {StudentArm.MIXED_SR_RE: Arm.SR_RE, StudentArm.MIXED_TEACHER: Arm.TEACHER}
WHOLE = 0  # layers of a student that is the guide itself
TOPIC = "Computers"  # the topic that notebook 07b leaves out of a student's data, then puts back in (G5)


class Student(NamedTuple):
    """A small encoder: the guide's first `layers` layers (or all of them: `WHOLE`), trained as `arm` says."""

    layers: int
    seed: int
    arm: StudentArm

    @property
    def keys(self) -> dict[str, Any]:
        return {"layers": "whole" if self.layers == WHOLE else self.layers, "arm": self.arm, "seed": self.seed}

    @property
    def name(self) -> str:
        return STUDENT.format(**self.keys)


STUDENT = "student-{layers}-{arm}-{seed}"


def students(run: Run) -> list[Student]:
    """Notebook 07b's students; only the smallest gets the arms beside guided and plain, and the whole guide (`WHOLE`) none but
    "uncovered" (G4)."""
    plan, mixed = run.profile.study.student, tuple(MIXED)
    more = [a for a in StudentArm if a not in (StudentArm.GUIDED, StudentArm.PLAIN, *mixed)]
    small, both = min(plan.layers), [StudentArm.GUIDED, StudentArm.PLAIN]
    arms = {layers: both + more if layers == small else both for layers in plan.layers}
    cut = [Student(layers, seed, arm) for layers in plan.layers for seed in plan.seeds for arm in arms[layers]]
    return cut + [Student(WHOLE, seed, StudentArm.UNCOVERED) for seed in plan.seeds]


def mixed_students(run: Run) -> list[Student]:
    """The students of S2, which notebook 10 trains; none where it lacks one of their data sets."""
    plan = run.profile.study
    there = set(MIXED.values()) <= set(plan.arms)
    return [Student(min(plan.student.layers), s, arm) for arm in (MIXED if there else ()) for s in plan.student.seeds]


def mixed_size(run: Run) -> int:
    """Synthetic records that each student of S2 learns from: as many as notebook 10 compares, and the smaller of both sets has."""
    made = [run.store.get(f"synthetic-{arm}") for arm in MIXED.values()]
    return min([ablation_size(run)] + [a.manifest["kept"] for a in made if a])


def student_instances(run: Run) -> Instances:
    return [("07b", s.keys) for s in students(run)] + [("10", s.keys) for s in mixed_students(run)]


def _student_reads(run: Run, layers: int | str, arm: str, seed: int) -> list[str]:
    if arm in MIXED:
        return [f"synthetic-{MIXED[StudentArm(arm)]}"]
    return [] if arm == StudentArm.LABELLED else ["seeds"]


def bases(run: Run, layers: int | str, arm: str) -> tuple[str, str]:
    """(the model that a student starts from, its guide)."""
    whole = run.profile.models.guide
    base = loading.resolve(whole) if layers == "whole" else loading.shallow_encoder(whole, int(layers))
    return str(base), whole if arm != StudentArm.WEAK else str(loading.shallow_encoder(whole, 2))


def base_id(run: Run, layers: int | str) -> str:
    base, _ = bases(run, layers, "")
    return loading.weights_id(loading.resolve(base)) + loading.settings_id(run.profile.models.guide)


def student_training(run: Run, arm: str) -> Embedding:
    plan = run.profile.study.student
    changes = {"lora": None, "dtype": "float32", "guided": arm != StudentArm.PLAIN, "micro_batch": plan.batch}
    changes |= {k: getattr(plan, k) for k in ("examples", "epochs", "batch", "lr")}
    return run.profile.embedding.model_copy(update=changes | {"margin": 0.05 if arm == StudentArm.MARGIN else 0.0})


def _labelled(run: Run, arm: str) -> list[dict[str, Any]]:
    from speed_core.evaluation import offline_tasks

    if arm not in (StudentArm.LABELLED, StudentArm.BOTH, *MIXED):
        return []
    plan = run.profile.study.student
    return list(offline_tasks.labelled_pairs(plan.examples, run.profile.data_seed, run.profile.evaluation.size))


def _student_parameters(run: Run, *read: Artifact, layers: int | str, arm: str, seed: int) -> dict[str, Any]:
    (_, guide), whole = bases(run, layers, arm), run.profile.models.guide
    out = {"training": student_training(run, arm).cache_key_fields(), "seed": seed}
    out["base"] = base_id(run, layers)
    out["guide"] = loading.weights_id(loading.resolve(guide)) + loading.settings_id(whole)
    if rows := _labelled(run, arm):
        out["labelled"] = prompts.text_digest("".join(r["query"] + r["positive"] for r in rows))
    if arm in (StudentArm.UNCOVERED, StudentArm.COVERED):
        out["topic"] = TOPIC
    return out | ({"records": mixed_size(run)} if arm in MIXED else {})


def _student_work(p: Profile, layers: int | str, arm: str, seed: int) -> float:
    depth, twice = 6 if layers == "whole" else int(layers), arm in (StudentArm.BOTH, *MIXED)  # the packaged guide has six layers
    return depth * p.study.student.examples * p.study.student.epochs * (2 if twice else 1)


@stage(STUDENT, Kind.STUDENT, student_instances, inputs=_student_reads, parameters=_student_parameters, work=_student_work)
def student(run: Run, draft: Draft, *read: Artifact, layers: int | str, arm: str, seed: int) -> None:
    """A student (`Student`), trained on the seed data or on what its arm says (`StudentArm`)."""
    from speed_core.contrastive.train import train_embedder

    base, guide = bases(run, layers, arm)
    rows = _labelled(run, arm)
    if arm in (StudentArm.UNCOVERED, StudentArm.COVERED):
        rows = topic_records(run, covered=arm == StudentArm.COVERED)
    elif arm in MIXED:
        rows = read[0].rows("train.jsonl")[: mixed_size(run)] + rows
    elif arm != StudentArm.LABELLED:
        rows = generation_stages.teacher_records(run)[: run.profile.study.student.examples] + rows
    settings = student_training(run, arm).model_copy(update={"examples": len(rows)})
    draft.info |= compute_type.facts(settings.dtype)
    label = STUDENT.format(layers=layers, arm=arm, seed=seed)
    kept = {"guide_cache": run.folder / "guide", "cache": run.folder / "checkpoints", "output": draft.path}
    train_embedder(base, rows, settings, guide=guide, seed=seed, label=label, **kept)


def topic_records(run: Run, *, covered: bool) -> list[dict[str, Any]]:
    """The teacher's records without any on `TOPIC`, or with those in place of the last others: equally many, at most
    `study.student.examples`, and of those on the topic at most half."""
    records = generation_stages.teacher_records(run)
    on, off = ([r for r in records if (r["topic"].split("/")[0] == TOPIC) == wanted] for wanted in (True, False))
    off = off[: run.profile.study.student.examples]
    on = on[: len(off) // 2]
    return off[: len(off) - len(on)] + on if covered else off


def by_topic(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """The chatterbot retrieval of a scored model as two tasks: "on" holds the questions about computing, "off" the others."""
    from speed_core.evaluation import offline_tasks

    computing = [c in offline_tasks.COMPUTING for c in offline_tasks.question_categories(run.profile.evaluation.size)]
    items = result["tasks"][offline_tasks.QUESTIONS]["items"]
    parts = {name: [v for v, c in zip(items, computing, strict=True) if c == on] for name, on in (("on", True), ("off", False))}
    return {"tasks": {k: {"type": "Retrieval", "score": sum(v) / len(v), "items": v} for k, v in parts.items()}}
