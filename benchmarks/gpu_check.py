"""What a GPU does with this package, in under ten minutes: `make gpu-check`.

    python benchmarks/gpu_check.py [--rehearse] [--only PART ...] [--out FOLDER]

Needs torch, transformers, peft, accelerate, sentence-transformers and pydantic-settings. A part that needs more says what is missing and is skipped.
Weights are random, in the shapes of the papers' models, so nothing is downloaded. Each part runs in a process of its own and
writes PART.cuda.json after every row, so an interrupted check keeps what it has. `--rehearse` runs every part on
the processor with sizes of a toy; it shows that the check works, and measures nothing.

    rates        matrix products and copies of this GPU, the ceilings of all that follows
    kernels      value and gradients of the guided loss on the GPU against float64
    guided_loss  the loss at batches up to 131,072: ours, a plain matrix, sentence-transformers' two losses
    sft          a step of the junior: log-probabilities of the completion against a plain cross-entropy
    dpo          a step of the senior: one row for a prompt and its completions, FlexAttention against SDPA
    embedding    a step of the embedding model with GradCache, at two sizes of the micro-batch
    generation   tokens a second in vLLM, random weights
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch

SECONDS = 90  # a part that takes longer is stopped; what it wrote stays
TAU = 0.02


class Check:
    """Rows of one part, written to its file as they come."""

    def __init__(self, part: str, device: str, folder: Path | None):
        self.device, self.small = device, device == "cpu"
        self.path = folder / f"{part}.{device}.json" if folder else None
        self.result = {"benchmark": f"gpu_check {part}", "device": device, "written": time.strftime("%Y-%m-%d")}
        self.result |= {"machine": common.machine(device)}
        self.result |= {"versions": common.versions("transformers", "sentence-transformers", "peft", "triton"), "rows": []}

    def row(self, **values: Any) -> None:
        """One measured row; numbers with four digits."""
        values = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        print("  " + ", ".join(f"{k} {v}" for k, v in values.items()), flush=True)
        self.result["rows"].append(values)  # type: ignore[attr-defined]
        if self.path:
            self.path.write_text(json.dumps(self.result, indent=1) + "\n")

    def attempt(self, call: Callable[[], dict[str, Any]], **names: Any) -> bool:
        """A row of what `call` returns, or of the reason why there is none."""
        try:
            self.row(**names, **call())
            return True
        except (torch.OutOfMemoryError, MemoryError):
            self.row(**names, failed="out of memory")
        except Exception as error:  # what a GPU of another kind cannot do is a row as well
            self.row(**names, failed=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}")
        if not self.small:
            torch.cuda.empty_cache()
        return False

    def timed(self, run: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
        """Seconds of the first call (compilation included), median of later ones, and peak memory above what was held before."""
        before = common.reset_peak(self.device)
        times = []
        for _ in range(1 + (1 if self.small else repeats)):
            common.synchronize(self.device)
            start = time.perf_counter()
            run()
            common.synchronize(self.device)
            times.append(time.perf_counter() - start)
            if sum(times) > 12:
                break
        later = times[1:] or times
        return {
            "first_s": times[0],
            "step_s": statistics.median(later),
            "peak_gb": max(0.0, common.peak_mb(self.device) - before) / 1024,
        }


def rates(check: Check) -> None:
    n = 256 if check.small else 8192
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(n, n, device=check.device, dtype=dtype) for _ in range(2))
        found = check.timed(lambda a=a, b=b: a @ b, 10)  # type: ignore[misc]
        check.row(product=f"{n} x {n} x {n}", type=name, tflops=2 * n**3 / found["step_s"] / 1e12)
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.empty(n * n * 4, device=check.device)
    found = check.timed(lambda: source.clone(), 10)
    check.row(copy_gb=source.nbytes / 1e9, read_and_written_tb_s=2 * source.nbytes / found["step_s"] / 1e12)


def draw(check: Check, batch: int, width: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Columns of embeddings that are alike in each row, so that a guide removes a few percent."""
    generator = torch.Generator(check.device).manual_seed(seed)
    topic = torch.randn(batch, width, generator=generator, device=check.device)
    mixes = (0.4, 0.4, 0.1)[:columns]
    return [(topic * m + torch.randn(batch, width, generator=generator, device=check.device)).to(dtype) for m in mixes]


