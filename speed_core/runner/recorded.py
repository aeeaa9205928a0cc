"""How a run compares with the recorded run of its profile that ships with the package: texts, verdicts, scores, machines.

Texts are compared, not digests of files: a log names the weights that wrote it, and their last bits may differ from one
processor to the next while every text is the same. A request is found again by its record, attempt and seed.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os.path import commonprefix
from pathlib import Path
from typing import Any

from speed_core import profile as profiles
from speed_core.files import UserError, canonical, write_json
from speed_core.runner.run_archive import has_weights, whole_artifacts
from speed_core.store.artifacts import Artifact, Store
from speed_core.store.run_context import CARRIED, Run, runs_folder
from speed_core.study import claims
from speed_core.study.runs import open_run

# How a run is computed, not what: with other values of these the texts ought to be the same.
HOW = ("engine", "executor", "workers", "ray_address", "batch_size", "concurrency", "dtype", "save_steps")
REPORT, KNOWN = "recorded_comparison.json", "recorded.json"  # beside the figures; beside the recorded artifacts
ABSENT = "not in this run"


@dataclass(frozen=True)
class Stage:
    """Texts of one generation: how many `of` the recorded ones are `equal`, the `first` request whose text is not, with both
    texts, and what the stage as a whole was `asked` otherwise (prompts, decoding)."""

    name: str
    equal: int
    of: int
    first: Mapping[str, Any] | None = None
    asked: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """Two runs: the largest difference of a score (in points) and of a claim's estimate with their place, {claim: [recorded, here]}
    of the verdicts where both runs have them, and what each run computed with and on. None: nothing to compare."""

    stages: Sequence[Stage]
    score: tuple[float, str] | None
    claim: tuple[float, str] | None
    verdicts: Mapping[str, Sequence[str]] | None
    machines: Mapping[str, Mapping[str, str]]


def data_and_scores(store: Store) -> dict[str, Artifact]:
    """The whole artifacts of a run that hold no weights: what the package carries of a recorded run."""
    return {name: a for name, a in whole_artifacts(store).items() if not has_weights(a)}


def compare_texts(name: str, recorded: Iterable[Mapping[str, Any]], here: Iterable[Mapping[str, Any]]) -> Stage:
    """Compare the rows of two logs, whatever their order."""
    then, now = ({(r["record"], r.get("attempt", 1), r.get("seed")): r["raw"] for r in rows} for rows in (recorded, here))
    differ = [key for key, text in then.items() if now.get(key) != text]
    first = None
    if differ:
        record, attempt, seed = key = differ[0]
        first = {"record": record, "attempt": attempt, "seed": seed, "recorded": then[key], "here": now.get(key)}
    return Stage(name, len(then) - len(differ), len(then), first)


def compare(
    recorded: Store, here: Store, known: Mapping[str, Any] | None = None, found: Mapping[str, Any] | None = None
) -> Comparison:
    """Compare the artifacts of two runs, and {claim: {"ours", "verdict"}} of both."""
    then, now = (data_and_scores(store) for store in (recorded, here))
    stages = []
    for old in sorted(filter(_generated, then.values()), key=lambda a: (a.manifest["written"], a.name)):
        new = now.get(old.name)
        stage = compare_texts(old.name, old.rows(), new.rows() if new else [])
        asked = list(map(str, old.other_parameters(new.manifest["parameters"]))) if new else [ABSENT]
        stages.append(replace(stage, asked=asked))
    numbers = [_scores(then.values()), _scores(now.values())]
    estimates = [{k: float(v["ours"]) for k, v in rows.items() if v["ours"]} for rows in (known or {}, found or {})]
    verdicts = {k: [v["verdict"], found.get(k, {}).get("verdict", ABSENT)] for k, v in known.items()} if known and found else None
    machines = {"recorded": _machine(then.values()), "here": _machine(now.values())}
    return Comparison(stages, _largest(*numbers), _largest(*estimates), verdicts, machines)


def _generated(a: Artifact) -> bool:
    return "generator" in a.manifest["parameters"] and "data.jsonl" in a.manifest["files"]


def _scored(a: Artifact) -> bool:
    return "scores.json" in a.manifest["files"]


def _scores(made: Iterable[Artifact]) -> dict[str, float]:
    """{"ARTIFACT, TASK": points} of everything that was scored."""
    scored = {a.name: a.json("scores.json")["tasks"] for a in made if _scored(a)}
    return {f"{name}, {task}": 100 * s["score"] for name, tasks in scored.items() for task, s in tasks.items()}


def _largest(then: Mapping[str, float], now: Mapping[str, float]) -> tuple[float, str] | None:
    return max(((round(abs(v - now[k]), 4), k) for k, v in then.items() if k in now), default=None)


def _machine(made: Iterable[Artifact]) -> dict[str, str]:
    """Compute type, instruction set and device of what ran a model."""
    used = [a.manifest for a in made if _generated(a) or _scored(a)]
    told = {key: sorted({str(m[key]) for m in used if m.get(key)}) for key in ("compute_type", "instructions", "device")}
    return {key: ", ".join(values) or "unknown" for key, values in told.items()}


def text(c: Comparison, other: str) -> str:
    """What is equal in one line, what differs in a line each. `other`: what the first of both runs is called."""
    lines = [f"compared with {other}: {sum(s.equal for s in c.stages)} of {sum(s.of for s in c.stages)} texts equal"]
    equal = [f"{s.name} {s.of}" for s in c.stages if s.equal == s.of and not s.asked]
    lines += [f"  all of {', '.join(equal)}"] if equal else []
    lines += [f"  {s.name} {s.equal} of {s.of}: {_why(s)}" for s in c.stages if s.equal < s.of or s.asked]
    if c.verdicts is not None:
        changed = [f"  {k}: recorded {old!r}, here {new!r}" for k, (old, new) in c.verdicts.items() if old != new]
        lines += [f"  {len(c.verdicts) - len(changed)} of {len(c.verdicts)} verdicts equal", *changed]
    for what, found in (("a score, in points", c.score), ("a claim's estimate", c.claim)):
        lines += [f"  largest difference of {what}: {found[0]:.2f} ({found[1]})"] if found else []
    for run, said in c.machines.items():
        lines.append(f"  {run}: compute type {said['compute_type']}, instructions {said['instructions']}, on {said['device']}")
    return "\n".join(lines)


def _why(s: Stage) -> str:
    said = [
        re.sub(r"\b([0-9a-f]{8})[0-9a-f]{8,}\b", r"\1", f"with other settings: {a}" if a != ABSENT else a) for a in s.asked[:1]
    ]
    if s.first and ABSENT not in s.asked:
        here, there = s.first["here"], s.first["recorded"]
        how = "was not asked here" if here is None else f"differs from character {len(commonprefix([here, there])) + 1} on"
        said.insert(0, f"the first is record {s.first['record']}, which {how}")
    return "; ".join(said)


def write(run: Run) -> Path:
    """Put beside the artifacts of a recorded run what they do not hold: the values of its profile, its verdicts, and the last step
    of each training whose weights are left out."""
    target = CARRIED / run.profile.name / KNOWN
    made = (a for name, a in whole_artifacts(run.store).items() if not name.startswith("student-"))
    last = {a.name: a.json("training.json")["history"][-1] for a in made if "training.json" in a.manifest["files"]}
    write_json(target, {"values": _values(run.profile), "verdicts": _verdicts(run.figures), "trainings": last})
    return target


def _values(p: profiles.Profile) -> dict[str, Any]:
    left_out = ("description", "sources", "minutes")
    values = {k: v for k, v in profiles.dotted(p).items() if k.partition(".")[0] not in left_out and k.split(".")[-1] not in HOW}
    return json.loads(canonical(values))


def _verdicts(figures: Path) -> dict[str, dict[str, str]]:
    if not (figures / "claims.csv").is_file():
        return {}
    with (figures / "claims.csv").open(newline="", encoding="utf-8") as f:
        return claims.present_ids({r["id"]: {"ours": r["ours"], "verdict": r["verdict"]} for r in csv.DictReader(f)})


def report(run: Run) -> str:
    """Compare a run with the recorded run of its profile; write the result beside the figures and return it as text.

    Empty where there is no recorded run; one line where a value of the profile is another one, which makes another run.
    """
    name, folder, target = run.profile.name, CARRIED / run.profile.name, run.figures / REPORT
    target.unlink(missing_ok=True)  # what is said of an earlier run in this folder
    if run.point or not folder.is_dir():
        return ""
    known = json.loads((folder / KNOWN).read_text(encoding="utf-8")) if (folder / KNOWN).is_file() else {}
    mine, theirs = _values(run.profile), known.get("values") or _values(profiles.load(name))
    if others := [f"{k} is {mine[k]!r} here and {v!r} there" for k, v in theirs.items() if k in mine and mine[k] != v]:
        more = f", and {len(others) - 1} more values differ" if len(others) > 1 else ""
        return f"not compared with the recorded run of {name}: {others[0]}{more}"
    then, now = claims.present_ids(known.get("verdicts") or {}), _verdicts(run.figures)
    found = compare(Store(folder), run.store, then, now)
    write_json(target, {"profile": name, **asdict(found)})
    said = text(found, f"the recorded run of {name}")
    return said if found.verdicts else f"{said}\n  {'this' if then else 'the recorded'} run holds no verdicts"


def report_later(profile: str) -> str:
    """`report` of the run that is on disk, with the values that its figures name."""
    name = profiles.load(profile).name
    if not (runs_folder() / name / "artifacts").is_dir():
        raise UserError(f"check --recorded: no run of profile {name} is here; run `python -m speed_core run --profile {name}`")
    drawn = open_run(profile).figures / "12_claims.json"
    said = json.loads(drawn.read_text(encoding="utf-8")) if drawn.is_file() else {}
    run = open_run(profile, said["overrides"] if said.get("profile") == name else None)
    return report(run) or f"profile {name} has no recorded run to compare with"
