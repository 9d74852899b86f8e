"""A picture of the tokens a compressed model keeps: images in rows, depth in columns, pruned patches dark."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker
from torch import Tensor, nn

from madtp.accounting import evaluating
from madtp.tasks.easy_vqa import EasyVqa
from madtp.tasks.vqa import VqaTask

CELL = 1.15  # inches of one image
CAPTION = 2.6  # inches
SHADE = torch.tensor([38, 42, 51])  # what pruned patches fade to
LINE_LETTERS = 26  # of the question, at most, on one line
KEPT, GONE, RIGHT, WRONG = "#1b1f27", "#b9bec9", "#1a7f37", "#c62828"


def picture(model: nn.Module, task: VqaTask, data: EasyVqa, path: str | Path, *, images: int = 8) -> Path:
    """Draws `images` images spread over the data, each with one question, and writes a PNG to `path`.

    Words grey in a question are those its encoder pruned by its last layer.

    Args:
        model: compressed, as `madtp.from_pretrained` gives it.

    Raises:
        TypeError: the model is not compressed. ValueError: `images` is not a number of images in the data.
    """
    if not hasattr(model, "madtp_handle"):
        raise TypeError(f"model must be a compressed one, got a plain {type(model).__name__}")
    chosen = _spread(data, images)
    batch = task.collate([data[i] for i in chosen])
    with evaluating(model):
        answers = [task.answers[i] for i in task.predict(model, batch).tolist()]
    selections = model.madtp_handle.selections
    vision = model.config.vision_config

    depths = len(selections["vision"])
    figure = Figure(figsize=(CAPTION + CELL * (depths + 1), CELL * (images + 0.4)), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        images, depths + 2, width_ratios=[CAPTION / CELL, *[1] * (depths + 1)],
        left=0.01, right=0.99, bottom=0.03, top=1 - 0.3 / (images + 0.4), wspace=0.08, hspace=0.22,
    )  # fmt: skip
    for row, index in enumerate(chosen):
        _, truth, image = data.questions[index]
        _caption(
            figure.add_subplot(grid[row, 0]), _words(task, batch, selections["text"][-1][row], row), answers[row], truth
        )
        kept = [torch.arange(1 + (vision.image_size // vision.patch_size) ** 2)]
        kept += [layer[batch["image_index"][row]] for layer in selections["vision"]]
        for depth, positions in enumerate(kept):
            axes = figure.add_subplot(grid[row, depth + 1])
            axes.imshow(_dimmed(data.images[image], positions - 1, vision.patch_size).numpy())
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            axes.set_xlabel(f"{int((positions > 0).sum())} patches", fontsize=7, labelpad=2, color=KEPT)
            if row == 0:
                axes.set_title(f"after layer {depth}" if depth else "input", fontsize=9, color=KEPT)
    figure.savefig(path, format="png")
    return Path(path)


def _spread(data: EasyVqa, images: int) -> list[int]:
    """The numbers of questions about as many images, open questions and yes-or-no ones in turn where there are both."""
    by_image: dict[int, list[int]] = {}
    for index, (_, _, image) in enumerate(data.questions):
        by_image.setdefault(image, []).append(index)
    if not 1 <= images <= len(by_image):
        raise ValueError(f"images must be from 1 to the {len(by_image)} in the data, got {images}")
    chosen = []
    for row in range(images):
        questions = list(by_image.values())[row * len(by_image) // images]
        wanted = [i for i in questions if (data.questions[i][1] in ("yes", "no")) == bool(row % 2)]
        chosen.append((wanted or questions)[row % len(wanted or questions)])
    return chosen


def _dimmed(image: Tensor, patches: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 -> (H, W, 3) uint8 with every patch that is not in `patches` (numbers, row by row) shaded."""
    height, width = (side // size for side in image.shape[-2:])
    kept = torch.zeros(height * width)
    kept[patches[patches >= 0]] = 1
    weight = kept.view(height, width).repeat_interleave(size, 0).repeat_interleave(size, 1)[..., None]
    weight = 0.18 + 0.82 * weight
    return (image.permute(1, 2, 0) * weight + SHADE * (1 - weight)).round().to(torch.uint8)


def _words(task: VqaTask, batch: dict[str, Tensor], kept: Tensor, row: int) -> list[tuple[str, bool]]:
    """The words of a question and whether the text encoder still has them."""
    tokenizer = task.tokenizer
    ids = batch["input_ids"][row].tolist()
    words = zip(range(len(ids)), ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    return [(word, place in kept.tolist()) for place, token, word in words if token not in tokenizer.all_special_ids]


def _caption(axes, words: list[tuple[str, bool]], answer: str, truth: str) -> None:
    axes.axis("off")
    lines, letters = [[]], 0
    for word, kept in words:
        letters += len(word) + 1
        if letters > LINE_LETTERS and lines[-1]:
            lines.append([])
            letters = len(word) + 1
        lines[-1].append(TextArea(word, textprops={"fontsize": 9, "color": KEPT if kept else GONE}))
    packed = [HPacker(children=line, pad=0, sep=3.5, align="baseline") for line in lines]
    right = answer == truth
    verdict = answer if right else f"{answer}, should be {truth}"
    packed.append(TextArea(verdict, textprops={"fontsize": 9, "weight": "bold", "color": RIGHT if right else WRONG}))
    box = VPacker(children=packed, pad=0, sep=4, align="left")
    axes.add_artist(AnchoredOffsetbox("center left", child=box, frameon=False, pad=0, borderpad=0.2))
