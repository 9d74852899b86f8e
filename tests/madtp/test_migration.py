# SPDX-License-Identifier: Apache-2.0
"""Files that version 0.1 wrote, and old names in what is written by hand."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from test_compression import Questions, make_trainer

import madtp
from madtp.budgets.plan import Plan
from madtp.migration import CHECKPOINT_VERSION, PLAN_VERSION, migrate_checkpoint, migrate_config
from madtp.training.controller import branch_targets
from madtp.training.losses import JointLoss
from madtp.training.trainer import CONTROLLER_FILE

OLD = Path(__file__).parents[1] / "fixtures" / "v0.1"


def one_layer_blip(seed=0):
    """The model of the checkpoint, as it was before its training."""
    torch.manual_seed(seed)
    model = hf.BlipForQuestionAnswering(hf.BlipConfig.from_pretrained(OLD / "checkpoint-2"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def test_a_training_of_0_1_goes_on_to_where_it_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("test_compression.tiny_blip", one_layer_blip)
    config = madtp.CompressionConfig(
        macs_reduction=0.55, alignment_tokens=4, alignment_dim=16, controller_interval=2, hwp_schedule="gradual"
    )
    trainer = make_trainer(tmp_path, Questions(16), 4, config, save_steps=2, optim="sgd", logging_steps=1)
    trainer.train(resume_from_checkpoint=str(OLD / "checkpoint-2"))
    assert trainer.state.global_step == 4
    ended = json.loads((OLD / "checkpoint_end.json").read_text())
    for name, values in ended["controller"].items():
        assert trainer.controller.state_dict()[name] == pytest.approx(values, rel=1e-6), name
    assert trainer.handle.temperatures == pytest.approx(ended["temperatures"])
    weights = trainer.model.state_dict()
    for name, value in load_file(OLD / "checkpoint_end.safetensors").items():
        torch.testing.assert_close(weights[name], value, msg=lambda text, name=name: f"{name}: {text}")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4]
    assert all("guard_loss_increase" in entry and "guard_rise" not in entry for entry in logged)
    saved = json.loads((tmp_path / "checkpoints" / "checkpoint-4" / CONTROLLER_FILE).read_text())
    assert saved["version"] == CHECKPOINT_VERSION and saved["config"] == config.to_dict()
    assert set(saved["guard"]) == {"undone", "loss_increase"}


def test_a_config_of_0_1_has_the_names_of_today():
    values = json.loads((OLD / "checkpoint-2" / CONTROLLER_FILE).read_text())["config"]
    config = madtp.CompressionConfig.from_dict(migrate_config(values))
    assert config.macs_reduction == 0.55 and config.latency_reduction is None
    assert migrate_config(config.to_dict()) == config.to_dict()


def test_a_checkpoint_without_a_guard_has_none_after():
    assert migrate_checkpoint({"config": {"flops_reduction": 0.5}, "guard": None}, "checkpoint") == {
        "config": {"macs_reduction": 0.5},
        "guard": None,
    }


@pytest.mark.parametrize(("name", "latency"), [("plan", None), ("plan_latency", 0.4)])
def test_a_plan_of_0_1_is_read_and_written_as_one_of_today(tmp_path, name, latency):
    plan = Plan.load(OLD / f"{name}.yaml")
    assert plan.macs_reduction == 0.55 and plan.latency_reduction == latency
    assert plan.tokens == {"vision": 0.6, "text": 1.0} and plan.predicted["distill_loss"] == 0.25
    assert "rise" not in plan.predicted and plan.compared["joint"] == 0.3
    plan.save(tmp_path / "plan.yaml")
    assert f"version: {PLAN_VERSION}\nmacs_reduction: 0.55\n" in (tmp_path / "plan.yaml").read_text()
    assert Plan.load(tmp_path / "plan.yaml") == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 6\nmacs_reduction: 0.5", "must be of version 5, got 6: install a newer madtp"),
        ("version: two\nmacs_reduction: 0.5", "must be of version 5, got 'two'"),
        ("macs_reduction: 0.5\nflops_reduction: 0.4", "flops_reduction and macs_reduction are the same, and both are"),
        ("version: 2\nflops_reduction: 0.5", "flops_reduction is now called macs_reduction"),
        ("version: 3\nmacs_reduction: 0.5\nflops_reduction: 0.5", "flops_reduction is now called macs_reduction"),
        ("version: 4\nmacs_reduction: 0.5\nint8_errors: {fc1: 0.1}", "int8_errors is now called rounding_errors"),
        ("version: 2\nmacs_reduction: 0.5\npredicted: {rise: 1.0}", "predicted: rise is now called distill_loss"),
    ],
)
def test_a_plan_that_is_not_of_today_is_refused_by_its_name(tmp_path, text, message):
    path = tmp_path / "edited.yaml"
    path.write_text(f"{text}\ntokens: {{vision: 0.5}}\nsparse_modules: []\n")
    with pytest.raises(ValueError, match=f"^plan .*edited.yaml.* {message}"):
        Plan.load(path)


def test_a_checkpoint_of_a_newer_version_is_refused_by_its_name():
    with pytest.raises(
        ValueError, match="run/madtp_controller.json must be of version 2, got 3: install a newer madtp"
    ):
        migrate_checkpoint({"version": 3}, "run/madtp_controller.json")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: madtp.CompressionConfig(flops_reduction=0.5),
            "CompressionConfig: flops_reduction is now called macs_",
        ),
        (lambda: Plan(flops_reduction=0.5, tokens={}, sparse_modules=()), "Plan: flops_reduction is now called macs_"),
        (
            lambda: branch_targets(None, flops_reduction=0.5, prunable=()),
            "flops_reduction is now called macs_reduction",
        ),
        (lambda: JointLoss()(torch.ones(()), summaries={}), "summaries is now called summary_features"),
    ],
)
def test_old_arguments_name_the_new_ones(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_an_old_name_in_a_config_written_by_hand_is_refused():
    with pytest.raises(ValueError, match="config: flops_reduction is now called macs_reduction"):
        madtp.CompressionConfig.from_dict({"flops_reduction": 0.5})
