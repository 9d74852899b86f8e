# SPDX-License-Identifier: Apache-2.0
"""The seam behind the projector: what it keeps, which all threads share, and what each thread knows of its prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from madtp.dtp.keep import Keep
from madtp.dtp.keep_rules import Candidates, Kept
from madtp.models.prompt import Images, in_prompt_order
from madtp.models.seam import Seam, ThreadState
from madtp.models.vision_seam import TowerRecord


@dataclass
class PromptRecord:
    """What the last prompt with images left behind.

    Args:
        images, keeps: of each modality its images, and (T,) bool, which of their tokens were kept.
        towers: of each modality what the tower left; None where it kept all.
        width: columns of the whole prompt.
        columns: (B, S') int64, those that were left; -1 for padding.
        input_ids: (B, S), the prompt that was given.
        hidden: whether tokens were hidden and not removed.
    """

    images: list[Images] = field(default_factory=list)
    keeps: list[Tensor] = field(default_factory=list)
    towers: list[TowerRecord | None] = field(default_factory=list)
    width: int = 0
    columns: Tensor | None = None
    input_ids: Tensor | None = None
    hidden: bool = False

    @property
    def dropped(self) -> int:
        """How many columns shorter the prompt is."""
        return 0 if self.columns is None else self.width - self.columns.shape[1]

    def selections(self) -> list[Tensor]:
        """The places kept among the tokens of each image, int64 ascending, in the order of the prompt."""
        parts = (keep.split(images.lengths) for images, keep in zip(self.images, self.keeps, strict=True))
        return [part.nonzero().flatten() for part in in_prompt_order(self.images, parts)]

    def tower_selections(self) -> list[list[Tensor]]:
        """By layer of the tower, of each image the units kept behind it, as `selections` has the places."""
        depth = max((len(tower.kept) for tower in self.towers if tower is not None), default=0)
        found = [
            [[torch.arange(length) for length in images.lengths]] * depth if tower is None else tower.selections()
            for images, tower in zip(self.images, self.towers, strict=True)
        ]
        return [in_prompt_order(self.images, (layers[number] for layers in found)) for number in range(depth)]

    def tower_entries(self) -> list[Tensor]:
        """Of each image the units that entered the tower, as `selections` has the places."""
        found = [
            [torch.arange(length) for length in images.lengths] if tower is None else tower.entries()
            for images, tower in zip(self.images, self.towers, strict=True)
        ]
        return in_prompt_order(self.images, found)

    def lengths(self) -> list[int]:
        """How many tokens each image had, in the order of the prompt."""
        return in_prompt_order(self.images, (images.lengths for images in self.images))


class ProjectorState(ThreadState):
    """What one thread knows of the seam, its last prompt too."""

    def __init__(self) -> None:
        super().__init__()
        self.record = PromptRecord()


class ProjectorSeam(Seam):
    """Image tokens are pruned behind the projector, before the prompt enters the decoder.

    Args:
        keep: what is left of each image.
    """

    State = ProjectorState

    def __init__(self, keep: Keep):
        super().__init__()
        self.keep = keep

    def choose(self, candidates: Candidates) -> Kept:
        """What the rule keeps; a count that is larger than an image is said once."""
        keep = self.keep  # as it is now, whatever is set meanwhile
        self.warn_of_large("the projector", keep.amount, candidates.lengths)
        return keep.choose(candidates)
