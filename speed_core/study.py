"""The sweeps of SPEED's Fig. 3 and Table 3: reruns of the same notebooks with one value changed, and what they say.

Each point is a run of its own over the profile's run (`sweep`): it makes again only what its value decides. The score of a
point is that of the embedding models trained on the data set that the value decides (`arm`, see `experiments.ARMS`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

from speed_core import experiments, planning, uncertainty
from speed_core.artifacts import Artifact, UserError
from speed_core.profile import dotted
from speed_core.run_context import Run, open_run
from speed_core.sweep import Point, folder_name, run_points


@dataclass(frozen=True)
class Sweep:
    """One panel: `parameter` over `shares` of the profile's own value (or over `values`), `notebooks` to run again.

    `kind`, what the paper finds: "hump", the best value inside; "fall", the first value best; "flat", no difference.
    A value may be text: another model, where {own} is the profile's.
    """

    key: str
    claim: str
    label: str
    parameter: str
    arm: str
    notebooks: tuple[str, ...]
    paper: str
    values: tuple[Any, ...] = ()
    shares: tuple[float, ...] = ()
    kind: Literal["hump", "fall", "flat"] = "hump"
    printed: tuple[tuple[Any, float], ...] = ()  # (value, the paper's points against its own value), where it prints them
    note: str = ""  # what the claim map adds to the words of the estimate

    def points(self, run: Run) -> list[Any]:
        """The values of the sweep at a profile, numbers in rising order, a switch on and off; the profile's own is one of them."""
        own = dotted(run.profile)[self.parameter]
        if isinstance(own, bool):
            return [True, False]
        if isinstance(own, str):
            return list(dict.fromkeys([own, *(v.format(own=own) for v in self.values)]))
        found = self.values or tuple(own * s for s in self.shares)
        return sorted({type(own)(round(v) if isinstance(own, int) else v) for v in (*found, own)})


SWEEPS = (
    Sweep("3a", "S12", "temperature", "generation.temperature", "jr", ("10",), "1.0 chosen of 0.2-1.5", (0.3, 0.7, 1.0, 1.3)),
    Sweep(
        "3b", "S13", "seed examples", "junior.examples", "jr", ("03", "10"), "25K chosen of 5K-100K", shares=(0.125, 0.25, 0.5, 1)
    ),
    Sweep("3c", "S14", "beta of DPO", "senior.beta", "sr", ("04", "10"), "0.1 best of 0.05-0.3", (0.02, 0.1, 0.5)),
    Sweep("3d", "S15", "preference pairs", "senior.examples", "sr", ("04", "10"), "10K chosen of 5K-15K", shares=(0.25, 0.5, 1)),
    Sweep("3e", "S16", "revisions", "revisor.examples", "jr_re", ("05", "10"), "10K chosen of 5K-50K", shares=(0.25, 0.5, 1)),
    Sweep(
        "T3",
        "S9",
        "tasks a topic",
        "topics.tasks_per_topic",
        "jr",
        ("10",),
        "62.6, 61.6, 60.9 at 1, 3, 5",
        (1, 2, 3),  # the recorded teacher brainstormed about three
        kind="fall",
        printed=((3, -1.0),),
    ),
    Sweep(
        "T3",
        "S10",
        "topics truncated",
        "topics.truncate",
        "jr",
        ("01", "02", "10"),
        "62.6 with, 61.8 without",
        kind="fall",
        printed=((False, -0.8),),
        note="13 of the 60 data topics are deeper than four levels; the junior learned from truncated ones at both values",
    ),
    # Table 4. The packages carry one base model, so the weaker one is that model without its last layers.
    Sweep("T4", "S11", "base model", "models.generator", "jr", ("03", "10"), "62.6 to 62.3", ("{own}[:12]",), kind="flat"),
    Sweep(
        "E4", "E4", "LoRA rank", "embedding.lora.rank", "sr_re", ("10",), "+0.3, 0, +0.1 at 8, 16, 32", (4, 16, 64), kind="flat"
    ),
    Sweep(
        "E4",
        "E4",
        "pooling",
        "embedding.pooling",
        "sr_re",
        ("10",),
        "mean -0.4",
        ("mean",),
        kind="flat",
        printed=(("mean", -0.4),),
    ),
)


def named(keys: Sequence[str]) -> list[Sweep]:
    """Sweeps by key; all of them for no key."""
    known = list(dict.fromkeys(s.key for s in SWEEPS))
    for key in keys:
        if key not in known:
            raise UserError(f"sweep {key!r}: unknown; use {', '.join(known)}")
    return [s for k in keys or known for s in SWEEPS if s.key == k]


def point(run: Run, sweep: Sweep, value: Any) -> Point:
    """The run of one value: only the arm that is scored is made, with `study.sweep_seeds`."""
    values = {sweep.parameter: value, "study.arms": [sweep.arm]}
    if run.profile.study.sweep_seeds is not None:
        values |= {"study.seeds": run.profile.study.sweep_seeds, "study.sweep_seeds": None}
    return Point(folder_name(f"{sweep.parameter}={value}"), values, None)


