# SPDX-License-Identifier: Apache-2.0
"""Training in bfloat16 (autocast): products are rounded, weights, losses and the statistics of pruning are not."""

import math

import pytest
import torch
from test_compression import BRIEF, CONFIG, Questions, Task, make_trainer
from tiny_models import tiny_blip

import madtp
from madtp.training.trainer import MadtpTrainer, last_checkpoint

BF16 = {"bf16": True, "use_cpu": True}


def test_a_tiny_model_trains_and_saves_in_bfloat16(tmp_path):
    trainer = make_trainer(tmp_path, Questions(48), 4, logging_steps=1, save_steps=2, **BF16)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    importances, taught = [], []
    for branch in trainer.handle.pruning.values():
        branch.observer = lambda importance, selection: importances.append(importance)
    linear = trainer.teacher.vision_model.encoder.layers[0].mlp.fc1
    linear.register_forward_hook(lambda module, inputs, output: taught.append(output))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    assert {output.dtype for output in taught} == {torch.bfloat16}, "the teacher answers in the same precision"
    assert importances and {importance.dtype for importance in importances} == {torch.float32}
    assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}
    states = [value for state in trainer.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert {value.dtype for value in states} == {torch.float32}
    after = trainer.model.state_dict()
    assert sum(not torch.equal(value, after[name]) for name, value in before.items()) > len(before) / 2
    assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-4"


@pytest.mark.slow
def test_what_was_trained_in_bfloat16_is_measured_in_float32(tmp_path, monkeypatch):
    data, seen, calibrate = Questions(48), [], MadtpTrainer.calibrate

    def watched(trainer, *arguments):
        linear = trainer.model.text_encoder.encoder.layer[0].attention.self.query
        hook = linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        missed = calibrate(trainer, *arguments)
        hook.remove()
        return missed

    monkeypatch.setattr(MadtpTrainer, "calibrate", watched)
    result = madtp.compress(tiny_blip(), Task(), data, data, CONFIG, output_dir=tmp_path, training=BRIEF | BF16)
    assert set(seen) == {torch.float32}
    assert {value.dtype for value in result.model.parameters()} == {torch.float32}
    assert result.report["plan"]["packed_modules"] == sorted(result.report["plan"]["sparse_modules"])
