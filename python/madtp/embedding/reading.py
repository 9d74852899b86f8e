# SPDX-License-Identifier: Apache-2.0
"""Images as batches of pixels of one size, read by processes of their own; which ones are broken, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from madtp.data.images import MAX_BYTES, decode_image
from madtp.embedding.sources import Item
from madtp_kernels.bounded_file import one_line, read_bytes

MAX_WAITING = 8  # batches of images that wait for others of their size


class Batch(NamedTuple):
    """Images of one size, and their numbers among those asked for."""

    numbers: list[int]
    pixels: Tensor  # (B, 3, H, W)


class Broken(NamedTuple):
    """An image that is none."""

    number: int
    reason: str


def read_batches(
    items: Sequence[Item],
    image_processor: Callable[..., Any],
    batch_size: int,
    workers: int,
    broken: Callable[[Broken], None],
) -> Iterator[Batch]:
    """Batches of images of one size, `batch_size` where there are as many. They do not depend on `workers`.

    Args:
        workers: processes that read; 0: this one does.
        broken: is told of every image that cannot be read.
    """
    loader = DataLoader(
        _Images(items, image_processor),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_by_size,
    )
    return _full(_whole(loader, broken), batch_size)


def read_item(item: Item) -> bytes:
    """The bytes of an image. Raises OSError, and ValueError where they are too many or the file is cut off."""
    if item.size is None:
        return read_bytes(item.path, MAX_BYTES)
    if item.size > MAX_BYTES:
        raise ValueError(f"must have at most {MAX_BYTES} bytes, got {item.size}")
    with open(item.path, "rb") as file:
        content = os.pread(file.fileno(), item.size, item.offset)
    if len(content) < item.size:
        raise ValueError(f"must have {item.size} bytes, got {len(content)}")
    return content


class _Images(Dataset):
    """Number -> pixels (3, H, W), or why there are none."""

    def __init__(self, items: Sequence[Item], image_processor: Callable[..., Any]):
        self.items, self.image_processor = items, image_processor

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        try:
            picture = decode_image(read_item(self.items[number]))
            return number, torch.as_tensor(self.image_processor(picture, return_tensors="pt")["pixel_values"][0])
        except OSError as error:
            return number, error.strerror or one_line(error)
        except Exception as error:  # of an image processor, which has many kinds for shapes it cannot take
            return number, one_line(error)


def _by_size(samples: list[tuple[int, Tensor | str]]) -> tuple[list[Batch], list[Broken]]:
    """What is whole, stacked by size, and what is broken."""
    sizes: dict[torch.Size, tuple[list[int], list[Tensor]]] = {}
    for number, pixels in samples:
        if isinstance(pixels, Tensor):
            numbers, images = sizes.setdefault(pixels.shape, ([], []))
            numbers.append(number)
            images.append(pixels)
    broken = [Broken(number, reason) for number, reason in samples if isinstance(reason, str)]
    return [Batch(numbers, torch.stack(images)) for numbers, images in sizes.values()], broken


def _whole(chunks: Iterable[tuple[list[Batch], list[Broken]]], told: Callable[[Broken], None]) -> Iterator[list[Batch]]:
    for batches, broken in chunks:
        for one in broken:
            told(one)
        yield batches


def _full(chunks: Iterable[list[Batch]], batch_size: int) -> Iterator[Batch]:
    """Images wait for others of their size, but for the most frequent one where too many wait."""
    waiting: dict[torch.Size, Batch] = {}
    for chunk in chunks:
        for numbers, pixels in chunk:
            size = pixels.shape[1:]
            if size in waiting:
                before = waiting.pop(size)
                numbers, pixels = before.numbers + numbers, torch.cat((before.pixels, pixels))
            while len(numbers) >= batch_size:
                yield Batch(numbers[:batch_size], pixels[:batch_size])
                numbers, pixels = numbers[batch_size:], pixels[batch_size:]
            if numbers:
                waiting[size] = Batch(numbers, pixels)
        while sum(len(batch.numbers) for batch in waiting.values()) > MAX_WAITING * batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size].numbers)))
    yield from waiting.values()