@contextlib.contextmanager
def path(kernels: bool, elements: int | None = None) -> Iterator[None]:
    """Run the guided loss by the Triton kernels, or by matrix products in blocks of `elements`."""
    from speed_core.contrastive import guided_loss

    saved = guided_loss._kernel_dtype, guided_loss._BLOCK_ELEMENTS
    if not kernels:
        guided_loss._kernel_dtype = lambda given, unit: None
    guided_loss._BLOCK_ELEMENTS = elements or saved[1]
    try:
        yield
    finally:
        guided_loss._kernel_dtype, guided_loss._BLOCK_ELEMENTS = saved


def loss_of(student: list[torch.Tensor], guide: list[torch.Tensor], **settings: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(value, gradients) of the guided loss."""
    from speed_core.contrastive.guided_loss import LossSettings, guided_contrastive_loss

    leaves = [t.detach().requires_grad_() for t in student]
    loss = guided_contrastive_loss(leaves, guide, LossSettings(TAU, **settings))
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def kernels(check: Check) -> None:
    triton = importlib.util.find_spec("triton") is not None and not check.small
    settings: list[dict[str, Any]] = [{}, {"margin": 0.1}, {"margin": 0.3, "margin_strategy": "relative"}]
    settings += [{"contrast_anchors": False, "contrast_positives": False}]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for b, d, e in [(70, 40, 24), (9, 5, 8)] if check.small else [(1000, 384, 384), (2048, 4096, 768), (70, 40, 24)]:
            for by_kernels in (True, False) if triton else (False,):

                def compare(
                    by: bool = by_kernels, sizes: tuple[int, int, int] = (b, d, e), dtype: torch.dtype = dtype
                ) -> dict[str, Any]:
                    """The largest relative difference from float64 over all settings."""
                    values, gradients = [0.0], [0.0]
                    for columns in (2, 3):
                        student, guide = (
                            draw(check, sizes[0], sizes[1], columns, 0, dtype),
                            draw(check, sizes[0], sizes[2], columns, 1),
                        )
                        for more in settings:
                            exact, slopes = loss_of([t.double() for t in student], [t.double() for t in guide], **more)
                            with path(by):
                                value, grads = loss_of(student, guide, **more)
                            values.append(float(abs(value - exact) / exact))
                            gradients += [
                                float((g.double() - t).abs().max() / t.abs().max()) for g, t in zip(grads, slopes, strict=True)
                            ]
                    return {"value": max(values), "gradient": max(gradients)}

                name = "Triton kernels" if by_kernels else "matrix products"
                check.attempt(compare, by=name, type=str(dtype).removeprefix("torch."), batch=b, width=d, guide_width=e)


def guided_loss(check: Check) -> None:
    import guided_loss as benchmark

    benchmark.TAU = TAU
    triton = importlib.util.find_spec("triton") is not None and not check.small
    batches = (64, 256) if check.small else (64, 1024, 4096, 16384, 65536, 131072)
    methods: dict[str, tuple[bool, int | None, torch.dtype]] = {}
    for kind in (torch.float32, torch.bfloat16):
        name = str(kind).removeprefix("torch.")
        if triton:
            methods[f"Triton kernels, {name}"] = (True, None, kind)
        for power in (22, 25, 28):
            methods[f"matrix products in blocks of 2^{power}, {name}"] = (False, 1 << power, kind)
    for name, (by_kernels, elements, kind) in methods.items():
        for batch in batches:

            def ours(batch=batch, by=by_kernels, elements=elements, kind=kind) -> dict[str, Any]:
                student, guide = draw(check, batch, 384, 3, 0, kind), draw(check, batch, 384, 3, 1, kind)
                with path(by, elements):
                    found = check.timed(lambda: loss_of(student, guide), 3)
                    # 2 products forward and 2 for the gradients, of B x 4B x 384: what nobody can do without
                    return found | {
                        "tflops": 4 * 2 * 4 * batch**2 * 384 / found["step_s"] / 1e12,
                        "loss": float(loss_of(student, guide)[0]),
                    }

            if not check.attempt(ours, method=name, batch=batch) or check.result["rows"][-1]["step_s"] > 10:  # type: ignore[index]
                break
    for name in ("matmul", "gist", "cached_gist"):
        for batch in batches:
            if not check.attempt(
                lambda name=name, batch=batch: check.timed(benchmark.method(name, batch, check.device), 3),
                method=name,
                batch=batch,
            ):  # type: ignore[misc]
                break
            if check.result["rows"][-1]["step_s"] > 3:  # type: ignore[index]
                break


def llama(check: Check, attention: str, layers: int, vocabulary: int = 128_256) -> Any:
    """A Llama of LLaMA-3-8B's layer shapes with random weights and a LoRA adapter of rank 16 on its attention."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    if check.small:
        shape, layers, vocabulary = (
            dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2),
            1,
            512,
        )
    config = LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=vocabulary, attn_implementation=attention)  # type: ignore[arg-type]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if check.small else torch.bfloat16)
    try:
        with torch.device(check.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))


