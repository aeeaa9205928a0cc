"""One epoch of DPO: TRL's default, TRL without gradient checkpointing, with a precomputed reference or Liger's kernels too, ours.

    python benchmarks/dpo.py [--device cpu|cuda] [--quick] [--losses]

LoRA of rank 16 on gemma-3-270m in the type that this machine computes in (on a GPU: the shape of LLaMA-3-8B with random weights), batches of two
pairs, prompts and completions of given lengths: 2:1 (the root data of the recorded run at `tiny` has medians of 127 and 53
tokens, 2.4:1), and a longer and a shorter prompt beside it. With `--device cuda` it has not run yet. `epoch_s` holds
everything that an epoch needs, the reference too; `step_s` is one optimizer step without it. `cells_per_useful` counts tokens that the model is asked to read, padding included
(what checkpointing reads again is not counted), for each completion token, policy and reference together.
`trl_liger` is TRL with `use_liger_kernel` (it has a fused language-model head of its own; Liger adds kernels of the layers). These are
Triton kernels: the row needs `--device cuda` and `pip install liger-kernel`, and says in one line where it is skipped.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import common

BATCH = 2
# All but the first without gradient checkpointing, as ours.
METHODS = ("trl_default", "trl", "trl_precomputed", "trl_liger", "ours")
WORDS = (
    "time day year way man thing woman life child world school state family student group country problem hand part place".split()
)


def text(words: int, seed: int) -> str:
    import random

    pick = random.Random(seed)
    return " ".join(pick.choice(WORDS) for _ in range(words))


def pairs(count: int, prompt: int, completion: int) -> list[dict[str, str]]:
    """Texts of single-token words, so that lengths are what they say (give or take the frame)."""
    out = []
    for i in range(count):
        row = {"prompt": text(prompt, 3 * i), "chosen": text(completion, 3 * i + 1), "rejected": text(completion, 3 * i + 2)}
        out.append(row)
    return out


def build(device: str, dtype: str, attention: str) -> tuple[Any, Any]:
    """(tokenizer, model without adapter). `attention`: on a GPU; a CPU takes SDPA."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from speed_core.models import loading

    tokenizer = loading.load_tokenizer("package:gemma-3-270m")
    if device == "cpu":
        folder = loading.resolve("package:gemma-3-270m")
        return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    # The tokenizer stays gemma's, whose ids beyond the shape's own vocabulary no text of `WORDS` has (`measure` asserts it).
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        attn_implementation=attention,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return tokenizer, model


def no_liger(device: str) -> str:
    """Why TRL's `use_liger_kernel` cannot run here; empty where it can."""
    from trl import import_utils

    if device != "cuda":
        return f"Liger's Triton kernels need a GPU (--device cuda), this is {device}"
    if not import_utils.is_liger_kernel_available():
        return f"needs liger-kernel {import_utils.LIGER_KERNEL_MIN_VERSION} or later: pip install liger-kernel"
    return ""


