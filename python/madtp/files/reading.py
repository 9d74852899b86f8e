# SPDX-License-Identifier: Apache-2.0
"""Files of a model directory, which may come from anywhere: what kind they are, and what safetensors say they hold."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from madtp_kernels.bounded_file import ODD_VALUES, one_line, require_regular

MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja")
# What transformers opens by these names; others are the user's, and may be anything that cannot be opened.
OPENED = re.compile(r"model.*|madtp\.json|.*config\.json|.*(token|vocab|merges|template|index|spiece).*")
MAX_TEXT = 1 << 28  # bytes of a file that is no weights: tokenizers have tens of millions


def require_files(directory: Path) -> None:
    """Raises ValueError where what a reader of models may open is no regular file, or too large to be read at once.

    Of other names, folders and links that lead nowhere are passed over. OSError: the directory cannot be listed, or a
    link leads nowhere.
    """
    for name in os.listdir(directory):
        is_file = os.path.exists(directory / name) and not os.path.isdir(directory / name)
        if name.endswith(MODEL_FILES) and (is_file or OPENED.fullmatch(name)):
            require_regular(directory / name, None if name.endswith((".safetensors", ".bin")) else MAX_TEXT)


def tensor_shapes(files: Iterable[str | os.PathLike]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype as safetensors calls it, shape, of all tensors in the files. No values are read.

    Raises:
        OSError: a file is not there. ValueError: it is none of safetensors, or cut short.
    """
    from safetensors import SafetensorError, safe_open

    held = {}
    for file in files:
        require_regular(file)
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    held[name] = part.get_dtype(), tuple(part.get_shape())
        except (SafetensorError, *ODD_VALUES) as error:
            raise ValueError(f"{os.path.basename(file)} is no whole file of safetensors ({one_line(error)})") from error
    return held
