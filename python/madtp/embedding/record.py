# SPDX-License-Identifier: Apache-2.0
"""run.json: what the vectors of a folder were made with. Of several processes the first to write it counts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from madtp.embedding.files import RUN, VERSION
from madtp_kernels.atomic_file import scratch_folder, sync
from madtp_kernels.bounded_file import read_json


def read_record(out: Path) -> dict[str, Any] | None:
    """What is in run.json of a folder; None where it holds nothing yet.

    Raises:
        ValueError: the file is damaged or of another version, or the folder holds other things.
    """
    path = out / RUN
    names = (name for name in os.listdir(out) if not name.startswith("."))
    others = sorted(name for name in names if (out / name).exists())  # where others try the folder files come and go
    if not others:
        return None
    if RUN not in others:
        raise ValueError(f"out must be an empty folder, or one of madtp embed with {RUN}, got {out} with {others[0]}")
    try:
        record = read_json(path)
        if record["version"] != VERSION or not isinstance(record["settings"], dict):
            raise ValueError(f"version {record['version']}, not {VERSION}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"out must be a folder of madtp embed, got one whose {path} cannot be read ({error})"
        ) from error
    return record


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json, unless another process has written it."""
    values = {"version": VERSION, **record}
    with scratch_folder(out, RUN) as folder:
        partial = folder / RUN
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        sync(partial)
        try:
            os.link(partial, out / RUN)
        except FileExistsError:
            return
        except OSError:  # of a file system without links
            if not (out / RUN).exists():
                os.replace(partial, out / RUN)
        sync(out)


def check_settings(out: Path, record: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises ValueError where a folder was begun with other settings."""
    for name, value in settings.items():
        if record["settings"].get(name) != value:
            raise ValueError(
                f"out must be a new folder or one with the same {name}, got {value!r} where {out / RUN} has "
                f"{record['settings'].get(name)!r}"
            )
