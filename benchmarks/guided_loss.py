"""The guided contrastive loss: ours, a plain matrix product, sentence-transformers' two losses, the unguided floor, bare products.

    python benchmarks/guided_loss.py [--device cpu|cuda] [--quick]

Embeddings of dimension 384 (student and guide), triplets, forward and backward, float32. The encoders are left out:
`GISTEmbedLoss` and `CachedGISTEmbedLoss` get modules that hand them the embeddings (the cached one: its loss part
only, mini-batch 32). "sgemm" is the matrix products that every such loss needs and nothing else: its GFLOP/s are what
this machine can give at these shapes. "shares" says where the time of a small batch goes. The last part times whole
training steps, encoders included.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import common
import torch
import torch.nn.functional as F

DIMENSION, TAU = 384, 0.01
METHODS = ("ours", "matmul", "gist", "cached_gist", "unguided", "sgemm")
SLAB = 1 << 26  # entries of one product in "sgemm": 256 MB


def embeddings(batch: int, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Student columns (with gradient) and guide columns. Pairs are alike, so that the guide removes a few percent."""
    g = torch.Generator().manual_seed(0)
    columns = []
    for _ in range(2):
        topic = torch.randn(batch, DIMENSION, generator=g)
        columns.append([(topic * mix + torch.randn(batch, DIMENSION, generator=g)).to(device) for mix in (0.4, 0.4, 0.1)])
    return [t.requires_grad_() for t in columns[0]], columns[1]


def matmul_loss(student: list[torch.Tensor], guide: list[torch.Tensor]) -> torch.Tensor:
    """The whole B x 4B matrix at once, as one would write it first; same value and gradients as ours."""
    a, p, n = (F.normalize(t, dim=-1) for t in student)
    ga, gp, gn = (F.normalize(t, dim=-1) for t in guide)
    own = (ga * gp).sum(1, keepdim=True)
    eye = torch.eye(len(a), dtype=torch.bool, device=a.device)
    blocks = []
    for left, right, g_left, g_right, name in (
        (a, p, ga, gp, "ap"),
        (a, n, ga, gn, "an"),
        (a, a, ga, ga, "aa"),
        (p, p, gp, gp, "pp"),
    ):
        gone = g_left @ g_right.T > own
        gone = gone & ~eye if name == "ap" else gone if name == "an" else gone | eye
        blocks.append((left @ right.T / TAU).masked_fill(gone, float("-inf")))
    return F.cross_entropy(torch.cat(blocks, 1), torch.arange(len(a), device=a.device))


def work(batch: int) -> int:
    """Floating-point operations of the products: four blocks; student, guide, two gradients."""
    return 4 * 4 * 2 * batch * batch * DIMENSION


