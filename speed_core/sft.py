"""Supervised fine-tuning of the junior generator (SPEED Eq. 1) and the data revisor (Eq. 3).

Both minimise the next-token loss on the completion alone: -log p(sample | prompt). TRL trains,
PEFT adapts; this module prepares the rows and keeps the facts that the notebooks show.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from speed_core import compute_type, engines, lm_head, models
from speed_core.artifacts import UserError, write_json
from speed_core.files import surrogate

if TYPE_CHECKING:  # a GPU can be checked without pydantic
    from speed_core.profile import Lora, Training

CPU_ROWS = 3  # examples in one forward pass on a CPU


def prompt_text(text: str) -> str:
    """What a generator reads: the prompt and a line break, the same in training and in use."""
    return text + "\n"


def refuse_surrogates(number: int, **texts: str) -> None:
    """UserError that names the training row and the field with half of a UTF-16 pair, which no tokenizer reads."""
    for name, text in texts.items():
        if surrogate(text):
            raise UserError(
                f"training row {number}: its {name} holds half of a UTF-16 pair (\\ud800 to \\udfff); write the text again"
            )


def encode_rows(tokenizer: Any, pairs: Sequence[tuple[str, str]], max_length: int) -> tuple[list[dict[str, Any]], int]:
    """Token rows {input_ids, completion_mask} for (prompt, completion) pairs, and how many were too long.

    Prompt and completion are tokenised apart and joined, as at generation time, and the completion
    ends with <eos>: a generator that never saw the end would never stop.
    """
    rows, dropped = [], 0
    for number, (prompt, completion) in enumerate(pairs):
        refuse_surrogates(number, prompt=prompt, completion=completion)
        head = models.encode_prompt(tokenizer, prompt_text(prompt))
        tail = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(head) + len(tail) > max_length:
            dropped += 1
            continue
        rows.append({"input_ids": head + tail, "completion_mask": [0] * len(head) + [1] * len(tail)})
    return rows, dropped


def lora_config(lora: Lora, task_type: str = "CAUSAL_LM") -> Any:
    """PEFT's configuration from a profile's values."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type=task_type,
    )


def quiet() -> None:
    """Silence messages that say nothing about the reader's run; real problems raise."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message=".*torchao.*")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def bar_callback(label: str, among: Callable[[], Sequence[int]] | None = None) -> Any:
    """A progress bar on standard output with steps done, total and time left; a gradient that is no number stops the training.
    `among` tells which pairs the step has read."""
    import torch
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar = progress(state.max_steps, label, "step")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.update()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            # Before the weights are touched: the last checkpoint stays good, and nothing is trained further.
            norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
            if not math.isfinite(float(norm)):
                found = last_checkpoint(Path(args.output_dir))
                kept = f"; last good checkpoint: {found.name}" if found else ""
                pairs = f" of pairs {', '.join(map(str, among()))}" if among else ""
                raise UserError(
                    f"{label}: a gradient is not a number at step {state.global_step + 1}{pairs}; lower the learning rate{kept}"
                )

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.close()

    return Bar()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end (the trainer's state comes last), or None."""
    found = [p for p in folder.glob("checkpoint-*") if p.name[11:].isdecimal() and (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name[11:]), default=None)


def remove_printer(trainer: Any) -> None:
    """Take off the callback that prints every logged step; the progress bar and the kept history replace it."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def progress(total: int, label: str, unit: str, initial: int = 0) -> Any:
    """tqdm on standard output, rarely redrawn: readable in a notebook, a log file and a terminal."""
    import sys

    return tqdm(total=total, initial=initial, desc=label, unit=unit, mininterval=3, file=sys.stdout, ascii=" #", ncols=90)


def trainer_arguments(settings: Training, seed: int, output: Path, folder: str = "", **more: Any) -> dict[str, Any]:
    """Arguments that SFT, DPO and embedding training share; `folder` of the model. Accumulation is derived from the global batch."""
    import torch

    cuda, kind = torch.cuda.is_available(), compute_type.choose(settings.dtype, training=True, folder=folder).name
    world = int(os.environ.get("WORLD_SIZE", max(1, torch.cuda.device_count())))
    if settings.batch % (settings.micro_batch * world):
        raise UserError(
            f"batch {settings.batch}: not micro_batch {settings.micro_batch} x {world} devices x a whole number; "
            "change batch or micro_batch"
        )
    return {
        "output_dir": str(output),
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.lr,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.batch // (settings.micro_batch * world),
        "warmup_steps": settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "bf16": kind == "bfloat16" and cuda,
        "fp16": kind == "float16",
        "use_cpu": not cuda,
        "seed": seed,
        "data_seed": seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would log a loss that is not a number as the mean of those before
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **more,
    }


def check_history(history: Sequence[dict[str, Any]], what: str) -> list[dict[str, float]]:
    """Rows {step, loss} of a finished training; a loss that is not a number is an error."""
    rows = [{"step": h["step"], **{k: float(v) for k, v in h.items() if k != "step"}} for h in history if "loss" in h]
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise UserError(f"{what}: loss is {row['loss']} at step {int(row['step'])}; lower the learning rate")
    return rows


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write the adapter and, beside it, the digest of the weights that it belongs to.

    PEFT writes the folder of the base into two files, and the adapted layers in an order that differs from process to
    process: with either, equal adapters would differ in digest.
    """
    model.save_pretrained(str(folder))
    weights = models.weights_id(models.resolve(base))
    name = f"merged weights {weights}" if os.path.isabs(base) else base
    write_json(folder / "base.json", {"name": name, "weights": weights})
    for path in (folder / "adapter_config.json", folder / "README.md"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(models.resolve(base), name), encoding="utf-8")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
    write_json(folder / "adapter_config.json", config)


