# SPDX-License-Identifier: Apache-2.0
"""What a saved model says of itself: settings in config.json, which Hugging Face reads, and checksums in madtp.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from madtp.config import CompressionConfig
from madtp.files import atomic_write, file_sha256
from madtp.hwp.packing import Epilogue, check_scheme
from madtp.migration import migrate_model, migrate_settings
from madtp.patching.names import CONFIG_FILE, QUANT_METHOD, STATE_FILE
from madtp_kernels.bounded_file import ODD_VALUES, one_line, require_regular
from madtp_kernels.bounded_file import read_json as read_values

STATE_VERSION = 6  # of madtp.json, and of the settings
SAME_FORM = (5, STATE_VERSION)  # versions of madtp.json that have only checksums
OLD_VERSIONS = (3, 4)  # of madtp.json, which held all of it


class ModelError(RuntimeError):
    """A saved model is missing, cut short, or of another kind."""


class Packed(NamedTuple):
    """What a packed layer is: the scheme of its weight (sparse24, int8, int8_24), and what it has taken over."""

    scheme: str
    epilogue: Epilogue

    def to_dict(self) -> dict[str, str | None]:
        return {"scheme": self.scheme, **self.epilogue._asdict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, str | None]) -> Packed:
        """Raises ValueError for a scheme that there is not, KeyError and TypeError for other fields."""
        scheme, epilogue = values["scheme"], {name: path for name, path in values.items() if name != "scheme"}
        check_scheme(scheme)
        return cls(str(scheme), Epilogue(**epilogue))


@dataclass(frozen=True)
class Settings:
    """The `quantization_config` of config.json."""

    config: CompressionConfig | None  # None with `keep`
    branches: dict[str, dict[str, Any]]  # as `BranchSettings.values`
    packed: dict[str, Packed]  # the packed layers by name
    keep: dict[str, dict[str, Any]] | None = None  # of a decoder, by seam, as `Keep.to_dict`
    widths: dict[str, int] = field(default_factory=dict)  # heads or channels left, of `madtp.width.widths_of`

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "version": STATE_VERSION,
            **({} if self.config is None else {"config": self.config.to_dict(), "branches": self.branches}),
            **({} if self.keep is None else {"keep": self.keep}),
            "packed": {name: layer.to_dict() for name, layer in self.packed.items()},
            **({"widths": self.widths} if self.widths else {}),
        }

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Settings:
        """Raises ModelError for values of another version, or that lack something; `where` they stand is in it."""
        _check_version(values, where)
        try:
            values = migrate_settings(values)
            packed = {name: Packed.from_dict(layer) for name, layer in values["packed"].items()}
            if (keep := values.get("keep")) is not None:
                return cls(None, {}, packed, {seam: dict(amount) for seam, amount in keep.items()})
            branches = {branch: dict(settings) for branch, settings in values["branches"].items()}
            widths = dict(values.get("widths") or {})
            return cls(CompressionConfig.from_dict(values["config"]), branches, packed, widths=widths)
        except ODD_VALUES as error:
            raise unreadable(where, error) from error


def write_checksums(directory: Path, checksums: Mapping[str, str]) -> None:
    """Writes madtp.json; checksums: file name -> SHA-256."""
    values = {"version": STATE_VERSION, "sha256": dict(sorted(checksums.items()))}
    atomic_write(directory / STATE_FILE, json.dumps(values, indent=2) + "\n")


def read_checksums(directory: Path) -> dict[str, str]:
    """File name -> SHA-256, of madtp.json. Raises ModelError where it cannot be read."""
    return _read_state(directory)[1]


def read_settings(directory: Path) -> tuple[Settings, bool]:
    """The settings of a directory, and whether they are of an old version, with old names in the weights.

    Raises:
        ModelError: madtp.json is not there, is of another version, or does not hold what it should; config.json is not
            as it was written.
    """
    old, checksums = _read_state(directory)
    if old is not None:
        return Settings.from_dict(old, str(directory / STATE_FILE)), True
    check_files(directory, [CONFIG_FILE], checksums)
    config = read_json(directory, CONFIG_FILE)
    values = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        raise not_a_model(directory, ValueError(f"{CONFIG_FILE} has no quantization_config of {QUANT_METHOD}"))
    return Settings.from_dict(values, str(directory / CONFIG_FILE)), False


def check_files(directory: Path, names: Iterable[str], checksums: Mapping[str, str]) -> None:
    """Raises ModelError for a file that is missing, no regular file, or not as it was written."""
    for name in names:
        try:
            require_regular(directory / name)
            found = file_sha256(directory / name)
        except FileNotFoundError as error:
            raise unreadable(directory, ValueError(f"{name} is not there")) from error
        except (OSError, ValueError) as error:
            raise unreadable(directory, error) from error
        if checksums.get(name) != found:
            reason = f"{name} is not as it was written: its checksum does not match {STATE_FILE}"
            raise unreadable(directory, ValueError(reason))


def read_json(directory: Path, name: str) -> Any:
    """The values of a file of a saved model. Raises ModelError where there is none."""
    try:
        return read_values(directory / name)
    except FileNotFoundError as error:
        raise not_a_model(directory, ValueError(f"it has no file {name}")) from error
    except (OSError, ValueError) as error:
        raise not_a_model(directory, error) from error


def not_a_model(directory: object, error: Exception) -> ModelError:
    reason = one_line(error)
    return ModelError(f"{directory} is not a compressed model ({reason}); `madtp compress --out NEW_FOLDER` makes one")


def unreadable(directory: object, error: Exception) -> ModelError:
    reason = one_line((str(error).strip() or type(error).__name__).splitlines()[0])
    return ModelError(f"{directory} cannot be read ({reason}); save the model again")


def _read_state(directory: Path) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Settings that madtp.json of an old version held, and the checksums."""
    values = read_json(directory, STATE_FILE)
    try:
        if isinstance(values, dict) and values.get("version") in OLD_VERSIONS:
            settings, checksums = migrate_model(values)
            return settings, checksums
        _check_version(values, str(directory / STATE_FILE))
        checksums = values["sha256"]
        if not isinstance(checksums, dict) or not all(map(_is_checksum, checksums.values())):
            raise ValueError(f"sha256 of {STATE_FILE} must give each file its checksum")
        return None, checksums
    except ODD_VALUES as error:
        raise unreadable(directory, error) from error


def _check_version(values: Any, where: str) -> None:
    version = values.get("version") if isinstance(values, dict) else None
    if version not in SAME_FORM:
        newer = isinstance(version, int) and version > STATE_VERSION
        remedy = "install a newer madtp" if newer else "save the model again"
        raise ModelError(f"{where} must be of version {STATE_VERSION}, got {one_line(version)}: {remedy}")


def _is_checksum(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
