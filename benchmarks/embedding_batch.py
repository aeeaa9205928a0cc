"""Memory and time of one contrastive training step at batches that do not fit at once: the whole batch against GradCache.

    python benchmarks/embedding_batch.py [--device cpu|cuda] [--quick]

A student of all-MiniLM-L6-v2's shape with random weights, triplets of 16 to 40 words, the guided loss. `whole` keeps the activations of
the whole batch; `cached` those of `micro_batch` texts (`embedding.micro_batch` of a profile), and embeds each text twice. `step_mb` is the
peak of the step above what was in use before it. Every row is of a fresh process.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import common
import guided_training_step
import torch

SIZES = ((64, 64), (256, 256), (64, 16), (256, 16), (1536, 16))  # batch, texts at a time
QUICK = ((32, 32), (32, 8))


def one(batch: int, micro: int, device: str) -> dict[str, Any]:
    """Seconds and peak memory of one step, forward and backward."""
    from speed_core.contrastive.sentence_transformers_loss import CachedGuidedContrastiveLoss, GuidedContrastiveLoss

    with tempfile.TemporaryDirectory() as folder:
        student = guided_training_step.bert(Path(folder), 0, device).train()
    g = torch.Generator().manual_seed(0)
    words = guided_training_step.WORDS
    columns = []
    for _ in range(3):
        lengths = torch.randint(16, 40, (batch,), generator=g)
        texts = [" ".join(words[int(w)] for w in torch.randint(len(words), (int(n),), generator=g)) for n in lengths]
        features = student.preprocess(texts)
        guide = torch.nn.functional.normalize(torch.randn(batch, 384, generator=g), dim=1)
        columns.append({k: v.to(device) for k, v in features.items() if hasattr(v, "to")} | {"guide_embedding": guide.to(device)})
    loss: Any = GuidedContrastiveLoss(student, guided=True)
    if micro < batch:
        loss = CachedGuidedContrastiveLoss(student, guided=True, mini_batch_size=micro)
    before = common.reset_peak(device)
    start = time.perf_counter()
    loss(columns).backward()
    common.synchronize(device)
    return {"step_s": round(time.perf_counter() - start, 2), "step_mb": round(common.peak_mb(device) - before)}


def main() -> None:
    args = common.arguments(__doc__ or "")
    rows = []
    for batch, micro in QUICK if args.quick else SIZES:
        method = "whole" if micro == batch else "cached"
        found = common.in_process(one, batch, micro, args.device, limit_s=900)
        rows.append({"method": method, "batch": batch, "micro_batch": micro} | found)
        print(rows[-1], flush=True)
    done = {(r["batch"], r["micro_batch"]): r for r in rows if r["status"] == "ok"}
    pairs = {
        "memory_of_1536_over_256_at_micro_batch_16": ((1536, 16), (256, 16), "step_mb"),
        "memory_of_whole_256_over_64": ((256, 256), (64, 64), "step_mb"),
        "time_of_cached_over_whole_at_256": ((256, 16), (256, 256), "step_s"),
    }
    ratios = {k: round(done[a][c] / done[b][c], 2) for k, (a, b, c) in pairs.items() if a in done and b in done}
    common.finish("embedding_batch", args, rows, ratios, ("sentence-transformers", "transformers"))


if __name__ == "__main__":
    main()
