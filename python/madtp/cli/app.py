"""The command madtp. What is wrong is one line on stderr and exit code 2; an interrupt is 130."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import transformers
import typer
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from madtp import demo as demo_run
from madtp.budgets.allocate import REDUCTIONS
from madtp.budgets.allocate import allocate as choose_budgets
from madtp.budgets.allocate import pareto as choose_front
from madtp.budgets.plan import ALLOCATIONS, Plan
from madtp.compression import Targets, predict_targets
from madtp.compression import compress as run_compression
from madtp.config import CompressionConfig
from madtp.data.easy_vqa import EasyVqa
from madtp.data.errors import DataError
from madtp.files import require_writable
from madtp.measure.figures import ACCOUNT_SAMPLES
from madtp.measure.macs import profile_batches
from madtp.patching.handle import patch
from madtp.patching.pretrained import from_pretrained
from madtp.patching.state import STATE_FILE, ModelError
from madtp.progress import Progress
from madtp.reporting import report, visualize
from madtp.tasks import registry
from madtp.tasks.batches import sample_batches
from madtp.tasks.vqa import VqaTask, load_dense
from madtp.training.trainer import DivergedError, last_checkpoint
from madtp_kernels import env as kernels_env

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Directory = Annotated[Path, typer.Argument(help="A dense or a compressed model, such as runs/demo/model.")]
Limit = Annotated[int | None, typer.Option(help="Only the first LIMIT questions.", min=1)]
Model = Annotated[Path, typer.Option(help="The dense model: a Hugging Face folder.")]
TaskName = Annotated[str, typer.Option(help=f"One of {', '.join(registry.TASKS)}.")]
Data = Annotated[str, typer.Option(help="easy-vqa or emoji, or the annotation file to train on.")]
Test = Annotated[Path | None, typer.Option(help="With an annotation file: the one to judge by.")]
Images = Annotated[Path | None, typer.Option(help="With an annotation file: where its image paths start.")]
Flops = Annotated[float | None, typer.Option(help="Share of the counted MACs to save; 0.5 unless the config says it.")]
Latency = Annotated[float | None, typer.Option(help="Share of the time on this machine to save, in place of MACs.")]
Params = Annotated[float | None, typer.Option(help="Share of the parameters to zero, at least.")]
Config = Annotated[Path | None, typer.Option(help="YAML: fields of CompressionConfig, and training: a mapping.")]
Items = Annotated[int | None, typer.Option(help="Only the first LIMIT items of each split.", min=1)]


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
    command = _command()
    with _says_how_to_go_on(output, command):
        result = demo_run.run(
            output, flops=flops, seed=seed, steps=steps, limit=limit, resume=resume, command=command, console=_stderr()
        )
    console = Console()
    console.print(report.table(result.report))
    files = ", ".join(("report.html", "report.md", "report.json", demo_run.PICTURE))
    console.print(f"{files} and the model are in {output}", highlight=False)


@app.command()
def compress(
    model: Model,
    task: TaskName,
    data: Data,
    out: Annotated[Path, typer.Option(help="Where the report and the model go.")],
    flops: Flops = None,
    latency: Latency = None,
    params: Params = None,
    plan: Annotated[Path | None, typer.Option(help="What `madtp allocate` wrote; its target counts.")] = None,
    config: Config = None,
    steps: Annotated[int | None, typer.Option(help="Of the training.", min=1)] = None,
    test: Test = None,
    images: Images = None,
    limit: Items = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be aimed at.")] = False,
) -> None:
    """Prune the tokens and weights of a dense model in one training, and compare the two.

    Example: madtp compress --model runs/dense --task captioning --data emoji --flops 0.5 --out runs/half
    """
    settings, training = _settings(config, flops, latency, params)
    if steps is not None:
        training["max_steps"] = steps
    chosen = None if plan is None else Plan.load(plan)
    if not dry_run:
        require_writable("out", out)
    progress = Progress(_stderr())
    with progress.status("reading the data"):
        loaded = registry.load(task, model, data, test=test, images=images, limit=limit)
    console = Console()
    if dry_run:
        console.print(
            _targets_table(predict_targets(loaded.model, loaded.task, loaded.calibration, settings, plan=chosen))
        )
        return
    command = _command()
    with _says_how_to_go_on(out, command):
        result = run_compression(
            loaded.model,
            loaded.task,
            loaded.train,
            loaded.test,
            settings,
            output_dir=out,
            calibration_data=loaded.calibration,
            plan=chosen,
            training=training,
            resume=resume,
            progress=progress,
        )
    report.write(result.report, out, command=command)
    console.print(report.table(result.report))
    console.print(f"report.html, report.md, report.json and the model are in {out}", highlight=False)


@app.command()
def allocate(
    model: Model,
    task: TaskName,
    data: Data,
    out: Annotated[Path, typer.Option(help="The YAML to write.")] = Path("plan.yaml"),
    flops: Flops = None,
    latency: Latency = None,
    params: Params = None,
    allocation: Annotated[str, typer.Option(help=f"One of {', '.join(ALLOCATIONS)}.")] = "joint",
    config: Config = None,
    test: Test = None,
    images: Images = None,
    limit: Items = None,
) -> None:
    """Choose what each branch and each Linear may spend, least sensitive first; nothing is trained.

    Example: madtp allocate --model runs/dense --task captioning --data emoji --flops 0.6 --out plan.yaml
    """
    settings, _ = _settings(config, flops, latency, params)
    require_writable("out", out.parent)
    progress = Progress(_stderr())
    with progress.status("reading the data"):
        loaded = registry.load(task, model, data, test=test, images=images, limit=limit)
    plan = choose_budgets(
        loaded.model,
        loaded.task,
        loaded.calibration,
        settings,
        allocation=allocation,
        progress=lambda units: progress(units, "measuring sensitivities"),
    )
    plan.save(out)
    for branch, share in plan.tokens.items():
        print(f"{branch}: {100 * share:.1f} % of its MACs for tokens")
    print(f"{len(plan.sparse_modules)} Linears go {settings.pattern}")
    if plan.latency_reduction is not None:
        print(f"predicted: {plan.predicted['ms']:.3g} ms a sample, dense {plan.predicted['dense_ms']:.3g} ms")
    for name, loss in sorted(plan.compared.items(), key=lambda item: item[1]):
        print(f"distillation loss before training, {name}: {loss:.4g}")
    print(out)


@app.command()
def pareto(
    model: Model,
    task: TaskName,
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder that gets a plan for each reduction.")],
    flops: Annotated[str, typer.Option(help="Shares of the MACs to save, with commas.")] = ",".join(
        map(str, REDUCTIONS)
    ),
    config: Config = None,
    test: Test = None,
    images: Images = None,
    limit: Items = None,
) -> None:
    """Choose budgets for many reductions from one measurement: what each would cost the answers, before training.

    Example: madtp pareto --model runs/dense --task captioning --data emoji --out runs/plans
    """
    settings, _ = _settings(config)
    try:
        reductions = [float(share) for share in flops.split(",")]
    except ValueError:
        raise ValueError(f"flops must be numbers with commas, got {flops!r}") from None
    require_writable("out", out)
    progress = Progress(_stderr())
    with progress.status("reading the data"):
        loaded = registry.load(task, model, data, test=test, images=images, limit=limit)
    plans = choose_front(
        loaded.model,
        loaded.task,
        loaded.calibration,
        settings,
        reductions=reductions,
        progress=lambda units: progress(units, "measuring sensitivities"),
    )
    table = Table("MACs saved", *ALLOCATIONS, "plan", title="distillation loss before training", title_justify="left")
    for plan in plans:
        path = out / f"{100 * plan.macs_reduction:.0f}.yaml"
        plan.save(path)
        losses = (f"{plan.compared[name]:.4g}" if name in plan.compared else "" for name in ALLOCATIONS)
        table.add_row(f"{100 * plan.macs_reduction:.1f} %", *losses, path.name)
    Console().print(table)


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
    batches = sample_batches(task, data, ACCOUNT_SAMPLES)
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
    image: Annotated[Path | None, typer.Option(help="One image of yours instead, with its alignment.")] = None,
    text: Annotated[str | None, typer.Option(help="What goes with the image.")] = None,
) -> None:
    """Draw test images of easy-vqa, or one of yours, with the tokens kept at each depth.

    Example: madtp visualize runs/demo/model --output tokens.png
    """
    if image is not None:
        print(_depths(directory, image, text, output))
        return
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
    except (DataError, DivergedError, ModelError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _settings(
    file: Path | None, flops: float | None = None, latency: float | None = None, params: float | None = None
) -> tuple[CompressionConfig, dict]:
    """The configuration, and fields of TrainingArguments: what is in the file, and over it what was given."""
    values = {}
    if file is not None:
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"config {file} must be YAML: {error}") from error
    training = values.pop("training", {}) if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(training, dict):
        raise ValueError(f"config {file} must be a mapping of fields, with training: a mapping too")
    if flops is not None or latency is not None:  # the target given takes the place of the file's
        values = {n: v for n, v in values.items() if n not in ("macs_reduction", "latency_reduction")}
    given = {"macs_reduction": flops, "latency_reduction": latency, "params_reduction": params}
    values |= {name: value for name, value in given.items() if value is not None}
    return CompressionConfig.from_dict(values), dict(training)


def _targets_table(targets: Targets) -> Table:
    table = Table("", "GMACs a sample, dense", "aimed at", "", title="nothing was trained", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    branches = targets.before.branches
    rows = [(name, branches[name].dense_macs, macs) for name, macs in targets.counted_macs.items()]
    rows.append(("total", targets.before.total.dense_macs, sum(targets.counted_macs.values())))
    for name, dense, macs in rows:
        if dense:
            table.add_row(name, f"{dense / 1e9:.4g}", f"{macs / 1e9:.4g}", f"{100 * macs / dense:.1f} %")
    table.caption = f"{len(targets.chosen)} Linears go N:M, {len(targets.dense)} stay dense"
    if targets.latency_reduction is not None:
        table.caption += f"; planned for {100 * targets.latency_reduction:.1f} % less time"
    return table


def _command() -> str:
    """What was typed, but for --resume."""
    return shlex.join(["madtp", *(argument for argument in sys.argv[1:] if argument != "--resume")])


@contextmanager
def _says_how_to_go_on(output: Path, command: str) -> Iterator[None]:
    """A context whose interruption ends the process with the way to resume."""
    try:
        yield
    except KeyboardInterrupt:
        checkpoint = last_checkpoint(output / "checkpoints")
        found = (
            f"; {checkpoint} is whole, go on with: {command} --resume" if checkpoint else " before the first checkpoint"
        )
        print(f"stopped{found}", file=sys.stderr)
        raise typer.Exit(130) from None


def _load(directory: Path, *, compressed: bool = False):
    """A model, dense or compressed, and its task."""
    if not directory.is_dir():
        raise ModelError(f"model directory must exist, got {directory}; make one with: madtp demo")
    if compressed or (directory / STATE_FILE).exists():
        model = from_pretrained(directory)
        return model, VqaTask(transformers.AutoTokenizer.from_pretrained(directory))
    model, tokenizer = load_dense(directory)
    return model, VqaTask(tokenizer)


def _depths(directory: Path, image: Path, text: str | None, output: Path) -> Path:
    model, tokenizer = from_pretrained(directory), None
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise DataError(f"model directory {directory} has no image processor (preprocessor_config.json)") from error
    if text is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    try:
        picture = Image.open(image).convert("RGB")
    except OSError as error:
        raise DataError(f"image {image} cannot be read ({error.strerror or error})") from error
    return visualize.depths(model, picture, output, image_processor=processor, tokenizer=tokenizer, text=text)


def _stderr() -> Console:
    return Console(stderr=True)
