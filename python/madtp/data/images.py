# SPDX-License-Identifier: Apache-2.0
"""Pictures of the user."""

from __future__ import annotations

import io
import os
import warnings

from PIL import Image, UnidentifiedImageError

from madtp.data.errors import DataError
from madtp_kernels.bounded_file import one_line, require_regular

MAX_BYTES = 1 << 30


def read_image(path: str | os.PathLike, remedy: str = "") -> Image.Image:
    """A picture in RGB.

    Args:
        remedy: what the message ends with.

    Raises:
        DataError: it is missing, no picture, broken, or of so many pixels that it is an attack on the memory, by what
            PIL holds to be one (`Image.MAX_IMAGE_PIXELS`).
    """
    try:
        require_regular(path, MAX_BYTES)
        return _opened(path)
    except Exception as error:  # of PIL, whose readers of formats have many kinds
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"image {one_line(path)} cannot be read ({reason}){remedy}") from error


def decode_image(content: bytes) -> Image.Image:
    """A picture in RGB, of the bytes of a file. Raises ValueError, whose text is the same each time, as `read_image`
    raises DataError."""
    try:
        return _opened(io.BytesIO(content))
    except UnidentifiedImageError as error:  # whose text has an address in it
        raise ValueError("no picture of a known format") from error
    except Exception as error:
        raise ValueError(one_line(error)) from error


def _opened(file: str | os.PathLike | io.BytesIO) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as picture:
            return picture.convert("RGB")
