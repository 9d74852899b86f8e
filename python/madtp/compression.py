"""compress(): targets, joint training, settling on the target, saving; and measure(), the figures of one model."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed

import madtp_kernels
from madtp.accounting import disk_bytes, profile
from madtp.config import CompressionConfig
from madtp.controller import branch_targets
from madtp.hwp import Pattern, select_modules
from madtp.patching import from_pretrained, patch
from madtp.trainer import MadtpTrainer, last_checkpoint

PROBE_SAMPLES = 64  # of the training data, on which MACs are observed while training
SETTLE_SAMPLES = 512  # of the training data, on which the temperatures settle
ACCOUNT_SAMPLES = 1024  # of the evaluation data, for the reported MACs
TIMING_BATCH, TIMING_ROUNDS = 32, 15


@dataclass(frozen=True)
class Result:
    """model: the compressed model as loaded from `path`. report: see docs/report.md; plain values."""

    model: nn.Module
    report: dict
    path: Path


def compress(
    model: nn.Module,
    task,
    train_data: Dataset,
    eval_data: Dataset,
    config: CompressionConfig,
    *,
    output_dir: str | Path,
    training: Mapping | None = None,
    resume: bool = False,
) -> Result:
    """Compresses a dense model: tokens and weights pruned in one training with distillation.

    Temperatures are steered on training data only; eval_data is for the report.

    Args:
        model: a supported Hugging Face model, not patched; it is left as it is.
        task: `collate(items) -> batch`, `accuracy(model, data, progress=...)`, `save_processor(path)`; see
            `madtp.tasks.vqa.VqaTask`.
        train_data, eval_data: datasets whose items `task.collate` batches.
        config: targets and knobs.
        output_dir: checkpoints go to output_dir/checkpoints, the model to output_dir/model.
        training: `transformers.TrainingArguments` fields, over the defaults here.
        resume: go on from the last checkpoint in output_dir.

    Returns:
        `Result`; its report compares dense and compressed, both measured here, the latter from the saved files.

    Raises:
        ValueError: the target cannot be reached. TypeError: the model's class is not supported.
    """
    output_dir = Path(output_dir)
    set_seed(config.seed)
    student, teacher = copy.deepcopy(model), copy.deepcopy(model)
    handle = patch(student, config)
    patch(teacher, config)

    exclude = (*config.sparse_exclude, *handle.family.dense_modules, "madtp_guide")
    linears = select_modules(student, config.pattern, include=config.sparse_include, exclude=exclude)
    planned = linears.selected if Pattern.parse(config.pattern).sparse24 else []
    probe = pairs(task, train_data, PROBE_SAMPLES)
    before = profile(student, probe, planned_sparse=planned)
    targets = branch_targets(before, config.flops_reduction, tuple(handle.pruning))

    trainer = MadtpTrainer(
        student,
        teacher,
        config,
        targets=targets,
        probe=probe,
        sparse_modules=linears.selected,
        args=_training_arguments(output_dir, config, training),
        train_dataset=train_data,
        data_collator=task.collate,
    )
    checkpoint = last_checkpoint(output_dir / "checkpoints") if resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    magnitude = trainer.pruner.finalize()
    handle.collect_alignment(False)
    trainer.probe = {k: v.to(trainer.args.device) for k, v in pairs(task, train_data, SETTLE_SAMPLES).items()}
    miss = trainer.settle()
    student.save_pretrained(output_dir / "model")
    task.save_processor(output_dir / "model")

    compressed = from_pretrained(output_dir / "model")
    figures = {
        "dense": measure(model, task, eval_data),
        "compressed": measure(compressed, task, eval_data, path=output_dir / "model"),
    }
    batch = pairs(task, eval_data, TIMING_BATCH)
    for name, milliseconds in time_per_sample({"dense": model, "compressed": compressed}, batch).items():
        figures[name]["ms_per_sample"] = milliseconds
    plan = {
        "targets_gmacs": {branch: macs / 1e9 for branch, macs in targets.items()},
        "temperatures": handle.temperatures,
        "calibration_miss": miss,
        "sparse_modules": linears.selected,
        "dense_modules": linears.dense,
        "magnitude_kept": magnitude,
    }
    report = {**figures, "plan": plan, "config": config.to_dict(), "versions": versions()}
    return Result(compressed, report, output_dir / "model")


def measure(
    model: nn.Module, task, data: Dataset, *, path: Path | None = None, progress=iter
) -> dict[str, float | dict[str, list[float]]]:
    """The figures of one model on all of `data`, but for the time, which only a comparison gives.

    GMACs are per sample, averaged over `ACCOUNT_SAMPLES` spread over the data; for a plain Hugging Face model they are
    those of the packed dense model, without padding. `bytes` is the size of the weights file.

    Args:
        path: the directory the model was loaded from; None saves it to a temporary one to weigh it.
        progress: wraps the batches of the evaluation, for a bar.
    """
    watch = _TokenCount(model)
    accuracy = task.accuracy(model, data, progress=lambda batches: watch(progress(batches)))
    counted = model
    if not hasattr(model, "madtp_handle"):
        counted = copy.deepcopy(model)
        patch(counted)
    batch = pairs(task, data, ACCOUNT_SAMPLES)
    total = profile(counted, batch).total
    return {
        "accuracy": accuracy,
        "dense_gmacs": total.dense_macs / 1e9,
        "counted_gmacs": total.counted_macs / 1e9,
        "executed_gmacs": total.executed_macs / 1e9,
        "params": sum(p.numel() for p in model.parameters()),
        "nonzero_params": sum(int(p.count_nonzero()) for p in model.parameters()),
        "bytes": disk_bytes(path / "model.safetensors") if path else _saved_bytes(model),
        "tokens_per_layer": watch.means() or counted.madtp_handle.tokens_per_layer,
    }


@torch.no_grad()
def time_per_sample(models: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Milliseconds per sample of a forward pass: medians of rounds in which the models take turns."""
    samples = len(batch["labels"])
    seconds = defaultdict(list)
    for _ in range(TIMING_ROUNDS):
        for name, model in models.items():
            start = time.perf_counter()
            model(**batch)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) / samples for name, values in seconds.items()}


