"""The senior generator: direct preference optimisation from the junior (SPEED Eq. 2).

    L = -log sigmoid( beta * [ (log pi(w|x) - log ref(w|x)) - (log pi(l|x) - log ref(l|x)) ] )

The policy starts as the junior and the frozen reference is the junior: its adapter is merged into
the base, a new LoRA adapter is trained on top, and the reference is that model with the new adapter
off. Reference log-probabilities are computed once, before training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed_core import models, sft
from speed_core.artifacts import UserError
from speed_core.profile import Senior


def check_pairs(
    tokenizer: Any, pairs: Sequence[dict[str, Any]], max_length: int
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Rows {prompt, chosen, rejected} for TRL, and how many pairs each rule set aside.

    Rules: chosen equals rejected, an empty side, longer than `max_length` tokens, and a prompt whose
    tokens differ alone and joined with a completion (the loss would start at the wrong token).
    """
    rows: list[dict[str, str]] = []
    aside = {"same": 0, "empty": 0, "too_long": 0, "boundary": 0}
    bos = tokenizer.bos_token or ""
    for pair in pairs:
        prompt, chosen, rejected = bos + sft.prompt_text(pair["prompt"]), pair["chosen"], pair["rejected"]
        if not chosen.strip() or not rejected.strip():
            aside["empty"] += 1
            continue
        if chosen == rejected:
            aside["same"] += 1
            continue
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        joined = [tokenizer(prompt + c, add_special_tokens=False)["input_ids"] for c in (chosen, rejected)]
        if any(j[: len(head)] != head for j in joined):
            aside["boundary"] += 1
        elif max(map(len, joined)) + 1 > max_length:
            aside["too_long"] += 1
        else:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows, aside


def train(
    base: str, junior: Path, pairs: Sequence[dict[str, Any]], settings: Senior, *, seed: int, output: Path
) -> dict[str, Any]:
    """Train the senior on `pairs` ({prompt, chosen, rejected}); the adapter lands in `output`.

    The adapter belongs to the junior's merged weights: `starting_point(base, junior)` gives the folder
    to load it on. Returns {"history": [{step, loss, rewards/...}], "rows", "set_aside"}.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    sft.quiet()
    if settings.lora is None:
        raise UserError("senior.lora: missing; give rank and alpha")
    start = starting_point(base, junior)
    tokenizer = models.load_tokenizer(start)
    # TRL adds special tokens to plain text by itself where the tokenizer does; ours is given <bos> as text.
    rows, aside = check_pairs(tokenizer, pairs[: settings.examples], settings.max_length)
    if not rows:
        raise UserError(f"senior: no usable pair of {len(pairs)} (set aside: {aside}); raise senior.prompts")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=getattr(torch, settings.dtype), attn_implementation="sdpa")
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            **sft.trainer_arguments(settings, seed, output / "trainer"),
            beta=settings.beta,
            max_length=settings.max_length,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=settings.micro_batch,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=sft.lora_config(settings.lora),
        callbacks=[sft.bar_callback("dpo")],
    )
    trainer.train()
    history = sft.check_history(trainer.state.log_history, "senior")
    sft.save_adapter(trainer.model, output, start)
    facts = {"history": history, "rows": len(rows), "set_aside": aside}
    (output / "training.json").write_text(json.dumps(facts, indent=1))
    return facts


def starting_point(base: str, junior: Path) -> str:
    """Folder of the junior's merged weights: the policy's start and the frozen reference."""
    return str(models.merged_folder(base, junior))
