"""Supervised fine-tuning of the junior generator (SPEED Eq. 1) and the data revisor (Eq. 3).

Both minimise the next-token loss on the completion alone: -log p(sample | prompt). TRL trains,
PEFT adapts; this module prepares the rows and keeps the facts that the notebooks show.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed_core import console, machine
from speed_core.files import UserError
from speed_core.models import adapters, compute_type, loading, packed, token_logprobs, training
from speed_core.profile import Training

CPU_ROWS = 3  # examples in one forward pass on a CPU


def encode_rows(tokenizer: Any, pairs: Sequence[tuple[str, str]], max_length: int) -> tuple[list[dict[str, Any]], int]:
    """Token rows {input_ids, completion_mask} for (prompt, completion) pairs, and how many were too long.

    Prompt and completion are tokenised apart and joined, as at generation time, and the completion
    ends with <eos>: a generator that never saw the end would never stop.
    """
    rows, dropped = [], 0
    for number, (prompt, completion) in enumerate(pairs):
        training.refuse_surrogates(number, prompt=prompt, completion=completion)
        head = loading.encode_prompt(tokenizer, training.prompt_text(prompt))
        tail = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(head) + len(tail) > max_length:
            dropped += 1
            continue
        rows.append({"input_ids": head + tail, "completion_mask": [0] * len(head) + [1] * len(tail)})
    return rows, dropped


def completion_loss(model: Any, batch: dict[str, Any], count: Any) -> Any:
    """Sum of -log p over the completion tokens of `batch` {input_ids, attention_mask, labels: -100 where not scored} / `count`.

    `model` as in `token_logprobs.token_log_probs`. With the completion tokens of the whole batch as `count`, the losses of its
    parts add up to its mean: Eq. 1 has no term between examples.
    """
    logp = token_logprobs.token_log_probs(model, batch["input_ids"], batch["attention_mask"], batch["labels"] != -100)
    return -logp.sum() / count


def _trainer_class() -> Any:
    """TRL's SFTTrainer with this package's language-model head (see `lm_head`) and, on a CPU, a batch read in parts."""
    import torch
    from trl import SFTTrainer

    class Trainer(SFTTrainer):
        rows_at_once: int | None = None if torch.cuda.is_available() else CPU_ROWS

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            total = 0.0
            for part in training.by_length(inputs, self.rows_at_once)[1] if self.rows_at_once else [inputs]:
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
    base: str, pairs: Sequence[tuple[str, str]], settings: Training,
    *, seed: int, output: Path, label: str = "sft", cache: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune `base` with LoRA on (prompt, completion) pairs; the adapter lands in `output`.

    `cache` keeps checkpoints where `settings.save_steps` asks for them; an interrupted run goes on from the last one.
    Returns {"history": [{step, loss, ...}], "rows", "dropped_too_long", "trainable"}.
    Raises UserError when no pair fits or the loss is not a number.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig

    console.quiet()
    machine.make_room()
    if settings.lora is None:
        raise UserError(f"{label}.lora: missing; generators are trained with LoRA, give rank and alpha")
    tokenizer = loading.load_tokenizer(base)
    rows, dropped = encode_rows(tokenizer, pairs[: settings.examples], settings.max_length)
    if not rows:
        raise UserError(f"{label}: none of {len(pairs)} examples fits max_length {settings.max_length}; raise it")
    dtype = compute_type.torch_type(compute_type.choose(settings.dtype, training=True, folder=loading.resolve(base)).weights)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(loading.resolve(base), dtype=dtype, attn_implementation="sdpa")
    trainer = _trainer_class()(
        model=model,
        args=training.one_gpu(
            SFTConfig(
                **training.trainer_arguments(settings, seed, output / "trainer", loading.resolve(base)),
                max_length=settings.max_length,
                completion_only_loss=True,
                gradient_checkpointing=False,
            )
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=training.lora_config(settings.lora, model),
        callbacks=[training.bar_callback(label)],
    )
    token_logprobs.hidden_states_only(packed.pack(trainer.model, training=True))
    history = training.train(trainer, label, settings, cache, rows=rows, base=loading.model_id(base))
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    facts = {"history": history, "rows": len(rows), "dropped_too_long": dropped, "trainable": trainable}
    return training.finish(trainer, trainer.model, output, facts, lambda m, w: adapters.save_adapter(m, output, base, w))
