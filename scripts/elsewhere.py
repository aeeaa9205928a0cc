"""Collect what every recorded run of `tiny` got for the numbers that another machine may change: speed_core/assets/elsewhere.json.

    python scripts/elsewhere.py                    # in a checkout with its history, after scripts/record.py has recorded a run of tiny
    python scripts/elsewhere.py --add runs/FOLDER  # takes one more run in, made on this machine

The runs are those that the package carried at the commits of `EARLIER`, the one that it carries now, and those that were added. An
entry of a number names the settings that decide it and were others than today's (`other`); only entries without any are one range.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from speed_core import machine
from speed_core.console import user_errors
from speed_core.data.prompts import Prompt
from speed_core.evaluation import uncertainty
from speed_core.files import ASSETS, UserError, read_jsonl, write_json
from speed_core.preference import pairs
from speed_core.profile import dotted
from speed_core.runner import recorded
from speed_core.store.run_context import ROOT
from speed_core.study import generation_stages
from speed_core.study.runs import open_run
from workbook import measure

PROFILE = "tiny"
EARLIER = (
    "a7bb3d9",
    "d9b76a7",
    "4b68a4f",
    "403d77a",
    "6720f75",
    "65112af",
    "ddb24d6",
)  # commits that recorded a run of it, oldest first
TARGET = ASSETS / "elsewhere.json"
PAGE, MARKS = ROOT / "docs" / "results.md", ("<!-- elsewhere -->", "<!-- end -->")
SHIPPED, SETTINGS = f"speed_core/assets/shipped/{PROFILE}", f"speed_core/profiles/{PROFILE}.json"
TIMES = "speed_core/assets/recorded_times.json"

# Settings by the beginning of their names: each list decides what stands on it.
TEXTS = ("models.generator", "topics", "prompts", "seeds", "seed", "data_seed", "generation.temperature", "generation.top_p")
UNSEEN = (*TEXTS, "generation.max_new_tokens", "synthesis.evaluation_prompts")
JUNIOR = (*UNSEEN, "junior.examples", "junior.epochs", "junior.lr", "junior.batch", "junior.lora")
TRAINING = ("examples", "epochs", "lr", "batch", "lora", "beta", "warmup_ratio")
CANDIDATES = (*JUNIOR, "senior.candidates", "senior.prompts")
SENIOR = (*CANDIDATES, *(f"senior.{k}" for k in TRAINING))
REVISOR = (*JUNIOR, *(f"revisor.{k}" for k in TRAINING))
DATA = (*SENIOR, *REVISOR, "synthesis.count", "curate")
SCORES = ("models.embedder", "evaluation.size", "evaluation.tasks", "evaluation.max_length")
EMBEDDERS = (
    *DATA,
    *SCORES,
    "models.guide",
    "study.seeds",
    *(f"embedding.{k}" for k in (*TRAINING, "guided", "temperature", "pooling")),
)
ABLATION = (*EMBEDDERS, "study.ablation_examples")
GUIDE = ("models.guide", "evaluation.size", "data_seed")
STUDENTS = (*GUIDE, "seeds", "study.student", "embedding.temperature")


def deciding(settings: Iterable[str], by: Sequence[str]) -> list[str]:
    """The settings that are named in `by`, themselves or by the beginning of their names."""
    return [k for k in settings if any(k == name or k.startswith(f"{name}.") for name in by)]


@dataclass(frozen=True)
class Recorded:
    """One recorded run: `folder` holds its artifacts, `settings` is its profile, `now` today's."""

    folder: Path
    settings: Mapping[str, Any]
    now: Mapping[str, Any]

    def json(self, artifact: str, name: str = "") -> Any:
        path = self.folder / artifact / (name or f"{artifact}.json")
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def scores(self, arm: str) -> list[Any]:
        found = [self.json(f"scores-{arm}-{seed}", "scores.json") for seed in range(3)]
        return found if all(found) else []

    def values(self) -> dict[str, float]:
        """What the run got for each of `NUMBERS` that it has."""
        found = {name: read(self) for name, (_, read, _) in NUMBERS.items()}
        return {name: round(value, 4) for name, value in found.items() if value is not None}

    def other(self, decided_by: tuple[str, ...]) -> list[str]:
        """The settings of this run that decide a number and are others now, as "junior.examples 322, now 160"."""
        names = [k for k in deciding(self.settings, decided_by) if k in self.now]
        return [f"{k} {self.settings[k]}, now {self.now[k]}" for k in names if self.settings[k] != self.now[k]]


