# SPDX-License-Identifier: Apache-2.0
"""madtp embed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from madtp.choices import BROKEN, VECTOR_DTYPES, VECTORS
from madtp.cli.options import AnyModel, quiet_transformers, stderr, typed_command

SHOWN = 10  # broken images that are named


def embed(
    model: AnyModel,
    data: Annotated[
        list[Path],
        typer.Option(help="A folder with images and webdataset shards (.tar) below it, or a shard; may be repeated."),
    ],
    out: Annotated[Path, typer.Option(help="The folder that gets the vectors; one that was begun goes on.")],
    keep_rate: Annotated[
        float | None, typer.Option(help="Share of the image tokens to keep; as saved if not given, or all.")
    ] = None,
    vector: Annotated[
        str | None,
        typer.Option(help=f"{' or '.join(VECTORS)}: what is compared with texts, or what the tower pools."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="In which the model computes; as saved if not given.")] = None,
    vector_dtype: Annotated[str, typer.Option(help=f"{' or '.join(VECTOR_DTYPES)}: of the files.")] = VECTOR_DTYPES[0],
    batch_size: Annotated[int, typer.Option(help="Images of one size that are encoded at once.", min=1)] = 32,
    workers: Annotated[int, typer.Option(help="Processes that read images; 0: this one does.", min=0)] = 0,
    images_per_shard: Annotated[int, typer.Option(help="Of folders; a .tar is a shard.", min=1)] = 1000,
    broken: Annotated[
        str, typer.Option(help=f"{' or '.join(BROKEN)}: what to do with images that cannot be read.")
    ] = BROKEN[0],
    device: Annotated[str | None, typer.Option(help="Of torch; the GPU if there is one.")] = None,
    ray: Annotated[int | None, typer.Option(help="Actors on a Ray cluster that share the shards.", min=1)] = None,
) -> None:
    """Write a vector of every image, in shards; what was stopped goes on with the same command.

    Example: madtp embed runs/half/model --data photos/ --out vectors
    """
    quiet_transformers()
    from madtp.embedding import embed
    from madtp.progress import Progress

    try:
        done = embed(
            model,
            data,
            out,
            keep_rate=keep_rate,
            vector=vector,
            dtype=dtype,
            vector_dtype=vector_dtype,
            batch_size=batch_size,
            workers=workers,
            images_per_shard=images_per_shard,
            broken=broken,
            device=device,
            ray=ray,
            progress=Progress(stderr()),
        )
    except KeyboardInterrupt:
        print(f"stopped; shards that are whole stay, go on with: {typed_command()}", file=sys.stderr)
        raise typer.Exit(130) from None
    for shard, key, reason in done.skipped[:SHOWN]:
        print(f"skipped {key} of {shard}: {reason}", file=sys.stderr)
    if len(done.skipped) > SHOWN:
        print(f"and {len(done.skipped) - SHOWN:,} more, in {done.path}/shards", file=sys.stderr)
    rate = f", {done.new_images / done.seconds:,.1f} a second" if done.new_images else ""
    print(f"{done.images:,} images in {done.shards:,} shards, {len(done.skipped):,} skipped")
    print(f"new: {done.new_images:,}{rate}")
    print(done.path / "index.json" if done.whole else f"{done.path}: other processes are at the rest")
