# SPDX-License-Identifier: Apache-2.0
"""Vision towers of decoders: where their layers are, and how pixels become rows. To add one, write its row in `TOWERS`.

What a layer does is not described: it runs as Hugging Face wrote it (`vision_layers`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from transformers import vision_utils

from madtp.models.vision_rows import Rows, Segments

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

    def segments(self, tower: Any, rows: Rows, layer: int) -> Segments:
        """Which rows attend to themselves in a layer."""
        return rows.whole if rows.windows is None or layer in self.whole(tower) else rows.windows


def grid_rows(embed: Callable[[Any, Arguments], Tensor]) -> Callable[[Any, Arguments, int, Sequence[int]], Rows]:
    """Of towers whose images are all of one size: by `embed`, (B, P + N, C) with P rows that are no patches."""

    def rows(tower: Any, arguments: Arguments, side: int, tiles: Sequence[int]) -> Rows:
        return Rows.of_grids(embed(tower, arguments), grid_of(tower, arguments["pixel_values"].shape), side, tiles)

    return rows


def patch_size(tower: Any) -> tuple[int, int]:
    """Pixels of a patch along each axis."""
    patch = tower.config.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return height, width


def grid_of(tower: Any, size: Sequence[int]) -> tuple[int, int]:
    """Patches along each axis of an image whose size ends with height and width."""
    height, width = patch_size(tower)
    return size[-2] // height, size[-1] // width


def embedded(tower: Any, arguments: Arguments) -> Tensor:
    """By pixels, and what else the tower's embedding is told, such as `interpolate_pos_encoding`."""
    names = inspect.signature(tower.embeddings.forward).parameters
    return tower.embeddings(**{name: value for name, value in arguments.items() if name in names})


def embedded_clip(tower: Any, arguments: Arguments) -> Tensor:
    return tower.pre_layrnorm(embedded(tower, arguments))


def embedded_tiles(tower: Any, arguments: Arguments) -> Tensor:
    """Of Idefics 3, whose position embedding asks which patches are real: all are."""
    pixels = arguments["pixel_values"]
    sizes = (size // tower.config.patch_size for size in pixels.shape[-2:])
    real = torch.ones(len(pixels), *sizes, dtype=torch.bool, device=pixels.device)
    return tower.embeddings(pixel_values=pixels, patch_attention_mask=real)


def pixtral_rows(tower: Any, arguments: Arguments, side: int, tiles: Sequence[int]) -> Rows:
    """Of Pixtral, whose images have sizes of their own: `image_sizes`, height and width of each in pixels."""
    pixels, grids = arguments["pixel_values"], pixtral_grids(tower, arguments)
    embedded = tower.patch_conv(pixels.to(tower.patch_conv.weight.dtype))
    images = [image[:, :height, :width].flatten(1).T for image, (height, width) in zip(embedded, grids, strict=True)]
    rows = Rows.of_images(images, grids, side)
    rows = rows.with_x(tower.ln_pre(rows.x))
    frames = torch.tensor([(1, *grid) for grid in grids], device=pixels.device)
    positions = vision_utils.get_vision_position_ids(frames, side)
    return replace(rows, rotary=tower.patch_positional_embedding(rows.x, positions))


def pixtral_grids(tower: Any, arguments: Arguments) -> list[tuple[int, int]]:
    """Of each image."""
    pixels, sizes = arguments["pixel_values"], arguments.get("image_sizes")
    sizes = [pixels.shape[-2:]] * len(pixels) if sizes is None else [tuple(map(int, size)) for size in sizes]
    return [grid_of(tower, size) for size in sizes]


def naflex_rows(tower: Any, arguments: Arguments, side: int, tiles: Sequence[int]) -> Rows:
    """Of SigLIP 2, whose images are padded: `spatial_shapes`, height and width of each in patches."""
    grids = naflex_grids(arguments)
    hidden = tower.embeddings(arguments["pixel_values"], arguments["spatial_shapes"])
    images = [image[: height * width] for image, (height, width) in zip(hidden, grids, strict=True)]
    return Rows.of_images(images, grids, side)


def naflex_grids(arguments: Arguments) -> list[tuple[int, int]]:
    """Of each image."""
    return [(int(height), int(width)) for height, width in arguments["spatial_shapes"]]


def qwen_rows(tower: Any, arguments: Arguments, side: int, tiles: Sequence[int]) -> Rows:
    """Of Qwen's towers: patches of any grids, which come unit by unit.

    Args:
        arguments: pixel_values (T, ...), and grid_thw (B, 3): frames, height, width.
    """
    grids = arguments["grid_thw"]
    x = tower.patch_embed(arguments["pixel_values"])
    if hasattr(tower, "pos_embed"):
        taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=side,
        )
        x = x + (tower.pos_embed(taps) * weights[:, :, None]).sum(1).to(x.dtype)
    return in_windows(tower, _rotated(tower, of_frames(x.reshape(len(x), -1), grids, side), grids, side), grids, side)


