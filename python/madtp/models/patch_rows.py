# SPDX-License-Identifier: Apache-2.0
"""The rows of a vision tower before anything is encoded: the patches of its images, unit by unit.

Units whose pixels are those of another unit of their image, as on blank paper, need no second encoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from madtp.models.vision_rows import Rows
from madtp.models.vision_towers import (
    VisionTower,
    grid_of,
    in_windows,
    naflex_grids,
    naflex_rows,
    of_frames,
    patch_size,
    pixtral_grids,
    pixtral_rows,
)


def patch_rows(
    tower: Any, spec: VisionTower, given: Mapping[str, Any], side: int, tiles: Sequence[int], values: bool = True
) -> Rows:
    """Rows as `spec.rows` makes them, x being pixels (T, P); (T, 1) of no values, on the CPU, where none are asked for.

    Args:
        given: the arguments of the tower.
        side: patches of a unit along each axis.
        tiles: how many of the tower's images make up each image.
    """
    pixels: Tensor = given["pixel_values"]
    if (grids := given.get("grid_thw")) is not None:
        x, grids = (pixels.flatten(1), grids) if values else (torch.empty(len(pixels), 1), grids.cpu())
        return in_windows(tower, of_frames(x, grids, side), grids, side)
    if spec.rows is naflex_rows:
        shapes = naflex_grids(given)
        padded = pixels if values else torch.empty(*pixels.shape[:2], 1)
        images = [image[: height * width] for image, (height, width) in zip(padded, shapes, strict=True)]
        return Rows.of_images(images, shapes, side)
    patches = _patches(tower, pixels) if values else torch.empty(len(pixels), *grid_of(tower, pixels.shape), 1)
    if spec.rows is pixtral_rows:
        shapes = pixtral_grids(tower, given)
        images = [image[:height, :width].flatten(0, 1) for image, (height, width) in zip(patches, shapes, strict=True)]
        return Rows.of_images(images, shapes, side)
    height, width = patches.shape[1:3]
    return Rows.of_grids(F.pad(patches.flatten(1, 2), (0, 0, int(spec.summary), 0)), (height, width), side, tiles)


def _patches(tower: Any, pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, height, width, C p q)"""
    (height, width), (high, wide) = grid_of(tower, pixels.shape), patch_size(tower)
    blocks = pixels[..., : height * high, : width * wide].unflatten(-1, (width, wide)).unflatten(-3, (height, high))
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3)


def distinct_units(rows: Rows, tolerance: float) -> Tensor:
    """(U,) bool: of each image the units of which no pixel is, by more than `tolerance`, another than in an earlier one
    that stays; all but those go. Of units that are alike the first stays.

    Args:
        rows: of `patch_rows`.
    """
    pixels = rows.units(rows.x).flatten(1)
    pixels = pixels if pixels.dtype == torch.double else pixels.float()
    return torch.cat([_firsts(part, tolerance) for part in pixels.split(rows.lengths)])


def _firsts(units: Tensor, tolerance: float) -> Tensor:
    """(n, P) -> (n,) bool"""
    count = len(units)
    keep = torch.zeros(count, dtype=torch.bool, device=units.device)
    if not count:
        return keep
    different, number = torch.unique(units, dim=0, return_inverse=True)
    first = number.new_full((len(different),), count)
    first = first.scatter_reduce(0, number, torch.arange(count, device=units.device), "amin").sort().values
    if tolerance:
        rows = units[first]
        finite = rows.isfinite().all(1)  # cdist passes over NaN
        near = (torch.cdist(rows, rows, p=torch.inf) <= tolerance) & finite & finite[:, None]
        first = first[_far_ones(near.cpu()).to(first.device)]
    return keep.index_fill(0, first, True)


def _far_ones(near: Tensor) -> Tensor:
    """(n,) bool, in order always the next that is near to none that was taken.

    Args:
        near: (n, n) bool on a CPU: whether the unit of a row makes that of a column a duplicate.
    """
    open_, taken = torch.ones(len(near), dtype=torch.bool).numpy(), torch.zeros(len(near), dtype=torch.bool)
    for unit, neighbours in enumerate(near.numpy()):
        if open_[unit]:
            taken[unit] = True
            open_ &= ~neighbours
    return taken
