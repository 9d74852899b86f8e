# SPDX-License-Identifier: Apache-2.0
"""The patches of images as rows, one image after another, while they go through a vision tower and get fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Segments(NamedTuple):
    """Rows that attend to themselves.

    Args:
        ends: (S + 1,) int32.
        longest: at least the longest.
    """

    ends: Tensor
    longest: int

    def kept(self, before: Tensor) -> Segments:
        """Of rows of which `before` (T + 1,) int32 are left before each."""
        return Segments(before[self.ends.long()], self.longest)


@dataclass(frozen=True)
class Rows:
    """T rows, of which m make a unit: the patches that become one token of the decoder.

    Args:
        x: (T, C).
        unit: (T,) int64, the number of the unit that a row is of, among those of all images in the order of their
            tokens; -1 for rows that are of none, as CLS and registers, and always stay. Rows of a unit are in reading
            order.
        size: m.
        lengths: how many units each image has at first.
        whole: frames, or images, which attend to themselves.
        windows: what does so in layers with windows; None where no layer has some.
        rotary: (T, D) each, the cosines and sines of every row; None where positions are in x.
    """

    x: Tensor
    unit: Tensor
    size: int
    lengths: list[int]
    whole: Segments
    windows: Segments | None = None
    rotary: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of_grids(cls, hidden: Tensor, grid: tuple[int, int], side: int, tiles: Sequence[int]) -> Rows:
        """hidden (B, P + height * width, C): P rows of no unit, then a grid in reading order, of each tile.

        Args:
            grid: height, width.
            side: patches of a unit along each axis.
            tiles: how many of the B make up each image.
        """
        batch, length, channels = hidden.shape
        order = unit_major(*grid, side).to(hidden.device)
        protected, units = length - len(order), len(order) // side**2
        x = torch.cat([hidden[:, :protected], hidden[:, protected:][:, order]], 1)
        unit = torch.arange(batch * units, device=hidden.device).repeat_interleave(side**2)
        unit = F.pad(unit.view(batch, len(order)), (protected, 0), value=-1)
        ends = torch.arange(batch + 1, dtype=torch.int32, device=hidden.device) * length
        lengths = [count * units for count in tiles]
        return cls(x.reshape(-1, channels), unit.flatten(), side**2, lengths, Segments(ends, length))

    @classmethod
    def of_images(cls, images: Sequence[Tensor], grids: Sequence[tuple[int, int]], side: int) -> Rows:
        """Images (height * width, C) of grids of their own, in reading order."""
        parts = [image[unit_major(*grid, side).to(image.device)] for image, grid in zip(images, grids, strict=True)]
        x, size, lengths = torch.cat(parts), side**2, [len(part) // side**2 for part in parts]
        ends = F.pad(torch.tensor([len(part) for part in parts]).cumsum(0), (1, 0)).int().to(x.device)
        return cls(
            x, torch.arange(len(x), device=x.device) // size, size, lengths, Segments(ends, max(map(len, parts)))
        )

    def with_x(self, x: Tensor) -> Rows:
        return replace(self, x=x)

    def in_order(self, units: Tensor, windows: Segments) -> Rows:
        """These rows, unit by unit so far, in another order of units (U,), which goes window by window."""
        index = (units[:, None] * self.size + torch.arange(self.size, device=units.device)).flatten()
        rotary = None if self.rotary is None else (self.rotary[0][index], self.rotary[1][index])
        return replace(self, x=self.x[index], unit=self.unit[index], rotary=rotary, windows=windows)

    def keep(self, alive: Tensor) -> tuple[Rows, Tensor]:
        """The rows of the units that are alive (U,), and their numbers among the rows."""
        stay = (self.unit < 0) | alive[self.unit]
        index, before = stay.nonzero().flatten(), F.pad(stay.cumsum(0, dtype=torch.int32), (1, 0))
        rotary = None if self.rotary is None else (self.rotary[0][index], self.rotary[1][index])
        whole, windows = self.whole.kept(before), None if self.windows is None else self.windows.kept(before)
        rows = replace(self, x=self.x[index], unit=self.unit[index], whole=whole, windows=windows, rotary=rotary)
        return rows, index

    def importance(self, of_rows: Tensor) -> Tensor:
        """(T,) -> (U,), the sum of each unit's rows; 0 of those that are gone."""
        return of_rows.new_zeros(sum(self.lengths) + 1).index_add(0, self.unit + 1, of_rows)[1:]

    def units(self, x: Tensor) -> Tensor:
        """Of these rows x (T, C) -> (U', m, C), those of the units that are left, in the order of tokens."""
        order = self.unit.argsort(stable=True)[int((self.unit < 0).sum()) :]
        return x[order].unflatten(0, (-1, self.size))


def unit_major(height: int, width: int, side: int) -> Tensor:
    """(height * width,) int64: the rows of a grid in reading order, unit by unit."""
    if height % side or width % side:
        raise ValueError(
            f"pixel_values must have patches in multiples of {side} along each axis, got {height} x {width}"
        )
    rows = torch.arange(height * width).reshape(height // side, side, width // side, side)
    return rows.transpose(1, 2).flatten()
