# SPDX-License-Identifier: Apache-2.0
"""Statements about two images, true or false (NLVR2, Suhr et al., ACL 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from madtp.inference import evaluating
from madtp.tasks.batches import sample_count
from madtp.tasks.processors import Processed


class NlvrTask(Processed):
    """With `madtp.models.BlipForNLVR`.

    Items are dicts: pixel_values (2, 3, H, W), input_ids and attention_mask (L,), labels (), 1 for true.

    Args:
        tokenizer, image_processor: of Hugging Face, saved beside a model; the latter may be None.
    """

    metric = "accuracy"

    def collate(self, items: list[dict]) -> dict[str, Tensor]:
        """pixel_values (B, 2, 3, H, W), input_ids, attention_mask (B, L), labels (B,)."""
        return default_collate(items)

    def loss(self, output, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy, as the model computed it."""
        return output.loss

    def logits(self, output, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        """(B, 2), of false and true."""
        return output.logits, None

    def evaluate(
        self, model: nn.Module, data: Dataset, *, batch_size: int = 64, progress: Callable[[Iterable], Iterable] = iter
    ) -> dict[str, float]:
        """{"accuracy": fraction of the statements judged right}, with the model in eval mode.

        progress wraps the batches, for a bar.
        """
        device = next(model.parameters()).device
        correct = 0
        with evaluating(model):
            for batch in progress(DataLoader(data, batch_size=batch_size, collate_fn=self.collate)):
                batch = {name: value.to(device) for name, value in batch.items()}
                correct += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return {"accuracy": correct / max(1, sample_count(data))}

    @torch.no_grad()
    def predictions(self, model: nn.Module, items: list[dict]) -> list[tuple[str, str]]:
        """For each item "true" or "false" as a model in eval mode says it, and as it is."""
        device = next(model.parameters()).device
        batch = {name: value.to(device) for name, value in self.collate(items).items()}
        said = model(**batch).logits.argmax(-1)
        names = ("false", "true")
        return [(names[a], names[b]) for a, b in zip(said.tolist(), batch["labels"].tolist(), strict=True)]