def by_length(batch: dict[str, Any], rows: int) -> list[dict[str, Any]]:
    """A right-padded batch of tensors (B, T) in parts of at most `rows` rows of like length, each as wide as its longest."""
    lengths = batch["attention_mask"].sum(1)
    parts = lengths.argsort(descending=True, stable=True).split(rows)
    return [{k: v[part, : int(lengths[part[0]])] for k, v in batch.items()} for part in parts]


def completion_loss(model: Any, batch: dict[str, Any], count: Any) -> Any:
    """Sum of -log p over the completion tokens of `batch` {input_ids, attention_mask, labels: -100 where not scored} / `count`.

    `model` as in `lm_head.token_log_probs`. With the completion tokens of the whole batch as `count`, the losses of its
    parts add up to its mean: Eq. 1 has no term between examples.
    """
    logp = lm_head.token_log_probs(model, batch["input_ids"], batch["attention_mask"], batch["labels"] != -100)
    return -logp.sum() / count


def _trainer_class() -> Any:
    """TRL's SFTTrainer with this package's language-model head (see `lm_head`) and, on a CPU, a batch read in parts."""
    import torch
    from trl import SFTTrainer

    class Trainer(SFTTrainer):
        rows_at_once: int | None = None if torch.cuda.is_available() else CPU_ROWS

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            total = 0.0
            for part in by_length(inputs, self.rows_at_once) if self.rows_at_once else [inputs]:
                total = total + super().training_step(model, part, num_items_in_batch)  # forward, backward
            return total

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            count = (inputs["labels"] != -100).sum() if num_items_in_batch is None else num_items_in_batch
            # The count is that of all processes, and their gradients are averaged.
            scale = 1 if num_items_in_batch is None else self.accelerator.num_processes
            loss = completion_loss(model, inputs, count) * scale
            return (loss, {}) if return_outputs else loss

    return Trainer


def train(
    base: str, pairs: Sequence[tuple[str, str]], settings: Training, *, seed: int, output: Path, label: str = "sft"
) -> dict[str, Any]:
    """Fine-tune `base` with LoRA on (prompt, completion) pairs; the adapter lands in `output`.

    Returns {"history": [{step, loss, ...}], "rows", "dropped_too_long", "trainable"}.
    Raises UserError when no pair fits or the loss is not a number.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig

    quiet()
    engines.make_room()
    if settings.lora is None:
        raise UserError(f"{label}.lora: missing; generators are trained with LoRA, give rank and alpha")
    tokenizer = models.load_tokenizer(base)
    rows, dropped = encode_rows(tokenizer, pairs[: settings.examples], settings.max_length)
    if not rows:
        raise UserError(f"{label}: none of {len(pairs)} examples fits max_length {settings.max_length}; raise it")
    dtype = compute_type.torch_type(compute_type.choose(settings.dtype, training=True, folder=models.resolve(base)).weights)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(models.resolve(base), dtype=dtype, attn_implementation="sdpa")
    trainer = _trainer_class()(
        model=model,
        args=SFTConfig(
            **trainer_arguments(settings, seed, output / "trainer", models.resolve(base)),
            max_length=settings.max_length,
            completion_only_loss=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(settings.lora),
        callbacks=[bar_callback(label)],
    )
    remove_printer(trainer)
    lm_head.hidden_states_only(trainer.model)
    trainer.train()
    history = check_history(trainer.state.log_history, label)
    save_adapter(trainer.model, output, base)
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    facts = {"history": history, "rows": len(rows), "dropped_too_long": dropped, "trainable": trainable}
    (output / "training.json").write_text(json.dumps(facts, indent=1))
    return facts