def stepper(model: Any, loss_of_model: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """One optimizer step of the adapter."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> float:
        loss = loss_of_model()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def sft(check: Check) -> None:
    import torch.nn.functional as F

    from speed_core.models import token_logprobs

    rows, tokens, prompt, layers = (2, 24, 12, 1) if check.small else (8, 512, 256, 8)
    ids = torch.randint(3, 500, (rows, tokens), device=check.device, generator=torch.Generator(check.device).manual_seed(0))
    attention, scored = torch.ones_like(ids), torch.zeros_like(ids)
    scored[:, prompt:] = 1
    for name in ("plain cross-entropy", "completion tokens only"):

        def run(name=name) -> dict[str, Any]:
            model = llama(check, "sdpa", layers)
            if name == "plain cross-entropy":
                labels = ids.masked_fill(scored == 0, -100)

                def loss() -> torch.Tensor:
                    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
                    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            else:
                token_logprobs.hidden_states_only(model)

                def loss() -> torch.Tensor:
                    return -token_logprobs.token_log_probs(model, ids, attention, scored).sum() / scored[:, 1:].sum()

            value = float(loss().detach())
            return check.timed(stepper(model, loss)) | {"loss": value}

        check.attempt(run, method=name, layers=layers, rows=rows, tokens=tokens, completion=tokens - prompt)


def dpo(check: Check) -> None:
    from speed_core.models.token_logprobs import hidden_states_only
    from speed_core.preference import prompt_sharing
    from speed_core.preference.dpo import batch_losses, reference_log_probs

    if not check.small:
        torch._dynamo.config.recompile_limit = 64  # as `dpo.train` does
    sizes = [(40, 4, 1)] if check.small else [(300, 8, 8), (1000, 8, 8), (3000, 8, 8), (1000, 4, 32)]
    for tokens, count, layers in sizes:
        generator = torch.Generator().manual_seed(0)

        def ids(length: int, generator: Any = generator) -> list[int]:
            return torch.randint(3, 500, (length,), generator=generator).tolist()  # type: ignore[no-any-return]

        completion = tokens // 6
        groups = [
            prompt_sharing.PromptGroup(ids(tokens - 2 * completion), [ids(completion), ids(completion)], [(0, 1, 1.0)])
            for _ in range(count)
        ]
        ways = (("sdpa", True), ("sdpa", False)) if check.small else (("flex_attention", True), ("sdpa", True), ("sdpa", False))
        for attention, share in ways:

            def run(groups=groups, count=count, attention=attention, share=share, layers=layers) -> dict[str, Any]:
                model = llama(check, attention, layers)
                hidden_states_only(model)
                model.eval()
                start = time.perf_counter()
                reference_log_probs(model, groups, 0, count, share=share)
                common.synchronize(check.device)
                reference_s = time.perf_counter() - start
                batch = prompt_sharing.to_device(prompt_sharing.collate(groups, 0, share=share), check.device)

                def loss() -> torch.Tensor:
                    policy = prompt_sharing.completion_log_probs(model, batch)
                    return batch_losses(policy, batch, beta=0.1).mean()

                found = check.timed(stepper(model, loss))
                return {"reference_s": reference_s} | found | {"first_log_prob": groups[0].reference[0]}

            check.attempt(run, attention=attention, prompt_shared=share, row_tokens=tokens, pairs=count, layers=layers)


def embedding(check: Check) -> None:
    from transformers import MistralConfig, MistralModel

    from speed_core.contrastive.sentence_transformers_loss import CachedGuidedContrastiveLoss

    shape = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    layers, batch, tokens, sizes = 4, 1536, 128, (32, 128)
    if check.small:
        shape, layers = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2), 1
        batch, tokens, sizes = 12, 8, (4, 12)
    config = MistralConfig(**shape, num_hidden_layers=layers, vocab_size=1000, use_cache=False)  # type: ignore[arg-type]

    class Encoder(torch.nn.Module):
        """Last-token pooling over a decoder, which is what sentence-transformers' losses call."""

        def __init__(self) -> None:
            super().__init__()
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(0)
            model: Any = MistralModel(config).to(check.device, torch.float32 if check.small else torch.bfloat16)
            self.body = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]))

        def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            hidden = self.body(input_ids=features["input_ids"], attention_mask=features["attention_mask"]).last_hidden_state
            return {"sentence_embedding": hidden[:, -1]}

    generator = torch.Generator(check.device).manual_seed(0)
    columns = []
    for guide in draw(check, batch, 384, 3, 1):
        ids = torch.randint(3, 1000, (batch, tokens), device=check.device, generator=generator)
        columns.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "guide_embedding": guide})
    for size in sizes:

        def run(size=size) -> dict[str, Any]:
            model = Encoder()
            loss = CachedGuidedContrastiveLoss(model, guided=True, temperature=TAU, mini_batch_size=size)
            found = check.timed(stepper(model, lambda: loss([dict(c) for c in columns])), 1)
            return found | {"texts_s": 3 * batch / found["step_s"]}

        check.attempt(run, layers=layers, batch=batch, texts=3 * batch, tokens=tokens, micro_batch=size)


