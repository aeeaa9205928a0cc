"""The child process of `vllm_engine.VllmEngine`, run as `python -m speed_core.generation.vllm_worker FD`.

FD is its end of the parent's pipe. The first message names the weights. Then each completion of a job leaves as soon as it is
finished. A later message that names other weights of the same architecture puts them in the place of the first ones. The process
ends when the parent closes the pipe, or sends nothing for as long as a `Rest` allows.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from speed_core import machine
from speed_core.generation.engines import Completion
from speed_core.generation.vllm_engine import Job, LoadWeights, Rest


def cpu_requests() -> int:
    """How many texts are written at a time on a CPU. Each step reads all weights, so 128 are faster than 64; they also take more
    memory (6.7 GB of this process at `tiny`)."""
    return 128 if machine.memory_gb() >= 12 else 64


def cache_gigabytes(config: Any, max_length: int, requests: int, dtype: str = "bfloat16") -> int:
    """GiB of keys and values in `dtype` for `requests` of `max_length` tokens each; `config`: transformers', of the model."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    each = 4 if dtype == "float32" else 2  # bytes
    return math.ceil(2 * each * text.num_hidden_layers * heads * size * max_length * requests / 2**30)


def messages(pipe: Connection) -> Iterator[LoadWeights | Job]:
    """What the parent sends, until it closes the pipe or leaves it silent for longer than a `Rest` allows."""
    while True:
        try:
            message = pipe.recv()
            if not isinstance(message, Rest):
                yield message
            elif not pipe.poll(message.seconds):
                return
        except EOFError:
            return


def import_vllm() -> Any:
    """vLLM's engine class, imported with the settings that it reads from the environment. The longest part of the start."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # The engine runs in this very process: one process to end, nothing left behind.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm.renderers.hf as renderer
    from vllm import LLMEngine

    # Copies for threads that tokenise; prompts come here as ids, and a copy of 262,144 words takes 3 s.
    renderer.maybe_make_thread_pool = lambda tokenizer, copies=1: tokenizer
    # Not `LLM`: it prepares chats, and reads the tokenizer again for that.
    return LLMEngine


def start(engine_class: Any, weights: LoadWeights, cpu: bool, top_p: Any) -> Any:
    """The engine on its first weights; `top_p`: the class of `top_p.vllm_processor`."""
    from transformers import AutoConfig
    from vllm import EngineArgs
    from vllm.config import StructuredOutputsConfig

    requests = cpu_requests() if cpu else 256
    if cpu:  # the engine would take half the memory, and fill with zeros what it takes
        config = AutoConfig.from_pretrained(weights.folder)
        gigabytes = cache_gigabytes(config, weights.max_length, requests, weights.dtype)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(gigabytes))
    dtype: Any = weights.dtype
    arguments = EngineArgs(
        model=weights.folder,
        dtype=dtype,
        max_model_len=weights.max_length,
        # Graph compilation costs 36 s more at the start and gains 10% (2 cores, gemma-3-270m).
        enforce_eager=cpu,
        # On the CPU a seeded request whose prompt is prefilled in pieces raises
        # "CPU Generator does not use offset" (vllm 0.32.0), so prompts are prefilled whole.
        enable_chunked_prefill=not cpu,
        max_num_batched_tokens=max(4096, weights.max_length),
        max_num_seqs=requests,
        # Top-p without a sort; on a GPU sorting is cheap, and vLLM's own stays.
        logits_processors=[top_p] if cpu else None,
        enable_prefix_caching=True,
        disable_log_stats=True,
        # Without this the JSON grammar admits endless whitespace between tokens.
        structured_outputs_config=StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
    )
    return engine_class.from_engine_args(arguments)


def complete(engine: Any, job: Job, max_length: int, top_p: float) -> Iterator[Completion]:
    """The completions of a job, each as soon as it is finished. A prompt that is too long is an error of its own."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    grammars = {k: StructuredOutputsParams(json=s) for k, s in job.schemas.items()}
    for request, ids in job.prompts:
        if len(ids) >= max_length:
            yield Completion(request.id, f"prompt of {len(ids)} tokens, limit {max_length}", "error", len(ids), 0)
            continue
        params = SamplingParams(
            temperature=job.decoding.temperature,
            top_p=top_p,
            max_tokens=job.decoding.max_new_tokens,
            seed=request.seed,
            structured_outputs=grammars.get(request.kind),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(request.id, {"prompt_token_ids": ids}, params)
    while engine.has_unfinished_requests():
        for done in engine.step():
            if done.finished:
                text = done.outputs[0]
                prompt, new = len(done.prompt_token_ids), len(text.token_ids)
                yield Completion(done.request_id, text.text, str(text.finish_reason), prompt, new)


def main() -> None:
    pipe = Connection(int(sys.argv[1]))
    engine_class, engine = import_vllm(), None
    import torch

    from speed_core.generation.top_p import vllm_processor

    cpu, top_p, max_length = not torch.cuda.is_available(), vllm_processor(), 0
    for message in messages(pipe):
        if isinstance(message, Job):
            top_p.p = message.decoding.top_p
            for completion in complete(engine, message, max_length, 1.0 if cpu else message.decoding.top_p):
                pipe.send(completion)
            continue
        if engine is None:
            engine, max_length = start(engine_class, message, cpu, top_p), message.max_length
        else:
            engine.collective_rpc("reload_weights", kwargs={"weights_path": message.folder})
            if not engine.reset_prefix_cache():  # keys and values of the weights before
                raise RuntimeError("the prefix cache could not be emptied")
        pipe.send(None)


if __name__ == "__main__":
    main()
