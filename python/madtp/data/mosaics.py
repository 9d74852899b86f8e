# SPDX-License-Identifier: Apache-2.0
"""Mosaics: drawn pictures with questions about places in them, for decoders that read images.

A picture is a grid of 2 x 2 or 3 x 3 places, with the coloured shapes of easy-vqa and emoji in them, or three rows of
characters. What is asked is what is at a place, what colour it is, where something is, and what a row says: fine print
is what pruning breaks first. All is a function of the arguments and the seed alone, on every machine: icons and
characters ship as pictures (examples/draw_sprites.py), and nothing is fetched.
"""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from madtp.data.conversations import IMAGE, Conversations
from madtp.data.errors import DataError

SPRITES = Path(__file__).parents[1] / "assets" / "mosaics"
SIDE = 96  # pixels of a picture
COLORS = {
    "red": (220, 40, 40),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (235, 205, 30),
    "teal": (20, 150, 150),
    "brown": (130, 75, 35),
    "gray": (125, 125, 125),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "rectangle", "triangle")
ICONS = {  # as questions have it -> the label of the emoji
    "cat": "cat face",
    "dog": "dog face",
    "fish": "fish",
    "apple": "red apple",
    "car": "automobile",
    "tree": "evergreen tree",
    "heart": "red heart",
    "sun": "sun",
    "moon": "crescent moon",
    "house": "house",
    "key": "key",
    "umbrella": "umbrella",
}
CHARACTERS = "0123456789ACEFHKLPTX"
ICON_SIDES = (40, 26)  # pixels, in grids of 2 x 2 and of 3 x 3
GLYPH = (14, 16)  # pixels of a character, wide and high
ROWS = ("top", "middle", "bottom")
PLACES = {
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right"),
}
IN_A_ROW = 4  # characters
ORDINALS = ("first", "second", "third", "last")
EMPTY = 0.15  # share of the places with nothing in them
IMAGES = {"train": 20000, "test": 1200}
QUESTIONS = 4  # of a picture of the test set, each a record of its own
WORDS = ("USER:", "ASSISTANT:", "what", "is", "color", "where", "the", "read", "row", "character", "?", "nothing", "in")
VOCABULARY = (*WORDS, *SHAPES, *ICONS, *COLORS, *ROWS, "left", "right", *ORDINALS, *CHARACTERS)  # all words there are


class Thing(NamedTuple):
    """What is at a place: a shape of a colour, or an icon. dx, dy: where in the place, from 0 to 1."""

    name: str
    color: str | None
    dx: float
    dy: float


class Box(NamedTuple):
    """A shape, an icon or a character where it is drawn, in pixels. color: of a shape."""

    name: str
    color: str | None
    left: int
    top: int
    width: int
    height: int


