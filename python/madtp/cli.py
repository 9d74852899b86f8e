"""The command madtp. What is wrong is one line on stderr and exit code 2; an interrupt is 130."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console
from rich.table import Table

from madtp import demo as demo_run
from madtp import report, visualize
from madtp.accounting import profile_batches
from madtp.compression import ACCOUNT_SAMPLES, pairs
from madtp.patching import STATE_FILE, ModelError, from_pretrained, patch
from madtp.progress import Progress
from madtp.tasks import DataError
from madtp.tasks.easy_vqa import EasyVqa
from madtp.tasks.vqa import VqaTask, load_dense
from madtp.trainer import last_checkpoint
from madtp_kernels import env as kernels_env

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Directory = Annotated[Path, typer.Argument(help="A dense or a compressed model, such as runs/demo/model.")]
Limit = Annotated[int | None, typer.Option(help="Only the first LIMIT questions.", min=1)]


@app.command()
def demo(
    flops: Annotated[float, typer.Option(help="Share of the counted MACs to save.")] = 0.6,
    seed: Annotated[int, typer.Option(help="Of the alignment tokens and the order of the data.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the report, the picture and the model go.")] = Path("runs/demo"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")] = False,
    steps: Annotated[int, typer.Option(help="Of the training.", min=1)] = demo_run.STEPS,
    limit: Limit = None,
) -> None:
    """Compress the small BLIP of this package on easy-vqa and compare it with its dense self.

    Example: madtp demo --flops 0.5 --output runs/half
    """
    command = shlex.join(["madtp", *(argument for argument in sys.argv[1:] if argument != "--resume")])
    try:
        result = demo_run.run(
            output, flops=flops, seed=seed, steps=steps, limit=limit, resume=resume, command=command, console=_stderr()
        )
    except KeyboardInterrupt:
        checkpoint = last_checkpoint(output / "checkpoints")
        found = (
            f"; {checkpoint} is whole, go on with: {command} --resume" if checkpoint else " before the first checkpoint"
        )
        print(f"stopped{found}", file=sys.stderr)
        raise typer.Exit(130) from None
    console = Console()
    console.print(report.table(result.report))
    console.print(f"report.json, report.md, {demo_run.PICTURE} and the model are in {output}", highlight=False)


@app.command()
def evaluate(directory: Directory, limit: Limit = None) -> None:
    """Answer the test questions of easy-vqa.

    Example: madtp evaluate runs/demo/model
    """
    model, task = _load(directory)
    data = EasyVqa("test", task.tokenizer, limit=limit)
    progress = Progress(_stderr())
    metrics = task.evaluate(model, data, progress=lambda batches: progress(batches, "evaluating"))
    for name, value in metrics.items():
        print(f"{name} {100 * value:.2f} % on {len(data):,} samples")


@app.command()
def profile(directory: Directory, limit: Limit = None) -> None:
    """Count parameters and multiply-adds per sample on test questions, branch by branch.

    Example: madtp profile runs/demo/model
    """
    model, task = _load(directory)
    data = EasyVqa("test", task.tokenizer, limit=limit)
    batches = pairs(task, data, ACCOUNT_SAMPLES)
    found = weights = profile_batches(model, batches)
    if not hasattr(model, "madtp_handle"):
        patch(model)  # plain Hugging Face computes padding, the packed dense model does not
        found = profile_batches(model, batches)
    table = Table("", "parameters", "non-zero", "GMACs, dense", "counted", "executed")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, held, cost in (
        *((name, weights.branches[name], cost) for name, cost in found.branches.items()),
        ("total", weights.total, found.total),
    ):
        macs = (cost.dense_macs, cost.counted_macs, cost.executed_macs)
        counts = (f"{count:,}" for count in (held.params, held.nonzero_params))
        table.add_row(name, *counts, *(f"{value / 1e9:.4g}" for value in macs))
    Console().print(table)


@app.command("visualize")
def draw(
    directory: Annotated[Path, typer.Argument(help="A compressed model, such as runs/demo/model.")],
    output: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("tokens.png"),
    images: Annotated[int, typer.Option(help="Rows of the picture.", min=1)] = 8,
) -> None:
    """Draw test images with the tokens kept at each depth.

    Example: madtp visualize runs/demo/model --output tokens.png
    """
    model, task = _load(directory, compressed=True)
    print(visualize.picture(model, task, EasyVqa("test", task.tokenizer), output, images=images))


@app.command()
def env(json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False) -> None:
    """Say what this installation has and, for what it lacks, why.

    Example: madtp env --json
    """
    kernels_env.main(["--json"] if json else [])


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        app()
    except (DataError, ModelError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _load(directory: Path, *, compressed: bool = False):
    """A model, dense or compressed, and its task."""
    if not directory.is_dir():
        raise ModelError(f"model directory must exist, got {directory}; make one with: madtp demo")
    if compressed or (directory / STATE_FILE).exists():
        model = from_pretrained(directory)
        return model, VqaTask(transformers.AutoTokenizer.from_pretrained(directory))
    model, tokenizer = load_dense(directory)
    return model, VqaTask(tokenizer)


def _stderr() -> Console:
    return Console(stderr=True)
