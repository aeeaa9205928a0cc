"""What SFT, DPO and the training of embeddings share: arguments of the Trainer, LoRA, rows of like length, checkpoints."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speed_core.console import progress
from speed_core.files import UserError, digest, surrogate
from speed_core.models import compute_type
from speed_core.profile import Embedding, Lora, Training

if TYPE_CHECKING:  # torch takes a second
    from torch import Tensor


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


def lora_config(lora: Lora, model: Any, task_type: str = "CAUSAL_LM") -> Any:
    """PEFT's configuration from a profile's values. The layers that a profile names by default are those of Llama and its like; where
    `model` has none of them, all its linear layers are taken."""
    from peft import LoraConfig

    default = lora.targets == Lora.model_fields["targets"].default
    known = any(name.rpartition(".")[2] in lora.targets for name, _ in model.named_modules())
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) if known or not default else "all-linear",
        task_type=task_type,
    )


def processes() -> int:
    """How many processes train together: those that a launcher started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def one_gpu(arguments: Any) -> Any:
    """The Trainer's arguments, with one GPU for this process: where it sees several, it would copy the model to all of them."""
    arguments._n_gpu = min(1, arguments._n_gpu)
    return arguments


def accumulation(settings: Training, world: int) -> int:
    """How many micro-batches each of `world` processes adds up to a step. UserError where they do not make up the batch.

    Of an embedding's batch a process's share is one micro-batch: gradients that are added up would have no common negatives.
    """
    micro = max(1, settings.batch // world) if isinstance(settings, Embedding) else settings.micro_batch
    if settings.batch % (micro * world):
        raise UserError(
            f"batch {settings.batch}: not micro_batch {micro} x {world} devices x a whole number; "
            "change batch, micro_batch or training.processes"
        )
    return settings.batch // (micro * world)


def trainer_arguments(settings: Training, seed: int, output: Path, folder: str = "", **more: Any) -> dict[str, Any]:
    """Arguments that SFT, DPO and embedding training share; `folder` of the model. Accumulation is derived from the global batch."""
    import torch

    cuda, kind = torch.cuda.is_available(), compute_type.choose(settings.dtype, training=True, folder=folder).name
    return {
        "output_dir": str(output),
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.lr,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": accumulation(settings, processes()),
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


def by_length(batch: dict[str, Tensor], rows: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """A right-padded batch of tensors (B, T) in parts of at most `rows` rows of like length, each as wide as its longest; and the
    order of the batch's rows in them."""
    lengths = batch["attention_mask"].sum(1)
    order = lengths.argsort(descending=True, stable=True)
    return order, [{k: v[part, : int(lengths[part[0]])] for k, v in batch.items()} for part in order.split(rows)]


def bar_callback(label: str, among: Callable[[], Sequence[int]] | None = None) -> Any:
    """A progress bar on standard output with steps done, total and time left; a gradient that is no number stops the training.
    `among` tells which pairs the step has read."""
    import torch
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar = progress(state.max_steps, label, "step")

        def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
            # Among several processes a sampler may be too deep for the Trainer: one that goes on would read the first epoch's order.
            while train_dataloader := getattr(train_dataloader, "batch_sampler", getattr(train_dataloader, "sampler", None)):
                if hasattr(train_dataloader, "set_epoch"):
                    train_dataloader.set_epoch(int(state.epoch or 0))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.update()
            control.should_save &= state.global_step < state.max_steps  # from a last one the Trainer would go a step too far

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            # Before the weights are touched: the last checkpoint stays good, and nothing is trained further.
            norm = whole(torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None))
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


def last_checkpoint(folder: Path, world: int = 0) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end, or None. The first process writes the trainer's state last; each
    of `world` processes (0: of those that train here) adds the state of its random numbers, and nobody waits for the others."""
    every = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json") if p.parent.name[11:].isdecimal()]
    found = [p for p in every if len(list(p.glob("rng_state*"))) == (world or processes())]
    return max(found, key=lambda p: int(p.name[11:]), default=None)


def train(trainer: Any, label: str, settings: Training, cache: Path | None, **data: Any) -> list[dict[str, float]]:
    """Run a trainer; its history as of `check_history`. With `settings.save_steps` it leaves checkpoints in `cache` until `finish`, and
    goes on from the last one of the same settings, seed, number of processes and `data` (and names of models)."""
    remove_printer(trainer)
    args, saved = trainer.args, None
    if cache is not None and settings.save_steps:
        types = [args.bf16, args.fp16, *sorted({str(p.dtype) for p in trainer.model.parameters()})]
        same = {"settings": settings.cache_key_fields(), "seed": args.seed, "types": types, "processes": processes(), **data}
        args.output_dir = str(cache / f"{label}-{digest(same)[:24]}")
        args.save_strategy, args.save_steps, args.save_total_limit = "steps", settings.save_steps, 2
        saved = last_checkpoint(Path(args.output_dir))
    trainer.train(resume_from_checkpoint=str(saved) if saved else None)
    return check_history(trainer.state.log_history, label)


def finish(trainer: Any, model: Any, output: Path, facts: dict[str, Any], save: Callable[[Any, Any], None]) -> dict[str, Any]:
    """Have the first process `save` the model (with the weights that FSDP has split, gathered; else None) and the `facts`, which are
    returned; then the checkpoints are removed."""
    weights = trainer.accelerator.get_state_dict(model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        save(model, weights)
        (output / "training.json").write_text(json.dumps(facts, indent=1))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    return facts


def whole(tensor: Any) -> Any:
    """A tensor that FSDP has split over the processes, gathered in each of them; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def remove_printer(trainer: Any) -> None:
    """Take off the callback that prints every logged step; the progress bar and the kept history replace it."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def check_history(history: Sequence[dict[str, Any]], what: str) -> list[dict[str, float]]:
    """Rows {step, loss} of a finished training; a loss that is not a number is an error."""
    rows = [{"step": h["step"], **{k: float(v) for k, v in h.items() if k != "step"}} for h in history if "loss" in h]
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise UserError(f"{what}: loss is {row['loss']} at step {int(row['step'])}; lower the learning rate")
    return rows
