# SPDX-License-Identifier: Apache-2.0
"""Files of earlier versions under the names of today. Version 0.1 wrote no version into plans and checkpoints.

Old names are taken from files only: what is written by hand (a YAML of config fields, a plan that says it is of today's
version) is refused with the new name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

PLAN_VERSION = 5
CHECKPOINT_VERSION = 2

CONFIG_NAMES = {"flops_reduction": "macs_reduction"}  # old -> new
ROUNDING_NAMES = {"int8_errors": "rounding_errors"}  # since version 4 of plans
PLAN_NAMES = CONFIG_NAMES | ROUNDING_NAMES
PREDICTED_NAMES = {"rise": "distill_loss"}
GUARD_NAMES = {"rise": "loss_increase"}
LOG_NAMES = {"guard_rise": "guard_loss_increase"}
PACKED_NAMES = {"values": "weight"}  # of a packed layer's tensors


def migrate_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `CompressionConfig` that version 0.1 or a later one wrote."""
    return _rename(values, CONFIG_NAMES, "config")


def migrate_model(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """madtp.json of version 3 (0.1) or 4, which held everything -> settings as config.json had them in 5, checksums.

    Raises:
        KeyError, AttributeError, TypeError: it does not hold what it should.
    """
    settings = {
        "version": 5,
        "config": migrate_config(values["config"]),
        "branches": {branch: {"temperature": value} for branch, value in values["temperatures"].items()},
        "sparse24": values["sparse24"],
    }
    return settings, {"model.safetensors": values["weights_sha256"]}


def migrate_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of version 5, which knew no layers but 2:4 ones, or of today -> as today.

    Raises:
        KeyError, AttributeError, TypeError: they do not hold what they should.
    """
    if values["version"] != 5:
        return dict(values)
    packed = {name: {"scheme": "sparse24", **epilogue} for name, epilogue in values["sparse24"].items()}
    return {**values, "version": 6, "packed": packed}


def packed_key_mapping(packed: Iterable[str]) -> dict[str, str]:
    """The `key_mapping` of Hugging Face's `from_pretrained` for packed layers, by name, of version 3 or 4."""
    return {rf"^{re.escape(layer)}\.{old}$": f"{layer}.{new}" for layer in packed for old, new in PACKED_NAMES.items()}


def migrate_plan(values: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The fields of a `Plan`, of what its YAML holds.

    Args:
        values: of the file; without a "version" they are of 0.1. Those of version 2 have no dtypes of weights,
            those of version 3 had int8 alone, those of version 4 no widths.
        file: its name, for messages.

    Raises:
        ValueError: the version is not known, or a file of version 2 or later has an old name.
    """
    values = dict(values)
    version = _version(values, file, PLAN_VERSION)
    predicted = values.get("predicted")
    if version > 1:
        refuse_old_names(values, PLAN_NAMES if version > 3 else CONFIG_NAMES, file)
        if isinstance(predicted, Mapping):
            refuse_old_names(predicted, PREDICTED_NAMES, f"{file}: predicted")
        return _rename(values, ROUNDING_NAMES, file)
    values = _rename(values, PLAN_NAMES, file)
    if isinstance(predicted, Mapping):
        values["predicted"] = _rename(predicted, PREDICTED_NAMES, f"{file}: predicted")
    return values


def migrate_checkpoint(values: Mapping[str, Any], file: str) -> dict[str, Any]:
    """What the pruning of a training checkpoint holds, as `MadtpTrainer.pruning_state` writes it today.

    Args:
        values: of the file; without a "version" they are of 0.1.
        file: its name, for messages.

    Raises:
        ValueError: the version is not known.
    """
    values = dict(values)
    if _version(values, file, CHECKPOINT_VERSION) < CHECKPOINT_VERSION:
        values["config"] = migrate_config(values["config"])
        if values["guard"] is not None:
            values["guard"] = _rename(values["guard"], GUARD_NAMES, f"{file}: guard")
    return values


def migrate_log(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a training logged before the checkpoint it goes on from."""
    return [_rename(entry, LOG_NAMES, "log") for entry in entries]


def refuse_old_names(values: Mapping[str, Any], names: Mapping[str, str], what: str) -> None:
    """Raises ValueError where `values`, which `what` names, have an old name; it says the new one."""
    for old in names.keys() & values.keys():
        raise ValueError(f"{what}: {old} is now called {names[old]}")


def _rename(values: Mapping[str, Any], names: Mapping[str, str], what: str) -> dict[str, Any]:
    for old, new in names.items():
        if old in values and new in values:
            raise ValueError(f"{what}: {old} and {new} are the same, and both are given")
    return {names.get(name, name): value for name, value in values.items()}


def _version(values: dict[str, Any], file: str, current: int) -> int:
    """Takes the version out of the values; 1 is that of files without one."""
    version = values.pop("version", 1)
    if type(version) is not int or not 1 <= version <= current:
        newer = type(version) is int and version > current
        remedy = ": install a newer madtp" if newer else ""
        raise ValueError(f"{file} must be of version {current}, got {version!r}{remedy}")
    return version
