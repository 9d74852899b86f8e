# SPDX-License-Identifier: Apache-2.0
"""Budgets: sensitivities leave the model as it was, plans meet their targets, are files, and are what is trained."""

import dataclasses

import pytest
import torch
from test_compression import CONFIG, Questions, Task
from tiny_models import tiny_batch, tiny_blip

import madtp
from madtp.budgets.allocate import choose
from madtp.budgets.plan import Plan
from madtp.budgets.sensitivity import Calibration, find_sensitivities
from madtp.reporting import report


@pytest.fixture(scope="module")
def measured():
    model = tiny_blip()
    madtp.patch(model, CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibration = Calibration(model, Task(), [tiny_batch()], CONFIG)
    assert calibration.distill_loss() == pytest.approx(0, abs=1e-6), "the dense model answers as itself"
    sensitivities = find_sensitivities(calibration)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.madtp_handle.temperatures == {"vision": 0, "text": 0}
    return sensitivities


def with_targets(**targets):
    return dataclasses.replace(CONFIG, **targets)


def test_every_part_has_its_sensitivity(measured):
    assert set(measured.tokens) == {"vision", "text"} and len(measured.weights) == 28
    for points in measured.tokens.values():
        assert points[0].share == 1 and points[0].distill_loss == 0 and len(points) > 1
        shares = [point.share for point in points]
        assert shares == sorted(shares, reverse=True)
    for name, unit in measured.weights.items():
        assert unit.distill_loss > 0 and unit.branch in ("vision", "text"), name
        assert unit.macs == pytest.approx(measured.profile.modules[name].dense_macs / 2) and unit.macs > 0


@pytest.mark.parametrize(("allocation", "reduction"), [("joint", 0.4), ("uniform", 0.4), ("tokens", 0.2)])
def test_a_plan_meets_the_target(measured, allocation, reduction):
    plan = choose(measured, with_targets(macs_reduction=reduction), allocation)
    assert plan.macs_reduction == pytest.approx(reduction, abs=1e-6)
    left = {branch: account.dense_macs for branch, account in measured.profile.branches.items()}
    for name in plan.sparse_modules:
        left[measured.weights[name].branch] -= measured.weights[name].macs
    counted = sum(plan.tokens.get(branch, 1) * macs for branch, macs in left.items())
    assert counted == pytest.approx((1 - reduction) * measured.profile.total.dense_macs)
    assert bool(plan.sparse_modules) or allocation == "tokens"


def test_weights_alone_save_what_they_can(measured):
    plan = choose(measured, with_targets(macs_reduction=0.25), "weights")
    assert set(plan.tokens.values()) == {1.0} and 0.25 <= plan.macs_reduction < 0.3
    with pytest.raises(ValueError, match="macs_reduction must be at most about 0.360, .*'weights'.*got 0.6"):
        choose(measured, with_targets(macs_reduction=0.6), "weights")


def test_joint_is_predicted_to_hurt_least(measured):
    config = with_targets(macs_reduction=0.25)
    losses = {
        a: choose(measured, config, a).predicted["distill_loss"] for a in ("joint", "uniform", "tokens", "weights")
    }
    assert losses["joint"] == min(losses.values())


def test_parameters_are_zeroed_where_it_hurts_least(measured):
    plan = choose(measured, with_targets(macs_reduction=0.2, params_reduction=0.1))
    assert plan.predicted["params_reduction"] >= 0.1
    with pytest.raises(ValueError, match=r"params_reduction must be at most 0\.\d+, .* in 28 modules, got 0.9"):
        choose(measured, with_targets(params_reduction=0.9))
    with pytest.raises(ValueError, match="params_reduction must be at most 0.000, which allocation 'tokens'"):
        choose(measured, with_targets(macs_reduction=0.1, params_reduction=0.1), "tokens")


def test_a_plan_is_a_file(tmp_path, measured):
    plan = choose(measured, with_targets(macs_reduction=0.25))
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    for text, message in (
        ("tokens: [", "must be YAML"),
        ("[1]", "must have the fields .* got list"),
        ("macs_reduction: 0.5\ntokens: {}", "must have the fields"),
        ("macs_reduction: 1.5\ntokens: {}\nsparse_modules: []", "macs_reduction must be a number in"),
        ("macs_reduction: 0.5\ntokens: {vision: 0}\nsparse_modules: []", "tokens must give each branch a share"),
        ("macs_reduction: 0.5\ntokens: {}\nsparse_modules: fc1", "sparse_modules must be a list"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            Plan.load(tmp_path / "bad.yaml")


@pytest.mark.slow
def test_allocate_compares_and_compress_trains_the_plan(tmp_path):
    data, dense = Questions(48), tiny_blip()
    config = with_targets(macs_reduction=0.4)
    plan = madtp.allocate(dense, Task(), data, config)
    assert {"joint", "uniform"} <= set(plan.compared) and "weights" not in plan.compared
    assert not hasattr(dense, "madtp_handle")
    training = {"max_steps": 20, "per_device_train_batch_size": 16, "disable_tqdm": True, "save_strategy": "no"}
    result = madtp.compress(dense, Task(), data, data, config, output_dir=tmp_path, plan=plan, training=training)
    compressed = result.report["compressed"]
    assert compressed["counted_gmacs"] == pytest.approx(0.6 * compressed["dense_gmacs"], rel=0.03)
    assert result.report["plan"]["packed_modules"] == sorted(plan.sparse_modules)
    assert result.report["plan"]["allocation"]["compared"] == plan.compared
    for edited, message in (
        ({"tokens": {"vision": 0.5}}, "plan must give tokens to vision, text, got vision"),
        ({"tokens": {"vision": 1.0, "text": 1.0}, "sparse_modules": ()}, "plan must give a branch fewer tokens"),
        ({"sparse_modules": ("nowhere",)}, "plan must name Linears that may go N:M, got 'nowhere'"),
    ):
        wrong = dataclasses.replace(plan, **edited)
        with pytest.raises(ValueError, match=message):
            madtp.compress(dense, Task(), data, data, config, output_dir=tmp_path, plan=wrong, training=training)


@pytest.mark.filterwarnings("error:.*log scale")
@pytest.mark.slow
def test_weights_alone_are_trained_too(tmp_path):
    data, dense = Questions(16), tiny_blip()
    config = with_targets(macs_reduction=0.25)
    plan = madtp.allocate(dense, Task(), data, config, allocation="weights")
    training = {"max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 2, "save_strategy": "no"}
    result = madtp.compress(dense, Task(), data, data, config, output_dir=tmp_path, plan=plan, training=training)
    compressed = result.report["compressed"]
    assert result.report["plan"]["temperatures"] == {"vision": 0.0, "text": 0.0}
    assert compressed["counted_gmacs"] == pytest.approx((1 - plan.macs_reduction) * compressed["dense_gmacs"], rel=0.01)
    report.write(result.report, tmp_path, command="madtp compress")
    assert "vision 0, text 0" in (tmp_path / "report.md").read_text()


def test_tokens_end_on_a_target_that_a_whole_linear_would_go_past(measured):
    """With weights that cost nothing all tokens would stay, but for the last step."""
    free = {name: dataclasses.replace(unit, distill_loss=0.0) for name, unit in measured.weights.items()}
    measured = dataclasses.replace(measured, weights=free)
    for reduction in (0.21, 0.22, 0.23):
        plan = choose(measured, with_targets(macs_reduction=reduction))
        assert plan.macs_reduction == pytest.approx(reduction, abs=1e-6)
        assert 0.9 < min(plan.tokens.values()) < 1


def test_what_is_wrong_is_refused():
    with pytest.raises(ValueError, match="allocation must be one of joint, .*, got 'best'"):
        madtp.allocate(tiny_blip(), Task(), Questions(4), CONFIG, allocation="best")
    with pytest.raises(ValueError, match="calibration_data must hold samples"):
        madtp.allocate(tiny_blip(), Task(), [], CONFIG)


@pytest.mark.slow
def test_the_front_has_a_plan_for_every_reduction_that_can_be_reached():
    reductions = (0.45, 0.3, 0.999, 0.4)
    plans = madtp.pareto(tiny_blip(), Task(), Questions(48), CONFIG, reductions=reductions)
    assert [plan.macs_reduction for plan in plans] == pytest.approx([0.3, 0.4, 0.45], abs=0.01)
    losses = [plan.predicted["distill_loss"] for plan in plans]
    assert losses == sorted(losses) and all(plan.compared["joint"] > 0 for plan in plans)
    alone = madtp.allocate(tiny_blip(), Task(), Questions(48), dataclasses.replace(CONFIG, macs_reduction=0.4))
    assert (alone.tokens, alone.sparse_modules) == (plans[1].tokens, plans[1].sparse_modules)
    assert alone.compared == pytest.approx(plans[1].compared)
    with pytest.raises(ValueError, match="macs_reduction must be at most about"):
        madtp.pareto(tiny_blip(), Task(), Questions(48), CONFIG, reductions=(0.99, 0.999))
