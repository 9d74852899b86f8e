# SPDX-License-Identifier: Apache-2.0
"""compress(): one run from a dense model to a compressed one, step by step."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from madtp.budgets.plan import Plan
from madtp.budgets.prunable import linear_of, prunable_linears
from madtp.budgets.smoothing import smooth_model
from madtp.choices import CORRECTIONS
from madtp.compression.reconstruction import Reconstruction, reconstruct_blocks
from madtp.compression.report import report_data
from madtp.compression.targets import Targets, check_kind, choose_targets, latency_plan, settled
from madtp.config import CompressionConfig
from madtp.files import atomic_directory, require_writable
from madtp.handles import handle_of
from madtp.hwp import InputStatistics, Permutation, Smoothing, mlp_pairs, pack, permute_mlps, prune_one_shot
from madtp.hwp.adapters import Adapters, require_peft
from madtp.hwp.modules import matches
from madtp.hwp.packing import refuse_quantized
from madtp.hwp.weight_grid import set_scale
from madtp.models.vlm_branches import branches_of
from madtp.patching.handle import patch
from madtp.patching.pretrained import from_pretrained
from madtp.patching.saving import files_of_user
from madtp.profiling.figures import compare
from madtp.profiling.inputs import input_statistics, require_reached
from madtp.profiling.macs import profile_batches
from madtp.profiling.timing import TIMING_BATCH, time_per_sample
from madtp.progress import Progress
from madtp.tasks.batches import require_samples, sample_batches
from madtp.tasks.task import Task
from madtp.training.trainer import MadtpTrainer, last_checkpoint

GUARD_SAMPLES = 16  # of the calibration data, on which a move of masks or temperatures must not raise the loss
TEMPERATURE_SAMPLES = 2048  # of the calibration data, on which the temperatures are calibrated for a MAC target
RECONSTRUCTION_SAMPLES = (
    256  # of the calibration data, on which pruned weights are fitted to the dense ones: blocks, and by ADMM
)
FAKE_QUANTIZED_SHARE = 0.2  # of the training, at its end, in which a model whose weights are rounded computes so
TIME_TOLERANCE = 0.01  # of a latency target, within which they are calibrated


@dataclass(frozen=True)
class Result:
    """model: the compressed model as loaded from `path`. report: plain values, see `compress`."""

    model: PreTrainedModel
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
            gives all branches one share of their MACs, and all Linears that can the pattern and the weight_dtype; with
            a latency_reduction it is chosen here, and kept in output_dir/plan.yaml for `resume`.
        teacher: the dense model whose answers are distilled, of the class of `model`; None: `model`.
        training: `transformers.TrainingArguments` fields, over the defaults here. {"max_steps": 0} trains nothing: the
            model is saved as one shot leaves it.
        callbacks: of the training, such as `transformers.EarlyStoppingCallback`, for which `training` sets
            eval_strategy and metric_for_best_model; what is evaluated is the loss on all of calibration_data.
        resume: go on from the last checkpoint in output_dir, or start when there is none; that of a finished training
            is only loaded. Otherwise the checkpoints there are removed.
        progress: shows training and evaluations; None leaves the training to the Trainer's own bar.

    Returns:
        `Result`; its report compares dense and compressed, both measured here, the latter from the saved files:
        {"metric": `task.metric`, "dense": figures, "compressed": figures, "plan": what was aimed at and chosen,
        "training": what was logged, "config": `config.to_dict()`, "versions": by package}, where figures are those of
        `measure`, ms_per_sample and ms_per_layer.

    Raises:
        ValueError: a target cannot be reached, output_dir cannot be written to, data are empty or do not reach a
            Linear, the model has int8 or fp8 weights, which do not train, the selection is a function, which no file
            holds, or the checkpoint is of another config.
        TypeError: the model's class is not supported.
    """
    require_samples(train_data=train_data, eval_data=eval_data)
    refuse_quantized(model)
    check_kind(model, config, plan)
    if config.lora_rank is not None:
        require_peft()
    config.to_dict()  # which every file of the run has
    if plan is not None and plan.weight_dtype is not None:
        config = replace(config, weight_dtype=plan.weight_dtype)
    output_dir = require_writable("output_dir", output_dir)
    args = _training_arguments(output_dir, config, training)
    if args.max_steps == 0 and config.hwp_schedule != "one_shot":
        raise ValueError(f'max_steps must be at least 1 with hwp_schedule "{config.hwp_schedule}", got 0')
    bars = progress or Progress(Console(quiet=True))
    calibration_data = train_data if calibration_data is None else calibration_data

    set_seed(config.seed)
    student, teacher = _prepare(model, model if teacher is None else teacher, config, args.device)
    if plan is None and config.latency_reduction is not None:
        plan = latency_plan(model, task, calibration_data, config, output_dir / "plan.yaml", resume)
    targets = choose_targets(student, task, calibration_data, config, plan, args.device)
    permutations = _permute(student, targets.chosen, config)
    smoothings = _smooth(student, targets, config)
    fitted: dict[str, Reconstruction] = {}
    if config.hwp_score in CORRECTIONS:
        goes_on = resume and args.max_steps != 0
        resumed = goes_on and last_checkpoint(output_dir / "checkpoints") is not None  # which has the weights
        fits = config.hwp_reconstruction_steps is not None and not resumed
        more = fits or config.hwp_score == "admm"  # which gains from more samples than the sweep
        samples = sample_batches(task, calibration_data, RECONSTRUCTION_SAMPLES, args.device) if more else []
        with bars.status("fitting pruned weights to the dense model") if more else nullcontext():
            fitted = _prune_in_one_shot(student, targets, config, samples, fits)
    norms = _score_norms(student, targets, config)
    adapters = _adapt(student, targets, config)
    trainer = MadtpTrainer(
        student,
        teacher,
        task,
        config,
        targets=targets.branch_macs,
        probe=targets.probe,
        sparse_modules=targets.chosen,
        norms=norms,
        guarded=sample_batches(task, calibration_data, GUARD_SAMPLES, args.device),
        args=args,
        train_dataset=train_data,
        eval_dataset=calibration_data,
        data_collator=task.collate,
        callbacks=list(callbacks),
    )
    if targets.weight_dtype is not None and targets.quantized:
        trainer.fake_quantize(targets.quantized, FAKE_QUANTIZED_SHARE, targets.weight_dtype)
    _train(trainer, output_dir / "checkpoints", resume, progress)
    if adapters is not None:
        adapters.merge()
    magnitude_kept = _finish_training(trainer, targets.quantized)
    with bars.status("calibrating the temperatures"):
        packed, miss = _pack_and_calibrate(trainer, model, calibration_data, targets)
    _save(student, task, output_dir / "model")

    compressed = from_pretrained(output_dir / "model")
    compressed.to(next(model.parameters()).device)  # type: ignore[arg-type]  # transformers types it as unbound
    figures = {} if eval_data is None else compare(model, compressed, task, eval_data, output_dir / "model", bars)
    report = report_data(
        trainer,
        targets,
        plan,
        figures,
        calibration_miss=miss,
        packed=packed,
        magnitude_kept=magnitude_kept,
        permutations=permutations,
        smoothings=smoothings,
        reconstructions=fitted,
    )
    return Result(compressed, report, output_dir / "model")


