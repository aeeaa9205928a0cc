"""Embedding fine-tuning (SPEED section 3.3): LoRA on a decoder, the guided loss over synthetic triplets."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from torch import Tensor
from transformers import Trainer

from speed_core import console, machine
from speed_core.contrastive.embedder import ADAPTER, build_embedder, instruct, strip_instruction
from speed_core.contrastive.guide_cache import GuideCache, GuidedCollator
from speed_core.contrastive.sentence_transformers_loss import CachedGuidedContrastiveLoss, GuidedContrastiveLoss
from speed_core.files import UserError, write_json
from speed_core.models import adapters, compute_type, loading, packed, training
from speed_core.profile import Embedding

CPU_ROWS = 4  # texts in one forward pass on a CPU
# ... where word vectors are trained too: each pass then fills a gradient as large as the vocabulary (a student of notebook 07b
# on one core: 7.2 s, with 4 texts at a time 12.2 s).
CPU_ROWS_WHOLE = 64


def triplets(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, str]]:
    """Training rows {anchor, positive, negative}, shuffled by `seed`.

    The two matching kinds have no negative, in the paper and here. A batch needs one shape, so such a
    row takes the positive of the next matching row as its negative: an in-batch negative, written out.
    """
    out, ordered = [], list(rows)
    random.Random(seed).shuffle(ordered)
    positives = [r["positive"] for r in ordered if r["negative"] is None]
    at = 0
    for row in ordered:
        negative = row["negative"]
        if negative is None:
            at += 1
            negative = positives[at % len(positives)] if len(positives) > 1 else ordered[0]["positive"]
        out.append({"anchor": instruct(row["instruction"], row["query"]), "positive": row["positive"], "negative": negative})
    return out


def embed_by_length(model: SentenceTransformer, columns: Sequence[dict[str, Tensor]], rows: int) -> list[Tensor]:
    """Embeddings [(B, D)] of right-padded columns {input_ids, attention_mask, ...} (B, T), `rows` texts of like length at a time.

    Queries are short and documents long, in a column too: padded together, half of the work would be on padding.
    """
    shape, width = columns[0]["attention_mask"].shape, max(c["attention_mask"].shape[1] for c in columns)
    keys = [k for k, v in columns[0].items() if getattr(v, "shape", None) == shape]
    pad = torch.nn.functional.pad  # with zeros, since nothing past the mask is read
    together = {k: torch.cat([pad(c[k], (0, width - c[k].shape[1])) for c in columns]) for k in keys}
    order, parts = training.by_length(together, rows)
    embedded = torch.cat([model(part)["sentence_embedding"] for part in parts])[order.argsort()]
    return list(embedded.split([len(c["attention_mask"]) for c in columns]))


class _WholeBatchLoss(GuidedContrastiveLoss):
    """The guided loss with the activations of the whole batch; on a CPU it embeds the batch in parts of like length."""

    def forward(self, sentence_features: Any, labels: Any = None) -> Tensor:
        columns, guide, ids = self.split(sentence_features)
        # `embed_by_length` cuts on the right: what is padded on the left is embedded whole.
        if machine.device().type == "cuda" or not all(c["attention_mask"][:, 0].all() for c in columns):
            return super().forward(sentence_features, labels)
        whole = self.model[0].model.get_input_embeddings().weight.requires_grad
        return self.loss_of(embed_by_length(self.model, columns, CPU_ROWS_WHOLE if whole else CPU_ROWS), guide, ids)


class _Trainer(SentenceTransformerTrainer):
    """A checkpoint holds the weights that are trained. The library's own would be read as a model without its adapter."""

    _load_from_checkpoint: Any = Trainer._load_from_checkpoint

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file({n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}, f"{output_dir}/model.safetensors")


def train_embedder(
    base: str, rows: Sequence[dict[str, Any]], settings: Embedding,
    *, guide: str, guide_cache: Path, seed: int, output: Path, label: str = "embed", cache: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune `base` on synthetic records ({instruction, query, positive, negative|null}).

    Every row of a batch is a candidate for every other, also over several processes. `settings.micro_batch` below a process's share
    of the batch bounds the memory (GradCache, arXiv 2101.06983): each text is embedded twice, the loss is the same.
    `cache` keeps checkpoints where `settings.save_steps` asks for them; an interrupted run goes on from the last one.
    Saves an adapter that `load_trained` reads (without `settings.lora`: a sentence-transformers model) in `output` and
    returns {"history", "rows", "guided"}. `settings.guided` decides between the guided loss and InfoNCE over the same candidates.
    """
    console.quiet()
    machine.end_idle()
    if len(rows) < settings.batch:
        raise UserError(
            f"{label}: {len(rows)} records, one batch needs {settings.batch}; synthesise more or lower embedding.batch"
        )
    share = max(1, settings.batch // training.processes())
    torch.manual_seed(seed)
    how: dict[str, Any] = {"max_length": settings.max_length, "dtype": settings.dtype, "pooling": settings.pooling}
    weights = compute_type.choose(settings.dtype, training=True, folder=loading.resolve(base)).weights
    model = build_embedder(base, **how | {"dtype": weights})
    body: Any = model[0]
    if settings.lora is not None:
        body.model = get_peft_model(body.model, training.lora_config(settings.lora, body.model, "FEATURE_EXTRACTION"))
        packed.pack(body.model, training=True)
    known = GuideCache(loading.sentence_transformer(guide, "float32"), guide_cache)
    if os.environ.get("ACCELERATE_USE_FSDP") and (layers := getattr(body.model, "_no_split_modules", None)):
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(layers)  # what FSDP splits; a SentenceTransformer names none
    arguments = training.trainer_arguments(
        settings.model_copy(update={"micro_batch": share}), seed, output / "trainer", loading.resolve(base),
        batch_sampler=BatchSamplers.NO_DUPLICATES, gradient_checkpointing=settings.gradient_checkpointing,
    )  # fmt: skip
    loss_settings: dict[str, Any] = {
        "guided": settings.guided, "temperature": settings.temperature, "margin": settings.margin,
        "gather_across_devices": training.processes() > 1,
    }  # fmt: skip
    loss = (
        CachedGuidedContrastiveLoss(model, mini_batch_size=settings.micro_batch, **loss_settings)
        if settings.micro_batch < share
        else _WholeBatchLoss(model, **loss_settings)
    )
    trainer: Any = _Trainer(
        model=model,
        args=training.one_gpu(SentenceTransformerTrainingArguments(**arguments)),
        train_dataset=Dataset.from_list(data := triplets(rows[: settings.examples], seed)),
        loss=loss,
        callbacks=[training.bar_callback(label)],
    )
    trainer.data_collator = GuidedCollator(trainer.data_collator, known if settings.guided else None, strip_instruction)
    facts = {
        "history": training.train(trainer, label, settings, cache, rows=data, models=[*map(loading.model_id, (base, guide))]),
        "rows": min(len(rows), settings.examples),
        "guided": settings.guided,
    }

    def save(trained: Any, gathered: Any) -> None:
        if settings.lora is not None:
            adapters.save_adapter(trained, output / ADAPTER, base, gathered)
            write_json(output / ADAPTER / "body.json", {"base": base, **how})
        else:
            trained.to(compute_type.torch_type(weights))
            model.save_pretrained(str(output), create_model_card=False)

    return training.finish(trainer, body.model, output, facts, save)
