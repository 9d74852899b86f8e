# SPDX-License-Identifier: Apache-2.0
"""The guard: what makes the loss jump is undone and made smaller; a run without jumps is as one without a guard."""

import dataclasses
import math

import pytest
import torch
from test_compression import CONFIG, Questions, make_trainer
from transformers import TrainerCallback

from madtp.training.guard import Guard
from madtp.training.trainer import last_checkpoint


@pytest.fixture(scope="module")
def data():
    return Questions(48)


class Point:
    """A number that a move raises by 8; the loss is the number."""

    def __init__(self):
        self.x, self.step = 1.0, 0.0

    def make(self):
        self.step = 8.0
        self.x += self.step

    def halve(self):
        self.step /= 2
        self.x -= self.step


@pytest.mark.parametrize(("tolerance", "part"), [(9, 1.0), (5, 0.5), (2.5, 0.25), (0.1, 0.125)])
def test_a_move_is_halved_until_the_loss_bears_it(tolerance, part):
    point = Point()
    guard = Guard(lambda: point.x, tolerance)
    assert guard.move(point.make, point.halve) == part and point.x == 1 + 8 * part
    assert 2**-guard.undone == part
    again = Guard(lambda: 0.0, 1.0)
    again.load_state_dict(guard.state_dict())
    assert (again.undone, again.loss_increase) == (guard.undone, guard.loss_increase)


def test_a_loss_that_is_not_a_number_is_a_jump():
    point = Point()
    guard = Guard(lambda: point.x if point.x < 4 else math.nan, 9)
    assert guard.move(point.make, point.halve) == 0.25


def test_the_guarded_loss_is_that_of_the_training_without_alignment(tmp_path, data):
    trainer = make_trainer(tmp_path, data, 2)
    batch = trainer.probe[0]
    trainer.compute_loss(trainer.model.train(), batch)
    parts = {name: values[-1] for name, values in trainer._parts.items()}
    weights = {"task": 1.0, "vision": 1.0, "text": 10.0, "kd": 1.0}
    expected = sum(weight * parts[name] for name, weight in weights.items())
    assert trainer.guarded_loss() == pytest.approx(expected.item(), rel=1e-5)
    assert len(trainer._parts["task"]) == 1 and trainer.handle.pruning["vision"].align


def test_a_bad_move_of_the_temperatures_is_undone(tmp_path, data):
    trainer = make_trainer(tmp_path, data, 2)
    trainer.guard.tolerance = 1e-3
    before = trainer.handle.temperatures
    trainer.controller.max_step = trainer.controller.gain = 6.0
    trainer.controller.targets = {branch: macs / 1000 for branch, macs in trainer.controller.targets.items()}
    trainer.controller._gain = dict.fromkeys(before, 6.0)
    trainer.steer()
    assert trainer.guard.undone == 3 and trainer.guard.loss_increase > 1e-3
    for branch, tau in trainer.handle.temperatures.items():
        assert math.log(tau / before[branch]) == pytest.approx(6 / 8)
    assert trainer.handle.temperatures == trainer.controller.temperatures


def test_masks_that_hurt_go_in_parts(tmp_path, data):
    names = [f"vision_model.encoder.layers.{layer}.mlp.fc{number}" for layer in (0, 1) for number in (1, 2)]
    trainer = make_trainer(tmp_path, data, 8, sparse_modules=names)
    trainer.guard.tolerance = 1e-6
    trainer.sparsify(0)
    assert set(trainer.pruner.kept.values()) == {4} and trainer.guard.undone == 0
    masks = {name: trainer.model.get_submodule(name).parametrizations.weight[0].mask for name in names}
    trainer.sparsify(4)  # where the schedule has all of them at 2:4
    assert list(trainer.pruner.kept.values()) == [2, 4, 4, 4] and str(trainer.pruner.current) == "4:4"
    assert [mask.float().mean().item() for mask in masks.values()] == [0.5, 1, 1, 1]
    trainer.sparsify(5)  # between two moves of the temperatures nothing is tried again
    assert list(trainer.pruner.kept.values()) == [2, 4, 4, 4]
    trainer.guard.tolerance = 1e6
    trainer.sparsify(6)
    assert set(trainer.pruner.kept.values()) == {2} and trainer.pruner.behind(6) == []
    assert all(mask.float().mean() == 0.5 for mask in masks.values())


def with_tolerance(tolerance, folder, data, **options):
    return make_trainer(folder, data, 8, dataclasses.replace(CONFIG, guard_tolerance=tolerance), **options)


def state_of(trainer):
    return trainer.model.state_dict(), trainer.controller.state_dict()


def assert_same(one, other):
    (weights, controller), (expected, steered) = state_of(one), state_of(other)
    assert controller == steered
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def test_a_run_without_jumps_is_as_one_without_a_guard(tmp_path, data):
    guarded, free = (
        with_tolerance(tolerance, tmp_path, data, logging_steps=4, save_strategy="no") for tolerance in (9, None)
    )
    for trainer in (guarded, free):
        trainer.find_start = lambda: None  # the temperatures have a way to go, so that every move is seen in the loss
        trainer.train()
    assert guarded.guard.undone == 0 and free.guard is None
    assert_same(guarded, free)
    logged = [entry for entry in guarded.state.log_history if "loss" in entry]
    assert all(entry["guard_undone"] == 0 and entry["guard_loss_increase"] != 0 for entry in logged)
    assert not any("guard_loss_increase" in entry for entry in free.state.log_history)


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_what_the_guard_held_back_is_resumed(tmp_path, data):
    names = [f"vision_model.encoder.layers.{layer}.mlp.fc{number}" for layer in (0, 1) for number in (1, 2)]
    whole = with_tolerance(1e-6, tmp_path / "whole", data, sparse_modules=names)
    whole.train()
    assert whole.guard.undone > 0
    stopped = with_tolerance(1e-6, tmp_path / "stopped", data, sparse_modules=names)
    stopped.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    checkpoint = last_checkpoint(tmp_path / "stopped" / "checkpoints")
    resumed = with_tolerance(1e-6, tmp_path / "stopped", data, sparse_modules=names)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(resumed, whole)
    assert resumed.pruner.kept == whole.pruner.kept
    assert resumed.guard.state_dict() == whole.guard.state_dict()
