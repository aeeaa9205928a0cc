"""A sentence-transformers model as mteb sees it, named by the digest of what decides its embeddings.

mteb 2.26 names every locally trained model alike and then serves one model's cached scores for another. So each model here gets a
digest as its revision, and a result cache of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType

from speed_core import console
from speed_core.contrastive.embedder import ADAPTER, build_embedder, instruct, load_trained
from speed_core.contrastive.guide_cache import encoder_digest
from speed_core.files import digest
from speed_core.models import loading, packed

DECIMALS = 6  # of a similarity, in mteb's score and in our items alike
MIN_SHARED = 6  # tokens; below that, sharing a beginning costs more than it saves


class Embedder(AbsEncoder):
    """A sentence-transformers model as mteb sees it, with our query template.

    Its revision is the digest of all that decides its embeddings: weights, structure, tokenizer, length limit, with or without
    the template. Queries of retrieval and reranking get "Instruct: ...\\nQuery: ..."; documents get none. In the symmetric tasks
    (STS, classification, clustering) every text gets it, as in E5-mistral. Each distinct text is encoded once.
    """

    def __init__(self, model: Any, name: str, instructed: bool, batch_size: int = 32, max_length: int | None = None):
        self.model = model
        self.instructed = instructed
        self.batch_size = batch_size
        if max_length:
            self.model.max_seq_length = max_length
        self.vectors: dict[str, np.ndarray] = {}
        revision = digest([encoder_digest(model), instructed])[:16]
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"speed-step-by-step/{name}", "revision": revision})

    def texts(self, raw: Sequence[str], task: Any, prompt_type: Any) -> list[str]:
        """Apply the query template where it belongs."""
        if not self.instructed or prompt_type == PromptType.document:
            return list(raw)
        prompt = task.prompt
        text = prompt.get("query", "") if isinstance(prompt, dict) else prompt
        return [instruct(text or "Represent the text", t) for t in raw]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, D) unit vectors; texts that are new are encoded together."""
        new = list(dict.fromkeys(t for t in texts if t not in self.vectors))
        if new:
            self.vectors.update(zip(new, encode_texts(self.model, new, self.batch_size), strict=True))
        return np.stack([self.vectors[t] for t in texts])

    def encode(self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **_: Any) -> Any:
        raw = [t for batch in inputs for t in batch["text"]]
        # mteb joins an empty title and the text with a space; the items below are the plain texts.
        return self.embed(self.texts([t.strip() for t in raw], task_metadata, prompt_type))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of every pair; the vectors have unit length already. Rounded, so that equal texts tie whatever their place in a batch."""
        return (_tensor(embeddings1) @ _tensor(embeddings2).T).round(decimals=DECIMALS)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of row i with row i, rounded likewise."""
        return (_tensor(embeddings1) * _tensor(embeddings2)).sum(-1).round(decimals=DECIMALS)


def _tensor(value: Any) -> Any:
    return torch.atleast_2d(torch.as_tensor(np.asarray(value), dtype=torch.float32))


def load_encoder(
    path: str | Any, name: str, *, instructed: bool, max_length: int | None = None, batch_size: int = 32, dtype: str = "auto"
) -> Embedder:
    """An Embedder from a saved folder, a hub id, package:NAME, or a loaded SentenceTransformer.

    `dtype` as in `loading.load_causal_lm`; an adapter that was trained here says its own.
    """
    console.quiet()
    model = path
    if isinstance(path, str):
        folder = Path(loading.resolve(path))
        bare = folder.is_dir() and not any((folder / part).exists() for part in (ADAPTER, "modules.json"))
        model = build_embedder(path, max_length or 512, dtype) if bare else load_trained(str(folder), dtype)
    encoder = Embedder(model, name, instructed, batch_size, max_length)
    if isinstance(path, str):  # a model that was handed over stays as it is
        packed.pack(model)
    return encoder


def shared_length(rows: Sequence[list[int]]) -> int:
    """Length of the longest common beginning of the rows, at least one token shorter than the shortest row."""
    most = min(len(r) for r in rows) - 1
    first, last = min(rows), max(rows)  # what these two share, all rows between them share
    return next((i for i in range(most) if first[i] != last[i]), most)


def can_share(model: Any) -> bool:
    """Whether `model` (a SentenceTransformer) reads its vector off the last token of a causal decoder, and does no more."""
    pooling = model[1] if len(model) == 2 else None
    config = getattr(getattr(model[0], "model", None), "config", None)
    causal = hasattr(config, "num_key_value_heads") and not getattr(config, "use_bidirectional_attention", 0)
    return causal and getattr(pooling, "pooling_mode", None) == "lasttoken" and model.tokenizer.padding_side == "right"


def encode_texts(model: Any, texts: Sequence[str], batch_size: int) -> np.ndarray:
    """(n, D) float32 unit vectors of `texts`, as `model.encode(texts, normalize_embeddings=True)` gives them up to rounding.

    Every query of a task starts with the same instruction, which is often longer than the query. A causal model's states at these
    tokens do not depend on what follows, so their keys and values are computed once and handed to every text.
    """
    limit = model.max_seq_length or 10**9
    rows = model.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    shared = shared_length(rows) if len(rows) > 1 and can_share(model) else 0
    if shared < MIN_SHARED:
        found = model.encode(list(texts), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)
    return _encode_tails(model[0].model, rows, shared, batch_size)


def _encode_tails(body: Any, rows: Sequence[list[int]], shared: int, batch_size: int) -> np.ndarray:
    """Encode rows whose first `shared` tokens are the same; keys and values of these are computed once."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    out: Any = np.zeros((len(rows), body.config.hidden_size), np.float32)
    with torch.inference_mode():
        prompt = torch.tensor([rows[0][:shared]], device=body.device)
        known = body(input_ids=prompt, use_cache=True).past_key_values
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            tails = [torch.tensor(rows[i][shared:]) for i in part]
            ids = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True).to(body.device)
            lengths = torch.tensor([len(t) for t in tails])
            mask = (torch.arange(shared + ids.shape[1]) < shared + lengths[:, None]).long().to(body.device)
            cache = copy.deepcopy(known)  # a forward pass appends to it
            cache.batch_repeat_interleave(len(part))
            states = body(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).last_hidden_state
            last = states[torch.arange(len(part)), lengths - 1].float()
            out[part] = torch.nn.functional.normalize(last, dim=1).cpu().numpy()
    return out
