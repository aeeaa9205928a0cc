"""Triton kernels of the guided loss: student cosine, guide cosine, mask and log-sum-exp, tile by tile.

One launch handles one block of candidates (q-p, q-n, q-q or p-p; see `speed_core.contrastive.guided_loss`). With student rows
L (B, D) and R (N, D), guide rows GL (B, E) and GR (N, E), thresholds t (B,):

    x_ij  = L_i . R_j / tau,   -inf where GL_i . GR_j > t_i, or where the candidate's text is that of the row
    lse_i = log sum_j exp(x_ij)

`forward` returns lse; the caller joins the blocks. `backward` takes the joint lse and gives the gradient of
sum_i lse_i: with P_ij = exp(x_ij - lse_i), dL = P R / tau and dR = P^T L / tau. P is never stored: the two kernels
recompute it, one for tiles of rows and one for tiles of candidates, so that no atomic addition makes sums random.

Widths are handled in chunks of 64 for the products; the gradients are made `part` columns at a time, a power of two of
at most 512 bytes a row (256 columns of bfloat16, 128 of float32), which is what registers and shared memory allow.

Cost, in products of the size B x N x D (guide of the same width): forward 2. Each backward kernel recomputes student and
guide similarities in each of its ceil(D / part) parts and multiplies part columns, also those past D: for D = 384 in
bfloat16 2 x 2 + 2 x 256/384 = 5.3, and 12.7 in all; in float32 2 x 3 + 1 = 7, and 16. `matmul_rate` of
`benchmarks/guided_loss.py` counts the 4 that no implementation can do without (2 forward, 2 gradients), so its share is
at most 4 / 12.7 = 32% even if every product ran at full rate; 60% needs similarities that are not recomputed per part
or per kernel. Not yet run on a GPU: neither rate nor register use has been measured.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_DIAGONAL, KEEP, DROP = 0, 1, 2  # what holds for candidate i + offset of row i
ROWS, COLUMNS, CHUNK, PART_BYTES = 64, 64, 64, 512
NEGATIVE = tl.constexpr(-1.0e30)  # stands for -inf: differences of it are 0 and not NaN


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
    return tl.where(kept & ~gone, x, NEGATIVE)


@triton.jit
def _forward(
    left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, lse, n_rows, n_columns, width, g_width,
    scale, slack, offset, DIAGONAL: tl.constexpr, GUIDED: tl.constexpr, IDS: tl.constexpr,
    CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, GUIDE_PRECISION: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    top = tl.full((BM,), NEGATIVE, tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    for start in range(0, n_columns, BN):
        columns = (start + tl.arange(0, BN)).to(tl.int64)
        x = _logits(
            left, right, g_left, g_right, threshold, left_ids, own_ids, right_ids, rows, columns, n_rows, n_columns, width,
            g_width, scale, slack, offset, DIAGONAL, GUIDED, IDS, CHUNK, BM, BN, PRECISION, GUIDE_PRECISION,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(x, 1))
        # A removed entry must add 0 even while nothing has been kept and new is NEGATIVE itself.
        mass = mass * tl.exp(top - new) + tl.sum(tl.where(x > 0.5 * NEGATIVE, tl.exp(x - new[:, None]), 0.0), 1)
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


def part_width(width: int, itemsize: int) -> int:
    """Columns of the gradient that one program makes; a product needs at least 16."""
    return max(16, min(triton.next_power_of_2(width), PART_BYTES // itemsize))


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
        part = part_width(width, self.left.element_size())
        # The sum of a (64, 256) tile in float32 takes 128 registers a thread with 4 warps, 64 with 8.
        flags = self.flags | {"WIDTH": part, "num_warps": 8 if part > 128 else 4}
        parts, more = triton.cdiv(width, part), (*self.sizes, *self.numbers)
        with _on(lse):
            _backward_rows[(triton.cdiv(rows, ROWS), parts)](*self.tensors, lse, left, *more, **flags)
            _backward_columns[(triton.cdiv(columns, COLUMNS), parts)](*self.tensors, lse, right, *more, **flags)
        return left, right