def valid(artifact: str) -> Callable[[Recorded], float | None]:
    def share(r: Recorded) -> float | None:
        found = r.json(artifact, "manifest.json")
        return found["outcomes"]["ok"] / sum(found["outcomes"].values()) if found else None

    return share


def minus(a: str, b: str, types: Sequence[str] | None = None) -> Callable[[Recorded], float | None]:
    def difference(r: Recorded) -> float | None:
        before = r.json("scores-untrained", "scores.json")
        ours, theirs = r.scores(a), [before] * bool(before) if b == "untrained" else r.scores(b)
        return uncertainty.difference(ours, theirs, types).value if ours and theirs else None

    return difference


def noted(artifact: str, claim: str, part: str = "", ignore: str = r"\(.*\)|[\d,/]+") -> Callable[[Recorded], float | None]:
    """What a notebook noted down for a claim; None where an earlier one asked something else under its name: where the words beside
    the value differ by more than `ignore` matches."""

    def value(r: Recorded) -> float | None:
        asked = [(where.json(artifact) or {}).get(claim, {}) for where in (r, Recorded(ASSETS / "shipped" / PROFILE, {}, {}))]
        found, today = (re.sub(ignore, "", a.get("what", "")) for a in asked)
        entry = asked[0].get(part, {}) if part else asked[0]
        return entry.get("value") if found == today else None

    return value


def last(training: str, key: str) -> Callable[[Recorded], float | None]:
    """The mean over seeds of a value of the last step; runs that were recorded before 1 December 2026 kept none."""

    def value(r: Recorded) -> float | None:
        kept = (r.json(".", recorded.KNOWN) or {}).get("trainings", {})
        names = [training] if "{" not in training else [training.format(seed) for seed in range(3)]
        steps = [(r.json(name, "training.json") or {}).get("history", [kept.get(name)])[-1] for name in names]
        return float(np.mean([s[key] for s in steps])) if all(steps) else None

    return value


def mean(arm: str) -> Callable[[Recorded], float | None]:
    def average(r: Recorded) -> float | None:
        found = [r.json("scores-untrained", "scores.json")] if arm == "untrained" else r.scores(arm)
        return uncertainty.average(found).value if all(found) and found else None

    return average


def _unseen(r: Recorded, *artifacts: str) -> tuple[Any, dict[str, Prompt], list[list[dict[str, Any]]]] | None:
    """(run, {id: prompt}, the answers of each artifact); None where the recorded run answered other prompts than today's."""
    run = open_run(PROFILE, {"synthesis.evaluation_prompts": r.settings["synthesis.evaluation_prompts"]})
    by_id = {q.id: q for q in generation_stages.unseen(run)}
    answers = [list(read_jsonl(r.folder / name / "data.jsonl")) for name in artifacts]
    return (run, by_id, answers) if all(e["record"] in by_id for rows in answers for e in rows) else None


def senior_wins(r: Recorded) -> float | None:
    """By today's rubric."""
    if not (found := _unseen(r, "eval-junior", "eval-senior")):
        return None
    run, by_id, (junior, senior) = found
    if [e["record"] for e in junior] != [e["record"] for e in senior]:
        return None
    answered = [by_id[e["record"]] for e in junior]
    rubric = generation_stages.rubric(run, junior + senior, answered)
    return float(np.mean(pairs.win_rate(rubric, list(zip(answered, senior, junior, strict=True)))))


def first_revision(r: Recorded) -> float | None:
    """What the first pass of the revisor adds to the junior's valid answers, in hundredths of today's rubric."""
    if not (found := _unseen(r, "eval-junior", "revised-eval")):
        return None
    run, by_id, (junior, revised) = found
    prompts = list(by_id.values())
    gains = measure.gains(generation_stages.rubric(run, junior + revised, prompts), measure.rewritten(revised, junior, prompts))
    return 100 * float(np.mean(gains)) if gains else None


def kept(r: Recorded) -> float | None:
    found = r.json("synthetic", "manifest.json")
    return found["kept"] if found else None


