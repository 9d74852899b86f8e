# SPDX-License-Identifier: Apache-2.0
"""Draws the sprites of `madtp.data.mosaics`, which ship in python/madtp/assets/mosaics: icons and characters.

Icons are of Noto emoji (Apache-2.0), characters of DejaVu Sans Bold, which comes with matplotlib. They ship as pictures
so that every machine draws the same mosaics, whatever its renderers are.

python examples/draw_sprites.py --out python/madtp/assets/mosaics
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from madtp.data.emoji_icons import Emoji, render
from madtp.data.mosaics import CHARACTERS, GLYPH, ICON_SIDES, ICONS


def icons() -> Image.Image:
    """One row for each size, from left to right in the order of `ICONS`; RGBA."""
    source = Emoji()
    codes = {concept.label: concept.code for concept in source.concepts}
    sheet = Image.new("RGBA", (len(ICONS) * ICON_SIDES[0], sum(ICON_SIDES)))
    top = 0
    for side in ICON_SIDES:
        for number, label in enumerate(ICONS.values()):
            icon = np.array(render(source.drawings["noto"][codes[label]], side))
            sheet.paste(Image.fromarray(icon), (number * side, top))
        top += side
    return sheet


def characters() -> Image.Image:
    """From left to right in the order of `CHARACTERS`, in places of `GLYPH`; grey, ink is white."""
    width, height = GLYPH
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans:bold"), height)
    sheet = Image.new("L", (len(CHARACTERS) * width, height))
    draw = ImageDraw.Draw(sheet)
    for number, character in enumerate(CHARACTERS):
        draw.text((number * width + width / 2, height - 2), character, fill=255, font=font, anchor="ms")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of icons.png and characters.png")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    icons().save(options.out / "icons.png", optimize=True)
    characters().save(options.out / "characters.png", optimize=True)


if __name__ == "__main__":
    main()
