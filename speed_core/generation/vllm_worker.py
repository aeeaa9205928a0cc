"""The child process of `engines.VllmEngine`: jobs come in on stdin, completions leave on a pipe.

Run as `python -m speed_core.generation.vllm_worker FD`. The first JSON line in says which model; then one JSON line a job in,
one JSON line a completion out, as soon as it is finished. A line that names another model of the same architecture puts its
weights in the place of the first one's. The process ends when stdin closes.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

from speed_core import machine
from speed_core.files import UserError


def cpu_requests() -> int:
    """How many texts are written at a time on a CPU. Each step reads all weights, so 128 are faster than 64; they also take more
    memory (6.7 GB of this process at `tiny`). $SPEED_CPU_REQUESTS sets another number."""
    given = os.environ.get("SPEED_CPU_REQUESTS", "")
    if given and not (given.isdecimal() and int(given)):
        raise UserError(f"SPEED_CPU_REQUESTS {given!r}: not a number of texts; write a whole one from 1 on, or unset it")
    return int(given or (128 if machine.memory_gb() >= 12 else 64))


def cache_gigabytes(config: Any, max_length: int, requests: int, dtype: str = "bfloat16") -> int:
    """GiB of keys and values in `dtype` for `requests` of `max_length` tokens each; `config`: transformers', of the model."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    each = 4 if dtype == "float32" else 2  # bytes
    return math.ceil(2 * each * text.num_hidden_layers * heads * size * max_length * requests / 2**30)


def main() -> None:
    out = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8", buffering=1)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # The engine runs in this very process: one process to end, nothing left behind.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    # The longest part of the start, so it comes before the model's name, which the parent may still be merging.
    import torch
    import vllm.renderers.hf as renderer
    from transformers import AutoConfig
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.config import StructuredOutputsConfig
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    from speed_core.generation.top_p import vllm_processor

    # Copies for threads that tokenise; prompts come here as ids, and a copy of 262,144 words takes 3 s.
    renderer.maybe_make_thread_pool = lambda tokenizer, copies=1: tokenizer

    if not (line := sys.stdin.readline()):
        return
    config = json.loads(line)
    cpu = not torch.cuda.is_available()
    requests = cpu_requests() if cpu else 256
    if cpu:  # the engine would take half the memory, and fill with zeros what it takes
        model = AutoConfig.from_pretrained(config["model"])
        gigabytes = cache_gigabytes(model, config["max_length"], requests, config["dtype"])
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(gigabytes))
    nucleus = vllm_processor()
    # Not `LLM`: it prepares chats, and reads the tokenizer again for that.
    arguments = EngineArgs(
        model=config["model"],
        dtype=config["dtype"],
        max_model_len=config["max_length"],
        # Graph compilation costs 36 s more at the start and gains 10% (2 cores, gemma-3-270m).
        enforce_eager=cpu,
        # On the CPU a seeded request whose prompt is prefilled in pieces raises
        # "CPU Generator does not use offset" (vllm 0.32.0), so prompts are prefilled whole.
        enable_chunked_prefill=not cpu,
        max_num_batched_tokens=max(4096, config["max_length"]),
        max_num_seqs=requests,
        # Top-p without a sort; on a GPU sorting is cheap, and vLLM's own stays.
        logits_processors=[nucleus] if cpu else None,
        enable_prefix_caching=True,
        disable_log_stats=True,
        # Without this the JSON grammar admits endless whitespace between tokens.
        structured_outputs_config=StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
    )
    engine = LLMEngine.from_engine_args(arguments)
    out.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        job = json.loads(line)
        if "model" in job:
            engine.collective_rpc("reload_weights", kwargs={"weights_path": job["model"]})
            if not engine.reset_prefix_cache():  # keys and values of the weights before
                raise RuntimeError("the prefix cache could not be emptied")
            out.write(json.dumps({"ready": True}) + "\n")
            continue
        d = job["decoding"]
        nucleus.p = d["top_p"]
        grammars = {k: StructuredOutputsParams(json=s) for k, s in job["schemas"].items()}
        for r in job["requests"]:
            if len(r["ids"]) >= config["max_length"]:
                why = f"prompt of {len(r['ids'])} tokens, limit {config['max_length']}"
                refused = {"id": r["id"], "text": why, "finish_reason": "error", "prompt_tokens": len(r["ids"]), "new_tokens": 0}
                out.write(json.dumps(refused) + "\n")
                continue
            params = SamplingParams(
                temperature=d["temperature"],
                top_p=1.0 if cpu else d["top_p"],
                max_tokens=d["max_new_tokens"],
                seed=r["seed"],
                structured_outputs=grammars.get(r["kind"]),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(r["id"], {"prompt_token_ids": r["ids"]}, params)
        while engine.has_unfinished_requests():
            finished: list[Any] = list(engine.step())
            for done in finished:
                if not done.finished:
                    continue
                text = done.outputs[0]
                completion = {
                    "id": done.request_id,
                    "text": text.text,
                    "finish_reason": str(text.finish_reason),
                    "prompt_tokens": len(done.prompt_token_ids),
                    "new_tokens": len(text.token_ids),
                }
                out.write(json.dumps(completion) + "\n")


if __name__ == "__main__":
    main()
