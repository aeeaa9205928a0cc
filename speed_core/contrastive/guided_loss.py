"""GISTEmbed's guided contrastive loss (arXiv 2402.16829), exact and linear in memory.

For row i, with student cosines s, guide cosines g, own pair (q_i, p_i) and temperature tau:

    loss_i = -s(q_i,p_i)/tau + log sum_c exp(s_c/tau)

The sum runs over four blocks of candidates: q_i-p_j ("ap"), q_i-n_j ("an"), q_i-q_j ("aa") and p_i-p_j ("pp"). A candidate
is removed when the guide finds it more alike than the own pair: g_c > t_i, where t_i = g(q_i,p_i) - margin
("absolute") or t_i = g(q_i,p_i) - |g(q_i,p_i)| * margin ("relative"). Equality is not removed. The own
positive is always kept, the two diagonals q_i-q_i and p_i-p_i never count.

Rows are handled in blocks; the B x B matrix is never held. The gradient of a log-sum-exp is a
softmax, so it is accumulated in the pass that computes the value: no similarity is computed twice (the GPU
kernels trade that for memory traffic and compute each tile again).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from speed_core.contrastive.loss_inputs import (
    TIE,
    Columns,
    ContrastiveBatch,
    Given,
    LossInputError,
    LossSettings,
    flatten_negatives,
    make_batch,
    normalize_columns,
    parts,
)  # fmt: skip

DEFAULTS = LossSettings()
_BLOCK_ELEMENTS = 1 << 22  # entries of one block of similarities: 16 MB in float32


def guided_contrastive_loss(
    student: Given, guide: Given, settings: LossSettings = DEFAULTS, *,
    text_ids: Given | None = None, rows: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """The mean of loss_i, from the embeddings of student and guide: (anchors, positives) or (anchors, positives, negatives).

    Args:
        student: anchors (B, D), positives (B, D), negatives (B, D), (B, K, D) or a list of (B, D). Every negative of
            every row is a candidate of every anchor.
        guide: the same texts encoded by the guide, of any dimension. Without a guide: `unguided_contrastive_loss`.
        text_ids: integer ids of the same texts, in the shapes of `student` without D. A candidate with the id of the
            anchor or of its positive never acts as a negative.
        rows: (start, stop) of the anchors whose losses count; the other anchors are candidates only.
    Returns a float32 scalar (float64 for float64 anchors or positives), also under autocast. First
    derivatives only. The length of a row does not matter, only that it is finite; a zero row has cosine 0 with
    everything and a gradient of 0. The gradient of a row of length r is of the order 1/(r tau) and comes in the
    row's own type: in float16 it is inf, never a smaller number, where it exceeds 65504 (rows of length 1e-3).
    `torch.amp.GradScaler` skips such a step; float32 embeddings avoid it.
    Raises LossInputError (a UserError and a ValueError) naming the argument, the shapes and the remedy.
    """
    for name, column in zip(Columns._fields[:2], guide or [None], strict=False):
        if column is None:
            raise LossInputError(f"guide_{name}: None; encode the texts with the guide, or call unguided_contrastive_loss")
    return loss_sum(student, guide, settings, text_ids, rows) / _count(student, rows)


def unguided_contrastive_loss(
    student: Given, settings: LossSettings = DEFAULTS, *, text_ids: Given | None = None, rows: tuple[int, int] | None = None
) -> Tensor:
    """InfoNCE over the same blocks: only own diagonals and equal texts go (the original's loss id 10)."""
    if (settings.margin, settings.margin_strategy) != (DEFAULTS.margin, DEFAULTS.margin_strategy):
        raise LossInputError("margin, margin_strategy: mean nothing without a guide; call guided_contrastive_loss")
    return loss_sum(student, None, settings, text_ids, rows) / _count(student, rows)


def _count(student: Given, rows: tuple[int, int] | None) -> int:
    start, stop = rows or (0, len(parts(student)[0]))
    return stop - start


def loss_sum(
    student: Given, guide: Given | None, settings: LossSettings, text_ids: Given | None, rows: tuple[int, int] | None
) -> Tensor:
    """Sum of loss_i over `rows`; without a guide only the diagonals and equal texts are removed."""
    anchors, _, _ = parts(student)
    # Mixed precision would round similarities to bfloat16 before they meet the threshold.
    with torch.autocast(anchors.device.type, enabled=False):
        columns, of_guide = normalize_columns(student), None
        start, stop = rows or (0, len(anchors))
        if not 0 <= start < stop <= len(anchors):
            raise LossInputError(f"rows {rows}: no part of anchors, shape {tuple(anchors.shape)}; give (start, stop)")
        if guide is not None:
            with torch.no_grad():
                of_guide = normalize_columns(guide, "guide_", columns.anchors)
        batch = make_batch(columns, of_guide, text_ids, settings)
        kernel = _kernel_dtype(_operands(student), columns.anchors)
        if kernel is not None:
            if batch.guide is not None and guide is not None:
                batch = replace(batch, guide=Columns(*(t.to(_common_half(_operands(guide))) for t in batch.guide)))
            batch = replace(batch, kernel=kernel)
        return _LossSum.apply(*flatten_negatives(columns), batch, slice(start, stop))


class _LossSum(torch.autograd.Function):
    """Sum of loss_i over `rows`. Value and gradient come from one pass."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, positives: Tensor, negatives: Tensor, batch: ContrastiveBatch, rows: slice) -> Tensor:
        compute = by_matrix_products if batch.kernel is None else by_kernels
        total, gradients = compute(Columns(anchors, positives, negatives), batch, rows, any(ctx.needs_input_grad[:3]))
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True would give a second derivative that is silently wrong
            raise RuntimeError("guided_contrastive_loss: has first derivatives only; use no create_graph")
        return *(g * upstream for g in ctx.saved_tensors), None, None


def _gradients_of(columns: Columns) -> tuple[Columns, dict[str, tuple[Tensor, Tensor]]]:
    """Zeros for the three gradients, and which of them the left rows and the candidates of each block add to."""
    a, p, n = gradients = Columns(*(torch.zeros_like(t) for t in columns))
    return gradients, {"ap": (a, p), "an": (a, n), "aa": (a, a), "pp": (p, p)}


def by_matrix_products(student: Columns, batch: ContrastiveBatch, rows: slice, want: bool) -> tuple[Tensor, Sequence[Tensor]]:
    """Sum of loss_i and, if wanted, the gradients of the three columns, in blocks of rows."""
    a, p, _ = student
    tau, blocks = batch.settings.temperature, batch.blocks(student)
    gradients, sides = _gradients_of(student) if want else ((), {})
    width = sum(len(candidates) for _, candidates in blocks.values())
    step = min(block_rows(a.shape[1] * len(p), width), rows.stop - rows.start)
    buffer, total = a.new_empty((step, width)), a.new_zeros(())
    for start in range(rows.start, rows.stop, step):
        part = slice(start, min(start + step, rows.stop))
        own = torch.arange(part.start, part.stop, device=a.device)
        index, logits, views, at = own - start, buffer[: len(own)], {}, 0
        for name, (left, candidates) in blocks.items():
            view = views[name] = logits[:, at : at + len(candidates)]
            at += len(candidates)
            torch.mm(left[part] / tau, candidates.T, out=view)
            if name == "ap":
                target = view[index, own]
            if (removed := batch.removed(name, part)) is not None:
                view.masked_fill_(removed, float("-inf"))
            if name != "an":  # the own positive is always kept, the own a-a and p-p never
                view[index, own] = target if name == "ap" else torch.full_like(target, float("-inf"))
        top = logits.amax(1)
        weight = logits.sub_(top[:, None]).exp_()  # removed candidates are exactly 0
        mass = weight.sum(1)
        total += (mass.log() + top - target).sum()
        if not want:
            continue
        weight[index, own] -= mass  # block "ap" comes first: the own positive's column
        scale = (1 / (mass * tau))[:, None]  # softmax and 1/tau, applied to the (rows, D) side: it is the small one
        for name, (left, candidates) in blocks.items():
            of_left, of_candidates = sides[name]
            of_left[part] += (views[name] @ candidates).mul_(scale)
            of_candidates.addmm_(views[name].T, left[part] * scale)
    return total, gradients


def block_rows(embeddings: int, width: int) -> int:
    """Rows of `width` similarities at a time: 16 MB, or as much as the embeddings themselves, since thinner blocks starve
    the matrix product."""
    return max(_BLOCK_ELEMENTS // width, embeddings // width, 1)


def by_kernels(student: Columns, batch: ContrastiveBatch, rows: slice, want: bool) -> tuple[Tensor, Sequence[Tensor]]:
    """The same by the Triton kernels."""
    from speed_core.contrastive.triton_kernels import Block, Diagonal

    tau, low = batch.settings.temperature, Columns(*(t.to(batch.kernel) for t in student))
    guides = None if batch.guide is None else batch.blocks(batch.guide)
    blocks = {}
    for name, (left, candidates) in batch.blocks(low).items():
        guide = None if guides is None else (guides[name][0][rows], guides[name][1], batch.threshold[rows])
        ids = None
        if batch.ids is not None:
            ids = batch.ids.anchors[rows], batch.ids.positives[rows], batch.blocks(batch.ids)[name][1]
        diagonal = {"ap": Diagonal.KEEP, "an": Diagonal.NONE}.get(name, Diagonal.DROP)
        slack = TIE * torch.finfo(torch.float32).eps
        blocks[name] = Block(
            left[rows], candidates, guide, ids, temperature=tau, slack=slack, diagonal=diagonal, offset=rows.start
        )
    joint = torch.stack([block.forward() for block in blocks.values()]).logsumexp(0)
    anchors, positives = low.anchors[rows].float(), low.positives[rows].float()
    total = (joint - (anchors * positives).sum(1) / tau).sum()
    if not want:
        return total, ()
    gradients, sides = _gradients_of(student)
    for name, block in blocks.items():
        of_left, of_candidates = block.backward(joint)
        sides[name][0][rows] += of_left
        sides[name][1].add_(of_candidates)
    gradients.anchors[rows] -= positives / tau
    gradients.positives[rows] -= anchors / tau
    return total, gradients


def _common_half(tensors: Sequence[Tensor]) -> torch.dtype:
    """bfloat16 or float16 where all operands came in it, else float32."""
    kinds = {t.dtype for t in tensors}
    return kinds.pop() if kinds in ({torch.bfloat16}, {torch.float16}) else torch.float32


def _kernel_dtype(given: Sequence[Tensor], unit: Tensor) -> torch.dtype | None:
    """bfloat16 and float16 embeddings are normalised in float32 and multiplied as they came; None without Triton."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if unit.dtype == torch.float64 or not (unit.is_cuda or interpreted) or importlib.util.find_spec("triton") is None:
        return None
    return _common_half(given)


def _operands(given: Given) -> list[Tensor]:
    anchors, positives, negatives = parts(given)
    return [anchors, positives, *([negatives] if isinstance(negatives, Tensor) else negatives or [])]


@dataclass
class MaskView:
    """What the guide removed from a batch: per block a boolean and a guide-similarity matrix, and t (B,)."""

    removed: dict[str, Tensor]
    similarity: dict[str, Tensor]
    threshold: Tensor


@torch.no_grad()
def false_negative_mask(guide: Given, settings: LossSettings = DEFAULTS, *, text_ids: Given | None = None) -> MaskView:
    """The mask of a small batch, for looking at and for precision and recall against known labels.

    Blocks "ap", "aa", "pp" (B, B) and, with negatives, "an" (B, M). The diagonals of the first three
    read False: an own positive is never removed, and q_i-q_i and p_i-p_i are no candidates at all.
    """
    with torch.autocast(parts(guide)[0].device.type, enabled=False):
        columns = normalize_columns(guide, "guide_")
        batch, everything = make_batch(columns, columns, text_ids, settings), slice(0, len(columns.anchors))
        blocks = batch.blocks(flatten_negatives(columns))
        removed = {name: batch.removed(name, everything) for name in blocks}
        masks = {name: mask for name, mask in removed.items() if mask is not None}
        for name in masks.keys() - {"an"}:
            masks[name].fill_diagonal_(False)
        return MaskView(masks, {name: left @ right.T for name, (left, right) in blocks.items()}, batch.threshold)
