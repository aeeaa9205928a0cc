"""What a run would do, told before it does it: every stage, why it would run, and what that takes.

Minutes, memory and disk are those of the newest run that made the same artifact, and where there is none those of the recorded
run (`forecast`).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_core import console, machine
from speed_core.files import UserError, write_json
from speed_core.models import compute_type, loading
from speed_core.store.artifacts import Artifact, Difference, MissingArtifact, OtherPrompts, notebook_number, read_manifest
from speed_core.store.run_context import Run
from speed_core.study import forecast, score_stages  # noqa: F401 - score_stages and what it imports declare all stages
from speed_core.study.stage import Planned, planned


@dataclass(frozen=True)
class Step:
    """One stage: `reason` is empty when its artifact is current; seconds, memory (MB), disk (MB) and tokens are None when unknown.

    With `follows` the stage runs only if the stage before it writes something else than it did: an input that is made
    again with the same contents changes nothing.
    """

    planned: Planned
    inputs: tuple[str, ...]  # the artifacts that it reads
    reason: str
    follows: bool = False
    seconds: float | None = None
    peak_mb: float | None = None
    disk_mb: float | None = None
    tokens: int | None = None  # that its generator writes
    measured: str = ""
    recorded: bool = False  # the cost is that of the recorded run, perhaps of another machine
    shipped: bool = False  # not made here, but later notebooks can start on one that somebody else made

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def notebook(self) -> str:
        return self.planned.notebook


class Reasons:
    """Why each stage of a run would be made: the reason (empty where it is current), and whether it only follows its input."""

    def __init__(self, run: Run):
        self.run, self._store = dataclasses.replace(run, store=run.store.silent()), run.store
        self.known = {p.name: p for p in planned(self.run)}
        self._found: dict[str, tuple[str, bool]] = {}

    def of(self, name: str) -> tuple[str, bool]:
        if name not in self._found:
            self._found[name] = self._why(self.known[name]) if name in self.known else ("", False)
        return self._found[name]

    def _why(self, one: Planned) -> tuple[str, bool]:
        if self.run.store.made(one.name) is None:
            return "not made yet", False
        again = [name for name in one.reads(self.run) if self.run.store.get(name) and self.of(name)[0]]
        try:
            parameters, used, read = one.decided_by(self.run)
        except MissingArtifact as error:
            return f"input.{error.name} is not there yet", False
        except OtherPrompts as error:  # an input that was made for other prompts
            return f"input.{again[0]} will answer other prompts" if again else str(error), False
        except UserError as error:
            return str(error), False
        reason = self._store.why_stale(one.name, parameters, [*used, *read])
        return (reason, False) if reason or not again else (f"if input.{again[0]} changes", True)


def differences(run: Run, artifact: Artifact) -> list[Difference]:
    """What a shipped artifact and the shipped ones behind it were made with that `run` would do otherwise, nearest first."""
    run = dataclasses.replace(run, store=run.store.silent())
    out: list[Difference] = []
    known = {p.name: p for p in planned(run)}
    todo, seen = [artifact.name], set()
    while todo:
        name = todo.pop(0)
        behind = artifact if name == artifact.name else run.store.get(name)
        if name in seen or behind is None or not behind.shipped:  # what is made here is this run's own affair
            continue
        seen.add(name)
        if one := known.get(name):
            with suppress(UserError):  # what it is made from is not there, or answers other prompts, which its own entry says
                parameters, used, read = one.decided_by(run)
                found = behind.changes(parameters, [*used, *read])
                # A name that only one side has tells of another version of this package, not of another value.
                out += [
                    dataclasses.replace(d, of="" if name == artifact.name else name)
                    for d in found
                    if d.then is not None and d.now is not None
                ]
        todo += behind.manifest["parents"]
    return out


def steps(run: Run) -> list[Step]:
    """Every stage of the run with the one reason why it would be made, and what that took the last time."""
    console.quiet()
    out, ahead, why = [], forecast.Forecast.of(run.profile), Reasons(run)
    for one in why.known.values():
        made, (reason, follows) = why.run.store.made(one.name), why.of(one.name)
        shipped = None if made else why.run.store.get(one.name)
        step = Step(one, tuple(one.reads(why.run)), reason, follows, shipped=shipped is not None)
        out.append(_cost(step, made, shipped, ahead))
    return out


def stale(run: Run, names: Iterable[str]) -> list[str]:
    """Of `names` those that are not made, or would be made again, each with the reason: ["scores-jr-10: not made yet"]."""
    why = Reasons(run)
    found = {n: why.of(n)[0] if n in why.known else "no stage of this run" for n in names}
    return [f"{n}: {reason}" for n, reason in found.items() if reason]


def why_text(run: Run, name: str) -> str:
    """What an artifact is made from: the function that makes it, its notebook, its inputs with the reasons why they would be made
    again, its parameters as far as they can be told."""
    why = Reasons(run)
    one = why.known.get(name)
    if one is None:
        raise UserError(f"{name!r}: no stage of profile {run.profile.name}; `python -m speed_core plan` lists them")
    write = one.stage.write
    lines = [f"{name}: {one.kind}, of notebook {one.notebook}, declared as {one.stage.name!r} in {write.__module__}"]
    lines += [f"  {why.of(name)[0] or 'current'}"]
    for parent in one.reads(why.run):
        there = why.run.store.get(parent)
        state = f"{there.digest}{', shipped' if there.shipped else ''}" if there else "not there yet"
        reason = why.of(parent)[0]
        lines.append(f"  reads {parent}: {state}{f' ({reason})' if there and reason else ''}")
    try:
        lines.append(f"  parameters {json.dumps(one.decided_by(why.run)[0], default=str)}")
    except UserError as error:
        lines.append(f"  parameters are not known yet: {error}")
    return "\n".join(lines)


def _cost(step: Step, made: Artifact | None, shipped: Artifact | None, ahead: forecast.Forecast | None) -> Step:
    """The step with what it took here the last time, else in the recorded run, scaled to this size (`forecast`)."""
    if not made and ahead and (told := ahead.expected(step.planned)):
        took: dict[str, Any] = {
            "seconds": told.seconds * ahead.scale,
            "peak_mb": told.peak_mb,
            "disk_mb": told.disk_mb,
            "tokens": told.tokens,
        }
        beside = ahead.entry.get("beside", 1)
        where = ahead.entry["device"] + (f", {beside} models at a time" if beside > 1 else "") + ahead.scaled
        return dataclasses.replace(step, **took, measured=where, recorded=True)
    known = made or shipped
    if not known:
        return step
    m, size_mb = known.manifest, sum(f["bytes"] for f in known.manifest["files"].values()) / 2**20
    took = {"seconds": known.seconds, "peak_mb": m.get("peak_mb"), "disk_mb": size_mb, "tokens": m.get("new_tokens")}
    return dataclasses.replace(step, **took, measured=m["device"])


def record(run: Run, target: Path | None = None) -> dict[str, Any]:
    """Write what each stage of `run` took into `target` (`forecast.RECORDED`), under the profile's name:
    {artifact: [seconds, peak MB, disk MB, tokens generated, declared name, work]}.

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
        "artifacts": {
            n: [s.seconds, s.peak_mb, round(s.disk_mb or 0, 2), s.tokens, s.planned.stage.name, s.planned.work(run.profile)]
            for n, s in found.items()
        },
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
            number = notebook_number(t["notebook"])
            whole[number] = max(t["seconds"], whole.get(number, 0.0))
    of_stages = {n: sum(s.seconds or 0 for s in made if s.notebook == n) for n in whole}
    return {n: round(max(0.0, seconds - of_stages[n]), 1) for n, seconds in whole.items()}


