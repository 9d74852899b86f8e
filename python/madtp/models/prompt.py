# SPDX-License-Identifier: Apache-2.0
"""The prompt of a vision-language decoder: where its images are, and the prompt without the image tokens that go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")

MODALITIES = ("image", "video")
# What begins an encoder's arguments, by modality: as `generate` of transformers knows them.
PIXELS = {"image": ("pixel_values", "pixel_values_images", "image_patches"), "video": ("pixel_values_videos",)}
FILLS = {"labels": -100, "shift_labels": -100}  # of padding; any other argument of a value for each token gets 0


class Images(NamedTuple):
    """The images of a prompt, of one modality, in order.

    Args:
        modality: "image" or "video".
        placeholders: (B, S) bool, their tokens in the prompt.
        lengths: how many tokens each has.
    """

    modality: str
    placeholders: Tensor
    lengths: list[int]

    def begins(self) -> list[int]:
        """Where each begins in the flattened prompt; one host read. Of an image without tokens, the end."""
        places = [*self.placeholders.flatten().nonzero().flatten().tolist(), self.placeholders.numel()]
        begin, begins = 0, []
        for length in self.lengths:
            begins.append(places[begin] if length else places[-1])
            begin += length
        return begins


def in_prompt_order(modalities: Sequence[Images], values: Iterable[Sequence[Value]]) -> list[Value]:
    """What each image of each modality has, in the order of the prompt."""
    found: list[tuple[int, Value]] = []
    for images, own in zip(modalities, values, strict=True):
        found += zip(images.begins(), own, strict=True)
    return [value for _, value in sorted(found, key=lambda pair: pair[0])]


class Shortened(NamedTuple):
    """A prompt that lost tokens.

    Args:
        input_ids: (B, S').
        kwargs: the other arguments, those with a value for each token shortened alike, and always an attention mask.
        columns: (B, S') int64, the places in the whole prompt; -1 for padding.
    """

    input_ids: Tensor
    kwargs: dict[str, Any]
    columns: Tensor


def has_images(kwargs: Mapping[str, Any]) -> bool:
    """Whether pixels or encoded images are among the arguments of a forward."""
    encoded = kwargs.get("mm_encoder_outputs")
    if isinstance(encoded, Mapping):
        encoded = next((output for output in encoded.values() if output is not None), None)
    return encoded is not None or any(kwargs.get(name) is not None for names in PIXELS.values() for name in names)


def token_of(config: Any, modality: str) -> int | None:
    """The id of the placeholder; None where the model has none."""
    return getattr(config, f"{modality}_token_id", None)


def find_placeholders(input_ids: Tensor, config: Any, modality: str) -> Tensor:
    """(B, S) bool."""
    token = token_of(config, modality)
    return torch.zeros_like(input_ids, dtype=torch.bool) if token is None else input_ids.eq(token)


def find_images(
    input_ids: Tensor, config: Any, modality: str, lengths: Sequence[int], mask: Tensor | None = None
) -> Images:
    """Of images with so many tokens. Raises ValueError unless there is a placeholder for each, that the attention mask
    (B, S) does not hide."""
    placeholders = find_placeholders(input_ids, config, modality)
    found = int((placeholders if mask is None else placeholders & mask.bool()).sum())
    if found != sum(lengths):
        token = f"{modality}_token_id ({token_of(config, modality)})"
        raise ValueError(
            f"input_ids must hold one {token}, not masked, for each of the {sum(lengths)} tokens that the projector "
            f"gives, got {found}"
        )
    return Images(modality, placeholders, list(lengths))


def count_images(input_ids: Tensor, config: Any, kwargs: Mapping[str, Any], modality: str) -> Images:
    """The images of a prompt before they are encoded, by the runs of placeholders and the shapes of the pixels: of a
    model whose tower is not known.

    Raises:
        ValueError: these do not say where an image ends.
    """
    placeholders = find_placeholders(input_ids, config, modality)
    runs, total = run_lengths(placeholders), int(placeholders.sum())
    pixels = next((kwargs[name] for name in PIXELS[modality] if kwargs.get(name) is not None), None)
    grids = kwargs.get(f"{modality}_grid_thw")
    if total and pixels is None and grids is None:
        raise ValueError(f"{PIXELS[modality][0]} must be given with images, whose shapes say where one ends, got none")
    if grids is not None:
        patches = grids.prod(-1).tolist()
        lengths = [total * count // max(sum(patches), 1) for count in patches]
    else:
        lengths = _lengths(placeholders, runs, total, pixels, kwargs.get("image_sizes") is not None)
    if sum(lengths) != total:
        raise ValueError(
            f"input_ids must show where each image ends, got {len(runs)} runs of {modality}_token_id for "
            f"{len(lengths)} images"
        )
    return Images(modality, placeholders, lengths)


def shorten(input_ids: Tensor, kwargs: Mapping[str, Any], kept: Tensor, pad: int) -> Shortened:
    """The prompt without the tokens that are not `kept` (B, S) bool; padding stays on its side.

    Args:
        pad: the token of padding, which is no placeholder.

    Raises:
        ValueError: `logits_to_keep` names places that are not the same in every row, or that are gone, or positions
            are not those of the prompt.
    """
    real = _real(input_ids, kwargs)
    alive = real & kept
    width = int(alive.sum(1).max())  # the one host read, of a device that knows the counts
    if bool((~real[:, -1]).any()):  # the padding is on the right
        index = (~alive).byte().argsort(dim=1, stable=True)[:, :width]
    else:
        index = alive.byte().argsort(dim=1, stable=True)[:, input_ids.shape[1] - width :]
    mask = alive.gather(1, index)
    columns = index.masked_fill(~mask, -1)
    short = dict(kwargs)
    for name in _per_token(input_ids, kwargs):
        short[name] = kwargs[name].gather(1, index).masked_fill(~mask, FILLS.get(name, 0))
    if (positions := kwargs.get("position_ids")) is not None:  # (B or 1, S), or (3 or 4, B, S)
        if positions.ndim < 2 or positions.shape[-1] != input_ids.shape[1]:  # `generate` makes them of a mask's length
            raise ValueError(
                f"position_ids, and attention_mask, must have {input_ids.shape[1]} columns, as input_ids, got "
                f"{tuple(positions.shape)}"
            )
        positions = positions.expand(*positions.shape[:-2], *input_ids.shape)
        short["position_ids"] = positions.gather(-1, index.expand(*positions.shape[:-1], width))
    if isinstance(logits := kwargs.get("logits_to_keep"), Tensor):
        short["logits_to_keep"] = _moved(logits, columns, input_ids.shape[1])
    # Always explicit: without a mask, gaps in the positions read as several sequences packed into one row.
    short["attention_mask"] = mask.to(_mask_dtype(kwargs))
    return Shortened(input_ids.gather(1, index).masked_fill(~mask, pad), short, columns)


def hide(input_ids: Tensor, kwargs: Mapping[str, Any], kept: Tensor) -> Shortened:
    """The whole prompt, in which nothing attends to what `shorten` would remove."""
    real = _real(input_ids, kwargs)
    hidden = dict(kwargs)
    for name in FILLS:
        if kwargs.get(name) is not None:
            hidden[name] = kwargs[name].masked_fill(~kept, FILLS[name])
    hidden["attention_mask"] = (real & kept).to(_mask_dtype(kwargs))
    columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return Shortened(input_ids, hidden, columns.masked_fill(~(real & kept), -1))


def _real(input_ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    mask = kwargs.get("attention_mask")
    return torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()


def _mask_dtype(kwargs: Mapping[str, Any]) -> torch.dtype:
    mask = kwargs.get("attention_mask")
    return torch.long if mask is None else mask.dtype


def _per_token(input_ids: Tensor, kwargs: Mapping[str, Any]) -> list[str]:
    """The arguments that have a value for each token, (B, S): token types of any kind, labels."""
    others = ("attention_mask", "position_ids")
    return [
        name
        for name, value in kwargs.items()
        if isinstance(value, Tensor) and value.shape == input_ids.shape and name not in others
    ]


def _moved(places: Tensor, columns: Tensor, width: int) -> Tensor:
    """The places (K,) of the whole prompt in the short one."""
    wanted = torch.where(places < 0, places + width, places)
    found = columns[:, None, :] == wanted[:, None]  # (B, K, S')
    where = found.byte().argmax(-1)
    if not bool(found.any(-1).all()) or not bool((where == where[:1]).all()):
        raise ValueError(
            "logits_to_keep must be a number, or places of text that are left in every row and move alike, got "
            f"{places.tolist()}"
        )
    return where[0]


def run_lengths(placeholders: Tensor) -> list[int]:
    """The lengths of the runs of True in (B, S), row by row."""
    edges = torch.nn.functional.pad(placeholders.byte(), (1, 1)).flatten().diff()
    return ((edges == 255).nonzero() - (edges == 1).nonzero()).flatten().tolist()


def _lengths(placeholders: Tensor, runs: list[int], total: int, pixels: Tensor | None, sized: bool) -> list[int]:
    """Of images without a grid; a single length where nothing says how many there are.

    Args:
        sized: whether `image_sizes` come with the pixels: then images have lengths of their own.
    """
    images = len(runs) if pixels is None else len(pixels)
    if pixels is not None and not sized:
        if pixels.ndim == 4 and images and total % images == 0 and _are_whole(runs, total // images):
            return [total // images] * images  # one size: images, or tiles of one
        if pixels.ndim == 5 and images == len(placeholders):  # the tiles, or frames, of each sample
            return placeholders.sum(1).tolist()
    return runs if images == len(runs) else [total] if images == 1 else [0] * images


def _are_whole(runs: list[int], length: int) -> bool:
    """Whether images of this length end where runs do, or fill those that they share."""
    begin = 0
    for run in runs:
        inside = begin % length
        if inside + run > length and (inside or run % length):
            return False
        begin += run
    return True