def glm_rows(tower: Any, arguments: Arguments, side: int, tiles: Sequence[int]) -> Rows:
    """Of GLM-4V: as those of Qwen, with positions added to them that are interpolated frame by frame."""
    grids = arguments["grid_thw"]
    x = tower.post_conv_layernorm(tower.patch_embed(arguments["pixel_values"]))
    frames = grids.repeat_interleave(grids[:, 0], 0)
    frames[:, 0] = 1
    y, z = vision_utils.get_vision_position_ids(grids, side).to(x.device).unbind(1)
    return _rotated(tower, of_frames(tower.embeddings(x, frames.prod(1), frames, y, z), grids, side), grids, side)


def of_frames(x: Tensor, grids: Tensor, side: int) -> Rows:
    """Rows (T, C) of grids (B, 3), unit by unit, of which each frame attends to itself."""
    size = side**2
    frames = _segments(vision_utils.get_vision_cu_seqlens(grids), x.device)
    lengths = (grids.prod(1) // size).tolist()
    return Rows(x, torch.arange(len(x), device=x.device) // size, size, lengths, frames)


def in_windows(tower: Any, rows: Rows, grids: Tensor, side: int) -> Rows:
    """Window by window, where the tower has layers with windows."""
    if not hasattr(tower, "fullatt_block_indexes"):
        return rows
    order, windows = vision_utils.get_vision_window_index(
        grids, spatial_merge_size=side, window_size=tower.window_size, patch_size=tower.patch_size
    )
    return rows.in_order(order.to(rows.x.device), _segments(windows, rows.x.device))


def _rotated(tower: Any, rows: Rows, grids: Tensor, side: int) -> Rows:
    return replace(rows, rotary=tower.rotary_pos_emb(rows.x, vision_utils.get_vision_position_ids(grids, side)))


def _segments(ends: Tensor, device: torch.device) -> Segments:
    return Segments(ends.to(device, torch.int32), int(ends.diff().max()))


QWEN = VisionTower(qwen_rows, layers="blocks")
QWEN2_5 = VisionTower(qwen_rows, layers="blocks", whole=attrgetter("fullatt_block_indexes"))
QWEN3 = VisionTower(
    qwen_rows, layers="blocks", deep=lambda tower: [layer + 1 for layer in tower.deepstack_visual_indexes]
)
GLM = VisionTower(glm_rows, layers="blocks", norm="post_layernorm")
SIGLIP = VisionTower(grid_rows(embedded), norm="post_layernorm")
IDEFICS = VisionTower(grid_rows(embedded_tiles), norm="post_layernorm")
# By the model type of a tower's config.
TOWERS = {
    "qwen2_vl_vision": QWEN,
    "qwen2_5_vl_vision": QWEN2_5,
    "exaone4_5_vision": QWEN2_5,
    "qwen3_vl_vision": QWEN3,
    "qwen3_vl_moe_vision": QWEN3,
    "qwen3_5_vision": QWEN,
    "qwen3_5_moe_vision": QWEN,
    "glm4v_vision": GLM,
    "glm4v_moe_vision": GLM,
    "clip_vision_model": VisionTower(grid_rows(embedded_clip), summary=True),
    "siglip_vision_model": SIGLIP,
    "janus_vision_model": SIGLIP,
    "siglip2_vision_model": VisionTower(naflex_rows, norm="post_layernorm"),
    "pixtral": VisionTower(pixtral_rows, layers="transformer.layers"),
    "smolvlm_vision": IDEFICS,
    "idefics3_vision": IDEFICS,
    "internvl_vision": VisionTower(grid_rows(embedded), layers="encoder.layer", norm="layernorm", summary=True),
}