def measure(
    method: str, prompt: int, completion: int, steps: int, device: str, dtype: str = "", accumulate: int = 1
) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model

    from speed_core import console
    from speed_core.models import compute_type, token_logprobs, training
    from speed_core.preference import dpo, prompt_sharing
    from speed_core.preference.usable_pairs import check_pairs

    console.quiet()
    if device != "cpu":
        torch._dynamo.config.recompile_limit = 64  # as `dpo.train` does
    torch.manual_seed(0)
    tokenizer, base = build(device, dtype or compute_type.choose().name, "flex_attention" if method == "ours" else "sdpa")
    cells = [0]
    base.get_input_embeddings().register_forward_hook(lambda m, inputs, out: cells.append(inputs[0].numel()))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    data, (callback, ends) = pairs(BATCH * steps, prompt, completion), common.step_clock(device)
    shared: dict[str, Any] = dict(
        per_device_train_batch_size=BATCH // accumulate, gradient_accumulation_steps=accumulate, num_train_epochs=1, learning_rate=5e-5, report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True, use_cpu=device == "cpu", bf16=False, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if method == "ours":
            from transformers import TrainingArguments

            arguments = TrainingArguments(folder, remove_unused_columns=False, **shared)
            before, start = common.reset_peak(device), time.perf_counter()
            token_logprobs.hidden_states_only(model)
            groups, aside = check_pairs(tokenizer, data, 100_000)
            assert len(groups) == len(data), aside
            assert max(max(g.prompt + sum(g.completions, [])) for g in groups) < model.get_input_embeddings().num_embeddings
            trainer: Any = dpo.DpoTrainer(
                model=model,
                args=arguments,
                train_dataset=groups,
                beta=0.1,
                data_collator=lambda part: prompt_sharing.collate(part, 0),
                callbacks=[callback],
            )
            dpo.reference_log_probs(model, groups, 0, BATCH)
        else:
            from datasets import Dataset
            from trl import DPOConfig, DPOTrainer

            rows = [
                {"prompt": "<bos>" + training.prompt_text(r["prompt"]), "chosen": r["chosen"], "rejected": r["rejected"]}
                for r in data
            ]
            arguments = DPOConfig(
                folder,
                beta=0.1,
                max_length=None,
                gradient_checkpointing=method == "trl_default",
                precompute_ref_log_probs=method == "trl_precomputed",
                use_liger_kernel=method == "trl_liger",
                **shared,
            )
            before, start = common.reset_peak(device), time.perf_counter()
            trainer = DPOTrainer(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[callback],
            )
        trainer.train()
        common.synchronize(device)
        spent = time.perf_counter() - start
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    each = [b - a for a, b in zip(ends[1:], ends[2:], strict=False)] or [ends[1] - ends[0]]
    useful = 2 * completion * BATCH * steps
    return {
        "epoch_s": spent, "step_s": sorted(each)[len(each) // 2], "pairs_s": BATCH * steps / spent, "peak_mb": common.peak_mb(device) - before,
        "cells_per_useful": sum(cells) / useful, "losses": [float(x) for x in losses],
    }  # fmt: skip


def losses(args: Any) -> None:
    """Are the losses of four steps equal? Ours against TRL, and TRL against itself with the batch of two as one and one.

    The control tells what bfloat16 does to a trajectory: Adam's first step is the sign of the gradient, so a rounding
    difference in a small gradient moves its weight the other way.
    """
    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, str], list[float]] = {}
    for dtype in ("bfloat16", "float32"):
        for name, method, accumulate in (("trl", "trl", 1), ("trl_1+1", "trl", 2), ("ours", "ours", 1)):
            row = common.in_process(measure, method, 100, 50, 4, args.device, dtype, accumulate, limit_s=280)
            rows.append({"method": name, "dtype": dtype, "prompt": 100, "completion": 50, "steps": 4} | row)
            found[name, dtype] = row.get("losses", [])
            print(rows[-1], flush=True)

    def difference(a: str, b: str, dtype: str) -> float:
        return max(abs(x - y) for x, y in zip(found[a, dtype], found[b, dtype], strict=True))

    ratios = {
        f"largest_difference_{a}_{b}": {d: difference(a, b, d) for d in ("bfloat16", "float32")}
        for a, b in (("ours", "trl"), ("trl_1+1", "trl"))
    }
    common.finish("dpo_losses", args, rows, ratios, ("trl", "transformers", "peft"))


def main() -> None:
    args = common.arguments(__doc__ or "", losses="compare the losses of four steps in bfloat16 and float32 instead of times")
    if args.losses:
        return losses(args)
    shapes = [(200, 100)] if args.quick else [(200, 100), (400, 60), (100, 100)]
    rows: list[dict[str, Any]] = []
    for prompt, completion in shapes:
        for method in METHODS:
            steps = 2 if args.quick else 4
            why = no_liger(args.device) if method == "trl_liger" else ""
            found: dict[str, Any] = {"status": "skipped", "why": why}
            if not why:
                found = common.in_process(measure, method, prompt, completion, steps, args.device, limit_s=280)
            rows.append({"method": method, "prompt": prompt, "completion": completion, "steps": steps} | found)
            print(rows[-1], flush=True)
    ratios: dict[str, dict[str, float]] = {}

    def note(name: str, key: str, value: float) -> None:
        ratios.setdefault(name, {})[key] = value

    for prompt, completion in shapes:
        by = {r["method"]: r for r in rows if (r["prompt"], r["completion"]) == (prompt, completion) and r["status"] == "ok"}
        key, ours = f"{prompt}:{completion}", by.get("ours")
        for peer in METHODS[:-1]:
            if ours and peer in by:
                note(f"vs_{peer}", key, round(by[peer]["epoch_s"] / ours["epoch_s"], 2))
                note(f"step_vs_{peer}", key, round(by[peer]["step_s"] / ours["step_s"], 2))
                note(
                    "memory_vs_trl" if peer == "trl_default" else f"memory_vs_{peer}_not_checkpointed",
                    key,
                    round(by[peer]["peak_mb"] / ours["peak_mb"], 2),
                )
        if ours and "trl" in by:
            both = zip(ours["losses"], by["trl"]["losses"], strict=True)
            note("largest_loss_difference", key, max(abs(a - b) for a, b in both))
    common.finish("dpo", args, rows, ratios, ("trl", "transformers", "peft", "liger-kernel"))


if __name__ == "__main__":
    main()
