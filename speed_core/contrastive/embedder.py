"""Embedding fine-tuning (SPEED section 3.3): LoRA on a decoder, last-token pooling, contrastive loss.

Queries carry the template "Instruct: {task}\\nQuery: {query}", documents none. With LoRA the result is the adapter
alone (15 MB where the merged model has 540), which `load_trained` puts on its base; `merged` writes the whole model for
`SentenceTransformer(path)`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speed_core import console, machine
from speed_core.contrastive.guided_loss import GuideCache, GuidedCollator, GuidedContrastiveLoss
from speed_core.files import UserError, write_json
from speed_core.models import compute_type, loading, training

if TYPE_CHECKING:  # a GPU can be checked without pydantic
    from speed_core.profile import Embedding

ADAPTER = "adapter"
CPU_ROWS = 4  # texts in one forward pass on a CPU, in training
# ... where word vectors are trained too: each pass then fills a gradient as large as the vocabulary (a student of notebook 07
# on one core: 7.2 s, with 4 texts at a time 12.2 s).
CPU_ROWS_WHOLE = 64
SYMMETRIC = ("sts", "short_short", "long_long")  # both sides are of one sort, but only the query is instructed


def instruct(task: str, query: str) -> str:
    """The E5-mistral query template that SPEED keeps."""
    return f"Instruct: {task}\nQuery: {query}"


def bare(text: str) -> str:
    """Take the template off again; what the guide reads."""
    return text.split("\nQuery: ", 1)[1] if text.startswith("Instruct: ") and "\nQuery: " in text else text


def build(name: str, max_length: int, dtype: str = "auto", pooling: str = "last") -> Any:
    """A fresh sentence-transformers model: causal decoders pool the last token (or the mean), encoders the mean.

    Decoders get <eos> behind every text (the vector is read there) and <bos> before it, through the
    tokenizer itself, so that the saved model does the same wherever it is loaded.
    """
    console.quiet()
    folder = loading.resolve(name)
    dtype = compute_type.choose(dtype, folder=folder).name
    if machine.device().type == "cpu":
        # Most of the time to load gemma-3-270m goes into its vocabulary, and the study loads it some eighty times.
        known = _known(folder, dtype, pooling)
        # What never changes of the tokenizer is shared: copying its 262,144 words and 514,906 merges takes 2.5 s.
        parts = vars(known.tokenizer).values()
        shared = [v for v in parts if type(v).__name__ == "Tokenizer" or (isinstance(v, (dict, list)) and len(v) > 1000)]
        model = copy.deepcopy(known, {id(v): v for v in shared})
    else:
        model = _read(folder, dtype, pooling)
    model.max_seq_length = max_length
    return model


def _read(folder: str, dtype: str, pooling: str) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoConfig

    if Path(folder, "modules.json").is_file():
        return loading.sentence_transformer(folder, dtype)
    config = AutoConfig.from_pretrained(folder)
    decoder = any("CausalLM" in a or "LMHead" in a for a in (config.architectures or []))
    body = Transformer(folder, model_kwargs={"dtype": compute_type.torch_type(dtype)})
    mode = "lasttoken" if decoder and pooling == "last" else "mean"
    head = Pooling(config.get_text_config().hidden_size, pooling_mode=mode)
    if decoder:
        frame(body.tokenizer)
    return SentenceTransformer(modules=[body, head], device=str(machine.device()))


_known = lru_cache(maxsize=1)(_read)


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
    from speed_core.data.teacher import shuffled

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


def by_length(model: Any, columns: Sequence[dict[str, Any]], rows: int) -> list[Any]:
    """Embeddings [(B, D)] of right-padded columns {input_ids, attention_mask, ...} (B, T), `rows` texts of like length at a time.

    Queries are short and documents long, in a column too: padded together, half of the work would be on padding.
    """
    import torch

    lengths = torch.cat([c["attention_mask"].sum(1) for c in columns])
    keys = [k for k, v in columns[0].items() if getattr(v, "shape", None) == columns[0]["attention_mask"].shape]
    where = [(c, i) for c in range(len(columns)) for i in range(len(columns[c]["attention_mask"]))]
    order = lengths.argsort(descending=True, stable=True)
    found = []
    for part in order.split(rows):
        width = int(lengths[part[0]])
        batch = {}
        for key in keys:
            each = [columns[c][key][i, :width] for c, i in (where[int(k)] for k in part)]
            # What lies past the mask is never read, so zeros will do.
            batch[key] = torch.stack([torch.nn.functional.pad(t, (0, width - len(t))) for t in each])
        found.append(model(batch)["sentence_embedding"])
    together = torch.cat(found)[order.argsort()]
    return list(together.split([len(c["attention_mask"]) for c in columns]))


class _Loss(GuidedContrastiveLoss):
    """The guided loss; on a CPU it embeds a batch in parts of like length."""

    def forward(self, sentence_features: Any, labels: Any = None) -> Any:
        columns, guide, ids = self.split(sentence_features)
        # `by_length` cuts on the right: what is padded on the left is embedded whole.
        if machine.device().type == "cuda" or not all(c["attention_mask"][:, 0].all() for c in columns):
            return super().forward(sentence_features, labels)
        whole = self.model[0].model.get_input_embeddings().weight.requires_grad
        return self.loss_of(by_length(self.model, columns, CPU_ROWS_WHOLE if whole else CPU_ROWS), guide, ids)


def load_trained(path: Path | str, dtype: str = "stored") -> Any:
    """The sentence-transformers model that `train` left in `path`, adapter merged; `dtype` for one that has no adapter.

    Raises UserError when the adapter belongs to other weights than the base's name stands for now.
    """
    console.quiet()
    adapter = Path(path) / ADAPTER
    if not adapter.is_dir():
        return loading.sentence_transformer(str(path), dtype)
    from peft import PeftModel

    how = json.loads((adapter / "body.json").read_text(encoding="utf-8"))
    loading.check_adapter(adapter, base := how.pop("base"))
    model = build(base, **how)
    model[0].model = PeftModel.from_pretrained(model[0].model, str(adapter)).merge_and_unload()
    return model


def merged(path: Path | str, output: Path) -> Path:
    """Write what `train` left in `path` as a whole sentence-transformers model, for tools that know nothing of us."""
    load_trained(path).save_pretrained(str(output), create_model_card=False)
    return output


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

    Saves an adapter that `load_trained` reads (without `settings.lora`: a sentence-transformers model) in `output` and
    returns {"history", "rows", "guided"}. `settings.guided` decides between the guided loss and InfoNCE over the same candidates.
    """
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.base.sampler import BatchSamplers

    console.quiet()
    machine.end_idle()
    if len(rows) < settings.batch:
        raise UserError(
            f"{label}: {len(rows)} records, one batch needs {settings.batch}; synthesise more or lower embedding.batch"
        )
    if settings.micro_batch != settings.batch:
        raise UserError(
            f"{label}: micro_batch {settings.micro_batch} is not batch {settings.batch}; in-batch negatives need the whole batch at once"
        )
    torch.manual_seed(seed)
    how: dict[str, Any] = {"max_length": settings.max_length, "dtype": settings.dtype, "pooling": settings.pooling}
    kind = compute_type.choose(settings.dtype, training=True, folder=loading.resolve(base)).weights
    model = build(base, **how | {"dtype": kind})
    if settings.lora is not None:
        model[0].model = get_peft_model(model[0].model, training.lora_config(settings.lora, "FEATURE_EXTRACTION"))
    cache = GuideCache(loading.sentence_transformer(guide, "float32"), guide_cache)
    arguments = training.trainer_arguments(
        settings, seed, output / "trainer", loading.resolve(base), batch_sampler=BatchSamplers.NO_DUPLICATES
    )
    trainer: Any = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**arguments),
        train_dataset=Dataset.from_list(triplets(rows[: settings.examples], seed)),
        loss=_Loss(model, guided=settings.guided, temperature=settings.temperature, margin=settings.margin),
        callbacks=[training.bar_callback(label)],
    )
    trainer.data_collator = GuidedCollator(trainer.data_collator, cache if settings.guided else None, bare)
    training.remove_printer(trainer)
    trainer.train()
    history = training.check_history(trainer.state.log_history, label)
    if settings.lora is not None:
        training.save_adapter(model[0].model, output / ADAPTER, base)
        write_json(output / ADAPTER / "body.json", {"base": base, **how})
    else:
        model[0].model.to(compute_type.torch_type(kind))
        model.save_pretrained(str(output), create_model_card=False)
    facts = {"history": history, "rows": min(len(rows), settings.examples), "guided": settings.guided}
    (output / "training.json").write_text(json.dumps(facts, indent=1))
    return facts
