"""What the guided loss works on, checked: columns of rows of length one, thresholds, identities of texts.

Bad input is named here (`LossInputError`); `guided_loss` has the equation and works on a `Plan`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speed_core.files import UserError

TIE = 16  # units in the last place that two ways to compute one dot product may differ by


Columns = tuple[Tensor, Tensor, Tensor]  # anchors (B, D), positives (C, D), negatives (M, D), M may be 0
Negatives = Tensor | Sequence[Tensor] | None
Ids = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Negatives]


class LossInputError(UserError, ValueError):
    """Bad input to the loss; also a ValueError, for code outside of this project."""


def shape_of(t: Tensor, width: int = 1) -> str:
    """As it was given: negatives (B, K, D) with K = 1 read (B, D), with K = 0 none. `width` is 0 for ids."""
    count = t.shape[1] if t.dim() == 2 + width else None
    return "none" if count == 0 else str((*t.shape[:1], *t.shape[2:]) if count == 1 else tuple(t.shape))


def stacked(columns: Negatives, like: Tensor, rows: Sequence[int], name: str) -> Tensor:
    """(B, D), (B, K, D), a list of K (B, D), or None -> (B, K, D); ids (`like` has no D) -> (B, K)."""
    tail, one = tuple(like.shape[1:]), isinstance(columns, Tensor)
    if columns is None or (not one and not len(columns)):
        return like.new_empty((len(like), 0, *tail))
    given = [columns] if isinstance(columns, Tensor) else list(columns)
    shapes = [tuple(t.shape) for t in given]
    many = one and given[0].dim() == like.dim() + 1
    if len(set(shapes)) > 1 or shapes[0][:1] not in [(b,) for b in rows] or shapes[0][1 + many :] != tail:
        wanted = " or ".join(str((b, *tail)) for b in dict.fromkeys(rows))
        raise LossInputError(
            f"{name}: shape {', '.join(map(str, shapes))}, expected {wanted} or K of one of them, a row per anchor"
        )
    return given[0] if many else torch.stack(given, dim=1)


def unit_rows(t: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Rows of length one (a zero row stays zero, with a zero gradient)."""
    t = t.to(torch.promote_types(t.dtype, dtype))
    # Squares leave float32's range from 1e19 up and 1e-23 down. A power of two is exact: it moves no ordinary value.
    with torch.no_grad():
        top = torch.linalg.vector_norm(t, math.inf, dim=-1, keepdim=True)
        scale = (top.frexp().mantissa / top).nan_to_num(1.0).clamp(tiny := torch.finfo(t.dtype).tiny, 1 / tiny)
    if not bool(torch.isfinite(top).all()):
        row, *which = (~torch.isfinite(top)).nonzero()[0, :-1].tolist()
        where = f"row {row}, negative {which[0]}" if which and t.shape[1] > 1 else f"row {row}"
        raise LossInputError(
            f"{name}: {where} of shape {shape_of(t)} is not finite; check the encoder (float16 overflows at 65504)"
        )
    t = (t * scale).to(dtype)
    length = torch.linalg.vector_norm(t, dim=-1, keepdim=True)
    return torch.where(length > 0, t / length.clamp_min(1e-12), torch.zeros_like(t))


def side(columns: tuple[Tensor, Tensor, Negatives], offset: int, prefix: str, like: Tensor | None = None) -> Columns:
    """One encoder's columns of length one, negatives (rows, K, D), on the device and in the precision of `like`."""
    a, p, _ = columns
    shapes = f"shape {tuple(p.shape)}, but {prefix}anchors {tuple(a.shape)}"
    if a.dim() != 2 or p.dim() != 2 or a.shape[1] != p.shape[1] or not a.numel():
        raise LossInputError(f"{prefix}positives: {shapes}; give at least one pair, (rows, D), from one model")
    if offset < 0 or offset + len(a) > len(p):
        raise LossInputError(f"{prefix}positives: {shapes} from anchor_offset {offset}; each anchor needs its own positive")
    n = stacked(columns[2], a, (len(a), len(p)), f"{prefix}negatives")
    double = torch.float64 in (a.dtype, p.dtype) if like is None else like.dtype == torch.float64
    dtype, device = torch.float64 if double else torch.float32, (a if like is None else like).device
    a, p = unit_rows(a.to(device), f"{prefix}anchors", dtype), unit_rows(p.to(device), f"{prefix}positives", dtype)
    return a, p, unit_rows(n.to(device), f"{prefix}negatives", dtype)


def flat(columns: Columns) -> Columns:
    """Negatives (rows, K, D) -> (rows * K, D); ids the same without D."""
    return columns[0], columns[1], columns[2].flatten(0, 1)


def check_settings(temperature: float, margin: float, strategy: str) -> None:
    if strategy not in ("absolute", "relative"):
        raise LossInputError(f"margin_strategy {strategy!r}: unknown; use absolute or relative")
    if not 0 < temperature < math.inf or not math.isfinite(margin):
        raise LossInputError(f"temperature {temperature}, margin {margin}: finite, the first above 0; the paper's: 0.01, 0")


@dataclass
class Plan:
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
            out = left[rows] @ right.T > self.threshold[rows, None] + TIE * torch.finfo(left.dtype).eps
        if self.ids is not None:
            a, p, _ = self.ids
            right = self.blocks(self.ids)[block][1][None]
            same = (right == a[rows, None]) | (right == p[self.offset :][rows, None])
            out = same if out is None else out | same
        return out


NAMES = ("anchors", "positives", "negatives")


def make_plan(
    student: Columns, guide: Columns | None, margin: float, strategy: str, contrast: tuple[bool, bool],
    text_ids: Ids | None, offset: int,
) -> Plan:  # fmt: skip
    a, p, _ = student
    threshold, ids = a[:0], None
    if guide is not None:
        for name, of_guide, t in zip(NAMES, guide, student, strict=True):
            # Rows alone would let (4, D) meet (2, 2, E), which is another order of the same number of texts.
            if of_guide.shape[:-1] != t.shape[:-1] and (of_guide.numel() or t.numel()):
                both = f"shape {shape_of(of_guide)}, but {name} {shape_of(t)}"
                raise LossInputError(f"guide_{name}: {both}; encode the same texts, in the same order, with the guide")
        own = (guide[0].to(a.dtype) * guide[1][offset : offset + len(a)].to(a.dtype)).sum(1)
        threshold = own - margin if strategy == "absolute" else own - own.abs() * margin
        guide = flat(guide)
    if text_ids is not None:
        if len(text_ids) not in (2, 3):
            raise LossInputError(f"text_ids: {len(text_ids)} parts; give ids of anchors, positives and, if any, of negatives")
        ids_a, ids_p = (t.to(a.device) for t in text_ids[:2])
        found = [ids_a, ids_p]
        if ids_a.dim() == 1:
            found += [stacked(text_ids[2] if len(text_ids) > 2 else None, ids_a, (len(a), len(p)), "text_ids[2]").to(a.device)]
        for i, (name, these, t) in enumerate(zip(NAMES, found, student, strict=False)):
            if these.shape != t.shape[:-1] and (these.numel() or t.numel()):
                shapes = f"shape {shape_of(these, 0) if i == 2 else tuple(these.shape)}, but {name} {shape_of(t)}"
                raise LossInputError(f"text_ids[{i}]: {shapes}; give one integer id a text")
        ids = flat((ids_a, ids_p, found[2]))
    return Plan(guide, threshold, ids, offset, *contrast)
