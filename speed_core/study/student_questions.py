"""Notebook 07b: what the papers' claims ask of the small students' scores, each as a contrast (`uncertainty.contrast`).

A contrast is a weighted sum of mean scores: a gain has the weights 1 and -1, a difference of two gains has four terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from speed_core.evaluation import uncertainty
from speed_core.evaluation.uncertainty import Result, Term
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run
from speed_core.study import claims, mask_quality, paper_values, score_stages, student_stages
from speed_core.study.student_stages import WHOLE, StudentArm

Scores = Mapping[tuple[int, str], Sequence[Result]]  # (layers, arm) -> results, in the order of the seeds


class Question(NamedTuple):
    """What a claim asks: its terms, in words for the claim map, and in a few for a figure (empty: the figure does not show it)."""

    claim: str
    terms: list[Term]
    what: str
    label: str = ""


def gain(
    scores: Scores, layers: Sequence[int], tasks: Sequence[str] | None = None,
    one: str = StudentArm.GUIDED, other: str = StudentArm.PLAIN, sign: int = 1,
) -> list[Term]:  # fmt: skip
    """Terms (weight, results of each seed, tasks) of one arm's score minus the other's.

    The mean is over the students of `layers` and over `tasks` (None: all). With `sign=-1` the gain
    is subtracted, so that `gain(small) + gain(large, sign=-1)` is a difference of two gains.
    """
    weight = sign / len(layers)
    signed = ((weight, one), (-weight, other))
    return [(w, scores[k, arm], tasks) for k in layers for w, arm in signed]


def made(run: Run) -> Scores:
    """The scores of all students, trained and scored where they are not current."""
    out: dict[tuple[int, str], list[Result]] = {}
    for one in student_stages.students(run):
        student_stages.student(run, **one.keys)
        result = score_stages.student_scores(run, **one.keys).json("scores.json")
        out.setdefault((one.layers, one.arm), []).append(result)
    return out


def inputs(run: Run) -> list[Artifact]:
    """The artifacts that hold these scores, and those of the guide before it learned further."""
    names = [one.name for one in student_stages.students(run)] + ["guide-topic"]
    return [run.store.need(f"scores-{name}") for name in names]


def guided_minus_plain(scores: Scores, layers: Sequence[int]) -> list[tuple[str, list[Term]]]:
    """(label, terms) of each student size and of all: over all tasks, STS and retrieval."""
    out = []
    for these in [*([k] for k in layers), list(layers)]:
        who = f"{these[0]} layer{'s' * (these[0] > 1)}" if len(these) == 1 else "all students"
        for label, tasks in {"all tasks": None, "STS": ("STS",), "Retrieval": ("Retrieval",)}.items():
            out.append((f"{who}, {label}", gain(scores, these, tasks)))
    return out


def of_the_mask(scores: Scores, layers: Sequence[int], points: Sequence[Mapping[str, Any]], pairs: int) -> list[Question]:
    """G1b, G2, G3, G7 and G9: gains of the mask, and other masks. `points`: of notebook 07 (`mask_quality.points`), from `pairs` pairs of
    newsgroup posts."""
    small, large, every = min(layers), max(layers), list(layers)
    removed = [mask_quality.at_margin_zero(points, g)["removed"] for g in (mask_quality.WHOLE, mask_quality.SHALLOW)]
    gone = f"{removed[0]:,} and {removed[1]:,} of {pairs * (pairs - 1):,}"
    sizes = f"gain of the smallest student ({small} of 6 layers) minus that of the largest ({large})"
    guides = f"guide of 6 layers against guide of 2, smallest student (they mask {gone} newsgroup candidates)"
    margins = "margin 0.05 against margin 0, smallest student"
    return [
        # Stored as G1, as recorded runs have it; `claims.present_ids` reads it as G1b.
        Question("G1", gain(scores, every), "guided against plain, all students and tasks"),
        Question("G2", gain(scores, [small]) + gain(scores, [large], sign=-1), sizes),
        Question("G3", gain(scores, every, ("STS",)) + gain(scores, every, sign=-1), "gain on STS minus gain on all tasks"),
        Question("G7", gain(scores, [small], other=StudentArm.WEAK), guides, "stronger guide"),
        Question("G9", gain(scores, [small], one=StudentArm.MARGIN, other=StudentArm.GUIDED), margins, "margin 0.05"),
    ]


def of_labelled_data(scores: Scores, layers: Sequence[int]) -> list[Question]:
    """E2 and G8: what the seed data add to labelled pairs, and whether sharing a collection with a task helps. Without a task on
    Newsgroups, or with no other (`evaluation.tasks`), there is no G8."""
    small, both = min(layers), StudentArm.BOTH
    tasks = scores[small, both][0]["tasks"]
    of_news, others = ([t for t in tasks if ("Newsgroups" in t) == inside] for inside in (True, False))
    what = "labelled and seed data against labelled data alone, small student"
    out = [Question("E2", gain(scores, [small], one=both, other=StudentArm.LABELLED), what, "seed data added")]
    if of_news and others:
        inside = gain(scores, [small], of_news, both, StudentArm.GUIDED)
        outside = gain(scores, [small], others, both, StudentArm.GUIDED, sign=-1)
        what = "what newsgroup pairs add on Newsgroups tasks minus what they add on the others"
        out.append(Question("G8", inside + outside, what, "own collection"))
    return out


def of_a_topic_left_out(run: Run, scores: Scores, before: Result) -> list[Question]:
    """G4 and G5: what leaving the topic out costs the whole guide (`before` it learned further), and what putting it back gives the
    smallest student, on the questions about it; the words hold the same on the other questions."""

    def asked(claim: str, one: Sequence[Result], other: Sequence[Result], what: str, label: str) -> Question:
        a, b = ([student_stages.by_topic(run, dict(r)) for r in results] for results in (one, other))
        elsewhere = uncertainty.difference(a, b, ("off",))
        return Question(claim, [(1, a, ("on",)), (-1, b, ("on",))], f"{what} (on the others {elsewhere})", label)

    small = min(run.profile.study.student.layers)
    without, with_it = (scores[small, arm] for arm in (StudentArm.UNCOVERED, StudentArm.COVERED))
    lost = "whole guide after training without computing minus before, questions on computing"
    given = "small student with examples on computing minus with equally many others, questions on it"
    return [
        asked("G4", scores[WHOLE, StudentArm.UNCOVERED], [before], lost, "whole guide, topic left out"),
        asked("G5", with_it, without, given, "topic covered"),
    ]


def answered(questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """{claim: estimate with its interval, and its words}, as notebook 12 reads them."""
    return {q.claim: uncertainty.contrast(q.terms).row(q.claim) | {"what": q.what} for q in questions}


def text(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """`answered` as lines: claim by its present id, words, estimate with its interval."""

    def said(f: Mapping[str, Any]) -> str:
        value = f"{f['value']:+.2f}"
        return value if math.isnan(f["low"]) else f"{value} [{f['low']:+.2f}, {f['high']:+.2f}]"

    return "\n".join(f"{claim} {f['what']}: {said(f)}" for claim, f in claims.present_ids(facts).items())


def published(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{label: the paper's effect} of those rows of `shown` whose claim has a printed one."""
    effects = paper_values.EFFECTS
    return {r["label"]: effects[claim] for r in rows if (claim := r["label"].partition(",")[0]) in effects}


def shown(questions: Sequence[Question], facts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the figure of what one model alone was asked: those of `answered`, with their labels."""
    return [dict(facts[q.claim]) | {"label": f"{q.claim}, {q.label}"} for q in questions if q.label]
