# SPDX-License-Identifier: Apache-2.0
"""embed(): a vector of every image, written in shards; stopped at any moment it goes on where it was."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from madtp.choices import BROKEN, VECTOR_DTYPES
from madtp.data.errors import DataError
from madtp.embedding.encoder import ImageEncoder, load_encoder
from madtp.embedding.files import OutputFolder, ShardSummary
from madtp.embedding.on_ray import require_ray, run_on_ray
from madtp.embedding.reading import Broken, read_batches
from madtp.embedding.record import check_settings, read_record, write_record
from madtp.embedding.shard import Job
from madtp.embedding.sources import Shard, find_shards, first_items
from madtp.files import require_writable
from madtp.patching.keep_rate import check_rates
from madtp.progress import Progress
from madtp_kernels import __version__

CALIBRATION_IMAGES = 32  # the first of the data, on which keep_rate finds its temperature


@dataclass(frozen=True)
class Embedded:
    """What is in the folder of a run."""

    path: Path
    shards: int  # that are whole
    images: int  # with a vector, in these
    skipped: tuple[tuple[str, str, str], ...]  # shard, name of a broken image, reason
    whole: bool  # whether all shards are there, and the index
    new_images: int  # of this call
    seconds: float  # that it took for these


def embed(
    model: str | os.PathLike | Any,
    images: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    image_processor: Any = None,
    keep_rate: float | None = None,
    vector: str | None = None,
    dtype: str | None = None,
    vector_dtype: str = "float32",
    batch_size: int = 32,
    workers: int = 0,
    images_per_shard: int = 1000,
    broken: str = "skip",
    device: str | None = None,
    ray: int | None = None,
    progress: Progress | None = None,
) -> Embedded:
    """Writes a vector of each image, shard by shard.

    Called again with the same arguments it does the shards that are not there yet. Processes of torchrun or accelerate
    (RANK, WORLD_SIZE) share the shards, and write what one process would.

    Args:
        model: a folder that Hugging Face or madtp has saved, or a model in memory, which runs as it is, where it is.
        images: folders with images and tar files below them, or tar files; of webdataset's samples the image counts.
        out: the folder to fill: `docs/formats.md`.
        image_processor: of a model in memory; a folder has its own.
        keep_rate: share of the image tokens that is left after a block, as of `Handle.set_keep_rate`: the temperature
            is found on the first images, and is in run.json. None: as saved, of a dense model all.
        vector: "projected": what the model compares with texts (CLIP, dual encoders, BLIP for retrieval). "pooled":
            what the vision tower pools. None: the first where there is one.
        dtype: in which the model computes, a name of torch; None: as it was saved.
        vector_dtype: "float32" or "float16", of the files.
        batch_size: images of one size that are encoded at once.
        workers: processes that read images; 0: this one does.
        images_per_shard: of folders; a tar file is one shard.
        broken: "skip": images that cannot be read are left out, and listed; shards that cannot are named in the end.
            "refuse": the first of them ends the run.
        device: of torch; None: the GPU of this process, or the CPU.
        ray: actors on a Ray cluster that share the shards, in place of this process.
        progress: shows how far it is.

    Returns:
        what is in the folder now.

    Raises:
        ValueError: an argument breaks a rule, `out` has other settings or lies in the images. TypeError: nothing is
            known of the model's class. DataError, ModelError: data or model are missing, damaged or of another kind.
            ImportError: Ray is not installed.
    """
    roots = [Path(root) for root in ([images] if isinstance(images, str | os.PathLike) else images)]
    out = Path(out)
    _check(model, image_processor, keep_rate, dtype, device)
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("ray", ray, 1)):
        _check_count(name, value, least)
    _check_count("images_per_shard", images_per_shard, 1)
    _check_choice("vector_dtype", vector_dtype, VECTOR_DTYPES)
    _check_choice("broken", broken, BROKEN)
    rank, world = process_of_all()
    if ray is not None:
        require_ray()
        if world > 1:
            raise ValueError(f"ray must be None where WORLD_SIZE is above 1, got {ray} and {world} processes")
    _check_outside(out, roots)
    shards = find_shards(roots, images_per_shard)
    in_memory = not isinstance(model, str | os.PathLike)
    if in_memory:
        encoder = ImageEncoder(model, image_processor, vector)
    else:
        computed = None if dtype is None else getattr(torch, dtype)
        encoder = load_encoder(Path(model), vector=vector, dtype=computed, device=device)
    require_writable("out", out)
    settings = {
        "vector": encoder.vector,
        "width": encoder.width,
        "keep_rate": keep_rate,
        "dtype": dtype,
        "vector_dtype": vector_dtype,
        "images_per_shard": images_per_shard,
        "model": encoder.checksum(),
    }
    record = read_record(out)
    if record is not None:
        check_settings(out, record, settings)
    files = OutputFolder(out)
    if strange := sorted(set(files.names()) - {shard.name for shard in shards}):
        raise DataError(f"out {out} must be of the same images: it has {strange[0]}, and they have no such shard")
    sources = [shard.source() for shard in shards]
    found = [files.summary(shard.name, source) for shard, source in zip(shards, sources, strict=True)]
    if keep_rate is not None:
        encoder.patch()
    if record is None:
        if keep_rate is not None:
            encoder.set_keep_rate(keep_rate, _calibration(encoder, shards, batch_size))
        write_record(out, {"settings": settings, "temperature": encoder.temperature, "made_with": _versions()})
        record = read_record(out)  # of the first process
        assert record is not None
        check_settings(out, record, settings)
    if keep_rate is not None:
        encoder.set_temperature(float(record["temperature"]))
    job = Job(encoder, out, vector_dtype, batch_size, workers, broken)
    mine = range(rank, len(shards), world)
    todo = [shards[i] for i in mine if found[i] is None]
    start = time.monotonic()
    new_images, failed = _run(job, todo, ray, progress, len(mine))
    seconds = time.monotonic() - start
    after = zip(shards, sources, found, strict=True)
    whole = [one for shard, source, before in after if (one := before or files.summary(shard.name, source)) is not None]
    if len(whole) == len(shards):
        files.write_index(whole, encoder.width, vector_dtype)
    if failed:
        first = failed[0]
        raise DataError(f"{len(failed)} of {len(shards)} shards could not be embedded, first: {first}") from first
    return _embedded(out, whole, len(shards), new_images, seconds)


def process_of_all() -> tuple[int, int]:
    """RANK and WORLD_SIZE of torchrun and accelerate. Raises ValueError where they cannot be."""
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, world = map(int, given)
    except ValueError:
        rank, world = 0, 0
    if not 0 <= rank < world:
        raise ValueError(f"RANK must be a number from 0 to below WORLD_SIZE, got {given[0]!r} of {given[1]!r}")
    return rank, world


def _run(
    job: Job, todo: Sequence[Shard], ray: int | None, progress: Progress | None, total: int
) -> tuple[int, list[DataError]]:
    """How many images were embedded, and what failed with its whole shard."""
    images, failed = 0, []
    with (progress or _Silent()).shards("embedding", total, total - len(todo)) as bar:
        for outcome in _outcomes(job, todo, ray, bar):
            if isinstance(outcome, DataError):
                if job.broken == "refuse":
                    raise outcome
                failed.append(outcome)
                continue
            embedded, skipped = outcome
            images += embedded
            bar.add(images=embedded if ray else 0, skipped=skipped, shards=1)
    return images, failed


def _outcomes(job: Job, todo: Sequence[Shard], ray: int | None, bar: Any) -> Iterator[tuple[int, int] | DataError]:
    if ray is not None:
        if todo:
            yield from run_on_ray(job, todo, ray)
        return
    for shard in todo:
        try:
            yield job.run(shard, lambda images: bar.add(images=images))
        except DataError as error:
            yield error


class _Silent(Progress):
    def __init__(self):
        super().__init__(Console(quiet=True))


def _calibration(encoder: ImageEncoder, shards: Sequence[Shard], batch_size: int) -> list[torch.Tensor]:
    """Batches of the first images that can be read."""
    items = list(islice(first_items(shards), CALIBRATION_IMAGES))
    broken: list[Broken] = []
    batches = list(read_batches(items, encoder.image_processor, batch_size, 0, broken.append))
    if not batches:
        raise DataError(
            f"the first {len(items)} images must have some that can be read, for keep_rate, got none "
            f"({items[0].key}: {broken[0].reason})"
        )
    return [batch.pixels for batch in batches]


def _embedded(out: Path, whole: Sequence[ShardSummary], shards: int, new_images: int, seconds: float) -> Embedded:
    return Embedded(
        path=out,
        shards=len(whole),
        images=sum(one.images for one in whole),
        skipped=tuple((one.name, key, reason) for one in whole for key, reason in one.skipped),
        whole=len(whole) == shards,
        new_images=new_images,
        seconds=seconds,
    )


def _versions() -> dict[str, str]:
    return {"madtp": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _check(model: Any, image_processor: Any, keep_rate: Any, dtype: Any, device: Any) -> None:
    if isinstance(model, str | os.PathLike):
        if image_processor is not None:
            raise ValueError("image_processor must be None for the folder of a model, which has its own, got one")
        if keep_rate is not None:
            check_rates({"vision": keep_rate}, ["vision"])
        if dtype is not None and not getattr(getattr(torch, str(dtype), None), "is_floating_point", False):
            raise ValueError(f"dtype must be the name of a floating-point dtype of torch, got {dtype!r}")
        return
    if image_processor is None:
        raise ValueError("image_processor must be given for a model in memory, got None")
    given = {"keep_rate": keep_rate, "dtype": dtype, "device": device}
    if names := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{names[0]} must be None for a model in memory, which runs as it is, got {given[names[0]]!r}")


def _check_count(name: str, value: Any, least: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, got {value!r}")


def _check_outside(out: Path, roots: Sequence[Path]) -> None:
    """Raises ValueError where what is written would be found among the images of the next run."""
    if not roots:
        raise ValueError("images must be at least one folder or tar file, got none")
    for root in roots:
        if out.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"out must lie outside of the images, got {out} in {root}")
