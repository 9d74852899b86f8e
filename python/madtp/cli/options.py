# SPDX-License-Identifier: Apache-2.0
"""Options and arguments that several commands have, and what all of them print. Nothing heavy is imported here."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from madtp.choices import CORRECTIONS, DATA, MASKINGS, TASKS, WEIGHT_DTYPES

if TYPE_CHECKING:
    from rich.console import Console

    from madtp.config import CompressionConfig

NAMES = " or ".join(DATA)

DenseModel = Annotated[Path, typer.Argument(metavar="MODEL", help="A dense model: a Hugging Face folder.")]
AnyModel = Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of a dense or of a compressed model.")]
CompressedModel = Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of a compressed model.")]

Task = Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")]
Data = Annotated[str, typer.Option(help=f"{NAMES}, or the annotation file to train on.")]
Test = Annotated[Path | None, typer.Option(help="With an annotation file: the one to judge by.")]
Images = Annotated[Path | None, typer.Option(help="With an annotation file: where its image paths start.")]
Limit = Annotated[int | None, typer.Option(help="Only the first LIMIT items of each split.", min=1)]

KnownTask = Annotated[
    str | None, typer.Option(help=f"One of {', '.join(TASKS)}; found by the class of the model if not given.")
]
JudgedData = Annotated[
    str | None, typer.Option(help=f"{NAMES}, or an annotation file; the data set of the task if not given.")
]
JudgedTest = Annotated[Path | None, typer.Option(help="The annotation file to judge by, if it is another than DATA.")]

Macs = Annotated[float | None, typer.Option(help="Share of the counted MACs to save; 0.5 unless the config says it.")]
Latency = Annotated[float | None, typer.Option(help="Share of the time on this machine to save, in place of MACs.")]
Params = Annotated[float | None, typer.Option(help="Share of the parameters to zero, at least.")]
Width = Annotated[
    float | None, typer.Option(help="Most of the heads and hidden channels of a block that are removed, a share.")
]
Weights = Annotated[
    str | None, typer.Option(help=f"{' or '.join(WEIGHT_DTYPES)}: what weights are rounded to in the end.")
]
Smoothing = Annotated[
    float | None,
    typer.Option(help="With rounded weights: how much of outliers moves from inputs into weights first, 0 to 1."),
]
Correct = Annotated[
    str | None,
    typer.Option(help=f"{' or '.join(CORRECTIONS)}: prune in one shot, the weights that stay make up for the others."),
]
Fit = Annotated[
    int | None, typer.Option(help="After that: steps by which every part of a block is fitted to the dense one.", min=1)
]
Masking = Annotated[
    str | None, typer.Option(help=f"{' or '.join(MASKINGS)}: how masks act in the training, in place of SR-STE.")
]
Config = Annotated[Path | None, typer.Option(help="YAML: fields of CompressionConfig, and training: a mapping.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")]


def quiet_transformers() -> None:
    """No bars and no warnings of transformers: a command has its own."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def stderr() -> Console:
    """Where progress is shown, so that what is printed can be piped."""
    from rich.console import Console

    return Console(stderr=True)


def settings(
    file: Path | None,
    *,
    macs: float | None = None,
    latency: float | None = None,
    params: float | None = None,
    width: float | None = None,
    weights: str | None = None,
    smoothing: float | None = None,
) -> tuple[CompressionConfig, dict]:
    """The configuration, and fields of TrainingArguments: what is in the file, and over it what was given."""
    from madtp.config import CompressionConfig
    from madtp.files.yaml_files import read_yaml
    from madtp_kernels.bounded_file import ODD_VALUES, one_line

    values: Any = {}
    if file is not None:
        try:
            values = read_yaml(file) or {}
        except ValueError as error:
            raise ValueError(f"config {file} {error}") from error
    training = values.pop("training", {}) if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(training, dict):
        raise ValueError(f"config {file} must be a mapping of fields, with training: a mapping too")
    if macs is not None or latency is not None:  # the target given takes the place of the file's
        values = {n: v for n, v in values.items() if n not in ("macs_reduction", "latency_reduction")}
    given: dict[str, Any] = {"macs_reduction": macs, "latency_reduction": latency, "params_reduction": params}
    given |= {"width_reduction": width, "weight_dtype": weights, "hwp_smoothing": smoothing}
    values |= {name: value for name, value in given.items() if value is not None}
    try:
        return CompressionConfig.from_dict(values), dict(training)
    except ODD_VALUES as error:
        raise ValueError(one_line(error)) from error


def with_recovery(
    asked: CompressionConfig, *, correct: str | None, fit: int | None, masking: str | None
) -> CompressionConfig:
    """The configuration with what was given of how 2:4 weights recover."""
    given: dict[str, Any] = {"hwp_reconstruction_steps": fit, "hwp_masking": masking}
    if correct is not None:
        given |= {"hwp_score": correct, "hwp_schedule": "one_shot"}
    return replace(asked, **{name: value for name, value in given.items() if value is not None})


def typed_command() -> str:
    """What was typed, but for --resume."""
    return shlex.join(["madtp", *(argument for argument in sys.argv[1:] if argument != "--resume")])


@contextmanager
def says_how_to_go_on(out: Path, command: str) -> Iterator[None]:
    """A context whose interruption ends the process with the way to resume."""
    from madtp.training.trainer import last_checkpoint

    try:
        yield
    except KeyboardInterrupt:
        checkpoint = last_checkpoint(out / "checkpoints")
        found = (
            f"; {checkpoint} is whole, go on with: {command} --resume" if checkpoint else " before the first checkpoint"
        )
        print(f"stopped{found}", file=sys.stderr)
        raise typer.Exit(130) from None
