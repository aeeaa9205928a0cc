"""Log-probabilities of chosen tokens without the (tokens x vocabulary) logits: the head of SFT and DPO here.

A vocabulary of 262,144 words makes the projection cost more than gemma-3-270m's whole backbone. Two things
keep it small: only completion tokens are projected, and the gradient is taken in the same pass.

    log p_t = z_t - logsumexp(z),   z = h W^T,   d log p_t / d h = W_t - sum_j p_j W_j

The right-hand side is one row of size H per token, so it is kept instead of the logits, and the
backward pass is a multiplication. The head's own weights are frozen (LoRA does not touch them).
`benchmarks/results/sft.cpu.json` compares it with TRL's.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from speed_core.files import UserError
from speed_core.models import training
from speed_core.models.packed import PackedWeight

CHUNK = 128  # tokens at a time: 128 x 262,144 float32 logits are 134 MB


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, packed: PackedWeight | None, targets: Tensor, softcap: float | None
    ) -> Tensor:
        want = ctx.needs_input_grad[0]
        out = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want else None
        # Two buffers for the whole call: fresh 100 MB tensors cost more in page faults than in arithmetic.
        at_once = 0 if packed else min(CHUNK, len(targets))
        raw = torch.empty(at_once, weight.shape[0], dtype=weight.dtype, device=hidden.device)
        full = torch.empty(raw.shape, dtype=torch.float32, device=hidden.device) if raw.dtype != torch.float32 else raw
        for start in range(0, len(targets), CHUNK):
            target = targets[start : start + CHUNK]
            rows, index = slice(start, start + len(target)), torch.arange(len(target), device=hidden.device)
            low = packed.outputs(hidden[rows]) if packed else torch.mm(hidden[rows], weight.T, out=raw[: len(target)])
            z = low if full is raw else full[: len(target)].copy_(low)
            if softcap:
                z.div_(softcap).tanh_().mul_(softcap)
            softcap_grad = 1 - (z / softcap) ** 2 if softcap and grad_hidden is not None else None
            chosen, top = z[index, target], z.amax(1)
            total = z.sub_(top[:, None]).exp_().sum(1)
            out[rows] = chosen - top - total.log()
            if grad_hidden is not None:
                z.mul_(-1 / total[:, None])  # minus the softmax
                z[index, target] += 1
                if softcap_grad is not None:
                    z *= softcap_grad
                if full is not raw:
                    low.copy_(z)
                if packed:
                    grad_hidden[rows] = packed.gradient(low)
                else:
                    torch.mm(low, weight, out=grad_hidden[rows])
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * upstream[0][:, None].to(grad_hidden.dtype)), None, None, None, None


def log_probs(hidden: Tensor, head: Any, targets: Tensor, softcap: float | None = None) -> Tensor:
    """float32 (S,) log-probabilities of `targets` (S,) from hidden states (S, H) and the head, a linear layer (V, H)."""
    # accelerate hands the outputs of a bfloat16 model back as float32; autograd casts the gradient back.
    weight = training.whole(head.weight)
    return _TokenLogProbs.apply(hidden.to(weight.dtype), weight, getattr(head, "packed", None), targets, softcap)


def hidden_states_only(model: Any) -> None:
    """Make the causal LM inside `model` return its backbone's output, without logits.

    The call still goes through every wrapper (PEFT, DistributedDataParallel, accelerate), whose work happens in
    `forward`: a loss that reached for the backbone directly would leave gradients of two processes unsynchronised.
    """
    inner = causal_model(model)
    config, head = inner.config.get_text_config(), inner.get_output_embeddings()
    odd = [k for k in ("logit_scale", "logits_scaling", "lm_head_multiplier") if getattr(config, k, 1) not in (None, 1)]
    odd += ["a bias"] if getattr(head, "bias", None) is not None else []
    odd += ["weights that are trained"] if any(p.requires_grad for p in head.parameters()) else []
    if odd:
        raise UserError(f"{type(inner).__name__}: a head with {odd[0]} is not supported here; train it with TRL's own trainers")

    def forward(self: Any, *args: Any, labels: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        return self.base_model(*args, **{k: v for k, v in kwargs.items() if v is not None} | {"use_cache": False})

    inner.forward = types.MethodType(forward, inner)
    inner.hidden_states_only = True


def causal_model(model: Any) -> Any:
    """The causal LM inside wrappers (DistributedDataParallel, PEFT), or the model itself."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def token_log_probs(model: Any, input_ids: Tensor, attention_mask: Tensor, scored: Tensor) -> Tensor:
    """float32 (B, T) log-probabilities of `input_ids` given what precedes them, 0 where `scored` is False.

    `scored` (B, T) marks the completion tokens; position 0 can never be scored.
    """
    inner = causal_model(model)
    read = model if getattr(inner, "hidden_states_only", False) else inner.base_model
    hidden = read(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    mask = scored[:, 1:].bool()
    cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    found = log_probs(hidden[:, :-1][mask], inner.get_output_embeddings(), input_ids[:, 1:][mask], cap)
    full = torch.zeros_like(mask, dtype=torch.float32).masked_scatter(mask, found)
    return torch.nn.functional.pad(full, (1, 0))
