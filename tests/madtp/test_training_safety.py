# SPDX-License-Identifier: Apache-2.0
"""Training that goes wrong: what is not finite, a full disk, SIGKILL; and two processes that are as good as one."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
import two_processes
from test_compression import Questions, make_trainer
from transformers import TrainerCallback

from madtp.training.trainer import DivergedError, last_checkpoint

KILLS = 9


@pytest.fixture(scope="module")
def data():
    return Questions(48)


class At(TrainerCallback):
    """Calls a function once, when a step ends."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function()


@pytest.mark.parametrize(("name", "value"), [("task", "nan"), pytest.param("kd", "inf", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_training_and_is_named(tmp_path, data, name, value):
    trainer = make_trainer(tmp_path, data, 8, find_start=False)

    def spoil():
        if name == "task":
            trainer.task.loss = lambda output, batch: output.loss * float(value)
        else:
            trainer.task.logits = lambda output, batch: (output.logits.exp() * float(value), None)

    trainer.add_callback(At(5, spoil))
    with pytest.raises(DivergedError, match="training stopped at step 5, not finite is the loss: ") as stopped:
        trainer.train()
    assert f"{name} is " in str(stopped.value)
    good = last_checkpoint(tmp_path / "checkpoints")
    assert good.name == "checkpoint-4" and f"{good} is the last good checkpoint" in str(stopped.value)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, data):
    trainer = make_trainer(tmp_path, data, 8, find_start=False)
    trainer.add_callback(At(4, lambda: next(trainer.model.parameters()).data.fill_(float("nan"))))
    with pytest.raises(DivergedError, match="at step 4, not finite is the weight: .*; there is no checkpoint yet"):
        trainer.train()
    assert last_checkpoint(tmp_path / "checkpoints") is None


def test_weights_in_shards_are_refused(tmp_path, data):
    with pytest.raises(ValueError, match="fsdp must be off: .*; got True"):
        make_trainer(tmp_path, data, 8, fsdp=True)


def test_a_full_disk_leaves_the_checkpoint_that_was_whole(tmp_path, data, monkeypatch):
    trainer = make_trainer(tmp_path, data, 8, find_start=False)
    save = type(trainer)._save

    def full(self, output_dir=None, state_dict=None):
        if self.state.global_step > 4:
            raise OSError(28, "No space left on device")
        return save(self, output_dir, state_dict)

    monkeypatch.setattr(type(trainer), "_save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-4"
    monkeypatch.undo()
    resumed = make_trainer(tmp_path, data, 8, find_start=False)
    resumed.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "checkpoints")))
    assert resumed.state.global_step == 8


def _train(folder, steps):
    torch.set_num_threads(1)
    trainer = make_trainer(folder, Questions(48), steps, save_steps=2)
    checkpoint = last_checkpoint(folder / "checkpoints")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    torch.save([trainer.model.state_dict(), trainer.controller.state_dict()], folder / "end.pt")


@pytest.mark.slow
def test_a_killed_training_ends_as_if_nobody_had(tmp_path):
    """Killed at some moment behind every second checkpoint, in the midst of one being written too."""
    context, steps, draw = multiprocessing.get_context("spawn"), 100, random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def reached():
        found = last_checkpoint(killed / "checkpoints")
        return 0 if found is None else int(found.name.rpartition("-")[2])

    for _ in range(KILLS):
        before, deadline = reached(), time.monotonic() + 120
        process = context.Process(target=_train, args=(killed, steps))
        process.start()
        while reached() < before + 4 and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL and reached() > before and not (killed / "end.pt").exists()
    for folder in (killed, whole):
        process = context.Process(target=_train, args=(folder, steps))
        process.start()
        process.join(240)
        assert process.exitcode == 0
    (weights, controller), (expected, steered) = (torch.load(folder / "end.pt") for folder in (killed, whole))
    assert controller == steered
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


# Not Adam, which makes steps as large as any of gradients that are nothing but rounding, as those of key biases are.
PLAIN = {"save_strategy": "no", "optim": "sgd", "learning_rate": 0.05}


def _as_one_of_two(rank, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trainer = make_trainer(folder, Questions(48), 6, use_cpu=True, per_device_train_batch_size=4, **PLAIN)
    assert trainer.args.world_size == 2
    trainer.train()
    if rank == 0:
        torch.save([trainer.model.state_dict(), trainer.controller.state_dict()], folder / "end.pt")


@pytest.mark.long
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, data):
    one = make_trainer(tmp_path / "one", data, 6, **PLAIN)
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    one.train()
    (tmp_path / "two").mkdir()
    two_processes.run(_as_one_of_two, tmp_path / "two", 29533, store=str(tmp_path / "store"), seconds=600)
    weights, controller = torch.load(tmp_path / "two" / "end.pt")
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(
            weights[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    moved = [name for name, value in before.items() if not torch.allclose(value, weights[name], rtol=1e-2, atol=1e-4)]
    assert len(moved) > len(before) / 2  # or there was nothing to compare
    assert controller["log_temperature"] == pytest.approx(one.controller.state_dict()["log_temperature"], rel=1e-3)


def test_steps_of_several_processes_are_counted_together(tmp_path, data, monkeypatch):
    trainer = make_trainer(tmp_path, data, -1, num_train_epochs=2, save_strategy="no")
    assert trainer._total_steps() == 12
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
    assert trainer._total_steps() == 6
