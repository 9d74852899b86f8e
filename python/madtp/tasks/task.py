# SPDX-License-Identifier: Apache-2.0
"""What compress(), MadtpTrainer and the pictures of tokens need to know of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.utils import ModelOutput


class Task(Protocol):
    """A task's batches, its loss, what is distilled, and how a model is judged.

    A batch is what the model's forward takes by keyword. The leading size of its tensors is the number of samples,
    but for pixel_values where "image_index" (B,) int64 says which of its rows each sample is about.

    A task whose samples would be padded for each other may say in `samples_at_a_time` how many of them a model is
    looked at on together.
    """

    metric: str  # the one of `evaluate` that a model is judged by; in [0, 1], larger is better
    tokenizer: Any  # of Hugging Face, which turns ids back into words in pictures; None where the model reads no text

    def collate(self, items: list) -> dict[str, Tensor]:
        """Items of a data set -> a batch."""

    def loss(self, output: ModelOutput, batch: dict[str, Tensor]) -> Tensor:
        """The scalar loss of what the model returned for a batch."""

    def logits(self, output: ModelOutput, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What the student learns from the teacher: logits (..., classes), and which rows (...) count; None: all."""

    def evaluate(
        self, model: nn.Module, data: Dataset, *, progress: Callable[[Iterable], Iterable] = iter
    ) -> dict[str, float]:
        """The metrics of a model in eval mode on all of `data`; `progress` wraps the batches, for a bar."""

    def predictions(self, model: nn.Module, items: list) -> list[tuple[str, str]]:
        """For each item what a model in eval mode says and what is right, as the captions of a picture."""

    def save_processor(self, directory: Path | str) -> None:
        """Writes what makes inputs, such as the tokenizer, beside a saved model."""