def _prepare(
    model: nn.Module, teacher: nn.Module, config: CompressionConfig, device: torch.device
) -> tuple[nn.Module, nn.Module]:
    """Patched copies of the two; the student's is where it trains."""
    student, teacher = copy.deepcopy(model), copy.deepcopy(teacher)
    patch(student, config)
    patch(teacher, config)
    return student.to(device), teacher


def _permute(student: nn.Module, selected: list[str], config: CompressionConfig) -> dict[str, Permutation]:
    """If asked to, reorders the hidden channels of the MLPs whose second Linear goes N:M; what they compute stays."""
    if not config.hwp_permute:
        return {}
    return permute_mlps(student, config.pattern, [pair for pair in mlp_pairs(student) if pair[1] in selected])


def _smooth(student: nn.Module, targets: Targets, config: CompressionConfig) -> dict[str, Smoothing]:
    """If asked to, moves outliers of what rounded layers meet into their weights; what the model computes stays."""
    if config.hwp_smoothing is None:
        return {}
    return smooth_model(student, targets.quantized, targets.probe, config.hwp_smoothing)


def _score_norms(student: nn.Module, targets: Targets, config: CompressionConfig) -> dict[str, Tensor] | None:
    """What `WeightPruner` scores by; None: magnitude, as after one shot, which has left nothing else."""
    if config.hwp_score in ("magnitude", *CORRECTIONS):
        return None
    handle, weighted = handle_of(student), config.hwp_score == "token_weighted"
    before = handle.temperatures
    if weighted:
        handle.set_temperature(config.temperature)
    inputs = input_statistics(student, targets.chosen, targets.probe, gram=False, token_weighted=weighted)
    handle.set_temperature(before)
    require_reached(inputs)
    return {name: statistics.norms for name, statistics in inputs.items()}


def _prune_in_one_shot(
    student: nn.Module,
    targets: Targets,
    config: CompressionConfig,
    samples: Sequence[Mapping[str, Tensor]],
    fits: bool,
) -> dict[str, Reconstruction]:
    """Prunes and corrects the chosen weights, fits them to the dense outputs on the samples if it is asked to, and
    rounds those that are to be rounded. Returns what the fit came to."""
    chosen, rounded = targets.chosen, targets.quantized
    both, unpruned = [[name for name in rounded if (name in chosen) == sparse] for sparse in (True, False)]
    dense = copy.deepcopy(student) if fits else None
    met = samples if config.hwp_score == "admm" else targets.probe

    def inputs(names: Iterable[str]) -> dict[str, InputStatistics]:
        found = input_statistics(student, list(dict.fromkeys(names)), met, gram=True, token_weighted=False)
        require_reached(found)
        return found

    known, fitted = inputs([*chosen, *rounded]), dict[str, Reconstruction]()
    pruned = [name for name in chosen if dense is not None or name not in rounded]
    prune_one_shot(student, config.pattern, pruned, known, correct=config.hwp_score)
    if dense is not None:
        assert config.hwp_reconstruction_steps is not None, "it is asked to fit"
        with settled(student, targets, config):
            fitted = reconstruct_blocks(student, dense, chosen, samples, steps=config.hwp_reconstruction_steps)
        known = inputs(rounded) if rounded else {}
    if rounded:
        dtype = targets.weight_dtype
        prune_one_shot(student, config.pattern, both, known, correct=config.hwp_score, weight_dtype=dtype)
        prune_one_shot(student, None, unpruned, known, correct=config.hwp_score, weight_dtype=dtype)
    return fitted


