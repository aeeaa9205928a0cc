"""What the guide knows of a batch: embeddings computed once per distinct text, and the collator that carries them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from speed_core.files import UserError, write_atomically
from speed_core.models.weights import OF_FILES


class GuideCache:
    """Guide embeddings, computed once per distinct text; with `path`, also kept in that folder.

    The guide is frozen and in eval mode, and reads the raw text in full precision: neither the student's
    prompt, nor its length limit, nor its autocast reaches it. On disk each call with new texts adds one file
    under a folder named by the guide's digest, so that a crash or a second process loses and mixes nothing.

    In memory: every row, of the folder too, 4 D bytes a text in float32 and some 200 of key and objects. On disk: as
    many files as calls had new texts (at most one a step and column in the first epoch, none in later ones); to
    have a single one, call `add` with all texts before training.
    """

    def __init__(self, guide: Any, path: Path | str | None = None, batch_size: int = 64):
        self.guide = guide.eval().requires_grad_(False)
        self.batch_size = batch_size
        self._rows: dict[bytes, np.ndarray] = {}
        self._folder = None if path is None else Path(path, f"guide-{encoder_digest(self.guide)}")
        for file in sorted(self._folder.glob("*.npz")) if self._folder is not None else ():
            with np.load(file, allow_pickle=False) as data:
                self._rows.update(zip((k.tobytes() for k in data["keys"]), data["vectors"], strict=True))

    def add(self, texts: Sequence[str]) -> None:
        """Embed the texts that are not known yet."""
        new = {k: t for t in texts if (k := _digest(t)) not in self._rows}
        if not new:
            return
        device = torch.device(getattr(self.guide, "device", "cpu")).type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            vectors: Any = self.guide.encode([*new.values()], batch_size=self.batch_size, show_progress_bar=False)
        if (bad := ~np.isfinite(vectors).all(1)).any():
            text = [*new.values()][int(bad.argmax())]
            raise UserError(
                f"guide embeddings: not finite for the text {shortened(text)}; load the guide in float32 and check it"
            )
        if self._folder is not None:
            keys = np.frombuffer(b"".join(new), np.uint8).reshape(len(new), -1)
            np.savez(file := io.BytesIO(), keys=keys, vectors=vectors)
            # Two caches of one process may write at the same time, so each call has a name of its own.
            write_atomically(self._folder / f"{uuid4().hex}.npz", file.getvalue())
        self._rows.update(zip(new, vectors.astype(np.float32), strict=True))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), D) float32 embeddings."""
        self.add(texts)
        return torch.from_numpy(np.stack([self._rows[_digest(t)] for t in texts]))


def encoder_digest(model: Any) -> str:
    """Short digest (hex) of all that decides the embeddings of a SentenceTransformer: weights and their types, configuration,
    tokenizer, and the structure with pooling, length limit, dimension and prompts."""
    named = ("max_seq_length", "truncate_dim", "prompts", "default_prompt_name")
    tokenizer = getattr(model, "tokenizer", None)
    sides = (getattr(tokenizer, "truncation_side", None), getattr(tokenizer, "padding_side", None))
    parts = (model, *(getattr(model, name, None) for name in named), *_configurations(model), sides)
    h = hashlib.sha256(repr(parts).encode())
    h.update(_tokenizer(tokenizer).encode("utf-8", "surrogatepass"))
    for name, value in sorted(model.state_dict().items()):
        h.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()[:16]


def _configurations(model: Any) -> list[str]:
    """What the models inside say of themselves (heads, windows, positions), without names of files and versions."""
    configs = (getattr(module, "config", None) for module in getattr(model, "modules", list)())
    found = {id(c): c.to_dict() for c in configs if c is not None and hasattr(c, "to_dict")}.values()
    each = ({k: v for k, v in values.items() if k not in OF_FILES} for values in found)
    return sorted({json.dumps(values, sort_keys=True, default=str) for values in each})


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _tokenizer(tokenizer: Any) -> str:
    """Vocabulary and rules; not the truncation and padding, which every call sets anew."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        return _without_limits(backend.to_str())
    vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else None
    return repr((type(tokenizer).__name__, vocabulary, getattr(tokenizer, "do_lower_case", None)))


# Reading the 262,144 words of gemma-3-270m takes 3 s, and a study scores some sixty models of one tokenizer.
@lru_cache(maxsize=2)
def _without_limits(tokenizer: str) -> str:
    return json.dumps(json.loads(tokenizer) | {"truncation": None, "padding": None}, sort_keys=True)


def shortened(text: str) -> str:
    """A text as an error quotes it."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


class GuidedCollator:
    """Wraps the trainer's collator; adds ids and bare texts of each text column to the batch.

    The keys `COLUMN_text_id` and `COLUMN_guide_text` reach the loss as `text_id` and `guide_text`. With
    a `cache` the embeddings are looked up here instead and travel as `guide_embedding`. `guide_text`
    turns a training text into what the guide reads (to take an instruction off again).
    """

    def __init__(self, inner: Any, cache: GuideCache | None = None, guide_text: Callable[[str], str] = lambda t: t):
        self.inner, self.cache, self.guide_text = inner, cache, guide_text

    # The trainer reads settings off its collator (label columns, ...): hand them through.
    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet while a copy is being unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.inner(features)
        for name, value in features[0].items():
            if not isinstance(value, str) or name == "dataset_name":
                continue
            column = [self.guide_text(f[name]) for f in features]
            # From the text alone, so that ids of different processes can be compared.
            ids = [int.from_bytes(_digest(t)[:8], "big", signed=True) for t in column]
            batch[f"{name}_text_id"] = torch.tensor(ids)
            key = f"{name}_guide_text" if self.cache is None else f"{name}_guide_embedding"
            batch[key] = column if self.cache is None else self.cache(column)
        return batch
