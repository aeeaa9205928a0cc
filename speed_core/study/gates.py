"""Did the treatments act? A comparison says something about a claim only where what it compares differs.

The senior has to win at least 0.55 of the unseen prompts, with an interval above one half, by a blind reader (an AI writing assistant)
where one has read the answers. The revisor has to change at least half of the records and to raise their rubric. Every student has to gain
at least ten points by its training. (The gates were set after an audit of the recorded run at `overnight`.) The claims behind a gate that
stays closed (`verdicts.GATED`) end as *treatment inactive*, whatever their interval says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from speed_core.data import teacher
from speed_core.data.prompts import Prompt
from speed_core.evaluation import uncertainty
from speed_core.generation import generate
from speed_core.preference import pairs
from speed_core.store.run_context import Run
from speed_core.study import generation_stages, synthesis_stages, verdicts
from speed_core.study.student_stages import Student, StudentArm

LEAST_WINS, LEAST_CHANGED, LEAST_GAIN = 0.55, 0.5, 10.0  # shares of prompts and of records; points


class Gate(NamedTuple):
    """Whether a treatment acted, and in words what was measured."""

    is_open: bool
    said: str

    def __str__(self) -> str:
        return f"{'open' if self.is_open else 'closed'}: {self.said}"


def gates(run: Run) -> dict[str, Gate]:
    """{treatment: gate} of those that this run can measure."""
    found = {verdicts.SENIOR: _senior(run), verdicts.REVISOR: _revisor(run), verdicts.STUDENTS: _students(run)}
    return {name: gate for name, gate in found.items() if gate}


def _senior(run: Run) -> Gate | None:
    made = [run.store.get(f"eval-{name}") for name in ("senior", "junior")]
    if not all(made):
        return None
    unseen, (new, old) = generation_stages.unseen(run), (a.rows() for a in made if a)
    answers = list(zip(unseen, new, old, strict=True))
    wins, by = _read(answers), "a blind reader"
    if not wins:
        rubric = generation_stages.rubric(run, [*old, *new], unseen)
        wins, by = pairs.win_rate(rubric, answers).tolist(), "the rubric, which made its training pairs too"
    low, high = uncertainty.bootstrap_interval(wins, "mean")
    said = f"the senior wins {np.mean(wins):.2f} [{low:.2f}, {high:.2f}] of {len(wins)} unseen prompts against the junior by {by}"
    return Gate(
        bool(np.mean(wins) >= LEAST_WINS and low > 0.5),
        f"{said} (needed: at least {LEAST_WINS}, with an interval above one half)",
    )


def _read(answers: Sequence[tuple[Prompt, dict[str, Any], dict[str, Any]]]) -> list[float]:
    """1 where the recorded judgement of a reader (`judgements.jsonl`) ranks the first answer higher, 0.5 for a tie, 0 otherwise; empty
    where it does not know all answers, which are another run's then."""
    lists: dict[str, list[dict[str, int]]] = {}
    for r in teacher.recorded_rows("judgements"):  # two prompts may be alike
        lists.setdefault(r["prompt_digest"], []).append(dict(zip(r["candidates"], r["ranks"], strict=True)))
    wins = []
    for prompt, first, second in answers:
        ranks = next((known for known in lists.get(prompt.digest, ()) if {first["raw"], second["raw"]} <= known.keys()), None)
        if ranks is None:
            return []
        one, other = ranks[first["raw"]], ranks[second["raw"]]
        wins.append(0.5 if one == other else float(one < other))
    return wins


def _revisor(run: Run) -> Gate | None:
    raw, revised = run.store.get("raw"), run.store.get("revised")
    if not (raw and revised):
        return None
    planned = synthesis_stages.synthesis_prompts(run)
    valid = [e for e in raw.rows() if e["status"] == "ok"]
    after = {e["record"]: e for e in revised.rows() if e["status"] == "ok"}
    # A revision that is no record is not used, so the record stays as it was.
    both = [(e, after.get(e["record"], e), q) for e, q in generation_stages.with_prompts(valid, planned)]
    changed = np.mean([generate.outcome_of(a).record != generate.outcome_of(b).record for a, b, _ in both])
    rubric = generation_stages.rubric(run, [e for a, b, _ in both for e in (a, b)], [q for _, _, q in both])
    gain = [rubric.score(b["raw"], q)[0] - rubric.score(a["raw"], q)[0] for a, b, q in both]
    low, high = (100 * end for end in uncertainty.bootstrap_interval(gain, "mean"))
    said = f"the revisor changes {changed:.2f} of {len(both)} records ({LEAST_CHANGED} wanted) and moves their rubric by "
    said += f"{100 * np.mean(gain):+.2f} hundredths [{low:+.2f}, {high:+.2f}]"
    return Gate(bool(changed >= LEAST_CHANGED and low > 0), said)


def _students(run: Run) -> Gate | None:
    plan, gains = run.profile.study.student, {}
    for layers in plan.layers:
        names = [f"scores-{Student(layers, seed, StudentArm.GUIDED).name}" for seed in plan.seeds]
        trained = [a.json("scores.json") for name in names if (a := run.store.get(name))]
        before = run.store.get(f"scores-student-{layers}-untrained")
        if not before or len(trained) < len(names):
            return None
        gains[layers] = uncertainty.difference(trained, [before.json("scores.json")])
    said = ", ".join(f"{e} with {layers} layer{'s' * (layers > 1)}" for layers, e in gains.items())
    enough = min(e.value for e in gains.values()) >= LEAST_GAIN
    return Gate(enough, f"training moves the students by {said} ({LEAST_GAIN:g} points wanted)")
