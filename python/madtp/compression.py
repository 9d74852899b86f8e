"""compress(): targets, joint training, settling on the target, saving; and measure(), the figures of one model."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments, set_seed

import madtp_kernels
from madtp.budgets.allocate import allocate
from madtp.budgets.plan import Plan
from madtp.config import CompressionConfig
from madtp.files import atomic_directory, require_writable
from madtp.hwp import (
    Pattern,
    Permutation,
    collect_inputs,
    mlp_pairs,
    pack,
    permute_mlps,
    prune_one_shot,
    select_modules,
)
from madtp.inference import evaluating
from madtp.measure.figures import compare
from madtp.measure.macs import (
    Profile,
    counted_macs,
    profile_batches,
)
from madtp.measure.timing import TIMING_BATCH, time_per_sample
from madtp.patching.handle import patch
from madtp.patching.pretrained import from_pretrained
from madtp.progress import Progress
from madtp.tasks.batches import pairs
from madtp.tasks.task import Task
from madtp.training.controller import branch_targets
from madtp.training.trainer import MadtpTrainer, last_checkpoint

PROBE_SAMPLES = 64  # of the calibration data, on which MACs are observed while training
GUARD_SAMPLES = 16  # of the calibration data, on which a move of masks or temperatures must not raise the loss
SETTLE_SAMPLES = 2048  # of the calibration data, on which the temperatures settle
TIME_TOLERANCE = 0.01  # of a latency target, within which the temperatures settle
REACH_MARGIN = 1.15  # over the MACs asked for, which the highest temperature may need before training


@dataclass(frozen=True)
class Result:
    """model: the compressed model as loaded from `path`. report: plain values, see `compress`."""

    model: nn.Module
    report: dict
    path: Path


def compress(
    model: nn.Module,
    task: Task,
    train_data: Dataset,
    eval_data: Dataset | None,
    config: CompressionConfig,
    *,
    output_dir: str | Path,
    calibration_data: Dataset | None = None,
    plan: Plan | None = None,
    teacher: nn.Module | None = None,
    training: Mapping | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Compresses a dense model: tokens and weights pruned in one training with distillation.

    eval_data is for the report only: temperatures are steered on calibration_data.

    Args:
        model: a supported Hugging Face model, not patched; it is left as it is.
        task: such as `madtp.tasks.vqa.VqaTask`.
        train_data, eval_data: datasets whose items `task.collate` batches. Without eval_data nothing is measured: the
            report has no "dense" and no "compressed".
        config: targets and knobs.
        output_dir: checkpoints go to output_dir/checkpoints, the model to output_dir/model, which keeps what it holds
            until the new model is whole.
        calibration_data: samples as the model will meet them, on which MACs are observed; None takes train_data.
        plan: of `madtp.allocate`, perhaps edited; its target and choices take the place of those of the config. None
            gives all branches one share of their MACs, and all Linears that can the pattern; with a latency_reduction
            it is chosen here, and kept in output_dir/plan.yaml for `resume`.
        teacher: the dense model whose answers are distilled, of the class of `model`; None: `model`.
        training: `transformers.TrainingArguments` fields, over the defaults here.
        callbacks: of the training, such as `transformers.EarlyStoppingCallback`, for which `training` sets
            eval_strategy and metric_for_best_model; what is evaluated is the loss on all of calibration_data.
        resume: go on from the last checkpoint in output_dir, or start when there is none; otherwise the checkpoints
            there are removed.
        progress: shows training and evaluations; None leaves the training to the Trainer's own bar.

    Returns:
        `Result`; its report compares dense and compressed, both measured here, the latter from the saved files:
        {"metric": `task.metric`, "dense": figures, "compressed": figures, "plan": what was aimed at and chosen,
        "training": what was logged, "config": `config.to_dict()`, "versions": by package}, where figures are those of
        `measure`, ms_per_sample and ms_per_layer.

    Raises:
        ValueError: a target cannot be reached, output_dir cannot be written to, data are empty, or the checkpoint is of
            another config.
        TypeError: the model's class is not supported.
    """
    for name, data in (("train_data", train_data), ("eval_data", eval_data)):
        if data is not None and not len(data):
            raise ValueError(f"{name} must hold samples, got none")
    output_dir = require_writable("output_dir", output_dir)
    args = _training_arguments(output_dir, config, training)
    bars = progress or Progress(Console(quiet=True))
    calibration_data = train_data if calibration_data is None else calibration_data
    set_seed(config.seed)
    student, teacher = copy.deepcopy(model), copy.deepcopy(model if teacher is None else teacher)
    handle = patch(student, config)
    patch(teacher, config)
    student.to(args.device)

    if plan is None and config.latency_reduction is not None:
        plan = _timed_plan(model, task, calibration_data, config, output_dir / "plan.yaml", resume)
    aims = _aims(student, task, calibration_data, config, plan, args.device)
    permutations = _permuted(student, aims.chosen, config)
    norms = _norms(student, aims.chosen, aims.probe, config)
    trainer = MadtpTrainer(
        student,
        teacher,
        task,
        config,
        targets=aims.targets,
        probe=aims.probe,
        sparse_modules=aims.chosen,
        norms=norms,
        guarded=pairs(task, calibration_data, GUARD_SAMPLES, args.device),
        args=args,
        train_dataset=train_data,
        eval_dataset=calibration_data,
        data_collator=task.collate,
        callbacks=list(callbacks),
    )
    checkpoint = last_checkpoint(output_dir / "checkpoints") if resume else None
    if checkpoint is None:  # what an earlier run left would pass for this one's when it is interrupted
        shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
    with progress.training(trainer) if progress else nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)  # what is measured from here on is no autocast
    magnitude = trainer.pruner.finalize()
    handle.collect_alignment(False)
    with bars.status("settling the temperatures"):
        if aims.latency_reduction is None:
            trainer.probe = pairs(task, calibration_data, SETTLE_SAMPLES, args.device)
            dense_macs = profile_batches(student, trainer.probe).total.dense_macs
            miss = trainer.settle((1 - aims.reduction) * dense_macs)
        packed = pack(student, aims.chosen)
        if aims.latency_reduction is not None:
            both = {"dense": copy.deepcopy(model).to(args.device), "compressed": student}
            batch = pairs(task, calibration_data, TIMING_BATCH, args.device)[0]

            def share_of_time() -> float:
                times = time_per_sample(both, batch)
                return times["compressed"] / times["dense"]

            miss = trainer.settle(1 - aims.latency_reduction, TIME_TOLERANCE, share_of_time)
    with atomic_directory(output_dir / "model") as directory:
        student.save_pretrained(directory)
        task.save_processor(directory)

    compressed = from_pretrained(output_dir / "model").to(_device(model))
    figures = {} if eval_data is None else compare(model, compressed, task, eval_data, output_dir / "model", bars)
    reached = {
        "allocation": None if plan is None else plan.to_dict(),
        "flops_reduction": aims.reduction,
        "latency_reduction": aims.latency_reduction,
        "targets_gmacs": {branch: macs / 1e9 for branch, macs in aims.targets.items()},
        "temperatures": handle.temperatures,
        "calibration_miss": miss,
        "sparse_modules": aims.chosen,
        "packed_modules": sorted(packed),
        "dense_modules": aims.dense,
        "magnitude_kept": magnitude,
        "permutations": {name: {"before": p.before, "after": p.after} for name, p in permutations.items()},
    }
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    report = {
        "metric": task.metric,
        **figures,
        "plan": reached,
        "training": history,
        "config": config.to_dict(),
        "versions": versions(),
    }
    return Result(compressed, report, output_dir / "model")


