# SPDX-License-Identifier: Apache-2.0
"""The rows of a vision tower before anything is encoded: how many there are, of which units, and in which segments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import vision_utils

from madtp.models.prompt import PIXELS
from madtp.models.pruned_vision import parts_of
from madtp.models.vision_rows import Rows, Segments
from madtp.models.vision_towers import naflex_rows, pixtral_rows


class BareRows(NamedTuple):
    """What enters a tower.

    Args:
        rows: (T, 1), those of the first layer, without values; on the CPU.
        patches: how many are embedded, those of padding among them.
        tiles: how many images, or tiles of them, the tower is given; 0 where patches come without.
    """

    rows: Rows
    patches: int
    tiles: int


def bare_rows(base: Any, inputs: Mapping[str, Any], modality: str) -> BareRows:
    """Of the images, or videos, of a prompt. Shapes of pixels are read; values are of grids and sizes, and of the
    tiles of Idefics 3 and SmolVLM, among which those of zeros are padding. On the meta device no tile is.

    Raises:
        ValueError: the tower pads its images (SigLIP 2).
    """
    connector, tower, spec = parts_of(base)
    side = connector.side(base)
    if spec.rows is naflex_rows:
        raise ValueError(f"model must have a tower whose rows are no padding, got {tower.config.model_type}")
    name = next(name for name in PIXELS[modality] if inputs.get(name) is not None)
    pixels: Tensor = inputs[name]
    if pixels.is_meta:
        pixels = torch.ones((), dtype=pixels.dtype).expand(pixels.shape)
    known = {key: value for key, value in inputs.items() if not (isinstance(value, Tensor) and value.is_meta)}
    given, tiles = connector.prepare(base, {**known, name: pixels}, modality)
    pixels = given["pixel_values"]
    if (grids := given.get("grid_thw")) is not None:
        return BareRows(_of_grids(tower, grids.cpu(), side), len(pixels), 0)
    patch = tower.config.patch_size
    sides = (patch, patch) if isinstance(patch, int) else patch
    height, width = (size // part for size, part in zip(pixels.shape[-2:], sides, strict=True))
    patches = len(pixels) * height * width
    if spec.rows is pixtral_rows:
        sizes = given.get("image_sizes")
        sizes = [pixels.shape[-2:]] * len(pixels) if sizes is None else [tuple(map(int, size)) for size in sizes]
        shapes = [(high // sides[0], wide // sides[1]) for high, wide in sizes]
        rows = Rows.of_images([torch.empty(high * wide, 1) for high, wide in shapes], shapes, side)
        return BareRows(rows, patches, len(pixels))
    hidden = torch.empty(len(pixels), height * width + spec.summary, 1)
    return BareRows(Rows.of_grids(hidden, (height, width), side, tiles), patches, len(pixels))


def _of_grids(tower: Any, grids: Tensor, side: int) -> Rows:
    """Patches of grids (B, 3), unit by unit, of which each frame attends to itself."""
    size, lengths = side**2, (grids.prod(1) // side**2).tolist()
    ends = vision_utils.get_vision_cu_seqlens(grids).int()
    unit = torch.arange(int(ends[-1])) // size
    rows = Rows(torch.empty(len(unit), 1), unit, size, lengths, Segments(ends, int(ends.diff().max())))
    if not hasattr(tower, "fullatt_block_indexes"):
        return rows
    order, windows = vision_utils.get_vision_window_index(
        grids, spatial_merge_size=side, window_size=tower.window_size, patch_size=tower.patch_size
    )
    return rows.in_order(order, Segments(windows.int(), int(windows.diff().max())))
