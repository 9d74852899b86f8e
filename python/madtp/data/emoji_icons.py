# SPDX-License-Identifier: Apache-2.0
"""Emoji as concepts that several vendors have drawn: names, tags and kinds, a split of them, and their icons."""

from __future__ import annotations

import hashlib
import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from madtp.data.downloads import Tarball, cache_dir
from madtp.data.emoji_kinds import KIND_OF
from madtp.data.errors import DataError
from madtp_kernels.atomic_file import atomic_file

ICONS = {
    "noto": Tarball(
        "Noto emoji",
        "@iconify-json/noto@1.2.9",
        "iconify-json-noto-1.2.9.tgz",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "twemoji": Tarball(
        "Twemoji",
        "@iconify-json/twemoji@1.2.5",
        "iconify-json-twemoji-1.2.5.tgz",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "fluent": Tarball(
        "Fluent emoji",
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
}
TEXT = Tarball(
    "text of the emoji",
    "emojibase-data@17.0.0",
    "emojibase-data-17.0.0.tgz",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
VENDORS = ("noto", "twemoji")  # whose drawings are seen in training
SHIFTED = ("fluent",)  # the same concepts in a hand never seen
SPLITS = {"train": range(0, 75), "val": range(75, 85), "test": range(85, 100)}  # percent of the bases

# What tells the members of a family apart: who, which way, what colour, how big. Families do not straddle the split.
_VARIANTS = frozenset(
    "man woman men women person people boy girl child baby older old mx mrs santa face facing "
    "left right up down upward downward upwards downwards leftwards rightwards tilted counterclockwise clockwise "
    "vertical red orange yellow green blue purple brown black white gray grey pink light large medium small "
    "medium-small high low raised lowered open closed with and of the in a".split()
)
_SAME = {"merman": "mer", "mermaid": "mer", "merperson": "mer", "prince": "crown", "princess": "crown"}


@dataclass(frozen=True)
class Concept:
    """What one emoji shows, whoever draws it."""

    code: str  # hexadecimal code points, without the variation selector
    label: str
    tags: tuple[str, ...]
    kind: str | None  # a noun of `emoji_kinds.KINDS`

    @property
    def base(self) -> str:
        """What it shares with its near-duplicates: the label without variants, "clock" for every hour."""
        if re.search("o’clock|-thirty$", self.label):
            return "clock"
        words = re.findall(r"[^\W_]+(?:[-’][^\W_]+)*", self.label.lower().partition(":")[0])
        return " ".join(_SAME.get(word, word) for word in words if word not in _VARIANTS) or "person"

    @property
    def split(self) -> str:
        """Of its base, by hash."""
        percent = zlib.crc32(self.base.encode()) % 100
        return next(name for name, share in SPLITS.items() if percent in share)


def _read(cache: Path | None) -> tuple[list[dict], dict[str, dict[str, str]]]:
    """Records of emojibase, each with the name of its subgroup, and vendor -> hexadecimal code -> SVG."""
    records, subgroups = TEXT.json("en/data.json", cache), TEXT.json("meta/groups.json", cache)["subgroups"]
    records = [record | {"subgroup": subgroups.get(str(record.get("subgroup")))} for record in records]
    drawings = {}
    for vendor, package in ICONS.items():
        icons, names = package.json("icons.json", cache), package.json("chars.json", cache)
        drawings[vendor] = {
            _code(code): _svg(icons["icons"][name], icons) for code, name in names.items() if name in icons["icons"]
        }
    return records, drawings


def _code(hexcode: str) -> str:
    return hexcode.lower().replace("-fe0f", "")


def _svg(icon: dict, icons: dict) -> str:
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


class Emoji:
    """The concepts that every vendor has drawn (`concepts`), but no flags of countries and regions.

    Args:
        cache: where the packages are kept; None is `packages.cache_dir()`.

    Raises:
        DataError: a package is missing and cannot be fetched, or is not the published file.
    """

    def __init__(self, cache: Path | None = None):
        self.cache = cache_dir() if cache is None else Path(cache)
        records, self.drawings = _read(cache)
        concepts = [
            Concept(_code(r["hexcode"]), r["label"], tuple(r.get("tags", ())), KIND_OF.get(r["subgroup"]))
            for r in records
            if r["subgroup"] != "country-flag" and all(_code(r["hexcode"]) in codes for codes in self.drawings.values())
        ]
        # In an order that mixes the kinds, so that the first few stand for all.
        self.concepts = sorted(concepts, key=lambda concept: hashlib.sha256(concept.code.encode()).digest())

    def of_split(self, split: str) -> list[int]:
        """Numbers of the concepts of "train", "val" or "test"."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        return [i for i, concept in enumerate(self.concepts) if concept.split == split]

    def icons(self, side: int) -> np.ndarray:
        """All icons: (concepts, vendors, side, side, 4) uint8, RGBA, mapped from a file that is rendered once."""
        shape = (len(self.concepts), len(self.drawings), side, side, 4)
        path = self.cache / f"emoji-icons-{side}-{self._digest()}.npy"
        try:
            icons = np.load(path, mmap_mode="r")
            if icons.shape == shape and icons.dtype == np.uint8:
                return icons
        except (OSError, ValueError):  # not there, or cut short
            pass
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial:
                icons = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
                for of_concept, concept in zip(icons, self.concepts, strict=True):
                    for icon, codes in zip(of_concept, self.drawings.values(), strict=True):
                        icon[:] = render(codes[concept.code], side)
                icons.flush()
        except OSError as error:
            raise DataError(
                f"data cache must be a writable directory, got {self.cache} ({error.strerror}): set MADTP_CACHE"
            ) from error
        return np.load(path, mmap_mode="r")

    def _digest(self) -> str:
        """Of all that is drawn, so that a file of other icons is not taken for it."""
        digest = hashlib.sha256()
        for vendor, codes in self.drawings.items():
            digest.update(vendor.encode())
            for concept in self.concepts:
                digest.update(codes[concept.code].encode())
        return digest.hexdigest()[:16]


def render(svg: str, side: int) -> np.ndarray:
    """(side, side, 4) uint8, RGBA; what is not square is centred."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise DataError("emoji are rendered with resvg-py: run `python -m pip install resvg-py`") from error
    with Image.open(io.BytesIO(svg_to_bytes(svg_string=svg, width=side, skip_system_fonts=True))) as picture:
        picture = picture.convert("RGBA")
    if picture.size != (side, side):
        scale = side / max(picture.size)
        picture = picture.resize((max(1, round(scale * picture.width)), max(1, round(scale * picture.height))))
        square = Image.new("RGBA", (side, side))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    return np.asarray(picture)
