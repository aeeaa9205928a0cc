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
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from speed_core.guide_cache import GuideCache, GuidedCollator

_BLOCK_ELEMENTS = 1 << 22  # entries of one block of similarities: 16 MB in float32
_TIE = 16  # units in the last place that two ways to compute one dot product may differ by

Columns = tuple[Tensor, Tensor, Tensor]  # anchors (B, D), positives (C, D), negatives (M, D), M may be 0
Negatives = Tensor | Sequence[Tensor] | None
Ids = tuple[Tensor, Tensor, Negatives]


def _flat(columns: Negatives, anchors: Tensor, rows: Sequence[int], name: str) -> Tensor:
    """(B, D), (B, K, D), a list of (B, D) or None -> (M, D); ids the same without D."""
    if columns is None or (not isinstance(columns, Tensor) and not len(columns)):
        return anchors[:0]
    given = [columns] if isinstance(columns, Tensor) else list(columns)
    shapes, tail = [tuple(t.shape) for t in given], tuple(anchors.shape[1:])
    many = isinstance(columns, Tensor) and columns.dim() == anchors.dim() + 1
    if any(x[:1] not in [(b,) for b in rows] or x[1 + many :] != tail for x in shapes):
        one = " or ".join(str((b, *tail)) for b in dict.fromkeys(rows))
        raise ValueError(f"{name}: shape {', '.join(map(str, shapes))}, expected {one} or K of them, a row per anchor")
    return torch.stack(given, dim=1).flatten(0, 1 + many)


