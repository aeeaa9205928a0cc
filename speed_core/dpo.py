"""The senior generator: direct preference optimisation from the junior (SPEED Eq. 2).

    L = -log sigmoid( beta * [ (log pi(w|x) - log ref(w|x)) - (log pi(l|x) - log ref(l|x)) ] )

The policy starts as the junior and the frozen reference is the junior: its adapter is merged into
the base, a new LoRA adapter is trained on top, and the reference is that model with the new adapter
off. Reference log-probabilities are computed once, before training; only completion tokens meet the
language-model head. Loss and gradients equal TRL's `DPOTrainer` (tests/test_dpo.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed_core import lm_head, models, sft
from speed_core.artifacts import UserError
from speed_core.profile import Senior


def check_pairs(
    tokenizer: Any, pairs: Sequence[dict[str, Any]], max_length: int
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Rows {prompt, chosen, rejected} of token ids, and how many pairs each rule set aside.

    Rules: chosen equals rejected, an empty side, longer than `max_length` tokens. Prompt and completions
    are tokenised apart, as at generation time, so the loss starts exactly at the first completion token.
    """
    rows: list[dict[str, list[int]]] = []
    aside = {"same": 0, "empty": 0, "too_long": 0}
    for pair in pairs:
        chosen, rejected = pair["chosen"], pair["rejected"]
        if not chosen.strip() or not rejected.strip():
            aside["empty"] += 1
            continue
        if chosen == rejected:
            aside["same"] += 1
            continue
        prompt = models.encode_prompt(tokenizer, sft.prompt_text(pair["prompt"]))
        sides = [tokenizer(c, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for c in (chosen, rejected)]
        if len(prompt) + max(map(len, sides)) > max_length:
            aside["too_long"] += 1
        else:
            rows.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    return rows, aside


def collate(rows: Sequence[dict[str, Any]], pad: int) -> dict[str, Any]:
    """Rows to tensors (2B, T): first all chosen, then all rejected; `scored` marks completion tokens."""
    import torch

    ids, scored = [], []
    for side in ("chosen", "rejected"):
        for row in rows:
            ids.append(row["prompt"] + row[side])
            scored.append([0] * len(row["prompt"]) + [1] * len(row[side]))
    width = max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([r + [pad] * (width - len(r)) for r in ids]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in ids]),
        "scored": torch.tensor([s + [0] * (width - len(s)) for s in scored]),
    }
    if "reference" in rows[0]:
        batch["reference"] = torch.tensor([r["reference"] for r in rows], dtype=torch.float32)
    return batch


def sequence_log_probs(model: Any, batch: dict[str, Any]) -> Any:
    """(2, B) summed log-probabilities of the chosen and the rejected completions."""
    logp = lm_head.token_log_probs(model, batch["input_ids"], batch["attention_mask"], batch["scored"])
    return logp.sum(1).view(2, -1)


def dpo_loss(policy: Any, reference: Any, beta: float) -> tuple[Any, Any]:
    """Eq. 2 on (2, B) log-probabilities; returns the mean loss and the (2, B) implicit rewards beta*(pi - ref)."""
    import torch.nn.functional as F

    rewards = beta * (policy - reference)
    return -F.logsigmoid(rewards[0] - rewards[1]).mean(), rewards.detach()


def reference_log_probs(model: Any, rows: list[dict[str, Any]], pad: int, batch_size: int, label: str) -> None:
    """Add `reference` [chosen, rejected] to each row, computed with the adapter switched off."""
    import torch

    bar = sft.progress(len(rows), label, "pair")
    device = next(model.parameters()).device
    with torch.no_grad(), model.disable_adapter():
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = {k: v.to(device) for k, v in collate(part, pad).items()}
            for row, pair in zip(part, sequence_log_probs(model, batch).T.tolist(), strict=True):
                row["reference"] = pair
            bar.update(len(part))
    bar.close()


def _trainer_class() -> Any:
    from transformers import Trainer

    class DpoTrainer(Trainer):
        beta = 0.1

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            policy = sequence_log_probs(model, inputs)
            loss, rewards = dpo_loss(policy, inputs["reference"].T, self.beta)
            kept = self.__dict__.setdefault("kept", [])
            kept.append(
                [rewards[0].mean(), rewards[1].mean(), (rewards[0] > rewards[1]).float().mean(), policy[0].detach().mean()]
            )
            return (loss, {}) if return_outputs else loss

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            kept = self.__dict__.pop("kept", [])
            if kept and "loss" in logs:
                means = [float(sum(c) / len(c)) for c in zip(*kept, strict=True)]
                names = ("reward_chosen", "reward_rejected", "accuracy", "logp_chosen")
                logs |= dict(zip(names, means, strict=True)) | {"margin": means[0] - means[1]}
            super().log(logs, *args, **kwargs)

    return DpoTrainer


def train(
    base: str, junior: Path, pairs: Sequence[dict[str, Any]], settings: Senior, *, seed: int, output: Path
) -> dict[str, Any]:
    """Train the senior on `pairs` ({prompt, chosen, rejected}); the adapter lands in `output`.

    The adapter belongs to the junior's merged weights: `starting_point(base, junior)` gives the folder
    to load it on. Returns {"history": [{step, loss, margin, accuracy, ...}], "rows", "set_aside"}.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, TrainingArguments

    sft.quiet()
    if settings.lora is None:
        raise UserError("senior.lora: missing; give rank and alpha")
    start = starting_point(base, junior)
    tokenizer = models.load_tokenizer(start)
    rows, aside = check_pairs(tokenizer, pairs[: settings.examples], settings.max_length)
    if len(rows) < settings.batch:
        raise UserError(
            f"senior: {len(rows)} usable pairs of {len(pairs)} (set aside: {aside}), one batch needs {settings.batch}; "
            "raise senior.prompts or lower senior.batch"
        )
    torch.manual_seed(seed)
    dtype = getattr(torch, settings.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(start, dtype=dtype, attn_implementation="sdpa")
    model = model.to(models.device())
    model = get_peft_model(model, sft.lora_config(settings.lora))
    pad = tokenizer.pad_token_id
    reference_log_probs(model.eval(), rows, pad, settings.micro_batch, "reference")
    trainer = _trainer_class()(
        model=model,
        args=TrainingArguments(**sft.trainer_arguments(settings, seed, output / "trainer", remove_unused_columns=False)),
        train_dataset=rows,
        data_collator=lambda part: collate(part, pad),
        callbacks=[sft.bar_callback("dpo")],
    )
    trainer.beta = settings.beta
    sft.remove_printer(trainer)
    trainer.train()
    history = sft.check_history(trainer.state.log_history, "senior")
    sft.save_adapter(trainer.model, output, start)
    facts = {"history": history, "rows": len(rows), "set_aside": aside}
    (output / "training.json").write_text(json.dumps(facts, indent=1))
    return facts


def starting_point(base: str, junior: Path) -> str:
    """Folder of the junior's merged weights: the policy's start and the frozen reference."""
    return str(models.merged_folder(base, junior))
