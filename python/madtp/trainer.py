"""Joint training: task, alignment and distillation losses, while masks go N:M and temperatures move to their target."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from madtp.accounting import counted_macs
from madtp.config import CompressionConfig
from madtp.controller import TemperatureController, find_root
from madtp.distill import JointLoss
from madtp.files import write_whole
from madtp.hwp import Pattern, WeightPruner
from madtp.tasks.task import Task

CONTROLLER_FILE = "madtp_controller.json"


class DivergedError(RuntimeError):
    """Training met a loss or a weight that is not finite; the message says which, and what is left."""


class MadtpTrainer(Trainer):
    """`transformers.Trainer` for a patched model and its dense teacher.

    The loss is L_task + align L_align + vision L_vis + text L_txt + kd T^2 KL (weights of the config), where L_vis and
    L_txt compare the summary tokens after every layer with the teacher's. Every `controller_interval` steps the counted
    MACs of `probe` are observed and the temperatures moved.

    Args:
        model: patched (see `madtp.patch`); its forward takes the task's batches.
        teacher: the dense model, patched at temperature 0 so that it reports its summary tokens. It is frozen.
        task: its loss, and which logits are distilled.
        config: loss weights, mask schedule, controller.
        targets: counted MACs per sample of each pruned branch, such as `branch_targets` gives.
        probe: batches without shared images to observe MACs on, where the model is.
        sparse_modules: names of the Linear modules that go N:M.
        norms: of their inputs, for masks by |W| ||x||; None keeps the largest |W|.
        args, **kwargs: of `transformers.Trainer`.

    `train` raises `DivergedError` at the first loss that is not finite; weights that are not are never saved.
    """

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
        args: TrainingArguments,
        **kwargs,
    ):
        super().__init__(model=model, args=args, **kwargs)
        # The model takes **kwargs, but its loss is a mean whatever they say: accumulated steps are to be averaged.
        self.model_accepts_loss_kwargs = False
        self.task, self.config, self.handle = task, config, model.madtp_handle
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
            norms=norms,
        )
        # Until the masks have their final pattern, MACs are counted as they will be then.
        self.planned_sparse = set(sparse_modules) if Pattern.parse(config.pattern).sparse24 else set()
        self.controller = TemperatureController(
            targets,
            temperature=config.temperature,
            gain=config.controller_gain,
            bounds=(config.temperature_min, config.temperature_max),
        )
        self.handle.set_temperature(self.controller.temperatures)
        self.handle.collect_alignment(config.align_weight > 0)
        self.observed: dict[str, float] = {}
        self._parts: dict[str, list[Tensor]] = {}
        self.add_callback(_Cooperation(self))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self._features_seen():
            output = model(**inputs)
        if isinstance(output, tuple):
            output, _ = output
        with torch.no_grad():
            taught = self.teacher(**inputs)
        summaries = self.handle.summaries, self.teacher.madtp_handle.summaries
        logits, mask = self.task.logits(output, inputs)
        loss, parts = self.joint_loss(
            self.task.loss(output, inputs),
            aligned=self._aligned(inputs.get("image_index")),
            summaries={branch: (summaries[0][branch], summaries[1][branch]) for branch in summaries[0]},
            logits=(logits, self.task.logits(taught, inputs)[0]),
            mask=mask,
        )
        if not torch.isfinite(loss):
            wrong = [f"{name} is {part.item()}" for name, part in parts.items() if not torch.isfinite(part)]
            raise self._diverged(f"loss: {', '.join(wrong) or f'their sum is {loss.item()}'}")
        for name, part in parts.items():
            self._parts.setdefault(name, []).append(part)
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the parts of the loss, the temperatures and what the controller saw last."""
        if "loss" in logs:
            logs |= {f"loss_{name}": torch.stack(part).mean().item() for name, part in self._parts.items()}
            logs |= {f"tau_{branch}": tau for branch, tau in self.handle.temperatures.items()}
            logs |= {f"macs_{branch}": macs for branch, macs in self.observed.items()}
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def observe(self) -> dict[str, float]:
        """Counted MACs per sample of the probe, per branch, as they will be once the masks are final."""
        with self.handle.inference():
            self.observed = counted_macs(self.model, self.probe, planned_sparse=self.planned_sparse)
        return self.observed

    def steer(self) -> None:
        """One observation, one move of the temperatures."""
        observed = self.observe()
        self.handle.set_temperature(self.controller.update({b: observed[b] for b in self.controller.targets}))

    def settle(self, budget: float, tolerance: float = 0.002) -> float:
        """After training: moves all temperatures by one factor until the probe costs `budget` counted MACs per sample.

        Returns:
            the share by which it misses the budget, positive when it costs more.
        """

        def miss(shift: float) -> float:
            self.handle.set_temperature(self.controller.shifted(shift))
            return sum(self.observe().values()) / budget - 1

        shift, missed = find_root(miss, *self.controller.shifts, tolerance=tolerance)
        self.handle.set_temperature(self.controller.shifted(shift))
        return missed

    def _save_checkpoint(self, model, trial):
        wrong = next((name for name, p in self.model.named_parameters() if not torch.isfinite(p).all()), None)
        if wrong is not None:
            raise self._diverged(f"weight: {wrong}")
        super()._save_checkpoint(model, trial)

    def _diverged(self, what: str) -> DivergedError:
        good = last_checkpoint(self.args.output_dir)
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
            return output, (*aligned, *itertools.chain(*self.handle.summaries.values()))

        hook = self.handle.model.register_forward_hook(with_features)
        try:
            yield
        finally:
            hook.remove()

    def _aligned(self, image_index: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The aligned features of vision and text, a row of each per sample; None where they are not collected."""
        aligned = self.handle.aligned
        if not {"vision", "text"} <= aligned.keys() or aligned["vision"] is None:
            return None
        vision = aligned["vision"] if image_index is None else aligned["vision"][image_index]
        return vision, aligned["text"]

    def _total_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        batches = math.ceil(len(self.train_dataset) / (self.args.train_batch_size * self.args.world_size))
        return math.ceil(self.args.num_train_epochs * math.ceil(batches / self.args.gradient_accumulation_steps))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = json.loads((Path(resume_from_checkpoint) / CONTROLLER_FILE).read_text())
        ours = self.config.to_dict()
        changed = sorted(name for name in ours if saved["config"].get(name) != ours[name])
        if changed:
            raise ValueError(
                f"config must be that of the checkpoint {resume_from_checkpoint}, got another {', '.join(changed)}"
            )
        self.controller.load_state_dict(saved["controller"])
        self.handle.set_temperature(self.controller.temperatures)


class _Cooperation(TrainerCallback):
    """Moves masks and temperatures between optimiser steps."""

    def __init__(self, trainer: MadtpTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.pruner.step(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.trainer.config.controller_interval == 0:
            self.trainer.steer()

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        state = {"config": self.trainer.config.to_dict(), "controller": self.trainer.controller.state_dict()}
        write_whole(folder / CONTROLLER_FILE, json.dumps(state))


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a MadtpTrainer that was written to its end: the controller's file is its last."""
    whole = [path.parent for path in Path(folder).glob(f"checkpoint-*/{CONTROLLER_FILE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