class Mosaic(NamedTuple):
    """A picture before it is drawn.

    grid: places of a side; 0 for rows of characters. things: place by place, None where nothing is. rows: what each row
    says, and how many pixels it is off to the right and down.
    """

    grid: int
    background: tuple[int, int, int]
    things: tuple[Thing | None, ...] = ()
    rows: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def random(cls, generator: np.random.Generator, kind: int) -> Mosaic:
        """kind: 0 and 1 for grids of 2 x 2 and 3 x 3, 2 for rows."""
        red, green, blue = (int(value) for value in generator.integers(215, 256, 3))
        if kind == 2:
            rows = []
            for _ in ROWS:
                letters = "".join(CHARACTERS[i] for i in generator.integers(len(CHARACTERS), size=IN_A_ROW))
                rows.append((letters, int(generator.integers(2, 17)), int(generator.integers(2, 15))))
            return cls(0, (red, green, blue), rows=tuple(rows))
        grid, names = kind + 2, [*SHAPES, *ICONS]
        things: list[Thing | None] = []
        for _ in PLACES[grid]:
            shape = generator.random() < 0.5
            name = names[generator.integers(len(SHAPES)) if shape else generator.integers(len(SHAPES), len(names))]
            color = list(COLORS)[generator.integers(len(COLORS))] if shape else None
            thing = Thing(name, color, *(float(at) for at in generator.random(2)))
            things.append(None if generator.random() < EMPTY else thing)
        return cls(grid, (red, green, blue), tuple(things))

    def questions(self) -> list[tuple[str, str]]:
        """All that can be asked, with the answers."""
        asked = []
        for row, (letters, _, _) in zip(ROWS, self.rows, strict=bool(self.rows)):
            asked.append((f"read the {row} row", " ".join(letters)))
            for ordinal, letter in zip(ORDINALS, letters, strict=True):
                asked.append((f"what is the {ordinal} character in the {row} row ?", letter))
        named = [thing.name for thing in self.things if thing is not None]
        for place, thing in zip(PLACES.get(self.grid, ()), self.things, strict=True):
            asked.append((f"what is {place} ?", "nothing" if thing is None else thing.name))
            if thing is not None and thing.color is not None:
                asked.append((f"what color is the {thing.name} {place} ?", thing.color))
            if thing is not None and named.count(thing.name) == 1:
                asked.append((f"where is the {thing.name} ?", place))
        return asked

    def boxes(self) -> list[Box]:
        """Everything there is, as it is drawn, one over the other."""
        found = []
        for number, (letters, right, down) in enumerate(self.rows):
            top = number * SIDE // len(ROWS) + down
            for place, letter in enumerate(letters):
                found.append(Box(letter, None, right + place * (GLYPH[0] + 4), top, *GLYPH))
        for number, thing in enumerate(self.things):
            if thing is not None:
                cell, side = SIDE // self.grid, ICON_SIDES[self.grid - 2]
                row, column = divmod(number, self.grid)
                left, top = (cell * at + int(d * (cell - side + 1)) for at, d in ((column, thing.dx), (row, thing.dy)))
                found.append(Box(thing.name, thing.color, left, top, side, side))
        return found

    def draw(self) -> Image.Image:
        """RGB, `SIDE` pixels wide and high."""
        pixels = np.empty((SIDE, SIDE, 3), np.uint8)
        pixels[:] = self.background
        for box in self.boxes():
            color, ink = _colored(box)
            under = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
            share = ink[..., None].astype(np.uint32)
            under[:] = ((share * color.astype(np.uint32) + (255 - share) * under + 127) // 255).astype(np.uint8)
        return Image.fromarray(pixels)


class Mosaics(Conversations):
    """Mosaics as `Conversations`, drawn when they are looked at.

    The test set has 1,200 pictures with four records each, of one question; the training set 20,000 with one record
    each, of `turns` questions, or fewer where there are none left to ask.

    Args:
        split: "train" or "test".
        processor: of Hugging Face, as of `Conversations`.
        turns: questions of a record of the training set.
        seed: of the pictures and of what is asked.
        limit: keep the first `limit` records.

    Raises:
        DataError, ValueError: an argument breaks its rule.
    """

    def __init__(
        self,
        split: str,
        processor,
        *,
        turns: int = 1,
        seed: int = 0,
        max_length: int | None = None,
        limit: int | None = None,
    ):
        if split not in IMAGES:
            raise ValueError(f"split must be one of {', '.join(IMAGES)}, got {split!r}")
        if turns < 1:
            raise ValueError(f"turns must be at least 1, got {turns}")
        self.split, self.turns, self.seed = split, turns, seed
        self.wanted = limit
        super().__init__(f"mosaics {split}", ".", processor, None, max_length, limit)
        unknown = [w for w in VOCABULARY if self.processor.tokenizer.unk_token_id in self._tokens(w)]
        if unknown:
            raise DataError(f"tokenizer must know the words of mosaics, got none for {', '.join(unknown[:3])}")

    def examples(self, rows: int) -> list[int]:
        """The numbers of records about as many pictures, of every kind in turn.

        Raises:
            ValueError: there are fewer pictures.
        """
        each = QUESTIONS if self.split == "test" else 1
        pictures = len(self) // each
        if not 1 <= rows <= pictures:
            raise ValueError(f"rows must be from 1 to the {pictures} images in the data, got {rows}")
        return [each * row + row % each for row in range(rows)]

    def _read(self) -> list[dict]:
        each = QUESTIONS if self.split == "test" else 1
        images = IMAGES[self.split] if self.wanted is None else min(IMAGES[self.split], -(-self.wanted // each))
        return [record for number in range(images) for record in self._records(number)]

    def _records(self, number: int) -> list[dict]:
        generator = self._generator(number, "questions")
        asked = self.mosaic(number).questions()
        if self.split == "test":  # a question of every kind first, so that the many of one kind are not most of all
            kinds: dict[str, list[tuple[str, str]]] = {}
            for index in generator.permutation(len(asked)).tolist():
                kinds.setdefault(kind_of(asked[index][0]), []).append(asked[index])
            turns = [questions[round_] for round_ in range(len(asked)) for questions in kinds.values()
                     if round_ < len(questions)]  # fmt: skip
            chosen = [[turn] for turn in turns[:QUESTIONS]]
        else:
            chosen = [[asked[i] for i in generator.permutation(len(asked))[: self.turns].tolist()]]
        return [
            {"id": f"{self.split}-{number}-{i}", "image": str(number), "conversations": _said(turns)}
            for i, turns in enumerate(chosen)
        ]

    def _picture(self, name: str) -> Image.Image:
        return self.mosaic(int(name)).draw()

    def mosaic(self, number: int) -> Mosaic:
        """The picture of that number, before it is drawn."""
        return Mosaic.random(self._generator(number, "picture"), number % 3)

    def _generator(self, number: int, what: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.split} {what}".encode()), number])


def kind_of(question: str) -> str:
    """Of a question: "color", "what", "where", "read" or "character"."""
    words = question.split()
    return next((word for word in ("color", "character", "where", "read") if word in words), "what")


def write_mosaics(data: Mosaics, folder: Path | str) -> Path:
    """Writes the pictures of a data set and its records, as `Conversations` and LLaVA read them; returns the file."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for record in data.records:
        path = f"{data.split}-{record['image']}.png"
        if not (folder / "images" / path).exists():
            data._picture(record["image"]).save(folder / "images" / path)
        records.append({**record, "image": path})
    file = folder / f"{data.split}.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


def _said(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    said = []
    for number, (question, answer) in enumerate(turns):
        said += [{"from": "human", "value": question if number else f"{IMAGE}\n{question}"}]
        said += [{"from": "gpt", "value": answer}]
    return said


def _colored(box: Box) -> tuple[np.ndarray, np.ndarray]:
    """The colour, (3,) or (h, w, 3), and how much of it covers what is below, (h, w) uint8."""
    if box.name in ICONS:
        icon = _icons(box.width)[list(ICONS).index(box.name)]
        return icon[..., :3], icon[..., 3]
    if box.color is not None:
        return np.array(COLORS[box.color]), _shape(box.name, box.width)
    return np.zeros(3), _characters()[CHARACTERS.index(box.name)]


def _shape(name: str, side: int) -> np.ndarray:
    """(side, side) uint8, 255 inside."""
    y, x = np.mgrid[:side, :side] * 2 + 1 - side  # from 1 - side to side - 1
    if name == "circle":
        inside = x**2 + y**2 <= side**2
    elif name == "rectangle":
        inside = 3 * np.abs(y) <= 2 * side
    else:
        inside = 2 * np.abs(x) <= y + side
    return np.where(inside, 255, 0).astype(np.uint8)


@cache
def _icons(side: int) -> np.ndarray:
    """(icons, side, side, 4) uint8, RGBA."""
    top = sum(ICON_SIDES[: ICON_SIDES.index(side)])
    with Image.open(SPRITES / "icons.png") as sheet:
        row = np.asarray(sheet.convert("RGBA"))[top : top + side, : len(ICONS) * side]
    return row.reshape(side, len(ICONS), side, 4).transpose(1, 0, 2, 3)


@cache
def _characters() -> np.ndarray:
    """(characters, h, w) uint8"""
    with Image.open(SPRITES / "characters.png") as sheet:
        ink = np.asarray(sheet.convert("L"))
    return ink.reshape(GLYPH[1], len(CHARACTERS), GLYPH[0]).transpose(1, 0, 2)
