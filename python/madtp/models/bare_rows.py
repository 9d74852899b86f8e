# SPDX-License-Identifier: Apache-2.0
"""The rows of a vision tower before anything is encoded: how many there are, of which units, and in which segments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from madtp.models.prompt import PIXELS
from madtp.models.pruned_vision import parts_of
from madtp.models.vision_rows import Rows
from madtp.models.vision_towers import grid_of, in_windows, naflex_rows, of_frames, pixtral_grids, pixtral_rows


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
        grids = grids.cpu()
        rows = of_frames(torch.empty(int(grids.prod(1).sum()), 1), grids, side)
        return BareRows(in_windows(tower, rows, grids, side), len(pixels), 0)
    height, width = grid_of(tower, pixels.shape)
    patches = len(pixels) * height * width
    if spec.rows is pixtral_rows:
        shapes = pixtral_grids(tower, given)
        rows = Rows.of_images([torch.empty(high * wide, 1) for high, wide in shapes], shapes, side)
        return BareRows(rows, patches, len(pixels))
    hidden = torch.empty(len(pixels), height * width + spec.summary, 1)
    return BareRows(Rows.of_grids(hidden, (height, width), side, tiles), patches, len(pixels))
