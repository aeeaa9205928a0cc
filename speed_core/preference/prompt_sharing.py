"""Rows that hold several completions of one prompt: `[prompt | completion 1 | completion 2 | ...]`.

The positions of every completion start again behind the prompt, and the attention mask hides completions from each
other, so that each of them is read as if it stood alone behind its prompt: the same log-probabilities, with the prompt
computed once. Several prompts share a row where that fills it. The token that scores the first word of *every*
completion is the last one of the prompt, so targets carry an explicit source index in place of a shift by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from speed_core.files import UserError
from speed_core.models import token_logprobs


@dataclass
class Group:
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


def collate(groups: Sequence[Group], pad: int, capacity: int | None = None, *, share: bool = True) -> dict[str, Any]:
    """Groups as tensors of R rows and T columns.

    input_ids, position_ids, group (R, T; -1 for padding), part (R, T; 0 prompt, k completion k);
    source (S,) flat index of the hidden state that predicts target (S,), of completion owner (S,);
    pairs (P, 2) indices of completions, weights (P,), rows (P,) as `Group.rows`, lengths (K,), reference (K,) where it is known.
    `capacity` tokens a row, by default the longest group: on a CPU a longer row costs more attention than it saves in
    padding. `share=False` gives every completion a copy of its prompt in a row of its own (to compare against).
    """
    spans: list[tuple[list[int], list[list[int]], list[int]]] = []  # prompt, completions, their indices
    count, pairs, weights, numbers, reference = 0, [], [], [], []
    for g in groups:
        index = list(range(count, count + len(g.completions)))
        pairs += [(index[best], index[worst]) for best, worst, _ in g.pairs]
        weights += [weight for _, _, weight in g.pairs]
        numbers += g.rows or [-1] * len(g.pairs)
        reference += g.reference
        spans += (
            [(g.prompt, g.completions, index)]
            if share
            else [(g.prompt, [c], [k]) for c, k in zip(g.completions, index, strict=True)]
        )
        count += len(g.completions)
    sizes = [len(p) + sum(map(len, c)) for p, c, _ in spans]
    rows = pack(sizes, capacity or max(sizes)) if share else [[i] for i in range(len(spans))]
    width = max(sum(sizes[i] for i in row) for row in rows)
    grid = {
        k: torch.full((len(rows), width), v) for k, v in (("input_ids", pad), ("position_ids", 0), ("group", -1), ("part", 0))
    }
    source, target, owner, lengths = [], [], [], [0] * count
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            prompt, completions, index = spans[i]
            pieces = [prompt, *completions]
            for k, piece in enumerate(pieces):
                cells = slice(at, at + len(piece))
                first = 0 if k == 0 else len(prompt)
                grid["input_ids"][r, cells] = torch.tensor(piece)
                grid["position_ids"][r, cells] = torch.arange(first, first + len(piece))
                grid["group"][r, cells], grid["part"][r, cells] = i, k
                if k == 0:
                    last = r * width + at + len(prompt) - 1
                else:
                    source += [last, *range(r * width + at, r * width + at + len(piece) - 1)]
                    target += piece
                    owner += [index[k - 1]] * len(piece)
                    lengths[index[k - 1]] = len(piece)
                at += len(piece)
    batch: dict[str, Any] = grid | {"source": torch.tensor(source), "target": torch.tensor(target), "owner": torch.tensor(owner)}
    batch |= {"pairs": torch.tensor(pairs).view(-1, 2), "weights": torch.tensor(weights, dtype=torch.float32)}
    batch |= {"lengths": torch.tensor(lengths), "rows": torch.tensor(numbers)}
    if len(reference) == count:
        batch["reference"] = torch.tensor(reference, dtype=torch.float32)
    return batch


def dense_mask(group: Tensor, part: Tensor, position: Tensor, window: int | None = None) -> Tensor:
    """(R, 1, T, T), True where row i may look at column j: same group, not later, and j of the prompt or of i's completion."""
    allowed = torch.ones(group.shape[1], group.shape[1], dtype=torch.bool, device=group.device).tril()
    allowed = allowed & (group[:, :, None] == group[:, None, :])
    allowed &= (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    if window:
        allowed &= position[:, :, None] - position[:, None, :] < window
    return allowed[:, None]


def block_mask(group: Tensor, part: Tensor, position: Tensor, window: int | None = None) -> Any:
    """The same rule as a FlexAttention block mask: nothing of size T x T stays. Not yet run on a GPU; forward only on a CPU."""
    from torch.nn.attention.flex_attention import create_block_mask

    # Uncompiled, the builder itself holds a T x T mask for a moment.
    build: Any = torch.compile(create_block_mask) if group.is_cuda else create_block_mask

    def rule(r: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = (i >= j) & (group[r, i] == group[r, j]) & ((part[r, j] == 0) | (part[r, j] == part[r, i]))
        return allowed & (position[r, i] - position[r, j] < window) if window else allowed

    rows, width = group.shape
    return build(rule, rows, None, width, width, device=str(group.device))


def attention_mask(config: Any, batch: dict[str, Tensor]) -> Any:
    """What the model's `attention_mask` argument takes: one mask, or one for each sort of layer it has."""
    build = block_mask if config._attn_implementation == "flex_attention" else dense_mask
    place = (batch["group"], batch["part"], batch["position_ids"])
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds is None:
        return build(*place, window)
    if odd := set(kinds) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{config.model_type}: layers of {min(odd)} have no mask for packed rows; use full or sliding-window attention"
        )
    return {kind: build(*place, window if kind == "sliding_attention" else None) for kind in dict.fromkeys(kinds)}


def completion_log_probs(model: Any, batch: dict[str, Any]) -> Tensor:
    """(K,) float32: summed log-probability of each completion. `model` returns hidden states (`token_logprobs.hidden_states_only`)."""
    inner = token_logprobs.causal_model(model)
    config = inner.config.get_text_config()
    out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=attention_mask(config, batch))
    hidden = out.last_hidden_state.flatten(0, 1)[batch["source"]]
    cap = getattr(config, "final_logit_softcapping", None)
    found = token_logprobs.log_probs(hidden, inner.get_output_embeddings().weight, batch["target"], cap)
    return torch.zeros(len(batch["lengths"]), device=found.device).index_add(0, batch["owner"], found)


def verify(model: Any, group: Group, pad: int) -> None:
    """Refuse an architecture that does not honour the mask: shared and separate rows must agree on one group."""
    device = next(model.parameters()).device
    with torch.no_grad():
        shared, alone = (
            completion_log_probs(
                model, {k: v.to(device) if torch.is_tensor(v) else v for k, v in collate([group], pad, share=s).items()}
            )
            for s in (True, False)
        )
    exact = next(model.parameters()).dtype == torch.float32
    # bfloat16 keeps 8 bits, so this only catches gross errors there; tests compare families in float32.
    slack = (
        1e-5 * alone.abs() + 1e-4
        if exact
        else 0.02 * alone.abs() + 0.05 * torch.tensor([len(c) for c in group.completions], device=device)
    )
    if bool(((shared - alone).abs() > slack).any()):
        raise UserError(
            f"senior: {type(token_logprobs.causal_model(model)).__name__} gives other log-probabilities in a shared row "
            f"({shared.tolist()}) than alone ({alone.tolist()}); it ignores the mask or the positions, set senior.share=false"
        )