def run_study(profile: str, keys: Sequence[str] = (), *, jobs: int = 1) -> list[tuple[Point, int]]:
    """Run every point that is not the profile's own, which notebooks 00 to 12 have made; returns them with exit codes."""
    run, done = open_run(profile), []
    for sweep in named(keys):
        own = dotted(run.profile)[sweep.parameter]
        todo = [point(run, sweep, v) for v in sweep.points(run) if v != own]
        done += run_points(profile, todo, only=sweep.notebooks, jobs=jobs)
    return done


def at_value(run: Run, sweep: Sweep, value: Any) -> Run:
    """The run of a point: the profile's own, or the variant that `run_study` made for the value."""
    if value == dotted(run.profile)[sweep.parameter]:
        return run
    one = point(run, sweep, value)
    return open_run(run.profile.name, one.overrides, run.profile.seed, variant=one.name)


def records(run: Run, sweep: Sweep, value: Any) -> int | None:
    """How many records each embedding model of a point learned from; None when none was trained there."""
    return experiments.trained_on(at_value(run, sweep, value), sweep.arm)


def collect(run: Run, sweep: Sweep) -> tuple[dict[Any, list[dict[str, Any]]], list[Artifact]]:
    """({value: scores of its training seeds} of the points that were run and are current, the artifacts of these scores)."""
    found: dict[Any, list[dict[str, Any]]] = {}
    inputs: list[Artifact] = []
    own, count = dotted(run.profile)[sweep.parameter], len(run.profile.study.sweep_seeds or run.profile.study.seeds)
    for value in sweep.points(run):
        at = at_value(run, sweep, value)
        if value != own:
            if not (at.folder / "times.jsonl").is_file():
                continue
            names = {f"scores-{sweep.arm}-{s}" for s in experiments.training_seeds(at)}
            with redirect_stdout(StringIO()):
                current = {s.name for s in planning.steps(at) if not s.reason}
            if not names <= current:
                continue
        scores = experiments.scored(at, sweep.arm)[:count]
        if len(scores) == count:
            found[value] = [a.json("scores.json") for a in scores]
            inputs += scores
    return found, inputs


def rows(run: Run, sweep: Sweep, found: Mapping[Any, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows {panel, x, records, value, low, high, ...}: each value's mean score minus that at the profile's own value."""
    own = dotted(run.profile)[sweep.parameter]
    out = []
    for value, results in found.items():
        e = uncertainty.difference(results, found[own])
        out.append(
            {"panel": f"{sweep.key}: {sweep.label}", "x": named_value(value), "own": value == own, "paper": sweep.paper}
            | {"paper_value": dict(sweep.printed).get(value, "")}
            | {"records": records(run, sweep, value)}
            | e.row("")
        )
    return out


def estimate(sweep: Sweep, found: Mapping[Any, Sequence[Any]], run: Run | None = None) -> dict[str, Any] | None:
    """The sweep's claim as one contrast: the inner values minus the better end ("hump": an optimum inside is above both), the
    first value minus the others ("fall"), the last value minus the first ("flat"). None with too few values for it. Of a `run`,
    it says where the values left unequally many records to learn from.
    """
    values = list(found)
    if len(values) < (3 if sweep.kind == "hump" else 2):
        return None
    pairs = {
        "hump": [(values[1:-1], values[:1]), (values[1:-1], values[-1:])],
        "fall": [(values[:1], values[1:])],
        "flat": [(values[-1:], values[:1])],
    }[sweep.kind]
    e, high, low = min(((_minus(found, *pair), *pair) for pair in pairs), key=lambda item: item[0].value)
    said = [" and ".join(map(named_value, part)) for part in (high, low)]
    what = f"{sweep.label}: mean score at {said[0]} minus at {said[1]}{', the better end' * (len(pairs) > 1)}, arm {sweep.arm}"
    counts = {named_value(v): records(run, sweep, v) for v in values} if run else {}
    if len(set(counts.values())) > 1:
        what += f", on unequally many records ({', '.join(f'{n} at {v}' for v, n in counts.items())})"
    return e.row(sweep.claim) | {"what": f"{what} ({sweep.note})" if sweep.note else what, "source": "study"}


def _minus(found: Mapping[Any, Sequence[Any]], high: Sequence[Any], low: Sequence[Any]) -> uncertainty.Estimate:
    terms: list[uncertainty.Term] = [(1 / len(high), found[v], None) for v in high]
    return uncertainty.contrast(terms + [(-1 / len(low), found[v], None) for v in low])


def estimates(found: Mapping[Sweep, Mapping[Any, Sequence[Any]]], run: Run | None = None) -> dict[str, dict[str, Any]]:
    """{claim: estimate}; of two sweeps for one claim the one farther from zero speaks for it, by the end of its interval that is
    nearer to zero, then by the other one."""
    out: dict[str, dict[str, Any]] = {}
    for sweep, points in found.items():
        if e := estimate(sweep, points, run):
            out[sweep.claim] = max((out.get(sweep.claim, e), e), key=_away)
    return out


def _away(e: Mapping[str, Any]) -> tuple[float, float]:
    """How far an interval lies from zero: (its nearer end, 0 when it holds zero; its farther end)."""
    return max(e["low"], -e["high"], 0.0), max(abs(e["low"]), abs(e["high"]))


def named_value(value: Any) -> str:
    """A value as figures and sentences print it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value.removeprefix("package:") if isinstance(value, str) else f"{value:g}"