def _unit(t: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Rows of length one (a zero row stays zero)."""
    if not bool((finite := torch.isfinite(t).all(-1)).all()):
        where = f"row {int((~finite).nonzero()[0, 0])} of shape {tuple(t.shape)}"
        raise ValueError(f"{name}: {where} is not finite; check the encoder (float16 overflows at 65504)")
    t = t.to(dtype)
    length = torch.linalg.vector_norm(t, dim=-1, keepdim=True)
    # A zero row gets a zero gradient; F.normalize would give it 1e12, which float16 turns into inf.
    return torch.where(length > 1e-12, t / length.clamp_min(1e-12), torch.zeros_like(t))


def _side(columns: tuple[Tensor, Tensor, Negatives], offset: int, prefix: str, like: Tensor | None = None) -> Columns:
    """One encoder's columns, checked and of length one, on the device and in the precision of `like`."""
    a, p, _ = columns
    shapes = f"shape {tuple(p.shape)}, but {prefix}anchors {tuple(a.shape)}"
    if a.dim() != 2 or p.dim() != 2 or a.shape[1] != p.shape[1] or not len(a):
        raise ValueError(f"{prefix}positives: {shapes}; give at least one pair, (rows, D), from one model")
    if offset < 0 or offset + len(a) > len(p):
        raise ValueError(f"{prefix}positives: {shapes} from anchor_offset {offset}; each anchor needs its own positive")
    n = _flat(columns[2], a, (len(a), len(p)), f"{prefix}negatives")
    double = torch.float64 in (a.dtype, p.dtype) if like is None else like.dtype == torch.float64
    dtype, device = torch.float64 if double else torch.float32, (a if like is None else like).device
    a, p = _unit(a.to(device), f"{prefix}anchors", dtype), _unit(p.to(device), f"{prefix}positives", dtype)
    return a, p, _unit(n.to(device), f"{prefix}negatives", dtype)


def _check_settings(temperature: float, margin: float, strategy: str) -> None:
    if strategy not in ("absolute", "relative"):
        raise ValueError(f"margin_strategy {strategy!r}: unknown; use absolute or relative")
    if not 0 < temperature < math.inf or not math.isfinite(margin):
        raise ValueError(f"temperature {temperature}, margin {margin}: finite, the first above 0; the paper's: 0.01, 0")


@dataclass
class _Plan:
    """Everything but the student's embeddings: guide rows, thresholds, identities, switches."""

    guide: Columns | None
    threshold: Tensor
    ids: Columns | None
    offset: int
    contrast_anchors: bool
    contrast_positives: bool
    kernel: torch.dtype | None = None  # what the GPU kernel multiplies in; None: matrix products in blocks

    def blocks(self, columns: Columns) -> dict[str, tuple[Tensor, Tensor]]:
        """Left rows (one per anchor) and candidates of each block in use."""
        a, p, n = columns
        out = {"ap": (a, p), "an": (a, n), "aa": (a, a), "pp": (p[self.offset : self.offset + len(a)], p)}
        off = {"an": not len(n), "aa": not self.contrast_anchors, "pp": not self.contrast_positives}
        return {name: sides for name, sides in out.items() if not off.get(name)}

    def removed(self, block: str, rows: slice) -> Tensor | None:
        """Boolean (rows, candidates) by the guide and the text ids alone: no positive or diagonal considered."""
        out: Tensor | None = None
        if self.guide is not None:
            left, right = self.blocks(self.guide)[block]
            # An exact tie (a duplicate of the own positive) must not be removed by rounding.
            out = left[rows] @ right.T > self.threshold[rows, None] + _TIE * torch.finfo(left.dtype).eps
        if self.ids is not None:
            a, p, _ = self.ids
            right = self.blocks(self.ids)[block][1][None]
            same = (right == a[rows, None]) | (right == p[self.offset :][rows, None])
            out = same if out is None else out | same
        return out


def _kernel_dtype(given: torch.dtype, unit: Tensor) -> torch.dtype | None:
    """bfloat16 and float16 embeddings are normalised in float32 and multiplied as they came; None without Triton."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if unit.dtype == torch.float64 or not (unit.is_cuda or interpreted) or importlib.util.find_spec("triton") is None:
        return None
    return given if given in (torch.float16, torch.bfloat16) else torch.float32


def _fused(a: Tensor, p: Tensor, n: Tensor, plan: _Plan, rows: slice, tau: float, want: bool) -> list[Tensor]:
    """[sum of loss_i, and with `want` the three gradients], by the Triton kernel."""
    from speed_core.kernels.guided_loss import DROP, KEEP, NO_DIAGONAL, Block

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
            left[rows], right, guide, ids, temperature=tau, slack=_TIE * torch.finfo(torch.float32).eps,
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
    def forward(
        ctx: Any, a: Tensor, p: Tensor, n: Tensor, plan: _Plan, rows: slice, tau: float, block_size: int | None
    ) -> Tensor:
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


def _make_plan(
    student: Columns, guide: Columns | None, margin: float, strategy: str, contrast: tuple[bool, bool],
    text_ids: Ids | None, offset: int,
) -> _Plan:  # fmt: skip
    a, p, _ = student
    threshold, ids, counts = a[:0], None, [len(t) for t in student]
    names = "anchors, positives, negatives"
    if guide is not None:
        if (found := [len(t) for t in guide]) != counts:
            raise ValueError(f"guide_{names.replace(' ', ' guide_')}: {found} rows, but {counts} for the student's")
        own = (guide[0].to(a.dtype) * guide[1][offset : offset + len(a)].to(a.dtype)).sum(1)
        threshold = own - margin if strategy == "absolute" else own - own.abs() * margin
    if text_ids is not None:
        ids_a, ids_p = text_ids[0].to(a.device), text_ids[1].to(a.device)
        ids = ids_a, ids_p, _flat(text_ids[2], ids_a, counts, "text_ids[2]").to(a.device)
        if (found := [len(t) for t in ids]) != counts:
            raise ValueError(f"text_ids: {found} ids for {counts} {names}; give one id a row")
    return _Plan(guide, threshold, ids, offset, *contrast)


def guided_contrastive_loss(
    anchors: Tensor, positives: Tensor, negatives: Negatives = None, *,
    guide_anchors: Tensor | None = None, guide_positives: Tensor | None = None, guide_negatives: Negatives = None,
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
        guide_*: the same texts encoded by the guide, of any dimension. All None: `unguided_contrastive_loss`.
        temperature: tau. margin, margin_strategy: see the module's docstring.
        text_ids: integer ids of the texts of anchors (B), positives (C) and negatives (their shape without
            D, or None). A candidate with the id of the anchor or of its positive never acts as a negative.
        rows: (start, stop) of the anchors whose losses count; the other anchors are candidates only.
        block_size: rows at a time; by default a block takes 16 MB, or as much as the embeddings.
        reduction: "mean" or "sum" over the anchors that count.
    Returns a float32 scalar (float64 for float64 anchors or positives), also under autocast. First
    derivatives only. Raises ValueError naming the argument, the shapes and the remedy.
    """
    _check_settings(temperature, margin, margin_strategy)
    if reduction not in ("mean", "sum") or (block_size is not None and block_size < 1):
        raise ValueError(f"reduction {reduction!r}, block_size {block_size}: use mean or sum, and None or at least 1")
    if (guide_anchors is None) != (guide_positives is None) or (guide_negatives is not None and guide_anchors is None):
        raise ValueError("guide embeddings: guide_anchors or guide_positives missing; encode all columns, or none")
    start, stop = rows or (0, len(anchors))
    if not 0 <= start < stop <= len(anchors):
        raise ValueError(f"rows {rows}: no part of anchors, shape {tuple(anchors.shape)}; give (start, stop)")
    # Mixed precision would round similarities to bfloat16 before they meet the threshold.
    with torch.autocast(anchors.device.type, enabled=False):
        student, guide = _side((anchors, positives, negatives), anchor_offset, ""), None
        if guide_anchors is not None and guide_positives is not None:
            with torch.no_grad():
                guide = _side((guide_anchors, guide_positives, guide_negatives), anchor_offset, "guide_", student[0])
        contrast = (contrast_anchors, contrast_positives)
        kernel = _kernel_dtype(anchors.dtype, student[0])
        if kernel is not None and guide is not None:
            kept = guide_anchors.dtype if guide_anchors is not None and guide_anchors.dtype.itemsize == 2 else torch.float32
            guide = (guide[0].to(kept), guide[1].to(kept), guide[2].to(kept))
        plan = _make_plan(student, guide, margin, margin_strategy, contrast, text_ids, anchor_offset)
        plan.kernel = kernel
        total = _Blockwise.apply(*student, plan, slice(start, stop), temperature, block_size)
    return total / (stop - start) if reduction == "mean" else total


def unguided_contrastive_loss(
    anchors: Tensor, positives: Tensor, negatives: Negatives = None, **settings: Any
) -> Tensor:  # fmt: skip
    """InfoNCE over the same blocks: only own diagonals go (the original's loss id 10). `settings`: as for guided."""
    if wrong := sorted(k for k in settings if k.startswith(("guide_", "margin"))):
        raise ValueError(f"{', '.join(wrong)}: mean nothing without a guide; call guided_contrastive_loss")
    return guided_contrastive_loss(anchors, positives, negatives, **settings)


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
    _check_settings(1.0, margin, margin_strategy)
    with torch.autocast(guide_anchors.device.type, enabled=False):
        guide = _side((guide_anchors, guide_positives, guide_negatives), 0, "guide_")
        plan = _make_plan(guide, guide, margin, margin_strategy, (True, True), text_ids, 0)
        blocks, everything = plan.blocks(guide), slice(0, len(guide_anchors))
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
    """

    def __init__(
        self, model: Any, guide: Any = None, temperature: float = 0.01, margin: float = 0.0,
        margin_strategy: str = "absolute", contrast_anchors: bool = True, contrast_positives: bool = True,
        guide_cache: GuideCache | Path | str | None = None, *, guide_text: Callable[[str], str] = lambda t: t,
        gather_across_processes: bool = False, guided: bool | None = None,
    ):  # fmt: skip
        super().__init__()
        _check_settings(temperature, margin, margin_strategy)
        if guide is model:
            raise ValueError("guide: is the model itself, which freezing would stop; load a second copy")
        if guide is None and isinstance(guide_cache, (str, Path)):
            raise ValueError(f"guide_cache {str(guide_cache)!r}: a folder needs a guide to fill it; give guide too")
        self.model, ready = model, guide is None or isinstance(guide_cache, GuideCache)
        self.cache: Any = guide_cache if ready else GuideCache(guide, guide_cache)
        self.guided = self.cache is not None if guided is None else guided
        self.guide_text, self.gather_across_processes = guide_text, gather_across_processes
        self.settings: dict[str, Any] = dict(temperature=temperature, margin=margin, margin_strategy=margin_strategy)
        self.settings |= dict(contrast_anchors=contrast_anchors, contrast_positives=contrast_positives)

    def attach(self, trainer: Any) -> Any:
        """Make the trainer's batches carry the bare texts; returns the trainer."""
        if not isinstance(trainer.data_collator, GuidedCollator):
            trainer.data_collator = GuidedCollator(trainer.data_collator, guide_text=self.guide_text)
        return trainer

    def _guide(self, features: dict[str, Any], column: int) -> Tensor:
        found = features.get("guide_embedding")
        if found is None and (self.cache is None or "guide_text" not in features):
            remedy = "call loss.attach(trainer) before trainer.train()"
            raise ValueError(f"guide embeddings: missing for column {column}, keys {sorted(features)}; {remedy}")
        return self.cache(features["guide_text"]) if found is None else found

    def split(self, sentence_features: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any, Any]:
        """(what the student reads, guide embeddings or None, text ids or None), each a list of columns."""
        features = list(sentence_features)
        if len(features) < 2:
            raise ValueError(f"sentence_features: {len(features)} text column(s); give anchor, positive[, negatives]")
        ids: Any = [f["text_id"] for f in features] if all("text_id" in f for f in features) else None
        guide: Any = [self._guide(f, i) for i, f in enumerate(features)] if self.guided else None
        ours = ("text_id", "guide_text", "guide_embedding")
        return [{k: v for k, v in f.items() if k not in ours} for f in features], guide, ids

    def loss_of(self, student: Any, guide: Any, ids: Any) -> Tensor:
        """The loss of this process's rows, on embeddings; candidates of all processes if they are gathered."""
        device, count = student[0].device, len(student[0])
        world, total, rows = 1, count, (0, count)
        if self.gather_across_processes and dist.is_available() and dist.is_initialized():
            world, rank = dist.get_world_size(), dist.get_rank()
            every = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
            dist.all_gather(every, torch.tensor([count], device=device))
            counts = [int(t) for t in every]
            total, rows = sum(counts), (sum(counts[:rank]), sum(counts[: rank + 1]))
            student, guide, ids = (
                given and [_Gather.apply(t.to(device), counts) for t in given] for given in (student, guide, ids)
            )
        more = self.settings | dict(rows=rows, reduction="sum", text_ids=ids and (ids[0], ids[1], ids[2:]))
        if guide is not None:
            more |= dict(guide_anchors=guide[0], guide_positives=guide[1], guide_negatives=guide[2:])
        summed = guided_contrastive_loss(student[0], student[1], student[2:], **more)
        return summed * (world / total)  # the trainer averages over processes, whose shares may differ in size

    def forward(self, sentence_features: Sequence[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        columns, guide, ids = self.split(sentence_features)
        return self.loss_of([self.model(column)["sentence_embedding"] for column in columns], guide, ids)

    def get_config_dict(self) -> dict[str, Any]:
        return {"guided": self.guided, **self.settings, "gather_across_processes": self.gather_across_processes}
