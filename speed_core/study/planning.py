"""What a run would do, said before it does it: every stage, why it would run, and what that takes.

The stages are asked, not described a second time: each is called with a store that makes nothing and notes the reason
that the real store would give. Minutes, memory and disk are those of the newest run that made the same artifact, and
where there is none those of the recorded run (`forecast`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from speed_core import console, machine
from speed_core.files import UserError, write_json
from speed_core.models import compute_type, loading
from speed_core.store.artifacts import Artifact, Draft, Store, read_manifest
from speed_core.store.run_context import Run
from speed_core.study import embedding_stages, forecast, generation_stages


@dataclass(frozen=True)
class Step:
    """One stage: `reason` is empty when its artifact is current; seconds, memory (MB), disk (MB) and tokens are None when unknown.

    `inputs` are the artifacts that it reads, as far as they are known: the edges of the graph.

    With `follows` the stage runs only if the stage before it writes something else than it did: an input that is made
    again with the same contents changes nothing.
    """

    notebook: str
    name: str
    reason: str
    follows: bool = False
    seconds: float | None = None
    peak_mb: float | None = None
    disk_mb: float | None = None
    tokens: int | None = None  # that its generator writes
    inputs: tuple[str, ...] = ()
    measured: str = ""
    recorded: bool = False  # the cost is that of the recorded run, perhaps of another machine
    shipped: bool = False  # not made here, but later notebooks can start on one that somebody else made


class DryStore(Store):
    """Makes nothing; remembers for each stage why it would be made."""

    def __init__(self, store: Store):
        super().__init__(store.root, store.shipped, True, store.replay, store.base)
        self.reasons: dict[str, str] = {}
        self.follows: set[str] = set()

    @contextmanager
    def stage(self, name: str, parameters: Mapping[str, Any], parents: Iterable[Artifact] = ()) -> Iterator[Draft | None]:
        parents = list(parents)
        again = [p.name for p in parents if self.reasons.get(p.name)]
        reason = self.why_stale(name, parameters, parents)
        if again and not reason:
            self.follows.add(name)
        self.reasons[name] = reason or (f"if input.{again[0]} changes" if again else "")
        yield None

    def _say(self, artifact: Artifact, differences: Sequence[str]) -> None:
        """Nothing is used yet, so nothing is said."""


def notebook_of(run: Run, name: str) -> str:
    """Number of the notebook that makes an artifact, empty for one that is no stage."""
    dry = dataclasses.replace(run, store=DryStore(run.store))
    return next((notebook for notebook, made, _ in stages(dry) if made == name), "")


class ShippedView(DryStore):
    """Makes nothing; remembers for each stage what its shipped artifact was made with that this run would do otherwise."""

    def __init__(self, store: Store):
        super().__init__(store)
        self.found: dict[str, list[str]] = {}

    @contextmanager
    def stage(self, name: str, parameters: Mapping[str, Any], parents: Iterable[Artifact] = ()) -> Iterator[Draft | None]:
        if artifact := self._from_shipped(name):
            self.found[name] = artifact.changes(parameters, parents)
        yield None


def differences(run: Run, artifact: Artifact) -> list[str]:
    """What a shipped artifact and the shipped ones behind it were made with that `run` would do otherwise, nearest first."""
    view = ShippedView(run.store)
    calls = {name: call for _, name, call in stages(dataclasses.replace(run, store=view))}
    out, todo, seen = [], [artifact.name], set()
    while todo:
        name = todo.pop(0)
        behind = artifact if name == artifact.name else view.get(name)
        if name in seen or behind is None or not behind.shipped:  # what is made here is this run's own affair
            continue
        seen.add(name)
        if name in calls and name not in view.found:
            try:
                with redirect_stdout(StringIO()):
                    calls[name]()
            except (UserError, KeyError):
                pass  # what it is made from is not there, or answers other prompts, which its own entry says
        # A name that only one side has tells of another version of this package, not of another value.
        known = [d for d in view.found.get(name, []) if " None -> " not in d and not d.endswith(" -> None")]
        out += [d if name == artifact.name else f"{name}: {d}" for d in known]
        todo += behind.manifest["parents"]
    return out


def stages(run: Run) -> list[tuple[str, str, Callable[[], Any]]]:
    """(notebook, artifact, the call that makes it), in order. Facts that a notebook only writes down are left out."""
    p = run.profile
    need, seeds = run.store.need, embedding_stages.training_seeds(run)

    def unseen() -> list[Any]:
        return generation_stages.plan(run, "evaluation", p.synthesis.evaluation_prompts, held_out=True)

    def root() -> list[Any]:
        return generation_stages.plan(run, "root", p.senior.prompts)

    def everything() -> list[Any]:
        return generation_stages.plan(run, "synthesis", p.synthesis.count)

    def evaluation(name: str, generator: str) -> tuple[str, Callable[[], Any]]:
        return name, lambda: generation_stages.sample(run, name, unseen(), generator, constrained=False)

    def synthetic() -> Artifact:
        raw, revised = need("raw"), need("revised")
        rows = generation_stages.revised_records(run, raw, revised, everything(), "senior")
        return generation_stages.dataset(run, "synthetic", rows, [raw, revised], "")

    def score(name: str, model: str, **how: Any) -> Callable[[], Any]:
        return lambda: embedding_stages.scores(run, name, need(model), **how)

    def train(name: str, data: str = "synthetic", **how: Any) -> Callable[[], Any]:
        return lambda: embedding_stages.embedder(run, name, need(data), **how)

    out: list[tuple[str, str, Callable[[], Any]]] = [
        ("01", "tasks", lambda: generation_stages.brainstorm(run)),
        ("02", "seeds", lambda: generation_stages.seed_data(run)),
        ("03", *evaluation("eval-base", "base")),
        ("03", "junior", lambda: generation_stages.junior(run)),
        ("03", *evaluation("eval-junior", "junior")),
        ("04", "root", lambda: generation_stages.sample(run, "root", root(), "junior", candidates=p.senior.candidates)),
        ("04", "pairs", lambda: generation_stages.preferences(run, need("root"), root())),
        ("04", "senior", lambda: generation_stages.senior(run)),
        ("04", *evaluation("eval-senior", "senior")),
        ("05", "revisor", lambda: generation_stages.revisor(run)),
        ("05", "revised-eval", lambda: generation_stages.revise(run, "revised-eval", need("eval-junior"), unseen())),
        ("05", "revised-twice", lambda: generation_stages.revise(run, "revised-twice", need("revised-eval"), unseen())),
        ("06", "raw", lambda: generation_stages.sample(run, "raw", everything(), "senior")),
        ("06", "revised", lambda: generation_stages.revise(run, "revised", need("raw"), everything())),
        ("06", "synthetic", synthetic),
    ]
    if p.teacher.kind != "recorded":
        out.insert(9, ("05", "revisions", lambda: generation_stages.revision_rows(run)))
    for layers, seed, arm in embedding_stages.student_arms(run):
        name = embedding_stages.student_name(layers, arm, seed)
        out += [
            ("07", name, partial(embedding_stages.student, run, layers, arm, seed)),
            ("07", f"scores-{name}", score(name, name, tasks=embedding_stages.student_tasks(arm))),
        ]
    out += [("07", "scores-guide-topic", partial(embedding_stages.guide_before, run))]
    names = [(arm, k, f"{arm}-{k}") for arm in ("guided", "plain") for k in seeds]
    out += [("08", f"embedder-{name}", train(f"embedder-{name}", guided=arm == "guided", seed=k)) for arm, k, name in names]
    out += [("09", "scores-untrained", partial(embedding_stages.scores, run, "untrained", p.models.embedder))]
    out += [("09", f"scores-{name}", score(name, f"embedder-{name}")) for _, _, name in names]
    bare = [("09", f"scores-bare-{k}", score(f"bare-{k}", f"embedder-guided-{k}", instructed=False)) for k in seeds]
    out += [
        *bare,
        ("09", "scores-guide", partial(embedding_stages.scores, run, "guide", p.models.guide, instructed=False)),
        ("09", "contamination-synthetic", partial(embedding_stages.contamination, run, "synthetic")),
    ]
    given = p.study.arms
    needed = {"raw-junior": ("jr", "jr_re"), "revised-junior": ("jr_re",), "raw-base": ("base",)}
    made_by = {n: [arm for arm in arms if arm in given][:1] for n, arms in needed.items()} | {
        f"synthetic-{k}": [k] for k in given
    }
    out += [("10", name, partial(embedding_stages.ablation_data, run, arms)) for name, arms in made_by.items() if arms]
    equal = embedding_stages.ablation_size(run)
    for arm, k in [(arm, k) for arm in embedding_stages.ablation_arms(run) for k in seeds]:
        name = f"embedder-{arm}-{k}"
        out.append(("10", name, train(name, f"synthetic-{arm}", limit=equal, seed=k)))
        out.append(("10", f"scores-{arm}-{k}", score(f"{arm}-{k}", name)))
    for layers, seed, arm in embedding_stages.mixed_arms(run):
        name = embedding_stages.student_name(layers, arm, seed)
        out += [
            ("10", name, partial(embedding_stages.student, run, layers, arm, seed)),
            ("10", f"scores-{name}", score(name, name)),
        ]
    # Notebook 10 comes before 11: until its data set is there, the plan takes it for the beginning of notebook 06's.
    soon = p.embedding.guided and "sr_re" in given and not run.store.get("synthetic-sr_re")
    own = [
        n
        for n in embedding_stages.scaling_sizes(run)[:-1]
        if not (embedding_stages.shares_ablation(run, n) or (soon and n == equal))
    ]
    for n, k in [(n, k) for n in own for k in seeds]:
        name = f"embedder-scale{n}-{k}"
        out.append(("11", name, train(name, guided=True, limit=n, seed=k)))
        out.append(("11", f"scores-scale{n}-{k}", score(f"scale{n}-{k}", name)))
    return out


def steps(run: Run) -> list[Step]:
    """Every stage of the run with the one reason why it would be made, and what that took the last time."""
    dry = DryStore(run.store)
    run = dataclasses.replace(run, store=dry)
    console.quiet()
    out, ahead = [], forecast.Forecast.of(run.profile)
    for notebook, name, call in stages(run):
        made = dry.made(name)
        if made is None:
            dry.reasons[name] = "not made yet"
        elif name not in dry.reasons:
            try:
                with redirect_stdout(StringIO()):
                    call()
            except UserError as error:
                missing = [a for a in dry.reasons if f"artifact {a!r}" in str(error)]
                dry.reasons.setdefault(name, f"input.{missing[0]} is not there yet" if missing else str(error))
            except KeyError:  # what is there of an input answers other prompts than this run's
                stale = [a for a in made.manifest["parents"] if dry.reasons.get(a)]
                if stale:
                    dry.reasons.setdefault(name, f"input.{stale[0]} will answer other prompts")
                elif name not in dry.reasons:
                    raise
        reason = dry.reasons.setdefault(name, "")
        shipped = None if made else dry.get(name)
        step = Step(notebook, name, reason, name in dry.follows, shipped=shipped is not None)
        out.append(_cost(step, made, shipped, ahead))
    return out


def stale(run: Run, names: Iterable[str]) -> list[str]:
    """Of `names` those that are not made, or would be made again, each with the reason: ["scores-jr-10: not made yet"]."""
    with redirect_stdout(StringIO()):
        found = {s.name: s.reason for s in steps(run)}
    return [f"{n}: {found.get(n, 'no stage of this run')}" for n in names if found.get(n, "?")]


def _cost(step: Step, made: Artifact | None, shipped: Artifact | None, ahead: forecast.Forecast | None) -> Step:
    """The step with what it took here the last time, else in the recorded run, scaled to this size (`forecast`)."""
    if not made and ahead and (said := ahead.expected(step.name)):
        took = {k: v for k, v in said._asdict().items() if k != "inputs"} | {"seconds": said.seconds * ahead.scale}
        beside = ahead.entry.get("beside", 1)
        where = ahead.entry["device"] + (f", {beside} models at a time" if beside > 1 else "") + ahead.scaled
        return dataclasses.replace(step, **took, inputs=tuple(said.inputs), measured=where, recorded=True)
    known = made or shipped
    if not known:
        return step
    m, size_mb = known.manifest, sum(f["bytes"] for f in known.manifest["files"].values()) / 2**20
    took = {"seconds": known.seconds, "peak_mb": m.get("peak_mb"), "disk_mb": size_mb, "tokens": m.get("new_tokens")}
    return dataclasses.replace(step, **took, inputs=tuple(m["parents"]), measured=m["device"])


def record(run: Run, target: Path | None = None) -> dict[str, Any]:
    """Write what each stage of `run` took into `target` (`forecast.RECORDED`), under the profile's name:
    {artifact: [seconds, peak MB, disk MB, tokens generated, [inputs]]}.

    To be called on the machine that made the run: its speed is measured with it (`machine.layer_seconds`), so that another
    machine can tell how it compares. `other` has what each notebook takes beside its stages: imports, plots, checks. Predictions of machines that have run nothing yet come from here (`steps`).
    """
    target = target or forecast.RECORDED
    found = {s.name: s for s in steps(run) if s.seconds is not None and not s.recorded and not s.shipped}
    if not found:
        raise UserError(f"record: nothing is made in {run.folder.parent.name}/{run.folder.name}; run the notebooks first")
    manifests = [a.manifest for name in found if (a := run.store.made(name))]
    beside = max(m.get("beside", 1) for m in manifests)
    entry = {
        "device": next(iter(found.values())).measured,
        "cpu": machine.cpu(),
        "cores": machine.cores(),
        "compute_type": (kind := compute_type.choose(run.profile.junior.dtype).name),
        "layer_seconds": round(machine.layer_seconds(kind), 6),
        "date": max(m["written"] for m in manifests)[:10],
        **({"beside": beside} if beside > 1 else {}),
        "weights": {role: loading.weights_id(loading.resolve(name)) for role, name in run.profile.models},
        "other": _other(run, found.values()),
        "artifacts": {n: [s.seconds, s.peak_mb, round(s.disk_mb or 0, 2), s.tokens, list(s.inputs)] for n, s in found.items()},
    }
    known = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    write_json(target, known | {run.profile.name: entry})
    return entry


def _other(run: Run, made: Iterable[Step]) -> dict[str, float]:
    """{notebook: seconds of its longest run that are not those of its stages}."""
    path, times = run.folder / "times.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        with suppress(ValueError, TypeError, KeyError):  # half a line of a process that was killed
            times.append({k: json.loads(line)[k] for k in ("notebook", "status", "seconds")})
    whole: dict[str, float] = {}
    for t in times:
        if t["status"] == "ok":  # the longest: another run of a notebook found its stages current
            whole[t["notebook"][:2]] = max(t["seconds"], whole.get(t["notebook"][:2], 0.0))
    of_stages = {n: sum(s.seconds or 0 for s in made if s.notebook == n) for n in whole}
    return {n: round(max(0.0, seconds - of_stages[n]), 1) for n, seconds in whole.items()}


def past_error(run: Run) -> str:
    """How far earlier predictions of this run's stages were off: the median of |predicted - taken| / taken, and of how many.

    A stage is predicted by what it took here the last time, and the first time by the recorded run (`forecast`).
    """
    off, ahead = [], forecast.Forecast.of(run.profile)
    for path in run.store.root.glob("*/manifest.json"):
        m = read_manifest(path.read_bytes(), f"artifact {path.parent.name!r}")
        took = Artifact(path.parent, m).seconds
        first = ahead.expected(m["name"]) if ahead and not m.get("predicted_seconds") else None
        said = m.get("predicted_seconds") or (first.seconds * ahead.scale if first and ahead else 0)
        if said and took >= 1 and said != took:  # shorter stages are all rounding; equal: it is the recorded run
            off.append(abs(said - took) / took)
    return f"past predictions were off by {100 * statistics.median(off):.0f}% (median of {len(off)} stages)" if off else ""


def _line(group: Sequence[Step]) -> str:
    """Minutes, memory, disk and tokens of alike stages, their names, the reason, and the sorts of artifacts that they read."""
    seconds = [s.seconds for s in group if s.seconds is not None]
    took = f"{sum(seconds) / 60:6.1f} min" if len(seconds) == len(group) else "         ?"
    if len(seconds) == len(group):
        took += f" {max(s.peak_mb or 0 for s in group) / 1024:5.1f} GB {sum(s.disk_mb or 0 for s in group):6.1f} MB"
    tokens = sum(s.tokens or 0 for s in group)
    names = group[0].name if len(group) == 1 else f"{group[0].name} to {group[-1].name} ({len(group)} stages)"
    inputs = list(dict.fromkeys(re.sub(r"(-\d+)+$", "", i) for s in group for i in s.inputs))
    read = f"; reads {', '.join(inputs[:4])}{f' and {len(inputs) - 4} more' if len(inputs) > 4 else ''}" if inputs else ""
    reason = f"{group[0].reason}{', shipped' if group[0].shipped else ''}"
    return f"{took}  {names}: {reason}{f'; {tokens:,} tokens' if tokens else ''}{read}"


def _teacher(group: Sequence[Step], asked: Mapping[str, str]) -> str:
    said = [asked[s.name] for s in group if s.name in asked]
    return f"; asks the teacher: {', '.join(said)}" if said else ""


def text(run: Run, notebooks: Sequence[str] = (), asked: Mapping[str, str] | None = None) -> str:
    """The stages (of `notebooks`, numbers; all without) as lines, with what each asks of the teacher (`asked`, by artifact): for each notebook one for what is current, and one for each sort of stage that would run (all
    `embedder-...`, for instance) and its one reason."""
    found = [s for s in steps(run) if not notebooks or s.notebook in notebooks]
    lines, todo = [], [s for s in found if s.reason]
    for notebook in dict.fromkeys(s.notebook for s in found):
        part = [s for s in found if s.notebook == notebook]
        current = [s.name for s in part if not s.reason]
        if current:
            lines.append(f"  {notebook} current: {', '.join(current) if len(current) < 8 else f'{len(current)} artifacts'}")
        alike: dict[tuple[str, str, bool], list[Step]] = {}
        for s in part:
            if s.reason:
                alike.setdefault((s.name.partition("-")[0], s.reason, s.shipped), []).append(s)
        lines += [f"  {notebook} {_line(group)}{_teacher(group, asked or {})}" for group in alike.values()]
    known = [s for s in todo if s.seconds is not None]
    where = sorted({s.measured for s in known})
    if todo:
        minutes = sum(s.seconds or 0 for s in known) / 60
        sure = sum(not s.follows for s in todo)
        total = f"{sure} of {len(found)} stages will run" + (
            f", {len(todo) - sure} more if their input changes" if sure < len(todo) else ""
        )
        if known:
            peak = max((s.peak_mb or 0 for s in known), default=0)
            how = "expected from" if any(s.recorded for s in known) else "measured on"
            total += f"; the stages alone take {minutes:.0f} min, {how} {', '.join(where)}" + (
                f" ({len(todo) - len(known)} not counted)" if len(known) < len(todo) else ""
            )
            total += f", disk {sum(s.disk_mb or 0 for s in known):.0f} MB" + (
                f", memory up to {peak / 1024:.1f} GB" if peak else ""
            )
    else:
        total = f"all {len(found)} stages are current; a run would only draw the figures again"
    if shipped := sum(s.shipped for s in found):
        total += f"; {shipped} artifacts are there as shipped: notebooks that read only those can start first"
    error = past_error(run)
    head = "stages (minutes, memory of the process, disk; why it runs; what it generates and reads):"
    return "\n".join([head, *lines, total, *([error] if error else [])])
