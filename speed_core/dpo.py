"""The senior generator: direct preference optimisation from the junior (SPEED Eq. 2).

    L = -log sigmoid( beta * [ (log pi(w|x) - log ref(w|x)) - (log pi(l|x) - log ref(l|x)) ] )

The policy starts as the junior and the frozen reference is the junior: its adapter is merged into the base, a new LoRA
adapter is trained on top, and the reference is that model with the new adapter off. Three things are done once where
DPO is usually done several times over: a prompt is read once for all its completions (`packing`), the reference is
computed before training and kept by digest, and only completion tokens meet the language-model head (`lm_head`). Loss,
rewards, gradients and trajectory equal TRL's `DPOTrainer` (tests/test_dpo.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speed_core import lm_head, models, packing, sft
from speed_core.artifacts import UserError, digest
from speed_core.packing import Group
from speed_core.profile import Senior

RULES = ("same", "empty", "truncated", "too_long", "joins")
LAYOUT = 1  # of packed rows: part of the reference's digest


def check_pairs(
    tokenizer: Any, pairs: Sequence[dict[str, Any]], max_length: int, *, share: bool = True
) -> tuple[list[Group], dict[str, list[int]]]:
    """Groups of pairs {prompt, chosen, rejected[, weight, truncated]}, and the rows that each rule set aside.

    Pairs of one prompt become one group, each text once. Rules: chosen equals rejected; an empty side; marked as cut at
    the token limit; prompt and one completion longer than `max_length` tokens; a prompt that is tokenised differently
    alone (as at generation time) and joined to its completion, so that the loss would not start where the text does.
    """
    aside: dict[str, list[int]] = {rule: [] for rule in RULES}
    found: dict[str, tuple[Group, dict[str, int]]] = {}
    for number, pair in enumerate(pairs):
        chosen, rejected = pair["chosen"], pair["rejected"]
        text = sft.prompt_text(pair["prompt"])
        prompt = models.encode_prompt(tokenizer, text)
        sides = [tokenizer(c, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for c in (chosen, rejected)]
        if not chosen.strip() or not rejected.strip():
            aside["empty"].append(number)
        elif chosen == rejected:
            aside["same"].append(number)
        elif pair.get("truncated"):
            aside["truncated"].append(number)
        elif len(prompt) + max(map(len, sides)) > max_length:
            aside["too_long"].append(number)
        elif any(models.encode_prompt(tokenizer, text + c)[: len(prompt)] != prompt for c in (chosen, rejected)):
            aside["joins"].append(number)
        else:
            key = pair["prompt"] if share else str(number)
            group, known = found.setdefault(key, (Group(prompt, [], [], name=f"pair {number}"), {}))
            for completion, ids in zip((chosen, rejected), sides, strict=True):
                if completion not in known:
                    known[completion] = len(group.completions)
                    group.completions.append(ids)
            group.pairs.append((known[chosen], known[rejected], float(pair.get("weight", 1.0))))
    return [group for group, _ in found.values()], aside


def pair_losses(
    policy: Any, reference: Any, pairs: Any, lengths: Any, *, beta: float, kind: str = "sigmoid", smoothing: float = 0.0
) -> tuple[Any, Any]:
    """Loss of each pair (P,) and implicit rewards (2, P), from (K,) log-probabilities of completions.

    sigmoid: Eq. 2; with `smoothing` e the labels are wrong with probability e (conservative DPO):
    -(1-e) log sigmoid(d) - e log sigmoid(-d). ipo (arXiv 2310.12036, Eq. 17): (h - 1/(2 beta))^2 with the
    difference h of log-ratios averaged over tokens, as its authors' results and TRL do.
    """
    import torch.nn.functional as F

    ratio = policy - reference
    chosen, rejected = ratio[pairs[:, 0]], ratio[pairs[:, 1]]
    rewards = (beta * ratio).detach()[pairs.T]
    if kind == "ipo":
        gap = chosen / lengths[pairs[:, 0]] - rejected / lengths[pairs[:, 1]]
        return (gap - 1 / (2 * beta)) ** 2, rewards
    delta = beta * (chosen - rejected)
    return -(1 - smoothing) * F.logsigmoid(delta) - smoothing * F.logsigmoid(-delta), rewards


def to_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}


def reference_log_probs(
    model: Any, groups: Sequence[Group], pad: int, batch_size: int, label: str = "reference", *, share: bool = True
) -> None:
    """Fill `reference` of every group, computed with the adapter switched off."""
    import torch

    bar, device = sft.progress(len(groups), label, "prompt"), next(model.parameters()).device
    with torch.no_grad(), model.disable_adapter():
        for start in range(0, len(groups), batch_size):
            part = groups[start : start + batch_size]
            found = packing.completion_log_probs(model, to_device(packing.collate(part, pad, share=share), device)).tolist()
            for group in part:
                group.reference, found = found[: len(group.completions)], found[len(group.completions) :]
            bar.update(len(part))
    bar.close()


def cached_reference(
    model: Any, groups: Sequence[Group], pad: int, batch_size: int, weights: str, folder: Path | None, *, share: bool = True
) -> str:
    """`reference_log_probs` through a file named by the digest of weights, data and layout; returns the digest.

    A file of another model, data set or layout has another name and is never read; one whose values do not fit is refused.
    """
    key = digest({"weights": weights, "layout": [LAYOUT, share], "groups": [[g.prompt, g.completions] for g in groups]})[:24]
    path = None if folder is None else folder / f"reference-{key}.npy"
    if path is not None and path.is_file():
        values = np.load(path, allow_pickle=False).tolist()
        if len(values) != sum(len(g.completions) for g in groups) or not all(map(math.isfinite, values)):
            raise UserError(f"{path.name}: {len(values)} reference values do not fit the data of its digest; delete the file")
        for g in groups:
            g.reference, values = values[: len(g.completions)], values[len(g.completions) :]
        return key
    reference_log_probs(model, groups, pad, batch_size, share=share)
    if path is not None and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        work = path.with_suffix(f".{os.getpid()}.npy")
        np.save(work, np.array([v for g in groups for v in g.reference]))
        work.replace(path)
    return key


def _trainer_class() -> Any:
    import torch
    from transformers import Trainer

    class DpoTrainer(Trainer):
        """Batches are `packing.collate`d groups; the loss is the weighted mean over the pairs of the global batch."""

        loss_is_scaled_for_ga = True  # by the pairs of all micro-batches, so that 1 x 8 = 2 x 4 = 8 x 1
        beta, kind, smoothing = 0.1, "sigmoid", 0.0

        def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
            total = sum(batch["weights"].sum() for batch in batch_samples).to(device)
            return self.accelerator.gather(total).sum() if self.args.world_size > 1 else total

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            policy = packing.completion_log_probs(model, inputs)
            each, rewards = pair_losses(
                policy,
                inputs["reference"],
                inputs["pairs"],
                inputs["lengths"],
                beta=self.beta,
                kind=self.kind,
                smoothing=self.smoothing,
            )
            total = inputs["weights"].sum() if num_items_in_batch is None else num_items_in_batch
            # Every process divides by the pairs of all of them, and their gradients are averaged.
            loss = (each * inputs["weights"]).sum() / total * self.args.world_size
            if not bool(torch.isfinite(loss)):
                raise UserError(self._complaint(each, inputs))
            kept = self.__dict__.setdefault("kept", [])
            ahead = (rewards[0] > rewards[1]).float()
            logp = policy.detach()[inputs["pairs"][:, 0]]
            kept.append(torch.stack([rewards[0], rewards[1], ahead, logp, each.detach(), inputs["weights"]]))
            return (loss, {}) if return_outputs else loss

        def _complaint(self, each: Any, inputs: Any) -> str:
            bad = [str(p) for p, v in zip(inputs["pairs"].tolist(), each.tolist(), strict=True) if not math.isfinite(v)]
            saved = sorted(Path(str(self.args.output_dir)).glob("checkpoint-*"))
            kept = f"last checkpoint: {saved[-1].name}" if saved else "no checkpoint was asked for (senior.save_steps)"
            return (
                f"senior: the loss is not a number at step {self.state.global_step + 1}, prompts {', '.join(inputs['names'])}, "
                f"completions {', '.join(bad)}; lower senior.lr or look at these pairs; {kept}"
            )

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            kept = self.__dict__.pop("kept", [])
            if kept and "loss" in logs:
                rows = torch.cat(kept, 1)  # this process's pairs, weighted as in the loss
                means = ((rows[:5] * rows[5]).sum(1) / rows[5].sum()).tolist()
                names = ("reward_chosen", "reward_rejected", "accuracy", "logp_chosen")
                logs |= dict(zip(names, means, strict=False)) | {"margin": means[0] - means[1]}
                logs["loss"] = means[4]
            super().log(logs, *args, **kwargs)

    return DpoTrainer


def train(
    base: str,
    junior: Path,
    pairs: Sequence[dict[str, Any]],
    settings: Senior,
    *,
    seed: int,
    output: Path,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Train the senior on `pairs` ({prompt, chosen, rejected}); the adapter lands in `output`.

    The adapter belongs to the junior's merged weights: `starting_point(base, junior)` gives the folder to load it on.
    `cache` keeps reference log-probabilities, and checkpoints where `settings.save_steps` asks for them; an interrupted
    run of the same settings goes on from the last one. Returns {"history": [{step, loss, margin, ...}], "rows", ...}.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, TrainingArguments

    sft.quiet()
    if settings.lora is None:
        raise UserError("senior.lora: missing; give rank and alpha")
    start = starting_point(base, junior)
    tokenizer = models.load_tokenizer(start)
    groups, aside = check_pairs(tokenizer, pairs[: settings.examples], settings.max_length, share=settings.share)
    counts = {rule: len(rows) for rule, rows in aside.items()}
    if len(groups) < settings.batch:
        raise UserError(
            f"senior: {len(groups)} usable prompts of {len(pairs)} pairs (set aside: {counts}), one batch needs {settings.batch}; "
            "raise senior.prompts or lower senior.batch"
        )
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError("senior: several GPUs are visible; start with torchrun, or set CUDA_VISIBLE_DEVICES to one of them")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch._dynamo.config.recompile_limit = 64  # FlexAttention meets rows, windows and modes of several sizes
    torch.manual_seed(seed)
    dtype = getattr(torch, settings.dtype)
    attention = "flex_attention" if torch.cuda.is_available() else "sdpa"
    model: Any = AutoModelForCausalLM.from_pretrained(start, dtype=dtype, attn_implementation=attention)
    model = get_peft_model(model.to(models.device()), sft.lora_config(settings.lora))
    lm_head.hidden_states_only(model)
    model.eval()
    pad, weights = tokenizer.pad_token_id, f"{models.weights_id(start)} {settings.dtype}"
    if settings.share:
        packing.verify(model, groups[0], pad)
    reference = cached_reference(model, groups, pad, settings.micro_batch, weights, cache, share=settings.share)
    where, resumable = output / "trainer", cache is not None and settings.save_steps > 0
    if cache is not None and resumable:
        decides = {
            "reference": reference,
            "pairs": [g.pairs for g in groups],
            "seed": seed,
            "settings": settings.model_dump(mode="json"),
        }
        where = cache / f"dpo-{digest(decides)[:24]}"
    more: dict[str, Any] = {"remove_unused_columns": False, "gradient_checkpointing": settings.gradient_checkpointing}
    more |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if settings.gradient_checkpointing else {}
    more |= {"save_strategy": "steps", "save_steps": settings.save_steps, "save_total_limit": 2} if settings.save_steps else {}
    trainer = _trainer_class()(
        model=model,
        args=TrainingArguments(**sft.trainer_arguments(settings, seed, where, **more)),
        train_dataset=groups,
        data_collator=lambda part: packing.collate(part, pad, settings.row_tokens, share=settings.share),
        callbacks=[sft.bar_callback("dpo")],
    )
    trainer.beta, trainer.kind, trainer.smoothing = settings.beta, settings.loss, settings.label_smoothing
    sft.remove_printer(trainer)
    trainer.train(resume_from_checkpoint=True if resumable and list(where.glob("checkpoint-*")) else None)
    history = sft.check_history(trainer.state.log_history, "senior")
    sft.save_adapter(trainer.model, output, start)
    facts = {"history": history, "rows": sum(len(g.pairs) for g in groups), "prompts": len(groups), "set_aside": counts}
    facts["set_aside_rows"] = {rule: rows for rule, rows in aside.items() if rows}
    (output / "training.json").write_text(json.dumps(facts, indent=1))
    return facts


def starting_point(base: str, junior: Path) -> str:
    """Folder of the junior's merged weights: the policy's start and the frozen reference."""
    return str(models.merged_folder(base, junior))
