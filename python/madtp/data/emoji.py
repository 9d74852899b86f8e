# SPDX-License-Identifier: Apache-2.0
"""Data sets drawn from emoji: retrieval, statements about two images (as in NLVR2), captions.

Every picture is an icon on a background (`scenes`). Concepts are split, so test images show things never seen in
training; `vendors=SHIFTED` shows them in a hand never seen either. Item i of a split is a function of its arguments
and `seed` alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from madtp.data.emoji_icons import ICONS, SHIFTED, VENDORS, Emoji
from madtp.data.emoji_kinds import BROAD, NOUNS
from madtp.data.scenes import COLORS, COLUMNS, ROWS, SCALES, TEXTURES, Scene
from madtp.data.word_tokenizer import word_tokenizer

__all__ = ["SHIFTED", "VENDORS", "Emoji", "EmojiCaptions", "EmojiPairs", "EmojiRetrieval", "build_tokenizer"]

IMAGE_MEAN = IMAGE_STD = 0.5
LARGEST_ICON = 112  # pixels; all icons of that size take 240 MB on disk

# Statement -> for which (left is one, right is one) it is true. The negation of each is here too, so that neither the
# statement alone nor the images alone say anything about the answer.
STATEMENTS = {
    "the left image shows {}": {(True, False), (True, True)},
    "the left image does not show {}": {(False, False), (False, True)},
    "the right image shows {}": {(False, True), (True, True)},
    "the right image does not show {}": {(False, False), (True, False)},
    "both images show {}": {(True, True)},
    "at most one image shows {}": {(False, False), (False, True), (True, False)},
    "at least one image shows {}": {(False, True), (True, False), (True, True)},
    "neither image shows {}": {(False, False)},
    "exactly one image shows {}": {(False, True), (True, False)},
    "both or neither of the images show {}": {(False, False), (True, True)},
}
_PAIRS = tuple((left, right) for left in (False, True) for right in (False, True))


class Group(NamedTuple):
    """Numbers of the concepts that a noun names, of those that are close by, and of the rest."""

    ones: list[int]
    close: list[int]
    rest: list[int]


def build_tokenizer():
    """A word-level tokenizer of all that `EmojiPairs` and `EmojiCaptions` can say."""
    texts = [*STATEMENTS, *NOUNS, *COLORS, *ROWS, *COLUMNS, *TEXTURES, "at in the on a background"]
    return word_tokenizer((text.replace("{}", "") for text in texts), max_length=32)


class _Pictures(Dataset):
    """What the data sets share: a source of icons, numbered items that are drawn alike every time, and their texts."""

    def __init__(self, split, size, vendors, seed, mean, std, source):
        self.split, self.size, self.seed, self.vendors = split, size, seed, tuple(vendors)
        unknown = sorted(set(self.vendors) - set(ICONS))
        if unknown or not self.vendors:
            raise ValueError(f"vendors must be some of {', '.join(ICONS)}, got {unknown or self.vendors}")
        if size < 16:
            raise ValueError(f"size must be at least 16 pixels, got {size}")
        self.source = Emoji() if source is None else source
        self.members = self.source.of_split(split)  # numbers of concepts
        self.icons = self.source.icons(min(LARGEST_ICON, round(SCALES[1] * size)))
        self.mean, self.std = (torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (mean, std))

    def __len__(self) -> int:
        return len(self.input_ids)

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(self.split.encode()), index])

    def _draw(self, concept: int, vendor: str, scene: Scene) -> Tensor:
        """(3, size, size) float32, normalised."""
        picture = scene.draw(self.icons[concept, list(self.source.drawings).index(vendor)], self.size)
        return (torch.from_numpy(picture).float() / 255 - self.mean) / self.std

    def _tokenize(self, tokenizer, texts: Sequence[str]) -> None:
        text = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        self.input_ids, self.attention_mask = text["input_ids"], text["attention_mask"]  # (items, L)

    def _of_kind(self) -> list[int]:
        """The members that have a kind."""
        return [number for number in self.members if self.source.concepts[number].kind is not None]


class EmojiRetrieval(_Pictures):
    """Images and texts of the same concepts: every concept by every vendor, `renders` times.

    A text is the label and up to two tags, such as "red apple, fruit, health". An item is a dict: pixel_values
    (3, size, size) float32, input_ids and attention_mask (L,) int64 padded to the longest text of the data set,
    concept and image, numbers: an image and a text are a pair when their concepts are equal.

    Args:
        split: "train", "val" or "test".
        tokenizer: of Hugging Face, such as that of `madtp.data.pretrained`.
        mean, std: of the pixels, one number or one per channel; those of ImageNet, as the pretrained tower wants.
        limit: keep the first `limit` items.
        source: `Emoji()`, if it has been read already.
    """

    def __init__(
        self,
        split: str,
        tokenizer,
        size: int = 224,
        *,
        vendors: Sequence[str] = VENDORS,
        renders: int = 1,
        seed: int = 0,
        mean: float | Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: float | Sequence[float] = IMAGENET_DEFAULT_STD,
        limit: int | None = None,
        source: Emoji | None = None,
    ):
        super().__init__(split, size, vendors, seed, mean, std, source)
        every = [(c, vendor) for _ in range(renders) for vendor in self.vendors for c in self.members]
        self.pictures, self.captions = [], []
        for index in range(_count(limit, len(every))):
            (concept, vendor), generator = every[index], self._generator(index)
            self.pictures.append((concept, vendor, Scene.random(generator)))
            self.captions.append(self._caption(concept, generator))
        self._tokenize(tokenizer, self.captions)

    def __getitem__(self, index: int) -> dict:
        return {
            "input_ids": self.input_ids[index],
            "attention_mask": self.attention_mask[index],
            "pixel_values": self._draw(*self.pictures[index]),
            "concept": self.pictures[index][0],
            "image": index,
        }

    def _caption(self, number: int, generator: np.random.Generator) -> str:
        concept = self.source.concepts[number]
        tags = [tag for tag in concept.tags if tag not in concept.label.lower().split()]
        chosen = generator.permutation(len(tags))[:2]
        return ", ".join([concept.label, *(tags[i] for i in sorted(chosen))])


class EmojiPairs(_Pictures):
    """Two images and a statement about them, true or false in equal parts: 0.5 is chance.

    An item is a dict: pixel_values (2, 3, size, size) float32, input_ids and attention_mask (L,) int64, labels, a
    scalar: 1 when the statement is true. Where an image is to show something else, half of the time that is of a
    kind close by.

    Args: as of `EmojiRetrieval`, and
        pairs: how many items there are.
        about: "kinds", what an icon is, which takes a large model or long training, or "backgrounds", their colours.
        statements: those of `STATEMENTS` it draws from, None for all.
        tokenizer: `build_tokenizer()` fits.
    """

    def __init__(
        self,
        split: str,
        tokenizer,
        size: int = 64,
        *,
        vendors: Sequence[str] = VENDORS,
        pairs: int = 2000,
        about: str = "kinds",
        statements: Sequence[str] | None = None,
        seed: int = 0,
        mean: float | Sequence[float] = IMAGE_MEAN,
        std: float | Sequence[float] = IMAGE_STD,
        limit: int | None = None,
        source: Emoji | None = None,
    ):
        super().__init__(split, size, vendors, seed, mean, std, source)
        if about not in ("kinds", "backgrounds"):
            raise ValueError(f"about must be 'kinds' or 'backgrounds', got {about!r}")
        self.groups = self._groups() if about == "kinds" else None
        unknown = sorted(set(statements or ()) - set(STATEMENTS))
        if unknown or (statements is not None and not statements):
            raise ValueError(f"statements must be some of STATEMENTS, got {unknown or statements!r}")
        choices = [(each, true) for each, true in STATEMENTS.items() if statements is None or each in statements]
        drawn = [self._pair(index, choices) for index in range(_count(limit, pairs))]
        self.statements, self.pictures = zip(*drawn, strict=True)
        self._tokenize(tokenizer, self.statements)

    def __getitem__(self, index: int) -> dict:
        return {
            "input_ids": self.input_ids[index],
            "attention_mask": self.attention_mask[index],
            "pixel_values": torch.stack([self._draw(*picture) for picture in self.pictures[index]]),
            "labels": torch.tensor(index % 2),
        }

    def _groups(self) -> dict[str, Group]:
        """By noun."""
        kinds = {n: kind for n in self.members if (kind := self.source.concepts[n].kind) is not None}
        groups = {}
        for noun in NOUNS:
            ones = [number for number, kind in kinds.items() if noun in (kind, BROAD[kind])]
            close = [n for n, kind in kinds.items() if n not in ones and noun in BROAD and BROAD[kind] == BROAD[noun]]
            if ones and len(ones) + len(close) < len(kinds):
                groups[noun] = Group(ones, close, [n for n in kinds if n not in ones and n not in close])
        if not groups:
            raise ValueError(
                f"split must hold concepts of two kinds at least, got {len(kinds)} concepts in {self.split!r}"
            )
        return groups

    def _pair(self, index: int, choices: Sequence[tuple[str, set]]) -> tuple[str, tuple]:
        """A statement that is true when the index is odd, and two pictures."""
        generator = self._generator(index)
        statement, true = _one(generator, choices)
        subject = _one(generator, list(COLORS if self.groups is None else self.groups))
        shown = _one(generator, [pair for pair in _PAIRS if (pair in true) == bool(index % 2)])
        if self.groups is None:
            pictures = tuple(self._with_background(generator, subject, is_one) for is_one in shown)
            return statement.format(f"a {subject} background"), pictures
        group = self.groups[subject]
        return statement.format(subject), tuple(self._of_group(generator, group, is_one) for is_one in shown)

    def _of_group(self, generator: np.random.Generator, group: Group, is_one: bool) -> tuple:
        others = group.close if group.close and generator.random() < 0.5 else group.rest
        concept = _one(generator, group.ones if is_one else others)
        return concept, _one(generator, self.vendors), Scene.random(generator)

    def _with_background(self, generator: np.random.Generator, color: str, is_one: bool) -> tuple:
        scene = Scene.random(generator)
        if not is_one:
            color = _one(generator, [other for other in COLORS if other != color])
        return _one(generator, self.members), _one(generator, self.vendors), replace(scene, color=color)


class EmojiCaptions(_Pictures):
    """Images and what they show: "a fruit at the top left on a striped blue background".

    Things go by their kind: the names of the test concepts appear nowhere in training. An item is a dict:
    pixel_values (3, size, size) float32, input_ids and attention_mask (L,) int64, labels (L,) int64, the input ids
    with -100 for padding, references, a tuple of one string.

    Args: as of `EmojiRetrieval`. tokenizer: `build_tokenizer()` fits.
    """

    def __init__(
        self,
        split: str,
        tokenizer,
        size: int = 64,
        *,
        vendors: Sequence[str] = VENDORS,
        renders: int = 1,
        seed: int = 0,
        mean: float | Sequence[float] = IMAGE_MEAN,
        std: float | Sequence[float] = IMAGE_STD,
        limit: int | None = None,
        source: Emoji | None = None,
    ):
        super().__init__(split, size, vendors, seed, mean, std, source)
        every = [(c, vendor) for _ in range(renders) for vendor in self.vendors for c in self._of_kind()]
        self.pictures = [
            (*every[index], Scene.random(self._generator(index))) for index in range(_count(limit, len(every)))
        ]
        self.captions = [self._caption(concept, scene) for concept, _, scene in self.pictures]
        self._tokenize(tokenizer, self.captions)

    def __getitem__(self, index: int) -> dict:
        ids, mask = self.input_ids[index], self.attention_mask[index]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
            "pixel_values": self._draw(*self.pictures[index]),
            "references": (self.captions[index],),
        }

    def _caption(self, number: int, scene: Scene) -> str:
        where = "in the middle" if scene.place == "middle" else f"at the {scene.place}"
        return f"{self.source.concepts[number].kind} {where} on {scene.background}"


def _one(generator: np.random.Generator, choices: Sequence):
    return choices[int(generator.integers(len(choices)))]


def _count(limit: int | None, most: int) -> int:
    if most < 1:
        raise ValueError(f"a data set must have at least 1 item, got {most}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    return most if limit is None else min(limit, most)
