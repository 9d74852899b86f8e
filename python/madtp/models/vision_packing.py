# SPDX-License-Identifier: Apache-2.0
"""Images of tiles that a model packs into one row of tokens each, with newlines between rows of its grid (LLaVA-NeXT,
OneVision).

Where each patch goes is asked of the model's own packing, which is given numbers in place of features. Patches that it
cuts off are of no unit, and stay in the tower as what others see. Newlines are no units either: all of them stay in the
prompt, beside what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from madtp.models.vision_rows import Rows
from madtp.models.vision_seam import TowerRecord


@dataclass(frozen=True)
class Packing:
    """Args:
    places: of each image (n,) int64, the patch at each place, by its number among those of all tiles; -1: a newline.
    """

    places: list[Tensor]

    @classmethod
    def of(cls, base: Any, arguments: Mapping[str, Any], tiles: Sequence[int]) -> Packing:
        """Of images of so many tiles each. Raises ValueError where tokens are no single patches."""
        vision = base.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        numbers = torch.arange(1, sum(tiles) * patches + 1, dtype=torch.double).view(-1, patches, 1)
        options = {"image_newline": torch.zeros(2, dtype=torch.double)}
        if base.config.model_type == "llava_next":
            options["vision_feature_select_strategy"] = base.config.vision_feature_select_strategy
        else:
            options["vision_aspect_ratio"] = arguments.get("vision_aspect_ratio") or base.config.vision_aspect_ratio
        squares = list(torch.cat([numbers, numbers**2], -1).split(list(tiles)))
        packed, _ = base.pack_image_features(squares, arguments["image_sizes"], **options)
        for number, part in enumerate(packed):
            if not torch.equal(part[:, 0] ** 2, part[:, 1]):
                raise ValueError(
                    "image_sizes must be such that tokens are patches at the vision seam, got "
                    f"{list(map(int, arguments['image_sizes'][number]))} of image {number}, whose features the model "
                    "interpolates"
                )
        return cls([part[:, 0].long() - 1 for part in packed])

    def newlines(self) -> list[int]:
        """How many each image has."""
        return [int((places < 0).sum()) for places in self.places]

    def of_places(self, rows: Rows) -> Rows:
        """Rows whose units are numbered as patches of tiles -> as the patches of the places, in their order."""
        patches = torch.cat(self.places).to(rows.unit.device)
        patches = patches[patches >= 0]
        numbers = torch.full((sum(rows.lengths) + 1,), -1, device=patches.device)
        numbers[patches] = torch.arange(len(patches), device=patches.device)  # the last is that of no patch
        lengths = [int((places >= 0).sum()) for places in self.places]
        return replace(rows, unit=numbers[rows.unit], lengths=lengths)

    def tokens(self, record: TowerRecord, tokens: Tensor, newline: Tensor) -> tuple[TowerRecord, Tensor]:
        """What is left of the units, and their tokens (U', D) -> what is left of the places, and theirs."""
        patch = torch.cat(self.places).to(tokens.device) >= 0
        kept = [(~patch).masked_scatter(patch, units) for units in record.kept]
        entered = None if record.entered is None else (~patch).masked_scatter(patch, record.entered)
        left = patch[kept[-1]]
        rows = newline.to(tokens).expand(len(left), -1).masked_scatter(left[:, None], tokens)
        lengths = [len(places) for places in self.places]
        return TowerRecord(lengths, kept, entered, sum(self.newlines())), rows


def tile_counts(base: Any, arguments: Mapping[str, Any]) -> list[int]:
    """How many tiles each image has, by its size."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes, config = arguments["image_sizes"], base.config
    if (together := arguments.get("batch_num_images")) is None:
        split = [True] * len(sizes)
    else:  # OneVision: images of a sample that has several are of one tile
        split = [int(number) == 1 for number in together for _ in range(int(number))]
    size = config.vision_config.image_size
    return [
        image_size_to_num_patches(image, config.image_grid_pinpoints, size) if tiled else 1
        for image, tiled in zip(sizes, split, strict=True)
    ]
