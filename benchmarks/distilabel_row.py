"""One row of benchmarks/generation.py in an environment of its own: distilabel's vLLM class in a text generation task.

    PYTHON_WITH_DISTILABEL_AND_VLLM benchmarks/distilabel_row.py JOB.json

JOB.json holds {"model", "tokenizer", "temperature", "top_p", "max_new_tokens", "grammar", "schemas": {kind: JSON schema},
"requests": [{"id", "kind", "text"}]}. The last line printed is {"start_s", "seconds", "rows": [{"id", "text", "new_tokens"}], ...}.
It imports nothing of this repository. Kinds are answered in order, one task each, as distilabel binds one schema to an LLM.
distilabel 1.5.3 passes `logits_processors` with every request, also an empty list; vLLM's SamplingParams no longer has
that argument, so the class fails as released and its own structured output, which is such a processor, cannot be had.
The empty list is dropped here. "grammar" goes through `extra_sampling_params`, which distilabel hands to vLLM unread.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def unpatched_error() -> str:
    """What distilabel's own call of `SamplingParams` gives with the installed vLLM; empty where it still works."""
    import vllm

    try:
        vllm.SamplingParams(logits_processors=[])
    except TypeError as error:
        return first_line(error)
    return ""


def accept_empty_logits_processors() -> None:
    """Drop the argument that vLLM has removed and distilabel 1.5.3 always passes; a filled one still fails."""
    import vllm

    _, kept = vllm.LLM, vllm.SamplingParams  # vLLM's own modules, imported by naming LLM, need the class itself

    def sampling_params(*, logits_processors: Any = None, **rest: Any) -> Any:
        if logits_processors:
            raise TypeError("logits_processors: removed from vLLM's SamplingParams")
        return kept(**rest)

    vllm.SamplingParams = sampling_params


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from distilabel.models.llms import vLLM
    from distilabel.steps.tasks import TextGeneration

    why = unpatched_error()
    if why:
        accept_empty_logits_processors()
    cpu = not torch.cuda.is_available()
    begun = time.perf_counter()
    llm = vLLM(
        model=job["model"],
        tokenizer=job["tokenizer"],
        dtype=job["dtype"],
        disable_cuda_device_placement=cpu,
        extra_kwargs={
            "max_model_len": 1024, "enforce_eager": cpu, "enable_chunked_prefill": not cpu, "max_num_batched_tokens": 4096,
            "max_num_seqs": 64 if cpu else 256,
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        },
    )  # fmt: skip
    task = TextGeneration(llm=llm, use_system_prompt=False)
    task.load()

    def answer(some: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
        options = {k: job[k] for k in ("temperature", "top_p", "max_new_tokens")}
        if job["grammar"]:
            from vllm.sampling_params import StructuredOutputsParams

            options["extra_sampling_params"] = {"structured_outputs": StructuredOutputsParams(json=job["schemas"][kind])}
        llm.generation_kwargs = options
        out = next(task.process([{"instruction": r["text"]} for r in some]))
        counts = [o["distilabel_metadata"]["statistics_" + task.name]["output_tokens"] for o in out]
        return [
            {"id": r["id"], "text": o["generation"] or "", "new_tokens": n[0] if isinstance(n, list) else n}
            for r, o, n in zip(some, out, counts, strict=True)
        ]

    kinds = sorted({r["kind"] for r in job["requests"]}) if job["grammar"] else [""]
    groups = [(k, [r for r in job["requests"] if not k or r["kind"] == k]) for k in kinds]
    answer(groups[0][1][:1], groups[0][0])  # as every row: one request before the clock
    ready, rows = time.perf_counter(), []
    for kind, some in groups:
        rows += answer(some, kind)
    spent = time.perf_counter() - ready
    versions = {p: importlib.metadata.version(p) for p in ("distilabel",)}
    found = {"start_s": ready - begun, "seconds": spent, "rows": rows, "versions": versions}
    print(json.dumps(found | {"unpatched": why}))


if __name__ == "__main__":
    main()