# name -> (what decides it, how it is read, whether it is computed in float32 whatever the run's compute type)
NUMBERS: dict[str, tuple[tuple[str, ...], Callable[[Recorded], float | None], bool]] = {
    "base valid": (UNSEEN, valid("eval-base"), False),
    "junior loss, last step": (JUNIOR, last("junior", "loss"), False),
    "junior valid": (JUNIOR, valid("eval-junior"), False),
    "senior valid": (SENIOR, valid("eval-senior"), False),
    "root valid": (CANDIDATES, valid("root"), False),
    "DPO margin, last step": (SENIOR, last("senior", "margin"), False),
    "senior wins": (SENIOR, senior_wins, False),
    "judge above one half": (("models.guide",), noted("judge-check", "S20", ignore="$^"), True),
    "revisor loss, last step": (REVISOR, last("revisor", "loss"), False),
    "revised answers valid": (REVISOR, valid("revised-eval"), False),
    "first revision, hundredths": (REVISOR, first_revision, False),
    "second revision, hundredths": (REVISOR, noted("second-pass", "S19"), False),
    "synthesis valid": (DATA, valid("raw"), False),
    "revisions valid": (DATA, valid("revised"), False),
    "records kept": (DATA, kept, False),
    "mask precision": (GUIDE, lambda r: (r.json("mask") or {}).get("precision"), True),
    "mask recall": (GUIDE, lambda r: (r.json("mask") or {}).get("recall"), True),
    "students, guided minus plain": (STUDENTS, noted("guided-gain", "G1"), True),
    **{
        f"students, {claim}": (STUDENTS, noted("guided-gain", claim), True)
        for claim in ("G2", "G3", "G4", "G5", "G7", "G8", "G9", "E2")
    },
    "guided loss, last step": (EMBEDDERS, last("embedder-guided-{}", "loss"), False),
    "plain loss, last step": (EMBEDDERS, last("embedder-plain-{}", "loss"), False),
    "untrained": (SCORES, mean("untrained"), False),
    "plain": (EMBEDDERS, mean("plain"), False),
    "guided": (EMBEDDERS, mean("guided"), False),
    "bare": (EMBEDDERS, mean("bare"), False),
    "guided minus untrained": (EMBEDDERS, minus("guided", "untrained"), False),
    **{
        f"{kind}, guided minus untrained": (EMBEDDERS, minus("guided", "untrained", [kind]), False)
        for kind in ("Retrieval", "Reranking", "Classification", "Clustering", "STS")
    },
    "guided minus plain": (EMBEDDERS, minus("guided", "plain"), False),
    "with minus without instructions": (EMBEDDERS, minus("guided", "bare"), False),
    "Jr + Re minus Jr": (ABLATION, minus("jr_re", "jr"), False),
    "Sr minus Jr": (ABLATION, minus("sr", "jr"), False),
    "teacher minus Jr": (ABLATION, minus("teacher", "jr"), False),
    "Sr + Re minus Jr": (ABLATION, minus("sr_re", "jr"), False),
    "base model minus Jr": (ABLATION, minus("base", "jr"), False),
    "Sr + Re minus teacher, with labels": (ABLATION, noted("mixed", "S2"), False),
    "sound negatives, senior minus base": (DATA, noted("hard-negatives", "S18"), False),
    "points per doubling": ((*EMBEDDERS, "study.scaling"), noted("scaling", "S17"), False),
    "bend": ((*EMBEDDERS, "study.scaling"), noted("scaling", "S17", "bend"), False),
}


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


def collect() -> dict[str, Any]:
    """{"profile", "runs": {name: {date, compute_type, cpu}}, "numbers": {name: [{run, value, compute_type, other}]}}.

    A run is named by its commit; an added one by its compute type, processor and date, and the entry keeps its `values` and `settings`.
    """
    now = json.loads(json.dumps(dotted(open_run(PROFILE).profile)))
    latest = _git("log", "-1", "--format=%h", "--", SHIPPED).decode().strip()
    runs: dict[str, Any] = {}
    numbers: dict[str, list[Any]] = {name: [] for name in NUMBERS}
    for commit in (*EARLIER, latest):
        with tempfile.TemporaryDirectory() as scratch:
            tarfile.open(fileobj=io.BytesIO(_git("archive", commit, SHIPPED))).extractall(scratch, filter="data")
            settings = dotted(json.loads(_git("show", f"{commit}:{SETTINGS}")))
            r = Recorded(Path(scratch) / SHIPPED, settings, now)
            made = json.loads(_git("show", f"{commit}:{TIMES}"))[PROFILE]
            # Before the compute type was chosen every model of these runs was bfloat16.
            kind = made.get("compute_type", "bfloat16")
            runs[commit] = {"date": made["date"], "compute_type": kind, "cpu": _cpu(made["cpu"])}
            _enter(numbers, commit, kind, r, r.values())
    for name, run in json.loads(TARGET.read_text(encoding="utf-8"))["runs"].items():
        if "values" in run:
            runs[name] = run
            _enter(numbers, name, run["compute_type"], Recorded(Path(), run["settings"], now), run["values"])
    return {"profile": PROFILE, "runs": runs, "numbers": numbers}


