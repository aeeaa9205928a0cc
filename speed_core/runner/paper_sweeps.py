"""The sweeps of SPEED's Fig. 3 and Table 3: reruns of the same notebooks with one value changed, and what they say.

Each point is a run of its own over the profile's run (`sweep`): it makes again only what its value decides. The score of a
point is that of the embedding models trained on the data set that the value decides (`arm`, see `ablation_stages.ARMS`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from speed_core.evaluation import uncertainty
from speed_core.files import UserError
from speed_core.plots import provenance
from speed_core.profile import dotted
from speed_core.runner import replicates
from speed_core.runner.sweep import Point, folder_name, run_points
from speed_core.store.artifacts import Artifact
from speed_core.store.run_context import Run
from speed_core.study import ablation_stages, embedding_stages, paper_values, planning, score_stages, stage
from speed_core.study.paper_values import SWEPT
from speed_core.study.runs import open_run


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
    values: tuple[Any, ...] = ()
    shares: tuple[float, ...] = ()
    kind: Literal["hump", "fall", "flat"] = "hump"
    # (value, the paper's points against its own value), where it prints them; several for a value that stands for several
    printed: tuple[tuple[Any, float], ...] = ()
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


BRAINSTORMED = ("01", "02", "10")  # notebooks: of more than three tasks the brainstorm prompts ask for more
SWEEPS = (
    Sweep("3a", "S12", "temperature", "generation.temperature", "jr", ("10",), (0.3, 0.7, 1.0, 1.3)),
    Sweep("3b", "S13", "seed examples", "junior.examples", "jr", ("03", "10"), shares=(0.125, 0.25, 0.5, 1)),
    Sweep("3c", "S14", "beta of DPO", "senior.beta", "sr", ("04", "10"), (0.02, 0.1, 0.5)),
    Sweep("3d", "S15", "preference pairs", "senior.examples", "sr", ("04", "10"), shares=(0.25, 0.5, 1)),
    Sweep("3e", "S16", "revisions", "revisor.examples", "jr_re", ("05", "10"), shares=(0.25, 0.5, 1)),
    Sweep(
        "T3", "S9", "tasks per topic", "topics.tasks_per_topic", "jr", BRAINSTORMED, (1, 3, 5),
        kind="fall", printed=paper_values.TASKS_PER_TOPIC,
    ),
    Sweep(
        "T3", "S10", "topics truncated", "topics.truncate", "jr", BRAINSTORMED,
        kind="fall", printed=((False, paper_values.TOPICS_NOT_TRUNCATED),),
        note="13 of the 60 data topics are deeper than four levels; the junior learned from truncated ones at both values",
    ),
    # Table 4 (Qwen-2.5-7B, LLaMA-2-7B, Gemma-7B against LLaMA-3-8B). The packages carry one base model, so the weaker one is that model
    # without its last layers.
    Sweep(
        "T4", "S11", "base model", "models.generator", "jr", ("03", "10"), ("{own}[:12]",),
        kind="flat", printed=tuple(("{own}[:12]", points) for points in paper_values.OTHER_BASE_MODELS),
    ),
    Sweep("E4", "E4", "LoRA rank", "embedding.lora.rank", "sr_re", ("10",), (4, 16, 64), kind="flat"),
    Sweep(
        "E4", "E4", "pooling", "embedding.pooling", "sr_re", ("10",), ("mean",),
        kind="flat", printed=(("mean", paper_values.MEAN_POOLING),),
    ),
)  # fmt: skip


def named(keys: Sequence[str]) -> list[Sweep]:
    """Sweeps by key; all of them for no key. `replicates.KEY` is known too, and no sweep."""
    known = list(dict.fromkeys(s.key for s in SWEEPS))
    for key in keys:
        if key not in (*known, replicates.KEY):
            raise UserError(f"sweep {key!r}: unknown; use {', '.join(known)} or {replicates.KEY}")
    return [s for k in keys or known for s in SWEEPS if s.key == k]


def point(run: Run, sweep: Sweep, value: Any) -> Point:
    """The run of one value: only the arm that is scored is made, with `study.sweep_seeds`."""
    values = {sweep.parameter: value, "study.arms": [sweep.arm]}
    if run.profile.study.sweep_seeds is not None:
        values |= {"study.seeds": run.profile.study.sweep_seeds, "study.sweep_seeds": None}
    return Point(folder_name(f"{sweep.parameter}={value}"), values, None)


def run_study(profile: str, keys: Sequence[str] = (), *, jobs: int = 1) -> list[tuple[Point, int]]:
    """Run every point that is not the profile's own, which notebooks 00 to 12 have made, and the further trainings of the
    generators; returns them with exit codes."""
    run, done = open_run(profile), []
    for sweep in named(keys):
        own = dotted(run.profile)[sweep.parameter]
        todo = [point(run, sweep, v) for v in sweep.points(run) if v != own]
        done += run_points(profile, todo, only=sweep.notebooks, jobs=jobs)
    if not keys or replicates.KEY in keys:
        done += run_points(profile, replicates.points(run), only=replicates.NOTEBOOKS, jobs=jobs)
    return done


def at_value(run: Run, sweep: Sweep, value: Any) -> Run:
    """The run of a point: the profile's own, or the variant that `run_study` made for the value."""
    if value == dotted(run.profile)[sweep.parameter]:
        return run
    one = point(run, sweep, value)
    return open_run(run.profile.name, one.overrides, run.profile.seed, variant=one.name)


