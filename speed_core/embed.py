"""Embedding fine-tuning (SPEED section 3.3): LoRA on a decoder, last-token pooling, contrastive loss.

Queries carry the template "Instruct: {task}\\nQuery: {query}", documents none. The result is saved as
a sentence-transformers model, adapter merged, that `SentenceTransformer(path)` loads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed_core import models, sft
from speed_core.artifacts import UserError
from speed_core.guided_loss import GuideCache, GuidedCollator, GuidedContrastiveLoss
from speed_core.profile import Embedding

SYMMETRIC = ("sts", "short_short", "long_long")  # both sides are of one sort, but only the query is instructed


def instruct(task: str, query: str) -> str:
    """The E5-mistral query template that SPEED keeps."""
    return f"Instruct: {task}\nQuery: {query}"


def bare(text: str) -> str:
    """Take the template off again; what the guide reads."""
    return text.split("\nQuery: ", 1)[1] if text.startswith("Instruct: ") and "\nQuery: " in text else text


def build(name: str, max_length: int, dtype: str = "bfloat16") -> Any:
    """A fresh sentence-transformers model: causal decoders pool the last token, encoders the mean.

    Decoders get <eos> behind every text (the vector is read there) and <bos> before it, through the
    tokenizer itself, so that the saved model does the same wherever it is loaded.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoConfig

    sft.quiet()
    folder = models.resolve(name)
    if Path(folder, "modules.json").is_file():
        model = SentenceTransformer(folder, device=str(models.device()))
        model.max_seq_length = max_length
        return model
    config = AutoConfig.from_pretrained(folder)
    decoder = any("CausalLM" in a or "LMHead" in a for a in (config.architectures or []))
    body = Transformer(folder, max_seq_length=max_length, model_kwargs={"dtype": getattr(torch, dtype)})
    pooling = Pooling(config.get_text_config().hidden_size, pooling_mode="lasttoken" if decoder else "mean")
    if decoder:
        frame(body.tokenizer)
    return SentenceTransformer(modules=[body, pooling], device=str(models.device()))


def frame(tokenizer: Any) -> None:
    """Make a fast tokenizer put <bos> before and <eos> behind every text, and pad on the right."""
    from tokenizers.processors import TemplateProcessing

    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in (bos, eos) if t is not None]
    single = " ".join(([bos] if bos else []) + ["$A"] + ([eos] if eos else []))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = eos
    ids = tokenizer("a")["input_ids"]
    if (eos and ids[-1] != tokenizer.eos_token_id) or (bos and ids[0] != tokenizer.bos_token_id):
        raise UserError(f"tokenizer: frames a text as {ids}, expected <bos> ... <eos>; use a fast tokenizer")


def triplets(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, str]]:
    """Training rows {anchor, positive, negative}, shuffled by `seed`.

    The two matching kinds have no negative, in the paper and here. A batch needs one shape, so such a
    row takes the positive of the next matching row as its negative: an in-batch negative, written out.
    """
    from speed_core.teacher import shuffled

    out = []
    ordered = shuffled(rows, seed)
    positives = [r["positive"] for r in ordered if r["negative"] is None]
    at = 0
    for row in ordered:
        negative = row["negative"]
        if negative is None:
            at += 1
            negative = positives[at % len(positives)] if len(positives) > 1 else ordered[0]["positive"]
        out.append({"anchor": instruct(row["instruction"], row["query"]), "positive": row["positive"], "negative": negative})
    return out


def train(
    base: str,
    rows: Sequence[dict[str, Any]],
    settings: Embedding,
    *,
    guide: str,
    guide_cache: Path,
    seed: int,
    output: Path,
    label: str = "embed",
) -> dict[str, Any]:
    """Fine-tune `base` on synthetic records ({instruction, query, positive, negative|null}).

    Saves a sentence-transformers model in `output` and returns {"history", "rows", "seconds"}.
    `settings.guided` decides between the guided loss and InfoNCE over the same candidates.
    """
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.base.sampler import BatchSamplers

    sft.quiet()
    if len(rows) < settings.batch:
        raise UserError(
            f"{label}: {len(rows)} records, one batch needs {settings.batch}; synthesise more or lower embedding.batch"
        )
    if settings.micro_batch != settings.batch:
        raise UserError(
            f"{label}: micro_batch {settings.micro_batch} is not batch {settings.batch}; in-batch negatives need the whole batch at once"
        )
    torch.manual_seed(seed)
    model = build(base, settings.max_length, settings.dtype)
    if settings.lora is not None:
        model[0].model = get_peft_model(model[0].model, sft.lora_config(settings.lora, "FEATURE_EXTRACTION"))
    cache = GuideCache(SentenceTransformer(models.resolve(guide), device=str(models.device())), guide_cache)
    arguments = sft.trainer_arguments(settings, seed, output / "trainer", batch_sampler=BatchSamplers.NO_DUPLICATES)
    trainer: Any = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**arguments),
        train_dataset=Dataset.from_list(triplets(rows[: settings.examples], seed)),
        loss=GuidedContrastiveLoss(model, guided=settings.guided, temperature=settings.temperature, margin=settings.margin),
        callbacks=[sft.bar_callback(label)],
    )
    trainer.data_collator = GuidedCollator(trainer.data_collator, cache if settings.guided else None, bare)
    sft.remove_printer(trainer)
    trainer.train()
    history = sft.check_history(trainer.state.log_history, label)
    if settings.lora is not None:
        model[0].model = model[0].model.merge_and_unload()
    model[0].model.to(getattr(torch, settings.dtype))
    model.save_pretrained(str(output), create_model_card=False)
    facts = {"history": history, "rows": min(len(rows), settings.examples), "guided": settings.guided}
    (output / "training.json").write_text(json.dumps(facts, indent=1))
    return facts
