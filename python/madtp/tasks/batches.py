# SPDX-License-Identifier: Apache-2.0
"""Samples of a data set as batches on which a model is looked at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from madtp.tasks.task import Task

BATCH_SIZE = 64  # samples that run at a time, where a task says no other number
MAX_BATCHES = 32  # of samples on which a model is looked at


def sample_count(data: Dataset) -> int:
    """Of a data set with a length, which torch does not declare."""
    return len(data)  # type: ignore[arg-type]


def require_samples(**data: Dataset | None) -> None:
    """Raises ValueError, with its name, for a data set that is given and empty."""
    for name, samples in data.items():
        if samples is not None and not sample_count(samples):
            raise ValueError(f"{name} must hold samples, got none")


def sample_batches(
    task: Task, data: Dataset, count: int, device: torch.device | str = "cpu"
) -> list[dict[str, Tensor]]:
    """Batches of `count` items spread over the data (all, if fewer; no more than `MAX_BATCHES` hold), every sample with
    its own copy of its image."""
    total, size = sample_count(data), getattr(task, "samples_at_a_time", BATCH_SIZE)
    count = min(count, MAX_BATCHES * size)
    chosen = [int(i * max(1.0, total / count)) for i in range(min(count, total))]
    batches = []
    for start in range(0, len(chosen), size):
        batch = task.collate([data[i] for i in chosen[start : start + size]])
        index = batch.pop("image_index", None)
        if index is not None:
            batch["pixel_values"] = batch["pixel_values"][index]
        batches.append({name: value.to(device) for name, value in batch.items()})
    return batches
