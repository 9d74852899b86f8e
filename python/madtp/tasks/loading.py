# SPDX-License-Identifier: Apache-2.0
"""Models and what makes their inputs, from Hugging Face folders: dense models and compressed ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel

from madtp.building import check_counts, elements_of, no_larger_than
from madtp.data.errors import DataError
from madtp.files.directories import whole_copy
from madtp.files.reading import require_files, tensor_shapes
from madtp.models.registry import FAMILIES
from madtp.patching.names import CONFIG_FILE, STATE_FILE
from madtp.patching.pretrained import from_pretrained
from madtp_kernels.bounded_file import ODD_VALUES, one_line, read_json

POOLER = "pooler"  # of ViT and BERT, None in those without one
PICKLED = 64  # bytes that a tensor takes in a pickle at least


def architecture(directory: Path | str) -> str:
    """The name of the class that a folder says it holds.

    Raises:
        DataError: there is no such folder, or its config.json is missing or broken.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"model directory must exist, got {directory}")
    config = whole_copy(directory) / CONFIG_FILE
    if not os.path.lexists(config):
        raise DataError(f"model directory {directory} lacks {CONFIG_FILE}")
    try:
        names = read_json(config).get("architectures")
        return one_line((names or ["nothing known"])[0])
    except (OSError, *ODD_VALUES) as error:
        raise unreadable(directory, error) from error


def load_model(
    directory: Path | str,
    kinds: Sequence[type[PreTrainedModel]] | None = None,
    *,
    dense: bool = False,
    complete: bool = False,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model of a folder, in eval mode: patched where it is a compressed one, else as Hugging Face has it.

    Args:
        kinds: the classes that will do; None: all that `madtp.patch` knows.
        dense: a compressed model will not do.
        complete: nor will a dense one some of whose weights are not in the folder, which Hugging Face would draw; where
            these are of a pooler alone, it has none.
        dtype: None: the one that it was saved in.

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
    if os.path.lexists(whole_copy(directory) / STATE_FILE):
        if dense:
            raise DataError(f"model directory {directory} must hold a dense model, got a compressed one")
        return from_pretrained(directory, dtype=dtype)
    model, info = read_dense(directory, kind)
    if complete:
        _check_complete(directory, model, info["missing_keys"])
    return model if dtype is None else nn.Module.to(model, dtype)  # whose types are not those of Hugging Face


def _check_complete(directory: Path, model: nn.Module, missing: Iterable[str]) -> None:
    poolers = {name: name.split(".").index(POOLER) for name in missing if POOLER in name.split(".")}
    if others := sorted(set(missing) - set(poolers)):
        raise DataError(f"model directory {directory} must hold all weights, lacks {len(others)} (first: {others[0]})")
    for name, place in poolers.items():
        setattr(model.get_submodule(".".join(name.split(".")[:place])), POOLER, None)


def read_dense(directory: Path, kind: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The dense model of a folder, in eval mode, and what Hugging Face says of its weights.

    Args:
        kind: its class, one of Hugging Face.

    Raises:
        DataError: it cannot be read.
    """
    try:
        require_files(directory)
        check_counts(read_json(directory / CONFIG_FILE))
        with no_larger_than(*_size_of_weights(directory)):
            model, info = kind.from_pretrained(directory, output_loading_info=True)
    except Exception as error:  # every reader (json, safetensors, transformers) has its own kind
        raise unreadable(directory, error) from error
    return model.eval(), info


def load_tokenizer(directory: Path | str):
    """Raises DataError where there is none."""
    try:
        require_files(Path(directory))
        return hf.AutoTokenizer.from_pretrained(directory)
    except Exception as error:
        raise DataError(f"model directory {directory} has no tokenizer ({_reason(error)})") from error


def load_processor(directory: Path | str):
    """Of texts with images. Raises DataError where there is none."""
    try:
        require_files(Path(directory))
        return hf.AutoProcessor.from_pretrained(directory)
    except Exception as error:
        raise DataError(f"model directory {directory} has no processor ({_reason(error)})") from error


def load_context(directory: Path | str) -> int:
    """How many tokens the decoder of a folder reads. Raises DataError where its config.json is missing or broken."""
    try:
        require_files(Path(directory))
        config: Any = hf.AutoConfig.from_pretrained(directory)
        return int(config.get_text_config().max_position_embeddings)
    except Exception as error:
        raise unreadable(directory, error) from error


def load_image_processor(directory: Path | str):
    """None where there is none. Raises DataError where it is broken."""
    try:
        require_files(Path(directory))
        return hf.AutoImageProcessor.from_pretrained(directory)
    except (OSError, ValueError):
        return None
    except Exception as error:
        raise unreadable(directory, error) from error


def no_image_processor(directory: Path | str) -> DataError:
    return DataError(f"model directory {directory} has no image processor (preprocessor_config.json)")


def unreadable(directory: Path | str, error: Exception) -> DataError:
    return DataError(f"model directory {directory} cannot be read ({_reason(error)})")


def names_of(kinds: Sequence[type]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


def _reason(error: Exception) -> str:
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0])


def _size_of_weights(directory: Path) -> tuple[int, int]:
    """Tensors and elements, at most."""
    shapes = tensor_shapes(directory.glob("model*.safetensors"))  # of adapters and optimizers are others
    size = sum(path.stat().st_size for path in directory.glob("*.bin"))
    return len(shapes) + size // PICKLED, elements_of(shapes) + size