def products(student: list[torch.Tensor], guide: list[torch.Tensor]) -> Any:
    """A call that runs the loss's matrix products alone, in its shapes and in slabs of rows."""
    ours, theirs = [t.detach() for t in student], guide
    batch = len(theirs[0])
    rows = min(batch, max(1, SLAB // batch))
    out, of_left = theirs[0].new_empty(rows, batch), theirs[0].new_empty(rows, DIMENSION)
    of_right = torch.zeros_like(theirs[0])

    def run() -> None:
        for left, right in ((0, 1), (0, 2), (0, 0), (1, 1)):
            for start in range(0, batch, rows):  # batches are powers of two: every slab is whole
                part = slice(start, start + rows)
                torch.mm(theirs[left][part], theirs[right].T, out=out)
                torch.mm(ours[left][part], ours[right].T, out=out)
                torch.mm(out, ours[right], out=of_left)
                of_right.addmm_(out.T, ours[left][part])

    return run


def method(name: str, batch: int, device: str) -> Any:
    """A call that runs one forward and backward."""
    from speed_core.contrastive.guided_loss import LossSettings, guided_contrastive_loss, unguided_contrastive_loss

    student, guide = embeddings(batch, device)
    if name == "sgemm":
        return products(student, guide)
    if name in ("gist", "cached_gist"):
        from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss

        peer: Any = (GISTEmbedLoss if name == "gist" else CachedGISTEmbedLoss).__new__(
            GISTEmbedLoss if name == "gist" else CachedGISTEmbedLoss
        )
        torch.nn.Module.__init__(peer)
        peer.temperature, peer.margin, peer.margin_strategy, peer.mini_batch_size = TAU, 0.0, "absolute", 32
        peer.contrast_anchors = peer.contrast_positives = True
        peer.gather_across_devices = peer.must_retokenize = peer.show_progress_bar = False
        peer.similarity_fct, peer.cross_entropy_loss = torch.nn.CosineSimilarity(dim=-1), torch.nn.CrossEntropyLoss()

    def run() -> float:
        for t in student:
            t.grad = None
        if name == "ours":
            loss = guided_contrastive_loss(student, guide, LossSettings(TAU))
        elif name == "unguided":
            loss = unguided_contrastive_loss(student, LossSettings(TAU))
        elif name == "matmul":
            loss = matmul_loss(student, guide)
        elif name == "cached_gist":
            return float(peer.calculate_loss([[t] for t in student], [[t] for t in guide], with_backward=True))
        else:
            peer.model, peer.guide = _Student(student), _Student(guide)
            loss = peer([{"column": i} for i in range(3)], None)
        loss.backward()
        return float(loss.detach())

    return run


class _Student(torch.nn.Module):
    def __init__(self, columns: list[torch.Tensor]):
        super().__init__()
        self.columns = columns

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {"sentence_embedding": self.columns[features["column"]]}


def measure(name: str, batch: int, device: str) -> dict[str, Any]:
    """Seconds (median), peak memory above the embeddings, and the value, in this process."""
    method(name, 16, device)()  # imports and thread pools are not the loss's memory
    run = method(name, batch, device)
    before = common.reset_peak(device)
    start = time.perf_counter()
    value = run()
    common.synchronize(device)
    first, times = time.perf_counter() - start, []
    # The first call counts only where there is no time for another: thread pools and allocators take milliseconds.
    while (len(times) < 5 or (sum(times) < 0.5 and len(times) < 50)) and 2 * first + sum(times) < 30:
        start = time.perf_counter()
        run()
        common.synchronize(device)
        times.append(time.perf_counter() - start)
    found = {"seconds": statistics.median(times or [first]), "peak_mb": max(0.0, common.peak_mb(device) - before)}
    if name != "unguided":  # which has three of the four products
        found["gflops"] = work(batch) / found["seconds"] / 1e9
    return found if value is None else found | {"loss": value}


def shares(batch: int, device: str) -> dict[str, Any]:
    """Seconds of ours and of the plain product, and in both the part of the products and of making rows of length one."""
    from speed_core.contrastive.loss_inputs import normalize_columns

    student, guide = embeddings(batch, device)

    def unit(rows: Any) -> Any:
        def run() -> None:
            with torch.no_grad():
                rows(guide)
            columns = rows(student)
            torch.autograd.grad(columns, student, columns)

        return run

    calls = {name: method(name, batch, device) for name in ("ours", "matmul", "sgemm")}
    calls |= {"unit_ours": unit(normalize_columns), "unit_matmul": unit(lambda given: [F.normalize(t, dim=-1) for t in given])}
    return common.interleaved(calls, device, rounds=40)


def losses(args: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every method at growing batches until it fails or takes too long."""
    cpu = args.device == "cpu"
    batches = (64, 256, 512, 1024, 4096, 16384) if cpu else (64, 512, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    if args.quick:
        batches = batches[:3]
    limit = 60 if args.quick else 100
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Any]
    for name in METHODS:
        for batch in batches:
            row = {"method": name, "batch": batch} | common.in_process(measure, name, batch, args.device, limit_s=limit)
            rows.append(row)
            print(row, flush=True)
            if row["status"] != "ok":
                break
    done = {(r["method"], r["batch"]): r for r in rows if r["status"] == "ok"}
    values = {b: [r["loss"] for (m, b2), r in done.items() if b2 == b and "loss" in r and m != "unguided"] for b in batches}
    worst = max((max(v) - min(v)) / max(v) for v in values.values() if len(v) > 1)

    def against(peer: str) -> dict[str, float]:
        return {str(b): round(r["seconds"] / done["ours", b]["seconds"], 2) for (m, b), r in done.items() if m == peer}

    largest = {m: max((b for (m2, b) in done if m2 == m), default=0) for m in METHODS}  # of those that were tried
    ratios = {
        "vs_gist_embed_loss": against("gist"),
        "vs_cached_gist": against("cached_gist"),
        "vs_unguided_floor": against("unguided"),
    }
    ratios |= {
        "largest_batch": largest,
        "largest_batch_vs_gist": largest["ours"] / max(1, largest["gist"]),
        "largest_relative_difference": worst,
    }
    # A ratio near 1 needs pairs from one process.
    paired = [b for b in batches if ("matmul", b) in done and ("ours", b) in done]
    both = {
        b: common.interleaved({m: method(m, b, args.device) for m in ("ours", "matmul", "sgemm")}, args.device)
        for b in paired
        if b <= 8192
    }
    ratios["vs_matmul"] = {str(b): round(t["matmul"] / t["ours"], 2) for b, t in both.items()}
    ratios["sgemm_gflops"] = {str(b): round(work(b) / t["sgemm"] / 1e9) for b, t in both.items()}
    ratios["share_of_sgemm"] = {str(b): round(t["sgemm"] / t["ours"], 2) for b, t in both.items()}
    ratios["share_of_sgemm_matmul"] = {str(b): round(t["sgemm"] / t["matmul"], 2) for b, t in both.items()}
    for batch in (16, 32, 64):
        found = common.in_process(shares, batch, args.device, limit_s=limit)
        rows.append({"method": "shares", "batch": batch} | found)
        print(rows[-1], flush=True)
        if found["status"] == "ok":
            ratios.setdefault("small_batch", {})[str(batch)] = {
                "vs_matmul": round(found["matmul"] / found["ours"], 2),
                **{
                    f"{part}_in_{m}": round(found[of] / found[m], 2)
                    for m in ("ours", "matmul")
                    for part, of in (("products", "sgemm"), ("unit_rows", f"unit_{m}"))
                },
            }
    if args.device == "cuda":
        ratios["share_of_matmul_rate"] = matmul_rate(largest["ours"])
    return rows, ratios


def matmul_rate(batch: int) -> dict[str, float]:
    """Ours in bfloat16 against bare matrix products of the same floating-point work, same run."""
    from speed_core.contrastive.guided_loss import LossSettings, guided_contrastive_loss

    student, guide = embeddings(batch, "cuda")
    student = [t.detach().bfloat16().requires_grad_() for t in student]
    guide = [t.bfloat16() for t in guide]
    work = 4 * 2 * batch * batch * DIMENSION * 4  # four blocks; student, guide forward, two gradients

    def run() -> None:
        loss = guided_contrastive_loss(student, guide, LossSettings(TAU))
        loss.backward()

    left, right = student[0].detach(), student[1].detach()
    out = torch.empty(min(batch, 16384), min(batch, 16384), dtype=torch.bfloat16, device="cuda")
    m = len(out)
    spent = common.seconds(lambda: torch.mm(left[:m], right[:m].T, out=out), "cuda")
    rate = 2 * m * m * DIMENSION / spent
    ours = common.seconds(run, "cuda")
    return {
        "batch": batch,
        "seconds": ours,
        "matmul_tflops": rate / 1e12,
        "ours_tflops": work / ours / 1e12,
        "share": work / ours / rate,
    }


def main() -> None:
    args = common.arguments(__doc__ or "")
    rows, ratios = losses(args)
    from guided_training_step import training_steps

    steps, step_ratios = training_steps(args)
    common.finish("guided_loss", args, rows + steps, ratios | step_ratios, ("sentence-transformers", "transformers", "triton"))


if __name__ == "__main__":
    main()
