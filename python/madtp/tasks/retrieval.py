# SPDX-License-Identifier: Apache-2.0
"""Image-text retrieval with dual encoders: contrastive loss, recall in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from madtp.inference import evaluating
from madtp.tasks.processors import Processed

RANKS = (1, 5, 10)
CHUNK = 1024  # queries whose similarities are held at a time


@runtime_checkable
class DualEncoder(Protocol):
    """A model with features of images and of texts, each by itself."""

    def get_image_features(self, pixel_values: Tensor) -> Any: ...

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Any: ...


class RetrievalTask(Processed):
    """Images find their texts and texts their images, with CLIPModel, SiglipModel or VisionTextDualEncoderModel.

    Items are dicts: pixel_values (3, H, W), input_ids and attention_mask (L,), concept and image, numbers. An image and
    a text belong together when their concepts are equal; items of one image are encoded once in an evaluation batch.

    Args:
        tokenizer, image_processor: of Hugging Face, saved beside a model; the latter may be None.
    """

    metric = "recall@1"

    def collate(self, items: list[dict]) -> dict[str, Tensor]:
        """The first item of every concept; another one would be taken for a negative of it.

        Returns input_ids, attention_mask (B, L), pixel_values (B, 3, H, W).
        """
        first: dict[int, dict] = {}
        for item in items:
            first.setdefault(item["concept"], item)
        names = ("input_ids", "attention_mask", "pixel_values")
        return default_collate([{name: item[name] for name in names} for item in first.values()])

    def loss(self, output, batch: dict[str, Tensor]) -> Tensor:
        """Mean of the cross-entropies of images over texts and of texts over images (CLIP, arXiv 2103.00020)."""
        logits = output.logits_per_image.float()  # (B, B)
        pair = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2

    def logits(self, output, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        """(2B, B): those of every image over the texts, then of every text over the images."""
        return torch.cat([output.logits_per_image, output.logits_per_text]), None

    def evaluate(
        self, model: nn.Module, data: Dataset, *, batch_size: int = 64, progress: Callable[[Iterable], Iterable] = iter
    ) -> dict[str, float]:
        """Recalls of `recalls` among all of `data`, with the model in eval mode; "recall@1" is the mean of both ways.

        batch_size counts texts. progress wraps the batches, for a bar.

        Raises:
            TypeError: the model has no separate features of images and texts.
        """
        if not isinstance(model, DualEncoder):
            raise TypeError(f"model must be a dual encoder such as CLIPModel, got {type(model).__name__}")
        device = next(model.parameters()).device
        images: dict[int, tuple[Tensor, int]] = {}  # number -> embedding, concept
        texts, concepts = [], []
        with evaluating(model):
            for items in progress(DataLoader(data, batch_size=batch_size, collate_fn=list)):
                unique = {item["image"]: item for item in items}
                pixels = torch.stack([item["pixel_values"] for item in unique.values()]).to(device)
                features = model.get_image_features(pixel_values=pixels).pooler_output  # (I, D)
                for (number, item), feature in zip(unique.items(), features, strict=True):
                    images.setdefault(number, (feature, item["concept"]))
                inputs = default_collate([{n: item[n] for n in ("input_ids", "attention_mask")} for item in items])
                inputs = {name: value.to(device) for name, value in inputs.items()}
                texts.append(model.get_text_features(**inputs).pooler_output)  # (Q, D)
                concepts += [item["concept"] for item in items]
        return recalls(
            torch.stack([feature for feature, _ in images.values()]),
            torch.cat(texts),
            torch.tensor([concept for _, concept in images.values()], device=device),
            torch.tensor(concepts, device=device),
        )

    @torch.no_grad()
    def predictions(self, model: nn.Module, items: list[dict]) -> list[tuple[str, str]]:
        """For each item the text among theirs that a model in eval mode finds for its image, and its own text.

        A text of the same concept counts as its own.
        """
        names = ("input_ids", "attention_mask", "pixel_values")
        batch = default_collate([{name: item[name] for name in names} for item in items])
        found = model(**{name: value.to(model.device) for name, value in batch.items()}).logits_per_image.argmax(-1)
        texts = self.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        pairs = []
        for number, best in enumerate(found.tolist()):
            right = items[best]["concept"] == items[number]["concept"]
            pairs.append((texts[number if right else best], texts[number]))
        return pairs


def recalls(images: Tensor, texts: Tensor, image_concepts: Tensor, text_concepts: Tensor) -> dict[str, float]:
    """How often one of the k most similar by cosine is of the query's concept, both ways.

    Args:
        images, texts: embeddings (I, D), (T, D).
        image_concepts, text_concepts: (I,), (T,) int64.

    Returns:
        {"recall@1": mean of both ways, "image_to_text_recall@k", "text_to_image_recall@k": for k = 1, 5, 10}.
    """
    images, texts = (F.normalize(features.float(), dim=-1) for features in (images, texts))
    figures = {}
    for way, *sides in (
        ("image_to_text", images, texts, image_concepts, text_concepts),
        ("text_to_image", texts, images, text_concepts, image_concepts),
    ):
        for k, share in zip(RANKS, _recall(*sides), strict=True):
            figures[f"{way}_recall@{k}"] = share
    mean = (figures["image_to_text_recall@1"] + figures["text_to_image_recall@1"]) / 2
    return {"recall@1": mean} | figures


def _recall(queries: Tensor, candidates: Tensor, wanted: Tensor, found: Tensor) -> Sequence[float]:
    """Of each of RANKS, for queries (Q, D) and candidates (C, D) of concepts `wanted` (Q,) and `found` (C,)."""
    hits = torch.zeros(len(RANKS))
    for start in range(0, len(queries), CHUNK):
        similar = queries[start : start + CHUNK] @ candidates.T  # (q, C)
        best = similar.topk(min(max(RANKS), len(candidates)), dim=-1).indices  # (q, k)
        right = found[best] == wanted[start : start + CHUNK, None]
        hits += torch.stack([right[:, :k].any(dim=-1).sum() for k in RANKS]).cpu()
    return (hits / len(queries)).tolist()
