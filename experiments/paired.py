# SPDX-License-Identifier: Apache-2.0
"""How good the difference of two models on the same test set is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from madtp.inference import evaluating
from madtp.tasks.captioning import CaptioningTask, caption_scores
from madtp.tasks.retrieval import RetrievalTask
from madtp.tasks.task import Task

GROUPS = 20  # of neighbouring samples: questions about one image are together
BATCH_SIZE = 256


def difference_error(task: Task, models: tuple[nn.Module, nn.Module], data: Dataset) -> float:
    """The standard error of the difference of `task.metric` between two models, which chance in the test set makes.

    Samples on which both do the same add nothing to it.
    """
    score = _bleu if isinstance(task, CaptioningTask) else fmean
    first, second = (outcomes(task, model, data) for model in models)
    return jackknife(score, first, second)


def outcomes(task: Task, model: nn.Module, data: Dataset) -> list:
    """For each sample what its share of the metric comes from: whether it is right, the part of the two ways in which
    it is found, or the caption with its references."""
    found: list = []
    with evaluating(model):
        if isinstance(task, RetrievalTask):
            return _hits(model, [data[i] for i in range(len(data))])  # type: ignore[arg-type]  # it has a length
        for items in DataLoader(data, batch_size=BATCH_SIZE, collate_fn=list):
            said = task.predictions(model, items)
            if isinstance(task, CaptioningTask):
                found += [(caption, item["references"]) for (caption, _), item in zip(said, items, strict=True)]
            else:
                found += [float(answer == right) for answer, right in said]
    return found


def jackknife(score: Callable[[Sequence], float], first: Sequence, second: Sequence) -> float:
    """The standard error of score(first) - score(second), where the two are of the same samples: what the difference
    moves by when a group of samples is left out (delete-a-group jackknife, Kott 2001)."""
    groups = min(GROUPS, len(first))
    ends = [len(first) * i // groups for i in range(groups + 1)]
    without = []
    for start, end in zip(ends, ends[1:], strict=False):
        left = [[*of[:start], *of[end:]] for of in (first, second)]
        without.append(score(left[0]) - score(left[1]))
    middle = fmean(without)
    return ((groups - 1) / groups * sum((value - middle) ** 2 for value in without)) ** 0.5


def _hits(model: nn.Module, items: list[dict]) -> list[float]:
    """For each pair: 0, 0.5 or 1, how many of its image and its text find the other first."""
    names = ("input_ids", "attention_mask", "pixel_values")
    device = next(model.parameters()).device
    batch = default_collate([{name: item[name] for name in names} for item in items])
    similar = model(**{name: value.to(device) for name, value in batch.items()}).logits_per_image  # (B, B)
    concepts = torch.tensor([item["concept"] for item in items], device=device)
    ways = [concepts[scores.argmax(-1)] == concepts for scores in (similar, similar.T)]
    return torch.stack(ways).float().mean(0).tolist()


def _bleu(captions: Sequence[tuple[str, Sequence[str]]]) -> float:
    said, references = zip(*captions, strict=True)
    return caption_scores(said, references)["bleu4"]
