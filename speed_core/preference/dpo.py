"""The senior generator: direct preference optimisation from the junior (SPEED Eq. 2).

    L = -log sigmoid( beta * [ (log pi(w|x) - log ref(w|x)) - (log pi(l|x) - log ref(l|x)) ] )

The policy starts as the junior and the frozen reference is the junior: its adapter is merged into the base, a new LoRA
adapter is trained on top, and the reference is that model with the new adapter off. Three things are done once where
DPO is usually done several times over: a prompt is read once for all its completions (`packing`), the reference is
computed before training and kept by digest, and only completion tokens meet the language-model head (`lm_head`). Loss,
rewards, gradients and trajectory equal TRL's `DPOTrainer` (tests/preference/test_dpo.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speed_core import console, machine
from speed_core.files import UserError, digest
from speed_core.models import compute_type, loading, token_logprobs, training
from speed_core.preference import prompt_sharing
from speed_core.preference.prompt_sharing import Group

if TYPE_CHECKING:  # a GPU can be checked without pydantic
    from speed_core.profile import Senior

RULES = ("same", "empty", "truncated", "too_long", "joins")
LAYOUT = 2  # of packed rows: part of the reference's digest


def check_pairs(
    tokenizer: Any, pairs: Sequence[dict[str, Any]], max_length: int, *, share: bool = True, most: int | None = None
) -> tuple[list[Group], dict[str, list[int]]]:
    """Groups of pairs {prompt, chosen, rejected[, weight, truncated, rejected_status]}, and the rows that each rule set aside.

    Pairs of one prompt become one group, each text once. Rules: chosen equals rejected; an empty side; cut at the token limit
    when it was generated (it would be taught an <eos> that nobody wrote); prompt and one completion longer than `max_length`
    tokens; a prompt that is tokenised differently alone (as at generation time) and joined to its completion, so that the loss
    would not start where the text does. Rows behind the `most`-th usable pair are not looked at. UserError for a row of another
    form.
    """
    aside: dict[str, list[int]] = {rule: [] for rule in RULES}
    found: dict[str, tuple[Group, dict[str, int]]] = {}
    usable = 0
    for number, pair in enumerate(pairs):
        if usable == most:
            break
        _check_row(number, pair)
        chosen, rejected = pair["chosen"], pair["rejected"]
        text = training.prompt_text(pair["prompt"])
        prompt = loading.encode_prompt(tokenizer, text)
        sides = [tokenizer(c, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for c in (chosen, rejected)]
        if not chosen.strip() or not rejected.strip():
            aside["empty"].append(number)
        elif chosen.strip() == rejected.strip():
            aside["same"].append(number)
        elif pair.get("truncated") or pair.get("rejected_status") == "truncated":
            aside["truncated"].append(number)
        elif len(prompt) + max(map(len, sides)) > max_length:
            aside["too_long"].append(number)
        elif any(loading.encode_prompt(tokenizer, text + c)[: len(prompt)] != prompt for c in (chosen, rejected)):
            aside["joins"].append(number)
        else:
            key = pair["prompt"] if share else str(number)
            group, known = found.setdefault(key, (Group(prompt, [], []), {}))
            for completion, ids in zip((chosen, rejected), sides, strict=True):
                if completion not in known:
                    known[completion] = len(group.completions)
                    group.completions.append(ids)
            group.pairs.append((known[chosen], known[rejected], float(pair.get("weight", 1.0))))
            group.rows.append(number)
            usable += 1
    return [group for group, _ in found.values()], aside


def _check_row(number: int, pair: dict[str, Any]) -> None:
    for key in ("prompt", "chosen", "rejected"):
        if not isinstance(pair.get(key), str):
            raise UserError(f"senior: pair {number}: {key} is {pair.get(key, 'missing')!r}, not a text; mend or remove the row")
    training.refuse_surrogates(number, **{key: pair[key] for key in ("prompt", "chosen", "rejected")})
    weight = pair.get("weight", 1.0)
    if type(weight) not in (int, float) or not math.isfinite(weight) or weight <= 0:
        raise UserError(f"senior: pair {number}: weight is {weight!r}, not a positive number; mend or remove the row")


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
    model: Any, groups: Sequence[Group], pad: int, batch_size: int, *, share: bool = True, row_tokens: int | None = None
) -> None:
    """Fill `reference` of every group, computed with the adapter switched off; UserError names the row of a value that is none."""
    import torch

    bar, device = console.progress(len(groups), "reference", "prompt"), next(model.parameters()).device
    with torch.no_grad(), model.disable_adapter():
        for start in range(0, len(groups), batch_size):
            part = groups[start : start + batch_size]
            batch = to_device(prompt_sharing.collate(part, pad, row_tokens, share=share), device)
            found = prompt_sharing.completion_log_probs(model, batch).tolist()
            for group in part:
                group.reference, found = found[: len(group.completions)], found[len(group.completions) :]
                if not all(map(math.isfinite, group.reference)):
                    raise UserError(
                        f"senior: the junior gives pair {group.rows[0] if group.rows else '?'} the log-probabilities "
                        f"{group.reference}; its weights are damaged or senior.dtype is too narrow for them"
                    )
            bar.update(len(part))
    bar.close()


def cached_reference(
    model: Any,
    groups: Sequence[Group],
    pad: int,
    batch_size: int,
    weights: str,
    folder: Path | None,
    *,
    share: bool = True,
    row_tokens: int | None = None,
) -> str:
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
        for g in groups:
            g.reference, values = values[: len(g.completions)], values[len(g.completions) :]
        return key
    rank, world = _place()
    reference_log_probs(model, groups[rank::world], pad, batch_size, share=share, row_tokens=row_tokens)
    if world > 1:
        _exchange(groups, rank, world)
    if path is not None and folder is not None and rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        work = path.with_suffix(f".{os.getpid()}.npy")
        np.save(work, np.array([v for g in groups for v in g.reference]))
        work.replace(path)
    return key


def _place() -> tuple[int, int]:
    """(rank, number) of this process among those that train together."""
    import torch.distributed as group

    return (group.get_rank(), group.get_world_size()) if group.is_available() and group.is_initialized() else (0, 1)


def _exchange(groups: Sequence[Group], rank: int, world: int) -> None:
    """Give every process the `reference` that each has computed of groups[rank::world]."""
    import torch.distributed as dist

    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, [g.reference for g in groups[rank::world]])
    for k, part in enumerate(parts):
        for g, values in zip(groups[k::world], part, strict=True):
            g.reference = values


def trainer_class() -> Any:
    """A Hugging Face `Trainer` for rows of `Group`s with their reference, as `check_pairs` and `cached_reference` give them.

    `trainer_class()(model=, args=, train_dataset=, eval_dataset=, beta=, kind="sigmoid", smoothing=0.0, data_collator=lambda part:
    packing.collate(part, pad), callbacks=, ...)`: what `train` below uses, for a loop of one's own. It logs the weighted means of
    loss, rewards, margin, accuracy and log-probability over the global batch; `evaluate` gives `eval_loss`.
    """
    import torch
    from accelerate.data_loader import SeedableRandomSampler
    from transformers import Trainer

    class WithFillers(torch.utils.data.Sampler[int]):
        """The order in which one process would read `real` rows, then the fillers behind them."""

        def __init__(self, real: int, total: int, seed: int, state: Any):
            self.order, self.total, self.state = SeedableRandomSampler(range(real), data_seed=seed), total, state

        def __iter__(self) -> Any:
            # No `set_epoch` reaches a sampler within a sampler, so one that resumed would read the first epoch's order again.
            self.order.set_epoch(int(self.state().epoch or 0))
            yield from self.order
            yield from range(len(self.order), self.total)

        def __len__(self) -> int:
            return self.total

    class DpoTrainer(Trainer):
        """Batches are `prompt_sharing.collate`d groups; the loss is the weighted mean over the pairs of the global batch."""

        loss_is_scaled_for_ga = True  # by the pairs of all micro-batches, so that 1 x 8 = 2 x 4 = 8 x 1

        def __init__(
            self,
            *,
            args: Any,
            train_dataset: Sequence[Group],
            beta: float,
            kind: str = "sigmoid",
            smoothing: float = 0.0,
            **more: Any,
        ):
            self.beta, self.kind, self.smoothing, self.real = beta, kind, smoothing, len(train_dataset)
            # Several processes need equally many rows. accelerate would read the first rows twice; fillers weigh nothing.
            self.fillers = -self.real % (args.per_device_train_batch_size * args.world_size) if args.world_size > 1 else 0
            first = train_dataset[0]
            filler = replace(first, pairs=[(best, worst, 0.0) for best, worst, _ in first.pairs])
            super().__init__(args=args, train_dataset=[*train_dataset, *[filler] * self.fillers], **more)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if not self.fillers:
                return super()._get_train_sampler(train_dataset)
            return WithFillers(self.real, self.real + self.fillers, self.args.data_seed or 0, lambda: self.state)

        def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
            self.step_rows = [row for batch in batch_samples for row in batch["rows"].tolist()]  # of this process
            total = sum(batch["weights"].sum() for batch in batch_samples).to(device)
            return self.accelerator.gather(total).sum() if self.args.world_size > 1 else total

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            policy = prompt_sharing.completion_log_probs(model, inputs)
            each, rewards = pair_losses(
                policy,
                inputs["reference"],
                inputs["pairs"],
                inputs["lengths"],
                beta=self.beta,
                kind=self.kind,
                smoothing=self.smoothing,
            )
            if num_items_in_batch is None:
                loss = (each * inputs["weights"]).sum() / inputs["weights"].sum()
            else:  # every process divides by the pairs of all of them, and their gradients are averaged
                loss = (each * inputs["weights"]).sum() / num_items_in_batch * self.args.world_size
            if not bool(torch.isfinite(loss)):
                raise UserError(self._complaint(each, inputs))
            kept = self.__dict__.setdefault("kept", [])
            ahead = (rewards[0] > rewards[1]).float()
            logp = policy.detach()[inputs["pairs"][:, 0]]
            kept.append(torch.stack([rewards[0], rewards[1], ahead, logp, each.detach(), inputs["weights"]]))
            return (loss, {}) if return_outputs else loss

        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            kept = self.__dict__.pop("kept", [])  # what is evaluated is no part of a training step's means
            with torch.no_grad():
                loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.kept = kept
            return loss, None, None

        def _complaint(self, each: Any, inputs: Any) -> str:
            values = zip(inputs["rows"].tolist(), each.tolist(), strict=True)
            bad = ", ".join(f"pair {row}" for row, value in values if not math.isfinite(value))
            saved = training.last_checkpoint(Path(str(self.args.output_dir)))
            kept = f"last good checkpoint: {saved.name}" if saved else "there is no checkpoint yet (senior.save_steps)"
            return (
                f"senior: the loss is not a number at step {self.state.global_step + 1} of {bad or 'all pairs'}; "
                f"lower senior.lr or look at the data; {kept}"
            )

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            kept = self.__dict__.pop("kept", [])
            if kept and "loss" in logs:
                rows = torch.cat(kept, 1)  # this process's pairs, weighted as in the loss
                sums = self.accelerator.reduce(torch.cat([(rows[:5] * rows[5]).sum(1), rows[5:].sum(1)]), "sum").tolist()
                means = [value / sums[5] for value in sums[:5]]
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

    console.quiet()
    machine.make_room()
    if settings.lora is None:
        raise UserError("senior.lora: missing; give rank and alpha")
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "senior: several GPUs are visible; set CUDA_VISIBLE_DEVICES to one of them, or call dpo.train from a script of your "
            "own under torchrun"
        )
    more: dict[str, Any] = {"remove_unused_columns": False, "gradient_checkpointing": settings.gradient_checkpointing}
    more |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if settings.gradient_checkpointing else {}
    more |= {"save_strategy": "steps", "save_steps": settings.save_steps, "save_total_limit": 2} if settings.save_steps else {}
    # First: it refuses what cannot be split, and lets the processes of a torchrun know each other.
    arguments = TrainingArguments(**training.trainer_arguments(settings, seed, output / "trainer", loading.resolve(base), **more))
    start = starting_point(base, junior)
    tokenizer = loading.load_tokenizer(start)
    groups, aside = check_pairs(tokenizer, pairs, settings.max_length, share=settings.share, most=settings.examples)
    counts = {rule: len(rows) for rule, rows in aside.items()}
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
    dtype = compute_type.torch_type(kind.weights)
    attention = "flex_attention" if torch.cuda.is_available() else "sdpa"  # the former has not run on a GPU yet
    model: Any = AutoModelForCausalLM.from_pretrained(start, dtype=dtype, attn_implementation=attention)
    model = get_peft_model(model.to(machine.device()), training.lora_config(settings.lora))
    token_logprobs.hidden_states_only(model)
    model.eval()
    pad = tokenizer.pad_token_id
    if settings.share:
        prompt_sharing.verify(model, groups[0], pad)
    config = digest(json.loads((Path(start) / "config.json").read_text(encoding="utf-8")))
    read = f"{loading.weights_id(start)} {kind.name} {attention} {config}"
    rows: dict[str, Any] = {"share": settings.share, "row_tokens": settings.row_tokens}
    reference = cached_reference(model, groups, pad, settings.micro_batch, read, cache, **rows)
    checkpoint = None
    if cache is not None and settings.save_steps > 0:
        decides = {
            "reference": reference,
            "pairs": [g.pairs for g in groups],
            "seed": seed,
            "settings": settings.model_dump(mode="json"),
        }
        where = cache / f"dpo-{digest(decides)[:24]}"
        arguments.output_dir, checkpoint = str(where), training.last_checkpoint(where)
    trainer: Any = trainer_class()(
        model=model,
        args=arguments,
        train_dataset=groups,
        beta=settings.beta,
        kind=settings.loss,
        smoothing=settings.label_smoothing,
        data_collator=lambda part: prompt_sharing.collate(part, pad, settings.row_tokens, share=settings.share),
        callbacks=[training.bar_callback("dpo", lambda: trainer.step_rows)],
    )
    training.remove_printer(trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history = training.check_history(trainer.state.log_history, "senior")
    facts = {"history": history, "rows": sum(len(g.pairs) for g in groups), "prompts": len(groups), "set_aside": counts}
    facts["set_aside_rows"] = {rule: rows for rule, rows in aside.items() if rows}
    if trainer.is_world_process_zero():
        training.save_adapter(trainer.model, output, start)
        (output / "training.json").write_text(json.dumps(facts, indent=1))
    trainer.accelerator.wait_for_everyone()
    return facts


def starting_point(base: str, junior: Path) -> str:
    """Folder of the junior's merged weights: the policy's start and the frozen reference."""
    return str(loading.merged_folder(base, junior))