def _adapt(student: nn.Module, targets: Targets, config: CompressionConfig) -> Adapters | None:
    """If asked to, puts LoRA on the Linears of a decoder that keep all their weights, and freezes its others."""
    if config.lora_rank is None:
        return None
    everywhere = replace(config, sparse_include=("*",), sparse_exclude=())
    decoder, linears = branches_of(student)["decoder"], prunable_linears(student, everywhere)
    names = [name for name in linears.selected if matches(name, decoder) and name not in targets.chosen]
    if not names:
        raise ValueError(
            f"lora_rank must be None where all Linears of the decoder go {config.pattern}, which adapters cannot be "
            f"merged into: sparse_exclude leaves some out, got {config.lora_rank}"
        )
    adapters = Adapters(student, decoder, names, config.lora_rank)
    for name in targets.chosen:
        linear_of(student, name).requires_grad_(True)
    return adapters


def _train(trainer: MadtpTrainer, checkpoints: Path, resume: bool, progress: Progress | None) -> None:
    checkpoint = last_checkpoint(checkpoints) if resume else None
    if checkpoint is None:  # what an earlier run left would pass for this one's when it is interrupted
        shutil.rmtree(checkpoints, ignore_errors=True)
    if trainer.args.max_steps == 0:  # which transformers takes for all epochs
        trainer.find_start()
        return
    with progress.training(trainer) if progress else nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _finish_training(trainer: MadtpTrainer, quantized: Iterable[str]) -> float:
    """Bakes the masks in, ends autocast and fake quantisation; returns the share of the magnitude that masks keep."""
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if trainer.fake_quantizer is not None:
        trainer.fake_quantizer.stop()
    for name in quantized if trainer.state.global_step else ():  # weights that moved have left the grid of one shot
        set_scale(linear_of(trainer.model, name), None)
    magnitude_kept = trainer.pruner.finalize()
    trainer.handle.collect_alignment(False)
    return magnitude_kept


def _pack_and_calibrate(
    trainer: MadtpTrainer, dense: nn.Module, calibration_data: Dataset, targets: Targets
) -> tuple[list[str], float]:
    """Moves the temperatures until the model costs what it is to cost: MACs before it is packed, time after.

    With rounded weights MACs are counted after it: rounding moves what decides which tokens stay.

    Returns:
        the Linears that were packed, and the share by which the target is missed.
    """
    student, task, device = trainer.model, trainer.task, trainer.args.device
    if targets.latency_reduction is None:
        trainer.probe = sample_batches(task, calibration_data, TEMPERATURE_SAMPLES, device)
        whole = _whole(dense, trainer) if targets.widths else student
        budget = (1 - targets.macs_reduction) * profile_batches(whole, trainer.probe).total.dense_macs
        if not targets.quantized:
            miss = trainer.calibrate(budget)
            return _pack(student, targets), miss
        return _pack(student, targets), trainer.calibrate(budget)
    packed = _pack(student, targets)
    both = {"dense": copy.deepcopy(dense).to(device), "compressed": student}
    batch = sample_batches(task, calibration_data, TIMING_BATCH, device)[0]

    def share_of_time() -> float:
        times = time_per_sample(both, batch)
        return times["compressed"] / times["dense"]

    return packed, trainer.calibrate(1 - targets.latency_reduction, TIME_TOLERANCE, share_of_time)


def _whole(dense: nn.Module, trainer: MadtpTrainer) -> nn.Module:
    """The model before heads and channels were removed, patched to be counted without padding."""
    whole = copy.deepcopy(dense).to(trainer.args.device)
    patch(whole, trainer.config)
    return whole


def _pack(student: nn.Module, targets: Targets) -> list[str]:
    """Packs what is rounded, then what is 2:4 in its own dtype; returns the names."""
    rounded = list(pack(student, targets.quantized, dtype=targets.weight_dtype)) if targets.quantized else []
    return [*rounded, *pack(student, targets.chosen)]


def _save(student: nn.Module, task: Task, path: Path) -> None:
    with atomic_directory(path, files_of_user) as directory:
        cast(PreTrainedModel, student).save_pretrained(directory)
        task.save_processor(directory)


def _training_arguments(output_dir: Path, config: CompressionConfig, training: Mapping | None) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir / "checkpoints"),
        "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.01,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,  # an early stop goes on counting
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "report_to": [],
        "seed": config.seed,
    }
    return TrainingArguments(**defaults | dict(training or {}))
