"""Triton kernels of the guided loss: student cosine, guide cosine, mask and log-sum-exp, tile by tile.

One launch handles one block of candidates (q-p, q-n, q-q or p-p; see `speed_core.guided_loss`). With student rows
L (B, D) and R (N, D), guide rows GL (B, E) and GR (N, E), thresholds t (B,):

    x_ij  = L_i . R_j / tau,   -inf where GL_i . GR_j > t_i, or where the candidate's text is that of the row
    lse_i = log sum_j exp(x_ij)

`forward` returns lse; the caller joins the blocks. `backward` takes the joint lse and gives the gradient of
sum_i lse_i: with P_ij = exp(x_ij - lse_i), dL = P R / tau and dR = P^T L / tau. P is never stored: the two kernels
recompute it, one for tiles of rows and one for tiles of candidates, so that no atomic addition makes sums random.

Widths are handled in chunks of 64 for the products; the gradients are made `WIDTH` columns at a time.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_DIAGONAL, KEEP, DROP = 0, 1, 2  # what holds for candidate i + offset of row i
ROWS, COLUMNS, CHUNK, WIDTH = 64, 64, 64, 128
NEGATIVE = -1.0e30  # stands for -inf: differences of it are 0 and not NaN


@triton.jit
def _product(
    left,
    right,
    rows,
    columns,
    n_rows,
    n_columns,
    width,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BM, BN) inner products of rows of `left` and `right`, float32."""
    out = tl.zeros((BM, BN), tl.float32)
    k = tl.arange(0, CHUNK)
    for start in range(0, width, CHUNK):
        at = start + k
        a = tl.load(left + rows[:, None] * width + at[None, :], mask=(rows[:, None] < n_rows) & (at[None, :] < width), other=0.0)
        b = tl.load(
            right + columns[None, :] * width + at[:, None], mask=(columns[None, :] < n_columns) & (at[:, None] < width), other=0.0
        )
        out += tl.dot(a, b, input_precision=PRECISION)
    return out


@triton.jit
def _logits(
    left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, rows, columns, n_rows, n_columns, width, g_width,
    scale, slack, offset, DIAGONAL: tl.constexpr, GUIDED: tl.constexpr, IDS: tl.constexpr,
    CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr,
):  # fmt: skip
    """x of one tile, NEGATIVE where a candidate does not count."""
    x = _product(left, right, rows, columns, n_rows, n_columns, width, CHUNK, BM, BN, PRECISION) * scale
    kept = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    own = columns[None, :] == rows[:, None] + offset
    here = rows < n_rows
    if GUIDED:
        g = _product(g_left, g_right, rows, columns, n_rows, n_columns, g_width, CHUNK, BM, BN, GUIDE_PRECISION)
        t = tl.load(threshold + rows, mask=here, other=0.0)
        gone = g > t[:, None] + slack
    else:
        gone = own & False
    if IDS:
        of_left = tl.load(left_ids + rows, mask=here, other=0)
        of_own = tl.load(own_ids + rows, mask=here, other=0)
        of_right = tl.load(right_ids + columns, mask=columns < n_columns, other=0)
        gone = gone | (of_right[None, :] == of_left[:, None]) | (of_right[None, :] == of_own[:, None])
    if DIAGONAL == 1:
        gone = gone & ~own
    if DIAGONAL == 2:
        gone = gone | own
    return tl.where(kept & ~gone, x, -1.0e30)


