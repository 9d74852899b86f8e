# SPDX-License-Identifier: Apache-2.0
"""Models and what makes their inputs, from Hugging Face folders: dense models and compressed ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers as hf
from transformers import PreTrainedModel

from madtp.data.errors import DataError
from madtp.models.registry import FAMILIES
from madtp.patching.pretrained import from_pretrained
from madtp.patching.state import STATE_FILE


def architecture(directory: Path | str) -> str:
    """The name of the class that a folder says it holds.

    Raises:
        DataError: there is no such folder, or its config.json is missing or broken.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"model directory must exist, got {directory}")
    if not (directory / "config.json").is_file():
        raise DataError(f"model directory {directory} lacks config.json")
    try:
        names = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"model directory {directory} cannot be read ({error})") from error
    return str((names or ["nothing known"])[0])


def load_model(
    directory: Path | str, kinds: Sequence[type[PreTrainedModel]] | None = None, *, dense: bool = False
) -> PreTrainedModel:
    """The model of a folder, in eval mode: patched where it is a compressed one, else as Hugging Face has it.

    Args:
        kinds: the classes that will do; None: all that `madtp.patch` knows.
        dense: a compressed model will not do.

    Raises:
        DataError: the folder is missing or broken, or holds another kind of model. ModelError: the same, where it says
            that it holds a compressed one.
    """
    directory = Path(directory)
    kinds = kinds or [family.source for family in FAMILIES if family.source is not None]
    found = architecture(directory)
    kind = next((kind for kind in kinds if kind.__name__ == found), None)
    if kind is None:
        raise DataError(f"model directory {directory} must hold a {names_of(kinds)}, got {found}")
    if (directory / STATE_FILE).exists():
        if dense:
            raise DataError(f"model directory {directory} must hold a dense model, got a compressed one")
        return from_pretrained(directory)
    return read_dense(directory, kind)[0]


def read_dense(directory: Path, kind: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The dense model of a folder, in eval mode, and what Hugging Face says of its weights.

    Args:
        kind: its class, one of Hugging Face.

    Raises:
        DataError: it cannot be read.
    """
    try:
        model, info = kind.from_pretrained(directory, output_loading_info=True)
    except Exception as error:  # every reader (json, safetensors, transformers) has its own kind
        raise unreadable(directory, error) from error
    return model.eval(), info


def load_tokenizer(directory: Path | str):
    """Raises DataError where there is none."""
    try:
        return hf.AutoTokenizer.from_pretrained(directory)
    except Exception as error:
        raise DataError(f"model directory {directory} has no tokenizer ({_reason(error)})") from error


def load_image_processor(directory: Path | str):
    """None where there is none."""
    try:
        return hf.AutoImageProcessor.from_pretrained(directory)
    except (OSError, ValueError):
        return None


def no_image_processor(directory: Path | str) -> DataError:
    return DataError(f"model directory {directory} has no image processor (preprocessor_config.json)")


def unreadable(directory: Path | str, error: Exception) -> DataError:
    return DataError(f"model directory {directory} cannot be read ({_reason(error)})")


def names_of(kinds: Sequence[type]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
