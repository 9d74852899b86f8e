# SPDX-License-Identifier: Apache-2.0
"""Vision towers of decoders: where their layers are, and how pixels become rows. To add one, write its row in `TOWERS`.

What a layer does is not described: it runs as Hugging Face wrote it (`vision_layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from madtp.models.vision_rows import Rows

Arguments = Mapping[str, Any]  # of a tower, by name


@dataclass(frozen=True)
class VisionTower:
    """Paths are dotted attributes of the tower.

    Args:
        rows: (tower, its arguments, side of a unit, tiles of each image) -> the rows that enter the first layer.
        layers: path of the ModuleList of layers.
        norm: path of the norm behind the last layer, of what the tower calls last_hidden_state.
        summary: whether each image, or tile of one, begins with a CLS.
        deep: (tower) -> how many layers have run where features are taken for layers of the decoder (DeepStack).
        whole: (tower) -> the layers without windows, where others have them.
    """

    rows: Callable[[Any, Arguments, int, Sequence[int]], Rows]
    layers: str = "encoder.layers"
    norm: str | None = None
    summary: bool = False
    deep: Callable[[Any], list[int]] = lambda tower: []
    whole: Callable[[Any], Collection[int]] = lambda tower: ()


def grid_rows(embed: Callable[[Any, Arguments], Tensor]) -> Callable[[Any, Arguments, int, Sequence[int]], Rows]:
    """Of towers whose images are all of one size: by `embed`, (B, P + N, C) with P rows that are no patches."""

    def rows(tower: Any, arguments: Arguments, side: int, tiles: Sequence[int]) -> Rows:
        height, width = (
            size // patch
            for size, patch in zip(arguments["pixel_values"].shape[-2:], _pair(tower.config.patch_size), strict=True)
        )
        return Rows.of_grids(embed(tower, arguments), (height, width), side, tiles)

    return rows


def embedded(tower: Any, arguments: Arguments) -> Tensor:
    return tower.embeddings(arguments["pixel_values"])


def embedded_clip(tower: Any, arguments: Arguments) -> Tensor:
    return tower.pre_layrnorm(tower.embeddings(arguments["pixel_values"]))


def embedded_tiles(tower: Any, arguments: Arguments) -> Tensor:
    """Of Idefics 3, whose position embedding asks which patches are real: all are."""
    pixels = arguments["pixel_values"]
    sizes = (size // tower.config.patch_size for size in pixels.shape[-2:])
    real = torch.ones(len(pixels), *sizes, dtype=torch.bool, device=pixels.device)
    return tower.embeddings(pixel_values=pixels, patch_attention_mask=real)


def qwen_rows(tower: Any, arguments: Arguments, side: int, tiles: Sequence[int]) -> Rows:
    """Of Qwen's towers: patches of any grids, which come unit by unit, and with windows go window by window.

    Args:
        arguments: pixel_values (T, ...), and grid_thw (B, 3): frames, height, width.
    """
    from transformers import vision_utils as hf

    pixels, grids = arguments["pixel_values"], arguments["grid_thw"]
    size = side**2
    x = tower.patch_embed(pixels)
    if hasattr(tower, "pos_embed"):
        taps, weights = hf.get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=side,
        )
        x = x + (tower.pos_embed(taps) * weights[:, :, None]).sum(1).to(x.dtype)
    x = x.reshape(len(x), -1)
    cos, sin = tower.rotary_pos_emb(x, hf.get_vision_position_ids(grids, side))
    ends = hf.get_vision_cu_seqlens(grids).int()
    longest = int((grids[:, 1] * grids[:, 2]).max())
    lengths = (grids.prod(1) // size).tolist()
    rows = Rows(x, torch.arange(len(x), device=x.device) // size, size, lengths, ends, longest, rotary=(cos, sin))
    if not hasattr(tower, "fullatt_block_indexes"):
        return rows
    order, windows = hf.get_vision_window_index(
        grids, spatial_merge_size=side, window_size=tower.window_size, patch_size=tower.patch_size
    )
    return rows.in_order(order.to(x.device), windows.int())


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size


QWEN = VisionTower(qwen_rows, layers="blocks")
IDEFICS = VisionTower(grid_rows(embedded_tiles), norm="post_layernorm")
# By the model type of a tower's config.
TOWERS = {
    "qwen2_vl_vision": QWEN,
    "qwen2_5_vl_vision": VisionTower(qwen_rows, layers="blocks", whole=attrgetter("fullatt_block_indexes")),
    "qwen3_vl_vision": VisionTower(
        qwen_rows, layers="blocks", deep=lambda tower: [layer + 1 for layer in tower.deepstack_visual_indexes]
    ),
    "clip_vision_model": VisionTower(grid_rows(embedded_clip), summary=True),
    "siglip_vision_model": VisionTower(grid_rows(embedded), norm="post_layernorm"),
    "smolvlm_vision": IDEFICS,
    "idefics3_vision": IDEFICS,
    "internvl_vision": VisionTower(grid_rows(embedded), layers="encoder.layer", norm="layernorm", summary=True),
}
