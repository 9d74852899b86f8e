# SPDX-License-Identifier: Apache-2.0
"""How decoders read their vision tower: which of its layers, and what makes a token of a unit's patches.

To add one, write its row in `CONNECTORS`. Projectors that put the patches of a token side by side, or shuffle them
there, are given each unit as an image of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from madtp.models.prompt import PIXELS
from madtp.models.vision_packing import tile_counts

SIZES = ("image_sizes", "spatial_shapes")
EMBEDDED = ("interpolate_pos_encoding", "bool_masked_pos")  # what an embedding of patches may be told
Prepared = tuple[dict[str, Any], list[int]]  # the arguments of the tower, and tiles of each image


@dataclass(frozen=True)
class Connector:
    """Of a base model, by what it calls its parts.

    Args:
        tower: its attribute.
        project: (base, units (U, m, C)) -> tokens (U, D).
        side: (base) -> patches of a unit along each axis.
        prepare: (base, arguments, modality) -> arguments of the tower, and how many of its tiles make up each image.
        hidden: (base) -> the numbers of the hidden states that it reads, side by side; None where it reads
            last_hidden_state. As in transformers 0 is what enters the first layer.
        joined: whether the model reads one tensor of all images, and no list.
        packed: whether it packs the tiles of an image into a row of tokens, with newlines.
    """

    tower: str
    project: Callable[[Any, Tensor], Tensor]
    side: Callable[[Any], int]
    prepare: Callable[[Any, Mapping[str, Any], str], Prepared]
    hidden: Callable[[Any], list[int] | None]
    joined: bool = False
    packed: bool = False

    def taken(self, base: Any, layers: int) -> list[int]:
        """By how many of the tower's layers have run, the features that it reads."""
        hidden = self.hidden(base)
        return [layers] if hidden is None else [n if n >= 0 else layers + 1 + n for n in hidden]


def pictures(base: Any, arguments: Mapping[str, Any], modality: str) -> Prepared:
    """An image each, with what says its size, and how it is embedded, where there is something."""
    given = {name: arguments[name] for name in SIZES + EMBEDDED if arguments.get(name) is not None}
    pixels = arguments["pixel_values"]
    return {"pixel_values": pixels.to(base.dtype), **given}, [1] * len(pixels)


def grids(base: Any, arguments: Mapping[str, Any], modality: str) -> Prepared:
    """Patches of grids; a video is one too."""
    name = next(name for name in PIXELS[modality] if arguments.get(name) is not None)
    pixels, sizes = arguments[name], arguments.get(f"{modality}_grid_thw")
    patches = None if sizes is None else int(sizes.prod(1).sum())
    if patches != len(pixels):
        raise ValueError(f"{name} must have a row for each patch of {modality}_grid_thw, {patches}, got {len(pixels)}")
    return {"pixel_values": pixels.to(base.visual.dtype), "grid_thw": sizes}, []


def tiles(base: Any, arguments: Mapping[str, Any], modality: str) -> Prepared:
    """All tiles of a sample are an image of Idefics 3 and SmolVLM; those of zeros are padding."""
    pixels = arguments["pixel_values"].to(base.dtype)  # (B, N, 3, H, W)
    real = (pixels != 0).flatten(2).any(2)
    real[0, 0] |= ~real.any()
    if (mask := arguments.get("pixel_attention_mask")) is not None:
        side = base.config.vision_config.patch_size
        patches = mask.bool().unfold(2, side, side).unfold(3, side, side).flatten(4).any(4)
        if not bool(patches[real].all()):
            raise ValueError("pixel_attention_mask must hide no patch of an image where its tower prunes, got some")
    return {"pixel_values": pixels[real]}, real.sum(1).tolist()


def anyres(base: Any, arguments: Mapping[str, Any], modality: str) -> Prepared:
    """Tiles of LLaVA-NeXT and OneVision, padded to the most that an image has."""
    if modality == "video":
        raise ValueError("pixel_values_videos must be None at the vision seam of this model, which pools their frames")
    pixels, counts, size = arguments["pixel_values"], tile_counts(base, arguments), base.config.vision_config.image_size
    if pixels.ndim == 5 and len(pixels) == len(counts):
        pixels = torch.cat([image[:count] for image, count in zip(pixels, counts, strict=True)])
    if pixels.ndim != 4 or len(pixels) != sum(counts) or tuple(pixels.shape[2:]) != (size, size):
        raise ValueError(
            f"pixel_values must have the tiles of {len(counts)} image_sizes, {counts} of {size} x {size}, got "
            f"{tuple(arguments['pixel_values'].shape)}"
        )
    return {"pixel_values": pixels.to(base.dtype)}, counts


def read(name: str) -> Callable[[Any], list[int]]:
    """By an entry of the config, a number or several."""

    def hidden(base: Any) -> list[int]:
        numbers = getattr(base.config, name)
        return [numbers] if isinstance(numbers, int) else list(numbers)

    return hidden


def read_last(base: Any) -> None:
    return None


def read_internvl(base: Any) -> list[int] | None:
    hidden = read("vision_feature_layer")(base)
    return None if hidden == [-1] else hidden


