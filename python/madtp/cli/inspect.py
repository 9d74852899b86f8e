# SPDX-License-Identifier: Apache-2.0
"""madtp evaluate, profile, visualize and env: what a model, dense or compressed, and an installation are like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from madtp.cli.options import (
    AnyModel,
    CompressedModel,
    Images,
    JudgedData,
    JudgedTest,
    KnownTask,
    Limit,
    quiet_transformers,
    stderr,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table
    from torch import Tensor

    from madtp.profiling.macs import Account, Profile

RANDOM_SAMPLES = 8  # on which a model without data is counted


def evaluate(
    model: AnyModel,
    task: KnownTask = None,
    data: JudgedData = None,
    test: JudgedTest = None,
    images: Images = None,
    limit: Limit = None,
) -> None:
    """Judge a model on the test data of its task.

    Example: madtp evaluate runs/demo/model
    """
    quiet_transformers()
    from madtp.progress import Progress
    from madtp.reporting.rows import metric
    from madtp.tasks.batches import sample_count
    from madtp.tasks.registry import load_judged

    progress = Progress(stderr())
    with progress.status("reading the data"):
        judged = load_judged(model, task, data, test=test, images=images, limit=limit)
    metrics = judged.task.evaluate(judged.model, judged.data, progress=lambda batches: progress(batches, "evaluating"))
    for name, value in metrics.items():
        print(f"{name} {metric(name, value)} on {sample_count(judged.data):,} samples")


def profile(
    model: AnyModel,
    task: KnownTask = None,
    data: JudgedData = None,
    test: JudgedTest = None,
    images: Images = None,
    limit: Limit = None,
) -> None:
    """Count parameters, multiply-adds and bit operations per sample, branch by branch: on test data of the model's
    task, or on random inputs of the model's own sizes where it has none.

    Example: madtp profile runs/demo/model
    """
    quiet_transformers()
    from rich.console import Console

    from madtp.data.model_inputs import random_inputs
    from madtp.handles import find_handle
    from madtp.models.registry import family_of
    from madtp.patching.handle import patch
    from madtp.profiling.figures import ACCOUNT_SAMPLES
    from madtp.profiling.macs import profile_batches
    from madtp.tasks.batches import sample_batches, sample_count
    from madtp.tasks.loading import architecture, load_model
    from madtp.tasks.registry import load_judged, tasks_of

    given = (task, data, test, images)
    if tasks_of(architecture(model)) or any(option is not None for option in given):
        judged = load_judged(model, task, data, test=test, images=images, limit=limit)
        loaded, batches = judged.model, sample_batches(judged.task, judged.data, ACCOUNT_SAMPLES)
        samples = f"{min(sample_count(judged.data), ACCOUNT_SAMPLES):,} test samples"
    else:
        loaded = load_model(model)
        batches = [random_inputs(loaded, limit or RANDOM_SAMPLES)]
        samples = f"{limit or RANDOM_SAMPLES} random samples, as no task is for this model: {_shapes(batches[0])}"
    found = weights = profile_batches(loaded, batches)
    if find_handle(loaded) is None and family_of(loaded) is not None:
        patch(loaded)  # plain Hugging Face computes padding, the patched dense model does not
        found = profile_batches(loaded, batches)
    console = Console()
    console.print(profile_table(found, weights))
    console.print(bits_table(found, weights))
    print(f"per sample, on {samples}")


def visualize(
    model: CompressedModel,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("tokens.png"),
    rows: Annotated[int, typer.Option(help="Samples in the picture.", min=1)] = 8,
    image: Annotated[Path | None, typer.Option(help="One image of yours instead, with its alignment.")] = None,
    text: Annotated[str | None, typer.Option(help="What goes with the image.")] = None,
    task: KnownTask = None,
    data: JudgedData = None,
    test: JudgedTest = None,
    images: Images = None,
) -> None:
    """Draw test images of the model's task, or one of yours, with the tokens kept at each depth.

    Example: madtp visualize runs/demo/model --out tokens.png
    """
    if images is not None and images.name.isdigit():
        raise ValueError(f"--images is now the folder of an annotation file's images; for rows: --rows {images}")
    quiet_transformers()
    from madtp.data.errors import DataError
    from madtp.files import require_writable_file
    from madtp.patching.state import STATE_FILE
    from madtp.reporting import visualize
    from madtp.tasks.loading import architecture
    from madtp.tasks.registry import load_judged, tasks_of

    kind = architecture(model)
    if not (model / STATE_FILE).exists():
        raise DataError(f"{model} is not a compressed model; `madtp compress --out NEW_FOLDER` makes one of it")
    require_writable_file("out", out)
    if image is not None:
        print(_seams_of(model, image, text, out) if "vlm" in tasks_of(kind) else _picture_of(model, image, text, out))
        return
    if task is None and not tasks_of(kind):
        raise ValueError(f"image must be given for a {kind}: no task is for it, so there are no test images")
    judged = load_judged(model, task, data, test=test, images=images)
    print(visualize.picture(judged.model, judged.task, judged.data, out, rows=rows))


def env(json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False) -> None:
    """Say what this installation has and, for what it lacks, why.

    Example: madtp env --json
    """
    from madtp_kernels.env import main

    main(["--json"] if json else [])


def profile_table(found: Profile, weights: Profile) -> Table:
    """Parameters of `weights` and GMACs of `found`, by branch and in total."""
    from madtp.reporting.tables import number_table

    rows = [
        (
            name,
            *(f"{count:,}" for count in (held.params, held.nonzero_params)),
            *(f"{macs / 1e9:.4g}" for macs in (cost.dense_macs, cost.counted_macs, cost.executed_macs)),
        )
        for name, held, cost in _parts(found, weights)
    ]
    return number_table(("", "parameters", "non-zero", "GMACs, dense", "counted", "executed"), [rows])


def bits_table(found: Profile, weights: Profile) -> Table:
    """Bytes of `weights` and bit operations of `found`, by branch and in total."""
    from madtp.reporting.tables import number_table

    rows = [
        (name, f"{held.weight_bytes:,}", f"{cost.bit_operations / 1e9:.4g}")
        for name, held, cost in _parts(found, weights)
    ]
    return number_table(("", "bytes of weights", "GBOPs, counted"), [rows])


def _parts(found: Profile, weights: Profile) -> list[tuple[str, Account, Account]]:
    """(name, account of `weights`, account of `found`) of every branch, and of all."""
    parts = [(name, weights.branches[name], cost) for name, cost in found.branches.items()]
    return [*parts, ("total", weights.total, found.total)]


def _shapes(inputs: Mapping[str, Tensor]) -> str:
    """Of one sample."""
    return ", ".join(f"{name} {tuple(value.shape[1:])}" for name, value in inputs.items())


def _picture_of(directory: Path, image: Path, text: str | None, out: Path) -> Path:
    """Draws one image of the user."""
    from madtp.data.images import read_image
    from madtp.data.model_inputs import reads_text, sees_images
    from madtp.reporting import visualize
    from madtp.tasks.loading import load_image_processor, load_model, load_tokenizer, no_image_processor

    picture = read_image(image)
    model = load_model(directory)
    if not sees_images(model):
        raise ValueError(f"model must have a vision tower, got a {type(model).__name__}")
    processor = load_image_processor(directory)
    if processor is None:
        raise no_image_processor(directory)
    tokenizer = load_tokenizer(directory) if reads_text(model) and text is not None else None
    return visualize.depths(model, picture, out, image_processor=processor, tokenizer=tokenizer, text=text)


def _seams_of(directory: Path, image: Path, text: str | None, out: Path) -> Path:
    """Draws what a decoder keeps of one image of the user for one question."""
    from madtp.data.conversations import Question
    from madtp.data.images import read_image
    from madtp.reporting import seam_pictures
    from madtp.tasks.loading import load_context, load_model, load_processor
    from madtp.tasks.registry import TASKS

    if text is None:
        raise ValueError("text must be given with an image for a decoder, got none: it is what the image is asked")
    picture, entry = read_image(image), TASKS["vlm"]
    model, processor = load_model(directory, entry.models), load_processor(directory)
    data = Question(picture, text, processor, load_context(directory))
    task = entry.make(processor, None, data)
    return seam_pictures.picture_of_one(model, task, data[0], out, mean=data.mean, std=data.std)
