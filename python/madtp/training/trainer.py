# SPDX-License-Identifier: Apache-2.0
"""Joint training: task, alignment and distillation losses, while masks go N:M and temperatures move to their target.

Source: docs/method.md, joint training, and cooperative optimisation, steps 4, 5 and 7.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME, ModelOutput

from madtp.config import CompressionConfig
from madtp.files import atomic_write
from madtp.handles import handle_of
from madtp.hwp import FakeQuantizer, Pattern, WeightPruner
from madtp.hwp.adapters import has_adapters
from madtp.inference import evaluating
from madtp.migration import CHECKPOINT_VERSION, migrate_checkpoint, migrate_log
from madtp.profiling.macs import counted_macs
from madtp.search import find_root
from madtp.tasks.batches import sample_count
from madtp.tasks.task import Task
from madtp.training.controller import TemperatureController, settle
from madtp.training.guard import Guard
from madtp.training.losses import JointLoss
from madtp.width import widths_of
from madtp_kernels.bounded_file import ODD_VALUES, one_line, read_json

CONTROLLER_FILE = "madtp_controller.json"
MAC_TOLERANCE = 0.002  # of the MACs asked for, within which the temperatures are calibrated after training


class DivergedError(RuntimeError):
    """Training met a loss or a weight that is not finite; the message says which, and what is left."""


class MadtpTrainer(Trainer):
    """`transformers.Trainer` for a patched model and its dense teacher.

    The loss is L_task + align L_align + vision L_vis + text L_txt + kd T^2 KL (weights of the config), where L_vis and
    L_txt compare the summary tokens after every layer with the teacher's. The temperatures start where `probe` costs
    what it is to cost; every `controller_interval` steps its counted MACs are observed and the temperatures moved.

    Args:
        model: patched (see `madtp.patch`); its forward takes the task's batches.
        teacher: the dense model, patched so that it reports its summary tokens; it prunes nothing. It is frozen.
        task: its loss, and which logits are distilled.
        config: loss weights, mask schedule, controller.
        targets: counted MACs per sample of each pruned branch, such as `branch_targets` gives; of a decoder of each
            seam with a temperature.
        probe: batches without shared images to observe MACs on, where the model is.
        sparse_modules: names of the Linear modules that go N:M.
        norms: of their inputs, for masks by |W| ||x||; None keeps the largest |W|.
        guarded: batches as `probe`, on which `Guard` watches the loss; None takes `probe`.
        args, **kwargs: of `transformers.Trainer`.

    With an `EarlyStoppingCallback`, or load_best_model_at_end, evaluations count from when all masks have their final
    pattern; the best checkpoint brings its temperatures back.

    `train` raises `DivergedError` at the first loss that is not finite; weights that are not are never saved. Resumed
    from the checkpoint of a finished training, it makes no step: the model is what that training left.

    Raises:
        ValueError: args shard the weights (fsdp, deepspeed), or have no max_steps and there is no train_dataset.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        task: Task,
        config: CompressionConfig,
        *,
        targets: dict[str, float],
        probe: list[dict[str, Tensor]],
        sparse_modules: list[str],
        norms: dict[str, torch.Tensor] | None = None,
        guarded: list[dict[str, Tensor]] | None = None,
        args: TrainingArguments,
        **kwargs,
    ):
        for name in ("fsdp", "deepspeed"):
            if getattr(args, name):
                raise ValueError(
                    f"{name} must be off: masks, temperatures and the probe need whole weights, which DDP leaves to "
                    f"every process; got {getattr(args, name)!r}"
                )
        super().__init__(model=model, args=args, **kwargs)
        # The model takes **kwargs, but its loss is a mean whatever they say: accumulated steps are to be averaged.
        self.model_accepts_loss_kwargs = False
        self.task, self.config, self.handle = task, config, handle_of(model)
        self.teacher = teacher.to(args.device).eval().requires_grad_(False)
        self.probe = probe
        self.joint_loss = JointLoss(
            config.align_weight, config.vision_weight, config.text_weight, config.kd_weight, config.kd_temperature
        )
        self.pruner = WeightPruner(
            model,
            config.pattern,
            sparse_modules,
            schedule=config.hwp_schedule,
            total_steps=self._total_steps(),
            refresh_interval=config.hwp_refresh,
            decay=config.hwp_decay,
            ramp=config.hwp_ramp,
            masking=config.hwp_masking,
            norms=norms,
        )
        self.fake_quantizer: FakeQuantizer | None = None
        # Until the masks have their final pattern, MACs are counted as they will be then.
        self.planned_sparse: set[str] = set(sparse_modules) if Pattern.parse(config.pattern).sparse24 else set()
        self.controller = self._controller(targets, config.temperature)
        self.handle.set_temperature(self.controller.temperatures)
        self.handle.collect_alignment(config.align_weight > 0)
        self.observed: dict[str, float] = {}
        self.guarded = probe if guarded is None else guarded
        self._guarded_teaching: list[tuple[Tensor, dict[str, list[Tensor]]]] = []  # what the teacher says of them
        tolerance = config.guard_tolerance
        self.guard = None if tolerance is None else Guard(self.guarded_loss, tolerance)
        self._parts: dict[str, list[Tensor]] = {}
        self.finished = False  # before the first step of what is resumed
        self.add_callback(_Cooperation(self))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self._features_seen():
            output = model(**inputs)
        if isinstance(output, tuple):
            output, _ = output
        loss, parts = self._joint(
            output, inputs, *self._taught(inputs), aligned=self._aligned(inputs.get("image_index"))
        )
        if not torch.isfinite(loss):
            wrong = [f"{name} is {part.item()}" for name, part in parts.items() if not torch.isfinite(part)]
            raise self._diverged(f"loss: {', '.join(wrong) or f'their sum is {loss.item()}'}")
        if model.training:
            for name, part in parts.items():
                self._parts.setdefault(name, []).append(part)
        return (loss, output) if return_outputs else loss

    def guarded_loss(self) -> float:
        """The loss without alignment on the guarded batches, as the model is now; no gradient, eval mode."""
        if not self._guarded_teaching:
            self._guarded_teaching = [self._taught(batch) for batch in self.guarded]
        losses = []
        with evaluating(self.model), self.handle.inference():
            for batch, teaching in zip(self.guarded, self._guarded_teaching, strict=True):
                losses.append(self._joint(self.model(**batch), batch, *teaching)[0])
        return torch.stack(losses).mean().item()

    def _taught(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """What the teacher says of a batch: the logits that are distilled, and its features."""
        handle = handle_of(self.teacher)
        with torch.no_grad(), self.accelerator.autocast(), handle.dense():
            logits, _ = self.task.logits(self.teacher(**inputs), inputs)
            return logits, handle.summary_features

    def _joint(
        self,
        output: ModelOutput,
        inputs: dict[str, Tensor],
        taught_logits: Tensor,
        taught_features: dict[str, list[Tensor]],
        aligned: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts of what the model has just said, beside what the teacher said."""
        inputs = self.handle.as_left(inputs)
        logits, mask = self.task.logits(output, inputs)
        features = self.handle.summary_features
        return self.joint_loss(
            self.task.loss(output, inputs),
            aligned=aligned,
            summary_features={branch: (feature, taught_features[branch]) for branch, feature in features.items()},
            logits=(logits, taught_logits),
            mask=mask,
        )

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the parts of the loss, the temperatures, and what the controller and the guard saw last."""
        if "loss" in logs:
            logs |= {f"loss_{name}": torch.stack(part).mean().item() for name, part in self._parts.items()}
            logs |= {f"tau_{branch}": tau for branch, tau in self.handle.temperatures.items()}
            logs |= {f"macs_{branch}": macs for branch, macs in self.observed.items()}
            if self.guard is not None:
                logs |= {"guard_loss_increase": self.guard.loss_increase, "guard_undone": self.guard.undone}
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def observe(self) -> dict[str, float]:
        """Counted MACs per sample of the probe, per branch, as they will be once the masks are final."""
        with self.handle.inference():
            self.observed = counted_macs(self.model, self.probe, planned_sparse=self.planned_sparse)
        return self.observed

    def find_start(self) -> None:
        """Before the first step: moves the temperatures until the probe costs about what it is to cost in the end, so
        that no step is spent on another number of tokens."""
        targets = self.controller.targets
        settle(self.controller, self._spent, self.handle.set_temperature)
        self.controller = self._controller(targets, self.controller.temperatures)

    def _controller(self, targets: dict[str, float], start: float | dict[str, float]) -> TemperatureController:
        bounds = self.config.temperature_min, self.config.temperature_max
        return TemperatureController(targets, temperature=start, gain=self.config.controller_gain, bounds=bounds)

    def _spent(self) -> dict[str, float]:
        observed = self.observe()
        return {branch: observed[branch] for branch in self.controller.targets}

    def steer(self) -> None:
        """One observation, one move of the temperatures, where there are any."""
        seen = self._spent()
        if not seen:
            return
        self._move(
            lambda: self.handle.set_temperature(self.controller.update(seen)),
            lambda: self.handle.set_temperature(self.controller.halve_step()),
        )

    def sparsify(self, step: int) -> None:
        """Brings the masks up to date before optimiser step `step`.

        Where the pattern goes on, the Linears go in the order of the model; those that the guard holds back are tried
        again with every move of the temperatures.
        """
        self.pruner.refresh(step)
        going = self.pruner.behind(step)
        held_back = len(going) < len(self.pruner.modules)
        if not going or (held_back and step % self.config.controller_interval):
            return
        before = self.pruner.masks(going)

        def halve() -> None:
            middle = math.ceil(len(going) / 2)
            self.pruner.restore({name: before[name] for name in going[middle:]})
            del going[middle:]

        self._move(lambda: self.pruner.advance(going, step), halve)

    def fake_quantize(self, modules: Iterable[str], share: float, dtype: str = "int8") -> None:
        """Before the training: has these Linears compute as with rounded weights in its last steps, a share of all.

        `fake_quantizer.stop()` when it has ended: the weights are as they were, for `pack(dtype=dtype)` to round.

        Raises:
            ValueError: as `FakeQuantizer`.
        """
        steps = self._total_steps()
        self.fake_quantizer = FakeQuantizer(self.model, modules, total_steps=steps, share=share, dtype=dtype)

    def _move(self, make: Callable[[], None], halve: Callable[[], None]) -> None:
        make() if self.guard is None else self.guard.move(make, halve)

    def calibrate(
        self, budget: float, tolerance: float = MAC_TOLERANCE, cost: Callable[[], float] | None = None
    ) -> float:
        """After training: moves all temperatures by one factor until the model costs `budget`.

        Args:
            cost: of the model as it is; None: the counted MACs per sample of the probe.

        Returns:
            the share by which it misses the budget, positive when it costs more.
        """

        def miss(shift: float) -> float:
            self.handle.set_temperature(self.controller.shifted(shift))
            spent = sum(self.observe().values()) if cost is None else cost()
            return spent / budget - 1

        shift, missed = find_root(miss, *self.controller.shifts, tolerance=tolerance)
        self.handle.set_temperature(self.controller.shifted(shift))
        return missed

    def pruning_state(self) -> dict:
        """What a checkpoint holds beside weights and masks; plain values, ready for JSON."""
        return {
            "version": CHECKPOINT_VERSION,
            "config": self.config.to_dict(),
            **self._planned(),
            "controller": self.controller.state_dict(),
            "masks_keep": self.pruner.kept,
            "guard": None if self.guard is None else self.guard.state_dict(),
        }

    def _planned(self) -> dict[str, dict[str, int]]:
        """What a plan made of the model before the training."""
        return {"widths": widths_of(self.handle.model), "first_layers": getattr(self.handle, "first_layers", {})}

    def _save_checkpoint(self, model, trial):
        wrong = next((name for name, p in self.model.named_parameters() if not torch.isfinite(p).all()), None)
        if wrong is not None:
            raise self._diverged(f"weight: {wrong}")
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Of a model with adapters, which no model folder has a place for, the weights alone."""
        if not has_adapters(self.model):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(folder / SAFE_WEIGHTS_NAME), {"format": "pt"})

    def _diverged(self, what: str) -> DivergedError:
        good = last_checkpoint(str(self.args.output_dir))
        kept = f"{good} is the last good checkpoint" if good else "there is no checkpoint yet"
        return DivergedError(f"training stopped at step {self.state.global_step}, not finite is the {what}; {kept}")

    @contextmanager
    def _features_seen(self) -> Iterator[None]:
        """A context in which a model of several processes returns (output, what the loss takes from the handle): DDP
        waits for the gradients of no parameter that it does not see leave the forward."""
        if self.args.world_size == 1:
            yield
            return

        def with_features(module, arguments, output):
            aligned = [feature for feature in self.handle.aligned.values() if feature is not None]
            return output, (*aligned, *itertools.chain(*self.handle.summary_features.values()))

        hook = self.handle.model.register_forward_hook(with_features)
        try:
            yield
        finally:
            hook.remove()

    def _aligned(self, image_index: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The aligned features of vision and text, a row of each per sample; None where they are not collected."""
        aligned = self.handle.aligned
        vision, text = aligned.get("vision"), aligned.get("text")
        if vision is None or text is None:
            return None
        return vision if image_index is None else vision[image_index], text

    def _total_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        if self.train_dataset is None:
            raise ValueError("train_dataset must be given where args say no max_steps, got None")
        batches = math.ceil(sample_count(self.train_dataset) / (self.args.train_batch_size * self.args.world_size))
        return math.ceil(self.args.num_train_epochs * math.ceil(batches / self.args.gradient_accumulation_steps))

    def _run_epoch(self, *arguments, **kwargs):
        if self.finished:  # Hugging Face makes a step before it looks
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*arguments, **kwargs)

    def is_finished(self) -> bool:
        """Whether the checkpoint that a training begins with has nothing left to train."""
        stopped_early = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )
        return self.state.global_step > 0 and (stopped_early or self.state.global_step >= self.state.max_steps)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saved = self._saved_pruning(resume_from_checkpoint)  # weights of another config or plan are not even read
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_pruning(resume_from_checkpoint, saved)

    def _load_best_model(self):
        super()._load_best_model()
        best = str(self.state.best_model_checkpoint)
        self._load_pruning(best, self._saved_pruning(best))

    def _determine_best_metric(self, metrics, trial):
        """While masks are still to grow, or weights to be rounded, no evaluation is the best: less of either is better,
        and not what is asked for."""
        rounds = self.fake_quantizer is None or self.fake_quantizer.active
        return rounds and self.pruner.current == self.pruner.pattern and super()._determine_best_metric(metrics, trial)

    def _saved_pruning(self, checkpoint: str) -> dict[str, Any]:
        """What `pruning_state` wrote. Raises ValueError where it is damaged, or of another config or plan."""
        file = Path(checkpoint) / CONTROLLER_FILE
        try:
            saved = migrate_checkpoint(read_json(file), str(file))
            missing = {"config", "controller", "masks_keep", "guard"} - saved.keys()
            if missing or not isinstance(saved["config"], dict):
                raise ValueError(f"it lacks {', '.join(sorted(missing)) or 'the fields of its config'}")
        except (OSError, *ODD_VALUES) as error:
            raise _no_checkpoint(file, error) from error
        ours = self.config.to_dict()
        changed = sorted(name for name in ours if saved["config"].get(name) != ours[name])
        if changed:
            raise ValueError(f"config must be that of the checkpoint {checkpoint}, got another {', '.join(changed)}")
        for name, value in self._planned().items():  # checkpoints of before have neither
            if saved.get(name, value) != value:
                raise ValueError(f"plan must be that of the checkpoint {checkpoint}, got another {name}: {value}")
        return saved

    def _load_pruning(self, checkpoint: str, saved: dict[str, Any]) -> None:
        """Goes on from what `_saved_pruning` gave of a checkpoint."""
        try:
            self.controller.load_state_dict(saved["controller"])
            self.pruner.kept |= saved["masks_keep"]
            if self.guard is not None:
                self.guard.load_state_dict(saved["guard"])
        except ODD_VALUES as error:
            raise _no_checkpoint(Path(checkpoint) / CONTROLLER_FILE, error) from error
        self.handle.set_temperature(self.controller.temperatures)


class _Cooperation(TrainerCallback):
    """Moves masks and temperatures between optimiser steps."""

    def __init__(self, trainer: MadtpTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.finished = self.trainer.is_finished()
        self._quantize(state.global_step)  # also where no step is left
        if state.global_step == 0:
            self.trainer.find_start()
        state.log_history = migrate_log(state.log_history)

    def on_step_begin(self, args, state, control, **kwargs):
        self._quantize(state.global_step)
        self.trainer.sparsify(state.global_step)

    def _quantize(self, step: int) -> None:
        if self.trainer.fake_quantizer is not None:
            self.trainer.fake_quantizer.step(step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.trainer.config.controller_interval == 0:
            self.trainer.steer()

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        atomic_write(folder / CONTROLLER_FILE, json.dumps(self.trainer.pruning_state()))


def _no_checkpoint(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} must be of a checkpoint of this training ({one_line(error)})")


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a MadtpTrainer that was written to its end: the controller's file is its last."""
    whole = [path.parent for path in Path(folder).glob(f"checkpoint-*/{CONTROLLER_FILE}")]
    whole = [path for path in whole if re.fullmatch(r"checkpoint-\d{1,18}", path.name)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
