# SPDX-License-Identifier: Apache-2.0
"""Captions: token cross-entropy in training; BLEU and CIDEr of what is generated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

from madtp.data.errors import DataError
from madtp.inference import evaluating
from madtp.tasks.processors import Processed


class CaptioningTask(Processed):
    """With `BlipForConditionalGeneration`. Items are dicts: pixel_values (3, H, W), input_ids, attention_mask, labels
    (L,), the last with -100 where nothing is to be said, references, a tuple of strings.

    A model is judged by BLEU-4, which is in [0, 1]; CIDEr, in [0, 10], is reported beside it.

    Args:
        tokenizer, image_processor: of Hugging Face, saved beside a model; the latter may be None.
        beams: of the search; 1 is greedy.
        max_new_tokens: longest caption.
    """

    metric = "bleu4"

    def __init__(self, tokenizer, image_processor=None, *, beams: int = 1, max_new_tokens: int = 30):
        super().__init__(tokenizer, image_processor)
        self.beams, self.max_new_tokens = beams, max_new_tokens

    def collate(self, items: list[dict]) -> dict[str, Tensor]:
        """pixel_values (B, 3, H, W), input_ids, attention_mask, labels (B, L)."""
        names = ("input_ids", "attention_mask", "labels", "pixel_values")
        return default_collate([{name: item[name] for name in names} for item in items])

    def loss(self, output, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of the next token, as the model computed it."""
        return output.loss

    def logits(self, output, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The decoder's logits (B, L, V), and (B, L) the positions whose next label counts."""
        return output.logits, F.pad(batch["labels"][:, 1:] >= 0, (0, 1), value=False)

    def evaluate(
        self, model: nn.Module, data: Dataset, *, batch_size: int = 64, progress: Callable[[Iterable], Iterable] = iter
    ) -> dict[str, float]:
        """Generates a caption for all of `data`, with the model in eval mode, and scores them (`caption_scores`).

        progress wraps the batches, for a bar.
        """
        _scorers()  # refuses before the work, not after
        said, references = [], []
        with evaluating(model):
            for items in progress(DataLoader(data, batch_size=batch_size, collate_fn=list)):
                said += self._captions(model, items)
                references += [item["references"] for item in items]
        return caption_scores(said, references)

    def predictions(self, model: nn.Module, items: list[dict]) -> list[tuple[str, str]]:
        """For each item the caption of a model in eval mode, and the first reference."""
        captions = self._captions(model, items)
        return [(said, item["references"][0]) for said, item in zip(captions, items, strict=True)]

    @torch.no_grad()
    def _captions(self, model: Any, items: list[dict]) -> list[str]:
        pixels = default_collate([item["pixel_values"] for item in items]).to(next(model.parameters()).device)
        tokens = model.generate(
            pixel_values=pixels, num_beams=self.beams, do_sample=False, max_new_tokens=self.max_new_tokens
        )
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def caption_scores(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Captions against their references, as COCO counts them, but split at anything that is no letter or digit.

    COCO's own evaluation splits words with a Java program, which keeps a few of them apart differently.

    Returns:
        {"bleu4": in [0, 1] (Papineni et al. 2002), "cider": CIDEr-D, in [0, 10] (arXiv 1411.5726),
        "caption_accuracy": share of the captions that are a reference word for word}.

    Raises:
        DataError: pycocoevalcap is not installed.
    """
    bleu, cider = _scorers()
    found = {i: [_words(caption)] for i, caption in enumerate(said)}
    wanted = {i: [_words(caption) for caption in captions] for i, captions in enumerate(references)}
    exact = sum(found[i][0] in wanted[i] for i in found)
    return {
        "bleu4": float(bleu.compute_score(wanted, found, verbose=0)[0][3]),
        "cider": float(cider.compute_score(wanted, found)[0]),
        "caption_accuracy": exact / len(said),
    }


def _words(caption: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", caption.lower()))


def _scorers():
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise DataError("captions are scored with pycocoevalcap: run `python -m pip install pycocoevalcap`") from error
    return Bleu(4), Cider()
