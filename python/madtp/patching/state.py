# SPDX-License-Identifier: Apache-2.0
"""madtp.json, written and read: what a saved model holds beside its weights and the config.json of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madtp.config import CompressionConfig
from madtp.files import atomic_write, file_sha256
from madtp.hwp.packing import Epilogue
from madtp.migration import migrate_config

STATE_FILE, WEIGHTS_FILE = "madtp.json", "model.safetensors"
STATE_VERSION = 4


class ModelError(RuntimeError):
    """A saved model is missing, cut short, or of another kind."""


@dataclass(frozen=True)
class State:
    """What madtp.json says, version aside."""

    config: CompressionConfig
    temperatures: dict[str, float]  # by branch
    sparse24: dict[str, Epilogue]  # the packed 2:4 layers by name, and what each has taken over
    weights_sha256: str  # of the weights it was written beside


def write_state(
    directory: Path, config: CompressionConfig, temperatures: Mapping[str, float], sparse24: Mapping[str, Epilogue]
) -> None:
    """Writes madtp.json, whole or not at all, beside the weights, which must be there."""
    values = {
        "version": STATE_VERSION,
        "config": config.to_dict(),
        "temperatures": dict(temperatures),
        "sparse24": {name: epilogue._asdict() for name, epilogue in sparse24.items()},
        "weights_sha256": file_sha256(directory / WEIGHTS_FILE),
    }
    atomic_write(directory / STATE_FILE, json.dumps(values, indent=2) + "\n")


def read_state(directory: Path) -> State:
    """Reads madtp.json, of this version or of one that can be brought up to it.

    Raises:
        ModelError: it is not there, of another version, or does not hold what it should.
    """
    path, values = directory / STATE_FILE, read_json(directory, STATE_FILE)
    version = values.get("version") if isinstance(values, dict) else None
    try:
        if version == 3:
            values, version = values | {"config": migrate_config(values["config"])}, STATE_VERSION
        if version != STATE_VERSION:
            newer = isinstance(version, int) and version > STATE_VERSION
            remedy = "install a newer madtp" if newer else "save the model again"
            raise ModelError(f"{path} must be of version {STATE_VERSION}, got {version}: {remedy}")
        return State(
            CompressionConfig.from_dict(values["config"]),
            {branch: float(temperature) for branch, temperature in values["temperatures"].items()},
            {name: Epilogue(**epilogue) for name, epilogue in values["sparse24"].items()},
            values["weights_sha256"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unreadable(directory, error) from error


def read_json(directory: Path, name: str) -> Any:
    """The values of a file of a saved model. Raises ModelError where there is none."""
    try:
        return json.loads((directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise not_a_model(directory, error) from error


def not_a_model(directory: Path, error: Exception) -> ModelError:
    return ModelError(f"{directory} is not a compressed model ({error}); `madtp compress --out NEW_FOLDER` makes one")


def unreadable(directory: Path, error: Exception) -> ModelError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ModelError(f"{directory} cannot be read ({reason}); save the model again")