def pairs(task, data: Dataset, count: int) -> dict[str, Tensor]:
    """A batch of about `count` samples spread over the data, every one with its own copy of its image."""
    batch = task.collate([data[i] for i in range(0, len(data), max(1, len(data) // count))])
    index = batch.pop("image_index", None)
    if index is not None:
        batch["pixel_values"] = batch["pixel_values"][index]
    return {name: value[:count] for name, value in batch.items()}


def versions() -> dict[str, str]:
    return {
        "madtp_kernels": madtp_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class _TokenCount:
    """Averages the tokens after each layer over the batches of an evaluation, of a patched model."""

    def __init__(self, model: nn.Module):
        self.handle = getattr(model, "madtp_handle", None)
        self.tokens: defaultdict[str, list] = defaultdict(list)  # branch -> per batch, (B,) x layers totals
        self.sequences: defaultdict[str, int] = defaultdict(int)

    def __call__(self, batches: Iterable) -> Iterator:
        for batch in batches:
            yield batch
            if self.handle is not None:
                for name, branch in self.handle.pruning.items():
                    self.sequences[name] += branch.layers[0].batch
                    self.tokens[name].append([layer.origin.numel() for layer in branch.layers])

    def means(self) -> dict[str, list[float]]:
        return {
            name: [sum(layer) / self.sequences[name] for layer in zip(*rows, strict=True)]
            for name, rows in self.tokens.items()
        }


def _training_arguments(output_dir: Path, config: CompressionConfig, training: Mapping | None) -> TrainingArguments:
    defaults = {
        "output_dir": str(output_dir / "checkpoints"),
        "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.01,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "report_to": [],
        "seed": config.seed,
    }
    return TrainingArguments(**defaults | dict(training or {}))


def _saved_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return disk_bytes(Path(folder) / "model.safetensors")