@triton.jit
def _forward(
    left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, lse, n_rows, n_columns, width, g_width,
    scale, slack, offset, DIAGONAL: tl.constexpr, GUIDED: tl.constexpr, IDS: tl.constexpr,
    CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    top = tl.full((BM,), -1.0e30, tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    for start in range(0, n_columns, BN):
        columns = (start + tl.arange(0, BN)).to(tl.int64)
        x = _logits(
            left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, rows, columns, n_rows, n_columns, width,
            g_width, scale, slack, offset, DIAGONAL, GUIDED, IDS, CHUNK, BM, BN, PRECISION, GUIDE_PRECISION,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(x, 1))
        # A removed entry must add 0 even while nothing has been kept and new is NEGATIVE itself.
        mass = mass * tl.exp(top - new) + tl.sum(tl.where(x > -0.5e30, tl.exp(x - new[:, None]), 0.0), 1)
        top = new
    tl.store(lse + rows, tl.where(mass > 0, top + tl.log(mass), float("-inf")), mask=rows < n_rows)


@triton.jit
def _backward_rows(
    left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, lse, grad, n_rows, n_columns, width, g_width,
    scale, slack, offset, DIAGONAL: tl.constexpr, GUIDED: tl.constexpr, IDS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr,
):  # fmt: skip
    """grad (B, D): sum_j P_ij R_j, for the columns of this program's part of the width."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    joint = tl.load(lse + rows, mask=rows < n_rows, other=0.0)
    out = tl.zeros((BM, WIDTH), tl.float32)
    for start in range(0, n_columns, BN):
        columns = (start + tl.arange(0, BN)).to(tl.int64)
        x = _logits(
            left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, rows, columns, n_rows, n_columns, width,
            g_width, scale, slack, offset, DIAGONAL, GUIDED, IDS, CHUNK, BM, BN, PRECISION, GUIDE_PRECISION,
        )  # fmt: skip
        p = tl.exp(x - joint[:, None])
        inside = (columns[:, None] < n_columns) & (at[None, :] < width)
        r = tl.load(right + columns[:, None] * width + at[None, :], mask=inside, other=0.0)
        out += tl.dot(p.to(r.dtype), r, input_precision=PRECISION)
    tl.store(grad + rows[:, None] * width + at[None, :], out * scale, mask=(rows[:, None] < n_rows) & (at[None, :] < width))


@triton.jit
def _backward_columns(
    left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, lse, grad, n_rows, n_columns, width, g_width,
    scale, slack, offset, DIAGONAL: tl.constexpr, GUIDED: tl.constexpr, IDS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr,
):  # fmt: skip
    """grad (N, D): sum_i P_ij L_i, for the columns of this program's part of the width."""
    columns = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    out = tl.zeros((BN, WIDTH), tl.float32)
    for start in range(0, n_rows, BM):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        x = _logits(
            left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, rows, columns, n_rows, n_columns, width,
            g_width, scale, slack, offset, DIAGONAL, GUIDED, IDS, CHUNK, BM, BN, PRECISION, GUIDE_PRECISION,
        )  # fmt: skip
        joint = tl.load(lse + rows, mask=rows < n_rows, other=0.0)
        p = tl.exp(x - joint[:, None])
        inside = (rows[:, None] < n_rows) & (at[None, :] < width)
        a = tl.load(left + rows[:, None] * width + at[None, :], mask=inside, other=0.0)
        out += tl.dot(tl.trans(p).to(a.dtype), a, input_precision=PRECISION)
    tl.store(
        grad + columns[:, None] * width + at[None, :], out * scale, mask=(columns[:, None] < n_columns) & (at[None, :] < width)
    )


def _on(t: Tensor) -> Any:
    """Launches go to the current device, so make it the tensor's."""
    return torch.cuda.device_of(t) if t.is_cuda else nullcontext()


class Block:
    """One block of candidates, ready for the three kernels. Tensors are contiguous, on one device."""

    def __init__(
        self, left: Tensor, right: Tensor, guide: tuple[Tensor, Tensor, Tensor] | None, ids: tuple[Tensor, Tensor, Tensor] | None,
        *, temperature: float, slack: float, diagonal: int, offset: int,
    ):  # fmt: skip
        self.left, self.right = left.contiguous(), right.contiguous()
        g_left, g_right, threshold = guide or (left, right, left)
        g_left, g_right = g_left.contiguous(), g_right.contiguous()
        id_left, id_own, id_right = (t.contiguous() for t in ids) if ids is not None else (left, left, left)
        self.tensors = (self.left, self.right, g_left, g_right, threshold, id_left, id_own, id_right)
        self.sizes = (len(left), len(right), left.shape[1], g_left.shape[1])
        self.numbers = (1 / temperature, slack, offset)
        # float32 input is multiplied in float32: tf32 would move similarities across the threshold.
        self.flags: dict[str, Any] = dict(
            DIAGONAL=diagonal, GUIDED=guide is not None, IDS=ids is not None, CHUNK=CHUNK, BM=ROWS, BN=COLUMNS
        )
        for name, t in (("PRECISION", left), ("GUIDE_PRECISION", g_left)):
            self.flags[name] = "ieee" if t.dtype == torch.float32 else "tf32"

    def forward(self) -> Tensor:
        """lse (B,), float32; -inf where no candidate is left."""
        lse = torch.empty(len(self.left), dtype=torch.float32, device=self.left.device)
        with _on(lse):
            _forward[(triton.cdiv(len(self.left), ROWS),)](*self.tensors, lse, *self.sizes, *self.numbers, **self.flags)
        return lse

    def backward(self, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of sum_i lse_i with respect to left (B, D) and right (N, D), float32."""
        rows, columns, width, _ = self.sizes
        left = torch.empty(rows, width, dtype=torch.float32, device=lse.device)
        right = torch.empty(columns, width, dtype=torch.float32, device=lse.device)
        parts = triton.cdiv(width, WIDTH)
        more = (*self.sizes, *self.numbers)
        with _on(lse):
            _backward_rows[(triton.cdiv(rows, ROWS), parts)](*self.tensors, lse, left, *more, WIDTH=WIDTH, **self.flags)
            _backward_columns[(triton.cdiv(columns, COLUMNS), parts)](*self.tensors, lse, right, *more, WIDTH=WIDTH, **self.flags)
        return left, right
