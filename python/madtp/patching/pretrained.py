# SPDX-License-Identifier: Apache-2.0
"""from_pretrained(): a saved compressed model, ready to prune."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madtp.files import file_sha256
from madtp.hwp.packing import replace_linear
from madtp.models.registry import FAMILIES
from madtp.models.versions import check_transformers
from madtp.patching.handle import patch
from madtp.patching.state import (
    STATE_FILE,
    WEIGHTS_FILE,
    ModelError,
    State,
    not_a_model,
    read_json,
    read_state,
    unreadable,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def from_pretrained(directory: str | os.PathLike) -> PreTrainedModel:
    """Loads a compressed model that `save_pretrained` wrote: weights, alignment tokens, temperatures.

    Returns:
        the patched model, in eval mode, ready to prune.

    Raises:
        ModelError: the directory lacks something, or is of another version or class; says what to do. RuntimeError:
            transformers is too old.
    """
    check_transformers()
    directory = Path(directory)
    state = read_state(directory)
    return _load(directory, _model_class(directory), state)


def _model_class(directory: Path) -> Any:
    try:
        kind = read_json(directory, "config.json")["architectures"][0]
    except (KeyError, TypeError, IndexError) as error:
        raise not_a_model(directory, error) from error
    by_name = {family.source.__name__: family.source for family in FAMILIES if family.source is not None}
    if kind not in by_name:
        raise ModelError(f"{directory} must hold one of {list(by_name)}, got {kind}")
    return by_name[kind]


def _load(directory: Path, kind: Any, state: State) -> PreTrainedModel:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model: PreTrainedModel = kind(kind.config_class.from_pretrained(directory))
        patch(model, state.config).set_temperature(state.temperatures)
        if file_sha256(directory / WEIGHTS_FILE) != state.weights_sha256:
            raise ValueError(f"{WEIGHTS_FILE} is not as it was written: its checksum does not match {STATE_FILE}")
        weights = load_file(directory / WEIGHTS_FILE)
        layers = {name: replace_linear(model, name, None, epilogue) for name, epilogue in state.sparse24.items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        for name, layer in layers.items():
            layer.sparse_weight.check_indices(f"{name}.indices")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise unreadable(directory, error) from error
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wrong = sorted({*missing, *unexpected} - tied)
    if wrong:
        raise ModelError(f"{directory}: weights must match config.json, {len(wrong)} do not (first: {wrong[0]})")
    model.tie_weights()
    return model.eval()
