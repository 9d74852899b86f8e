# SPDX-License-Identifier: Apache-2.0
"""Pictures of one icon on a background: what is around the icon is what there is to prune."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

COLORS = {
    "red": (205, 60, 55),
    "yellow": (240, 210, 75),
    "green": (75, 160, 80),
    "blue": (65, 110, 200),
    "purple": (130, 80, 170),
    "pink": (245, 160, 190),
    "brown": (125, 85, 55),
    "gray": (150, 150, 150),
}
TEXTURES = ("plain", "striped", "fading", "speckled")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
SCALES = (0.4, 0.6)  # of the icon, in sides of the picture


@dataclass(frozen=True)
class Scene:
    """Where the icon is and what is behind it."""

    scale: float  # side of the icon, in sides of the picture
    x: float  # of its place between the left border, 0, and the right one, 1
    y: float  # from the top, 0, to the bottom, 1
    color: str  # of COLORS
    texture: str  # of TEXTURES
    seed: int  # of the details of the texture

    @classmethod
    def random(cls, generator: np.random.Generator) -> Scene:
        """In one of nine places that a word can tell apart."""
        return cls(
            scale=generator.uniform(*SCALES),
            x=0.4 * generator.integers(3) + generator.uniform(0, 0.2),
            y=0.4 * generator.integers(3) + generator.uniform(0, 0.2),
            color=list(COLORS)[generator.integers(len(COLORS))],
            texture=TEXTURES[generator.integers(len(TEXTURES))],
            seed=int(generator.integers(2**31)),
        )

    @property
    def place(self) -> str:
        """Such as "top left", "top", "left" or "middle"."""
        row, column = (names[min(2, int(3 * at))] for names, at in ((ROWS, self.y), (COLUMNS, self.x)))
        words = [word for word in (row, column) if word != "middle"]
        return " ".join(words) or "middle"

    @property
    def background(self) -> str:
        """Such as "a plain blue background"."""
        return f"a {self.texture} {self.color} background"

    def draw(self, icon: np.ndarray, size: int) -> np.ndarray:
        """icon (S, S, 4) uint8, RGBA -> picture (3, size, size) uint8."""
        picture = Image.fromarray(self._behind(size))
        side = max(1, round(self.scale * size))
        drawn = Image.fromarray(icon).resize((side, side), Image.Resampling.BICUBIC)
        picture.paste(drawn, (round(self.x * (size - side)), round(self.y * (size - side))), drawn)
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))

    def _behind(self, size: int) -> np.ndarray:
        """(size, size, 3) uint8: the colour, a little off, and the texture as lighter and darker shades of it."""
        generator = np.random.default_rng(self.seed)
        color = np.array(COLORS[self.color], np.float32) + generator.uniform(-12, 12, 3).astype(np.float32)  # (3,)
        angle = generator.uniform(0, 2 * np.pi)
        along = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        ramp = np.cos(angle) * along[None, :] + np.sin(angle) * along[:, None]  # (size, size), within +-0.71
        if self.texture == "plain":
            shade = np.zeros((size, size))
        elif self.texture == "striped":
            shade = np.sign(np.sin(2 * np.pi * generator.uniform(3, 6) * ramp))
        elif self.texture == "fading":
            shade = ramp / 0.71
        else:
            shade = generator.uniform(-1, 1, (size, size))
        return np.clip(color + 45 * shade[..., None], 0, 255).astype(np.uint8)
