"""Embeddings of texts that begin alike: the shared beginning is read once.

Every query of a task starts with the same instruction, which is often longer than the query. A causal model's states at
these tokens do not depend on what follows, so their keys and values are computed once and handed to every text. The
vectors are those of reading each text whole, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SHORTEST = 6  # tokens; below that, sharing costs more than it saves


def shared_length(rows: Sequence[list[int]]) -> int:
    """Length of the longest common beginning of the rows, at least one token shorter than the shortest row."""
    most = min(len(r) for r in rows) - 1
    first, last = min(rows), max(rows)  # what these two share, all rows between them share
    return next((i for i in range(most) if first[i] != last[i]), most)


def can_share(model: Any) -> bool:
    """Whether `model` (a SentenceTransformer) reads its vector off the last token of a causal decoder, and does no more."""
    pooling = model[1] if len(model) == 2 else None
    config = getattr(getattr(model[0], "model", None), "config", None)
    causal = (
        config is not None and hasattr(config, "num_key_value_heads") and not getattr(config, "use_bidirectional_attention", 0)
    )
    return bool(causal) and getattr(pooling, "pooling_mode", None) == "lasttoken" and model.tokenizer.padding_side == "right"


def encode(model: Any, texts: Sequence[str], batch_size: int) -> np.ndarray:
    """(n, D) float32 unit vectors of `texts`, as `model.encode(texts, normalize_embeddings=True)` gives them."""
    limit = model.max_seq_length or 10**9
    rows = model.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    shared = shared_length(rows) if len(rows) > 1 and can_share(model) else 0
    if shared < SHORTEST:
        found = model.encode(list(texts), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)
    return _encode(model[0].model, rows, shared, batch_size)


def _encode(body: Any, rows: Sequence[list[int]], shared: int, batch_size: int) -> np.ndarray:
    import copy

    import torch

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
