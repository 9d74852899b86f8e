# SPDX-License-Identifier: Apache-2.0
"""Models in the files of other runtimes, made once and kept in the user's cache folder (`MADTP_CACHE`)."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.packages import version
from madtp.data.downloads import cache_dir


def exported(kind: str, about: Mapping[str, Any], packages: Sequence[str], write: Callable[[Path], None]) -> Path:
    """The folder that `write` fills, which is made only where it is not there yet.

    Args:
        kind: of the files, the beginning of the folder's name.
        about: what is exported, JSON-serialisable; another folder for each.
        packages: that write, or make what is written; another folder for each of their versions.

    Raises:
        Unavailable: one of the packages is not installed.
    """
    versions = {name: version(name) for name in packages}
    key = json.dumps({"about": dict(about), "versions": versions}, sort_keys=True)
    folder = cache_dir() / "peers" / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        write(Path(scratch))
        (Path(scratch) / "about.json").write_text(key + "\n")
        try:
            os.rename(scratch, folder)
        except OSError:  # another run was faster
            if not folder.is_dir():
                raise
    return folder
