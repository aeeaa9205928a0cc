"""The senior generator: direct preference optimisation from the junior (SPEED Eq. 2).

    L = -log sigmoid( beta * [ (log pi(w|x) - log ref(w|x)) - (log pi(l|x) - log ref(l|x)) ] )

The policy starts as the junior and the frozen reference is the junior: its adapter is merged into the base, a new LoRA
adapter is trained on top, and the reference is that model with the new adapter off. Three things are done once where
DPO is usually done several times over: a prompt is read once for all its completions (`prompt_sharing`), the reference is
computed before training and kept by digest, and only completion tokens meet the language-model head (`token_logprobs`).
Loss, rewards, gradients and trajectory equal TRL's `DPOTrainer` (tests/preference/test_dpo.py).
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.data_loader import SeedableRandomSampler
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from speed_core import console, machine
from speed_core.files import UserError, digest, write_atomically
from speed_core.models import adapters, compute_type, loading, packed, token_logprobs, training, weights
from speed_core.preference import prompt_sharing
from speed_core.preference.prompt_sharing import PromptGroup
from speed_core.preference.usable_pairs import check_pairs
from speed_core.profile import Senior

LAYOUT = 2  # of packed rows: part of the reference's digest


class Loss(StrEnum):
    """The losses that `senior.loss` names."""

    SIGMOID = "sigmoid"
    IPO = "ipo"


def dpo_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor, reference_rejected_logps: Tensor, *, beta: float, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """The loss of each pair (P,), from log-probabilities (P,) of whole completions (Eq. 2).

    With `label_smoothing` e the labels are wrong with probability e (conservative DPO):
    -(1-e) log sigmoid(d) - e log sigmoid(-d).
    """
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    delta = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(delta) - label_smoothing * F.logsigmoid(-delta)


def batch_losses(
    policy: Tensor, batch: dict[str, Tensor], *, beta: float, loss: str = Loss.SIGMOID, label_smoothing: float = 0.0
) -> Tensor:
    """The loss of each pair (P,) of a `prompt_sharing.collate`d batch, from log-probabilities (K,) of its completions.

    ipo (arXiv 2310.12036, Eq. 17): (h - 1/(2 beta))^2 with the difference h of log-ratios averaged over tokens, as its
    authors' results and TRL do.
    """
    (chosen, rejected), reference, lengths = batch["pairs"].T, batch["reference"], batch["lengths"]
    if loss == Loss.IPO:
        ratio = policy - reference
        gap = ratio[chosen] / lengths[chosen] - ratio[rejected] / lengths[rejected]
        return (gap - 1 / (2 * beta)) ** 2
    logps = policy[chosen], policy[rejected], reference[chosen], reference[rejected]
    return dpo_loss(*logps, beta=beta, label_smoothing=label_smoothing)


@torch.no_grad()
def reference_log_probs(
    model: Any, groups: Sequence[PromptGroup], pad: int, batch_size: int, *, share: bool = True, row_tokens: int | None = None
) -> None:
    """Fill `reference` of every group, computed with the adapter switched off; UserError names the row of a value that is none."""
    bar, device = console.progress(len(groups), "reference", "prompt"), next(model.parameters()).device
    with model.disable_adapter():
        for start in range(0, len(groups), batch_size):
            part = groups[start : start + batch_size]
            batch = prompt_sharing.to_device(prompt_sharing.collate(part, pad, row_tokens, share=share), device)
            _fill(part, prompt_sharing.completion_log_probs(model, batch).tolist())
            for group in part:
                if not all(map(math.isfinite, group.reference)):
                    raise UserError(
                        f"senior: the junior gives pair {group.rows[0] if group.rows else '?'} the log-probabilities "
                        f"{group.reference}; its weights are damaged or senior.dtype is too narrow for them"
                    )
            bar.update(len(part))
    bar.close()


def _fill(groups: Sequence[PromptGroup], values: Sequence[float]) -> None:
    """Give the values of all completions to their groups."""
    left = iter(values)
    for group in groups:
        group.reference = [next(left) for _ in group.completions]


def cached_reference(
    model: Any, groups: Sequence[PromptGroup], pad: int, batch_size: int, weights: str, folder: Path | None,
    *, share: bool = True, row_tokens: int | None = None,
) -> str:  # fmt: skip
    """`reference_log_probs` through a file named by the digest of weights, data and layout; returns the digest.

    A file of another model, data set or layout has another name and is never read; one whose values do not fit is refused.
    `weights` says which weights, and what else decides how they are read (precision, attention, configuration). Of several
    processes each computes its share, and the first writes the file.
    """
    rows = [[g.prompt, g.completions] for g in groups]
    key = digest({"weights": weights, "layout": [LAYOUT, share, row_tokens], "groups": rows})[:24]
    path = None if folder is None else folder / f"reference-{key}.npy"
    if path is not None and path.is_file():
        values = np.load(path, allow_pickle=False).tolist()
        if len(values) != sum(len(g.completions) for g in groups) or not all(map(math.isfinite, values)):
            raise UserError(f"{path.name}: {len(values)} reference values do not fit the data of its digest; delete the file")
        _fill(groups, values)
        return key
    several = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    reference_log_probs(model, groups[rank::world], pad, batch_size, share=share, row_tokens=row_tokens)
    if several:
        shares: list[Any] = [None] * world
        dist.all_gather_object(shares, [g.reference for g in groups[rank::world]])
        for number, group in enumerate(groups):
            group.reference = shares[number % world][number // world]
    if path is not None and rank == 0:
        np.save(file := io.BytesIO(), np.array([v for g in groups for v in g.reference]))
        write_atomically(path, file.getvalue())
    return key


class _WithFillers(torch.utils.data.Sampler[int]):
    """The order in which one process would read `real` rows, then the fillers behind them."""

    def __init__(self, real: int, total: int, seed: int):
        self.sampler, self.total = SeedableRandomSampler(range(real), data_seed=seed), total

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from range(len(self.sampler), self.total)

    def __len__(self) -> int:
        return self.total


class DpoTrainer(Trainer):
    """A Trainer of `PromptGroup`s with their reference, as `check_pairs` and `cached_reference` give them.

    Batches are `prompt_sharing.collate`d groups (`data_collator=lambda part: prompt_sharing.collate(part, pad)`). The loss is the
    weighted mean over the pairs of the global batch, and so are the logged rewards, margin, accuracy and log-probability;
    `evaluate` gives `eval_loss`.
    """

    loss_is_scaled_for_ga = True  # by the pairs of all micro-batches, so that 1 x 8 = 2 x 4 = 8 x 1

    def __init__(
        self, *, args: TrainingArguments, train_dataset: Sequence[PromptGroup], beta: float, loss: str = Loss.SIGMOID,
        label_smoothing: float = 0.0, **more: Any,
    ):  # fmt: skip
        self.beta, self.loss, self.label_smoothing, self.real = beta, loss, label_smoothing, len(train_dataset)
        self.step_means: list[Tensor] = []  # of the pairs read since the last log: four metrics, the loss, the weights
        # Several processes need equally many rows. accelerate would read the first rows twice; fillers weigh nothing.
        self.fillers = -self.real % (args.per_device_train_batch_size * args.world_size) if args.world_size > 1 else 0
        first = train_dataset[0]
        filler = replace(first, pairs=[(best, worst, 0.0) for best, worst, _ in first.pairs])
        rows: Any = [*train_dataset, *[filler] * self.fillers]
        super().__init__(args=args, train_dataset=rows, **more)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.fillers:
            return super()._get_train_sampler(train_dataset)
        return _WithFillers(self.real, self.real + self.fillers, self.args.data_seed or 0)

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        self.step_rows = [row for batch in batch_samples for row in batch["rows"].tolist()]  # of this process
        total = sum(batch["weights"].sum() for batch in batch_samples).to(device)
        return self.accelerator.gather(total).sum() if self.args.world_size > 1 else total

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        policy = prompt_sharing.completion_log_probs(model, inputs)
        each = batch_losses(policy, inputs, beta=self.beta, loss=self.loss, label_smoothing=self.label_smoothing)
        total = (each * inputs["weights"]).sum()
        if num_items_in_batch is None:
            loss = total / inputs["weights"].sum()
        else:  # every process divides by the pairs of all of them, and their gradients are averaged
            loss = total / num_items_in_batch * self.args.world_size
        if not bool(torch.isfinite(loss)):
            raise UserError(self._not_a_number(each, inputs))
        chosen, rejected = (self.beta * (policy - inputs["reference"])).detach()[inputs["pairs"].T]  # the implicit rewards
        logp = policy.detach()[inputs["pairs"][:, 0]]
        ahead = (chosen > rejected).float()
        self.step_means.append(torch.stack([chosen, rejected, ahead, logp, each.detach(), inputs["weights"]]))
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        kept, self.step_means = self.step_means, []  # what is evaluated is no part of a training step's means
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.step_means = kept
        return loss, None, None

    def _not_a_number(self, each: Tensor, inputs: dict[str, Tensor]) -> str:
        values = zip(inputs["rows"].tolist(), each.tolist(), strict=True)
        bad = ", ".join(f"pair {row}" for row, value in values if not math.isfinite(value))
        saved = training.last_checkpoint(Path(str(self.args.output_dir)))
        kept = f"last good checkpoint: {saved.name}" if saved else "there is no checkpoint yet (senior.save_steps)"
        return (
            f"senior: the loss is not a number at step {self.state.global_step + 1} of {bad or 'all pairs'}; "
            f"lower senior.lr or look at the data; {kept}"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        kept, self.step_means = self.step_means, []
        if kept and "loss" in logs:
            rows = torch.cat(kept, 1)  # this process's pairs, weighted as in the loss
            sums = self.accelerator.reduce(torch.cat([(rows[:5] * rows[5]).sum(1), rows[5:].sum(1)]), "sum").tolist()
            means = [value / sums[5] for value in sums[:5]]
            names = ("reward_chosen", "reward_rejected", "accuracy", "logp_chosen")
            logs |= dict(zip(names, means, strict=False)) | {"margin": means[0] - means[1], "loss": means[4]}
        super().log(logs, *args, **kwargs)


def train(
    base: str, junior: Path, pairs: Sequence[dict[str, Any]], settings: Senior,
    *, seed: int, output: Path, cache: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train the senior on `pairs` ({prompt, chosen, rejected}); the adapter lands in `output`.

    The adapter belongs to the junior's merged weights: `reference_model_path(base, junior)` gives the folder to load it on.
    `cache` keeps reference log-probabilities, and checkpoints where `settings.save_steps` asks for them; an interrupted
    run goes on from the last one. Returns {"history": [{step, loss, margin, ...}], "rows", ...}.
    """
    console.quiet()
    machine.make_room()
    if settings.lora is None:
        raise UserError("senior.lora: missing; give rank and alpha")
    more: dict[str, Any] = {"remove_unused_columns": False, "gradient_checkpointing": settings.gradient_checkpointing}
    if settings.gradient_checkpointing:
        more["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    # First: it refuses what cannot be split.
    given = training.trainer_arguments(settings, seed, output / "trainer", loading.resolve(base), **more)
    start = reference_model_path(base, junior)  # before processes know each other: then Transformers lets only the first one save
    arguments = training.one_gpu(TrainingArguments(**given))
    tokenizer = loading.load_tokenizer(start)
    groups, skipped = check_pairs(tokenizer, pairs, settings.max_length, share=settings.share, most=settings.examples)
    counts = {reason: len(rows) for reason, rows in skipped.items()}
    if len(groups) < settings.batch:
        remedy = "senior.examples" if settings.examples < settings.batch else "senior.prompts"
        raise UserError(
            f"senior: {len(groups)} usable prompts among {len(pairs)} pairs (senior.examples {settings.examples}, set aside: "
            f"{counts}), one batch needs {settings.batch}; raise {remedy} or lower senior.batch"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch._dynamo.config.recompile_limit = 64  # FlexAttention meets rows, windows and modes of several sizes
    torch.manual_seed(seed)
    kind = compute_type.choose(settings.dtype, training=True, folder=start)
    attention = "flex_attention" if torch.cuda.is_available() else "sdpa"  # the former has not run on a GPU yet
    dtype = compute_type.torch_type(kind.weights)
    model: Any = AutoModelForCausalLM.from_pretrained(start, dtype=dtype, attn_implementation=attention)
    model = get_peft_model(model.to(machine.device()), training.lora_config(settings.lora, model))
    token_logprobs.hidden_states_only(packed.pack(model, training=True))
    model.eval()
    pad = tokenizer.pad_token_id
    if settings.share:
        prompt_sharing.verify(model, groups[0], pad)
    config = digest(json.loads((Path(start) / "config.json").read_text(encoding="utf-8")))
    read = f"{weights.weights_id(start)} {kind.name} {attention} {config}"
    layout: dict[str, Any] = {"share": settings.share, "row_tokens": settings.row_tokens}
    reference = cached_reference(model, groups, pad, settings.micro_batch, read, cache, **layout)
    trainer = DpoTrainer(
        model=model,
        args=arguments,
        train_dataset=groups,
        beta=settings.beta,
        loss=settings.loss,
        label_smoothing=settings.label_smoothing,
        data_collator=lambda part: prompt_sharing.collate(part, pad, settings.row_tokens, share=settings.share),
        callbacks=[training.bar_callback("dpo", lambda: trainer.step_rows)],
    )
    facts = {
        "history": training.train(trainer, "senior", settings, cache, pairs=[g.pairs for g in groups], reference=reference),
        "rows": sum(len(g.pairs) for g in groups),
        "prompts": len(groups),
        "set_aside": counts,
        "set_aside_rows": {reason: rows for reason, rows in skipped.items() if rows},
    }
    return training.finish(trainer, trainer.model, output, facts, lambda m, w: adapters.save_adapter(m, output, start, w))


def reference_model_path(base: str, junior: Path) -> str:
    """Folder of the junior's merged weights: the policy's start and the frozen reference."""
    return str(loading.merged_folder(base, junior))
