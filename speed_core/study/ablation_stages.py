"""Notebook 10: the data sets that are compared, of one size and from the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from speed_core.data.prompts import Prompt
from speed_core.files import Lazy
from speed_core.profile import Profile
from speed_core.store.artifacts import Artifact, Draft
from speed_core.store.run_context import Run
from speed_core.study import generation_stages, synthesis_stages
from speed_core.study.generator_answers import Ask, generated
from speed_core.study.stage import Instances, Kind, each, find, stage


class Arm(StrEnum):
    """The data sets that notebook 10 compares: of junior and senior, as written and revised; of the untrained base; the teacher's."""

    JR = "jr"
    JR_RE = "jr_re"
    SR = "sr"
    SR_RE = "sr_re"
    BASE = "base"
    TEACHER = "teacher"


TABLE2 = (Arm.JR, Arm.JR_RE, Arm.SR, Arm.SR_RE)
ARMS = tuple(Arm)


def ablation_prompts(p: Profile) -> int:
    """How many of the synthesis prompts junior and senior answer for the comparison; some records are lost on the way, and
    40% more prompts than records leave enough."""
    return min(p.synthesis.count, int(p.study.ablation_examples * 1.4))


def _compared(run: Run) -> Lazy[Prompt]:
    return synthesis_stages.synthesis_prompts(run)[: ablation_prompts(run.profile)]


def _answering(run: Run) -> Instances:
    junior = [a for a in run.profile.study.arms if a in (Arm.JR, Arm.JR_RE)]
    return each("10", generator=["junior"] * bool(junior) + ["base"] * (Arm.BASE in run.profile.study.arms))


@generated(
    "raw-{generator}",
    _answering,
    "{generator}",
    work=lambda p, generator: p.synthesis.count if generator == "base" else ablation_prompts(p),
)
def raw_of(run: Run, generator: str) -> Ask:
    """Answers of junior or base to the senior's prompts. Fewer of the base's are records, so it answers all of them."""
    return Ask(synthesis_stages.synthesis_prompts(run) if generator == "base" else _compared(run))


def _revising(run: Run) -> Instances:
    return [("10", {})] if Arm.JR_RE in run.profile.study.arms else []


@generated("revised-junior", _revising, "revisor", inputs=["raw-junior"], work=lambda p: ablation_prompts(p))
def revised_junior(run: Run, raw: Artifact) -> Ask:
    """The junior's answers, revised."""
    return generation_stages.revision_of(raw, _compared(run))


SOURCES = {  # what a data set is made from
    Arm.TEACHER: ["seeds"], Arm.BASE: ["raw-base"], Arm.JR: ["raw-junior"], Arm.JR_RE: ["raw-junior", "revised-junior"],
    Arm.SR: ["raw"], Arm.SR_RE: ["raw", "revised"],
}  # fmt: skip


@stage(
    "synthetic-{arm}",
    Kind.DATA,
    lambda run: each("10", arm=run.profile.study.arms),
    inputs=lambda run, arm: SOURCES[arm],
    parameters=synthesis_stages.curated,
)
def arm_data(run: Run, draft: Draft, raw: Artifact, revised: Artifact | None = None, *, arm: Arm) -> None:
    """The data set of an arm, from the same prompts (but the teacher's own examples)."""
    prompts_, source = (_compared(run), "junior") if arm in (Arm.JR, Arm.JR_RE) else (
        synthesis_stages.synthesis_prompts(run), "base" if arm == Arm.BASE else "senior"
    )  # fmt: skip
    if arm == Arm.TEACHER:
        rows: Sequence[dict[str, Any]] = generation_stages.teacher_records(run)
    elif revised:
        rows = synthesis_stages.revised_records(run, raw, revised, prompts_, source)
    else:
        rows = synthesis_stages.to_records(run, raw.stored(), prompts_, source)
    if arm in (Arm.SR, Arm.SR_RE):
        ids = {q.id for q in _compared(run)}
        rows = [r for r in rows if r["id"] in ids]
    synthesis_stages.write_dataset(run, draft, f"synthetic-{arm}", rows, f"Ablation {arm}, see notebook 10.")


def ablation_data(run: Run) -> dict[str, Artifact]:
    """The data sets of `study.arms`, with the answers that they are made from."""
    # Notebook 06 made the senior's (or they are shipped); at a point of a sweep that trains another senior they are made again here.
    made_here = run.store.made("raw") is not None or (run.point and run.store.made("senior") is not None)
    out: dict[str, Artifact] = {}
    for arm in map(Arm, run.profile.study.arms):
        for one in (find(run, name) for name in SOURCES[arm]):
            if one and (one.notebook == "10" or (one.notebook == "06" and made_here)):
                one.make(run)
        out[arm] = arm_data(run, arm=arm)
    return out


def compares_all(run: Run) -> bool:
    """Whether notebook 10 compares everything that its figures show: a point of a sweep does not."""
    return not run.point and run.profile.study.arms == ARMS


def ablation_size(run: Run) -> int:
    """Records in each compared data set: as many as the smallest of Table 2's has, at most `study.ablation_examples`."""
    made = [run.store.get(f"synthetic-{k}") for k in run.profile.study.arms if k in TABLE2]
    return min([run.profile.study.ablation_examples] + [a.manifest["kept"] for a in made if a])


def ablation_arms(run: Run) -> list[str]:
    """The data sets that are compared: Table 2's, and the base model's and the teacher's, which may have as few as half of the
    compared records (`trained_on` says how many they have), but a batch."""
    enough = max(ablation_size(run) / 2, run.profile.embedding.batch)
    made = {k: run.store.get(f"synthetic-{k}") for k in run.profile.study.arms}
    return [k for k, a in made.items() if k in TABLE2 or not a or a.manifest["kept"] >= enough]
