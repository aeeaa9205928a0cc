"""What a profile's trainings and generations need of GPUs: memory of each (`models.gpu_memory`), hours, disk. Nothing is loaded or run.

Hours are floating-point operations over a rate: 2 a parameter and token forward, 2 backward, 2 for the gradient of a weight that is
trained, and 2 for each time that a text is read again. Attention's own products, about 1% at the paper's 400 tokens a text, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from speed_core.models.gpu_memory import architecture, step_bytes
from speed_core.profile import Embedding
from speed_core.store.run_context import ROOT, Run
from speed_core.study import paper_values, student_stages
from speed_core.study.stage import Kind, Planned, planned

GB = 2**30
USABLE = 0.92  # of a GPU's memory; the rest is for CUDA itself and what fragmentation loses: judgement
PEAK = 312e12  # floating-point operations a second of an A100 in bfloat16 (NVIDIA's data sheet)
SHARE = {"sft": 0.35, "generation": 0.15}  # of PEAK that is reached where nothing was measured: judgement
ANSWER = 300  # tokens of an answer and of a record in the paper, of the 400 of a seed call (`preflight.generation_text`)
CALL = {name: tokens // calls for name, (calls, tokens) in paper_values.SPEED_CALLS.items()}  # tokens of prompt and answer
DISK = 18  # bytes of a token that a generator wrote, in log and artifact: measured at profile overnight


@dataclass
class Need:
    """What a stage needs: bytes of a GPU by part, floating-point operations, bytes of disk. `remedy`: what to change where it does
    not fit."""

    stage: Planned
    parts: dict[str, float]
    flops: float
    disk: float
    note: str = ""
    remedy: str = ""

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())

    @property
    def memory(self) -> str:
        """The arithmetic: "16.1 GB = weights 15.0 + ..."."""
        return f"{self.bytes / GB:.1f} GB = {' + '.join(f'{n} {v / GB:.1f}' for n, v in self.parts.items() if v > GB / 20)}"


def training(run: Run, one: Planned, gpus: int, usable: float) -> Need:
    """The need of a training; the first of its settings' changes (`_smaller`) that fits into `usable` bytes is the remedy."""
    p, models, name = run.profile, run.profile.models, one.stage.name
    s: Any = p.embedding
    if one.kind is Kind.GENERATOR:
        s, prefix, a = getattr(p, name), name, architecture(models.generator, head=True)
    elif one.kind is Kind.EMBEDDER:
        prefix, a = "embedding", architecture(models.embedder)
    else:
        layers = 0 if one.keys["layers"] == "whole" else one.keys["layers"]
        s, prefix = student_stages.student_training(run, one.keys["arm"]), "study.student"
        a = architecture(models.guide, layers=layers)
    e, trained, contrastive = 4 if s.dtype == "float32" else 2, a.trained(s.lora), isinstance(s, Embedding)

    def parts(s: Any) -> dict[str, float]:
        rows, length, padded, share = s.micro_batch, s.max_length, s.micro_batch > 1, s.batch // gpus
        out: dict[str, float] = {"weights": a.parameters * (4 if s.dtype == "float16" else e)}
        out["optimizer"] = trained * (12 if s.lora else 8)  # two moments, and LoRA itself in float32
        out["gradients"] = trained * 4 * (1 + (gpus > 1))  # processes exchange them in a copy
        if contrastive:
            rows, padded = rows if rows < share else 3 * share, True
            out["guide"] = 4 * architecture(models.guide).parameters
            out["embeddings of the batch"] = 8 * 3 * a.config.hidden_size * (share + s.batch)
        elif name == "senior" and s.share:  # prompt and one completion have `max_length` tokens; the other stands in the row too
            length, padded = length + min(length, p.generation.max_new_tokens), False  # FlexAttention
        elif name == "senior":
            rows, padded = 2 * rows, True
        how = {"checkpointing": getattr(s, "gradient_checkpointing", False), "padded": padded, "head": not contrastive}
        return out | step_bytes(a, rows, length, s.lora, e, **how)

    # Read again: for checkpoints, GradCache, DPO's reference.
    again = getattr(s, "gradient_checkpointing", False) + (name == "senior") + (contrastive and s.micro_batch < s.batch // gpus)
    tokens = {"junior": CALL["seed"], "senior": CALL["seed"] + ANSWER, "revisor": CALL["revision"]}.get(name, ANSWER)
    records = s.examples * s.epochs if prefix == "study.student" else one.work(p)
    saved = 7 if s.save_steps else 1  # the result, and two checkpoints with their optimizers
    need = Need(one, parts(s), (4 + 2 * (s.lora is None) + 2 * again) * a.multiplied * records * tokens, 4.0 * trained * saved)
    step = gpus * (1 if contrastive else s.micro_batch)
    if s.batch % step:
        of = f"{gpus} GPUs" if contrastive else f"{gpus} GPUs x {prefix}.micro_batch {s.micro_batch}"
        need.remedy = f"{prefix}.batch {s.batch} is no multiple of {of}; set {prefix}.batch={-(-s.batch // step) * step}"
    elif need.bytes > usable:
        fits = (c for c in _smaller(s, gpus, prefix) if sum(parts(s.model_copy(update=c)).values()) <= usable)
        changes = [f"{prefix}.{k}={json.dumps(v)}" for k, v in next(fits, {}).items() if getattr(s, k) != v]
        need.remedy = _too_large(prefix, need, usable, " and ".join(changes))
    return need


def _smaller(s: Any, gpus: int, prefix: str) -> Iterator[dict[str, Any]]:
    """Changes that make a training smaller, those that cost least first. A student's batch is one micro-batch."""
    if prefix == "study.student":
        yield from ({"batch": b} for b in range(s.batch - gpus, 0, -gpus))
        return
    for length in range(s.max_length, 255, -256):
        for again in ({}, {"gradient_checkpointing": True})[: 1 + hasattr(s, "gradient_checkpointing")]:
            for micro in range(s.micro_batch, 0, -1):
                if s.batch % (micro * gpus) == 0 or prefix == "embedding":
                    yield {"micro_batch": micro, **again, "max_length": length}


def _too_large(what: str, need: Need, usable: float, change: str) -> str:
    remedy = f"set {change}" if change else "no setting makes it fit: take GPUs with more memory or a smaller model"
    return f"{what}: {need.memory}, and {usable / GB:.1f} GB of a GPU are usable; {remedy}"


def generation(run: Run, one: Planned, usable: float) -> Need:
    """The need of a generation. vLLM takes what is left of a GPU for keys and values of further texts."""
    p, g, a = run.profile, run.profile.generation, architecture(run.profile.models.generator, head=True)
    e, vllm = 4 if g.dtype == "float32" else 2, g.engine != "transformers"
    cache = 2 * e * a.config.num_hidden_layers * a.key * g.max_length
    texts, tokens = (1, max(4096, g.max_length)) if vllm else (g.batch_size, g.batch_size * g.max_length)
    parts: dict[str, float] = {"weights": a.parameters * e, "KV cache": cache * texts}
    parts["activations"] = tokens * e * (4 * a.config.hidden_size + 3 * a.config.intermediate_size)
    parts["logits"] = 8 * a.config.vocab_size * (256 if vllm else texts)
    call = CALL["revision" if "revis" in one.name else "seed"]
    need = Need(one, parts, 2 * a.multiplied * one.work(p) * call, one.work(p) * ANSWER * DISK)
    if need.bytes > usable:
        fit = int(texts * (usable - parts["weights"]) / (need.bytes - parts["weights"]))
        need.remedy = _too_large("generation", need, usable, f"generation.batch_size={fit}" if not vllm and fit > 0 else "")
    elif vllm:
        need.note = f", room for {1 + int((usable - need.bytes) / cache)} texts of {g.max_length} tokens"
    return need


def rate(work: str) -> tuple[float, str]:
    """(floating-point operations a second, how that is known) of "sft" or "generation": from `make gpu-check` where it was run."""
    path = ROOT / "benchmarks" / "results" / f"{work}.cuda.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = [r for r in found.get("rows", ()) if r.get("method") != "plain cross-entropy" and r.get("step_s")]
    if not rows or found.get("benchmark") != f"gpu_check {work}":
        said = f"no measured rate, so {SHARE[work]:.0%} of the 312 TFLOP/s that an A100 has in bfloat16 are assumed"
        return PEAK * SHARE[work], said
    r, a = rows[-1], architecture("meta-llama/Meta-Llama-3-8B", layers=rows[-1]["layers"])
    # The check's requests have as many tokens to read as to write.
    tokens_s, passes = (2 * r["tokens_s"], 2) if work == "generation" else (r["rows"] * r["tokens"] / r["step_s"], 4)
    done = passes * a.multiplied * tokens_s
    return done, f"{done / 1e12:,.0f} TFLOP/s were measured on {found['machine'].get('gpu', 'a GPU')}, {found['written']}"


def report(run: Run, gpus: int, gpu_gb: float, tokens_per_second: float = 0.0) -> tuple[str, list[str]]:
    """(memory, hours and disk as text, a line for everything that does not fit)."""
    p, usable = run.profile, USABLE * gpu_gb * GB
    groups: dict[tuple[str, ...], list[Need]] = {}
    for one in planned(run):
        if one.kind in (Kind.GENERATOR, Kind.STUDENT, Kind.EMBEDDER):
            need = training(run, one, gpus, usable)
        elif one.kind is Kind.GENERATED and p.generation.engine != "server":
            need = generation(run, one, usable)
        else:
            continue
        groups.setdefault((one.notebook, need.memory, need.note, need.remedy), []).append(need)
    rates = {work: rate(work) for work in SHARE}
    hours, disk = dict.fromkeys(SHARE, 0.0), 0.0
    lines = [
        f"memory of each of {gpus} GPUs of {gpu_gb:g} GB ({usable / GB:.1f} usable), for the longest texts that the profile allows:"
    ]
    for (notebook, memory, note, remedy), group in groups.items():
        work = "generation" if group[0].stage.kind is Kind.GENERATED else "sft"
        took = sum(n.flops for n in group) / rates[work][0] / 3600
        if work == "generation" and tokens_per_second:
            took = sum(n.stage.work(p) for n in group) * ANSWER / tokens_per_second / 3600
        hours[work] += took
        disk += sum(n.disk for n in group)
        first, last = group[0].stage.name, group[-1].stage.name
        name = first if len(group) == 1 else f"{first} to {last} ({len(group)} stages)"
        lines.append(f"  {notebook} {name}: {memory}{note}; {took:,.1f} GPU-hours{'; DOES NOT FIT' if remedy else ''}")
    generator = 2 * architecture(p.models.generator, head=True).parameters
    merged = 3 * generator  # junior, senior and revisor, each merged into the base
    weights = generator + 2 * (architecture(p.models.embedder).parameters + architecture(p.models.guide).parameters)
    if tokens_per_second:
        rates["generation"] = 0.0, f"{tokens_per_second:,.0f} tokens/s of a GPU, as given"
    workers = p.generation.workers if p.generation.executor == "ray" else 1
    lines += [
        f"GPU-hours of training: {hours['sft']:,.0f} ({rates['sft'][1]}); scoring is not counted",
        f"GPU-hours of generation: {hours['generation']:,.0f} ({rates['generation'][1]})",
        f"disk: {(weights + merged + disk) / GB:,.0f} GB = models {weights / GB:,.0f} + merged generators {merged / GB:,.0f} + what the stages write {disk / GB:,.0f}",
    ]
    if hours["generation"] and workers < gpus:
        lines.append(f"generation uses {workers} of {gpus} GPUs; generation.executor=ray and generation.workers={gpus} use all")
    return "\n".join(lines), list(dict.fromkeys(remedy for *_, remedy in groups if remedy))
