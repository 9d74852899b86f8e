# SPDX-License-Identifier: Apache-2.0
"""The rows of a vision tower before anything is encoded: how many there are, of which units, and in which segments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from madtp.models.patch_rows import distinct_units, patch_rows
from madtp.models.prompt import PIXELS
from madtp.models.pruned_vision import parts_of
from madtp.models.vision_packing import Packing
from madtp.models.vision_rows import Rows
from madtp.models.vision_towers import grid_of, naflex_rows


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


class Units(NamedTuple):
    """What a tower makes of each image, or video, of a prompt.

    Args:
        lengths: its units.
        newlines: its tokens that are none.
        entered: its units that are no duplicates of others, where those are left out; else all.
    """

    lengths: list[int]
    newlines: list[int]
    entered: list[int]

    def tokens(self, units: list[int]) -> list[int]:
        """Of so many units, and all newlines."""
        return [count + more for count, more in zip(units, self.newlines, strict=True)]


def bare_rows(base: Any, inputs: Mapping[str, Any], modality: str, *, pruned: bool) -> BareRows:
    """Of the images, or videos, of a prompt. Shapes of pixels are read; values are of grids and sizes, and of the
    tiles of Idefics 3 and SmolVLM, among which those of zeros are padding. On the meta device no tile is.

    Args:
        pruned: whether the tower prunes, and refuses what it cannot.

    Raises:
        ValueError: pixels are not those of the grids and sizes that come with them, or the seam refuses them.
    """
    _, tower, spec = parts_of(base)
    given, tiles = _prepared(base, inputs, modality, pruned)
    rows, pixels = _rows(base, given, tiles, values=False), given["pixel_values"]
    if "grid_thw" in given:
        return BareRows(rows, len(pixels), 0)
    if spec.rows is naflex_rows:
        return BareRows(rows, pixels.shape[:2].numel(), len(pixels))
    height, width = grid_of(tower, pixels.shape)
    return BareRows(rows, len(pixels) * height * width, len(pixels))


def image_units(
    base: Any, inputs: Mapping[str, Any], modality: str, *, pruned: bool, duplicates: float | None = None
) -> Units:
    """Of each image, or video, of a prompt.

    Args:
        inputs, pruned: as those of `bare_rows`; grids do without pixels.
        duplicates: as of `Keep`; where there is one, pixels are read.

    Raises:
        ValueError: as of `bare_rows`; tokens are no single patches; or pixels have no values that are to be read.
    """
    grids = inputs.get(f"{modality}_grid_thw")
    name = next((name for name in PIXELS[modality] if inputs.get(name) is not None), None)
    if duplicates is not None and (name is None or inputs[name].is_meta):
        got = "none" if name is None else f"{tuple(inputs[name].shape)} on the meta device"
        raise ValueError(
            f"{name or PIXELS[modality][0]} must have values where duplicates are left out by them, got {got}"
        )
    if grids is not None and name is None:
        inputs = {**inputs, PIXELS[modality][0]: torch.empty(int(grids.prod(1).sum()), 1, device="meta")}
    given, tiles = _prepared(base, inputs, modality, pruned)
    rows, newlines = _rows(base, given, tiles, values=duplicates is not None), None
    if parts_of(base)[0].packed:
        packing = Packing.of(base, inputs, tiles)
        rows, newlines = packing.of_places(rows), packing.newlines()
    entered = rows.lengths
    if duplicates is not None:
        entered = [int(part.sum()) for part in distinct_units(rows, duplicates).split(rows.lengths)]
    return Units(rows.lengths, newlines or [0] * len(rows.lengths), entered)


def _prepared(base: Any, inputs: Mapping[str, Any], modality: str, pruned: bool) -> tuple[dict[str, Any], list[int]]:
    """The arguments of the tower, and tiles of each image, of a prompt whose pixels may be on the meta device."""
    if not pruned:  # then it may be told which patches to hide, and makes as many tokens of them
        inputs = {**inputs, "pixel_attention_mask": None}
    name = next(name for name in PIXELS[modality] if inputs.get(name) is not None)
    pixels: Tensor = inputs[name]
    if pixels.is_meta:
        pixels = torch.ones((), dtype=pixels.dtype).expand(pixels.shape)
    known = {key: value for key, value in inputs.items() if not (isinstance(value, Tensor) and value.is_meta)}
    return parts_of(base)[0].prepare(base, {**known, name: pixels}, modality)


def _rows(base: Any, given: Mapping[str, Any], tiles: list[int], values: bool) -> Rows:
    connector, tower, spec = parts_of(base)
    return patch_rows(tower, spec, given, connector.side(base), tiles, values)
