"""What the guide knows of a batch: embeddings computed once per distinct text, and the collator that carries them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class GuideCache:
    """Guide embeddings, computed once per distinct text; with `path`, also kept in that folder.

    The guide is frozen and in eval mode, and reads the raw text in full precision: neither the student's
    prompt, nor its length limit, nor its autocast reaches it. On disk each call adds one file under a folder
    named by the guide's digest, so that a crash or a second process loses and mixes nothing.
    """

    def __init__(self, guide: Any, path: Any = None, batch_size: int = 64):
        self.guide = guide.eval().requires_grad_(False)
        self.batch_size = batch_size
        self._rows: dict[bytes, np.ndarray] = {}
        self._folder = None if path is None else Path(path, f"guide-{self._digest()}")
        for file in sorted(self._folder.glob("*.npz")) if self._folder is not None else ():
            with np.load(file, allow_pickle=False) as data:
                self._rows.update(zip((k.tobytes() for k in data["keys"]), data["vectors"], strict=True))

    def _digest(self) -> str:
        """Of the weights, and of the structure with pooling, length limit and prompts."""
        limit = getattr(self.guide, "max_seq_length", None)
        parts = (self.guide, limit, self.guide.prompts, self.guide.default_prompt_name)
        h = hashlib.sha256(repr(parts).encode())
        for name, value in sorted(self.guide.state_dict().items()):
            h.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return h.hexdigest()[:16]

    def add(self, texts: Sequence[str]) -> None:
        """Embed the texts that are not known yet."""
        new = {k: t for t in texts if (k := _digest(t)) not in self._rows}
        if not new:
            return
        device = torch.device(getattr(self.guide, "device", "cpu")).type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            vectors: Any = self.guide.encode([*new.values()], batch_size=self.batch_size, show_progress_bar=False)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            keys = np.frombuffer(b"".join(new), np.uint8).reshape(len(new), -1)
            temporary = self._folder / f"{os.getpid()}.tmp"
            with temporary.open("wb") as f:
                np.savez(f, keys=keys, vectors=vectors)
            temporary.replace(self._folder / f"{next(iter(new)).hex()[:16]}-{os.getpid()}.npz")
        self._rows.update(zip(new, vectors.astype(np.float32), strict=True))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), D) float32 embeddings."""
        self.add(texts)
        return torch.from_numpy(np.stack([self._rows[_digest(t)] for t in texts]))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


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