@dataclass(frozen=True)
class Aims:
    """What a run is to do. MACs are per sample, of the calibration data."""

    reduction: float  # of the dense MACs
    latency_reduction: float | None  # of the dense model's time, where that is what is asked for
    chosen: list[str]  # Linears that go N:M
    dense: dict[str, str]  # Linears that do not, and why
    targets: dict[str, float]  # counted MACs of the branches that prune
    before: Profile  # with all tokens, the chosen Linears counted as N:M
    probe: list[dict[str, Tensor]]  # the samples MACs are observed on

    @property
    def counted_macs(self) -> dict[str, float]:
        """By branch, as they are to be in the end."""
        return {b: self.targets.get(b, account.counted_macs) for b, account in self.before.branches.items()}


def predict(
    model: nn.Module,
    task: Task,
    calibration_data: Dataset,
    config: CompressionConfig,
    *,
    plan: Plan | None = None,
) -> Aims:
    """What `compress` would aim at with these arguments; nothing is trained, and the model stays as it is.

    With a latency_reduction and no plan, one is chosen for it.

    Raises:
        as `compress`.
    """
    set_seed(config.seed)
    student = copy.deepcopy(model)
    patch(student, config)
    if plan is None and config.latency_reduction is not None:
        plan = _timed_plan(model, task, calibration_data, config)
    return _aims(student, task, calibration_data, config, plan, _device(model))


