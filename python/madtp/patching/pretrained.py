"""from_pretrained(): a saved compressed model, ready to prune."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import nn

from madtp.config import CompressionConfig
from madtp.hwp.packing import Follower, replace_linear
from madtp.models.family import Family
from madtp.models.registry import FAMILIES
from madtp.models.versions import check_transformers
from madtp.patching.handle import patch
from madtp.patching.state import STATE_FILE, STATE_VERSION, WEIGHTS_FILE, ModelError, weights_sha256


def from_pretrained(directory: str | os.PathLike) -> nn.Module:
    """Loads a compressed model that `save_pretrained` wrote: weights, alignment tokens, temperatures.

    Returns:
        the patched model, in eval mode, ready to prune.

    Raises:
        ModelError: the directory lacks something, or is of another version or class; says what to do. RuntimeError:
            transformers is too old.
    """
    check_transformers()
    directory = Path(directory)
    try:
        state = json.loads((directory / STATE_FILE).read_text())
        kind = json.loads((directory / "config.json").read_text())["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ModelError(
            f"{directory} is not a compressed model ({error}); `madtp compress --out NEW_FOLDER` makes one"
        ) from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != STATE_VERSION:
        newer = isinstance(version, int) and version > STATE_VERSION
        remedy = "install a newer madtp" if newer else "save the model again"
        raise ModelError(f"{directory / STATE_FILE} must be of version {STATE_VERSION}, got {version}: {remedy}")
    family = next((family for family in FAMILIES if family.source.__name__ == kind), None)
    if family is None:
        raise ModelError(f"{directory} must hold one of {[f.source.__name__ for f in FAMILIES]}, got {kind}")
    return _load(directory, family, state)


def _load(directory: Path, family: Family, state: dict) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model = family.source(family.source.config_class.from_pretrained(directory))
        handle = patch(model, CompressionConfig.from_dict(state["config"]))
        handle.set_temperature(state["temperatures"])
        if weights_sha256(directory / WEIGHTS_FILE) != state["weights_sha256"]:
            raise ValueError(f"{WEIGHTS_FILE} is not as it was written: its checksum does not match {STATE_FILE}")
        weights = load_file(directory / WEIGHTS_FILE)
        for name, follower in state["sparse24"].items():
            replace_linear(model, name, None, Follower(**follower))
        missing, unexpected = model.load_state_dict(weights, strict=False)
        for name in state["sparse24"]:
            model.get_submodule(name).sparse_weight.check_indices(f"{name}.indices")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{directory} cannot be read ({reason}); save the model again") from error
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wrong = sorted({*missing, *unexpected} - tied)
    if wrong:
        raise ModelError(f"{directory}: weights must match config.json, {len(wrong)} do not (first: {wrong[0]})")
    model.tie_weights()
    return model.eval()
