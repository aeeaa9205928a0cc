"""Rows that hold several completions of one prompt: `[prompt | completion 1 | completion 2 | ...]`.

The positions of every completion start again behind the prompt, and the attention mask hides completions from each
other, so that each of them is read as if it stood alone behind its prompt: the same log-probabilities, with the prompt
computed once. Several prompts share a row where that fills it. The token that scores the first word of *every*
completion is the last one of the prompt, so each label has an explicit `logit_index` in place of a shift by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from speed_core.files import UserError
from speed_core.models import token_logprobs


@dataclass
class PromptGroup:
    """A prompt, its completions (token ids, <eos> included) and the pairs among them: (chosen, rejected, weight).

    `rows`: for messages, the number in the data of each pair.
    """

    prompt: list[int]
    completions: list[list[int]]
    pairs: list[tuple[int, int, float]]
    rows: list[int] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)  # log-probability of each completion under the reference

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `sizes` in rows of at most `capacity` tokens, first fit, longest first."""
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        at = next((r for r, free in enumerate(left) if free >= sizes[i]), None)
        if at is None:
            rows.append([])
            left.append(max(capacity, sizes[i]))
            at = len(rows) - 1
        rows[at].append(i)
        left[at] -= sizes[i]
    return rows


def collate(groups: Sequence[PromptGroup], pad: int, capacity: int | None = None, *, share: bool = True) -> dict[str, Tensor]:
    """Groups as tensors of R rows and T columns.

    Of tokens (R, T): input_ids, position_ids, group (-1 for padding), segment_ids (0 prompt, k completion k).
    Of scored tokens (S,): labels, logit_index (flat index of the hidden state that predicts the label), completion_index.
    Of completions (K,): lengths, and reference where it is known. Of pairs: pairs (P, 2) indices of completions, weights
    (P,), rows (P,) as `PromptGroup.rows`.
    `capacity` tokens a row, by default the longest group: on a CPU a longer row costs more attention than it saves in
    padding. `share=False` gives every completion a copy of its prompt in a row of its own (to compare against).
    """
    spans: list[tuple[list[int], list[list[int]], list[int]]] = []  # prompt, completions, their indices
    lengths: list[int] = []
    pairs: list[tuple[int, int]] = []
    for g in groups:
        index = list(range(len(lengths), len(lengths) + len(g.completions)))
        lengths += map(len, g.completions)
        pairs += [(index[best], index[worst]) for best, worst, _ in g.pairs]
        if share:
            spans.append((g.prompt, g.completions, index))
        else:
            spans += [(g.prompt, [c], [k]) for c, k in zip(g.completions, index, strict=True)]
    sizes = [len(p) + sum(map(len, c)) for p, c, _ in spans]
    rows = pack(sizes, capacity or max(sizes)) if share else [[i] for i in range(len(spans))]
    width = max(sum(sizes[i] for i in row) for row in rows)
    fill = {"input_ids": pad, "position_ids": 0, "group": -1, "segment_ids": 0}
    batch = {name: torch.full((len(rows), width), value) for name, value in fill.items()}
    labels: list[int] = []
    logit_index: list[int] = []
    completion_index: list[int] = []
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            prompt, completions, index = spans[i]
            last = r * width + at + len(prompt) - 1  # the prompt's last token predicts the first of every completion
            for segment, tokens in enumerate([prompt, *completions]):
                cells, first = slice(at, at + len(tokens)), len(prompt) if segment else 0
                batch["input_ids"][r, cells] = torch.tensor(tokens)
                batch["position_ids"][r, cells] = torch.arange(first, first + len(tokens))
                batch["group"][r, cells], batch["segment_ids"][r, cells] = i, segment
                if segment:
                    labels += tokens
                    logit_index += [last, *range(r * width + at, r * width + at + len(tokens) - 1)]
                    completion_index += [index[segment - 1]] * len(tokens)
                at += len(tokens)
    reference = [value for g in groups for value in g.reference]
    batch |= {"labels": torch.tensor(labels), "logit_index": torch.tensor(logit_index)}
    batch |= {"completion_index": torch.tensor(completion_index), "lengths": torch.tensor(lengths)}
    batch["pairs"] = torch.tensor(pairs).view(-1, 2)
    batch["weights"] = torch.tensor([weight for g in groups for _, _, weight in g.pairs], dtype=torch.float32)
    batch["rows"] = torch.tensor([number for g in groups for number in g.rows or [-1] * len(g.pairs)])
    if len(reference) == len(lengths):
        batch["reference"] = torch.tensor(reference, dtype=torch.float32)
    return batch


