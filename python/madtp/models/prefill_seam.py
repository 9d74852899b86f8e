# SPDX-License-Identifier: Apache-2.0
"""The seam inside the decoder: behind which layers image tokens go while the prompt is read, and what is left then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from madtp.dtp.keep import Keep
from madtp.dtp.keep_rules import RULES, Candidates
from madtp.models.prompt import Images
from madtp.models.seam import Seam, ThreadState

RULES_HERE = tuple(name for name, entry in RULES.items() if name != "cls" and not entry.needs_text and not entry.merges)


class ImageMap(NamedTuple):
    """Which token of a prompt is which of an image.

    Args:
        numbers: (B, S) int64, the image that a token is of, in the order of the prompt; -1 for text and padding.
        places: (B, S) int64, its place among the tokens that the projector gives that image.
        images: how many there are.
    """

    numbers: Tensor
    places: Tensor
    images: int

    @classmethod
    def of(cls, input_ids: Tensor, modalities: Sequence[Images]) -> ImageMap:
        """Of a whole prompt, by the images of each modality."""
        numbers = torch.full_like(input_ids, -1, dtype=torch.long)
        places, begins = torch.zeros_like(numbers), [images.begins() for images in modalities]
        order = sorted((begin, kind, image) for kind, part in enumerate(begins) for image, begin in enumerate(part))
        rank = {(kind, image): number for number, (_, kind, image) in enumerate(order)}
        for kind, (placeholders, lengths) in enumerate((images.placeholders, images.lengths) for images in modalities):
            own = [torch.full((length,), rank[kind, image]) for image, length in enumerate(lengths)]
            within = [torch.arange(length) for length in lengths]
            numbers = numbers.masked_scatter(placeholders, torch.cat(own).to(numbers.device))
            places = places.masked_scatter(placeholders, torch.cat(within).to(numbers.device))
        return cls(numbers, places, len(order))

    def at(self, columns: Tensor) -> ImageMap:
        """Of a prompt that has these columns of this one, (B, S'); -1 is padding."""
        index = columns.clamp(min=0)
        return ImageMap(
            self.numbers.gather(1, index).masked_fill(columns < 0, -1), self.places.gather(1, index), self.images
        )

    def counts(self, which: Tensor) -> list[int]:
        """How many tokens of each image are of `which` (B, S) bool; one host read."""
        numbers = self.numbers[which & (self.numbers >= 0)]
        return torch.bincount(numbers, minlength=self.images).tolist()


@dataclass
class PrefillRecord:
    """What the last prompt with images left behind.

    Args:
        images: of the prompt as it entered the decoder.
        real: (B, S) bool, what is no padding there.
        hidden: whether tokens were hidden and not removed.
        kept: by layer, (B, S) bool, the image tokens that were left behind it.
        slots: by decoder layer, (B, S_l) int64, the columns it holds, -1 for none; layers that hold all are not there.
        columns: (B, S'') int64, those that the last layer holds; -1 for none.
    """

    images: ImageMap
    real: Tensor
    hidden: bool = False
    kept: dict[int, Tensor] = field(default_factory=dict)
    slots: dict[int, Tensor] = field(default_factory=dict)
    columns: Tensor | None = None

    def selections(self) -> dict[int, list[Tensor]]:
        """By layer, for each image in the order of the prompt, the places kept, int64 ascending."""
        return {layer: self._places(kept) for layer, kept in self.kept.items()}

    def entered(self) -> list[int]:
        """How many tokens of each image entered the decoder."""
        return self.images.counts(self.real)

    def _places(self, kept: Tensor) -> list[Tensor]:
        numbers, places = self.images.numbers[kept], self.images.places[kept]
        return [places[numbers == image] for image in range(self.images.images)]


class PrefillState(ThreadState):
    """What one thread knows of the seam: its last prompt, and the forward that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.record: PrefillRecord | None = None
        self.run: Any = None
        self.watched: int | None = None  # the layer whose attention is to be looked at


class PrefillSeam(Seam):
    """Image tokens are pruned inside the decoder, while the prompt is read.

    Args:
        keep: by how many layers have run, what is left of each image behind them, of the tokens that entered.
    """

    State = PrefillState

    def __init__(self, keep: Mapping[int, Keep]):
        super().__init__()
        self.keep = dict(sorted(keep.items()))

    def counts(self, lengths: Sequence[int]) -> dict[int, list[int]]:
        """By layer, how many are left of images of which so many tokens enter the decoder.

        Raises:
            ValueError: what is left depends on more than lengths.
        """
        left, counts = list(lengths), {}
        for layer, keep in self.keep.items():
            left = [min(pair) for pair in zip(left, keep.counts(lengths), strict=True)]
            counts[layer] = left
        return counts

    def choose(self, layer: int, keep: Keep, candidates: Candidates, entered: Sequence[int]) -> Tensor:
        """(T,) bool, what is kept behind a layer; a count that is larger than an image is said once."""
        self.warn_of_large(f"prefill behind layer {layer}", keep.amount, entered)
        chosen = keep.choose(candidates, entered)
        if chosen.features is not None:
            raise ValueError(f"rule {keep.name} must return a bool tensor in prefill, where rows stay as they are")
        return chosen.keep
