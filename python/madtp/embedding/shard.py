# SPDX-License-Identifier: Apache-2.0
"""One shard: its images read, encoded and written. All that runs in a process or in an actor of Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from madtp.data.errors import DataError
from madtp.embedding.encoder import ImageEncoder
from madtp.embedding.files import OutputFolder
from madtp.embedding.reading import Broken, read_batches
from madtp.embedding.sources import Shard
from madtp_kernels.bounded_file import one_line


@dataclass(frozen=True)
class Job:
    """What is done with each shard.

    Args:
        vector_dtype: in which vectors are written, a name of numpy.
        broken: "skip" or "refuse".
        workers: as of `read_batches`.
    """

    encoder: ImageEncoder
    out: Path
    vector_dtype: str
    batch_size: int
    workers: int
    broken: str

    def run(self, shard: Shard, done: Callable[[int], None] = lambda images: None) -> tuple[int, int]:
        """Writes the files of a shard.

        Args:
            done: is told after every batch how many images it had.

        Returns:
            how many images it has, and how many were skipped.

        Raises:
            DataError: the shard cannot be read, none of its images can, one cannot and `broken` is "refuse", or one has
                a vector that is not finite. Nothing was written.
        """
        source, items = shard.source(), shard.items()
        broken: dict[int, str] = {}

        def told(found: Broken) -> None:
            if self.broken == "refuse":
                raise DataError(f"image {one_line(items[found.number].key)} of {shard.name} {_unread(found.reason)}")
            broken[found.number] = found.reason

        vectors = np.empty((len(items), self.encoder.width), self.vector_dtype)
        for numbers, pixels in read_batches(items, self.encoder.image_processor, self.batch_size, self.workers, told):
            with np.errstate(over="ignore"):
                vectors[numbers] = self.encoder(pixels).numpy()
            finite = np.isfinite(vectors[numbers]).all(axis=1)
            if not finite.all():
                key = items[numbers[int(finite.argmin())]].key
                raise DataError(
                    f"image {one_line(key)} of {shard.name} must have a finite vector in {self.vector_dtype}, "
                    f"got another: write float32, or run the model in float32"
                )
            done(len(numbers))
        if len(broken) == len(items):
            raise DataError(
                f"{shard.name} must have an image that can be read, got none of {len(items)}: "
                f"{one_line(items[0].key)} {_unread(broken[0])}"
            )
        whole = [number for number in range(len(items)) if number not in broken]
        keys = [items[number].key for number in whole]
        skipped = [(items[number].key, broken[number]) for number in sorted(broken)]
        OutputFolder(self.out).write(shard.name, source, keys, vectors[whole], skipped)
        return len(keys), len(skipped)


def _unread(reason: str) -> str:
    return f"cannot be read ({reason})"
