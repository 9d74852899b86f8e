"""A picture of the tokens a compressed model keeps: images in rows, depth in columns, pruned patches dark."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker
from PIL import Image
from torch import Tensor, nn

from madtp.data.easy_vqa import EasyVqa
from madtp.inference import evaluating
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
            axes = _bare(figure.add_subplot(grid[row, depth + 1]), f"{int((positions > 0).sum())} patches")
            axes.imshow(_dimmed(data.images[image], positions - 1, vision.patch_size).numpy())
            if row == 0:
                axes.set_title(f"after layer {depth}" if depth else "input", fontsize=9, color=KEPT)
    figure.savefig(path, format="png")
    return Path(path)


def depths(
    model: nn.Module, image: Image.Image, path: str | Path, *, image_processor, tokenizer=None, text: str | None = None
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
    handle = getattr(model, "madtp_handle", None)
    if handle is None or "vision" not in handle.pruning:
        raise TypeError(f"model must be a compressed one with a vision tower, got {type(model).__name__}")
    inputs = {"pixel_values": image_processor(image, return_tensors="pt")["pixel_values"]}
    reads = "input_ids" in inspect.signature(model.forward).parameters
    if reads and (text is None or tokenizer is None):
        raise ValueError(f"text must be given for a {type(model).__name__}, got none")
    if reads:
        inputs |= {
            name: value for name, value in tokenizer(text, return_tensors="pt").items() if name != "token_type_ids"
        }
    if reads and "labels" in inspect.signature(model.forward).parameters and not hasattr(model, "classifier"):
        inputs["labels"] = inputs["input_ids"]  # what a decoder is asked to say does not matter here
    if handle.family.images_per_text > 1:
        inputs["pixel_values"] = inputs["pixel_values"][:, None].repeat(1, handle.family.images_per_text, 1, 1, 1)
    fits: list[Tensor] = []  # per layer, (T,)
    logits = model.madtp_guide.logits["vision"].register_forward_hook(lambda *a: fits.append(a[-1].amax(dim=1).relu()))
    try:
        with evaluating(model):
            model(**inputs)
    finally:
        logits.remove()

    branch, vision = handle.pruning["vision"], model.get_submodule(handle.family.path("vision")).config
    side, size = vision.image_size // vision.patch_size, vision.patch_size
    first = branch.entered.max_seqlen - side * side  # position of the first patch: after the class token, if any
    states = [branch.entered, *branch.layers]
    pixels = _pixels(image, side * size)
    figure = Figure(figsize=(CELL * len(states), CELL * 2.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, len(states), left=0.01, right=0.99, bottom=0.05, top=0.8, wspace=0.06, hspace=0.2)
    for depth, state in enumerate(states):
        kept = state.kept_positions()[0] - first
        axes = _bare(figure.add_subplot(grid[0, depth]), f"{int((kept >= 0).sum())} patches")
        axes.imshow(_dimmed(pixels, kept, size).numpy())
        axes.set_title(f"after layer {depth}" if depth else "input", fontsize=9, color=KEPT)
        if depth < len(fits):
            positions, own = state.origin[: state.cu_seqlens[1]] - first, fits[depth][: state.cu_seqlens[1]]
            patches = (positions >= 0) & (state.origin[: state.cu_seqlens[1]] >= 0)
            alignment = torch.full((side * side,), float("nan")).index_copy(0, positions[patches], own[patches].float())
            axes = _bare(figure.add_subplot(grid[1, depth]), f"alignment, layer {depth + 1}")
            axes.imshow(alignment.view(side, side).numpy(), cmap="viridis")
    if reads and "text" in handle.pruning:
        left = handle.selections["text"][-1][0].tolist()
        tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        line = [_word(word, place in left) for place, word in enumerate(tokens)]
        axes = figure.add_axes((0.01, 0.88, 0.98, 0.1))
        axes.axis("off")
        axes.add_artist(_anchored(HPacker(children=line, pad=0, sep=3.5, align="baseline"), "center left"))
    figure.savefig(path, format="png")
    return Path(path)


def _bare(axes, label: str):
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(label, fontsize=7, labelpad=2, color=KEPT)
    return axes


def _pixels(image: Image.Image, side: int) -> Tensor:
    """(3, side, side) uint8"""
    resized = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


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
        lines[-1].append(_word(word, kept))
    packed = [HPacker(children=line, pad=0, sep=3.5, align="baseline") for line in lines]
    right = answer == truth
    verdict = answer if right else f"{answer}, should be {truth}"
    packed.append(TextArea(verdict, textprops={"fontsize": 9, "weight": "bold", "color": RIGHT if right else WRONG}))
    box = VPacker(children=packed, pad=0, sep=4, align="left")
    axes.add_artist(_anchored(box, "center left"))


def _word(word: str, kept: bool) -> TextArea:
    return TextArea(word, textprops={"fontsize": 9, "color": KEPT if kept else GONE})


def _anchored(box, place: str) -> AnchoredOffsetbox:
    return AnchoredOffsetbox(place, child=box, frameon=False, pad=0, borderpad=0.2)
