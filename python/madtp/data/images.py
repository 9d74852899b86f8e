# SPDX-License-Identifier: Apache-2.0
"""Pictures of the user."""

from __future__ import annotations

import os
import warnings

from PIL import Image

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
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                return file.convert("RGB")
    except Exception as error:  # of PIL, whose readers of formats have many kinds
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"image {one_line(path)} cannot be read ({reason}){remedy}") from error