def dense_mask(group: Tensor, segment_ids: Tensor, position: Tensor, window: int | None = None) -> Tensor:
    """(R, 1, T, T), True where row i may look at column j: same group, not later, and j of the prompt or of i's completion."""
    allowed = torch.ones(group.shape[1], group.shape[1], dtype=torch.bool, device=group.device).tril()
    allowed = allowed & (group[:, :, None] == group[:, None, :])
    allowed &= (segment_ids[:, None, :] == 0) | (segment_ids[:, None, :] == segment_ids[:, :, None])
    if window:
        allowed &= position[:, :, None] - position[:, None, :] < window
    return allowed[:, None]


def block_mask(group: Tensor, segment_ids: Tensor, position: Tensor, window: int | None = None) -> BlockMask:
    """The same rule as a FlexAttention block mask: nothing of size T x T stays. Not yet run on a GPU; forward only on a CPU."""
    # Uncompiled, the builder itself holds a T x T mask for a moment.
    build: Any = torch.compile(create_block_mask) if group.is_cuda else create_block_mask

    def rule(r: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (segment_ids[r, j] == 0) | (segment_ids[r, j] == segment_ids[r, i])
        allowed = (i >= j) & (group[r, i] == group[r, j]) & seen
        return allowed & (position[r, i] - position[r, j] < window) if window else allowed

    rows, width = group.shape
    return build(rule, rows, None, width, width, device=str(group.device))


def attention_mask(config: Any, batch: dict[str, Tensor]) -> Any:
    """What the model's `attention_mask` argument takes: one mask, or one for each sort of layer it has."""
    build = block_mask if config._attn_implementation == "flex_attention" else dense_mask
    place = (batch["group"], batch["segment_ids"], batch["position_ids"])
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds is None:
        return build(*place, window)
    if odd := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{config.model_type}: layers of {min(odd)} have no mask for packed rows; use full or sliding-window attention"
        )
    return {kind: build(*place, window if kind == "sliding_attention" else None) for kind in dict.fromkeys(kinds)}


def completion_log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(K,) float32: summed log-probability of each completion. `model` returns hidden states (`token_logprobs.hidden_states_only`)."""
    inner = token_logprobs.causal_model(model)
    config = inner.config.get_text_config()
    out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=attention_mask(config, batch))
    hidden = out.last_hidden_state.flatten(0, 1)[batch["logit_index"]]
    cap = getattr(config, "final_logit_softcapping", None)
    found = token_logprobs.log_probs(hidden, inner.get_output_embeddings(), batch["labels"], cap)
    return torch.zeros(len(batch["lengths"]), device=found.device).index_add(0, batch["completion_index"], found)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def verify(model: Any, group: PromptGroup, pad: int) -> None:
    """Refuse an architecture that does not honour the mask: shared and separate rows must agree on one group."""
    first = next(model.parameters())
    batches = (to_device(collate([group], pad, share=share), first.device) for share in (True, False))
    shared, alone = (completion_log_probs(model, batch) for batch in batches)
    if first.dtype == torch.float32:
        slack = 1e-5 * alone.abs() + 1e-4
    else:  # bfloat16 keeps 8 bits, so this only catches gross errors there; tests compare families in float32
        slack = 0.02 * alone.abs() + 0.05 * torch.tensor([len(c) for c in group.completions], device=first.device)
    if bool(((shared - alone).abs() > slack).any()):
        raise UserError(
            f"senior: {type(token_logprobs.causal_model(model)).__name__} gives other log-probabilities in a shared row "
            f"({shared.tolist()}) than alone ({alone.tolist()}); it ignores the mask or the positions, set senior.share=false"
        )