def project(name: str) -> Callable[[Any, Tensor], Tensor]:
    """By a module that reads patches (B, N, C), or what is made of them."""
    return lambda base, units: getattr(base, name)(units).flatten(1)


def project_side_by_side(base: Any, units: Tensor) -> Tensor:
    return base.multi_modal_projector(units.flatten(1))


def project_mean(base: Any, units: Tensor) -> Tensor:
    """Of Gemma 3, which averages."""
    projector = base.multi_modal_projector
    return (projector.mm_soft_emb_norm(units.mean(1)) @ projector.mm_input_projection_weight).type_as(units)


def project_grid(base: Any, units: Tensor) -> Tensor:
    """Of LFM2-VL, whose projector reads grids (B, height, width, C)."""
    side = base.config.downsample_factor
    return base.multi_modal_projector(units.unflatten(1, (side, side))).flatten(0, -2)


def project_mistral(base: Any, units: Tensor) -> Tensor:
    """Of Mistral 3, which merges the patches of a token channel by channel."""
    projector = base.multi_modal_projector
    merged = projector.patch_merger.merging_layer(projector.norm(units).transpose(1, 2).flatten(1))
    return projector.linear_2(projector.act(projector.linear_1(merged)))


def project_glm(base: Any, units: Tensor) -> Tensor:
    """Of GLM-4V, which convolves them."""
    tower = base.visual
    side = tower.spatial_merge_size
    return tower.merger(tower.downsample(units.unflatten(1, (side, side)).permute(0, 3, 1, 2)).flatten(1))


def project_qwen(base: Any, units: Tensor) -> Tensor:
    return base.visual.merger(units.flatten(0, 1))


def single(base: Any) -> int:
    return 1


def side_of_factor(base: Any) -> int:
    return base.config.downsample_factor


QWEN = Connector("visual", project_qwen, lambda base: base.visual.spatial_merge_size, grids, read_last)
GLM = replace(QWEN, project=project_glm)
ALIGNED = Connector("vision_model", project("aligner"), single, pictures, read_last, joined=True)
IDEFICS = Connector("vision_model", project("connector"), lambda base: base.config.scale_factor, tiles, read_last)
PROJECTED = project("multi_modal_projector")
ANYRES = Connector("vision_tower", PROJECTED, single, anyres, read("vision_feature_layer"), packed=True)
# By the model type of the config.
CONNECTORS = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "qwen3_vl_moe": QWEN,
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
    "exaone4_5": QWEN,
    "glm4v": GLM,
    "glm4v_moe": GLM,
    "glm46v": GLM,
    "llava": Connector("vision_tower", PROJECTED, single, pictures, read("vision_feature_layer")),
    "vipllava": Connector(
        "vision_tower",
        PROJECTED,
        single,
        pictures,
        read("vision_feature_layers"),
        joined=True,
    ),
    "llava_next": ANYRES,
    "llava_onevision": ANYRES,
    "smolvlm": IDEFICS,
    "idefics3": IDEFICS,
    "paligemma": Connector("vision_tower", PROJECTED, single, pictures, read_last, joined=True),
    "gemma3": Connector(
        "vision_tower",
        project_mean,
        lambda base: base.multi_modal_projector.kernel_size,
        pictures,
        read_last,
        joined=True,
    ),
    "internvl": Connector(
        "vision_tower",
        project_side_by_side,
        lambda base: round(1 / base.config.downsample_ratio),
        pictures,
        read_internvl,
        joined=True,
    ),
    "janus": ALIGNED,
    "deepseek_vl": ALIGNED,
    "mistral3": Connector(
        "vision_tower",
        project_mistral,
        lambda base: base.config.spatial_merge_size,
        pictures,
        read("vision_feature_layer"),
    ),
    "lfm2_vl": Connector("vision_tower", project_grid, side_of_factor, pictures, read_last),
    "aya_vision": Connector(
        "vision_tower", PROJECTED, side_of_factor, pictures, read("vision_feature_layer"), joined=True
    ),
    "cohere2_vision": Connector("vision_tower", PROJECTED, side_of_factor, pictures, read_last, joined=True),
}
# Why the towers of others cannot prune, by model type.
UNSOUND = {
    "llava_next_video": "its tokens must be patches of their own, and those of frames are pooled over several",
    "florence2": "its tower must be of one grid, and windows, channels and convolutions go over that of every stage",
}
UNSOUND_TOWERS = {
    "dinov3_vit": "its tokens must be its patches, and those of dinov3_vit have registers among them",
}


def summary_reason(base: Any, summary: bool) -> str | None:
    """Why tokens and patches do not match one to one where a tower has a CLS, or none; None where they do."""
    config = base.config
    strategy = "default" if config.model_type == "vipllava" else getattr(config, "vision_feature_select_strategy", None)
    if strategy is None or (strategy == "default") == summary:
        return None
    what = "drops the first of them" if strategy == "default" else "makes CLS one of them"
    return f"its tokens must be its patches, and vision_feature_select_strategy {strategy!r} {what}"
