"""One epoch of the junior's SFT: TRL as it comes, TRL with packing, ours in three layouts of the same batches.

    python benchmarks/sft.py [--device cpu|cuda] [--quick]

The tiny profile's junior (gemma-3-270m in the type that this machine computes in, LoRA, its batch and learning rate) on the recorded teacher's first
examples, drawn in the same order by every method but `trl_packing`, which cannot keep a batch of examples together:

    trl_default    TRL's SFTTrainer with its defaults: gradient checkpointing, its own fused head
    trl            the same without gradient checkpointing, as the methods below
    trl_packing    TRL's packing to max_length; micro-batches of one row, about as many examples a step
    ours_padded    `lm_head` on the completion tokens, the batch as one padded rectangle
    ours_packed    the same head, examples packed into rows as even as first fit makes them (`packing`)
    ours           the same head, three examples of like length at a time (`training.by_length`; on a GPU: as ours_padded)

`step_s` is the median step, `fastest_step_s` the least disturbed one. `epoch_s` is preparing the rows and all steps, not
loading the model; a step of TRL takes several of ours, so its methods stop after two steps and the rest is scaled by
completion tokens. `cells_per_useful` counts positions through the backbone for each completion token. `packing_check`
compares TRL's packed loss with that of the same examples alone (float32), and with what it would be if they saw each other.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import common

METHODS = ("trl_default", "trl", "trl_packing", "ours_padded", "ours_packed", "ours")


def examples(count: int) -> tuple[Any, list[dict[str, Any]], Any]:
    """(tokenizer, token rows, the junior's settings): prompts and recorded answers of the tiny profile's seeds."""
    from speed_core import profile
    from speed_core.data import teacher
    from speed_core.generation import sft
    from speed_core.models import loading
    from speed_core.study import generation_stages

    chosen = profile.load("tiny")
    planned = generation_stages.seed_plan(SimpleNamespace(profile=chosen))  # type: ignore[arg-type]
    answers = {row["record"]: row["answer"] for row in teacher.recorded_rows("seeds")}
    tokenizer = loading.load_tokenizer(chosen.models.generator)
    rows, dropped = sft.encode_rows(tokenizer, [(q.text, answers[q.id]) for q in planned[:count]], chosen.junior.max_length)
    assert not dropped
    return tokenizer, rows, chosen.junior


def load(dtype: str, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from speed_core.models import loading

    folder = loading.resolve("package:gemma-3-270m")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").to(device)


def packed_trainer() -> Any:
    """A Trainer over `prompt_sharing.collate`d examples: the layout that was measured and not taken."""
    from transformers import Trainer

    from speed_core.preference import prompt_sharing

    class Packed(Trainer):
        loss_is_scaled_for_ga = True

        def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
            return sum(batch["lengths"].sum() for batch in batch_samples).to(device)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            return -prompt_sharing.completion_log_probs(model, inputs).sum() / num_items_in_batch

    return Packed


def groups(rows: list[dict[str, Any]]) -> list[Any]:
    from speed_core.preference.prompt_sharing import PromptGroup

    cut = [r["completion_mask"].index(1) for r in rows]
    return [PromptGroup(r["input_ids"][:k], [r["input_ids"][k:]], []) for r, k in zip(rows, cut, strict=True)]


def even(part: list[Any], longest: int) -> int:
    """The least row capacity with which first fit needs no more rows of `longest` tokens than the tokens do."""
    from speed_core.preference import prompt_sharing

    sizes = [len(g) for g in part]
    rows = math.ceil(sum(sizes) / longest)
    return next(c for c in range(max(sizes), sum(sizes) + 1) if len(prompt_sharing.pack(sizes, c)) <= rows)


def stop_after(step: int) -> Any:
    """Ends a training early, with the learning rates of the whole one."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_training_stop = state.global_step >= step

    return Stop()


def trainer_of(method: str, steps: int, device: str, model: Any, folder: str) -> tuple[Any, int, int]:
    """(trainer, examples, completion tokens)."""
    from pathlib import Path

    from datasets import Dataset
    from peft import get_peft_model
    from transformers import TrainingArguments
    from trl import SFTConfig, SFTTrainer, pack_dataset

    from speed_core.generation import sft
    from speed_core.models import token_logprobs, training
    from speed_core.preference import prompt_sharing

    tokenizer, rows, settings = examples(steps * 8)
    assert settings.batch == settings.micro_batch == 8
    common_arguments = training.trainer_arguments(settings, 0, Path(folder), use_cpu=device == "cpu", bf16=False)
    useful = sum(sum(r["completion_mask"]) for r in rows)
    if method == "ours_packed":
        model = get_peft_model(model, training.lora_config(settings.lora, model))
        token_logprobs.hidden_states_only(model)
        trainer = packed_trainer()(
            model=model,
            args=TrainingArguments(**common_arguments, remove_unused_columns=False),
            train_dataset=groups(rows),
            data_collator=lambda part: prompt_sharing.collate(part, 0, even(part, settings.max_length)),
        )
        return trainer, len(rows), useful
    more: dict[str, Any] = {} if method == "trl_default" else {"gradient_checkpointing": False}
    data = Dataset.from_list(rows)
    if method == "trl_packing":
        packed = len(pack_dataset(data.select_columns(["input_ids"]), settings.max_length))
        more |= {"packing": True}
        common_arguments |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": max(1, round(packed / steps))}
    ours = method.startswith("ours")
    trainer = (sft._trainer_class() if ours else SFTTrainer)(
        model=model,
        args=SFTConfig(**common_arguments, max_length=settings.max_length, completion_only_loss=True, **more),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=training.lora_config(settings.lora, model),
    )
    if ours:
        token_logprobs.hidden_states_only(trainer.model)
        trainer.rows_at_once = settings.batch if method == "ours_padded" else trainer.rows_at_once
    return trainer, len(rows), useful


def measure(method: str, steps: int, planned: int, device: str) -> dict[str, Any]:
    from speed_core import console
    from speed_core.models import compute_type, training

    console.quiet()
    model, cells, useful = load(compute_type.choose().name, device), [0], [0]
    callback, ends = common.step_clock(device)
    model.get_input_embeddings().register_forward_hook(lambda m, inputs, out: cells.append(inputs[0].numel()))
    with tempfile.TemporaryDirectory() as folder:
        before, start = common.reset_peak(device), time.perf_counter()
        trainer, number, total = trainer_of(method, planned, device, model, folder)
        trainer.add_callback(callback)
        trainer.add_callback(stop_after(steps))
        training.remove_printer(trainer)
        draw = trainer.get_batch_samples

        def counted(*args: Any) -> Any:
            batches, tokens = draw(*args)
            useful.append(int(tokens))
            return batches, tokens

        trainer.get_batch_samples = counted
        trainer.train()
        common.synchronize(device)
    each = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    epoch = ends[0] - start + sum(each) * total / sum(useful)
    return {
        "epoch_s": epoch, "step_s": statistics.median(each), "fastest_step_s": min(each), "examples_s": number / epoch,
        "peak_mb": common.peak_mb(device) - before, "cells_per_useful": sum(cells) / sum(useful),
        "losses": [float(h["loss"]) for h in trainer.state.log_history if "loss" in h],
    }  # fmt: skip


def packing_check(device: str) -> dict[str, Any]:
    """TRL's loss of one packed row in float32: packed, of its examples alone, and with positions that run on."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from speed_core import console
    from speed_core.models import token_logprobs

    console.quiet()
    tokenizer, rows, settings = examples(2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(folder, packing=True, max_length=512, completion_only_loss=True, gradient_checkpointing=False,
                              per_device_train_batch_size=1, use_cpu=device == "cpu", bf16=False, report_to=[])  # fmt: skip
        trainer = SFTTrainer(
            load("float32", device), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert batch["input_ids"].shape == (1, sum(len(r["input_ids"]) for r in rows)), "the two examples share a row"
    running = torch.arange(batch["input_ids"].shape[1], device=device)[None]
    with torch.no_grad():
        packed = trainer.compute_loss(trainer.model, dict(batch)).item()
        leaking = trainer.compute_loss(trainer.model, dict(batch) | {"position_ids": running}).item()
        alone, tokens = 0.0, 0
        for r in rows:
            ids, scored = (torch.tensor([r[k]], device=device) for k in ("input_ids", "completion_mask"))
            alone -= token_logprobs.token_log_probs(trainer.model, ids, torch.ones_like(ids), scored).sum().item()
            tokens += int(scored.sum())
    return {"packed": packed, "alone": alone / tokens, "if_examples_saw_each_other": leaking}


def main() -> None:
    args = common.arguments(__doc__ or "")
    planned = 2 if args.quick else 6
    methods = ("trl_default", "ours_padded", "ours") if args.quick else METHODS
    rows: list[dict[str, Any]] = []
    for method in methods:
        steps = planned if method.startswith("ours") else planned // 2 if args.quick else 2
        found = common.in_process(measure, method, steps, planned, args.device, limit_s=280)
        rows.append({"method": method, "steps": steps, "planned_steps": planned} | found)
        print(rows[-1], flush=True)
    by = {r["method"]: r for r in rows if r["status"] == "ok"}
    ratios: dict[str, Any] = {}
    for peer in methods[:-1]:
        if peer in by and "ours" in by:
            for name, key in (
                ("vs", "epoch_s"),
                ("step_vs", "step_s"),
                ("fastest_step_vs", "fastest_step_s"),
                ("memory_vs", "peak_mb"),
            ):
                ratios[f"{name}_{peer}"] = round(by[peer][key] / max(1e-9, by["ours"][key]), 2)
            if peer != "trl_packing":  # other examples a step
                both = zip(by[peer]["losses"], by["ours"]["losses"], strict=False)
                ratios[f"largest_loss_difference_{peer}"] = max(abs(a - b) for a, b in both)
    if not args.quick:
        ratios["packing_check"] = common.in_process(packing_check, args.device)
    common.finish("sft", args, rows, ratios, ("trl", "transformers", "peft"))


if __name__ == "__main__":
    main()