def records(run: Run, sweep: Sweep, value: Any) -> int | None:
    """How many records each embedding model of a point learned from; None when none was trained there."""
    return embedding_stages.trained_on(at_value(run, sweep, value), sweep.arm)


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
            if planning.stale(at, [f"scores-{sweep.arm}-{s}" for s in embedding_stages.training_seeds(at)]):
                continue
        scores = score_stages.scored(at, sweep.arm)[:count]
        if len(scores) == count:
            found[value] = [a.json("scores.json") for a in scores]
            inputs += scores
    return found, inputs


def rows(run: Run, sweep: Sweep, found: Mapping[Any, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows {panel, x, records, value, low, high, ...}: each value's mean score minus that at the profile's own value."""
    own = dotted(run.profile)[sweep.parameter]
    printed = [(v.format(own=own) if isinstance(v, str) else v, points) for v, points in sweep.printed]
    out = []
    for value, results in found.items():
        e = uncertainty.difference(results, found[own])
        shown = [points for v, points in printed if v == value]
        out.append(
            {"panel": f"{sweep.key}: {sweep.label}", "x": named_value(value), "own": value == own, "paper": SWEPT[sweep.label]}
            | {"paper_value": shown[0] if len(shown) == 1 else shown or ""}
            | {"records": records(run, sweep, value)}
            | e.row("")
        )
    return out


def compare(run: Run) -> tuple[list[dict[str, Any]], list[Artifact], dict[Sweep, dict[Any, list[dict[str, Any]]]]]:
    """(rows of the figure, artifacts behind them, {sweep: {value: scores}}) of the sweeps that have a point beside the profile's own
    value; nothing for a point of a sweep, or where a profile leaves arms out."""
    panels: list[dict[str, Any]] = []
    inputs: list[Artifact] = []
    found = {}
    for sweep in SWEEPS if ablation_stages.compares_all(run) else ():
        points, used = collect(run, sweep)
        if len(points) > 1:
            panels += rows(run, sweep, points)
            inputs += used
            found[sweep] = points
    return panels, inputs, found


def estimate(sweep: Sweep, found: Mapping[Any, Sequence[Any]], run: Run | None = None) -> dict[str, Any] | None:
    """The sweep's claim as one contrast: the best inner value minus an end ("hump", see `_inside`), the first value minus the
    others ("fall"), the last value minus the first ("flat"). None with too few values for it. Of a `run`, it says where the values
    left unequally many records to learn from, and how many tasks and topics these have where tasks per topic are the value.
    """
    values = list(found)
    if len(values) < (3 if sweep.kind == "hump" else 2):
        return None
    level, chosen = 0.95, ""
    if sweep.kind == "hump":
        e, best, end, level = _inside(found)
        high, low = [best], [end]
        chosen = f", the closer end{f' ({level:.1%}, as {best:g} was chosen)' * (level > 0.95)}"
    else:
        high, low = (values[:1], values[1:]) if sweep.kind == "fall" else (values[-1:], values[:1])
        e = _minus(found, high, low)
    said = [" and ".join(map(named_value, part)) for part in (high, low)]
    what = f"{sweep.label}: mean score at {said[0]} minus at {said[1]}{chosen}, arm {sweep.arm}"
    counts = {named_value(v): records(run, sweep, v) for v in values} if run else {}
    if len(set(counts.values())) > 1:
        what += f", on unequally many records ({', '.join(f'{n} at {v}' for v, n in counts.items())})"
    note = sweep.note
    if run and sweep.parameter == "topics.tasks_per_topic":
        note = _more_tasks([variety(run, sweep, v) for v in values])
    more = {"level": level} if level > 0.95 else {}
    return e.row(sweep.claim) | more | {"what": f"{what} ({note})" if note else what, "source": "study"}


def _inside(found: Mapping[Any, Sequence[Any]]) -> tuple[uncertainty.Estimate, Any, Any, float]:
    """(the best inner value minus an end, that value, that end, level of the interval) of a curve over rising values.

    An optimum inside is one inner value above *both* ends, so the end whose interval reaches lower decides. The best of k inner
    values was chosen by its score, so its interval has level 1 - 0.05 / k (Bonferroni).
    """
    (first, *inner, last), level = list(found), 0.95
    level = 1 - (1 - level) / len(inner)
    best = max(inner, key=lambda v: _minus(found, [v], [first]).value)
    e, end = min(((_minus(found, [best], [x], level), x) for x in (first, last)), key=lambda item: item[0].low)
    return e, best, end, level


def variety(run: Run, sweep: Sweep, value: Any) -> tuple[int, int]:
    """(distinct tasks, distinct topics) of the records that the embedding models of a point learned from."""
    at = at_value(run, sweep, value)
    used = at.store.need(f"synthetic-{sweep.arm}").rows("train.jsonl")[: records(run, sweep, value)]
    return len({r["task"] for r in used}), len({r["topic"] for r in used})


def _more_tasks(found: Sequence[tuple[int, int]]) -> str:
    """What the tasks per topic changed in the data: at the paper's size more of them leave fewer topics, and so less variety."""
    tasks, topics = (" / ".join(map(str, column)) for column in zip(*found, strict=True))
    said = f"{tasks} distinct tasks on {topics} topics"
    return f"{said}: more per topic varies tasks more here, less in the paper" if found[-1][0] > found[0][0] else said


def _minus(
    found: Mapping[Any, Sequence[Any]], high: Sequence[Any], low: Sequence[Any], level: float = 0.95
) -> uncertainty.Estimate:
    terms: list[uncertainty.Term] = [(1 / len(high), found[v], None) for v in high]
    return uncertainty.contrast(terms + [(-1 / len(low), found[v], None) for v in low], level=level)


def estimates(found: Mapping[Sweep, Mapping[Any, Sequence[Any]]], run: Run | None = None) -> dict[str, dict[str, Any]]:
    """{claim: estimate}; of two sweeps for one claim the one farther from zero speaks for it, by the end of its interval that is
    nearer to zero, then by the other one."""
    out: dict[str, dict[str, Any]] = {}
    for sweep, points in found.items():
        if e := estimate(sweep, points, run):
            out[sweep.claim] = max((out.get(sweep.claim, e), e), key=_away)
    return out


@dataclass
class _Used(Artifact):
    """An artifact under its key in `provenance`: several points of a sweep have artifacts of one name."""

    key: str = ""

    @property
    def name(self) -> str:
        return self.key


def keep(run: Run, facts: Mapping[str, Any], given: Sequence[Artifact], name: str = "study") -> Artifact | None:
    """Artifact `study` (or `name`): the estimates of the sweeps, made from the scores of all their points (`given`, of `collect`), so
    that what rests on it is stale when one of them moves. A run without estimates replaces those that it made before, begins none."""
    if not facts and (run.point or not run.store.made(name)):
        return None
    now = provenance.Now([run.store.root])
    return stage.note(run, name, facts, [_Used(a.path, a.manifest, a.shipped, now.key(a)) for a in given])


def _away(e: Mapping[str, Any]) -> tuple[float, float]:
    """How far an interval lies from zero: (its nearer end, 0 when it contains zero; its farther end)."""
    return max(e["low"], -e["high"], 0.0), max(abs(e["low"]), abs(e["high"]))


def named_value(value: Any) -> str:
    """A value as figures and sentences print it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value.removeprefix("package:") if isinstance(value, str) else f"{value:g}"
