"""GradCache (arXiv 2101.06983) around the guided loss: the batch of the loss is no longer the batch of the encoder.

sentence-transformers' own machinery embeds in mini-batches without a graph, asks for the gradient with respect to the
embeddings, and embeds again with a graph. Ours fills in the loss on embeddings, so cached and uncached agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor

from speed_core.contrastive.guided_loss import GuidedContrastiveLoss, LossInputError


class CachedGuidedContrastiveLoss(CachedLossMixin, GuidedContrastiveLoss):
    """`GuidedContrastiveLoss` with the activations of `mini_batch_size` texts at a time.

    Arguments have the names and the order of sentence-transformers' `CachedGISTEmbedLoss`; `more`: those that
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
        return super().get_config_dict() | {
            "mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }  # fmt: skip
