"""Triton kernels of the guided loss: student cosine, guide cosine, mask and log-sum-exp, tile by tile.

One launch handles one block of candidates (q-p, q-n, q-q or p-p; see `speed_core.contrastive.guided_loss`). With student rows
L (B, D) and R (N, D), guide rows GL (B, E) and GR (N, E), thresholds t (B,):

    x_ij  = L_i . R_j / tau,   -inf where GL_i . GR_j > t_i, or where the candidate's text is that of the row
    lse_i = log sum_j exp(x_ij)

`forward` returns lse; the caller joins the blocks. `backward` takes the joint lse and gives the gradient of
sum_i lse_i: with P_ij = exp(x_ij - lse_i), dL = P R / tau and dR = P^T L / tau. P is never stored: one kernel
recomputes it twice, for tiles of rows and for tiles of candidates, so that no atomic addition makes sums random.

Widths are handled in chunks of 64 for the products; the gradients are made `part` columns at a time, a power of two of
at most 512 bytes a row (256 columns of bfloat16, 128 of float32), which is what registers and shared memory allow.

Cost, in products of the size B x N x D (guide of the same width): forward 2. Each backward launch recomputes student and
guide similarities in each of its ceil(D / part) parts and multiplies part columns, also those past D: for D = 384 in
bfloat16 2 x 2 + 2 x 256/384 = 5.3, and 12.7 in all; in float32 2 x 3 + 1 = 7, and 16. `matmul_rate` of
`benchmarks/guided_loss.py` counts the 4 that no implementation can do without (2 forward, 2 gradients), so its share is
at most 4 / 12.7 = 32% even if every product ran at full rate; 60% needs similarities that are not recomputed per part
or per launch. Not yet run on a GPU: neither rate nor register use has been measured.
"""

from __future__ import annotations

from contextlib import nullcontext
from enum import IntEnum
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


class Diagonal(IntEnum):
    """What holds for candidate i + offset of row i."""

    NONE = 0
    KEEP = 1
    DROP = 2


TILE = tl.constexpr(64)  # rows and candidates of a tile, and columns of a product, at a time
NEGATIVE = tl.constexpr(-1.0e30)  # stands for -inf: differences of it are 0 and not NaN
PART_BYTES = 512


@triton.jit
def _tile(matrix, rows, columns, n_rows, width):
    """`rows` and `columns` of a matrix of `n_rows` x `width`, 0 outside of it."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < width)
    return tl.load(matrix + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _product(left, right, rows, columns, n_rows, n_columns, width, PRECISION: tl.constexpr):
    """(TILE, TILE) inner products of rows of `left` and `right`, float32."""
    out = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, width, TILE):
        at = start + tl.arange(0, TILE)
        a, b = _tile(left, rows, at, n_rows, width), _tile(right, columns, at, n_columns, width)
        out += tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return out


@triton.jit
def _logits(
    left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, rows, columns, n_rows, n_columns, width, g_width,
    scale, slack, offset, DIAGONAL: tl.constexpr, GUIDED: tl.constexpr, IDS: tl.constexpr, PRECISION: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr,
):  # fmt: skip
    """x of one tile, NEGATIVE where a candidate does not count."""
    x = _product(left, right, rows, columns, n_rows, n_columns, width, PRECISION) * scale
    kept = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    own = columns[None, :] == rows[:, None] + offset
    here = rows < n_rows
    if GUIDED:
        g = _product(g_left, g_right, rows, columns, n_rows, n_columns, g_width, GUIDE_PRECISION)
        t = tl.load(threshold + rows, mask=here, other=0.0)
        gone = g > t[:, None] + slack
    else:
        gone = own & False
    if IDS:
        of_left = tl.load(left_ids + rows, mask=here, other=0)
        of_own = tl.load(own_ids + rows, mask=here, other=0)
        of_right = tl.load(right_ids + columns, mask=columns < n_columns, other=0)
        gone = gone | (of_right[None, :] == of_left[:, None]) | (of_right[None, :] == of_own[:, None])
    if DIAGONAL == 1:  # KEEP
        gone = gone & ~own
    if DIAGONAL == 2:  # DROP
        gone = gone | own
    return tl.where(kept & ~gone, x, NEGATIVE)


@triton.jit
def _forward(
    left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, lse, n_rows, n_columns, width, g_width,
    scale, slack, offset, DIAGONAL: tl.constexpr, GUIDED: tl.constexpr, IDS: tl.constexpr, PRECISION: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    top = tl.full((TILE,), NEGATIVE, tl.float32)
    mass = tl.zeros((TILE,), tl.float32)
    for start in range(0, n_columns, TILE):
        columns = (start + tl.arange(0, TILE)).to(tl.int64)
        x = _logits(
            left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, rows, columns, n_rows, n_columns, width,
            g_width, scale, slack, offset, DIAGONAL, GUIDED, IDS, PRECISION, GUIDE_PRECISION,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(x, 1))
        # A removed entry must add 0 even while nothing has been kept and new is NEGATIVE itself.
        mass = mass * tl.exp(top - new) + tl.sum(tl.where(x > 0.5 * NEGATIVE, tl.exp(x - new[:, None]), 0.0), 1)
        top = new
    tl.store(lse + rows, tl.where(mass > 0, top + tl.log(mass), float("-inf")), mask=rows < n_rows)


@triton.jit
def _backward(
    left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, lse, grad, n_rows, n_columns, width, g_width,
    scale, slack, offset, DIAGONAL: tl.constexpr, GUIDED: tl.constexpr, IDS: tl.constexpr, PRECISION: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr, WIDTH: tl.constexpr, OF_ROWS: tl.constexpr,
):  # fmt: skip
    """grad (B, D): sum_j P_ij R_j of rows, or (N, D): sum_i P_ij L_i of candidates; this program's part of the width."""
    own = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    n_own, n_others = (n_rows, n_columns) if OF_ROWS else (n_columns, n_rows)
    out = tl.zeros((TILE, WIDTH), tl.float32)
    for start in range(0, n_others, TILE):
        others = (start + tl.arange(0, TILE)).to(tl.int64)
        rows, columns = (own, others) if OF_ROWS else (others, own)
        x = _logits(
            left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, rows, columns, n_rows, n_columns, width,
            g_width, scale, slack, offset, DIAGONAL, GUIDED, IDS, PRECISION, GUIDE_PRECISION,
        )  # fmt: skip
        p = tl.exp(x - tl.load(lse + rows, mask=rows < n_rows, other=0.0)[:, None])
        if OF_ROWS:
            factor = _tile(right, others, at, n_others, width)
        else:
            p = tl.trans(p)
            factor = _tile(left, others, at, n_others, width)
        out += tl.dot(p.to(factor.dtype), factor, input_precision=PRECISION)
    tl.store(grad + own[:, None] * width + at[None, :], out * scale, mask=(own[:, None] < n_own) & (at[None, :] < width))


