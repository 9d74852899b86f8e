# SPDX-License-Identifier: Apache-2.0
"""Where images come from: folders of files, and tar files as webdataset has them. Shards of them are what a run does.

An image is some bytes of a file: of a tar file those of a member, so that images of both are read in any order.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madtp.data.errors import DataError
from madtp_kernels.bounded_file import one_line, require_regular

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
TAR = ".tar"
BEGINNING = 1 << 16  # bytes of a tar file that are looked at to know it again


@dataclass(frozen=True)
class Item:
    """An image: its name, and where its bytes are."""

    key: str
    path: Path
    offset: int = 0
    size: int | None = None  # bytes; None: all of the file


@dataclass(frozen=True)
class Shard:
    """Images that get one file of vectors: a tar file, or some files of the folders."""

    name: str
    tar: Path | None = None
    files: tuple[Item, ...] = ()

    def items(self) -> list[Item]:
        """In their order. Raises DataError for a tar file that is damaged, or holds two images of one key, or none."""
        return list(self.files) if self.tar is None else tar_items(self.tar)

    def source(self) -> dict[str, Any]:
        """What tells it from a shard of the same name with other images in it, as JSON has it.

        These are names and sizes of files, or the size of a tar file and its beginning.

        Raises:
            DataError: a file is gone.
        """
        try:
            digest = hashlib.sha256()
            if self.tar is not None:
                with open(self.tar, "rb") as file:
                    digest.update(file.read(BEGINNING))
                return {"bytes": self.tar.stat().st_size, "sha256": digest.hexdigest()}
            for item in self.files:
                digest.update(f"{item.key}\0{item.path.stat().st_size}\0".encode())
            return {"files": len(self.files), "sha256": digest.hexdigest()}
        except OSError as error:
            raise DataError(f"image data {error.filename} cannot be read ({error.strerror})") from error


def find_shards(roots: Sequence[Path], images_per_shard: int) -> list[Shard]:
    """The shards of folders, with all that is below them, and of tar files, in one order whatever the file system says.

    A tar file is a shard, named after its path. The images in folders are sorted by name, and every
    `images_per_shard` of them are one.

    Raises:
        DataError: a path is missing or of another kind, is inside another one, two images or tar files have one name,
            or there are none.
    """
    check_apart(roots)
    files: dict[str, Path] = {}
    tars: dict[str, Path] = {}
    for root in roots:
        for name, path in _found(root):
            key = _text(name)
            held = tars if name.endswith(TAR) else files
            key = key.removesuffix(TAR) if held is tars else key
            if key in held:
                raise DataError(f"image data must have one file of each name, got {held[key]} and {path}")
            held[key] = path
    if not files and not tars:
        raise DataError(
            f"image data {', '.join(map(str, roots))} must hold images ({', '.join(SUFFIXES)}) or {TAR} files, got none"
        )
    images = [Item(key, files[key]) for key in sorted(files)]
    pieces = [tuple(images[i : i + images_per_shard]) for i in range(0, len(images), images_per_shard)]
    shards = [Shard(name, tar=tars[name]) for name in sorted(tars)]
    shards += [Shard(f"images-{number:06d}", files=piece) for number, piece in enumerate(pieces)]
    if len({shard.name for shard in shards}) < len(shards):
        raise DataError(f"{TAR} files beside folders of images must not be called images-000000 and so on, got one")
    return shards


def check_apart(roots: Sequence[Path]) -> None:
    """Raises DataError where a path is missing, or one lies inside another: its images would come twice."""
    seen: list[Path] = []
    for root in roots:
        if not root.exists():
            raise DataError(f"image data {root} must exist, and does not")
        place = root.resolve()
        for other in seen:
            if place.is_relative_to(other) or other.is_relative_to(place):
                raise DataError(f"image data must be apart from each other, got {root}, which overlaps with {other}")
        seen.append(place)


def tar_items(path: Path) -> list[Item]:
    """The images of a tar file: of webdataset's samples the member that is one, under the key of the sample.

    Raises:
        DataError: it is no plain tar, is cut off, holds two images of one key, or none.
    """
    items: dict[str, Item] = {}
    names: dict[str, str] = {}
    try:
        size = require_regular(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or not member.name.lower().endswith(SUFFIXES):
                    continue
                folder, slash, base = member.name.rpartition("/")
                key = _text(folder + slash + base.partition(".")[0])
                if key in items:
                    raise DataError(
                        f"{path} must have one image of each key, got {one_line(names[key])} and "
                        f"{one_line(member.name)}"
                    )
                items[key] = Item(key, path, member.offset_data, member.size)
                names[key] = member.name
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path} is no whole tar file ({one_line(error)}); compressed ones are not read") from error
    if block != tarfile.NUL * tarfile.BLOCKSIZE:  # which Python takes for the end
        raise DataError(f"{path} is no whole tar file (cut off or damaged at byte {end} of {size})")
    if not items:
        raise DataError(f"{path} must hold images ({', '.join(SUFFIXES)}), got none")
    return list(items.values())


def _found(root: Path) -> Iterator[tuple[str, Path]]:
    """Name below the root, path."""
    if root.is_file():
        if root.suffix != TAR:
            raise DataError(f"image data must be folders or {TAR} files, got {root}")
        yield root.name, root
        return
    for parent, folders, names in os.walk(root, onerror=_raise):
        folders.sort()
        for name in names:
            if name.endswith(TAR) or name.lower().endswith(SUFFIXES):
                path = Path(parent, name)
                yield path.relative_to(root).as_posix(), path


def _raise(error: OSError) -> None:
    raise DataError(f"image data {error.filename} cannot be read ({error.strerror})") from error


def _text(name: str) -> str:
    """A name of a file as JSON can hold it: bytes that are no UTF-8 are written out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def first_items(shards: Iterable[Shard]) -> Iterator[Item]:
    """Of all shards, one after another."""
    for shard in shards:
        yield from shard.items()
