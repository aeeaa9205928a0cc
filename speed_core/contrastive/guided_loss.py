"""GISTEmbed's guided contrastive loss (arXiv 2402.16829), exact and linear in memory.

For row i, with student cosines s, guide cosines g, own pair (q_i, p_i) and temperature tau:

    loss_i = -s(q_i,p_i)/tau + log sum_c exp(s_c/tau)

The sum runs over four blocks of candidates: q_i-p_j, q_i-n_j, q_i-q_j and p_i-p_j. A candidate is
removed when the guide finds it more alike than the own pair: g_c > t_i, where t_i = g(q_i,p_i) - margin
("absolute") or t_i = g(q_i,p_i) - |g(q_i,p_i)| * margin ("relative"). Equality is not removed. The own
positive is always kept, the two diagonals q_i-q_i and p_i-p_i never count.

Rows are handled in blocks; the B x B matrix is never held. The gradient of a log-sum-exp is a
softmax, so it is accumulated in the pass that computes the value: no similarity is computed twice (the GPU
kernels trade that for memory traffic and compute each tile again).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from speed_core.contrastive.guide_cache import GuideCache, GuidedCollator, shortened
from speed_core.contrastive.loss_inputs import TIE, Ids, LossInputError, Negatives, Plan, check_settings, flat, make_plan, side

_BLOCK_ELEMENTS = 1 << 22  # entries of one block of similarities: 16 MB in float32


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


def _operands(columns: tuple[Tensor, Tensor, Negatives]) -> list[Tensor]:
    a, p, n = columns
    return [a, p, *((n,) if isinstance(n, Tensor) else n or ())]


def _fused(a: Tensor, p: Tensor, n: Tensor, plan: Plan, rows: slice, tau: float, want: bool) -> list[Tensor]:
    """[sum of loss_i, and with `want` the three gradients], by the Triton kernel."""
    from speed_core.contrastive.triton_kernels import DROP, KEEP, NO_DIAGONAL, Block

    low = [t.to(plan.kernel) for t in (a, p, n)]
    sides, guides = plan.blocks((low[0], low[1], low[2])), None if plan.guide is None else plan.blocks(plan.guide)
    blocks = {}
    for name, (left, right) in sides.items():
        guide = None if guides is None else (guides[name][0][rows], guides[name][1], plan.threshold[rows])
        ids = None
        if plan.ids is not None:
            own_ids = plan.ids[1][plan.offset :][: len(a)]
            ids = plan.ids[0][rows], own_ids[rows], plan.blocks(plan.ids)[name][1]
        blocks[name] = Block(
            left[rows], right, guide, ids, temperature=tau, slack=TIE * torch.finfo(torch.float32).eps,
            diagonal={"ap": KEEP, "an": NO_DIAGONAL}.get(name, DROP),
            offset=rows.start + (0 if name == "aa" else plan.offset),
        )  # fmt: skip
    joint = torch.stack([block.forward() for block in blocks.values()]).logsumexp(0)
    at = slice(rows.start + plan.offset, rows.stop + plan.offset)
    a_own, p_own = low[0][rows].float(), low[1][at].float()
    total = (joint - (a_own * p_own).sum(1) / tau).sum()
    if not want:
        return [total]
    da, dp, dn = (torch.zeros_like(t) for t in (a, p, n))
    own_dp = dp[plan.offset : plan.offset + len(a)]
    for name, (left_grad, right_grad) in {"ap": (da, dp), "an": (da, dn), "aa": (da, da), "pp": (own_dp, dp)}.items():
        if name in blocks:
            left, right = blocks[name].backward(joint)
            left_grad[rows] += left
            right_grad += right
    da[rows] -= p_own / tau
    dp[at] -= a_own / tau
    return [total, da, dp, dn]


class _Blockwise(torch.autograd.Function):
    """Sum of loss_i over `rows`. Value and gradient come from one pass over blocks of rows."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, p: Tensor, n: Tensor, plan: Plan, rows: slice, tau: float, block_size: int | None) -> Tensor:
        want = any(ctx.needs_input_grad[:3])
        if plan.kernel is not None:
            out = _fused(a, p, n, plan, rows, tau, want)
            ctx.save_for_backward(*out[1:])
            return out[0]
        da, dp, dn = grads = tuple(torch.zeros_like(t) for t in (a, p, n)) if want else (a, p, n)
        own_dp, blocks = dp[plan.offset : plan.offset + len(a)], plan.blocks((a, p, n))
        width = sum(len(right) for _, right in blocks.values())
        # At most 16 MB, or as much as the embeddings themselves: thinner blocks starve the matrix product.
        step = block_size or max(_BLOCK_ELEMENTS // width, a.shape[1] * len(p) // width, 1)
        step = min(step, rows.stop - rows.start)
        buffer, total = a.new_empty((step, width)), a.new_zeros(())
        for start in range(rows.start, rows.stop, step):
            part = slice(start, min(start + step, rows.stop))
            own = torch.arange(part.start, part.stop, device=a.device)
            index, logits, views, at = own - start, buffer[: len(own)], {}, 0
            for name, (left, right) in blocks.items():
                view = views[name] = logits[:, at : at + len(right)]
                at += len(right)
                torch.mm(left[part] / tau, right.T, out=view)
                if name == "ap":
                    target = view[index, own + plan.offset]
                if (gone := plan.removed(name, part)) is not None:
                    view.masked_fill_(gone, float("-inf"))
                if name != "an":  # the own positive is always kept, the own a-a and p-p never
                    value = target if name == "ap" else torch.full_like(target, float("-inf"))
                    view[index, own + (0 if name == "aa" else plan.offset)] = value
            top = logits.amax(1)
            weight = logits.sub_(top[:, None]).exp_()  # removed candidates are exactly 0
            mass = weight.sum(1)
            total += (mass.log() + top - target).sum()
            if not want:
                continue
            weight[index, own + plan.offset] -= mass
            scale = (1 / (mass * tau))[:, None]  # softmax and 1/tau, applied to the (rows, D) side: it is the small one
            for name, (left, right) in blocks.items():
                left_grad, right_grad = {"ap": (da, dp), "an": (da, dn), "aa": (da, da), "pp": (own_dp, dp)}[name]
                left_grad[part] += (views[name] @ right).mul_(scale)
                right_grad.addmm_(views[name].T, left[part] * scale)
        if want:
            ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True would give a second derivative that is silently wrong
            raise RuntimeError("guided_contrastive_loss: has first derivatives only; use no create_graph")
        return *(g * upstream for g in ctx.saved_tensors), None, None, None, None


def _contrastive_loss(
    student_given: tuple[Tensor, Tensor, Negatives], guide_given: tuple[Tensor, Tensor, Negatives] | None, *,
    temperature: float = 0.01, margin: float = 0.0, margin_strategy: str = "absolute",
    contrast_anchors: bool = True, contrast_positives: bool = True,
    text_ids: Ids | None = None, anchor_offset: int = 0, rows: tuple[int, int] | None = None,
    block_size: int | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Both losses: without a guide only diagonals and equal texts go."""
    check_settings(temperature, margin, margin_strategy)
    if reduction not in ("mean", "sum") or (block_size is not None and block_size < 1):
        raise LossInputError(f"reduction {reduction!r}, block_size {block_size}: use mean or sum, and None or at least 1")
    anchors = student_given[0]
    # Mixed precision would round similarities to bfloat16 before they meet the threshold.
    with torch.autocast(anchors.device.type, enabled=False):
        student, guide = side(student_given, anchor_offset, ""), None
        start, stop = rows or (0, len(anchors))
        if not 0 <= start < stop <= len(anchors):
            raise LossInputError(f"rows {rows}: no part of anchors, shape {tuple(anchors.shape)}; give (start, stop)")
        if guide_given is not None:
            with torch.no_grad():
                guide = side(guide_given, anchor_offset, "guide_", student[0])
        contrast = (contrast_anchors, contrast_positives)
        plan = make_plan(student, guide, margin, margin_strategy, contrast, text_ids, anchor_offset)
        plan.kernel = _kernel_dtype(_operands(student_given), student[0])
        if plan.kernel is not None and plan.guide is not None and guide_given is not None:
            kept, (ga, gp, gn) = _common_half(_operands(guide_given)), plan.guide
            plan.guide = ga.to(kept), gp.to(kept), gn.to(kept)
        total = _Blockwise.apply(*flat(student), plan, slice(start, stop), temperature, block_size)
    return total / (stop - start) if reduction == "mean" else total


def guided_contrastive_loss(
    anchors: Tensor, positives: Tensor, negatives: Negatives = None, *,
    guide_anchors: Tensor, guide_positives: Tensor, guide_negatives: Negatives = None,
    temperature: float = 0.01, margin: float = 0.0, margin_strategy: str = "absolute",
    contrast_anchors: bool = True, contrast_positives: bool = True,
    text_ids: Ids | None = None, anchor_offset: int = 0, rows: tuple[int, int] | None = None,
    block_size: int | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The loss of the module's docstring, on embeddings.

    Args:
        anchors: (B, D). positives: (C, D), C >= B; the positive of anchor i is row `anchor_offset + i`
            (more candidates than anchors when they are gathered from other processes).
        negatives: (B, D), (B, K, D), a list of (B, D), or None; C rows where candidates are gathered. Every
            negative of every row is a candidate of every anchor.
        guide_*: the same texts encoded by the guide, of any dimension. Without a guide: `unguided_contrastive_loss`.
        temperature: tau. margin, margin_strategy: see the module's docstring.
        text_ids: integer ids of the texts of anchors (B), positives (C) and, if there are any, negatives (their
            shape without D). A candidate with the id of the anchor or of its positive never acts as a negative.
        rows: (start, stop) of the anchors whose losses count; the other anchors are candidates only.
        block_size: rows at a time; by default a block takes 16 MB, or as much as the embeddings.
        reduction: "mean" or "sum" over the anchors that count.
    Returns a float32 scalar (float64 for float64 anchors or positives), also under autocast. First
    derivatives only. The length of a row does not matter, only that it is finite; a zero row has cosine 0 with
    everything and a gradient of 0. The gradient of a row of length r is of the order 1/(r tau) and comes in the
    row's own type: in float16 it is inf, never a smaller number, where it exceeds 65504 (rows of length 1e-3).
    `torch.amp.GradScaler` skips such a step; float32 embeddings avoid it.
    Raises LossInputError (a UserError and a ValueError) naming the argument, the shapes and the remedy.
    """
    if guide_anchors is None or guide_positives is None:
        missing = "guide_anchors" if guide_anchors is None else "guide_positives"
        raise LossInputError(f"{missing}: None; encode the texts with the guide, or call unguided_contrastive_loss")
    return _contrastive_loss(
        (anchors, positives, negatives), (guide_anchors, guide_positives, guide_negatives), temperature=temperature,
        margin=margin, margin_strategy=margin_strategy, contrast_anchors=contrast_anchors,
        contrast_positives=contrast_positives, text_ids=text_ids, anchor_offset=anchor_offset, rows=rows,
        block_size=block_size, reduction=reduction,
    )  # fmt: skip


def unguided_contrastive_loss(
    anchors: Tensor, positives: Tensor, negatives: Negatives = None, **settings: Any
) -> Tensor:  # fmt: skip
    """InfoNCE over the same blocks: only own diagonals go (the original's loss id 10). `settings`: as for guided."""
    if wrong := sorted(k for k in settings if k.startswith(("guide_", "margin"))):
        raise LossInputError(f"{', '.join(wrong)}: mean nothing without a guide; call guided_contrastive_loss")
    return _contrastive_loss((anchors, positives, negatives), None, **settings)


@dataclass
class MaskView:
    """What the guide removed from a batch: per block a boolean and a guide-similarity matrix, and t (B,)."""

    removed: dict[str, Tensor]
    similarity: dict[str, Tensor]
    threshold: Tensor


@torch.no_grad()
def false_negative_mask(
    guide_anchors: Tensor, guide_positives: Tensor, guide_negatives: Negatives = None, *,
    margin: float = 0.0, margin_strategy: str = "absolute", text_ids: Ids | None = None,
) -> MaskView:  # fmt: skip
    """The mask of a small batch, for looking at and for precision and recall against known labels.

    Blocks "ap" (B, C), "aa" (B, B), "pp" (B, C) and, with negatives, "an" (B, M). The diagonals of the first three
    read False: an own positive is never removed, and q_i-q_i and p_i-p_i are no candidates at all.
    """
    check_settings(1.0, margin, margin_strategy)
    with torch.autocast(guide_anchors.device.type, enabled=False):
        guide = side((guide_anchors, guide_positives, guide_negatives), 0, "guide_")
        plan = make_plan(guide, guide, margin, margin_strategy, (True, True), text_ids, 0)
        blocks, everything = plan.blocks(flat(guide)), slice(0, len(guide_anchors))
        removed: Any = {name: plan.removed(name, everything) for name in blocks}
        for name in removed.keys() - {"an"}:
            removed[name].fill_diagonal_(False)
        return MaskView(removed, {name: left @ right.T for name, (left, right) in blocks.items()}, plan.threshold)


class _Gather(torch.autograd.Function):
    """Rows of all processes in rank order; a row's gradient is the sum over the processes that used it."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, counts: list[int]) -> Tensor:
        ctx.own = slice(start := sum(counts[: dist.get_rank()]), start + len(t))
        padded = t.new_zeros((max(counts), *t.shape[1:]))  # processes must send equal shapes
        padded[: len(t)] = t
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        summed = upstream.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed[ctx.own], None


class GuidedContrastiveLoss(torch.nn.Module):
    """The loss for `SentenceTransformerTrainer` (6.2), with any number of negative columns.

        loss = GuidedContrastiveLoss(model, guide, guide_text=strip_instruction)
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
        loss.attach(trainer).train()

    Columns: anchor, positive, negatives. `attach` makes batches carry the bare texts, which the trainer drops.
    The guide is frozen and held by the cache, not as a module: it is in nobody's parameters, optimizer or
    state dict, and `train()` does not reach it. No guide and no cache: the unguided loss. `guided=True`
    without either expects a `GuidedCollator` that holds the cache.

    Arguments have the names and the order of sentence-transformers' `GISTEmbedLoss`; those after `*` are ours.
    `gather_across_devices`: candidates of all processes, anchors among them (the library leaves those out), so that
    N processes have the loss of one with the whole batch; their shares may differ in size.
    """

    def __init__(
        self, model: Any, guide: Any = None, temperature: float = 0.01, margin_strategy: str = "absolute",
        margin: float = 0.0, contrast_anchors: bool = True, contrast_positives: bool = True,
        gather_across_devices: bool = False, *, guide_cache: GuideCache | Path | str | None = None,
        guide_text: Callable[[str], str] = lambda t: t, guided: bool | None = None,
    ):  # fmt: skip
        super().__init__()
        check_settings(temperature, margin, margin_strategy)
        if guide is model:
            raise LossInputError("guide: is the model itself, which freezing would stop; load a second copy")
        if guide is None and isinstance(guide_cache, (str, Path)):
            raise LossInputError(f"guide_cache {str(guide_cache)!r}: a folder needs a guide to fill it; give guide too")
        self.model, ready = model, guide is None or isinstance(guide_cache, GuideCache)
        self.cache: Any = guide_cache if ready else GuideCache(guide, guide_cache)
        self.guided = self.cache is not None if guided is None else guided
        self.guide_text, self.gather_across_devices = guide_text, gather_across_devices
        self.settings: dict[str, Any] = dict(temperature=temperature, margin=margin, margin_strategy=margin_strategy)
        self.settings |= dict(contrast_anchors=contrast_anchors, contrast_positives=contrast_positives)

    def attach(self, trainer: Any) -> Any:
        """Make the trainer's batches carry the bare texts; returns the trainer."""
        if not isinstance(trainer.data_collator, GuidedCollator):
            trainer.data_collator = GuidedCollator(trainer.data_collator, guide_text=self.guide_text)
        return trainer

    def _guide(self, features: dict[str, Any], column: int) -> Tensor:
        found = features.get("guide_embedding")
        if found is not None:
            return found
        missing = f"guide embeddings: missing for column {column}"
        if (texts := features.get("guide_text")) is None:
            remedy = "call loss.attach(trainer) before trainer.train()"
            raise LossInputError(f"{missing}, no texts in the batch (keys {sorted(features)}); {remedy}")
        if self.cache is None:
            remedy = "give it one, or set trainer.data_collator to a GuidedCollator with the cache"
            raise LossInputError(f"{missing}, text {shortened(texts[0])}: the loss has neither guide nor guide_cache; {remedy}")
        return self.cache(texts)

    def split(self, sentence_features: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any, Any]:
        """(what the student reads, guide embeddings or None, text ids or None), each a list of columns."""
        features = list(sentence_features)
        if len(features) < 2:
            raise LossInputError(f"sentence_features: {len(features)} text column(s); give anchor, positive[, negatives]")
        ids: Any = [f["text_id"] for f in features] if all("text_id" in f for f in features) else None
        guide: Any = [self._guide(f, i) for i, f in enumerate(features)] if self.guided else None
        ours = ("text_id", "guide_text", "guide_embedding")
        return [{k: v for k, v in f.items() if k not in ours} for f in features], guide, ids

    def loss_of(self, student: Any, guide: Any, ids: Any) -> Tensor:
        """The loss of this process's rows, on embeddings; candidates of all processes if they are gathered."""
        device, count = student[0].device, len(student[0])
        world, total, rows = 1, count, (0, count)
        if self.gather_across_devices and dist.is_available() and dist.is_initialized():
            world, rank = dist.get_world_size(), dist.get_rank()
            every = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
            dist.all_gather(every, torch.tensor([count], device=device))
            counts = [int(t) for t in every]
            total, rows = sum(counts), (sum(counts[:rank]), sum(counts[: rank + 1]))
            student, guide, ids = (
                given and [_Gather.apply(t.to(device), counts) for t in given] for given in (student, guide, ids)
            )
        given, of_guide, of_ids = (t and (t[0], t[1], t[2:]) for t in (student, guide, ids))
        summed = _contrastive_loss(given, of_guide, **self.settings, rows=rows, reduction="sum", text_ids=of_ids)
        return summed * (world / total)  # the trainer averages over processes, whose shares may differ in size

    def forward(self, sentence_features: Sequence[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        columns, guide, ids = self.split(sentence_features)
        return self.loss_of([self.model(column)["sentence_embedding"] for column in columns], guide, ids)

    def get_config_dict(self) -> dict[str, Any]:
        return {"guided": self.guided, **self.settings, "gather_across_devices": self.gather_across_devices}