def past_error(run: Run) -> str:
    """How far earlier predictions of this run's stages were off: the median of |predicted - taken| / taken, and of how many.

    A stage is predicted by what it took here the last time, and the first time by the recorded run (`forecast`).
    """
    off, ahead, known = [], forecast.Forecast.of(run.profile), {p.name: p for p in planned(run)}
    for path in run.store.root.glob("*/manifest.json"):
        m = read_manifest(path.read_bytes(), f"artifact {path.parent.name!r}")
        took = Artifact(path.parent, m).seconds
        first = ahead.expected(known[m["name"]]) if ahead and m["name"] in known and not m.get("predicted_seconds") else None
        said = m.get("predicted_seconds") or (first.seconds * ahead.scale if first and ahead else 0)
        if said and took >= 1 and said != took:  # shorter stages are all rounding; equal: it is the recorded run
            off.append(abs(said - took) / took)
    return f"past predictions were off by {100 * statistics.median(off):.0f}% (median of {len(off)} stages)" if off else ""


def _line(group: Sequence[Step]) -> str:
    """Minutes, memory, disk and tokens of alike stages, their names, the reason, and the artifacts that they read."""
    seconds = [s.seconds for s in group if s.seconds is not None]
    took = f"{sum(seconds) / 60:6.1f} min" if len(seconds) == len(group) else "         ?"
    if len(seconds) == len(group):
        took += f" {max(s.peak_mb or 0 for s in group) / 1024:5.1f} GB {sum(s.disk_mb or 0 for s in group):6.1f} MB"
    tokens = sum(s.tokens or 0 for s in group)
    names = group[0].name if len(group) == 1 else f"{group[0].name} to {group[-1].name} ({len(group)} stages)"
    inputs = list(dict.fromkeys(i for s in group for i in s.inputs))
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
                alike.setdefault((s.planned.stage.name, s.reason, s.shipped), []).append(s)
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
