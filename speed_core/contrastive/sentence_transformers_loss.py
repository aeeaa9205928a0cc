"""The guided loss for `SentenceTransformerTrainer`, plain and with GradCache, alone and over several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor
from torch.autograd.function import once_differentiable

from speed_core.contrastive.guide_cache import GuideCache, GuidedCollator, shortened
from speed_core.contrastive.guided_loss import loss_sum
from speed_core.contrastive.loss_inputs import LossInputError, LossSettings


class _Gather(torch.autograd.Function):
    """Rows of all processes in rank order; a row's gradient is the sum over the processes that used it."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, counts: list[int]) -> Tensor:
        ctx.own = slice(start := sum(counts[: dist.get_rank()]), start + len(t))
        padded = t.new_zeros((max(counts), *t.shape[1:]))  # processes must send equal shapes
        padded[: len(t)] = t
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        summed = upstream.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed[ctx.own], None


class GuidedContrastiveLoss(torch.nn.Module):
    """The loss for `SentenceTransformerTrainer` (6.2), with any number of negative columns.

        loss = GuidedContrastiveLoss(model, guide, guide_text=strip_instruction)
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
        loss.attach(trainer).train()

    Columns: anchor, positive, negatives. `attach` makes batches carry the bare texts, which the trainer drops.
    The guide is frozen and held by the cache, not as a module: it is in nobody's parameters, optimizer or
    state dict, and `train()` does not reach it. No guide and no cache: the unguided loss. `guided=True`
    without either expects a `GuidedCollator` that holds the cache.

    Arguments have the names and the order of sentence-transformers' `GISTEmbedLoss`; those after `*` are ours.
    `gather_across_devices`: candidates of all processes, anchors among them (the library leaves those out), so that
    N processes have the loss of one with the whole batch; their shares may differ in size.
    """

    def __init__(
        self, model: Any, guide: Any = None, temperature: float = 0.01, margin_strategy: str = "absolute",
        margin: float = 0.0, contrast_anchors: bool = True, contrast_positives: bool = True,
        gather_across_devices: bool = False, *, guide_cache: GuideCache | Path | str | None = None,
        guide_text: Callable[[str], str] = lambda t: t, guided: bool | None = None,
    ):  # fmt: skip
        super().__init__()
        self.settings = LossSettings(temperature, margin, margin_strategy, contrast_anchors, contrast_positives)
        if guide is model:
            raise LossInputError("guide: is the model itself, which freezing would stop; load a second copy")
        if guide is None and isinstance(guide_cache, (str, Path)):
            raise LossInputError(f"guide_cache {str(guide_cache)!r}: a folder needs a guide to fill it; give guide too")
        self.model = model
        self.cache: GuideCache | None
        if isinstance(guide_cache, GuideCache):
            self.cache = guide_cache
        else:
            self.cache = None if guide is None else GuideCache(guide, guide_cache)
        self.guided = self.cache is not None if guided is None else guided
        self.guide_text, self.gather_across_devices = guide_text, gather_across_devices

    def attach(self, trainer: Any) -> Any:
        """Make the trainer's batches carry the bare texts; returns the trainer."""
        if not isinstance(trainer.data_collator, GuidedCollator):
            trainer.data_collator = GuidedCollator(trainer.data_collator, guide_text=self.guide_text)
        return trainer

    def _guide(self, features: dict[str, Any], column: int) -> Tensor:
        found: Tensor | None = features.get("guide_embedding")
        if found is not None:
            return found
        missing = f"guide embeddings: missing for column {column}"
        if (texts := features.get("guide_text")) is None:
            remedy = "call loss.attach(trainer) before trainer.train()"
            raise LossInputError(f"{missing}, no texts in the batch (keys {sorted(features)}); {remedy}")
        if self.cache is None:
            remedy = "give it one, or set trainer.data_collator to a GuidedCollator with the cache"
            raise LossInputError(f"{missing}, text {shortened(texts[0])}: the loss has neither guide nor guide_cache; {remedy}")
        return self.cache(texts)

    def split(self, sentence_features: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any, Any]:
        """(what the student reads, guide embeddings or None, text ids or None), each a list of columns."""
        features = list(sentence_features)
        if len(features) < 2:
            raise LossInputError(f"sentence_features: {len(features)} text column(s); give anchor, positive[, negatives]")
        ids = [f["text_id"] for f in features] if all("text_id" in f for f in features) else None
        guide = [self._guide(f, i) for i, f in enumerate(features)] if self.guided else None
        ours = ("text_id", "guide_text", "guide_embedding")
        return [{k: v for k, v in f.items() if k not in ours} for f in features], guide, ids

    def loss_of(self, student: list[Tensor], guide: list[Tensor] | None, ids: list[Tensor] | None) -> Tensor:
        """The loss of this process's rows, on embeddings; candidates of all processes if they are gathered."""
        device, count = student[0].device, len(student[0])
        world, total, rows = 1, count, (0, count)
        columns: list[Any] = [student, guide, ids]
        if self.gather_across_devices and dist.is_available() and dist.is_initialized():
            world, rank = dist.get_world_size(), dist.get_rank()
            every = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
            dist.all_gather(every, torch.tensor([count], device=device))
            counts = [int(t) for t in every]
            total, rows = sum(counts), (sum(counts[:rank]), sum(counts[: rank + 1]))
            columns = [given and [_Gather.apply(t.to(device), counts) for t in given] for given in columns]
        of_student, of_guide, of_ids = (given and (given[0], given[1], given[2:]) for given in columns)
        summed = loss_sum(of_student, of_guide, self.settings, of_ids, rows)
        return summed * (world / total)  # the trainer averages over processes, whose shares may differ in size

    def forward(self, sentence_features: Sequence[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        columns, guide, ids = self.split(sentence_features)
        return self.loss_of([self.model(column)["sentence_embedding"] for column in columns], guide, ids)

    def get_config_dict(self) -> dict[str, Any]:
        return {"guided": self.guided, **asdict(self.settings), "gather_across_devices": self.gather_across_devices}


class CachedGuidedContrastiveLoss(CachedLossMixin, GuidedContrastiveLoss):
    """The same with the activations of `mini_batch_size` texts at a time (GradCache, arXiv 2101.06983), for a batch larger
    than memory.

    sentence-transformers embeds in mini-batches without a graph, asks for the gradient with respect to the embeddings, and
    embeds again with a graph. Arguments have the names and the order of its `CachedGISTEmbedLoss`; `more`: those that
    `GuidedContrastiveLoss` takes by keyword only.
    """

    def __init__(
        self, model: Any, guide: Any = None, temperature: float = 0.01, mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None, show_progress_bar: bool = False, margin_strategy: str = "absolute",
        margin: float = 0.0, contrast_anchors: bool = True, contrast_positives: bool = True,
        gather_across_devices: bool = False, **more: Any,
    ):  # fmt: skip
        super().__init__(
            model, guide, temperature, margin_strategy, margin, contrast_anchors, contrast_positives,
            gather_across_devices, **more,
        )  # fmt: skip
        if mini_batch_size < 1:
            raise LossInputError(f"mini_batch_size {mini_batch_size}: needs at least 1 text at a time")
        if mini_batch_num_tokens is not None and mini_batch_num_tokens < 1:
            raise LossInputError(f"mini_batch_num_tokens {mini_batch_num_tokens}: needs at least 1, or None for no such limit")
        self.mini_batch_size, self.mini_batch_num_tokens = mini_batch_size, mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def embed_minibatch(self, sentence_feature: dict[str, Any], begin: int, end: int, *given: Any, **more: Any) -> Any:
        """The library's, without the padding that no text of the mini-batch needs."""
        mask = sentence_feature.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            width = int(mask[begin:end].any(0).nonzero().max()) + 1
            same = {k: v[:, :width] for k, v in sentence_feature.items() if getattr(v, "shape", ())[:2] == mask.shape}
            sentence_feature = {**sentence_feature, **same}
        return super().embed_minibatch(sentence_feature, begin, end, *given, **more)

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """The loss of embeddings in mini-batches; `labels` carries (guide embeddings, text ids)."""
        loss = self.loss_of([torch.cat(column) for column in reps], *labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def forward(self, sentence_features: Sequence[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        columns, guide, ids = self.split(sentence_features)
        carried: Any = (guide, ids)
        return self.forward_cached(columns, carried)

    def get_config_dict(self) -> dict[str, Any]:
        sizes = {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}
        return super().get_config_dict() | sizes