def _enter(numbers: dict[str, list[Any]], run: str, kind: str, r: Recorded, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        decided_by, _, single = NUMBERS[name]
        entry = {"run": run, "value": value, "compute_type": "float32" if single else kind}
        numbers[name].append(entry | {"other": r.other(decided_by)})


def _cpu(name: str) -> str:
    return re.sub(r"\(R\)| Processor", "", name)


def add(folder: Path) -> str:
    """Put the finished run of `PROFILE` in `folder` into `TARGET`; returns its name there."""
    manifests = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("artifacts/*/manifest.json"))]
    kinds = {m["compute_type"] for m in manifests if "new_tokens" in m}
    if len(kinds) != 1:
        raise UserError(f"{folder}: texts of {len(kinds)} compute types there, one is needed; give the folder of a whole run")
    settings = json.loads(json.dumps(dotted(open_run(PROFILE).profile)))
    values = Recorded(folder / "artifacts", settings, settings).values()
    if missing := sorted(set(NUMBERS) - set(values)):
        raise UserError(f"{folder}: no {', '.join(missing)}; let all notebooks run first")
    kind, date = kinds.pop(), max(m["written"] for m in manifests)[:10]
    name = f"{kind}, {_cpu(machine.cpu())}, {machine.instructions()}, {date}"
    decided = {k: settings[k] for k in deciding(settings, [name for by, *_ in NUMBERS.values() for name in by])}
    found = json.loads(TARGET.read_text(encoding="utf-8"))
    found["runs"][name] = {"date": date, "compute_type": kind, "cpu": _cpu(machine.cpu()), "values": values, "settings": decided}
    write_json(TARGET, found)
    return name


def table(found: Mapping[str, Any]) -> str:
    """The recorded numbers as a table of docs/results.md: the runs with the settings of today that decide a number, by compute type,
    and the range of the others."""
    lines = ["| number | today's settings, float32 | today's settings, bfloat16 | other settings |", "|---|---|---|---|"]
    kinds = {name: run["compute_type"] for name, run in found["runs"].items()}
    for name, entries in found["numbers"].items():
        same, other = ([e for e in entries if bool(e["other"]) == differs] for differs in (False, True))
        cells = [[e["value"] for e in same if kinds[e["run"]] == kind] for kind in ("float32", "bfloat16")]
        shown = " | ".join(_ends(values) for values in (*cells, [e["value"] for e in other]))
        lines.append(f"| {name}{' (always in float32)' * NUMBERS[name][2]} | {shown} |")
    return "\n".join(lines)


def _ends(values: Sequence[float]) -> str:
    if not values:
        return "-"
    digits = 0 if all(v == int(v) > 1 for v in values) else 2  # a count of records
    return " to ".join(dict.fromkeys(f"{v:.{digits}f}" for v in (min(values), max(values))))


def into_page(text: str, found: Mapping[str, Any]) -> str:
    """The page with the table between its two marks."""
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{table(found)}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main(folder: Annotated[Path | None, typer.Option("--add", help="a run to take in, made on this machine")] = None) -> None:
    """Write `TARGET` and the table of `PAGE`, and print each number's recorded values."""
    if folder:
        print(f"taken in: {add(folder)}")
    found = collect()
    write_json(TARGET, found)
    PAGE.write_text(into_page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    for name, entries in found["numbers"].items():
        print(f"{name:36}", *(f"{e['value']:.2f}{'*' * bool(e['other'])}" for e in entries))
    print(f"{TARGET.name}: {len(found['runs'])} runs; * with other settings than today's")


if __name__ == "__main__":
    with user_errors():
        typer.run(main)
