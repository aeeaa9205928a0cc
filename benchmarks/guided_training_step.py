"""Whole training steps, student and guide encoders included: ours against the trainer with sentence-transformers' losses.

Both run through `SentenceTransformerTrainer` on the same texts from the same start; student and guide have the shape
of all-MiniLM-L6-v2 with random weights, so that nothing is downloaded. Ours encodes each distinct text with the guide
once and looks it up in later epochs; the library's loss runs the guide in every step.

The losses with GradCache ("cached") embed at most `TOKENS` tokens at a time, padding not counted: `mini_batch_num_tokens`, which
sentence-transformers 6.2 has and ours takes too. `cached_gist_32` has the library's default instead, 32 texts.
`cached_mnrl` (`CachedMultipleNegativesRankingLoss`) has no guide and fewer candidates: another loss, the cheapest of its kind.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import common
import torch

TOKENS = 1024  # about 35 of the texts below
METHODS = ("ours", "gist", "ours_cached", "cached_gist", "cached_gist_32", "cached_mnrl")
WORDS = [
    a + b
    for a in ("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu")
    for b in ("n", "r", "s", "t", "la", "me", "no", "pi")
]


def bert(folder: Path, seed: int, device: str) -> Any:
    """all-MiniLM-L6-v2's shape: 6 layers, width 384; a word tokenizer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    BertModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return SentenceTransformer(modules=[Transformer(str(folder / "model"), max_seq_length=64), Pooling(384)], device=device)


def loss_for(name: str, student: Any, guide: Any) -> Any:
    """The loss of a row."""
    from sentence_transformers.sentence_transformer import losses

    from speed_core.contrastive.sentence_transformers_loss import CachedGuidedContrastiveLoss, GuidedContrastiveLoss

    if name == "cached_mnrl":
        return losses.CachedMultipleNegativesRankingLoss(student, scale=100, mini_batch_num_tokens=TOKENS)
    kinds = {"ours": GuidedContrastiveLoss, "gist": losses.GISTEmbedLoss, "ours_cached": CachedGuidedContrastiveLoss}
    budget = {"mini_batch_num_tokens": TOKENS} if name in ("ours_cached", "cached_gist") else {}
    return kinds.get(name, losses.CachedGISTEmbedLoss)(student, guide, **budget)


def one(name: str, batch: int, steps: int, device: str) -> dict[str, Any]:
    """Samples per second in the first and in the second epoch."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    g = torch.Generator().manual_seed(0)

    def text() -> str:
        words = torch.randint(len(WORDS), (int(torch.randint(16, 40, (1,), generator=g)),), generator=g)
        return " ".join(WORDS[int(w)] for w in words)

    data = Dataset.from_list([{k: text() for k in ("anchor", "positive", "negative")} for _ in range(batch * steps)])
    callback, ends = common.step_clock(device)

    with tempfile.TemporaryDirectory() as folder:
        student, guide = bert(Path(folder, "student"), 0, device), bert(Path(folder, "guide"), 1, device)
        loss = loss_for(name, student, guide)
        settings = {"per_device_train_batch_size": batch, "num_train_epochs": 2, "use_cpu": device == "cpu", "seed": 0}
        args = SentenceTransformerTrainingArguments(
            folder,
            **settings,
            bf16=device == "cuda",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = SentenceTransformerTrainer(model=student, args=args, train_dataset=data, loss=loss, callbacks=[callback])
        if hasattr(loss, "attach"):
            loss.attach(trainer)
        before = common.reset_peak(device)
        trainer.train()
        peak = common.peak_mb(device) - before
    # The very first step holds warm-up; the first epoch is timed without it.
    first, second = ends[steps] - ends[1], ends[2 * steps] - ends[steps]
    return {
        "first_epoch_samples_s": batch * (steps - 1) / first,
        "later_epochs_samples_s": batch * steps / second,
        "peak_mb": peak,
    }


def training_steps(args: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and ratios for a few batch sizes."""
    batches = ((64, 128) if not args.quick else (32,)) if args.device == "cpu" else (64, 512, 1024)
    rows = []
    for batch in batches:
        for name in METHODS:
            found = common.in_process(one, name, batch, 3 if args.device == "cpu" else 20, args.device, limit_s=240)
            rows.append({"method": f"training_step_{name}", "batch": batch} | found)
            print(rows[-1], flush=True)
    done = {(r["method"][14:], r["batch"]): r for r in rows if r["status"] == "ok"}
    ratios: dict[str, Any] = {}
    pairs = [("ours", "gist"), *(("ours_cached", peer) for peer in METHODS[3:])]
    for ours, peer in pairs:
        for key in ("first_epoch", "later_epochs"):
            column = f"{key}_samples_s"
            ratios[f"training_step_vs_{peer}_{key}"] = {
                str(b): round(done[ours, b][column] / done[peer, b][column], 2)
                for b in batches
                if (ours, b) in done and (peer, b) in done
            }
    return rows, ratios
