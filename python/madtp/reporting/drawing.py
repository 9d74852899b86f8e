# SPDX-License-Identifier: Apache-2.0
"""What pictures of pruned tokens are drawn with: rows of images with dark patches, beside what was asked and said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker
from torch import Tensor

CELL = 1.15  # inches of one image
CAPTION = 2.6  # inches
SHADE = torch.tensor([38, 42, 51])  # what pruned patches fade to
LINE_LETTERS = 26  # of a text, at most, on one line
KEPT, GONE, RIGHT, WRONG = "#1b1f27", "#b9bec9", "#1a7f37", "#c62828"

Words = list[tuple[str, bool]]  # each with whether the text tower still has it after its last layer


def unnormalised(pixels: Tensor, mean, std) -> Tensor:
    """(..., 3, H, W) float -> uint8."""
    mean, std = (torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (mean, std))
    return (255 * (pixels.float() * std + mean)).round().clamp(0, 255).to(torch.uint8)


def dimmed(image: Tensor, patches: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 -> (H, W, 3) uint8 with every patch that is not in `patches` (numbers, row by row) shaded."""
    height, width = (side // size for side in image.shape[-2:])
    kept = torch.zeros(height * width)
    kept[patches[patches >= 0]] = 1
    weight = kept.view(height, width).repeat_interleave(size, 0).repeat_interleave(size, 1)[..., None]
    weight = 0.18 + 0.82 * weight
    shown = image[:, : height * size, : width * size].permute(1, 2, 0)
    return (shown * weight + SHADE * (1 - weight)).round().to(torch.uint8)


def sheet(rows: int, depths: int, *, caption: float = 0.0, top: float | None = None) -> tuple[Figure, Any]:
    """A figure, and its grid: a column for each depth, after a wider one where there are captions (inches)."""
    height = rows + (0.6 if top is not None else 0.4)
    figure = Figure(figsize=(caption + CELL * depths, CELL * height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    widths = [caption / CELL] * bool(caption) + [1] * depths
    grid = figure.add_gridspec(
        rows, len(widths), width_ratios=widths,
        left=0.01, right=0.99, bottom=0.22 / height, top=top or 1 - 0.3 / height, wspace=0.08, hspace=0.22,
    )  # fmt: skip
    return figure, grid


def draw_row(
    figure: Figure,
    grid,
    row: int,
    column: int,
    image: Tensor,
    kept: Sequence[Tensor],
    size: int,
    titles: Sequence[str] = (),
    unit: str = "patches",
) -> None:
    """One row: the image (3, H, W) uint8 with the patches left at each depth; titles: of these, over the first row."""
    for depth, patches in enumerate(kept):
        axes = bare(figure.add_subplot(grid[row, column + depth]), f"{int((patches >= 0).sum())} {unit}")
        axes.imshow(dimmed(image, patches, size).numpy())
        if row == 0:
            axes.set_title(titles[depth], fontsize=9, color=KEPT)


def by_layer(depths: int) -> list[str]:
    """Titles of what stands at the input and after each layer."""
    return [f"after layer {depth}" if depth else "input" for depth in range(depths)]


def caption(axes, words: Words, said: str, wanted: str) -> None:
    """The text, and below it what the model said, green where that is right."""
    axes.axis("off")
    verdict = said if said == wanted else f"{said}, should be {wanted}"
    color = RIGHT if said == wanted else WRONG
    lines: list[Any] = [line(part) for part in _wrapped(words)]
    for part in _wrapped([(word, True) for word in verdict.split()]):
        text = " ".join(word for word, _ in part)
        lines.append(TextArea(text, textprops={"fontsize": 9, "weight": "bold", "color": color}))
    if lines:  # a text of unknown words has none
        axes.add_artist(anchored(VPacker(children=lines, pad=0, sep=4, align="left")))


def _wrapped(words: Words) -> list[Words]:
    """Lines of `LINE_LETTERS` letters at most, but for longer words."""
    lines: list[Words] = []
    letters = LINE_LETTERS
    for word, kept in words:
        letters += len(word) + 1
        if letters > LINE_LETTERS:
            lines.append([])
            letters = len(word) + 1
        lines[-1].append((word, kept))
    return lines


def line(words: Words) -> HPacker:
    """Words that are gone in grey."""
    texts: list[Artist] = [
        TextArea(word, textprops={"fontsize": 9, "color": KEPT if kept else GONE}) for word, kept in words
    ]
    return HPacker(children=texts, pad=0, sep=3.5, align="baseline")


def bare(axes, label: str):
    """Axes without a frame, and a label below."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(label, fontsize=7, labelpad=2, color=KEPT)
    return axes


def anchored(box) -> AnchoredOffsetbox:
    """At the left, in the middle of its axes."""
    return AnchoredOffsetbox("center left", child=box, frameon=False, pad=0, borderpad=0.2)


def saved(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG."""
    figure.savefig(path, format="png")
    return Path(path)
