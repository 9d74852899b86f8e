# SPDX-License-Identifier: Apache-2.0
"""An early stop waits for the masks, then ends the training; the best checkpoint comes back with its temperatures."""

import dataclasses
import json

import pytest
import torch
from test_compression import BRIEF, CONFIG, Questions, Task, make_trainer, same_bits
from tiny_models import tiny_blip
from transformers import EarlyStoppingCallback

import madtp
from madtp.training.trainer import CONTROLLER_FILE, MadtpTrainer, last_checkpoint

EVALUATE = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}


@pytest.fixture(scope="module")
def data():
    return Questions(48)


def worse_every_time(monkeypatch):
    """The loss of every evaluation is higher than the one before, whatever the model does."""
    losses = iter(range(1, 1000))
    evaluate = MadtpTrainer.evaluation_loop

    def rising(self, *arguments, **kwargs):
        output = evaluate(self, *arguments, **kwargs)
        output.metrics["eval_loss"] = float(next(losses))
        return output

    monkeypatch.setattr(MadtpTrainer, "evaluation_loop", rising)


def test_patience_begins_when_the_masks_are_final(tmp_path, data, monkeypatch):
    worse_every_time(monkeypatch)
    trainer = make_trainer(
        tmp_path, data, 20, save_strategy="no", eval_dataset=Questions(8), find_start=False, **EVALUATE
    )
    trainer.add_callback(EarlyStoppingCallback(2))
    trainer.train()
    # 2:4 from the step after the 10th on: 12 is the first that counts, 14 and 16 are worse.
    assert trainer.state.global_step == 16 and trainer.state.best_metric == 6
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 8


def test_evaluations_are_of_the_loss_and_stay_out_of_what_is_logged(tmp_path, data):
    trainer = make_trainer(tmp_path, data, 2, save_strategy="no", eval_dataset=data)
    loss = trainer.evaluate()["eval_loss"]
    batches = [Task.collate([data[i] for i in range(start, start + 8)]) for start in range(0, 48, 8)]
    with torch.no_grad():
        expected = [trainer.compute_loss(trainer.model.eval(), batch).item() for batch in batches]
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert not trainer._parts


def test_the_best_checkpoint_brings_its_temperatures_back(tmp_path, data, monkeypatch):
    worse_every_time(monkeypatch)
    keep = {"save_steps": 2, "save_total_limit": None, "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, data, 8, eval_dataset=Questions(8), find_start=False, **EVALUATE, **keep)
    trainer.train()
    best = tmp_path / "checkpoints" / "checkpoint-6"
    assert trainer.state.best_model_checkpoint == str(best), "the first with masks of the final pattern"
    saved = json.loads((best / CONTROLLER_FILE).read_text())
    assert trainer.controller.state_dict() == saved["controller"]
    assert trainer.handle.temperatures == trainer.controller.temperatures
    assert trainer.pruner.kept == saved["masks_keep"]


def test_a_training_that_stopped_early_is_not_resumed(tmp_path, data, monkeypatch):
    worse_every_time(monkeypatch)
    one_shot = dataclasses.replace(CONFIG, hwp_schedule="one_shot")

    def train(checkpoint=None):
        options = EVALUATE | {"save_steps": 2, "find_start": False}
        trainer = make_trainer(tmp_path, data, 9, one_shot, eval_dataset=Questions(8), **options)
        trainer.add_callback(EarlyStoppingCallback(1))
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    stopped, folder = train(), tmp_path / "checkpoints"
    assert stopped.state.global_step == 4  # the second evaluation is worse than the first
    resumed = train(str(folder / "checkpoint-4"))
    assert resumed.state.global_step == 4 and last_checkpoint(folder).name == "checkpoint-4"
    assert same_bits(resumed.model, stopped.model)


@pytest.mark.slow
def test_compress_stops_early_and_finishes_the_model(tmp_path, data, monkeypatch):
    worse_every_time(monkeypatch)
    training = BRIEF | {"max_steps": 40} | EVALUATE
    early = [EarlyStoppingCallback(1)]
    result = madtp.compress(
        tiny_blip(), Task(), data, data, CONFIG, output_dir=tmp_path, training=training, callbacks=early
    )
    compressed, plan = result.report["compressed"], result.report["plan"]
    assert compressed["counted_gmacs"] == pytest.approx(0.45 * compressed["dense_gmacs"], rel=0.03)
    assert plan["packed_modules"] == sorted(plan["sparse_modules"])