def generation(check: Check) -> None:
    import tempfile

    from transformers import LlamaConfig, LlamaForCausalLM
    from vllm import LLM, SamplingParams

    if check.small:
        return check.row(engine="vllm", skipped="its random 8B layers are too much for a processor")
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=8, num_attention_heads=32, num_key_value_heads=8
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(config).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
        engine = LLM(folder, skip_tokenizer_init=True, max_model_len=2048)
        prompts: Any = [{"prompt_token_ids": list(range(5, 261))} for _ in range(512)]
        wanted = SamplingParams(temperature=1.0, max_tokens=256, ignore_eos=True, detokenize=False)
        found = check.timed(lambda: engine.generate(prompts, wanted), 1)
        check.row(engine="vllm", layers=8, requests=512, tokens_s=512 * 256 / found["step_s"], **found)


PARTS = {
    "rates": rates,
    "kernels": kernels,
    "guided_loss": guided_loss,
    "sft": sft,
    "dpo": dpo,
    "embedding": embedding,
    "generation": generation,
}
NEEDS = {"generation": ("vllm",), "embedding": ("sentence_transformers", "datasets", "peft"), "sft": ("peft",), "dpo": ("peft",)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the processor; measures nothing")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, help="folder of the result files (benchmarks/results; none with --rehearse)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # this process runs the part itself
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print(
            "gpu-check: torch sees no GPU here; on a machine without one, rehearse it: make gpu-check REHEARSE=1", file=sys.stderr
        )
        return 2
    device = "cpu" if args.rehearse else "cuda"
    folder = args.out or (None if args.rehearse else common.RESULTS)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    if args.here:
        PARTS[args.only[0]](Check(args.only[0], device, folder))
        return 0
    failed = []
    for part in args.only:
        missing = [name for name in NEEDS.get(part, ()) if importlib.util.find_spec(name) is None]
        if missing:
            print(f"{part}: skipped, {' and '.join(missing)} not installed", flush=True)
            continue
        print(f"{part}:", flush=True)
        command = [sys.executable, __file__, "--here", "--only", part, *(["--rehearse"] if args.rehearse else [])]
        command += ["--out", str(folder)] if folder else []
        start = time.perf_counter()
        child = subprocess.Popen(command, start_new_session=True)
        try:
            code = child.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = -1
            print(f"  stopped after {SECONDS} s; the rows above are kept", flush=True)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with what it started, as vLLM's workers
            child.wait()
        failed += [part] if code else []
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    print(
        f"gpu-check: {'failed: ' + ', '.join(failed) if failed else 'every part ran'}"
        + (f"; results in {folder}" if folder else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