def _timed_plan(
    model: nn.Module,
    task: Task,
    data: Dataset,
    config: CompressionConfig,
    path: Path | None = None,
    resume: bool = False,
) -> Plan:
    """The plan for a latency target, which a second measurement would make another: the one at `path` goes on."""
    if resume and path.exists():
        return Plan.load(path)
    plan = allocate(model, task, data, config)
    if path is not None:
        plan.save(path)
    return plan


def _aims(
    student: nn.Module,
    task: Task,
    calibration_data: Dataset,
    config: CompressionConfig,
    plan: Plan | None,
    device: torch.device,
) -> Aims:
    if not len(calibration_data):
        raise ValueError("calibration_data must hold samples, got none")
    handle = student.madtp_handle
    exclude = (*config.sparse_exclude, *handle.family.dense_modules, "madtp_guide")
    linears = select_modules(student, config.pattern, include=config.sparse_include, exclude=exclude)
    chosen, reduction, latency_reduction = linears.selected, config.flops_reduction, None
    if plan is not None:
        plan.require_fit(handle.pruning, linears.selected)
        chosen = list(plan.sparse_modules)
        reduction, latency_reduction = plan.flops_reduction, plan.latency_reduction
    planned = chosen if Pattern.parse(config.pattern).sparse24 else []
    if plan is None:
        _require_params_reduction(student, chosen, config)
    probe = pairs(task, calibration_data, PROBE_SAMPLES, device)
    before = profile_batches(student, probe, planned_sparse=planned)
    if plan is None:
        targets = branch_targets(before, reduction, tuple(handle.pruning))
    else:
        targets = {b: share * before.branches[b].counted_macs for b, share in plan.tokens.items() if share < 1}
    _require_reach(student, probe, planned, before.total.dense_macs, reduction, targets, config)
    return Aims(reduction, latency_reduction, chosen, linears.dense, targets, before, probe)


def versions() -> dict[str, str]:
    return {
        "madtp_kernels": madtp_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _permuted(student: nn.Module, selected: list[str], config: CompressionConfig) -> dict[str, Permutation]:
    """If asked to, reorders the hidden channels of the MLPs whose second Linear goes N:M; what they compute stays."""
    if not config.hwp_permute:
        return {}
    return permute_mlps(student, config.pattern, [pair for pair in mlp_pairs(student) if pair[1] in selected])


def _norms(
    student: nn.Module, selected: list[str], probe: list[dict[str, Tensor]], config: CompressionConfig
) -> dict[str, Tensor] | None:
    """What `WeightPruner` scores by; None: magnitude. With "second_order" weights are pruned and corrected here."""
    if config.hwp_score == "magnitude":
        return None
    handle, second_order = student.madtp_handle, config.hwp_score == "second_order"
    weighted = config.hwp_score == "token_weighted"
    before = handle.temperatures
    if weighted:
        handle.set_temperature(config.temperature)
    with evaluating(student), collect_inputs(student, selected, gram=second_order, token_weighted=weighted) as inputs:
        for batch in probe:
            student(**batch)
    handle.set_temperature(before)
    if second_order:
        prune_one_shot(student, config.pattern, selected, inputs, correct=True)
        return None
    return {name: statistics.norms for name, statistics in inputs.items()}


def _require_params_reduction(model: nn.Module, selected: list[str], config: CompressionConfig) -> None:
    if config.params_reduction is None:
        return
    n, m = Pattern.parse(config.pattern)
    weights = sum(model.get_submodule(name).weight.numel() for name in selected)
    reachable = weights * (1 - n / m) / sum(p.numel() for p in model.parameters())
    if config.params_reduction > reachable:
        raise ValueError(
            f"params_reduction must be at most {reachable:.3f}, the share {config.pattern} zeroes in the "
            f"{len(selected)} modules it may prune, got {config.params_reduction}"
        )


def _require_reach(
    student: nn.Module,
    probe: list[dict[str, Tensor]],
    planned: list[str],
    dense_macs: float,
    reduction: float,
    branches: Iterable[str],
    config: CompressionConfig,
) -> None:
    """Refuses a target far from what the highest temperature reaches: training moves this bound, but not by much."""
    student.madtp_handle.set_temperature(dict.fromkeys(branches, config.temperature_max))
    least = sum(counted_macs(student, probe, planned_sparse=planned).values()) / dense_macs
    student.madtp_handle.set_temperature(0)
    if least > REACH_MARGIN * (1 - reduction):
        raise ValueError(
            f"flops_reduction must be at most about {1 - least:.2f}, which temperature_max {config.temperature_max:g} "
            f"reaches on this model, got {reduction}"
        )


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


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
