"""What the guided loss reads, checked: settings, rows of length one, the guide's thresholds, ids of equal texts.

Bad input is named here (`LossInputError`). `guided_loss` has the equation and works on a `ContrastiveBatch`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from speed_core.files import UserError

TIE = 16  # units in the last place that two ways to compute one dot product may differ by

Negatives = Tensor | Sequence[Tensor] | None  # (B, D), (B, K, D) or a list of K (B, D); ids have no D
Given = Sequence[Negatives]  # anchors, positives and, if any, negatives: embeddings of one encoder, or integer ids of texts


class LossInputError(UserError, ValueError):
    """Bad input to the loss; also a ValueError, for code outside of this project."""


class MarginStrategy(StrEnum):
    ABSOLUTE = "absolute"
    RELATIVE = "relative"


@dataclass(frozen=True)
class LossSettings:
    """tau, the margin of the guide's threshold, and whether candidates q-q (anchors) and p-p (positives) count."""

    temperature: float = 0.01
    margin: float = 0.0
    margin_strategy: str = MarginStrategy.ABSOLUTE
    contrast_anchors: bool = True
    contrast_positives: bool = True

    def __post_init__(self) -> None:
        if self.margin_strategy not in [*MarginStrategy]:
            raise LossInputError(f"margin_strategy {self.margin_strategy!r}: unknown; use {' or '.join(MarginStrategy)}")
        if not 0 < self.temperature < math.inf or not math.isfinite(self.margin):
            raise LossInputError(
                f"temperature {self.temperature}, margin {self.margin}: finite, the first above 0; the paper's: 0.01, 0"
            )

    def threshold(self, own: Tensor) -> Tensor:
        """What the guide's similarity of a candidate must not exceed, from that of the own pair."""
        size = own.abs() if self.margin_strategy == MarginStrategy.RELATIVE else 1
        return own - size * self.margin


class Columns(NamedTuple):
    """A batch as the loss computes with it: B rows a column of a unit vector each (or an id), M negatives in all."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor


@dataclass(frozen=True)
class ContrastiveBatch:
    """All that decides the loss of a batch beside the student's embeddings."""

    guide: Columns | None
    threshold: Tensor  # (B,), empty without a guide
    ids: Columns | None
    settings: LossSettings
    kernel: torch.dtype | None = None  # what the GPU kernel multiplies in; None: matrix products in blocks

    def blocks(self, columns: Columns) -> dict[str, tuple[Tensor, Tensor]]:
        """Left rows (one per anchor) and candidates of each block in use."""
        a, p, n = columns
        used = {"an": len(n) > 0, "aa": self.settings.contrast_anchors, "pp": self.settings.contrast_positives}
        sides = {"ap": (a, p), "an": (a, n), "aa": (a, a), "pp": (p, p)}
        return {name: pair for name, pair in sides.items() if used.get(name, True)}

    def removed(self, block: str, rows: slice) -> Tensor | None:
        """Boolean (rows, candidates) by the guide and the text ids alone: no positive or diagonal considered."""
        out: Tensor | None = None
        if self.guide is not None:
            left, right = self.blocks(self.guide)[block]
            # An exact tie (a duplicate of the own positive) must not be removed by rounding.
            out = left[rows] @ right.T > self.threshold[rows, None] + TIE * torch.finfo(left.dtype).eps
        if self.ids is not None:
            candidates = self.blocks(self.ids)[block][1][None]
            same = (candidates == self.ids.anchors[rows, None]) | (candidates == self.ids.positives[rows, None])
            out = same if out is None else out | same
        return out


def parts(given: Given) -> tuple[Tensor, Tensor, Negatives]:
    """Anchors, positives, and negatives or None."""
    anchors, positives, *negatives = given
    if len(negatives) > 1 or not isinstance(anchors, Tensor) or not isinstance(positives, Tensor):
        raise LossInputError(
            f"{len(given)} columns; give tensors of anchors and positives, and negatives as one: (B, D), (B, K, D) or a list"
        )
    return anchors, positives, negatives[0] if negatives else None


def shape_of(t: Tensor, width: int = 1) -> str:
    """As it was given: negatives (B, K, D) with K = 1 read (B, D), with K = 0 none. `width` is 0 for ids."""
    count = t.shape[1] if t.dim() == 2 + width else None
    return "none" if count == 0 else str((*t.shape[:1], *t.shape[2:]) if count == 1 else tuple(t.shape))


