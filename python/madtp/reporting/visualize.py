# SPDX-License-Identifier: Apache-2.0
"""Pictures of the tokens a compressed model keeps: depth in columns, pruned patches dark, pruned words grey."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from madtp.data.model_inputs import forward_inputs, reads_text, tower_config
from madtp.handles import find_handle, handle_of
from madtp.inference import evaluating
from madtp.patching.vlm_handle import VlmHandle
from madtp.reporting import seam_pictures
from madtp.reporting.drawing import (
    CAPTION,
    Words,
    anchored,
    bare,
    by_layer,
    caption,
    draw_row,
    line,
    saved,
    sheet,
    unnormalised,
)

ROWS = 8  # samples in a picture, where not said


class View(NamedTuple):
    """What a forward of one sample left.

    patches: per image, at the input and after each layer, the numbers of the patches, row by row. alignment: of the
    first image, per layer, (side * side,) how well each patch that enters fits the alignment token it fits best, NaN
    where none enters. words: of the text, empty for models that prune none. patch_size: in pixels.
    """

    patches: list[list[Tensor]]
    alignment: list[Tensor]
    words: Words
    patch_size: int


def picture(model: PreTrainedModel, task, data, path: str | Path, *, rows: int = ROWS) -> Path:
    """Draws the images of `rows` samples spread over the data, each with what the model says, and writes a PNG.

    Args:
        model: compressed, as `madtp.from_pretrained` gives it.
        task, data: of `madtp.tasks` and `madtp.data`, those of the model.
        path: of the PNG.

    Raises:
        TypeError: the model is not compressed. ValueError: `rows` is not a number of images in the data, or the data do
            not say the `mean` and `std` of their pixels, per channel.
    """
    handle = find_handle(model)
    if handle is None:
        raise TypeError(f"model must be a compressed one, got a plain {type(model).__name__}")
    for name in ("mean", "std"):
        if not hasattr(data, name):
            raise ValueError(f"data must have the {name} of their pixels to be drawn, {type(data).__name__} has none")
    items = [data[i] for i in _examples(data, rows)]
    if isinstance(handle, VlmHandle):
        return seam_pictures.picture(model, task, items, path, mean=data.mean, std=data.std)
    with evaluating(model):
        predictions = task.predictions(model, items)
    views = [look(model, _inputs(task, item), task.tokenizer) for item in items]
    depths = len(views[0].patches[0])
    images = sum(len(view.patches) for view in views)
    figure, grid = sheet(images, depths, caption=CAPTION)
    row = 0
    for item, view, (said, wanted) in zip(items, views, predictions, strict=True):
        caption(figure.add_subplot(grid[row, 0]), view.words, said, wanted)
        pixels = unnormalised(item["pixel_values"], data.mean, data.std)
        for image, patches in zip(pixels.view(-1, *pixels.shape[-3:]), view.patches, strict=True):
            draw_row(figure, grid, row, 1, image, patches, view.patch_size, by_layer(depths))
            row += 1
    return saved(figure, path)


def depths(
    model: PreTrainedModel,
    image: Image.Image,
    path: str | Path,
    *,
    image_processor,
    tokenizer=None,
    text: str | None = None,
) -> Path:
    """Draws one image of the user with the patches left after each layer and, below, how well the patches that enter a
    layer fit the alignment token they fit best; writes a PNG to `path`.

    Args:
        model: compressed, or patched and at a temperature above 0.
        image_processor, tokenizer: its own. text: what goes with the image, in models that read text; grey words are
            gone after the last layer of the text tower.

    Raises:
        TypeError: the model is not patched, or has no vision tower. ValueError: it reads text, and none is given.
    """
    handle = find_handle(model)
    if handle is None or "vision" not in handle.pruning:
        raise TypeError(f"model must be a compressed one with a vision tower, got {type(model).__name__}")
    if reads_text(model) and (text is None or tokenizer is None):
        raise ValueError(f"text must be given for a {type(model).__name__}, got none")
    pixels = image_processor(image, return_tensors="pt")["pixel_values"]
    words = tokenizer(text, return_tensors="pt") if reads_text(model) else None
    view = look(model, forward_inputs(model, pixels, words), tokenizer)
    side = pixels.shape[-1] // view.patch_size
    figure, grid = sheet(2, len(view.patches[0]), top=0.8)
    pixels, patches = _resized(image, side * view.patch_size), view.patches[0]
    draw_row(figure, grid, 0, 0, pixels, patches, view.patch_size, by_layer(len(patches)))
    for layer, alignment in enumerate(view.alignment):
        axes = bare(figure.add_subplot(grid[1, layer]), f"alignment, layer {layer + 1}")
        axes.imshow(alignment.view(side, side).numpy(), cmap="viridis")
    if view.words:
        axes = figure.add_axes((0.01, 0.88, 0.98, 0.1))
        axes.axis("off")
        axes.add_artist(anchored(line(view.words)))
    return saved(figure, path)


def look(model: PreTrainedModel, inputs: Mapping[str, Tensor], tokenizer=None) -> View:
    """Runs one sample through a patched model and reads what is left where.

    Args:
        inputs: keyword arguments of a forward, of one sample.
        tokenizer: that turns its ids back into words; only for models that prune text.
    """
    handle = handle_of(model)
    if "vision" not in handle.pruning:
        raise ValueError(
            f"model must have a vision tower with alignment, got a {type(model).__name__}: of a decoder "
            "handle.selections says what is left"
        )
    fits: list[Tensor] = []  # per layer, (T,)
    hook = handle.guide.logits["vision"].register_forward_hook(lambda *a: fits.append(a[-1].amax(dim=1).relu()))
    try:
        with evaluating(model):
            model(**{name: value.to(model.device) for name, value in inputs.items()})
    finally:
        hook.remove()
    branch, size = handle.pruning["vision"], tower_config(model, "vision").patch_size
    entered = branch.last.entered
    assert entered is not None, "a forward has run"
    patches = (inputs["pixel_values"].shape[-1] // size) ** 2
    first = entered.max_seqlen - patches  # position of the first patch: after the class token, if any
    states = [entered, *branch.last.layers]
    kept = [[positions.cpu() - first for positions in state.kept_positions()] for state in states]
    return View(
        patches=[list(of_image) for of_image in zip(*kept, strict=True)],
        alignment=[_alignment(state, fit, first, patches) for state, fit in zip(states, fits, strict=False)],
        words=_words(tokenizer, inputs["input_ids"][0], handle.selections["text"][-1][0])
        if "text" in handle.pruning and "input_ids" in inputs
        else [],
        patch_size=size,
    )


def _alignment(state, fit: Tensor, first: int, patches: int) -> Tensor:
    """(patches,): what `fit` (T,) says of the patches of the first sequence that enters a layer, NaN elsewhere."""
    end = int(state.cu_seqlens[1])
    origin = state.origin[:end].cpu()
    positions = origin - first
    real = (positions >= 0) & (origin >= 0)
    return torch.full((patches,), float("nan")).index_copy(0, positions[real].long(), fit[:end].cpu()[real].float())


def _examples(data, rows: int) -> list[int]:
    """The numbers of samples spread over the data, of different images where the data know how to choose them."""
    if hasattr(data, "examples"):
        return data.examples(rows)
    if not 1 <= rows <= len(data):
        raise ValueError(f"rows must be from 1 to the {len(data)} samples in the data, got {rows}")
    return [i * len(data) // rows for i in range(rows)]


def _inputs(task, item: dict) -> dict[str, Tensor]:
    batch = task.collate([item])
    batch.pop("image_index", None)  # there is one image
    return batch


def _resized(image: Image.Image, side: int) -> Tensor:
    """(3, side, side) uint8"""
    resized = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _words(tokenizer, ids: Tensor, left: Tensor) -> Words:
    """The words of a text (L,) and whether their positions are among those left."""
    places, tokens = left.tolist(), tokenizer.convert_ids_to_tokens(ids.tolist())
    special = set(tokenizer.all_special_ids)
    return [(word, place in places) for place, word in enumerate(tokens) if int(ids[place]) not in special]
