# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a decoder keeps of its images for the question it was asked: a column for each seam and layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from madtp.handles import handle_of
from madtp.inference import evaluating
from madtp.patching.vlm_keep import ENTERED, PREFILL, PROJECTOR, VISION
from madtp.reporting.drawing import CAPTION, caption, draw_row, saved, sheet, unnormalised

LONGEST = 12  # tokens of an answer beside an image of the user


class SeamView(NamedTuple):
    """What a prompt left of one picture, which is an image or a tile of one.

    pixels: (3, H, W) uint8, as the tower is given it. kept: at the input, and behind every seam and layer that prunes,
    the numbers of the tokens, row by row. side: of a token, in pixels.
    """

    pixels: Tensor
    kept: list[Tensor]
    side: int


def picture(model: PreTrainedModel, task, items: Sequence[dict], path: str | Path, *, mean, std) -> Path:
    """Draws the images of the items, each with what was asked, what the model says, and what was left for it where;
    writes a PNG.

    Args:
        model: patched with `keep=`.
        task: a `VlmTask`. items: of its data.
        mean, std: of the pixels, per channel.

    Raises:
        ValueError: the tokens of the images are no grid of squares.
    """
    with evaluating(model):
        predictions = task.predictions(model, items)
    return _drawn(model, task, items, predictions, path, mean, std)


def picture_of_one(model: PreTrainedModel, task, item: dict, path: str | Path, *, mean, std) -> Path:
    """The same of one image of the user, of which nobody says what is right."""
    with evaluating(model):
        said = task.say(model, item, LONGEST)
    return _drawn(model, task, [item], [(said, said)], path, mean, std)


def _drawn(model, task, items: Sequence[dict], predictions: Sequence[tuple[str, str]], path, mean, std) -> Path:
    looked = [look(model, task.prompt(item), mean, std) for item in items]
    titles = looked[0][0]
    figure, grid = sheet(sum(len(views) for _, views in looked), len(titles), caption=CAPTION)
    row = 0
    for item, (_, views), (said, wanted) in zip(items, looked, predictions, strict=True):
        words = [(word, True) for word in item["question"].split()]
        caption(figure.add_subplot(grid[row, 0]), words, said, wanted)
        for view in views:
            draw_row(figure, grid, row, 1, view.pixels, view.kept, view.side, titles, unit="tokens")
            row += 1
    return saved(figure, path)


def look(model: PreTrainedModel, prompt: Mapping[str, Tensor], mean, std) -> tuple[list[str], list[SeamView]]:
    """Runs one prompt through a patched decoder, and reads what is left at every seam.

    Args:
        prompt: keyword arguments of a forward, of one sample.
        mean, std: of the pixels, per channel.

    Returns:
        titles of what is looked at: "input", then of seams and layers; a view for each picture.

    Raises:
        ValueError: the tokens of the images are no grid of squares.
    """
    handle: Any = handle_of(model)
    with evaluating(model):
        model(**{name: value.to(model.device) for name, value in prompt.items()})
    lengths, _ = handle.token_counts()
    steps = [("input", [torch.arange(length) for length in lengths]), *_steps(handle.selections)]
    pictures = _pictures(prompt, mean, std, model.config, lengths)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    views, begin = [], 0
    for pixels, side in pictures:
        end = begin + (pixels.shape[1] // side) * (pixels.shape[2] // side)
        kept = []
        for _, of_images in steps:
            places = torch.cat([start + part.cpu() for start, part in zip(starts, of_images, strict=False)])
            kept.append(places[(places >= begin) & (places < end)] - begin)
        views.append(SeamView(pixels, kept, side))
        begin = end
    return [title for title, _ in steps], views


def _steps(selections: Mapping[str, Any]) -> list[tuple[str, list[Tensor]]]:
    """What is left of each image, from the tower to the last layer that prunes, with titles."""
    found = []
    if ENTERED in selections:
        found.append(("entered", selections[ENTERED]))
    for layer, kept in enumerate(selections.get(VISION, ())):
        found.append((f"tower, {layer + 1}", kept))
    if PROJECTOR in selections:
        found.append(("projector", selections[PROJECTOR]))
    for layer, kept in selections.get(PREFILL, {}).items():
        found.append((f"decoder, {layer}", kept))
    return found


def _pictures(prompt: Mapping[str, Tensor], mean, std, config: Any, lengths: Sequence[int]) -> list[tuple[Tensor, int]]:
    """Each image, or tile of one, as the tower is given it, (3, H, W) uint8, and the side of its tokens in pixels."""
    pixels = prompt["pixel_values"].cpu()
    if "image_grid_thw" in prompt:  # rows of patches, those of a token together: Qwen-VL
        vision = config.vision_config
        side, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        found, begin = [], 0
        for times, height, width in prompt["image_grid_thw"].tolist():
            patches = pixels[begin : begin + times * height * width]
            begin += len(patches)
            patches = patches.view(times, height // merge, width // merge, merge, merge, 3, frames, side, side)
            image = patches[0, ..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * side, width * side)
            found.append((unnormalised(image, mean, std), side * merge))
        return found
    tiles = pixels.flatten(0, -4)  # (tiles, 3, H, W)
    tokens = math.isqrt(sum(lengths) // len(tiles))
    if tokens**2 * len(tiles) != sum(lengths) or tiles.shape[-1] != tiles.shape[-2] or tiles.shape[-1] < tokens:
        raise ValueError(
            f"model must have a square of tokens for each of the {len(tiles)} pictures of a prompt to be drawn, got "
            f"{sum(lengths)} tokens in all"
        )
    side = tiles.shape[-1] // tokens
    return [(unnormalised(tile[:, : side * tokens, : side * tokens], mean, std), side) for tile in tiles]