def stack_negatives(given: Negatives, anchors: Tensor, name: str) -> Tensor:
    """Negatives of `anchors` (B, D) as (B, K, D); of ids (B,) as (B, K)."""
    if given is None or (not isinstance(given, Tensor) and not len(given)):
        return anchors.new_empty((len(anchors), 0, *anchors.shape[1:]))
    columns = [given] if isinstance(given, Tensor) else list(given)
    stacked = isinstance(given, Tensor) and given.dim() == anchors.dim() + 1
    shapes = [(*t.shape[:1], *t.shape[2:]) if stacked else tuple(t.shape) for t in columns]
    if any(shape != tuple(anchors.shape) for shape in shapes):
        shown = ", ".join(str(tuple(t.shape)) for t in columns)
        raise LossInputError(f"{name}: shape {shown}, expected {tuple(anchors.shape)} or K of them, a row per anchor")
    return columns[0] if stacked else torch.stack(columns, dim=1)


def flatten_negatives(columns: Columns) -> Columns:
    """Negatives (B, K, D) -> (B * K, D); ids the same without D."""
    return columns._replace(negatives=columns.negatives.flatten(0, 1))


def unit_rows(t: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Rows of length one (a zero row stays zero, with a zero gradient)."""
    t = t.to(torch.promote_types(t.dtype, dtype))
    if t.device.type == "cpu":  # a GPU would have to wait for the answer
        length = torch.linalg.vector_norm(narrow := t.to(dtype), dim=-1, keepdim=True)
        if bool(((length > 1e-6) & (length < 1e6)).all()):  # nearly always; the same bits as below, with fewer operations
            return narrow / length
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


def normalize_columns(given: Given, prefix: str = "", like: Tensor | None = None) -> Columns:
    """One encoder's columns of length one, negatives (B, K, D), on the device and in the precision of `like`."""
    a, p, n = parts(given)
    if a.dim() != 2 or p.dim() != 2 or a.shape[1] != p.shape[1] or not a.numel() or (like is None and len(a) != len(p)):
        shapes = f"shape {tuple(p.shape)}, but {prefix}anchors {tuple(a.shape)}"
        raise LossInputError(
            f"{prefix}positives: {shapes}; give at least one pair, (rows, D), from one model: each anchor needs its own positive"
        )
    columns = a, p, stack_negatives(n, a, f"{prefix}negatives")
    double = torch.float64 in (a.dtype, p.dtype) if like is None else like.dtype == torch.float64
    dtype, device = torch.float64 if double else torch.float32, (a if like is None else like).device
    named = zip(Columns._fields, columns, strict=True)
    return Columns(*(unit_rows(t.to(device), f"{prefix}{name}", dtype) for name, t in named))


def check_ids(given: Given, student: Columns) -> Columns:
    """Integer ids of the student's texts, one for each."""
    if len(given) not in (2, 3):
        raise LossInputError(f"text_ids: {len(given)} parts; give ids of anchors, positives and, if any, of negatives")
    a, p, n = parts(given)
    found = [a, p, *([stack_negatives(n, a, "text_ids[2]")] if a.dim() == 1 else [])]
    for i, (name, ids, of_student) in enumerate(zip(Columns._fields, found, student, strict=False)):
        if ids.shape != of_student.shape[:-1] and (ids.numel() or of_student.numel()):
            shapes = f"shape {shape_of(ids, 0) if i == 2 else tuple(ids.shape)}, but {name} {shape_of(of_student)}"
            raise LossInputError(f"text_ids[{i}]: {shapes}; give one integer id a text")
    return Columns(*(ids.to(student.anchors.device) for ids in found))


def make_batch(student: Columns, guide: Columns | None, text_ids: Given | None, settings: LossSettings) -> ContrastiveBatch:
    """The guide's thresholds and the ids of a batch; UserError where guide or ids are not those of the student's texts."""
    threshold = student.anchors[:0]
    if guide is not None:
        for name, of_guide, of_student in zip(Columns._fields, guide, student, strict=True):
            # Rows alone would let (4, D) meet (2, 2, E), which is another order of the same number of texts.
            if of_guide.shape[:-1] != of_student.shape[:-1] and (of_guide.numel() or of_student.numel()):
                shapes = f"shape {shape_of(of_guide)}, but {name} {shape_of(of_student)}"
                raise LossInputError(f"guide_{name}: {shapes}; encode the same texts, in the same order, with the guide")
        threshold, guide = settings.threshold((guide.anchors * guide.positives).sum(1)), flatten_negatives(guide)
    ids = None if text_ids is None else flatten_negatives(check_ids(text_ids, student))
    return ContrastiveBatch(guide, threshold, ids, settings)