def part_width(width: int, itemsize: int) -> int:
    """Columns of the gradient that one program makes; a product needs at least 16."""
    return max(16, min(triton.next_power_of_2(width), PART_BYTES // itemsize))


def _on(t: Tensor) -> Any:
    """Launches go to the current device, so make it the tensor's."""
    return torch.cuda.device_of(t) if t.is_cuda else nullcontext()


class Block:
    """One block of candidates, ready for the kernels. Tensors are contiguous, on one device."""

    def __init__(
        self, left: Tensor, right: Tensor, guide: tuple[Tensor, Tensor, Tensor] | None, ids: tuple[Tensor, Tensor, Tensor] | None,
        *, temperature: float, slack: float, diagonal: Diagonal, offset: int,
    ):  # fmt: skip
        self.left, self.right = left.contiguous(), right.contiguous()
        g_left, g_right, threshold = guide or (left, right, left)
        g_left, g_right = g_left.contiguous(), g_right.contiguous()
        id_left, id_own, id_right = (t.contiguous() for t in ids) if ids is not None else (left, left, left)
        self.tensors = (self.left, self.right, g_left, g_right, threshold, id_left, id_own, id_right)
        self.sizes = (len(left), len(right), left.shape[1], g_left.shape[1])
        self.numbers = (1 / temperature, slack, offset)
        # float32 input is multiplied in float32: tf32 would move similarities across the threshold.
        self.flags: dict[str, Any] = dict(DIAGONAL=int(diagonal), GUIDED=guide is not None, IDS=ids is not None)
        for name, t in (("PRECISION", left), ("GUIDE_PRECISION", g_left)):
            self.flags[name] = "ieee" if t.dtype == torch.float32 else "tf32"

    def forward(self) -> Tensor:
        """lse (B,), float32; -inf where no candidate is left."""
        lse = torch.empty(len(self.left), dtype=torch.float32, device=self.left.device)
        with _on(lse):
            _forward[(triton.cdiv(len(lse), TILE.value),)](*self.tensors, lse, *self.sizes, *self.numbers, **self.flags)
        return lse

    def backward(self, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of sum_i lse_i with respect to left (B, D) and right (N, D), float32."""
        width = self.left.shape[1]
        part = part_width(width, self.left.element_size())
        # The sum of a (64, 256) tile in float32 takes 128 registers a thread with 4 warps, 64 with 8.
        flags = self.flags | {"WIDTH": part, "num_warps": 8 if part > 128 else 4}
        gradients = []
        with _on(lse):
            for of_rows, side in ((True, self.left), (False, self.right)):
                gradient = torch.empty(side.shape, dtype=torch.float32, device=lse.device)
                grid = (triton.cdiv(len(side), TILE.value), triton.cdiv(width, part))
                _backward[grid](*self.tensors, lse, gradient, *self.sizes, *self.numbers, OF_ROWS=of_rows, **flags)
                gradients.append(gradient)
        return gradients[0], gradients[1]
